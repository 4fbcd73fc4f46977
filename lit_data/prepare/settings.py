"""The settings that decide what a preparation writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_data.corpus.readers import MAX_DOCUMENT_MB, SPLITS, SplitDocuments

RESERVED_COLUMNS = (
    "self", "ids", "id", "source", "place", "bytes", "n_bytes", "words", "n_words", "number", "start", "tokens",
    "length",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """All that decides what a preparation writes. The names are the flags of scripts/prepare_data.py.

    Attributes:
        input: files, folders, patterns and datasets, see `lit_data.corpus.files.list_files`.
        tokenizer: folder or file, see `lit_data.tokenizers.tokenizer.open_tokenizer`; `eos_token` names its end of
            document.
        bos: each document begins with the tokenizer's BOS.
        special_tokens: names of special tokens in a document are encoded as the `text` they are, or `parse`d: as
            their ids.
        val_fraction: share of the documents (in the mean) that goes to val: those whose hash of (seed, id) says so.
        val_input: inputs that make up val instead. Without either there is only train.
        allow_mixed_splits: .train files and .dev or .test files may make up one dataset.
        require_id: a document without the field `id_field` is a fault.
        metadata: fields of the documents to keep in `docs.parquet`.
        shard_tokens: size of a shard.
        cleaner: a profile of `lit_data.corpus.cleaners`, or module:function.
        filter: the user's own filters, module:function.
        min_characters, max_characters: documents outside are left out (after cleaning; max 0: no limit).
        language, min_language_probability: languages (ISO 639-1) to keep; none keeps all.
        max_token_word_ratio: documents with more tokens a word are left out; 0: no limit.
        dedup: paragraphs that occurred before are left out: found `exact`ly in two passes, or by a `bloom` filter in
            one, in which a few new ones look old.
        dedup_min_characters: shorter paragraphs are always kept.
        bloom_paragraphs, bloom_false_positives: number of paragraphs the filter is made for, and the share of new
            ones that it may take for old ones when it is full.
        near_dedup: documents whose estimated Jaccard similarity to an earlier kept one is at least this are left out;
            0: none.
        parts: the inputs are cut into so many ranges of whole files, prepared one by one and merged.
        name: shards are called NAME-00000.
        split_documents, max_document_mb: see `lit_data.corpus.readers.read_documents`.
    """

    input: tuple[str, ...]
    tokenizer: str
    eos_token: str | None = None
    bos: bool = False
    special_tokens: Literal["text", "parse"] = "text"
    val_fraction: float | None = None
    val_input: tuple[str, ...] | None = None
    seed: int = 0
    text_field: str = "text"
    id_field: str = "id"
    require_id: bool = False
    metadata: tuple[str, ...] = ()
    shard_tokens: int = 1 << 31
    cleaner: str | None = None
    filter: tuple[str, ...] = ()
    min_characters: int = 0
    max_characters: int = 0
    language: tuple[str, ...] = ()
    min_language_probability: float = 0.5
    max_token_word_ratio: float = 0.0
    dedup: Literal["none", "exact", "bloom"] = "none"
    dedup_min_characters: int = 20
    bloom_paragraphs: int = 0
    bloom_false_positives: float = 1e-6
    near_dedup: float = 0.0
    parts: int = 1
    name: str = "data"
    split_documents: SplitDocuments = "file"
    max_document_mb: int = MAX_DOCUMENT_MB
    allow_mixed_splits: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def sides(self) -> tuple[str, ...]:
        """The datasets that are written."""
        return ("train",) if self.val_fraction is None and self.val_input is None else ("train", "val")

    @property
    def needs_hashes(self) -> bool:
        """Whether a first pass over all text is needed."""
        return self.dedup == "exact" or self.near_dedup > 0


def _check(s: Settings) -> None:
    if s.val_fraction is not None and s.val_input is not None:
        raise ValueError("--val_fraction and --val_input exclude each other; give one of them")
    if s.val_fraction is not None and not 0 < s.val_fraction < 1:
        raise ValueError(f"--val_fraction {s.val_fraction}: give a share between 0 and 1, such as 0.01")
    for flag, least in (
        ("shard_tokens", 1), ("parts", 1), ("min_characters", 0), ("max_characters", 0), ("dedup_min_characters", 0),
        ("max_token_word_ratio", 0), ("bloom_paragraphs", 0), ("max_document_mb", 1),
    ):  # fmt: skip
        if not getattr(s, flag) >= least:
            raise ValueError(f"--{flag} {getattr(s, flag)}: at least {least} is needed")
    for column in s.metadata:
        if column in RESERVED_COLUMNS:
            raise ValueError(f"--metadata {column}: the name is taken; these are: {', '.join(RESERVED_COLUMNS)}")
    if len(set(s.metadata)) != len(s.metadata):
        raise ValueError(f"--metadata {' '.join(s.metadata)}: a name is given twice")
    if s.split_documents not in SPLITS:
        raise ValueError(f"--split_documents {s.split_documents}: choose one of {', '.join(SPLITS)}")
    if not 0 <= s.min_language_probability <= 1:
        raise ValueError(f"--min_language_probability {s.min_language_probability}: give one between 0 and 1")
    if s.special_tokens not in ("text", "parse"):
        raise ValueError(f"--special_tokens {s.special_tokens}: choose text or parse")
    if s.dedup not in ("none", "exact", "bloom"):
        raise ValueError(f"--dedup {s.dedup}: choose none, exact or bloom")
    if not 0 <= s.near_dedup <= 1:
        raise ValueError(f"--near_dedup {s.near_dedup}: give a similarity between 0 (off) and 1")
    if s.dedup == "bloom":
        if s.parts > 1:
            raise ValueError(f"--dedup bloom needs one ordered pass; --parts {s.parts} needs --dedup exact")
        if s.bloom_paragraphs < 1:
            raise ValueError("--dedup bloom needs --bloom_paragraphs N, the number of paragraphs expected")
        if not 0 < s.bloom_false_positives < 0.5:
            raise ValueError(f"--bloom_false_positives {s.bloom_false_positives}: give a share between 0 and 0.5")


def strings(values: Sequence[str | Path] | None) -> tuple[str, ...] | None:
    """Paths as text, for Settings."""
    return None if values is None else tuple(str(v) for v in values)
