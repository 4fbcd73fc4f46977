"""Caches teacher predictions on a dataset, for reuse by many students: the top-k tokens and their log-probabilities.

The cache is a folder: `cache.json` identifies the dataset and the teachers; each group of rows has `ids-NNNNN.npy`,
integer [rows, T, k], and `log_probs-NNNNN.npy`, float [rows, T, k], at the distillation temperature. Rows are stored
by their window number in the dataset, not in a run's order: one cache serves every seed, epoch and batch size. The
probability mass not covered by the top k belongs to all other tokens. The files are plain .npy, and memory-mapped.

Dimensions: B rows in a micro-batch, T tokens in a row, k cached tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import tokenize
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from lit_data.loading.batches import MicroBatch, read_rows
from lit_data.loading.rows import Rows
from lit_data.packed.reader import PackedDataset
from lit_files.checksum import file_sha256
from lit_files.lock import FileLock, LockBusy
from lit_files.mapping import MAX_MAPS, live_maps, map_array
from lit_files.progress import TaskProgress
from lit_files.publish import create_json, publish, sync_file
from lit_files.reading import build, open_regular, read_object
from lit_model.distillation import Distillation, Ensemble, TopK, ensemble_top_k
from lit_model.load import resolve
from pretrain.args import DistillationArgs
from pretrain.distillation.teachers import Teachers, identify

VERSION = 1
FILE = "cache.json"
NAMES = ("ids", "log_probs")
LAST = NAMES[-1]
"""Files are renamed in this order: if this one exists, all do."""


@dataclass(frozen=True)
class CacheFacts:
    """Identity of a cache: everything its values depend on."""

    dataset: str
    """Fingerprint of the packed dataset."""
    packing: str
    block_size: int
    document_mask: bool
    n_windows: int
    """Rows of the dataset."""
    vocab_size: int
    teachers: list[dict[str, Any]]
    """Teacher identities, as returned by `identify`."""
    ensemble: Ensemble
    temperature: float
    precision: str
    k: int
    dtype: str
    """Type of the log-probabilities."""
    rows_per_file: int
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in ("block_size", "n_windows", "vocab_size", "k", "rows_per_file"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.k > self.vocab_size or self.vocab_size >= 1 << 31:
            raise ValueError(f"k is {self.k} and vocab_size {self.vocab_size}")
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r:.40}; it must be float16 or float32")

    def dtype_of(self, name: str) -> np.dtype[Any]:
        """The dtype of the files of this name."""
        if name == "ids":
            return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)
        return np.dtype(self.dtype)

    @property
    def bytes_per_token(self) -> int:
        """Disk usage."""
        return self.k * sum(self.dtype_of(name).itemsize for name in NAMES)

    @property
    def n_files(self) -> int:
        return -(-self.n_windows // self.rows_per_file)

    def path(self, folder: Path, name: str, file: int) -> Path:
        return folder / f"{name}-{file:05d}.npy"

    def shape(self, file: int) -> tuple[int, int, int]:
        return len(self.rows_of(file)), self.block_size, self.k

    def rows_of(self, file: int) -> range:
        return range(file * self.rows_per_file, min((file + 1) * self.rows_per_file, self.n_windows))


def begin_cache(folder: Path, facts: CacheFacts) -> None:
    """Create the folder, or check that it holds the same cache. Raises ValueError naming the difference."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / FILE).exists():
        others = [p for p in folder.iterdir() if not p.name.startswith(".")]
        if not others and create_json(folder / FILE, asdict(facts)):  # parts may start at the same time
            return
        if not (folder / FILE).exists():
            raise ValueError(f"{folder} holds other files; give an empty folder or a new one")
    differs = _differences(read_facts(folder), facts)
    if differs:
        raise ValueError(f"{folder} holds a different cache: {differs}. Give another folder, or the same settings")


def write_cache(
    folder: Path, facts: CacheFacts, teachers: Teachers, rows: Rows, batch: int, part: int, parts: int
) -> tuple[int, int]:
    """Write the missing files of this part, each atomically.

    Returns how many were written, and how many were left to another call on this machine that is writing them.
    """
    written = left = 0
    progress = TaskProgress()
    for file in range(part, facts.n_files, parts):
        final = {name: facts.path(folder, name, file) for name in NAMES}
        temporary = {name: folder / f".{path.name}.tmp" for name, path in final.items()}
        if final[LAST].exists():
            continue
        lock_path = folder / f".{file:05d}.lock"
        try:
            lock = FileLock(lock_path, f"file {file} of {folder}", "wait for it", remove=True)
        except LockBusy:
            left += 1
            continue
        try:
            if final[LAST].exists():  # finished by another call in the meantime
                continue
            with contextlib.ExitStack() as stack:
                files = {name: stack.enter_context(open(path, "wb")) for name, path in temporary.items()}
                with progress.task(f"file {file + 1} of {facts.n_files}"):
                    _write_rows(files, facts, teachers, rows, file, batch, progress)
            for name in NAMES:
                publish(temporary[name], final[name])
            written += 1
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)
            lock.close()
    return written, left


