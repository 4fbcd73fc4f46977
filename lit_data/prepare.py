"""Text -> packed datasets: documents are read, encoded in worker processes, written to DIR/train and DIR/val.

What is written depends on the text, the tokenizer and the seed, never on the number of workers. DIR is built under
a temporary name beside it and renamed when whole.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_data.corpus.readers import Document, OnError, ReadErrors, list_files, read_documents
from lit_data.packed import MANIFEST, PackedWriter, sync_file
from lit_data.tokenizer import Tokenizer, open_tokenizer

BATCH_CHARACTERS = 1 << 18  # what a worker gets at once: enough to hide the cost of sending it
BATCH_DOCUMENTS = 512
BATCHES_PER_WORKER = 3  # in flight; bounds the memory
RESERVED_COLUMNS = ("self", "ids", "id", "source", "place", "bytes", "n_bytes", "number", "start", "tokens")
TOKENIZER_FILES = (
    "tokenizer.json",
    "*.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
)


@dataclass
class Counts:
    """What went into one dataset. `tokens` counts the EOS of each document, `bytes` the UTF-8 bytes of the text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass
class PrepareReport:
    """What a preparation did.

    Attributes:
        sides: counts of `train` and, if there is one, `val`.
        empty_documents: documents without a token, left out.
        errors: documents that could not be read (with on_error="skip"), and files of other kinds.
    """

    output: Path
    sides: dict[str, Counts]
    empty_documents: int = 0
    errors: ReadErrors = field(default_factory=ReadErrors)
    workers: int = 1
    seconds: float = 0.0

    @property
    def total(self) -> Counts:
        sides = self.sides.values()
        return Counts(sum(s.documents for s in sides), sum(s.tokens for s in sides), sum(s.bytes for s in sides))

    def summary(self) -> str:
        """Several lines of text for a person."""
        lines = [f"wrote {self.output}"]
        for name, side in self.sides.items():
            lines.append(
                f"  {name + ':':6} {side.documents:,} documents, {side.tokens:,} tokens, {side.bytes:,} bytes of text, "
                f"{side.bytes / side.tokens:.3f} bytes per token"
            )
        rate = self.total.bytes / 1e6 / self.seconds if self.seconds else 0.0
        lines.append(f"  {self.seconds:.1f} s with {self.workers} workers, {rate:.2f} MB/s")
        lines.append(f"  skipped: {self.errors.count:,} unreadable documents, {self.empty_documents:,} empty ones")
        lines.extend(f"    {message}" for message in self.errors.first)
        if self.errors.count > len(self.errors.first):
            lines.append(f"    and {self.errors.count - len(self.errors.first):,} more")
        if self.errors.ignored_files:
            names = ", ".join(self.errors.ignored_first)
            more = ", ..." if self.errors.ignored_files > len(self.errors.ignored_first) else ""
            lines.append(f"  files of other kinds, not read: {self.errors.ignored_files:,} ({names}{more})")
        return "\n".join(lines)


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    val_fraction: float | None = None,
    val_inputs: Sequence[str | Path] | None = None,
    workers: int | None = None,
    on_error: OnError = "stop",
    text_field: str = "text",
    id_field: str = "id",
    metadata: Sequence[str] = (),
    shard_tokens: int = 1 << 31,
    seed: int = 0,
    eos_token: str | None = None,
    overwrite: bool = False,
    name: str = "data",
) -> PrepareReport:
    """Encode text and write OUTPUT/train, OUTPUT/val (if asked for) and OUTPUT/tokenizer, all of it or nothing.

    Args:
        inputs: files and folders, see `lit_data.corpus.readers`.
        tokenizer_path: folder or file, see `lit_data.tokenizer.open_tokenizer`; `eos_token` names its end of document.
        output: must not exist, unless `overwrite` and it is a prepared folder.
        val_fraction: share of the documents (in the mean) that goes to val: those whose hash of (seed, id) says so.
        val_inputs: files and folders that make up val instead. Without either there is only train.
        workers: processes that encode; the default is the cores this process may use. 1 encodes in this process.
        metadata: fields of the documents to keep in `docs.parquet`.
        shard_tokens: size of a shard.

    Raises:
        FileNotFoundError: an input or the tokenizer does not exist.
        ValueError: any other mistake; the message names the thing.
    """
    began = time.monotonic()
    output = Path(os.path.abspath(output))
    workers = workers if workers is not None else available_cores()
    _check_arguments(val_fraction, val_inputs, workers, metadata, shard_tokens)
    _check_output(output, overwrite)
    _check_overlap(inputs, val_inputs)
    tokenizer = open_tokenizer(tokenizer_path, eos_token)

    errors = ReadErrors()

    def read(paths: Sequence[str | Path]) -> Iterator[Document]:
        return read_documents(
            paths, on_error=on_error, text_field=text_field, id_field=id_field, metadata=metadata, errors=errors
        )

    def sided() -> Iterator[tuple[str, Document]]:
        for document in read(inputs):
            to_val = val_fraction is not None and in_validation(document.id, val_fraction, seed)
            yield "val" if to_val else "train", document
        if val_inputs is not None:
            for document in read(val_inputs):
                yield "val", document

    sides = {
        side: Counts() for side in (("train",) if val_fraction is None and val_inputs is None else ("train", "val"))
    }
    report = PrepareReport(output, sides, errors=errors, workers=workers)
    temporary = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        with ExitStack() as stack:
            writers = {
                side: stack.enter_context(
                    PackedWriter(
                        temporary / side,
                        tokenizer={**tokenizer.facts(), "folder": "../tokenizer"},
                        vocab_size=tokenizer.vocab_size,
                        eos_id=tokenizer.eos_id,
                        name=name,
                        metadata=metadata,
                        shard_tokens=shard_tokens,
                        source=_provenance(side, inputs, val_inputs, val_fraction, seed),
                    )
                )
                for side in sides
            }
            encoded = stack.enter_context(contextlib.closing(_encode_all(sided(), tokenizer, workers)))
            _write_all(encoded, tokenizer.eos_id, writers, metadata, report)
            _check_sides(report, inputs, val_inputs, val_fraction)
        _copy_files(tokenizer.files, temporary / "tokenizer")
        _name_eos(temporary / "tokenizer", tokenizer)
        _publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    report.seconds = time.monotonic() - began
    return report


