"""The stages of a preparation in its working folder; a killed stage resumes from its last commit.

`hash` (per part): paragraph hashes and document signatures; only with deduplication that needs them.
`join`: finds the duplicates across all parts; the first occurrence of each is kept.
`encode` (per part): text to tokens, one packed dataset per part and side.
`merge`: concatenates the parts' datasets; gives the same files as a single part.

A stage takes documents in segments. After each, its output is synced and its position written to `STAGE.json` in the
part's folder; a resumed stage truncates later output and continues reading from there.

One module, since the stages share the layout of the working folder and of its progress files.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lit_data.corpus.files import ReadErrors, sizes_of
from lit_data.corpus.readers import Document, Place, read_documents
from lit_data.packed.manifest import check_documents_table, read_manifest
from lit_data.packed.reader import PackedDataset
from lit_data.packed.writer import PackedWriter
from lit_data.prepare.bloom import BloomDedup
from lit_data.prepare.exact_dedup import Dropped, find_duplicates
from lit_data.prepare.job import Job
from lit_data.prepare.near_dedup import NearDuplicates, find_near_duplicates
from lit_data.prepare.pool import Pool
from lit_data.prepare.report import COUNTED, StageReports
from lit_data.prepare.settings import Execution
from lit_data.prepare.sinks import CountSink, EncodeSink, HashSink, Sink, chunk_file
from lit_data.prepare.worker import Encoded, Item, Worker
from lit_files.parquet import open_table
from lit_files.progress import TaskProgress
from lit_files.publish import write_json
from lit_files.reading import read_dataclass, read_object

BATCH_CHARACTERS = 1 << 18  # per call to a worker: enough to hide the cost of sending it
BATCH_DOCUMENTS = 512
COMMIT_SPACING = 20  # a commit is followed by at least so many times its duration: commits take at most 5 %
JOIN_MEMORY_BYTES = 2 << 30
MERGE_DOCUMENTS = 4096
TITLES = {"hash": "looking for duplicates", "encode": "encoding"}  # of stages, while they run


@dataclasses.dataclass(frozen=True)
class _Progress:
    """Progress of a stage in a part: documents before `number` are done; the last of them is at `place`.

    Attributes:
        errors, first_errors: count and first messages of documents that could not be read.
        state: of the stage's sink.
    """

    done: bool
    number: int
    place: tuple[int, int] | None
    errors: int
    first_errors: list[str]
    state: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> _Progress:
        return read_dataclass(cls, path) if path.is_file() else cls(False, 0, None, 0, [], None)


class Preparation:
    """A preparation in progress: a job and its working folder."""

    def __init__(self, job: Job, work: Path, execution: Execution) -> None:
        self.job, self.work, self.execution = job, work, execution
        self.settings = job.settings

    def part_folder(self, part: int) -> Path:
        """The working folder of a part."""
        return self.work / f"part-{part:05d}"

    def run(self) -> None:
        """Run all stages that are not done yet."""
        parts = range(self.settings.parts)
        if self.settings.needs_hashes:
            for part in parts:
                self.hash_part(part)
            self.join()
        for part in parts:
            self.encode_part(part)
        self.merge()

    def is_done(self, stage: str, part: int) -> bool:
        """Whether a stage of a part is complete."""
        return _Progress.read(self.part_folder(part) / f"{stage}.json").done

    def committed(self) -> bool:
        """Whether there is committed work to resume from."""
        return any(_Progress.read(path).number for path in self.work.glob("part-*/*.json"))

    def hash_part(self, part: int) -> None:
        """Run the first pass over a part: hashes and signatures."""
        folder = self.part_folder(part)
        folder.mkdir(exist_ok=True)

        def sink(state: dict[str, Any] | None, number: int) -> HashSink:
            return HashSink(folder, self.settings.near_dedup > 0, state, number)

        self._run(part, "hash", sink, lambda pool, batches: pool.map("hash", batches))

    def join(self) -> None:
        """Find the duplicates of all parts."""
        done = self.work / "join.json"
        if done.is_file():
            return
        chunks: list[Path] = []  # folders named by chunk number
        for part in range(self.settings.parts):
            if not self.is_done("hash", part):
                raise ValueError(f"--stage join: part {part} is not hashed yet (--stage hash --part {part})")
            folder = self.part_folder(part)
            chunks += [folder / str(k) for k in range(len(_chunks(folder)))]
        facts = {}
        temporary = self.work / "join.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        near: list[Path] | None = None
        if self.settings.near_dedup:
            signatures, near = ([chunk_file(kind, c) for c in chunks] for kind in ("signatures", "near"))
            near_counts = find_near_duplicates(
                signatures,
                near,
                threshold=self.settings.near_dedup,
                memory_bytes=JOIN_MEMORY_BYTES,
                temporary=temporary,
            )
            facts["near_duplicates"] = dataclasses.asdict(near_counts)
        if self.settings.dedup == "exact":
            hashes, dropped = ([chunk_file(kind, c) for c in chunks] for kind in ("hashes", "dropped"))
            counts = find_duplicates(
                hashes, dropped, memory_bytes=JOIN_MEMORY_BYTES, temporary=temporary, excluded=near
            )
            facts["paragraphs"] = dataclasses.asdict(counts)
        shutil.rmtree(temporary)
        write_json(done, facts)

    def encode_part(self, part: int) -> None:
        """Encode the text of a part."""
        folder = self.part_folder(part)
        folder.mkdir(exist_ok=True)
        if self.settings.needs_hashes and not (self.work / "join.json").is_file():
            raise ValueError(f"--stage encode --part {part}: the duplicates are not known yet (--stage join)")
        bloom: BloomDedup | None = None

        def sink(state: dict[str, Any] | None, number: int) -> EncodeSink | CountSink:
            nonlocal bloom
            if self.settings.dedup == "bloom":
                size = (self.settings.bloom_paragraphs, self.settings.bloom_false_positives)
                bloom = BloomDedup(*size, path=folder / state["bloom"] if state else None)
            if self.execution.dry_run:
                return CountSink(self.settings.sides, state)
            sides = self.settings.sides
            writers = {side: self.writer(folder, side, state["sides"][side] if state else None) for side in sides}
            return EncodeSink(folder, writers, bloom, state)

        def encode(pool: Pool, batches: Iterable[list[Item]]) -> Iterator[Encoded]:
            if bloom is not None:
                batches = _drop_by_bloom(pool, batches, bloom)
            elif self.settings.needs_hashes:
                batches = self._drop_by_list(folder, batches)
            return pool.map("encode", batches)

        self._run(part, "encode", sink, encode)

    def _drop_by_list(self, folder: Path, batches: Iterable[list[Item]]) -> Iterator[list[Item]]:
        chunks = _chunks(folder)
        files = [folder / str(k) for k in range(len(chunks))]
        exact = self.settings.dedup == "exact"
        dropped = _ByChunk(chunks, [chunk_file("dropped", f) for f in files], Dropped) if exact else None
        near = (
            _ByChunk(chunks, [chunk_file("near", f) for f in files], NearDuplicates)
            if self.settings.near_dedup
            else None
        )
        for batch in batches:
            for item in batch:
                if dropped is not None:
                    item.dropped = dropped.of(item.number)
                if near is not None:
                    similarity = near.of(item.number)
                    item.near = f"near duplicate: similarity {similarity:.2f}" if similarity is not None else ""
            yield batch

    def _run(self, part: int, stage: str, make_sink: Any, process: Any) -> None:
        """Run a part's documents through a stage, segment by segment, from its last commit."""
        path = self.part_folder(part) / f"{stage}.json"
        progress = _Progress.read(path)
        if progress.done:
            return
        sink: Sink = make_sink(progress.state, progress.number)
        try:
            documents = _PartDocuments(self, part, progress)
            make = functools.partial(Worker, self.settings, with_tokenizer=stage == "encode")
            of = f" part {part} of {self.settings.parts}" if self.settings.parts > 1 else ""
            shown = TaskProgress()
            with Pool(self.execution.processes, make) as pool, shown.task(f"{TITLES[stage]}{of}"):
                while not progress.done:
                    for result in process(pool, _batches(documents.segment())):
                        sink.write(result)
                        documents.show(shown)
                    began = time.monotonic()
                    state = sink.commit(documents.number, documents.ended)
                    progress = documents.progress(state)
                    write_json(path, dataclasses.asdict(progress))
                    documents.committed(time.monotonic() - began)
        finally:
            sink.close()

    def merge(self) -> None:
        """Concatenate the parts' datasets; the files are the same as from one machine."""
        for part in range(self.settings.parts):
            if not self.is_done("encode", part):
                raise ValueError(f"--stage merge: part {part} is not encoded yet (--stage encode --part {part})")
        if self.settings.parts == 1 or self.execution.dry_run:
            return
        for side in self.settings.sides:
            self._merge_side(side)

    def _merge_side(self, side: str) -> None:
        folder = self.work / "merged"
        folder.mkdir(exist_ok=True)
        path = folder / f"{side}.json"
        content: dict[str, Any] = {"part": 0, "documents": 0}
        if path.is_file():
            content = read_object(path)
        if content.get("done"):
            return
        writer = self.writer(folder, side, content.get("state"))
        sizes = [PackedDataset(self.part_folder(part) / side).n_documents for part in range(self.settings.parts)]
        shown, merged, last = TaskProgress(), sum(sizes[: content["part"]]) + content["documents"], time.monotonic()
        try:
            with shown.task(f"merging {side}"):
                for part in range(content["part"], self.settings.parts):
                    done = content["documents"] if part == content["part"] else 0
                    for tokens, lengths, rows in _read_back(self.part_folder(part) / side, done):
                        shown(merged, sum(sizes), "documents")
                        writer.add_batch(tokens, lengths, rows)
                        done += len(lengths)
                        merged += len(lengths)
                        if time.monotonic() - last >= self.execution.commit_seconds:
                            write_json(path, {"part": part, "documents": done, "state": writer.state()})
                            last = time.monotonic()
            writer.finish()
            write_json(path, {"done": True})
        finally:
            writer.abandon()

    def writer(self, folder: Path, side: str, state: dict[str, Any] | None) -> PackedWriter:
        """Open the writer of a side's dataset, inside the working folder."""
        s, tokenizer = self.settings, self.job.tokenizer
        return PackedWriter(
            folder / f"{side}.published",
            tokenizer={**tokenizer.facts(), "folder": "../tokenizer"},
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            name=s.name,
            metadata=s.metadata,
            shard_tokens=s.shard_tokens,
            source=self._provenance(side),
            work=folder / side,
            state=state,
            allow_empty=True,
            bos_id=tokenizer.bos_id if s.bos else None,
            special_tokens=s.special_tokens,
        )

    def _provenance(self, side: str) -> dict[str, Any]:
        """Provenance for the manifest: the settings that differ from their defaults."""
        s = self.settings
        facts: dict[str, Any] = {"inputs": list(s.val_input if side == "val" and s.val_input is not None else s.input)}
        if s.val_fraction is not None:
            facts |= {"split": side, "val_fraction": s.val_fraction, "seed": s.seed}
        omitted = {  # reported above or elsewhere in the manifest, or without effect on the documents
            "input",
            "val_input",
            "val_fraction",
            "seed",
            "tokenizer",
            "eos_token",
            "parts",
            "name",
            "shard_tokens",
        }
        for f in dataclasses.fields(s):
            value = getattr(s, f.name)
            if f.name not in omitted and value != f.default:
                facts[f.name] = list(value) if isinstance(value, tuple) else value
        return facts

    def datasets(self) -> dict[str, Path]:
        """The folder of each side's dataset, once all stages are done; in `assembled` once moved there."""
        folder = self.part_folder(0) if self.settings.parts == 1 else self.work / "merged"
        moved = {side: self.assembled / side for side in self.settings.sides}
        return {side: path if path.exists() else folder / side for side, path in moved.items()}

    @property
    def assembled(self) -> Path:
        """The folder in which the output is assembled."""
        return self.work / "output"

    def report(self) -> tuple[StageReports, ReadErrors]:
        """The merged report of all parts' encoding."""
        report, errors = StageReports(), ReadErrors()
        errors.ignored_files, errors.ignored_first = self.job.errors.ignored_files, self.job.errors.ignored_first
        for part in range(self.settings.parts):
            progress = _Progress.read(self.part_folder(part) / "encode.json")
            assert progress.state is not None
            report.merge(StageReports.from_dict(progress.state["report"]))
            for message in progress.first_errors:
                errors.add(message)
            errors.count += progress.errors - len(progress.first_errors)
        return report, errors

    def bloom_rate(self) -> float | None:
        """The Bloom filter's false positive rate at the end; None without a filter."""
        state = _Progress.read(self.part_folder(0) / "encode.json").state
        assert state is not None
        rate: float | None = state.get("bloom_rate")
        return rate

    def counts(self) -> dict[str, dict[str, int]]:
        """Documents, tokens, bytes and words of each side."""
        if not self.execution.dry_run:
            manifests = {side: read_manifest(folder) for side, folder in self.datasets().items()}
            return {k: {kind: getattr(m, kind) for kind in COUNTED} for k, m in manifests.items()}
        total = {side: dict.fromkeys(COUNTED, 0) for side in self.settings.sides}
        for part in range(self.settings.parts):
            state = _Progress.read(self.part_folder(part) / "encode.json").state
            assert state is not None
            for side, counts in state["counts"].items():
                for kind, count in counts.items():
                    total[side][kind] += count
        return total