def _write_rows(
    files: Mapping[str, BinaryIO],
    facts: CacheFacts,
    teachers: Teachers,
    rows: Rows,
    number: int,
    batch: int,
    progress: TaskProgress,
) -> None:
    """Write one file of each name from the start, and sync it to disk."""
    setting = Distillation("topk_kl", facts.temperature, facts.ensemble, facts.k)
    device, windows = teachers.student_device, facts.rows_of(number)
    for name, file in files.items():
        header = {"descr": facts.dtype_of(name).str, "fortran_order": False, "shape": facts.shape(number)}
        np.lib.format.write_array_header_1_0(file, header)
    for first in range(0, len(windows), batch):
        progress(first, len(windows), "rows")
        some = np.asarray(windows[first : first + batch], dtype=np.int64)
        read = read_rows(rows, some, some, facts.document_mask)
        bounds = read.cu_seqlens.to(device) if facts.document_mask else None
        top = ensemble_top_k(teachers(read.tokens.to(device), bounds), setting, facts.vocab_size, facts.k)
        for name, values in (("ids", top.ids), ("log_probs", top.log_probs)):
            files[name].write(values.cpu().numpy().astype(facts.dtype_of(name)).data)
    for file in files.values():
        sync_file(file)


def read_facts(folder: Path) -> CacheFacts:
    """Read cache.json. Raises FileNotFoundError or ValueError naming the folder."""
    if not (folder / FILE).is_file():
        raise FileNotFoundError(
            f"{folder} is not a teacher cache: it has no {FILE} (scripts/cache_teacher.py makes it)"
        )
    fields = read_object(folder / FILE)
    if fields.get("version") != VERSION:
        raise ValueError(
            f"{folder / FILE} has version {fields.get('version')}, but this program reads version {VERSION}; make the "
            "cache again with scripts/cache_teacher.py"
        )
    return build(CacheFacts, fields, folder / FILE)


def check_finished(folder: Path, facts: CacheFacts) -> None:
    """Raise ValueError if files are missing or have the wrong size."""
    there = {path.name for path in folder.iterdir()}  # a corrupt row count must not decide how long this takes
    numbers = {int(found[1]) for name in there if (found := re.fullmatch(rf"{LAST}-(\d+)\.npy", name))}
    whole = {
        file
        for file in numbers
        if file < facts.n_files and all(facts.path(folder, name, file).name in there for name in NAMES)
    }
    for file in sorted(whole):
        for name in NAMES:
            _open(facts.path(folder, name, file), facts.shape(file), facts.dtype_of(name))
    if missing := facts.n_files - len(whole):
        first = next(file for file in itertools.count() if file not in whole)
        raise ValueError(
            f"{folder} is not finished: {missing} of {facts.n_files} files are missing (the first is number {first}); "
            "repeat the call of scripts/cache_teacher.py to complete it"
        )


