"""Re-executes the recorded steps between two checkpoints, and compares losses and state with those of the run.

With the run's hardware, versions, threads and ranks, every loss and every tensor must be equal. In another environment
the difference is compared with a noise floor: the difference that a second replay shows whose starting weights are
perturbed by one unit in the last place. By backward error analysis (Higham, Accuracy and Stability of Numerical
Algorithms, 1.5) another order of summation acts like a perturbation of this size to the operands.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_data.loading.batches import StepData
from lit_data.record.reader import blocks_of_steps, read_steps
from lit_eval.run_facts import read_run
from lit_files.checkpoint_name import checkpoint_name
from lit_model.dtensor import local
from lit_model.hf.table import LazyTensors
from lit_model.load import MODEL_PREFIX, WITHOUT_TENSORS, Checkpoint, is_hf_folder, load_tensors
from pretrain.build import set_up
from pretrain.data import training_loader
from pretrain.failure.peers import on_rank_zero
from pretrain.launch import is_first_process
from pretrain.loop import SpanLosses, checkpoint_meta, train_step
from pretrain.release.interval import Interval, is_topology_invariant, lay_out, open_interval, replay_args, unavailable
from pretrain.run import Run

NOISE_FACTOR = 10.0
"""Rounding explains a difference up to this many times the noise floor."""
LEAST = 1e-6
"""Rounding explains this difference in any case: nats per token, or a share of the weights' change."""
SHOWN = 3  # spans of a report
MATHEMATICS = ("torch", "triton", "flash-attn", "nvidia-", "liger-", "quack-", "lightning")  # packages, by prefix

Change = Callable[[Run, StepData], SpanLosses | None]
"""Changes a step's batches before it is executed; may return the losses to record in place of the step's own."""


@dataclass(frozen=True)
class StepDifference:
    """One step of two records.

    Attributes:
        spans, differing: number of spans, and of those with another loss.
        largest: difference of a span's loss, in nats per target.
        content: how the spans themselves differ; None: they agree.
        examples: spans with another loss.
    """

    step: int
    spans: int
    differing: int
    largest: float
    content: str | None
    examples: list[str]


@dataclass(frozen=True)
class StateDifference:
    """Two states of training.

    Attributes:
        compared: number of tensors.
        differing: names of those that are not bitwise equal.
        facts: other differences, which no rounding explains: names and shapes of tensors, the loss scale.
        distance: Euclidean, between the parameters.
        moved: Euclidean distance of the parameters from those at the start of the interval.
        weights_only: the optimizer's state is not available.
    """

    compared: int
    differing: list[str]
    facts: list[str]
    distance: float = 0.0
    moved: float = 0.0
    weights_only: bool = False

    @property
    def equal(self) -> bool:
        return not self.differing and not self.facts

    @property
    def share(self) -> float:
        """The distance as a share of the change over the interval."""
        return self.distance / self.moved if self.moved else self.distance and math.inf

    def beyond(self, noise: StateDifference) -> bool:
        """Whether rounding does not explain the difference, beside that of a replay with perturbed weights.

        The optimizer's state is not considered. A distance that is NaN is beyond any other.
        """
        return bool(self.facts) or not self.distance <= max(LEAST * noise.moved, NOISE_FACTOR * noise.distance)


@dataclass(frozen=True)
class Comparison:
    """A replay beside the record; `state` is None where the last steps could not be replayed."""

    steps: list[StepDifference]
    state: StateDifference | None

    @property
    def equal(self) -> bool:
        same_state = self.state is None or self.state.equal
        return same_state and not any(s.differing or s.content for s in self.steps)


@dataclass
class Report:
    """The result of a replay, in lines."""

    passed: bool
    lines: list[str] = field(default_factory=list)