def in_validation(id: str, fraction: float, seed: int) -> bool:
    """Whether the document belongs to val: SHA-256 of (seed, id) read as a number in [0, 1) lies below `fraction`."""
    digest = hashlib.sha256(f"{seed}\n{id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def copy_tokenizer(source_folder: str | Path, target_folder: str | Path) -> None:
    """Copy a tokenizer's files (and no others, such as weights) to a new folder, which appears whole or not at all."""
    source = Path(source_folder)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder of a tokenizer")
    files = [f for f in sorted(source.iterdir()) if f.is_file() and _is_tokenizer_file(f)]
    if not files:
        raise ValueError(f"{source} holds no tokenizer: none of its files is named like {', '.join(TOKENIZER_FILES)}")
    _copy_files(files, Path(target_folder))


def _is_tokenizer_file(file: Path) -> bool:
    return any(fnmatch.fnmatch(file.name, pattern) for pattern in TOKENIZER_FILES)


def _copy_files(files: Sequence[Path], target: Path) -> None:
    if target.exists():
        raise ValueError(f"{target} exists already; remove it or choose another folder")
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for file in files:
            # A tokenizer.json that was given under another name would not be found in a folder.
            name = "tokenizer.json" if file.suffix == ".json" and not _is_tokenizer_file(file) else file.name
            shutil.copyfile(file, temporary / name)
            sync_file(temporary / name)
        sync_file(temporary)
        os.rename(temporary, target)
        sync_file(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _name_eos(folder: Path, tokenizer: Tokenizer) -> None:
    """Have a copied tokenizer say by itself which token ends a document, where it did not (--eos_token)."""
    with contextlib.suppress(ValueError):
        if open_tokenizer(folder).eos_id == tokenizer.eos_id:
            return
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(content | {"eos_token": tokenizer.eos_token}, indent=1, ensure_ascii=False), "utf-8")
    sync_file(path)
    copied = open_tokenizer(folder)
    assert (copied.eos_id, copied.fingerprint) == (tokenizer.eos_id, tokenizer.fingerprint), f"{folder} is no true copy"


def _check_arguments(
    val_fraction: float | None,
    val_inputs: Sequence[str | Path] | None,
    workers: int,
    metadata: Sequence[str],
    shard_tokens: int,
) -> None:
    if val_fraction is not None and val_inputs is not None:
        raise ValueError("--val_fraction and --val_input exclude each other; give one of them")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction {val_fraction}: give a share between 0 and 1, such as 0.01")
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    if shard_tokens < 1:
        raise ValueError(f"--shard_tokens {shard_tokens}: at least 1 is needed")
    for column in metadata:
        if column in RESERVED_COLUMNS:
            raise ValueError(f"--metadata {column}: the name is taken; these are: {', '.join(RESERVED_COLUMNS)}")
    if len(set(metadata)) != len(metadata):
        raise ValueError(f"--metadata {' '.join(metadata)}: a name is given twice")


def _check_output(output: Path, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ValueError(f"--output {output} exists already; choose another folder, remove it, or give --overwrite")
    if output.is_symlink() or not (output / "train" / MANIFEST).is_file():
        raise ValueError(f"--output {output} is no folder that this program wrote; --overwrite does not remove it")


def _check_overlap(inputs: Sequence[str | Path], val_inputs: Sequence[str | Path] | None) -> None:
    """No file may be training and validation text at once. Also finds missing paths before any work."""
    train = {os.path.realpath(f.path) for f in list_files(inputs)}
    for file in list_files(val_inputs) if val_inputs is not None else ():
        if os.path.realpath(file.path) in train:
            raise ValueError(
                f"{file.path} is given by --input and by --val_input; validation text must not be trained on"
            )


def _check_sides(
    report: PrepareReport,
    inputs: Sequence[str | Path],
    val_inputs: Sequence[str | Path] | None,
    val_fraction: float | None,
) -> None:
    total = report.total.documents
    left_out = f" ({report.empty_documents} empty and {report.errors.count} unreadable ones were left out)"
    why = left_out if report.empty_documents or report.errors.count else ""
    if total == 0:
        raise ValueError(f"--input {' '.join(map(str, inputs))} holds no documents{why}: the dataset would be empty")
    for side, counts in report.sides.items():
        if counts.documents:
            continue
        if val_inputs is not None:
            flag, paths = ("--val_input", val_inputs) if side == "val" else ("--input", inputs)
            raise ValueError(f"{flag} {' '.join(map(str, paths))} holds no documents{why}: {side} would be empty")
        raise ValueError(
            f"--val_fraction {val_fraction} leaves no document for {side} out of {total}{why}: give "
            f"{'a larger' if side == 'val' else 'a smaller'} fraction, another --seed, more documents, or --val_input"
        )


def _provenance(
    side: str,
    inputs: Sequence[str | Path],
    val_inputs: Sequence[str | Path] | None,
    val_fraction: float | None,
    seed: int,
) -> dict[str, Any]:
    """What the manifest says of where the text came from."""
    paths = val_inputs if side == "val" and val_inputs is not None else inputs
    facts: dict[str, Any] = {"inputs": [str(p) for p in paths]}
    if val_fraction is not None:
        facts |= {"split": side, "val_fraction": val_fraction, "seed": seed}
    return facts


def _write_all(
    encoded: Iterable[tuple[str, Document, npt.NDArray[Any]]],
    eos_id: int,
    writers: dict[str, PackedWriter],
    metadata: Sequence[str],
    report: PrepareReport,
) -> None:
    never_seen = set(metadata)
    for side, document, ids in encoded:
        if not len(ids):
            report.empty_documents += 1
            continue
        never_seen -= document.meta.keys()
        n_bytes = len(document.text.encode())
        columns = {m: document.meta.get(m, "") for m in metadata}
        writers[side].add(
            np.append(ids, eos_id),
            id=document.id,
            source=document.source,
            place=document.place,
            n_bytes=n_bytes,
            **columns,
        )
        counts = report.sides[side]
        counts.documents += 1
        counts.tokens += len(ids) + 1
        counts.bytes += n_bytes
    if never_seen and report.total.documents:
        raise ValueError(f"--metadata {' '.join(sorted(never_seen))}: no document has such a field")


_Item = tuple[str, Document]


def _batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(item[1].text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_all(
    items: Iterator[_Item], tokenizer: Tokenizer, workers: int
) -> Generator[tuple[str, Document, npt.NDArray[Any]], None, None]:
    """Encode documents, in their order; at most BATCHES_PER_WORKER batches a worker are in memory."""
    if workers == 1:
        for batch in _batches(items):
            for (side, document), ids in zip(batch, tokenizer.encode_batch([d.text for _, d in batch]), strict=True):
                yield side, document, ids
        return

    # spawn: a forked process would inherit threads that tokenizers and Arrow have started here.
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tokenizer,)
    )
    waiting: deque[tuple[list[_Item], Future[_Encoded]]] = deque()
    try:
        for batch in _batches(items):
            waiting.append((batch, executor.submit(_encode_in_worker, [d.text for _, d in batch])))
            if len(waiting) >= workers * BATCHES_PER_WORKER:
                yield from _unpack(*waiting.popleft())
        while waiting:
            yield from _unpack(*waiting.popleft())
    except BrokenProcessPool as error:
        raise ValueError(
            f"a worker process ended unexpectedly, perhaps for lack of memory; try fewer than --workers {workers}"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


_Encoded = tuple[npt.NDArray[Any], list[int]]  # the ids of a batch in one array, and the lengths of its documents


def _unpack(batch: list[_Item], future: Future[_Encoded]) -> Iterator[tuple[str, Document, npt.NDArray[Any]]]:
    ids, lengths = future.result()
    stop = 0
    for (side, document), length in zip(batch, lengths, strict=True):
        start, stop = stop, stop + length
        yield side, document, ids[start:stop]


_worker_tokenizer: Tokenizer | None = None  # of this worker process; sent once, not with every batch


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent tidies up
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed outright can't end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> _Encoded:
    assert _worker_tokenizer is not None
    arrays = [np.asarray(a) for a in _worker_tokenizer.encode_batch(texts)]
    return np.concatenate(arrays), [len(a) for a in arrays]


def _publish(temporary: Path, output: Path) -> None:
    """Rename the finished folder to its name; one that is there is moved aside first and removed last."""
    sync_file(temporary)
    aside = output.with_name(f".{output.name}.old-{os.getpid()}")
    replaced = output.exists()
    if replaced:
        os.rename(output, aside)
    try:
        os.rename(temporary, output)
    except BaseException:
        if replaced:
            with contextlib.suppress(OSError):
                os.rename(aside, output)
        raise
    sync_file(output.parent)
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)
