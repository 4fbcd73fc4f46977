"""Arguments -> Fabric, data, model, optimizer, loader, state: everything a run needs, checked before long work."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from lit_data.loading.loader import Layout, Loader, bucket
from lit_data.loading.mixture import Mixture, phase_list
from lit_data.loading.order import Order, Segment, first_sample_of_step
from lit_data.loading.rows import Rows, count_windows, open_rows
from lit_data.loading.shard_cache import ShardCache
from lit_data.packed.dataset import PackedDataset
from lit_data.record.merge import Compactor
from lit_data.record.parts import DatapointRecorder
from lit_data.record.trace import describe_order, write_order
from lit_data.tokenizers.files import copy_tokenizer
from lit_files.checksum import file_sha256
from lit_files.lock import FileLock, lock_folder
from lit_files.publish import write_text
from lit_model.config import ModelConfig
from lit_model.init import initialise
from lit_model.load import (
    Checkpoint,
    checkpoint_step,
    list_checkpoints,
    resolve,
)
from lit_model.loss import LossOutput
from lit_model.model import GPT
from pretrain.args import DistillationArgs, RunArgs, TrainArgs, flat, plain
from pretrain.checkpoint.files import (
    STEP_COUNT,
    check_meta,
    find_checkpoint,
    load_state,
    remove,
    remove_if_possible,
    rewind,
    state_tensors,
)
from pretrain.checkpoint.saving import Saver
from pretrain.compiling import compile_blocks
from pretrain.distillation.teacher_cache import FILE as CACHE_FILE
from pretrain.distillation.teacher_cache import CachedTeacher, check_cache
from pretrain.distillation.teachers import Teachers, check_teachers, identify
from pretrain.encoding import check_bos, unlike_special_tokens, unlike_start
from pretrain.fabric import Fabric
from pretrain.failure.first_failure import begin_attempt
from pretrain.failure.rank_log import RankLog
from pretrain.failure.watchdog import Watchdog, control_store
from pretrain.guards import SpikeDetector, StopRequest
from pretrain.init_from import load_optimizer, load_weights, model_config, optimizer_of
from pretrain.launch import is_rank
from pretrain.logs.environment import command_line, record_environment
from pretrain.logs.messages import say, warn
from pretrain.logs.metrics import COLUMNS, DISTILLATION_COLUMNS, ROUTER_COLUMNS, newest_step
from pretrain.logs.metrics import FILE as METRICS
from pretrain.logs.trackers import Trackers, abandon, check_trackers
from pretrain.model_tokenizer import OVERRIDE, check_model_and_data, compare, of_data
from pretrain.optim import AdamW, LossScale
from pretrain.parallel import (
    DTYPES,
    build_fabric,
    check_shapes,
    device_kind,
    uses_fsdp,
)
from pretrain.ranks import Peers, on_rank_zero
from pretrain.synthetic import make_synthetic_data

# Settings that decide what a run means: a resume with another value is refused unless --resume_allow names it.
MEANING = (
    "seed",
    "model",
    "train",
    "optim",
    "data.packing",
    "data.document_mask",
    "data.phases",
    "data.shuffle_block_rows",
    "data.shuffle_group_blocks",
    "objective",
    "distillation",
)
# Parts of these that only decide how it is computed, or are known by their content.
MECHANICS = (
    "train.micro_batch_samples",
    "train.activation_checkpointing",
    "train.activation_checkpointing_every",
    "train.cpu_offload",
    "train.prefetch_blocks",
    "train.reduce_dtype",
    "train.defer_gradient_sync",
    "train.deterministic",
    "train.attention",
    "distillation.teachers",
    "distillation.cache",
    "distillation.teacher_device",
    "distillation.shard_teachers",
    "distillation.compile_teachers",
)

LOAD_BALANCE_LOSS = 0.001  # its weight where none is given: that of Llama 4 in transformers (router_aux_loss_coef)
MAX_SAMPLES = 1 << 60  # of a run: their numbers are 64-bit integers
MAX_MICRO_BATCH_TOKENS = 1 << 24  # of one device, far beyond what fits in its memory
STOPPED = "stopped.json"  # in the run folder: what a signal has ended


@dataclass
class Data:
    """The opened data and what follows from it. `rows` are those of each dataset of the mixture."""

    rows: list[Rows]
    val: Rows | None
    mixture: Mixture
    block_size: int
    max_steps: int
    end_sample: int | None

    @property
    def train(self) -> list[PackedDataset]:
        return [r.dataset for r in self.rows]

    def epochs(self, samples: int) -> list[float]:
        """How often the rows of each dataset were seen in the first `samples` samples, on average."""
        if self.end_sample is not None:
            samples = min(samples, self.end_sample)  # the last step is filled up with empty rows
        counts = self.mixture.counts(samples).tolist()
        return [count / r.n_windows for count, r in zip(counts, self.rows, strict=True)]


@dataclass
class Run:
    """One run in progress. `step` counts the optimizer steps done."""

    args: RunArgs
    fabric: Fabric
    folder: Path
    config: ModelConfig
    data: Data
    raw_model: GPT
    model: Any
    optimizer: AdamW
    loss_scale: LossScale | None
    loader: Loader
    val_loader: Loader | None
    segments: list[Segment]
    recorder: DatapointRecorder | None
    compactor: Compactor | None
    saver: Saver
    spikes: SpikeDetector
    lock: FileLock | None
    trackers: Trackers | None  # on rank 0
    taught_by: list[dict[str, Any]]  # name, sha256 and weight of each teacher
    teachers: Teachers | CachedTeacher | None = None
    peers: Peers = dataclasses.field(default_factory=Peers)
    stop: StopRequest = dataclasses.field(init=False)
    watchdog: Watchdog | None = None
    sound: bool = True  # the state is that after `step` steps: not between an update and the count of it
    step: int = 0
    finished: bool = False
    unfinished: dict[str, float] | None = None  # the row of metrics of `step`, whose validation a stop has cut short
    changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of settings, allowed when resuming
    skips: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # samples left out after a loss spike
    tokens: Tensor = dataclasses.field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # inputs seen
    skipped: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))
    skipped_in_row: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        self.stop = StopRequest(self.device, lambda: self.fault() is not None, self.args.stop.after_minutes)

    def fault(self) -> str | None:
        """What a thread of this rank has failed in, so that the run must end; None if nothing has."""
        if self.saver.failed:
            return "a checkpoint could not be written"
        if self.recorder is not None and self.recorder.failed:
            return "the datapoint record could not be written"
        return None

    def beat(self, phase: str) -> None:
        """Tell the watchdog that training gets on."""
        if self.watchdog is not None:
            self.watchdog.beat(self.step, phase)

    def release(self) -> None:
        """Let another job have the run folder."""
        if self.lock is not None:
            self.lock.close()

    def say(self, message: str) -> None:
        """A line on standard output, from rank 0."""
        if self.fabric.global_rank == 0:
            say(message)

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    @property
    def world_size(self) -> int:
        return self.fabric.world_size

    def tensors(self) -> dict[str, Tensor]:
        """The training state as a checkpoint holds it."""
        state = state_tensors(self.optimizer.parameters, self.optimizer.state)
        return state | {STEP_COUNT: self.optimizer.step_count}

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of one forward. FSDP casts by its own policy."""
        if self.args.precision == "fp32" or uses_fsdp(self.args):
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.args.precision])