def replay(
    start: Path, target: Path, *, data: Sequence[Path] = (), devices: int | None = None, work: Path | None = None
) -> Report:
    """Re-execute the steps between two checkpoints or revisions. Every rank calls this.

    Args:
        data: the folders of the training data, if they were moved.
        devices: number of ranks on this machine; None: as many as in the run.
        work: a folder for the replayed run, which remains; None: a temporary one.

    Raises ValueError or OSError where nothing can be replayed.
    """
    interval = open_interval(start, target, data)
    end = interval.readable_end()
    if end == interval.first:
        raise ValueError(f"no step can be checked: step {end} used {unavailable(interval)}, which is missing")
    with open_work(work) as folder:
        run = re_execute(interval, end, folder, "replay", devices=devices)
        found, reasons = on_rank_zero(
            run.fabric, lambda: (compare(interval, end, run.folder), environment_differences(interval, run.folder))
        )
        report = describe(interval, end, found, reasons)
        if not found.equal and reasons and not any(s.content for s in found.steps):
            perturbed = re_execute(interval, end, folder, "perturbed", devices=devices, perturbed=True, watched=False)
            noise = on_rank_zero(perturbed.fabric, lambda: compare_runs(interval, end, run.folder, perturbed.folder))
            report = describe_beside(interval, end, found, reasons, noise)
        return report


@contextlib.contextmanager
def open_work(work: Path | None) -> Iterator[Path]:
    """The folder of the replayed runs. Only rank 0 uses it, and broadcasts the run folder to the others."""
    if work is not None:
        if is_first_process() and work.exists() and any(work.iterdir()):
            raise ValueError(f"--work {work} is not empty: give a new folder")
        yield work
    elif not is_first_process():
        yield Path("replay")
    else:
        with tempfile.TemporaryDirectory(prefix="llammlein-replay-") as folder:
            yield Path(folder)


def re_execute(
    interval: Interval,
    end: int,
    work: Path,
    name: str,
    *,
    devices: int | None = None,
    perturbed: bool = False,
    watched: bool = True,
    change: Change | None = None,
) -> Run:
    """Execute the recorded steps up to `end` as training does, in a run folder `work / name` with a record of its own.

    Args:
        perturbed: change the starting weights by one unit in the last place.
        watched: as in `set_up`; for the first call in a process only.
        change: applied to each step.

    Returns the closed run, at its last step, whose checkpoint is saved.
    """
    use_threads_of(interval)
    args = replay_args(interval, work / name, devices)
    if is_first_process():
        args = lay_out(interval, args, work)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the report alone
        run = set_up(args, watched=watched)
        try:
            execute_steps(run, interval, end, perturbed, change)
        except BaseException as error:
            if run.peers.several:
                run.peers.give_up(error, run.step)
            run.close()
            raise
        run.close()
    return run


def execute_steps(run: Run, interval: Interval, end: int, perturbed: bool, change: Change | None) -> None:
    """Execute recorded steps up to `end` and save."""
    run.loader.close()
    run.segments = interval.segments
    run.loader = training_loader(run.args, run.fabric, run.data, run.segments, run.teachers, interval.run)
    assert run.recorder is not None
    if perturbed:
        perturb(run.optimizer.parameters)
    with contextlib.closing(run.loader.steps(run.step, end)) as steps:  # type: ignore[type-var]
        for data in steps:
            run.beat("step")
            losses = change(run, data) if change is not None else None
            result = train_step(run, data)
            run.step += 1
            run.recorder.add(data, result.span_losses if losses is None else losses)
    run.saver.save(run.step, run.tensors(), checkpoint_meta(run), run.recorder.publish_later())


def use_threads_of(interval: Interval) -> None:
    """Use as many threads as the run did: their number decides the order of sums on a CPU."""
    threads = interval.meta.get("threads")
    if isinstance(threads, int) and 0 < threads <= 1024:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the ranks that are started from here


