"""The effect of a document on a run: its steps re-executed with the document's targets ignored, beside the original.

The inputs stay, and each step divides by its recorded number of targets, so that no other token changes its weight.
The loss of the ignored spans is measured by a forward pass before the step, without training on it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from lit_data.loading.batches import IGNORE_TARGET, MicroBatch, StepData
from lit_data.record.answers import Answer, document_name, find_documents
from lit_data.record.reader import blocks_of_steps, read_steps
from lit_data.record.trace import TracedRun, steps_of_document
from lit_files.checkpoint_name import checkpoint_name, checkpoint_step, list_checkpoints
from lit_model.load import Checkpoint
from pretrain.checkpoint.retention import remove
from pretrain.failure.peers import on_rank_zero
from pretrain.loop import SpanLosses, read_later, seed_step, sum_over_pieces, to_device
from pretrain.release.interval import Interval, recorded_interval
from pretrain.release.replay import open_work, re_execute
from pretrain.release.revision import write_facts
from pretrain.run import Run

Key = tuple[int, int, int]  # dataset, document and first token of a span


@dataclass(frozen=True)
class InfluenceArgs:
    """The document whose targets are ignored, and the runs to execute.

    Attributes:
        document: an id, or #N or #D:N as in `trace_data.py document`. All documents with the id are ignored.
        steps: steps executed from the first exposure on; None: up to the newest checkpoint.
        controls: number of control runs, which ignore random spans of the same steps instead.
        seed: of the random spans.
        devices, work: as in `replay`.
    """

    document: str
    steps: int | None = None
    controls: int = 3
    seed: int = 0
    devices: int | None = None
    work: Path | None = None


@dataclass(frozen=True)
class Effect:
    """Loss differences, with some targets ignored minus with all, over the spans of the steps after the first.

    Attributes:
        ignored: description of the ignored targets.
        targets: number of ignored targets.
        spans: number of spans compared; the ignored ones are not among them.
        mean, mean_absolute: nats per token, weighted by targets.
        largest: the largest difference, nats per token, at `span` of `step`; None without later spans.
        own: for each exposure of the ignored spans: step, targets, mean loss with (`loss`) and without (`without`).
    """

    ignored: str
    targets: int
    spans: int
    mean: float
    mean_absolute: float
    largest: float
    step: int | None
    span: str | None
    own: list[dict[str, Any]] = field(default_factory=list)

    @property
    def own_mean(self) -> float | None:
        """The ignored spans' mean difference in the steps after the first, nats per token; None without any."""
        later = self.own[1:]
        targets = sum(e["targets"] for e in later)
        return sum((e["without"] - e["loss"]) * e["targets"] for e in later) / targets if targets else None


class Ignored:
    """Removes spans from the loss of their steps. Every rank first measures the losses of a step that has any."""

    def __init__(self, record: pa.Table) -> None:
        self.spans: dict[int, set[Key]] = {}
        columns = [record[name].to_numpy() for name in ("step", "dataset", "document", "start")]
        for step, *key in zip(*(c.tolist() for c in columns), strict=True):
            self.spans.setdefault(step, set()).add((key[0], key[1], key[2]))

    def __call__(self, run: Run, data: StepData) -> SpanLosses | None:
        chosen = self.spans.get(data.step)
        if chosen is None:
            return None
        losses = measure_losses(run, data)
        for batch in data.micro_batches:
            ignore(batch, chosen)
        return losses


def ignore(batch: MicroBatch, chosen: set[Key]) -> None:
    """Remove the targets of some spans. `n_targets` stays, so that the other targets keep their weight."""
    spans, targets, at = batch.spans, batch.targets.view(-1), 0
    keys = zip(spans.dataset.tolist(), spans.document.tolist(), spans.start.tolist(), strict=True)
    for key, length in zip(keys, spans.length.tolist(), strict=True):
        if key in chosen:
            targets[at : at + length] = IGNORE_TARGET
        at += length