def named_folder(args: RunArgs) -> Path | None:
    """The run folder as the command names it: --out_dir, or else the folder of a checkpoint that --resume names."""
    if args.out_dir is None and args.resume is not None:
        path = Path(args.resume)
        if path.exists() and checkpoint_step(path) is not None:
            return path.parent
    return args.out_dir


def open_folder(fabric: Fabric, args: RunArgs) -> tuple[Path, Path | None, FileLock | None, Trackers | None]:
    """The run folder, the checkpoint to resume (None: a fresh start), rank 0's lock, and of a new run its trackers."""
    lock: list[FileLock] = []
    trackers: list[Trackers] = []

    def work() -> tuple[Path, Path | None]:
        name = args.model.name or "run"
        folder = named_folder(args) or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        holds_run = (folder / "config.yaml").exists() or bool(list_checkpoints(folder))
        if args.resume is None and holds_run:
            raise ValueError(
                f"--out_dir {folder} holds a run already; resume it with --resume latest, or choose another folder"
            )
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out_dir {folder} is a file")
        checkpoint = find_checkpoint(args.resume, folder) if args.resume is not None else None
        if not holds_run:
            check_trackers(args.log, folder)
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        kept = {path.name for path in folder.iterdir()} if folder.exists() else set()
        try:
            lock.append(lock_folder(folder, "wait for it, or choose another --out_dir"))
        except OSError as error:
            raise ValueError(
                f"--out_dir {folder} cannot be used: {error.strerror or error} ({error.filename or folder})"
            ) from error
        if not holds_run and args.log.trackers:
            try:
                trackers.append(Trackers(folder, args.log, plain(args), 0, strict=True))
            except ValueError:
                lock[0].close()
                for path in folder.iterdir():
                    if path.name not in kept:
                        remove(path)
                for path in new:
                    path.rmdir()
                raise
        return folder, checkpoint

    folder, checkpoint = on_rank_zero(fabric, work)
    return folder, checkpoint, lock[0] if lock else None, trackers[0] if trackers else None


