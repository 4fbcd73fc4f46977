"""The recorded steps between two checkpoints of a run, and the settings under which they were executed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_data.loading.order import Segment
from lit_data.loading.row_plans import plan_folder
from lit_data.packed.manifest import MANIFEST
from lit_data.packed.reader import PackedDataset
from lit_data.record.order_file import OrderFacts
from lit_data.record.parts import covered_until
from lit_data.record.recorded_loader import first_unreadable_step, missing_shards
from lit_data.record.trace import find_recorded
from lit_eval.run_facts import read_run
from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_files.reading import read_dataclass
from lit_files.run_files import DATAPOINTS, ORDER
from lit_model.load import WITHOUT_TENSORS
from pretrain.args import RunArgs, Sharding, StopArgs, flat
from pretrain.cli.run_parser import from_settings
from pretrain.launch import find_launch
from pretrain.release.manifest import RUN
from pretrain.resume import BITS, MECHANICS, SettingsChange, changes_meaning, changes_of, read_meta
from pretrain.trial_args import without_side_outputs

ROUNDING = ("precision", "compile", "strategy", "sharding_strategy", *MECHANICS)
"""Settings that change rounding, but not the meaning of a run."""


@dataclass(frozen=True)
class Interval:
    """Steps `first` to `end - 1` of a run.

    Attributes:
        start: the checkpoint before them; None: the initialized model.
        target: the checkpoint after them, in `run`.
        run: the run folder with their record.
        meta: of the target.
        ranks: number of ranks that executed them.
        micro_batch: rows of their micro-batches.
        starts: lines of environment.jsonl of the starts of the run that executed them.
        datasets: folders of the training data, one per dataset.
    """

    start: Path | None
    target: Path
    run: Path
    first: int
    end: int
    meta: dict[str, Any]
    ranks: int
    micro_batch: int
    starts: list[dict[str, Any]]
    datasets: list[Path]

    @property
    def segments(self) -> list[Segment]:
        """The rows of each step, from the last segment that begins at or before `first` on."""
        found = [Segment(**segment) for segment in self.meta["segments"]]
        begun = max(s.from_step for s in found if s.from_step <= self.first)
        return [s for s in found if begun <= s.from_step < self.end]

    @property
    def changes(self) -> list[SettingsChange]:
        """The changes of settings in the run up to its target."""
        return changes_of(self.meta, self.target)

    def open_datasets(self) -> list[PackedDataset]:
        """The datasets, of which shards may be missing."""
        return [PackedDataset(path, check=False) for path in self.datasets]

    def readable_end(self) -> int:
        """The first step whose data is not available; `end` if all is."""
        found = first_unreadable_step(self.run, self.open_datasets(), self.first, self.end)
        return self.end if found is None else found


def find_checkpoint(path: Path, name: str) -> Path:
    """The checkpoint that a path names: itself, or that of a published revision. `name` is that of the argument.

    Raises FileNotFoundError or ValueError for any other path.
    """
    if not path.exists():
        raise FileNotFoundError(f"{name} {path}: no such checkpoint or revision")
    if checkpoint_step(path) is not None:
        return path
    if published := list_checkpoints(path / RUN):
        return published[-1]
    if found := list_checkpoints(path):
        raise ValueError(f"{name} {path} is a run folder: name one of its checkpoints, such as {found[-1]}")
    raise ValueError(f"{name} {path} is neither a checkpoint (iter-XXXXXXXX-ckpt.pth) nor a published revision")


def open_interval(start: Path, target: Path, data: Sequence[Path] = ()) -> Interval:
    """The steps between two checkpoints or revisions. `data`: where the datasets are now, if they were moved.

    Raises FileNotFoundError or ValueError naming what is missing, or why the steps cannot be re-executed.
    """
    start, target = find_checkpoint(start, "FROM"), find_checkpoint(target, "TO")
    before = read_meta(start)
    if before.get(WITHOUT_TENSORS):
        raise ValueError(f"FROM {start} was published without its training state, which a replay starts from")
    if before["step"] >= (end := read_meta(target)["step"]):
        raise ValueError(f"FROM {start} is after step {before['step']}, TO {target} after step {end}: give a later TO")
    return recorded_interval(start, target, data)


def recorded_interval(start: Path | None, target: Path, data: Sequence[Path] = ()) -> Interval:
    """As `open_interval`, for checkpoints. `start` None: from the beginning of the run."""
    run, meta = target.parent, read_meta(target)
    before = read_meta(start) if start is not None else None
    first, end = before["step"] if before is not None else 0, meta["step"]
    file = run / DATAPOINTS / ORDER
    if not file.is_file():
        raise FileNotFoundError(f"{run} has no datapoint record ({file} is missing): there is nothing to replay")
    facts = read_dataclass(OrderFacts, file)
    check_covered(run, first, end)
    starts = starts_of(run, before, meta, first, end)
    if before is not None and start is not None:
        check_settings(start, before, target, meta, first, starts[-1].get("step") if starts else None)
    begun = [layout for layout in facts.layouts if layout[0] <= first]
    if not begun:
        raise ValueError(f"{file} does not say how many ranks executed step {first}: it cannot be replayed")
    _, ranks, micro_batch = begun[-1]
    one_layout = not is_topology_invariant(meta)
    changed = [
        at
        for at, some_ranks, rows in facts.layouts
        if first < at < end and (rows != micro_batch or (one_layout and some_ranks != ranks))
    ]
    changed += [change.step for change in changes_of(meta, target) if first < change.step < end]
    if changed:
        at = min(changed)
        raise ValueError(
            f"the run was resumed after step {at} with other settings or another number of ranks: replay the steps up "
            f"to checkpoint {at} and those from it on separately"
        )
    paths = find_data(run, [d.path for d in facts.datasets], meta["data"]["train"], data)
    return Interval(start, target, run, first, end, meta, ranks, micro_batch, starts, paths)


def check_covered(run: Path, first: int, end: int) -> None:
    """Raise ValueError unless the committed record of a run has all steps from `first` to `end - 1`."""
    if (at := covered_until(run, first)) < end:
        raise ValueError(f"the record of {run} has no step {at}: steps {first} to {end - 1} cannot be replayed")


def starts_of(
    run: Path, before: dict[str, Any] | None, meta: dict[str, Any], first: int, end: int
) -> list[dict[str, Any]]:
    """The starts that executed the steps, the target's last. Empty if the run does not name that one."""
    lines = [line for line in read_run(run).starts if isinstance(line.get("step"), int)]
    last = [line for line in lines if line.get("attempt") == meta.get("environment")][-1:]
    if not last or last[0]["step"] <= first:
        return last
    earlier = [line for line in lines if before is not None and line.get("attempt") == before.get("environment")][-1:]
    between = [line for line in lines if first < line["step"] < end and line is not last[0]]
    return [*earlier, *between, *last]