@torch.no_grad()
def perturb(parameters: Mapping[str, Tensor]) -> None:
    """Change each weight to the next larger or next smaller number, at random from a fixed seed."""
    for number, parameter in enumerate(parameters.values()):
        shard = local(parameter)
        generator = torch.Generator().manual_seed(number)
        up = torch.rand(shard.shape, generator=generator) < 0.5
        bound = torch.where(up, float("inf"), float("-inf")).to(shard)
        shard.copy_(torch.nextafter(shard, bound))


def compare(interval: Interval, end: int, folder: Path) -> Comparison:
    """Compare a replayed run with the run, and with the target's state if all steps were replayed."""
    steps = list(compare_records(interval.run, folder, interval.first, end))
    replayed = Checkpoint(folder / checkpoint_name(end))
    state = compare_with_target(interval, replayed) if end == interval.end else None
    return Comparison(steps, state)


def compare_runs(interval: Interval, end: int, one: Path, other: Path) -> Comparison:
    """Compare two replayed runs."""
    steps = list(compare_records(one, other, interval.first, end))
    first, second = Checkpoint(one / checkpoint_name(end)), Checkpoint(other / checkpoint_name(end))
    return Comparison(steps, compare_tensors(first, second, start_tensors(interval)))


def compare_records(recorded: Path, replayed: Path, first: int, end: int) -> Iterator[StepDifference]:
    """Compare two records of some steps, span by span."""
    for some in blocks_of_steps(first, end):
        one, other = (
            {k: t[k].to_numpy() for k in t.column_names} for t in (read_steps(f, some) for f in (recorded, replayed))
        )
        for step in some:
            rows = [np.flatnonzero(record["step"] == step) for record in (one, other)]
            yield compare_step(
                step, *({k: v[r] for k, v in record.items()} for record, r in zip((one, other), rows, strict=True))
            )


def compare_step(step: int, one: dict[str, Any], other: dict[str, Any]) -> StepDifference:
    names = ("row", "sample", "dataset", "document", "start", "length", "targets", "hash", "applied")
    n = len(one["row"])
    if n != len(other["row"]) or any((one[k] != other[k]).any() for k in names[:6]):
        return StepDifference(step, n, 0, 0.0, "its rows in the record cannot be those of one step", [])
    content = None
    for name, text in (
        ("hash", "the tokens in the data are not those that went into the model"),
        ("targets", "it has another number of targets than recorded"),
        ("applied", "the update was applied in one of run and replay and skipped in the other"),
    ):
        if (wrong := np.flatnonzero(one[name] != other[name])).size and content is None:
            content = f"{span_name(one, int(wrong[0]))}: {text}"
    with np.errstate(invalid="ignore"):
        apart = np.abs(one["loss"] - other["loss"]) / np.maximum(one["targets"], 1)
    both_nan = np.isnan(one["loss"]) & np.isnan(other["loss"])
    differing = np.flatnonzero((one["loss"] != other["loss"]) & ~both_nan)
    largest = float(np.nan_to_num(apart[differing], nan=np.inf).max(initial=0.0))
    order = differing[np.argsort(-apart[differing], kind="stable")][:SHOWN]
    examples = [
        f"{span_name(one, i)}: loss {one['loss'][i]:.9g} recorded, {other['loss'][i]:.9g} replayed"
        for i in order.tolist()
    ]
    return StepDifference(step, n, len(differing), largest, content, examples)


def span_name(record: dict[str, Any], i: int) -> str:
    dataset = f"{record['dataset'][i]}:" if record["dataset"][i] else ""
    start, length = record["start"][i], record["length"][i]
    return f"row {record['row'][i]}, document #{dataset}{record['document'][i]}, tokens {start}..{start + length}"