@dataclass
class Datasets:
    """Packed datasets that fit the model and each other."""

    train: list[PackedDataset]
    val: PackedDataset | None
    block_size: int
    notes: list[str] = dataclasses.field(default_factory=list)
    """What could not be checked."""


def open_datasets(args: RunArgs, checkpoint: Path | None = None) -> tuple[Datasets, ModelConfig]:
    """Open the datasets, and see that they fit the model and the run, which may resume a checkpoint."""
    if args.data.train is not None:
        train = [PackedDataset(args.data.train)]
    else:
        train = [PackedDataset(entry.path) for entry in args.data.mixture]
    named = [("--data.train" if args.data.train is not None else "--data.mixture", dataset) for dataset in train]
    val = PackedDataset(args.data.val) if args.data.val is not None else None
    if val is not None:
        named.append(("--data.val", val))
    config = model_config(args, train[0].vocab_size, checkpoint)
    router_losses(args.train, config)  # raises if they do not fit
    block_size = args.train.block_size or config.block_size
    check_memory(args, config, block_size)
    for flag, dataset in named:
        if dataset.vocab_size > config.vocab_size:
            raise ValueError(
                f"{flag} {dataset.path} was tokenized with {dataset.vocab_size} ids, but the model has a vocabulary of "
                f"{config.vocab_size}: leave --model.vocab_size out, or prepare the data with the model's tokenizer"
            )
        same = compare(of_data(train[0]), of_data(dataset)) == "same"
        if not same and not args.data.allow_tokenizer_mismatch:
            raise ValueError(
                f"{flag} {dataset.path} was made with another tokenizer than {named[0][0]} {train[0].path}: prepare "
                f"both with the same, or override with {OVERRIDE}"
            )
        if flag != "--data.val" and dataset.n_tokens < block_size:
            raise ValueError(
                f"{flag} {dataset.path} has {dataset.n_tokens} tokens, less than one row of {block_size}: use more "
                "text or a smaller --train.block_size"
            )
    check_bos(named)
    notes = []
    if args.init_from is not None and checkpoint is None and not args.data.allow_tokenizer_mismatch:
        unknown = check_model_and_data(args.init_from, train[0], f"--init_from {args.init_from}")
        unlike = unlike_start(args.init_from, train[0])
        notes += [note for note in (unknown, unlike) if note is not None]
    check_teachers(args, config, train[0], block_size)
    if args.distillation.cache is not None:
        facts = (train[0], args.data.packing, block_size, args.data.document_mask, config.vocab_size)
        check_cache(args.distillation, *facts)
    weights_of(args)
    if args.train.max_epochs is None or args.data.packing == "concat":  # else it takes a plan, and is seen later
        length_of(args, block_size, count_windows(train[0].n_tokens, block_size), first_segments(args))
    return Datasets(train, val, block_size, notes), config


def check_memory(args: RunArgs, config: ModelConfig, block_size: int) -> None:
    """Refuse sizes that no device has room for. Raises ValueError that names them."""
    for rows in (args.train.micro_batch_samples, args.eval.micro_batch_samples or 1):
        if rows * block_size > MAX_MICRO_BATCH_TOKENS:
            raise ValueError(
                f"a micro-batch of {rows} rows of {block_size} tokens is more than the {MAX_MICRO_BATCH_TOKENS} that "
                "are supported: give a smaller --train.micro_batch_samples, --eval.micro_batch_samples or "
                "--train.block_size"
            )
    if args.accelerator != "cuda" and device_kind(args) == "cpu":
        weights = 4 * config.least_parameters // args.num_nodes
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if weights > memory:
            raise ValueError(
                f"the model's weights alone take {weights / 1e9:,.0f} GB on a node, which has {memory / 1e9:,.0f} GB: "
                "give a smaller model (--model.name, --model.n_layer, --model.n_embd)"
            )


def router_losses(args: TrainArgs, config: ModelConfig) -> dict[str, float]:
    """The weights of the losses that steer routers, for GPT. Raises ValueError for one that has nothing to steer."""
    given = {"load_balance_loss": args.load_balance_loss, "router_z_loss": args.router_z_loss}
    for name, value in given.items():
        if value and not config.n_expert:
            raise ValueError(f"--train.{name} {value} is for a model with experts (--model.n_expert): leave it out")
    default = {"load_balance_loss": LOAD_BALANCE_LOSS if config.n_expert else 0.0, "router_z_loss": 0.0}
    return {name: default[name] if value is None else value for name, value in given.items()}