def _open(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Memory-map a file. Raises ValueError naming it if it is damaged or has the wrong shape or dtype."""
    try:
        with open_regular(path) as file:
            if (version := np.lib.format.read_magic(file)) != (1, 0):
                raise ValueError(f"it is of version {version} of numpy's format")
            found = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
        if found == (shape, False, dtype):
            return map_array(path, dtype, shape, offset, random=True)
        fault = f"it holds {found[2]} {found[0]} in place of {dtype} {shape}"
    except (ValueError, TypeError, SyntaxError, EOFError, RecursionError, MemoryError, tokenize.TokenError) as error:
        fault = str(error)
    raise ValueError(
        f"{path} is damaged: {fault}. Remove the files of this number and repeat the call of scripts/cache_teacher.py"
    )


def _differences(there: CacheFacts, here: CacheFacts) -> str:
    one, two = asdict(there), asdict(here)
    return "; ".join(f"{k}: {one[k]!r} there, {two[k]!r} here" for k in one if one[k] != two[k])


class CachedTeacher:
    """Cached predictions: read by the loader's thread along with the rows, moved to the device in the step."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device, self.facts = folder, device, read_facts(folder)
        self._maps: OrderedDict[tuple[str, int], npt.NDArray[Any]] = OrderedDict()

    def __call__(self, batch: MicroBatch) -> TopK:
        """ids int64 and log-probabilities float32, both (B, T, k), on the student's device. No host sync."""
        ids, log_probs = batch.extra
        return TopK(ids.to(self.device, non_blocking=True).long(), log_probs.to(self.device, non_blocking=True).float())

    def read(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int32 and log-probabilities in the type of the cache, both (B, T, k), in host memory: pinned for CUDA.

        Raises ValueError for a damaged cache.
        """
        facts = self.facts
        pinned, shape = self.device.type == "cuda", (*batch.tokens.shape, facts.k)
        read = (
            torch.zeros(shape, dtype=torch.int32, pin_memory=pinned),
            torch.zeros(shape, dtype=getattr(torch, facts.dtype), pin_memory=pinned),
        )
        ids, log_probs = (tensor.numpy() for tensor in read)
        for row, window in enumerate(batch.spans.window.tolist()):
            if window >= 0:  # a row without data has no targets
                file, place = divmod(window, facts.rows_per_file)
                ids[row] = self._map("ids", file)[place]
                log_probs[row] = self._map("log_probs", file)[place]
        if ids.max() >= facts.vocab_size or ids.min() < 0 or not (log_probs <= 0).all():
            raise ValueError(
                f"{self.folder} is damaged: it holds ids outside the vocabulary or probabilities above 1 for a row of "
                f"{batch.spans.window.tolist()}; make it again with scripts/cache_teacher.py"
            )
        return read

    def _map(self, name: str, file: int) -> npt.NDArray[Any]:
        """A file, memory-mapped on first use."""
        found = self._maps.get((name, file))
        if found is None:
            path = self.facts.path(self.folder, name, file)
            found = self._maps[name, file] = _open(path, self.facts.shape(file), self.facts.dtype_of(name))
            while live_maps() > MAX_MAPS and len(self._maps) > 1:
                self._maps.popitem(last=False)
        return found


def check_cache(
    args: DistillationArgs, dataset: PackedDataset, packing: str, block_size: int, document_mask: bool, vocab_size: int
) -> None:
    """Check that a cache matches the data and settings. Raises ValueError naming the difference and the flag."""
    assert args.cache is not None
    facts = read_facts(args.cache)
    check_finished(args.cache, facts)
    here = {
        "dataset": (dataset.fingerprint, "--data.train"),
        "packing": (packing, "--data.packing"),
        "block_size": (block_size, "--train.block_size"),
        "document_mask": (document_mask, "--data.document_mask"),
        "vocab_size": (vocab_size, "--model.vocab_size"),
        "temperature": (args.temperature, "--distillation.temperature"),
        "ensemble": (args.ensemble, "--distillation.ensemble"),
    }
    wrong = [
        f"{name} {getattr(facts, name)!r} there, {value!r} here ({flag})"
        for name, (value, flag) in here.items()
        if getattr(facts, name) != value
    ]
    if wrong:
        raise ValueError(f"--distillation.cache {args.cache} is of something else: {'; '.join(wrong)}")
    if args.divergence == "forward_kl" and facts.k != vocab_size:
        raise ValueError(
            f"--distillation.cache {args.cache} holds {facts.k} of {vocab_size} tokens: give --distillation.divergence "
            "topk_kl"
        )
    if args.top_k not in (None, facts.k):
        raise ValueError(f"--distillation.top_k {args.top_k}: the cache holds the top {facts.k} tokens; leave it out")


def resolve_teachers(args: DistillationArgs) -> tuple[list[Path], list[dict[str, Any]]]:
    """The checkpoints of the teachers (a run folder's newest: it may still be saving new ones), and their identities.

    With a cache, its identity and no checkpoints.
    """
    if args.cache is not None:
        return [], [{"name": args.cache.name, "sha256": file_sha256(args.cache / FILE), "weight": 1.0}]
    paths = [resolve(entry.path) for entry in args.teachers]
    return paths, identify(paths, [entry.weight for entry in args.teachers])


def open_teachers(args: DistillationArgs, run_precision: str, device: torch.device) -> Teachers | CachedTeacher | None:
    """Open the teachers or their cache; None for a run without teachers."""
    if args.cache is not None:
        return CachedTeacher(args.cache, device)
    return Teachers(args, run_precision, device) if args.teachers else None