def check_settings(
    start: Path, before: dict[str, Any], target: Path, meta: dict[str, Any], first: int, started: int | None
) -> None:
    """Raise ValueError if two checkpoints are not of one run, or if its settings changed within the interval.

    Args:
        started: the step at which the run was last started before the target; None if unknown.
    """
    explained = {key for change in changes_of(meta, target) for key in change.differences}
    old, new = flat(before["config"]), flat(meta["config"])
    rounding = BITS if is_topology_invariant(meta) else ROUNDING
    differing = {
        key: f"{key} {old[key]!r:.40} there, {new[key]!r:.40} here"
        for key in old.keys() & new.keys()
        if old[key] != new[key] and (key in rounding or changes_meaning(key))
    }
    foreign = [text for key, text in differing.items() if key not in {*ROUNDING, *explained}]
    for key in ("model_config", "data"):
        one, other = (m[key]["train"] if key == "data" else m[key] for m in (before, meta))
        if one != other and not any(name.startswith(key.partition("_")[0]) for name in explained):
            foreign.append(f"another {'dataset' if key == 'data' else 'model'}")
    if foreign:
        raise ValueError(f"FROM {start} is not a checkpoint of the run of TO: {'; '.join(sorted(foreign)[:3])}")
    if differing and started != first and (started is None or started > first):
        raise ValueError(
            f"the run was resumed between the two checkpoints{'' if started is None else f', after step {started}'}, "
            f"with other settings ({'; '.join(sorted(differing.values())[:3])}): replay both parts separately"
        )


