"""Files of torch.save, opened so that nothing in them can run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

# What torch.load, and a look at what it gave, may raise for a file that is damaged or holds more than tensors and plain
# values: for these alone it is the file's fault.
DAMAGED = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError, EOFError)


def open_tensor_file(path: Path) -> Any:
    """A file's content, its tensors as maps of the file where the format allows. Raises one of DAMAGED."""
    # Files of PyTorch before 1.6 are no archives, and cannot be mapped.
    return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