@torch.no_grad()
def measure_losses(run: Run, data: StepData) -> SpanLosses:
    """The losses of a step's spans before its update, computed as in `train_step`."""
    run.model.train()
    if run.config.dropout or run.config.attention_dropout:
        seed_step(run.args.seed, data.step, run.fabric.global_rank)
    losses = []
    for batch in data.micro_batches:
        tokens, targets, cu_seqlens = to_device(batch, run.device)
        with run.placement.autocast():
            out = run.model(tokens, targets, cu_seqlens=cu_seqlens if run.args.data.document_mask else None)
        losses.append(sum_over_pieces(out.token_losses, cu_seqlens))
    return read_later(losses, torch.zeros((), device=run.device))


def influence(traced: TracedRun, args: InfluenceArgs, data: Sequence[Path] = ()) -> Answer:
    """Execute the steps from a document's first exposure on, ignoring nothing, then the document, then random spans.

    Every rank calls this. Raises ValueError if no step saw the document, or its steps cannot be replayed.
    """
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps} must be at least 1")
    documents = find_documents(traced, args.document)
    steps = sorted(
        {step for dataset, document in documents for step, _ in steps_of_document(traced, document, dataset)}
    )
    if not steps:
        raise ValueError(f"document {args.document} was not seen in the {traced.steps} steps of {traced.folder}")
    first = steps[0]
    end = traced.steps if args.steps is None else min(traced.steps, first + args.steps)
    record = read_steps(traced.folder, [step for step in steps if step < end])
    own = spans_of(record, documents)
    interval = interval_around(traced.folder, first, end, data)
    chosen = {f"document {args.document}": own}
    for number in range(args.controls):
        chosen[f"random spans {number + 1}"] = random_spans(record, own, random.Random(f"{args.seed}:{number}"))
    yield None, heading(traced, documents, interval, steps, own, end)
    with open_work(args.work) as work:
        base = re_execute(interval, end, work, "nothing", devices=args.devices)
        yield row(effect_of(base, "nothing", traced.folder, first, end, own.slice(0, 0)))
        for number, (name, ignored) in enumerate(chosen.items()):
            change = Ignored(ignored)
            run = re_execute(
                interval, end, work, f"ignored-{number}", devices=args.devices, watched=False, change=change
            )
            found = effect_of(run, name, base.folder, first, end, ignored)
            yield row(found)
            if number == 0:
                yield from exposures(found)


def effect_of(run: Run, ignored: str, beside: Path, first: int, end: int, spans: pa.Table) -> Effect:
    """Compare an executed run with another one, on rank 0, and replace its checkpoint by one without tensors.

    Only the record of a run is needed further, and a checkpoint must commit it.
    """

    def compare() -> Effect:
        path = run.folder / checkpoint_name(end)
        meta = Checkpoint(path).meta
        remove(path)
        write_facts(meta, path)
        return effect(ignored, beside, run.folder, first, end, spans)

    return on_rank_zero(run.fabric, compare)


def interval_around(run: Path, first: int, end: int, data: Sequence[Path]) -> Interval:
    """From the newest checkpoint before a step to the oldest at or after `end`.

    Raises ValueError if retention deleted the checkpoints before the step.
    """
    checkpoints = [(checkpoint_step(path) or 0, path) for path in list_checkpoints(run)]
    before = [path for step, path in checkpoints if step <= first]
    target = next(path for step, path in checkpoints if step >= end)
    interval = recorded_interval(before[-1] if before else None, target, data)
    every = interval.meta["config"]["save"]["every_steps"]
    if not before and every <= first:
        raise ValueError(
            f"the first exposure is in step {first}, and the checkpoints before it were deleted (--save.keep_last): "
            f"the oldest is {checkpoints[0][1].name}"
        )
    return interval


def spans_of(record: pa.Table, documents: Sequence[tuple[int, int]]) -> pa.Table:
    """The rows of a record that belong to documents."""
    wanted = set(documents)
    pairs = zip(record["dataset"].to_pylist(), record["document"].to_pylist(), strict=True)
    return record.filter(pa.array([pair in wanted for pair in pairs], pa.bool_()))