def first_segments(args: RunArgs) -> list[Segment]:
    """Of a run from its beginning."""
    return [Segment(0, 0, args.train.global_batch_samples)]


def length_of(args: RunArgs, block_size: int, n_windows: int, segments: list[Segment]) -> tuple[int, int | None]:
    """The run's steps, and the sample it ends before (None: the last step is full)."""
    t, last = args.train, segments[-1]
    end_sample = None
    if t.max_steps is not None:
        max_steps = t.max_steps
    elif t.max_tokens is not None:
        used = sum((b.from_step - a.from_step) * a.global_batch for a, b in pairwise(segments))
        rows = -(-t.max_tokens // block_size)
        max_steps = last.from_step + max(0, -(-(rows - used) // last.global_batch))
    else:
        assert t.max_epochs is not None
        end_sample = max(1, round(n_windows * t.max_epochs))
        max_steps = last.from_step + max(0, -(-(end_sample - last.first_sample) // last.global_batch))
    if max_steps * last.global_batch > MAX_SAMPLES:
        raise ValueError(
            f"the run would have {max_steps} steps of {last.global_batch} rows: at most 2^60 rows are supported; give "
            "a smaller --train.max_steps (or max_tokens, max_epochs)"
        )
    if args.optim.warmup_steps > max_steps + args.optim.steps_before:
        raise ValueError(f"--optim.warmup_steps {args.optim.warmup_steps} exceeds the run's {max_steps} steps")
    return max_steps, end_sample


def weights_of(args: RunArgs) -> list[tuple[int, list[float]]]:
    """(first step, weights) of each phase. Raises ValueError for weights that cannot be kept."""
    if args.data.train is not None:
        return [(0, [1.0])]
    weights = [(0, [entry.weight for entry in args.data.mixture])]
    weights += [(phase.from_step, phase.weights) for phase in args.data.phases]
    for step, some in weights:
        try:
            phase_list([(0, some)])
        except ValueError as error:
            flag = f"--data.phases from step {step}" if step else "--data.mixture"
            raise ValueError(f"{flag}: {error}") from error
    return weights


def open_data(args: RunArgs, fabric: Fabric, datasets: Datasets, segments: list[Segment]) -> Data:
    """The rows of the datasets, of which rank 0 makes the plans, their order, and the length of the run."""

    def rows_of(dataset: PackedDataset) -> Rows:
        return open_rows(dataset, args.data.packing, datasets.block_size, args.data.plan_dir)

    def make_plans() -> None:
        for dataset in [*datasets.train, *([datasets.val] if datasets.val is not None else [])]:
            rows_of(dataset)

    val = [datasets.val] if datasets.val is not None else []
    if (line := unlike_special_tokens([*datasets.train, *val])) is not None:
        fabric.print(f"warning: {line}")
    on_rank_zero(fabric, make_plans)
    rows = [rows_of(dataset) for dataset in datasets.train]
    n_rows = sum(r.n_windows for r in rows)
    if n_rows < args.train.global_batch_samples:
        fabric.print(
            f"warning: the data has {n_rows} rows of {datasets.block_size} tokens, fewer than the "
            f"{args.train.global_batch_samples} of a step (--train.global_batch_samples): rows come several times in it"
        )
    max_steps, end_sample = length_of(args, datasets.block_size, rows[0].n_windows, segments)
    block, group = args.data.shuffle_block_rows, args.data.shuffle_group_blocks
    orders = (Order(r.n_windows, args.seed, d, block_windows=block, group_blocks=group) for d, r in enumerate(rows))
    phases = phase_list([(first_sample_of_step(segments, step)[0], w) for step, w in weights_of(args)])
    return Data(
        rows,
        rows_of(datasets.val) if datasets.val is not None else None,
        Mixture(tuple(orders), phases, args.seed),
        datasets.block_size,
        max_steps,
        end_sample,
    )


def check_resume(
    args: RunArgs, meta: dict[str, Any], data: Data, config: ModelConfig, taught_by: list[dict[str, Any]], path: Path
) -> dict[str, tuple[Any, Any]]:
    """Refuse to go on with a run whose meaning would change, listing what differs. Returns what was allowed to."""
    # What older checkpoints lack had its default.
    later = {"optim.steps_before": 0, **flat({"objective": "cross_entropy", "distillation": plain(DistillationArgs())})}
    old, new = later | flat(meta["config"]), flat(plain(args))
    keys = [
        k
        for k in sorted(set(old) | set(new))
        if any(k == m or k.startswith(m + ".") for m in MEANING) and k not in MECHANICS
    ]
    differs = {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}
    flag = "data.train" if args.data.train is not None else "data.mixture"
    there, here = meta["data"]["train"], [dataset.fingerprint for dataset in data.train]
    if there != here:
        differs[flag] = ([f[:12] for f in there], [f[:12] for f in here])
    weights = [[entry["weight"] for entry in config["data"]["mixture"]] for config in (meta["config"], plain(args))]
    if weights[0] != weights[1] and flag not in differs:
        differs["data.mixture"] = (weights[0], weights[1])
    before = meta.get("teachers", [])
    if [(t["sha256"], t["weight"]) for t in before] != [(t["sha256"], t["weight"]) for t in taught_by]:
        differs["distillation.teachers"] = (show_teachers(before), show_teachers(taught_by))
    check_history(meta, data, path)
    if meta["model_config"] != config.to_dict():
        other = ModelConfig.from_dict(meta["model_config"]).to_dict()
        for k, v in config.to_dict().items():
            if other[k] != v:
                differs[f"model.{k}"] = (other[k], v)
    refused = {k: v for k, v in differs.items() if not any(k == a or k.startswith(a + ".") for a in args.resume_allow)}
    if refused:
        listing = "; ".join(f"{k}: {a!r} there, {b!r} here" for k, (a, b) in refused.items())
        raise ValueError(
            f"{path} is a checkpoint of another run: {listing}. Give the same settings, or allow a change by name with "
            f"--resume_allow={','.join(refused)}"
        )
    return differs


def show_teachers(taught_by: list[dict[str, Any]]) -> list[str]:
    return [f"{t['name']} ({t['sha256'][:12]}) x {t['weight']:g}" for t in taught_by]


def check_history(meta: dict[str, Any], data: Data, path: Path) -> None:
    """Refuse other weights for samples that were seen: the record would no longer be true."""
    step = int(meta["step"])
    seen, _ = first_sample_of_step([Segment(**s) for s in meta["segments"]], step)
    width = max(len(meta["data"]["phases"][0]["quotas"]), len(data.rows))

    def begun(phases: list[dict[str, Any]]) -> list[tuple[int, list[int]]]:
        """The phases before `seen`; a dataset that was not there yet had no row."""
        return [
            (p["first_sample"], [*p["quotas"], *[0] * (width - len(p["quotas"]))])
            for p in phases
            if p["first_sample"] < seen
        ]

    if begun(meta["data"]["phases"]) != begun([p.to_dict() for p in data.mixture.phases]):
        raise ValueError(
            f"{path}: --data.mixture and --data.phases give other weights than the {step} steps that are done had; "
            f"keep those, and let what is new begin by --data.phases from step {step} on (a new dataset has weight 0 "
            "before)"
        )


def set_up(args: RunArgs, argv: Sequence[str] | None = None, *, watched: bool = True) -> Run:
    """Build the run. Raises ValueError or OSError for a user's mistake: Mistake once there are several ranks, on all of
    them alike. Any other error of one of several ranks ends the process, and the others, unless they are not `watched`.

    `argv` is the command line to record; default: this process's.
    """
    devices = check_shapes(args)
    if args.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if device_kind(args) == "cuda" and args.precision != "fp32":
        torch.set_float32_matmul_precision("high")
    there = not args.data.synthetic.tokens and args.resume is None
    opened: tuple[Datasets, ModelConfig] | None = None
    if there and not is_rank():  # a mistake in what is there already is said before any process starts
        opened = open_datasets(args, None)
    if args.data.synthetic.tokens and args.resume is None:  # of its sizes before text is made
        config = model_config(args, args.data.synthetic.vocab_size)
        check_memory(args, config, args.train.block_size or config.block_size)
    fabric = build_fabric(args, devices)
    peers = Peers(watched)
    try:
        return build(args, fabric, devices, peers, opened, argv)
    except BaseException as error:
        peers.end_set_up(error)


def build(
    args: RunArgs,
    fabric: Fabric,
    devices: int,
    peers: Peers,
    opened: tuple[Datasets, ModelConfig] | None,
    argv: Sequence[str] | None,
) -> Run:
    """The run, once the ranks have met. `opened`: the data, where this process has opened it before that."""

    def open_once(checkpoint: Path | None) -> tuple[Datasets, ModelConfig]:
        return opened or open_datasets(args, checkpoint)

    if not args.data.synthetic.tokens and args.resume is None:
        opened = on_rank_zero(fabric, lambda: open_once(None))  # thousands of shards are looked at by one rank, for all
    folder, checkpoint_path, lock, trackers = open_folder(fabric, args)
    peers.folder = folder
    if args.data.synthetic.tokens:
        train, val = on_rank_zero(fabric, lambda: make_synthetic_data(args.data.synthetic, folder / "data", args.seed))
        args = dataclasses.replace(args)
        args.data = dataclasses.replace(
            args.data, train=train, val=val, synthetic=dataclasses.replace(args.data.synthetic, tokens=0)
        )
    datasets, config = opened or on_rank_zero(fabric, lambda: open_once(checkpoint_path))
    for note in datasets.notes:
        fabric.print(f"warning: {note}")
    args.out_dir, args.devices = folder, devices

    step, segments = 0, first_segments(args)
    meta: dict[str, Any] | None = None
    changes: list[dict[str, Any]] = []
    if checkpoint_path is not None:
        meta = Checkpoint(checkpoint_path).meta
        if "segments" not in meta:
            raise ValueError(f"{checkpoint_path} was imported: begin a run with --init_from instead of --resume")
        check_meta(meta, checkpoint_path)
        step = int(meta["step"])
        segments = [Segment(**s) for s in meta["segments"]]
        if segments[-1].global_batch != args.train.global_batch_samples:
            s = segments[-1]
            first = s.first_sample + (step - s.from_step) * s.global_batch
            segments.append(Segment(step, first, args.train.global_batch_samples))
    data = open_data(args, fabric, datasets, segments)
    args.optim = args.optim.resolved(data.max_steps)
    args.distillation, taught_by = on_rank_zero(fabric, lambda: settle_teachers(args.distillation))
    if checkpoint_path is not None and meta is not None:
        differences = check_resume(args, meta, data, config, taught_by, checkpoint_path)
        changes = [*meta.get("changes", []), *([{"step": step, "differences": differences}] if differences else [])]
        if step > data.max_steps:
            raise ValueError(f"{checkpoint_path} is {step} steps old, beyond the run's {data.max_steps} steps")

    with torch.device("meta"):
        raw = GPT(
            config,
            attention=args.train.attention,
            activation_checkpointing=args.train.activation_checkpointing,
            activation_checkpointing_every=args.train.activation_checkpointing_every,
            z_loss=args.train.z_loss,
            **router_losses(args.train, config),
        )
    if not uses_fsdp(args):
        raw.to_empty(device=fabric.device)
        initialise(raw, config, args.seed)
        if args.compile:
            compile_blocks(raw)
    model = fabric.setup_module(raw, move_to_device=False)
    if args.init_from is not None and checkpoint_path is None:
        load_weights(raw, args.init_from, args.init_layers)
    optimizer = AdamW(raw.named_parameters(), args.optim)
    if args.init_optimizer and checkpoint_path is None:
        load_optimizer(optimizer, optimizer_of(args))
    loss_scale = LossScale.create(fabric.device) if args.precision == "fp16" else None

    zero = torch.zeros((), device=fabric.device)
    saver = Saver(folder, args.save, fabric.device, timeout=timedelta(seconds=args.timeout_s))
    run = Run(
        args=args,
        fabric=fabric,
        folder=folder,
        config=config,
        data=data,
        raw_model=raw,
        model=model,
        optimizer=optimizer,
        loss_scale=loss_scale,
        loader=training_loader(args, fabric, data, segments),
        val_loader=validation_loader(args, fabric, data),
        segments=segments,
        recorder=None,
        compactor=None,
        saver=saver,
        spikes=SpikeDetector(args.guard),
        lock=lock,
        trackers=trackers,
        taught_by=taught_by,
        peers=peers,
        step=step,
        changes=changes,
        skipped=zero.clone(),
        skipped_in_row=zero.clone(),
        tokens=zero.double(),
    )
    if checkpoint_path is not None and meta is not None:
        run.finished = step == data.max_steps and checkpoint_step(list_checkpoints(folder)[-1]) == step
        run.finished &= meta.get("unfinished_row") is None
    if not run.finished:
        run.teachers = open_teachers(args, fabric.device)
        run.watchdog = peers.watchdog = open_watchdog(run)
    if not run.finished and run.world_size > 2 and not uses_fsdp(args):
        settle_buckets(run)
    if checkpoint_path is not None:
        restore(run, checkpoint_path)
    if not run.finished:
        begin_recording(run)
        assert run.watchdog is not None
        record_environment(run.folder, run.watchdog.log.attempt, run.step, command_line(argv), run.device)
    return run


def settle_teachers(args: DistillationArgs) -> tuple[DistillationArgs, list[dict[str, Any]]]:
    """The same with checkpoints in place of runs, which may be saving new ones; and what `identify` says of them.

    A cache, which says itself who made it, stands for its teachers.
    """
    if args.cache is not None:
        return args, [{"name": args.cache.name, "sha256": file_sha256(args.cache / CACHE_FILE), "weight": 1.0}]
    entries = [dataclasses.replace(entry, path=resolve(entry.path)) for entry in args.teachers]
    return dataclasses.replace(args, teachers=entries), identify(entries)


def open_teachers(args: RunArgs, device: torch.device) -> Teachers | CachedTeacher | None:
    """Whoever teaches, if anyone does."""
    if args.distillation.cache is not None:
        return CachedTeacher(args.distillation.cache, device)
    return Teachers(args.distillation, args.precision, device) if args.distillation.teachers else None


def open_watchdog(run: Run) -> Watchdog:
    """Each rank's log, and what ends a run that hangs."""
    fabric = run.fabric
    attempt = on_rank_zero(fabric, lambda: begin_attempt(run.folder))
    log = RankLog(run.folder, fabric.global_rank, fabric.world_size, attempt)
    # A rank that died over its log is missed here at once; a connection to its store would be tried for minutes.
    fabric.barrier()
    store, timeout_s = control_store(attempt), run.args.guard.hang_timeout_s
    return Watchdog(store, fabric.global_rank, fabric.world_size, log, timeout_s)


def settle_buckets(run: Run) -> None:
    """Have DDP lay out its buckets of gradients for good, by a backward that counts for nothing.

    After its first backward DDP lays them out anew, in the order in which gradients came. Where in a bucket a gradient
    lies decides in which order more than two ranks add it up: the first step after a resume would differ, by rounding,
    from the same step of a run that was never stopped.
    """
    B, T = run.args.train.micro_batch_samples, run.data.block_size
    tokens = torch.zeros((B, T), dtype=torch.int64, device=run.device)
    cu_seqlens = None
    if run.args.data.document_mask:  # in a shape that steps have too, for the sake of compiled blocks
        size = int(bucket(np.asarray([B]))[0])
        cu_seqlens = torch.arange(size, dtype=torch.int32, device=run.device).clamp_(max=B) * T
    run.model.train()
    with run.autocast():
        out: LossOutput = run.model(tokens, tokens, cu_seqlens=cu_seqlens)
    run.fabric.backward(out.loss_sum)
    run.optimizer.zero_grad()


def restore(run: Run, path: Path) -> None:
    """Load a checkpoint's tensors and counters. Raises ValueError, on every rank, if it is damaged or does not fit."""
    meta = load_state(path, run.tensors())
    run.step = int(meta["step"])
    run.skipped.fill_(meta["skipped"])
    run.skipped_in_row.fill_(meta.get("skipped_in_row", 0))
    run.tokens.fill_(meta["tokens"])
    run.unfinished = meta.get("unfinished_row")
    run.skips = list(meta.get("skips", []))
    run.spikes = SpikeDetector(run.args.guard, meta.get("spikes"))
    if run.loss_scale is not None and meta["loss_scale"] is not None:
        run.loss_scale.load(meta["loss_scale"])


def begin_recording(run: Run) -> None:
    """Bring the run folder to the state of `run.step`, and open the record there."""
    on_rank_zero(run.fabric, lambda: prepare_folder(run))
    if run.args.data.datapoints and not run.args.data.mock:
        micro_batch_samples = run.args.train.micro_batch_samples
        run.recorder = DatapointRecorder(
            run.folder / "datapoints", run.fabric.global_rank, run.world_size, micro_batch_samples, run.step
        )
        if run.fabric.global_rank == 0:
            run.compactor = Compactor(run.folder)
            run.saver.published = run.compactor.start


def go_back(run: Run, path: Path, reason: str) -> None:
    """Return to a checkpoint, and leave out the samples that were used since then. Every rank calls this."""
    end_sample, global_batch = first_sample_of_step(run.segments, run.step)
    skips = run.skips
    restore(run, path)
    first_sample, _ = first_sample_of_step(run.segments, run.step)
    skip = {"step": run.step, "first_sample": first_sample, "end_sample": end_sample, "reason": reason}
    run.skips = [*(s for s in skips if s["step"] <= run.step), skip]
    earlier = [s for s in run.segments if s.from_step < run.step]
    run.segments = [*earlier, Segment(run.step, end_sample, global_batch)]
    val = run.data.val.dataset if run.data.val is not None else None
    datasets = Datasets(run.data.train, val, run.data.block_size)
    run.data = open_data(run.args, run.fabric, datasets, run.segments)
    run.loader = training_loader(run.args, run.fabric, run.data, run.segments)
    begin_recording(run)


def training_loader(args: RunArgs, fabric: Fabric, data: Data, segments: list[Segment]) -> Loader:
    """Reads this rank's rows of each step."""
    micro_batch = args.train.micro_batch_samples
    return Loader(
        data.rows,
        data.mixture,
        Layout(data.block_size, micro_batch, fabric.global_rank, fabric.world_size, args.data.document_mask),
        segments,
        end_sample=data.end_sample,
        prefetch_steps=args.data.prefetch_steps,
        pin_memory=fabric.device.type == "cuda",
        caches=open_caches(args, data),
        mock=args.data.mock,
    )


def validation_loader(args: RunArgs, fabric: Fabric, data: Data) -> Loader | None:
    """Reads the validation split in its own order, dealt out to the ranks; the last rows may be without data."""
    if data.val is None:
        return None
    micro_batch = args.eval.micro_batch_samples or args.train.micro_batch_samples
    n_windows = data.val.n_windows
    return Loader(
        [data.val],
        Mixture.single(Order(n_windows, shuffle=False)),
        Layout(data.block_size, micro_batch, fabric.global_rank, fabric.world_size, args.data.document_mask),
        [Segment(0, 0, micro_batch * fabric.world_size)],
        end_sample=min(n_windows, args.eval.max_samples or n_windows),
        pin_memory=fabric.device.type == "cuda",
    )


def open_caches(args: RunArgs, data: Data) -> list[ShardCache] | None:
    """A cache before each dataset, in one folder with one budget; None without --data.cache_dir."""
    if args.data.cache_dir is None:
        return None
    budget, chunks = int(args.data.cache_gb * 1e9), []
    for dataset in data.train:
        # A block that spans several chunks is read without much of its neighbours.
        block_bytes = args.data.shuffle_block_rows * data.block_size * dataset.dtype.itemsize
        chunks.append(min(16 << 20, max(1 << 20, block_bytes // 4)) if block_bytes else 16 << 20)
    folder = args.data.cache_dir
    return [ShardCache(d, folder, budget, chunk_bytes=c) for d, c in zip(data.train, chunks, strict=True)]


def metrics_columns(run: Run) -> list[str]:
    """The columns of the run's metrics.csv. A mixture has an epoch for each dataset, by its number."""
    n_datasets = len(run.data.rows)
    epochs = () if n_datasets == 1 else [f"epoch_{d}" for d in range(n_datasets)]
    routers = ROUTER_COLUMNS if run.config.n_expert else ()
    distillation = DISTILLATION_COLUMNS if run.args.objective == "distillation" else ()
    return [*COLUMNS, *epochs, *routers, *distillation]


def prepare_folder(run: Run) -> None:
    """Rank 0: bring the run folder to the state of `run.step`, and write what describes the run."""
    goes_back = (newest_step(run.folder / METRICS) or 0) > run.step
    if goes_back:
        abandon(run.folder, run.args.log)
    rewind(run.folder, run.step, metrics_columns(run), again=run.unfinished is not None)
    if run.args.log.trackers and (run.trackers is None or goes_back):
        if run.trackers is not None:
            run.trackers.close()
        run.trackers = Trackers(run.folder, run.args.log, plain(run.args), run.step, strict=False)
    remove_if_possible(run.folder / STOPPED)
    text = yaml.safe_dump(plain(dataclasses.replace(run.args, resume=None)), sort_keys=False, allow_unicode=True)
    try:
        write_text(run.folder / "config.yaml", text)
    except OSError as error:  # a checkpoint holds it as well
        warn(f"{run.folder / 'config.yaml'} could not be written: {error}")
    if run.args.data.datapoints and not run.args.data.mock:
        facts = describe_order(
            run.data.rows,
            run.data.mixture,
            run.segments,
            document_mask=run.args.data.document_mask,
            end_sample=run.data.end_sample,
            plan_dir=run.args.data.plan_dir,
            skips=run.skips,
        )
        layout = (run.step, run.world_size, run.args.train.micro_batch_samples)
        write_order(run.folder / "datapoints", facts, layout)
    source = run.data.train[0].tokenizer_folder
    if source is not None and not (run.folder / "tokenizer").exists():
        try:
            copy_tokenizer(source, run.folder / "tokenizer")
        except (OSError, ValueError) as error:
            if run.step == 0:
                raise
            warn(f"the tokenizer could not be copied to {run.folder}: {error}")
