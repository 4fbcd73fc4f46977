"""The manifest of a packed dataset, and the columns of its document tables.

A dataset is a folder of shards and `manifest.json`, which is written last: no manifest, no dataset. A shard stores its
tokens in `NAME-00000.bin`, their index in `.idx` (see `lit_data/packed/index.py`), and the id, source, place, bytes,
words and metadata of each document in `.docs.parquet`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lit_data.packed.index import DTYPE_CODES
from lit_files.parquet import group_rows
from lit_files.reading import read_dataclass

FORMAT_VERSION = 2  # version 1 had no word counts
READABLE_VERSIONS = (1, 2)
MANIFEST = "manifest.json"
WORDS_WORK = ".words"  # folder in a dataset's, of scripts/count_words.py
SpecialTokens = Literal["text", "parse"]
DOCUMENT_COLUMNS = (
    ("id", pa.string()), ("source", pa.string()), ("place", pa.int64()), ("bytes", pa.int64()), ("words", pa.int64()),
)  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """One shard of a dataset: its base name, its counts, and the size in bytes and SHA-256 of each of its files.

    words: None if not counted.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    sizes: dict[str, int]
    sha256: dict[str, str]
    words: int | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of a packed dataset. All counts are exact.

    Attributes:
        bos_id: the id that each document starts with; None: documents start with their text.
        special_tokens: whether names of special tokens in the text were encoded as `text` or parsed to their ids
            (`parse`).
        words: whitespace-separated words of the encoded text; None: not counted.
    """

    format_version: int
    tokenizer: dict[str, Any]
    vocab_size: int
    eos_id: int
    dtype: str
    documents: int
    tokens: int
    bytes: int
    shards: list[Shard]
    source: dict[str, Any] = field(default_factory=dict)
    bos_id: int | None = None
    special_tokens: SpecialTokens = "text"
    words: int | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the data: tokenizer, encoding options, order and checksums of the shards."""
        content = {
            "tokenizer": self.tokenizer["fingerprint"],
            "eos_id": self.eos_id,
            "shards": [[s.documents, s.tokens, s.sha256["bin"], s.sha256["idx"]] for s in self.shards],
            **self.encoding,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def encoding(self) -> dict[str, Any]:
        """The non-default encoding options; defaults are not hashed, so older fingerprints stay valid."""
        found: dict[str, Any] = {} if self.bos_id is None else {"bos_id": self.bos_id}
        return found if self.special_tokens == "text" else {**found, "special_tokens": self.special_tokens}

    def to_dict(self) -> dict[str, Any]:
        """For manifest.json. Fields newer than version 1 are written only if they differ from the default."""
        content = asdict(self)
        for name in ("bos_id", "special_tokens"):
            if name not in self.encoding:
                del content[name]
        for counted in (content, *content["shards"]):
            if counted["words"] is None:
                del counted["words"]
        return content


def sum_of_words(shards: Sequence[Shard]) -> int | None:
    """Total words of all shards; None if any shard has no count."""
    counts = [s.words for s in shards]
    return None if None in counts else sum(c for c in counts if c is not None)


def read_manifest(folder: Path) -> Manifest:
    """Read a dataset's manifest. Raises FileNotFoundError or ValueError naming the folder and the remedy."""
    path = folder / MANIFEST
    if not path.is_file():
        hint = ""
        if (folder / "train" / MANIFEST).is_file():
            hint = f"; did you mean {folder / 'train'}?"
        elif folder.is_file() and (folder.parent / MANIFEST).is_file():
            hint = f"; did you mean {folder.parent}?"
        raise FileNotFoundError(
            f"{folder} is not a packed dataset: it has no "
            f"{MANIFEST}{hint or ' (make one with scripts/prepare_data.py)'}"
        )
    try:
        manifest = read_dataclass(Manifest, path)
        _check_manifest(manifest)
    except ValueError as error:
        fault = str(error).removeprefix(f"{path} is damaged: ")
        raise ValueError(f"{path} is damaged or of another version: {fault}; prepare the dataset again") from error
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    """Raise ValueError if a manifest contradicts itself."""
    if manifest.format_version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ValueError(f"it has format version {manifest.format_version}; this program reads {readable}")
    if not isinstance(manifest.tokenizer.get("fingerprint"), str):
        raise ValueError("tokenizer.fingerprint is not a string")
    if not isinstance(manifest.tokenizer.get("folder"), str | None):
        raise ValueError("tokenizer.folder is not a string")
    if manifest.dtype not in {np.dtype(d).name for d in DTYPE_CODES.values() if np.dtype(d).kind in "iu"}:
        raise ValueError(f"dtype is {manifest.dtype!r:.40}, no type of token ids")
    if not 0 <= manifest.eos_id < manifest.vocab_size <= 1 << 31:
        raise ValueError(f"eos_id is {manifest.eos_id} and vocab_size {manifest.vocab_size}")
    if manifest.bos_id is not None and not 0 <= manifest.bos_id < manifest.vocab_size:
        raise ValueError(f"bos_id is {manifest.bos_id} and vocab_size {manifest.vocab_size}")
    names = {shard.name for shard in manifest.shards}
    if len(names) != len(manifest.shards) or any(Path(name).name != name for name in names):
        raise ValueError("two shards have the same name, or a name is not that of a file in this folder")
    for count in ("documents", "tokens", "bytes"):
        counts = [getattr(shard, count) for shard in manifest.shards]
        if min(counts, default=0) < 0 or sum(counts) != getattr(manifest, count):
            raise ValueError(f"{count} is {getattr(manifest, count)}, but the shards hold {sum(counts)}")
    if (manifest.shards and manifest.words != sum_of_words(manifest.shards)) or any(
        (s.words or 0) < 0 for s in manifest.shards
    ):
        raise ValueError(f"words is {manifest.words}, but the shards hold {sum_of_words(manifest.shards)}")
    itemsize = np.dtype(manifest.dtype).itemsize
    for shard in manifest.shards:
        if not {"bin", "idx"} <= shard.sizes.keys() & shard.sha256.keys():
            raise ValueError(f"{shard.name} has no size or no checksum of its .bin and .idx")
        if shard.documents > shard.tokens or shard.sizes["bin"] < shard.tokens * itemsize:
            raise ValueError(f"{shard.name} cannot hold {shard.documents} documents and {shard.tokens} tokens")


def check_documents_table(file: pq.ParquetFile, shard: Shard) -> None:
    """Check that an opened docs.parquet belongs to a shard. Raises ValueError naming the fault."""
    schema = {field.name: field.type for field in file.schema_arrow}
    for name, kind in DOCUMENT_COLUMNS:
        if name == "words" and shard.words is None:  # not counted: in older datasets `words` may be user metadata
            continue
        if schema.get(name) != kind:
            raise ValueError(f"its column {name} is {schema.get(name, 'missing')} instead of {kind}")
    if (rows := sum(group_rows(file.metadata))) != shard.documents:
        raise ValueError(f"it has {rows} rows, the manifest says {shard.documents}; prepare the dataset again")
