"""The options of reading text that command lines share. Standard library only."""

from __future__ import annotations

from typing import Literal

OnError = Literal["stop", "skip"]
SplitDocuments = Literal["file", "blank_line", "line"]
SPLITS: tuple[SplitDocuments, ...] = ("file", "blank_line", "line")

MAX_DOCUMENT_MB = 1024
