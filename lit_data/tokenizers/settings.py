"""The settings of training a tokenizer. Standard library only, for a quick --help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_data.corpus.options import MAX_DOCUMENT_MB, OnError

Kind = Literal["byte_bpe", "sentencepiece"]


@dataclass(frozen=True)
class TokenizerSettings:
    """A tokenizer to train. The fields are flags of scripts/train_tokenizer.py."""

    input: tuple[str, ...]
    """Files and folders of text."""
    vocab_size: int
    """Total ids, including bytes and special tokens; fewer if the text does not support as many."""
    output: Path
    """Folder to write; it must not exist."""
    type: Kind = "byte_bpe"
    """Byte-level BPE, or sentencepiece BPE with byte fallback."""
    special_tokens: tuple[str, ...] = ()
    """Additional ones, such as '<|im_start|>', after the built-in ones."""
    max_sample_mb: int | None = None
    """Maximum amount of text, in MB: the start of each file, in proportion to its size. Default: all of it."""
    on_error: OnError = "stop"
    """On invalid text: stop with an error, or skip and count the document."""
    text_field: str = "text"
    """JSON key or column of the text."""
    split_documents: str = "file"
    """Documents in plain text: file, blank_line, line, or the line between them. Short ones bound memory."""
    cleaner: str | None = None
    """Clean the text first, as --cleaner of scripts/prepare_data.py does. Default: the text is unchanged."""
    max_document_mb: int = MAX_DOCUMENT_MB
    """Maximum size of a document, in MB; a longer one is an error."""
    overwrite: bool = False
    """Replace an OUTPUT that holds a tokenizer, once the new one is complete."""
