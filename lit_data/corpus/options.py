"""The options of reading text that command lines share. Standard library only."""

from __future__ import annotations

import difflib
import re
from typing import Literal

OnError = Literal["stop", "skip"]
SPLITS = ("file", "blank_line", "line")
"""Units of a document in plain text; any other value is a separator: see `check_split`."""

MAX_DOCUMENT_MB = 1024


def check_split(value: str) -> str:
    """Check a value of --split_documents: a unit, or a separator such as <|endoftext|> that has a line of its own.

    Raises ValueError for a separator without any character but letters, digits and underscores: that is a typing error.
    """
    if value in SPLITS:
        return value
    if value != value.strip() or not re.search(r"[^\w]", value):
        near = difflib.get_close_matches(value, SPLITS, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"--split_documents {value}: choose {', '.join(SPLITS)}, or the line that separates documents, such as "
            f"'<|endoftext|>'{meant}"
        )
    return value