def compare_with_target(interval: Interval, replayed: Checkpoint) -> StateDifference | None:
    """Compare the replayed state with the target's, or with its exported weights; None if it has neither."""
    target = Checkpoint(interval.target)
    if not target.meta.get(WITHOUT_TENSORS):
        return compare_tensors(target, replayed, start_tensors(interval))
    exported = interval.run.parent
    if not is_hf_folder(exported):
        return None
    _, weights = load_tensors(exported)
    mine = replayed.model_tensors()
    as_exported = LazyTensors(list(mine), lambda name: mine[name].to(weights[name].dtype))
    return replace(measure(weights, as_exported, start_tensors(interval)), weights_only=True)


def compare_tensors(one: Checkpoint, other: Checkpoint, start: Mapping[str, Tensor]) -> StateDifference:
    """Compare two checkpoints of one model: every tensor of model and optimizer."""
    found = measure(all_tensors(one), all_tensors(other), start)
    facts = [key for key in ("loss_scale", "skipped", "tokens") if one.meta.get(key) != other.meta.get(key)]
    return replace(found, facts=[*found.facts, *facts])


def all_tensors(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """The tensors of model and optimizer; those of the model by parameter name."""
    names = {name.removeprefix(MODEL_PREFIX): name for name in checkpoint.names()}
    return LazyTensors(names, lambda name: checkpoint.tensor(names[name]))


def measure(one: Mapping[str, Tensor], other: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> StateDifference:
    """Compare tensors by name; the distances are over the names in `start`."""
    differing, squares, moved = [], 0.0, 0.0
    facts = [f"only one state has {name}" for name in sorted(one.keys() ^ other.keys())]
    for name in sorted(one.keys() & other.keys()):
        first, second = one[name], other[name]
        if first.shape != second.shape or first.dtype != second.dtype:
            facts.append(f"another shape or type of {name}")
            continue
        if not torch.equal(first, second):
            differing.append(name)
        if name in start:
            squares += float((first.double() - second.double()).square().sum())
            moved += float((first.double() - start[name].double()).square().sum())
    return StateDifference(len(one.keys() | other.keys()), differing, facts, squares**0.5, moved**0.5)


def start_tensors(interval: Interval) -> Mapping[str, Tensor]:
    """The weights that the interval begins with; empty for the beginning of a run."""
    return {} if interval.start is None else Checkpoint(interval.start).model_tensors()


def environment_differences(interval: Interval, folder: Path) -> list[str]:
    """Why the replay's rounding may differ from the run's; empty where it must be bit-equal."""
    here = read_run(folder).starts[-1]
    known = interval.starts or [{k: interval.meta.get(k) for k in ("threads", "world_size")}]
    found = [] if interval.starts else ["the run has no record of its hardware and versions"]
    invariant = is_topology_invariant(interval.meta)
    for there in known:
        for key in (*(() if invariant else ("world_size",)), "cpu", "gpus", "threads", "cuda", "code"):
            if key in there and there[key] != here.get(key):
                found.append(f"{key} {there[key]} in the run, {here.get(key)} here")
        packages = [
            {k: v for k, v in (line.get("packages") or {}).items() if k.startswith(MATHEMATICS)}
            for line in (there, here)
        ]
        for name in sorted(packages[0].keys() | packages[1].keys()) if "packages" in there else ():
            one, other = (p.get(name) for p in packages)
            if one != other:
                found.append(f"{name} {one} in the run, {other} here")
    if here.get("gpus") and not (invariant or interval.meta["config"]["train"].get("deterministic")):
        found.append("CUDA without --train.deterministic true: two runs on the same card differ too")
    return list(dict.fromkeys(found))


def describe(interval: Interval, end: int, found: Comparison, reasons: list[str]) -> Report:
    """The report of a replay that must be equal."""
    report = Report(found.equal, heading(interval, end))
    report.lines += [f"the environment is not the run's: {reason}" for reason in reasons]
    spans = sum(s.spans for s in found.steps)
    first = next((s for s in found.steps if s.differing or s.content), None)
    if first is None:
        report.lines.append(f"losses: all {spans} spans equal the record")
    else:
        report.lines += explain(interval, first)
    if found.state is not None:
        report.lines.append(describe_state(found.state))
        if not found.state.equal and first is None:
            report.lines.append(f"step {end - 1} is the first that differs: its update is not that of the run")
    report.lines += unchecked(interval, end, found)
    return report


def describe_beside(interval: Interval, end: int, found: Comparison, reasons: list[str], noise: Comparison) -> Report:
    """The report of a replay in another environment, beside the noise floor."""
    bound, departed = LEAST, None
    for mine, perturbed in zip(found.steps, noise.steps, strict=True):
        if math.isfinite(perturbed.largest):
            bound = max(bound, NOISE_FACTOR * perturbed.largest)
        if mine.largest > bound and departed is None:
            departed = mine
    state, floor = found.state, noise.state
    assert floor is not None
    drifted = state is not None and state.beyond(floor)
    report = Report(departed is None and not drifted, heading(interval, end))
    report.lines += [f"the environment is not the run's: {reason}" for reason in reasons]
    largest = [max(s.largest for s in some.steps) for some in (found, noise)]
    report.lines.append(
        f"losses: largest difference of a span {largest[0]:.2e} nats per token; noise floor (a replay from weights "
        f"perturbed in the last bit) {largest[1]:.2e}"
    )
    if state is not None:
        report.lines.append(
            f"weights: the difference is {state.share:.2e} of their change over the interval; noise floor "
            f"{floor.share:.2e}"
        )
        report.lines += [f"state: {fact}" for fact in shortened(state.facts)]
    if departed is not None:
        report.lines += explain(interval, departed)
    elif drifted:
        report.lines.append("the state differs by more than rounding explains")
    else:
        report.lines.append(f"within {NOISE_FACTOR:.0f} times the noise floor: rounding explains it")
    report.lines += unchecked(interval, end, found)
    if state is not None and not state.weights_only:
        report.lines.append("not checked: the values of the optimizer's state, in another environment")
    return report


def heading(interval: Interval, end: int) -> list[str]:
    before = "the beginning" if interval.start is None else interval.start.name
    return [f"replayed steps {interval.first} to {end - 1}, from {before} towards {interval.target.name}"]


def explain(interval: Interval, first: StepDifference) -> list[str]:
    """Lines on the first step that differs."""
    if first.content is not None:
        return [f"step {first.step} is the first that differs: {first.content}"]
    if first.differing < first.spans:
        text = "they had other tokens or targets than the record and the data"
    elif first.step == interval.first:
        text = "the state before it is not that of FROM"
    else:
        text = f"its tokens are those of the record, so the update of step {first.step - 1} was another"
    lines = [f"step {first.step} is the first whose losses differ, in {first.differing} of {first.spans} spans: {text}"]
    return lines + [f"  {example}" for example in first.examples]


def describe_state(state: StateDifference) -> str:
    compared = "exported weights" if state.weights_only else "parameters and optimizer state"
    if state.equal:
        return f"state: {compared} are equal, {state.compared} tensors"
    names = ", ".join(shortened([*state.facts, *state.differing]))
    return (
        f"state: {len(state.differing)} of {state.compared} tensors differ ({names}); the distance of the weights "
        f"is {state.share:.2e} of their change over the interval"
    )


def shortened(names: list[str]) -> list[str]:
    return names if len(names) <= SHOWN else [*names[:SHOWN], f"and {len(names) - SHOWN} more"]


def unchecked(interval: Interval, end: int, found: Comparison) -> Iterator[str]:
    """Lines on the parts that were not checked."""
    if end < interval.end:
        yield (
            f"not checked: steps {end} to {interval.end - 1} and the state after them, as step {end} used "
            f"{unavailable(interval)}, which is missing; later steps can be replayed from a checkpoint after it"
        )
    elif found.state is None:
        yield "not checked: the state, as TO has neither a training state nor exported weights"
    elif found.state.weights_only:
        yield "not checked: the optimizer's state, which TO was published without"
