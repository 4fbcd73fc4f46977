"""Summarizes a packed dataset: counts, document lengths, sources, repeated ids, samples. Constant memory, even for 10^9
documents.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lit_data.packed.documents import Documents
from lit_data.packed.index import HEADER, IntArray
from lit_data.packed.manifest import MANIFEST, WORDS_WORK, check_documents_table, read_manifest
from lit_data.packed.reader import PackedDataset
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_files.checksum import file_sha256
from lit_files.database import open_database
from lit_files.parquet import open_table
from lit_files.progress import track

BLOCK_DOCUMENTS = 1 << 16
BAR_CHARACTERS = 40


@dataclass(frozen=True)
class Bin:
    """A histogram bin: documents of `low` to `high` tokens, including EOS."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """Distribution of document lengths in tokens, including EOS. `bins` double in width, from shortest to longest."""

    shortest: int
    mean: float
    longest: int
    bins: list[Bin]


@dataclass(frozen=True)
class SourceCounts:
    """Counts of one source file."""

    source: str
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Sources:
    """The number of sources, and the largest of them."""

    count: int
    largest: list[SourceCounts]


@dataclass(frozen=True)
class RepeatedIds:
    """The number of ids shared by several documents, the number of these documents, and the most frequent ids."""

    ids: int
    documents: int
    most: dict[str, int]


@dataclass(frozen=True)
class Sample:
    """A document and the start of its text (or of its ids, without a tokenizer)."""

    number: int
    id: str
    source: str
    place: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Inventory:
    """The contents of a packed dataset.

    Attributes:
        totals: counts and settings from the manifest.
        sources, repeated_ids: None without duckdb.
    """

    totals: dict[str, Any]
    lengths: Lengths
    sources: Sources | None
    repeated_ids: RepeatedIds | None
    samples: list[Sample]

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        return {**found.pop("totals"), **found}

    def __str__(self) -> str:
        """Many readable lines."""
        t, sources, repeated = self.totals, self.sources, self.repeated_ids
        per_token = f", {t['text_bytes'] / t['tokens']:.3f} bytes per token" if t["tokens"] else ""
        text = f"{t['text_bytes']:,} bytes of text{per_token}" if t["text_bytes"] else "bytes of text unknown"
        count = f"words not counted; python scripts/count_words.py {t['folder']} does it"
        bos = "no BOS" if t["bos_id"] is None else f"BOS {t['bos_id']}"
        parsed = ", special tokens parsed" if t["special_tokens"] == "parse" else ""
        lines = [
            f"{t['folder']}: {t['documents']:,} documents, {t['tokens']:,} tokens, {text}",
            f"  {t['words']:,} words" if t["words"] is not None else f"  {count}",
            f"  {t['shards']:,} shards of {t['dtype']}, {t['file_bytes']:,} bytes of files",
            f"  vocabulary {t['vocab_size']:,}, EOS {t['eos_id']}, {bos}{parsed}, tokenizer {t['tokenizer'][:12]}",
            f"  fingerprint {t['fingerprint'][:12]}",
            "",
            histogram(self.lengths),
        ]
        if sources is not None:
            lines += ["", f"{'tokens':>15}  {'documents':>13}  source ({sources.count:,} in all)"]
            lines += [f"{s.tokens:>15,}  {s.documents:>13,}  {s.source}" for s in sources.largest]
        if repeated is not None:
            some = f", in {repeated.documents:,} documents" if repeated.ids else ""
            lines += ["", f"{repeated.ids:,} ids repeat{some}"]
            lines += [f"{count:>15,}  {id}" for id, count in repeated.most.items()]
        else:
            lines += ["", "sources and repeated ids are left out; they need duckdb: pip install 'llammlein[data]'"]
        for s in self.samples:
            place = f", {s.place}" if s.place else ""
            lines += ["", f"#{s.number} {s.id} ({s.source}{place}), {s.tokens:,} tokens"]
            lines.append(f"    {' '.join(s.text.split())}")
        return "\n".join(lines)


def take_inventory(
    dataset: PackedDataset,
    *,
    sources: int = 20,
    samples: int = 0,
    seed: int = 0,
    max_chars: int = 400,
    tokenizer: str | Path | None = None,
    temporary: Path | None = None,
) -> Inventory:
    """Summarize a dataset.

    Args:
        sources: number of largest sources to list.
        samples, seed, max_chars: number of random documents to show, and characters of each.
        tokenizer: decodes the samples. Default: the one beside the dataset.
        temporary: folder to which DuckDB spills beyond 1 GB of memory. Default: the system's.
    """
    for flag, value in (("samples", samples), ("sources", sources), ("max_chars", max_chars)):
        if value < 0:
            raise ValueError(f"--{flag} {value}: at least 0 is needed")
    opened = tokenizer_of(dataset, tokenizer) if samples else None
    manifest, has_duckdb = dataset.manifest, importlib.util.find_spec("duckdb") is not None
    totals = {
        "folder": str(dataset.path),
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "text_bytes": manifest.bytes,
        "words": manifest.words,
        "shards": len(manifest.shards),
        "file_bytes": sum(sum(s.sizes.values()) for s in manifest.shards),
        "dtype": manifest.dtype,
        "vocab_size": manifest.vocab_size,
        "eos_id": manifest.eos_id,
        "bos_id": manifest.bos_id,
        "special_tokens": manifest.special_tokens,
        "tokenizer": manifest.tokenizer["fingerprint"],
        "fingerprint": dataset.fingerprint,
    }
    return Inventory(
        totals,
        lengths_of(dataset),
        sources_of(dataset, sources, temporary) if has_duckdb else None,
        repeated_ids(dataset, temporary=temporary) if has_duckdb else None,
        samples_of(dataset, opened, samples, seed, max_chars),
    )


def lengths_of(dataset: PackedDataset) -> Lengths:
    """The distribution of document lengths."""
    documents = np.zeros(32, dtype=np.int64)
    tokens = np.zeros(32, dtype=np.int64)
    shortest, longest = np.iinfo(np.int64).max, 0
    for lengths in _blocks_of_lengths(dataset):
        bins = np.frexp(lengths)[1] - 1  # exact floor(log2)
        documents += np.bincount(bins, minlength=32)
        for number in np.unique(bins):
            tokens[number] += lengths[bins == number].sum()
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
    filled = np.flatnonzero(documents)
    bins_of = range(int(filled[0]), int(filled[-1]) + 1) if len(filled) else range(0)
    found = [Bin(1 << b, (2 << b) - 1, int(documents[b]), int(tokens[b])) for b in bins_of]
    total = int(documents.sum())
    return Lengths(int(shortest) if total else 0, int(tokens.sum()) / max(total, 1), longest, found)


def histogram(lengths: Lengths) -> str:
    """Several lines of text: a bar of documents per bin, with its share of the tokens."""
    most = max((b.documents for b in lengths.bins), default=1)
    total = max(1, sum(b.tokens for b in lengths.bins))
    lines = [f"{'tokens':>21}  {'documents':>13}  {'of all tokens':>13}"]
    for b in lengths.bins:
        bar = "#" * -(-BAR_CHARACTERS * b.documents // most)
        edges = f"{b.low:,} to {b.high:,}" if b.low < b.high else f"{b.low:,}"
        lines.append(f"{edges:>21}  {b.documents:>13,}  {b.tokens / total:>13.1%}  {bar}".rstrip())
    return "\n".join(lines)


def draw_lengths(lengths: Lengths, title: str, file: Path) -> None:
    """Plot the documents and tokens of each bin as bars."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--picture needs matplotlib: pip install 'llammlein[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True)
    for panel, name in zip(panels, ("documents", "tokens"), strict=True):
        lows = [b.low for b in lengths.bins]
        panel.bar(lows, [getattr(b, name) for b in lengths.bins], width=lows, align="edge", edgecolor="white")
        panel.set_ylabel(name)
    panels[0].set_title(title)
    panels[1].set_xscale("log", base=2)
    panels[1].set_xlabel("length of the document in tokens")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def sources_of(dataset: PackedDataset, largest: int = 20, temporary: Path | None = None) -> Sources:
    """Documents, tokens and text bytes per source, by descending tokens.

    Needs duckdb, which spills beyond 1 GB to the folder `temporary` (default: the system's).
    """
    with open_database(folder=temporary) as database:
        database.register("documents", _rows(dataset, ["source", "bytes"]))
        database.execute(
            "CREATE TABLE sources AS SELECT source, count(*) AS documents, sum(tokens)::BIGINT AS tokens, "
            "sum(bytes)::BIGINT AS bytes FROM documents GROUP BY source"
        )
        (count,) = database.execute("SELECT count(*) FROM sources").fetchone()
        rows = database.execute(f"SELECT * FROM sources ORDER BY tokens DESC, source LIMIT {largest}").fetchall()
    return Sources(count, [SourceCounts(*row) for row in rows])