class _PartDocuments:
    """Iterates over the documents of a part, in segments that end when a commit is due."""

    def __init__(self, preparation: Preparation, part: int, progress: _Progress) -> None:
        self.job, self.settings, self.execution = preparation.job, preparation.settings, preparation.execution
        files = self.job.part_files(part)
        self._first_file = files[0][0]
        sizes = sizes_of([f for _, f in files])
        self._bytes = None if any(f.hub for _, f in files) else sum(sizes)
        self._read_bytes = sum(sizes[: progress.place[0]]) if progress.place is not None else 0
        self.errors = ReadErrors(progress.errors, list(progress.first_errors))
        self.number, self.ended = progress.number, False
        self.place = Place(*progress.place) if progress.place is not None else None
        self._documents = read_documents(
            [f for _, f in files],
            on_error=self.execution.on_error,
            text_field=self.settings.text_field,
            id_field=self.settings.id_field,
            require_id=self.settings.require_id,
            metadata=self.settings.metadata,
            split_documents=self.settings.split_documents,
            max_document_mb=self.settings.max_document_mb,
            errors=self.errors,
            start=self.place,
            on_read=self._count,
        )
        self._last_commit = time.monotonic()
        self._interval = self.execution.commit_seconds

    def _count(self, n_bytes: int) -> None:
        self._read_bytes += n_bytes

    def show(self, progress: TaskProgress) -> None:
        """Show the progress: in bytes of the files, or in documents of a dataset, whose bytes are unknown."""
        if self._bytes is None:
            progress(self.number, None, "documents")
        else:
            progress(self._read_bytes / 1e6, self._bytes / 1e6, "MB")

    def segment(self) -> Iterator[Item]:
        """Documents until a commit is due, or all remaining ones (then sets `ended`)."""
        for document in self._documents:
            yield Item(self.number, self._side(document), document)
            self.number += 1
            self.place = Place(document.file, document.place)
            if time.monotonic() - self._last_commit >= self._interval:
                return
        self.ended = True

    def progress(self, state: dict[str, Any]) -> _Progress:
        """What is done after a segment; `state` is that of the sink."""
        place = dataclasses.astuple(self.place) if self.place is not None else None
        return _Progress(self.ended, self.number, place, self.errors.count, self.errors.first, state)

    def committed(self, seconds: float) -> None:
        """Schedule the next commit, given the duration of this one, so that commits stay a small share of the time."""
        self._last_commit = time.monotonic()
        self._interval = max(self.execution.commit_seconds, COMMIT_SPACING * seconds)

    def _side(self, document: Document) -> str:
        if self._first_file + document.file >= self.job.n_train:
            return "val"
        fraction = self.settings.val_fraction
        return "val" if fraction is not None and in_validation(document.id, fraction, self.settings.seed) else "train"


