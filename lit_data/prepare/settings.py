"""The arguments of a preparation: settings that decide what it writes, and how to carry it out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_data.corpus.options import MAX_DOCUMENT_MB, OnError, check_split
from lit_files.platform import usable_cores

Stage = Literal["hash", "join", "encode", "merge"]

MAX_WORKERS = 1024

RESERVED_COLUMNS = (
    "self", "ids", "id", "source", "place", "bytes", "n_bytes", "words", "n_words", "number", "start", "tokens",
    "length",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a preparation writes. The fields are flags of scripts/prepare_data.py."""

    input: tuple[str, ...]
    """Files, folders and patterns of text, and hf:NAME[@CONFIG][:SPLIT] for datasets of Hugging Face."""
    tokenizer: str
    """A tokenizer.json, a sentencepiece .model, or a folder (tokenizer.json is preferred to .model)."""
    val_fraction: float | None = None
    """Fraction of the documents for validation, on average, chosen by a hash of (seed, id). Without this and
    --val_input only OUTPUT/train is written."""
    val_input: tuple[str, ...] | None = None
    """Inputs of validation text, instead of --val_fraction."""
    allow_mixed_splits: bool = False
    """Allow .train files and .dev or .test files in one dataset."""
    seed: int = 0
    """Seed of the split by --val_fraction."""
    eos_token: str | None = None
    """Token that ends a document, if the tokenizer does not name it."""
    bos: bool = False
    """Begin each document with the tokenizer's BOS, as Llama 3 and Gemma 2 do."""
    special_tokens: Literal["text", "parse"] = "text"
    """Names of special tokens in a document: encode them as ordinary text (a page about </s> does not end there), or
    parse them to their ids, for text formatted by a chat template."""
    shard_tokens: int = 1 << 31
    """Tokens per shard."""

    text_field: str = "text"
    """JSON key or column of the text, such as text or translation.de."""
    id_field: str = "id"
    """JSON key or column of the id; documents without one are named path:line."""
    require_id: bool = False
    """Treat a document without an id as an error."""
    metadata: tuple[str, ...] = ()
    """Further keys or columns to keep with each document (docs.parquet)."""
    split_documents: str = "file"
    """Documents in plain text: file, blank_line, line, or the line that separates them, such as '<|endoftext|>'."""
    max_document_mb: int = MAX_DOCUMENT_MB
    """Maximum size of a document, in MB; a longer one is an error."""

    cleaner: str | None = None
    """A profile (babylm, babylm-paper, wikipedia, subtitles, dialogue) or module:function, text -> text or None."""
    filter: tuple[str, ...] = ()
    """module:function, text -> whether to keep the document."""
    min_characters: int = 0
    """Remove shorter documents (after cleaning)."""
    max_characters: int = 0
    """Remove longer documents (after cleaning); 0: no limit."""
    language: tuple[str, ...] = ()
    """Keep only documents in these languages (ISO 639-1). Default: all."""
    min_language_probability: float = 0.5
    """Minimum probability of --language."""
    max_token_word_ratio: float = 0.0
    """Remove documents with more tokens per word; 0: no limit."""
    dedup: Literal["none", "exact", "bloom"] = "none"
    """Remove paragraphs that occurred before: exactly, in two passes, or with a Bloom filter in one pass, which also
    removes a few new ones."""
    dedup_min_characters: int = 20
    """Always keep shorter paragraphs."""
    bloom_paragraphs: int = 0
    """Expected number of paragraphs, the capacity of the Bloom filter."""
    bloom_false_positives: float = 1e-6
    """Fraction of new paragraphs that a full Bloom filter may remove."""
    near_dedup: float = 0.0
    """Remove documents whose estimated Jaccard similarity (MinHash) to an earlier one is at least this; 0: off."""

    parts: int = 1
    """Split the input files into this many ranges, prepared separately and merged."""
    name: str = "data"
    """Shards are named NAME-00000."""

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
        raise ValueError(f"--val_fraction {s.val_fraction}: give a fraction between 0 and 1, such as 0.01")
    for flag, least in (
        ("shard_tokens", 1), ("parts", 1), ("min_characters", 0), ("max_characters", 0), ("dedup_min_characters", 0),
        ("max_token_word_ratio", 0), ("bloom_paragraphs", 0), ("max_document_mb", 1),
    ):  # fmt: skip
        if not getattr(s, flag) >= least:
            raise ValueError(f"--{flag} {getattr(s, flag)}: at least {least} is needed")
    for column in s.metadata:
        if column in RESERVED_COLUMNS:
            raise ValueError(f"--metadata {column}: the name is reserved, as are all of {', '.join(RESERVED_COLUMNS)}")
    if len(set(s.metadata)) != len(s.metadata):
        raise ValueError(f"--metadata {' '.join(s.metadata)}: a name is given twice")
    check_split(s.split_documents)
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
            raise ValueError(f"--bloom_false_positives {s.bloom_false_positives}: give a fraction between 0 and 0.5")


