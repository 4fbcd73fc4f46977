"""The settings of an import of token files. Standard library only, for a quick --help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FlatDtype = Literal["uint16", "int32", "uint32", "int64"]


MAX_DOCUMENT_TOKENS = 2**31 - 1  # sequence lengths are int32 on disk


@dataclass(frozen=True)
class ImportSettings:
    """Token files to import. The fields are flags of scripts/import_tokens.py."""

    input: tuple[str, ...]
    """Files, Megatron's common prefixes, folders."""
    output: Path
    """Folder of the dataset; it must not exist."""
    tokenizer: str | None = None
    """The tokenizer that made the ids, a folder or file; copied to OUTPUT/tokenizer."""
    eos_token: str | None = None
    """Token that ends a document, if the tokenizer does not name it."""
    vocab_size: int | None = None
    """Without --tokenizer: ids are below this."""
    eos_id: int | None = None
    """Without --tokenizer: the id that ends a document."""
    bos: bool = False
    """Each document begins with the tokenizer's BOS; one without it is an error."""
    dtype: FlatDtype | None = None
    """Type of flat .bin files, and of .npy files without a header."""
    split_at: int | None = None
    """The id that separates documents in files without an index; dropped unless it is EOS (if it is BOS, for
    example)."""
    document_tokens: int | None = None
    """Otherwise, cut such files into documents of this many tokens; without either, each file is one document."""
    across_files: bool = False
    """With --split_at: documents may continue in the next file, as in legacy chunks."""
    append_eos: bool = False
    """Append EOS to documents that don't end with it; otherwise they are an error."""
    copy: bool = False
    """Never link the source's files."""
    shard_tokens: int = 1 << 31
    """Tokens per shard, unless files are linked."""

    def __post_init__(self) -> None:
        if self.split_at is not None and self.document_tokens is not None:
            raise ValueError("--split_at and --document_tokens exclude each other; give one of them")
        if self.split_at is not None and not 0 <= self.split_at < 2**32:
            raise ValueError(f"--split_at {self.split_at}: give an id of 0 or more")
        if self.document_tokens is not None and not 1 <= self.document_tokens < MAX_DOCUMENT_TOKENS:
            raise ValueError(f"--document_tokens {self.document_tokens}: at least 1 and below 2^31 - 1 is needed")
        if self.across_files and self.split_at is None:
            raise ValueError("--across_files needs --split_at, the id that ends a document")
        if self.shard_tokens < 1:
            raise ValueError(f"--shard_tokens {self.shard_tokens}: at least 1 is needed")