def in_validation(id: str, fraction: float, seed: int) -> bool:
    """Whether the document belongs to val: SHA-256 of (seed, id), as a number in [0, 1), is below `fraction`."""
    digest = hashlib.sha256(f"{seed}\n{id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(item.document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _ByChunk:
    """Looks up documents, in ascending order, in files that each cover a range of them."""

    def __init__(self, chunks: list[list[int]], files: list[Path], open_file: Any) -> None:
        self._waiting = deque(zip(chunks, files, strict=True))
        self._open_file = open_file
        self._end = -1
        self._file: Any = None

    def of(self, number: int) -> Any:
        while number >= self._end:
            (_, self._end), path = self._waiting.popleft()
            self._file = self._open_file(path) if number < self._end else None
        return self._file.of(number)


def _chunks(folder: Path) -> list[list[int]]:
    """The ranges of documents [first, end) of the chunks that a part's first pass wrote."""
    state = _Progress.read(folder / "hash.json").state
    assert state is not None
    chunks: list[list[int]] = state["chunks"]
    return chunks


def _drop_by_bloom(pool: Pool, batches: Iterable[list[Item]], bloom: BloomDedup) -> Iterator[list[Item]]:
    """Deduplicate by the Bloom filter: workers hash the paragraphs, this process looks them up in document order."""
    sent: deque[list[Item]] = deque()

    def send() -> Iterator[list[Item]]:
        for batch in batches:
            sent.append(batch)
            yield batch

    for hashed in pool.map("hash", send()):
        batch = sent.popleft()
        for number, hashes in zip(hashed.numbers, hashed.paragraphs, strict=True):
            seen = [i for i, h in enumerate(hashes) if h is not None and bloom.seen(h)]
            batch[number - batch[0].number].dropped = seen
        yield batch


def _read_back(folder: Path, first: int) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Read documents of a packed dataset from number `first` on, as arguments of `add_batch`."""
    dataset = PackedDataset(folder)
    number = 0
    for shard in dataset.manifest.shards:
        if number + shard.documents <= first:
            number += shard.documents
            continue
        with open_table(folder / f"{shard.name}.docs.parquet") as table:
            check_documents_table(table, shard)
            for rows in table.iter_batches(batch_size=MERGE_DOCUMENTS):
                skip = max(0, min(first - number, rows.num_rows))
                number += rows.num_rows
                rows = rows.slice(skip)
                if not rows.num_rows:
                    continue
                starts = dataset.document_start(np.arange(number - rows.num_rows, number + 1, dtype=np.int64))
                # Ranges are limited by tokens, so that long documents don't fill the memory.
                for a, b in _ranges(starts):
                    columns = {name: rows[name].slice(a, b - a) for name in rows.schema.names}
                    yield dataset.tokens(int(starts[a]), int(starts[b])), np.diff(starts[a : b + 1]), columns


def _ranges(starts: np.ndarray[Any, Any], tokens: int = 1 << 24) -> Iterator[tuple[int, int]]:
    """Split documents, given by their starts, into ranges [a, b) of limited tokens or one document."""
    a = 0
    while a < len(starts) - 1:
        b = max(a + 1, int(np.searchsorted(starts, starts[a] + tokens, side="right")) - 1)
        yield a, b
        a = b