@dataclass(frozen=True)
class Execution:
    """Execution options of a preparation; none of them changes the datasets. The fields are flags of the script."""

    output: Path
    """Folder to write; it must not exist."""
    on_error: OnError = "stop"
    """On invalid UTF-8 or JSON, or a document without text: stop with an error, or skip and count the document."""
    workers: int | None = None
    """Processes, with --executor those of each task. Default: all cores (1 with --executor)."""
    overwrite: bool = False
    """Replace an OUTPUT that this program wrote, once the new one is complete."""
    fresh: bool = False
    """Discard the work of an interrupted call instead of resuming it (not with --stage and --executor)."""
    dry_run: bool = False
    """Process everything and report, but write nothing."""
    work: Path | None = None
    """Working folder, on the file system of OUTPUT. Default: .OUTPUT.preparing beside it."""
    commit_seconds: float = 30.0
    """Seconds between commits; a kill loses at most this much work."""
    stage: Stage | None = None
    """Run only this stage, of part --part if it is one of hash and encode."""
    part: int = 0
    """Part that --stage works on, from 0."""
    executor: Literal["local", "slurm"] | None = None
    """Run the stages as tasks of datatrove's executors."""
    tasks: int | None = None
    """Tasks of --executor at the same time. Default: --parts."""
    executor_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the executor, such as '{"time": "10:00:00", "partition": "cpu", "cpus_per_task": 16}'."""
    warn_of_large_text: bool = True
    """Not a flag: warn of large plain-text files that become one document each (unless --split_documents is given)."""

    def __post_init__(self) -> None:
        if self.workers is not None and not 1 <= self.workers <= MAX_WORKERS:
            raise ValueError(f"--workers {self.workers}: give a number of processes from 1 to {MAX_WORKERS}")
        if not self.commit_seconds >= 0:
            raise ValueError(f"--commit_seconds {self.commit_seconds}: 0 or more is needed")
        if self.executor is not None and self.stage is not None:
            raise ValueError("--executor and --stage exclude each other: the executor runs all stages")
        if self.fresh and (self.executor is not None or self.stage is not None):
            raise ValueError(
                "--fresh works without --stage and --executor only, whose tasks share the working folder: delete "
                f"{self.work_folder} instead"
            )
        if self.dry_run and (self.executor is not None or self.stage is not None):
            raise ValueError("--dry_run processes the whole corpus on this machine: remove --executor and --stage")

    @property
    def processes(self) -> int:
        """Number of worker processes; with 1, everything runs in this process."""
        return self.workers or min(usable_cores(), MAX_WORKERS)

    @property
    def work_folder(self) -> Path:
        """The working folder."""
        output = Path(os.path.abspath(self.output))
        return self.work or output.with_name(f".{output.name}.preparing")
