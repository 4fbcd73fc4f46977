"""Queries of a run's datapoint record: the documents of a step, and the steps of a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lit_data.loading.mixture import Mixture
from lit_data.loading.order import Order, Segment, first_sample_of_step, steps_of_sample
from lit_data.loading.rows import Rows, open_rows
from lit_data.packed.manifest import MANIFEST
from lit_data.packed.reader import PackedDataset
from lit_data.record.order_file import OrderFacts
from lit_data.record.parts import newest_checkpoint_step
from lit_data.record.reader import read_steps
from lit_files.nested_run import did_you_mean_run
from lit_files.reading import read_dataclass
from lit_files.run_files import DATAPOINTS, ORDER, SETTINGS


@dataclass
class TracedRun:
    """A run folder opened for queries.

    Attributes:
        datasets, rows: by dataset number in the record; their tokens, and their mapping to rows.
        layouts: (from_step, world_size, micro_batch_samples).
        steps: steps completed in the newest checkpoint.
        skips: samples skipped after a loss spike: {"step", "first_sample", "end_sample", "reason"}.
    """

    folder: Path
    datasets: list[PackedDataset]
    rows: list[Rows]
    mixture: Mixture
    segments: list[Segment]
    block_size: int
    document_mask: bool
    layouts: list[tuple[int, int, int]]
    steps: int
    end_sample: int | None
    skips: list[dict[str, Any]]


def open_run(folder: str | Path, data: str | Path | Sequence[str | Path] | None = None) -> TracedRun:
    """Open a run folder. `data` is the current location of its packed datasets, if they were moved.

    Raises FileNotFoundError or ValueError naming what is missing.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no config.yaml{did_you_mean_run(folder)}")
    if not (folder / DATAPOINTS).is_dir():
        raise FileNotFoundError(f"{folder} has no datapoint record (it ran with --data.datapoints false)")
    steps = newest_checkpoint_step(folder)
    if steps == 0:
        raise ValueError(
            f"{folder} has no checkpoint yet, and the record is committed by checkpoints; try again after the first one"
        )
    facts_file = folder / DATAPOINTS / ORDER
    if not facts_file.is_file():
        raise FileNotFoundError(
            f"{facts_file} is missing, and without it the order of the data is unknown; restore it from a copy of the "
            "run"
        )
    facts = read_dataclass(OrderFacts, facts_file)
    recorded: list[str | Path] = [find_recorded(folder, d.path, MANIFEST) for d in facts.datasets]
    paths = [data] if isinstance(data, (str, Path)) else list(data or recorded)
    if len(paths) != len(facts.datasets):
        raise ValueError(f"{folder} was trained on {len(facts.datasets)} datasets; --data names {len(paths)}")
    try:
        datasets = [PackedDataset(path) for path in paths]
    except FileNotFoundError as error:
        if data:
            raise
        raise FileNotFoundError(f"{error}; {facts_file} names it: give its folder with --data") from error
    for dataset, fact in zip(datasets, facts.datasets, strict=True):
        if dataset.fingerprint != fact.fingerprint:
            raise ValueError(
                f"{dataset.path} is not the data that {folder} was trained on (fingerprint {dataset.fingerprint[:12]} "
                f"instead of {fact.fingerprint[:12]}, which {facts_file} names); give the right folder with --data"
            )
    plan_dir = find_recorded(folder, facts.plan_dir) if facts.plan_dir is not None else None
    rows = [open_rows(dataset, facts.packing, facts.block_size, plan_dir) for dataset in datasets]
    orders = (Order(r.n_windows, facts.seed, d, **asdict(facts.shuffle)) for d, r in enumerate(rows))
    return TracedRun(
        folder,
        datasets,
        rows,
        Mixture(tuple(orders), tuple(facts.phases), facts.seed),
        facts.segments,
        facts.block_size,
        facts.document_mask,
        facts.layouts,
        steps,
        facts.end_sample,
        [asdict(skip) for skip in facts.skips],
    )


def find_recorded(run: Path, path: str | Path, holding: str = "") -> Path:
    """Resolve a path recorded by a run, from any working folder; `holding` is a file that must be in it.

    A relative path is relative to the folder training was started in, usually a parent of the run folder. Returns the
    path unchanged if nothing is found.
    """
    candidates = [Path(path), *(above / path for above in run.resolve().parents)]
    return next((path for path in candidates if (path / holding).exists()), Path(path))


def spans_of_step(run: TracedRun, step: int) -> pa.Table:
    """The record's rows of one step, in the order of the rows. Reads only the parts with the step."""
    if not 0 <= step < run.steps:
        raise ValueError(f"step {step} is not in the record, which holds steps 0 to {run.steps - 1}")
    return _read(run, {step})


def steps_of_document(run: TracedRun, document: int, dataset: int = 0) -> list[tuple[int, int]]:
    """All (step, row) that used a part of a document, by inverting the order: no scan of the record."""
    found = []
    for sample in _samples_of_document(run, document, dataset):
        found.extend(steps_of_sample(run.segments, sample, run.steps))
    return sorted(found)


def left_out_of_document(run: TracedRun, document: int, dataset: int = 0) -> list[tuple[int, str]]:
    """All samples with a part of a document that no step used because a rollback skipped them, and why."""
    return [
        (sample, skip["reason"])
        for sample in sorted(_samples_of_document(run, document, dataset))
        for skip in run.skips
        if skip["first_sample"] <= sample < skip["end_sample"]
    ]


def _samples_of_document(run: TracedRun, document: int, dataset: int) -> list[int]:
    """The samples with a part of a document in the run so far, including skipped ones."""
    windows = run.rows[dataset].windows_of_document(document)
    ends = [first_sample_of_step(run.segments, step) for step in _last_steps(run)]
    end_sample = max(first + count for first, count in ends)
    if run.end_sample is not None:
        end_sample = min(end_sample, run.end_sample)
    epochs = -(-int(run.mixture.counts(end_sample)[dataset]) // run.rows[dataset].n_windows)
    epoch, window = (x.reshape(-1) for x in np.meshgrid(np.arange(epochs), windows, indexing="ij"))
    samples = run.mixture.sample(dataset, epoch, window)
    found: list[int] = samples[(samples >= 0) & (samples < end_sample)].tolist()
    return found


def _last_steps(run: TracedRun) -> list[int]:
    """The last recorded step of each segment."""
    begins = sorted(s.from_step for s in run.segments if s.from_step < run.steps)
    return [end - 1 for end in [*begins[1:], run.steps]]


def spans_of_document(run: TracedRun, document: int, dataset: int = 0) -> pa.Table:
    """The record's rows of one document (its number in the dataset): every step that used it, with its loss."""
    data = run.datasets[dataset]
    if not 0 <= document < data.n_documents:
        raise ValueError(f"document {document} is not in {data.path}, which has {data.n_documents}")
    table = _read(run, {step for step, _ in steps_of_document(run, document, dataset)}, document)
    return table.filter(pc.equal(table["dataset"], dataset))


def _read(run: TracedRun, steps: set[int], document: int | None = None) -> pa.Table:
    return read_steps(run.folder, steps, None if document is None else lambda t: pc.equal(t["document"], document))