def repeated_ids(dataset: PackedDataset, most: int = 5, temporary: Path | None = None) -> RepeatedIds:
    """Ids shared by several documents. Needs duckdb, as `sources_of` does."""
    with open_database(folder=temporary) as database:
        database.register("documents", _rows(dataset, ["id"]))
        database.execute(
            "CREATE TABLE repeated AS SELECT id, count(*) AS n FROM documents GROUP BY id HAVING count(*) > 1"
        )
        ids, documents = database.execute("SELECT count(*), coalesce(sum(n), 0)::BIGINT FROM repeated").fetchone()
        rows = database.execute(f"SELECT id, n FROM repeated ORDER BY n DESC, id LIMIT {most}").fetchall()
    return RepeatedIds(ids, documents, dict(rows))


def samples_of(
    dataset: PackedDataset, tokenizer: Tokenizer | None, count: int, seed: int, max_characters: int
) -> list[Sample]:
    """Random documents by the seed, in dataset order."""
    chosen = np.random.default_rng(seed).choice(dataset.n_documents, min(count, dataset.n_documents), replace=False)
    found = []
    for number, facts in Documents(dataset).facts(chosen.tolist()).items():
        start, stop = dataset.document_start(np.asarray([number, number + 1])).tolist()
        tokens = stop - start
        ids = dataset.tokens(start, start + min(tokens, max_characters))  # a token is rarely shorter than a character
        text = tokenizer.decode(ids) if tokenizer is not None else " ".join(map(str, ids.tolist()))
        found.append(Sample(number, facts["id"], facts["source"], facts["place"], tokens, text[:max_characters]))
    return found