def random_spans(record: pa.Table, own: pa.Table, draw: random.Random) -> pa.Table:
    """In each step spans of other documents, with as many targets as those in `own` or a few more."""
    names = ("step", "dataset", "document", "targets")
    spans = list(zip(*(record[name].to_pylist() for name in names), strict=True))
    mine = set(zip(own["dataset"].to_pylist(), own["document"].to_pylist(), strict=True))
    picked: list[int] = []
    for step in sorted(set(own["step"].to_pylist())):
        there = [i for i, span in enumerate(spans) if span[0] == step and span[1:3] not in mine and span[3]]
        wanted = sum(span[3] for span in spans if span[0] == step and span[1:3] in mine)
        for i in draw.sample(there, len(there)):
            if wanted <= 0:
                break
            picked.append(i)
            wanted -= spans[i][3]
    return record.take(pa.array(sorted(picked), pa.int64()))


def effect(ignored: str, one: Path, other: Path, first: int, end: int, spans: pa.Table) -> Effect:
    """Compare the records of two runs over the same steps."""
    removed = Ignored(spans).spans
    sums = np.zeros(3)  # difference, absolute difference, targets
    count, largest, step, span = 0, 0.0, None, None
    own: dict[int, npt.NDArray[np.float64]] = {}
    for some in blocks_of_steps(first, end):
        was, now = read_steps(one, some), read_steps(other, some)
        columns = ("step", "dataset", "document", "start", "targets")
        keys = list(zip(*(was[name].to_pylist() for name in columns), strict=True))
        losses = was["loss"].to_numpy(), now["loss"].to_numpy()
        for (at, dataset, document, start, targets), loss, without in zip(keys, *losses, strict=True):
            if (dataset, document, start) in removed.get(at, ()):
                own.setdefault(at, np.zeros(3))
                own[at] += (loss, without, targets)
            elif at > first and targets:
                difference = without - loss
                sums += (difference, abs(difference), targets)
                count += 1
                if step is None or abs(difference) / targets > abs(largest):
                    largest, step = float(difference) / targets, at
                    span = f"#{dataset}:{document}, tokens from {start}"
    mean, absolute = (sums[:2] / max(sums[2], 1)).tolist()
    exposed = [
        {"step": at, "targets": int(n), "loss": loss / max(n, 1), "without": without / max(n, 1)}
        for at, (loss, without, n) in sorted((at, values.tolist()) for at, values in own.items())
    ]
    targets = int(spans["targets"].to_numpy().sum())
    return Effect(ignored, targets, count, mean, absolute, largest, step, span, exposed)


def heading(
    traced: TracedRun,
    documents: Sequence[tuple[int, int]],
    interval: Interval,
    steps: Sequence[int],
    own: pa.Table,
    end: int,
) -> str:
    names = ", ".join(document_name(traced, *document) for document in documents[:3])
    more = f" and {len(documents) - 3} more" if len(documents) > 3 else ""
    begin = "the beginning" if interval.start is None else interval.start.name
    targets = int(own["targets"].to_numpy().sum())
    inside = [step for step in steps if step < end]
    return (
        f"document {names}{more}: {targets} targets in {len(inside)} steps, {inside[0]} to {inside[-1]}; replayed from "
        f"{begin} to step {end - 1}\nloss without minus loss with, nats per token, in the steps after {steps[0]}:"
    )


def row(found: Effect) -> tuple[dict[str, Any], str]:
    """An effect as a record and as a line."""
    where = "" if found.step is None or not found.largest else f" (step {found.step}, document {found.span})"
    own = "" if found.own_mean is None else f"; its own later exposures {found.own_mean:+.4e}"
    text = (
        f"  ignoring {found.ignored}, {found.targets} targets: mean {found.mean:+.2e}, mean absolute "
        f"{found.mean_absolute:.2e} over {found.spans} spans, largest {found.largest:+.2e}{where}{own}"
    )
    return {**asdict(found), "own_mean": found.own_mean}, text


def exposures(found: Effect) -> Answer:
    """A line for each exposure of the ignored spans."""
    for e in found.own:
        yield None, f"    step {e['step']:8d}: loss {e['loss']:.4f}, without {e['without']:.4f}"
