"""Files of torch.save, opened so that nothing in them can run."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from lit_files.reading import regular

# Exceptions of torch.load, and of reading its result, for a file that is damaged or holds more than tensors and plain
# values. Any other exception is not the file's fault.
DAMAGED = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError, EOFError)


# torch's advice to users who trust the file, which nobody should follow after these errors.
_ADVICE = re.compile(r"weights_only|Weights only load|documentation of torch|safe_globals|trusted source|file an issue")


def fault(error: BaseException) -> str:
    """The error's text without torch's advice to load the file anyway, which would run code in it."""
    sentences = re.split(r"(?<=[.:])\s+|\s*\n\s*", str(error).strip())
    return f"{type(error).__name__}: {' '.join(s for s in sentences if not _ADVICE.search(s))}".rstrip(": ")


def open_tensor_file(path: Path) -> Any:
    """A file's content, its tensors as maps of the file where the format allows. Raises one of DAMAGED."""
    regular(path)
    # Files of PyTorch before 1.6 are no archives, and cannot be mapped.
    try:
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except OSError as error:
        if error.filename is not None:
            raise
        raise ValueError(f"it cannot be mapped: {error}") from error  # an empty file, or one cut in its header