def find_data(run: Path, recorded: Sequence[str], fingerprints: Sequence[str], given: Sequence[Path]) -> list[Path]:
    """The folders of a run's datasets. Raises FileNotFoundError or ValueError for a missing or a different dataset."""
    if given and len(given) != len(recorded):
        raise ValueError(f"{run} was trained on {len(recorded)} datasets; --data names {len(given)}")
    paths = list(given) or [find_recorded(run, path, MANIFEST) for path in recorded]
    for path, fingerprint in zip(paths, fingerprints, strict=True):
        if not (path / MANIFEST).is_file():
            raise FileNotFoundError(f"{path} is not a packed dataset: give the run's training data with --data")
        dataset = PackedDataset(path, check=False)
        if dataset.fingerprint != fingerprint:
            raise ValueError(f"{path} is not the data that {run} was trained on; give the right folder with --data")
        lacking = [s.name for s in dataset.manifest.shards if not (path / f"{s.name}.idx").is_file()]
        if lacking:
            raise FileNotFoundError(
                f"{path / lacking[0]}.idx is missing: of data that is not available, a replay needs manifest.json and "
                "the .idx files"
            )
    return paths


def replay_args(interval: Interval, folder: Path, devices: int | None = None) -> RunArgs:
    """The settings that re-execute the steps in `folder`, with as many ranks as they had, or `devices` of them.

    Raises ValueError where that is not possible.
    """
    args = from_settings(interval.meta["config"], interval.target)
    args, nodes, launch = without_side_outputs(args), args.num_nodes, find_launch()
    if launch is not None:
        devices, nodes = launch.devices, launch.num_nodes
    elif devices is not None:
        nodes = 1
    elif nodes > 1:
        raise ValueError(
            f"the steps were executed by {interval.ranks} ranks on {nodes} nodes: start replay.py with srun or "
            f"torchrun in {interval.ranks} processes, or give --devices for another number, which agrees up to "
            "rounding (bit for bit with --train.topology_invariant true)"
        )
    devices = interval.ranks // nodes if devices is None else devices
    if devices * nodes != interval.ranks:
        check_other_ranks(interval, args, devices * nodes)
    was_on_gpu = any(start.get("gpus") for start in interval.starts)
    changed = [key for change in interval.changes if change.step == interval.first for key in change.differences]
    here = interval.start
    return replace(
        args,
        out_dir=folder,
        resume=None if here is None else here.name,
        resume_allow=changed,
        devices=devices,
        num_nodes=nodes,
        sharding_strategy=sharding_for(args, interval.ranks, devices * nodes),
        accelerator="auto" if was_on_gpu else args.accelerator,
        init_from=None if args.init_from is None else find_recorded(interval.run, args.init_from),
        train=replace(args.train, micro_batch_samples=interval.micro_batch),
        data=replace(
            args.data, datapoints=True, plan_dir=plan_dir(interval, args), val=None, **data_settings(interval, args)
        ),
        distillation=replace(
            args.distillation,
            teachers=[replace(t, path=find_recorded(interval.run, t.path)) for t in args.distillation.teachers],
            cache=args.distillation.cache and find_recorded(interval.run, args.distillation.cache),
        ),
        save=replace(args.save, asynchronous=False, keep_last=0, on_error="stop"),
        stop=StopArgs(),
    )