def tokenizer_of(
    dataset: PackedDataset, path: str | Path | None = None, eos_token: str | None = None
) -> Tokenizer | None:
    """Open the tokenizer at `path`, or the one stored beside the dataset; None if there is none.

    Raises:
        ValueError: it is not the one that encoded the tokens.
    """
    folder = path if path is not None else dataset.tokenizer_folder
    if folder is None:
        return None
    tokenizer = open_tokenizer(folder, eos_token)
    known = dataset.manifest.tokenizer
    if tokenizer.fingerprint != known["fingerprint"] and known.get("kind") != "unknown":
        raise ValueError(
            f"--tokenizer {folder} is not the tokenizer that {dataset.path} was encoded with (their fingerprints "
            "differ); give that one"
        )
    return tokenizer


def faults_of(folder: str | Path) -> list[str]:
    """Check all files of a dataset; lists those missing or with a wrong size or checksum.

    Raises:
        FileNotFoundError, ValueError: there is no manifest, or it is damaged.
    """
    if (Path(folder) / WORDS_WORK / MANIFEST).is_file():
        return [f"{folder}: scripts/count_words.py was interrupted; run it again on this folder to finish"]
    found = []
    shards = read_manifest(Path(folder)).shards
    files = [(Path(folder) / f"{s.name}.{kind}", s.sizes[kind], s.sha256[kind]) for s in shards for kind in s.sha256]
    total = sum(size for _, size, _ in files) / 1e6
    for file, size, expected in track(files, "checking", "MB", total, size=lambda one: one[1] / 1e6):
        if not file.is_file():
            found.append(f"{file} is missing")
        elif (actual := file.stat().st_size) != size:
            found.append(f"{file} has {actual} bytes instead of {size}: truncated or replaced")
        elif file_sha256(file) != expected:
            found.append(f"{file} has changed since it was written: its SHA-256 differs")
    return found


def _blocks_of_lengths(dataset: PackedDataset) -> Iterator[IntArray]:
    for shard in dataset.manifest.shards:
        for start in range(0, shard.documents, BLOCK_DOCUMENTS):
            count = min(BLOCK_DOCUMENTS, shard.documents - start)
            offset = HEADER.size + 4 * start
            path = dataset.path / f"{shard.name}.idx"
            lengths = np.fromfile(path, "<i4", count, offset=offset).astype(np.int64)
            if lengths.min() < 1:
                raise ValueError(f"{path} is damaged: a document has {lengths.min()} tokens; prepare the dataset again")
            yield lengths


def _rows(dataset: PackedDataset, columns: Sequence[str]) -> pa.RecordBatchReader:
    """Stream the documents' rows once: some columns of docs.parquet, and `tokens`."""
    kinds = {"id": pa.string(), "source": pa.string(), "bytes": pa.int64()}
    schema = pa.schema([*((c, kinds[c]) for c in columns), ("tokens", pa.int64())])

    def batches() -> Iterator[pa.RecordBatch]:
        first = 0
        for shard in dataset.manifest.shards:
            with open_table(dataset.path / f"{shard.name}.docs.parquet") as docs:
                check_documents_table(docs, shard)
                for batch in docs.iter_batches(BLOCK_DOCUMENTS, columns=list(columns)):
                    starts = dataset.document_start(np.arange(first, first + batch.num_rows + 1))
                    first += batch.num_rows
                    arrays = [batch.column(c).cast(kinds[c]) for c in columns]
                    yield pa.record_batch([*arrays, pa.array(np.diff(starts))], schema=schema)

    read = track(batches(), "reading documents", "documents", dataset.n_documents, size=lambda batch: batch.num_rows)
    return pa.RecordBatchReader.from_batches(schema, read)
