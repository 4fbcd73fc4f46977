"""The options of reading text that command lines share. Imports no library, for a quick --help."""

from __future__ import annotations

import re
from typing import Literal

from lit_files.near_names import did_you_mean

OnError = Literal["stop", "skip"]
SPLITS = ("file", "blank_line", "line")
"""Units of a document in plain text; any other value is a separator: see `check_split`."""

MAX_DOCUMENT_MB = 1024


def check_split(value: str) -> str:
    """Check a value of --split_documents: a unit, or a separator such as <|endoftext|> that has a line of its own.

    Raises ValueError for a separator without any character but letters, digits and underscores: that is a typo.
    """
    if value in SPLITS:
        return value
    if value != value.strip() or not re.search(r"[^\w]", value):
        raise ValueError(
            f"--split_documents {value}: choose {', '.join(SPLITS)}, or the line that separates documents, such as "
            f"'<|endoftext|>'{did_you_mean(value, SPLITS)}"
        )
    return value