def check_other_ranks(interval: Interval, args: RunArgs, ranks: int) -> None:
    """Raise ValueError for a run whose steps depend on the number of ranks."""
    if is_topology_invariant(interval.meta):
        return
    config = interval.meta["model_config"]
    for key, reason in (("dropout", "dropout"), ("attention_dropout", "dropout"), ("n_expert", "experts")):
        if config.get(key):
            raise ValueError(
                f"the steps were executed by {interval.ranks} ranks, and those of a model with {reason} depend on it: "
                f"they cannot be replayed by {ranks}"
            )


def sharding_for(args: RunArgs, ranks: int, here: int) -> Sharding:
    """The run's, or one that takes any number of ranks where theirs is another and the bits are the same."""
    hybrid = args.sharding_strategy == "HYBRID_SHARD"
    return "FULL_SHARD" if hybrid and here != ranks and args.train.topology_invariant else args.sharding_strategy


def is_topology_invariant(meta: dict[str, Any]) -> bool:
    """Whether the steps have the same bits on any number of ranks."""
    return bool(meta["config"]["train"].get("topology_invariant"))


def data_settings(interval: Interval, args: RunArgs) -> dict[str, Any]:
    """The settings that name the training data."""
    if args.data.mixture:
        pairs = zip(args.data.mixture, interval.datasets, strict=True)
        return {"mixture": [replace(entry, path=path) for entry, path in pairs]}
    return {"train": interval.datasets[0]}


def plan_dir(interval: Interval, args: RunArgs) -> Path | None:
    """The run's --data.plan_dir, if it is there."""
    found = None if args.data.plan_dir is None else find_recorded(interval.run, args.data.plan_dir)
    return found if found is not None and found.is_dir() else None


def lay_out(interval: Interval, args: RunArgs, work: Path) -> RunArgs:
    """Prepare a run folder at `args.out_dir`, for rank 0: the checkpoint by a link, and stand-ins for incomplete data.

    A stand-in is a folder of links in `work`. It has empty files of the right size for missing shards, which are never
    read, and room for a plan of rows that the dataset lacks.
    """
    assert args.out_dir is not None
    args.out_dir.mkdir(parents=True)
    if interval.start is not None:
        (args.out_dir / interval.start.name).symlink_to(interval.start.resolve())
    paths = []
    for number, dataset in enumerate(interval.open_datasets()):
        path, size = dataset.path, args.train.block_size or interval.meta["model_config"]["block_size"]
        packing = args.data.packing
        planned = packing == "concat" or plan_folder(dataset, packing, size, args.data.plan_dir).exists()
        paths.append(
            path if planned and not list(absent_files(dataset)) else stand_in(dataset, work / f"data-{number}")
        )
    if paths == interval.datasets:
        return args
    made = replace(interval, datasets=paths)
    return replace(args, data=replace(args.data, plan_dir=None, **data_settings(made, args)))


def absent_files(dataset: PackedDataset) -> Iterator[tuple[str, int]]:
    """Name and size of a dataset's files that are not in its folder."""
    for shard in dataset.manifest.shards:
        for kind, size in shard.sizes.items():
            if not (dataset.path / f"{shard.name}.{kind}").exists():
                yield f"{shard.name}.{kind}", size


def stand_in(dataset: PackedDataset, folder: Path) -> Path:
    """A folder of links to a dataset's files, with empty files in place of absent ones."""
    if not folder.exists():
        folder.mkdir(parents=True)
        for path in dataset.path.iterdir():
            if path.is_file():
                (folder / path.name).symlink_to(path.resolve())
        for name, size in absent_files(dataset):
            with open(folder / name, "wb") as file:
                file.truncate(size)
    return folder


def unavailable(interval: Interval) -> str:
    """The missing shards, for a message."""
    names = [
        str(dataset.path / f"{dataset.manifest.shards[shard].name}.bin")
        for dataset in interval.open_datasets()
        for shard in missing_shards(dataset)
    ]
    return f"{', '.join(names[:3])}{'' if len(names) <= 3 else f' and {len(names) - 3} more'}"
