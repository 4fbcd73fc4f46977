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


def fault(error: BaseException) -> str:
    """`: ` and the fault of the file, if the error is one of ours or names a refused class; else "": the messages of
    Python and torch are about their own code.
    """
    if type(error) is ValueError:
        return f": {' '.join(str(error).split())}"
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)) or re.match(r"([\w.]+) is not allowed in", str(error)):
        return f": it holds {refused[1]}, which is neither a tensor nor a plain value and is not opened"
    return ""


def open_tensor_file(path: Path) -> Any:
    """A file's content, its tensors as maps of the file where the format allows. Raises one of DAMAGED."""
    regular(path)
    # Files of PyTorch before 1.6 are no archives, and cannot be mapped.
    try:
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except OSError as error:
        if error.filename is not None:
            raise
        raise ValueError("it is empty or truncated") from error
    except ValueError as error:  # by Python or torch; `fault` passes on only ours
        raise pickle.UnpicklingError(str(error)) from error
