"""Items of a preflight that look at the run: its folder, trackers, data, and one step (see preflight.py beside it)."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from lit_data.packed.reader import PackedDataset
from lit_files.checksum import file_sha256
from lit_model.config import ModelConfig
from lit_model.load import Checkpoint
from lit_model.registry import get_config
from pretrain.args import RunArgs, plain
from pretrain.build import set_up
from pretrain.checkpoint.load import check_meta
from pretrain.data import Datasets, first_segments, length_of, open_data, open_datasets, training_loader
from pretrain.distillation.teacher_cache import resolve_teachers
from pretrain.free_memory import show_bytes
from pretrain.init_from import config_of, model_config
from pretrain.logs.throughput import Throughput, peak_memory_gib
from pretrain.logs.trackers import check_trackers
from pretrain.loop import train_step
from pretrain.memory_fit import candidates, training_setting
from pretrain.preflight.context import Finding, PreflightContext, faults, results
from pretrain.preflight.memory import memory_advice
from pretrain.preflight.outcomes import Ranks
from pretrain.resume import check_resume
from pretrain.run_folder import choose_folder
from pretrain.trial_args import STEPS, as_new_run, without_side_outputs

CHECKSUM_BYTES = 256 << 20  # of shards that one rank reads again
MANY_EPOCHS = 4.0  # up to here repeated data is nearly as good as new (Muennighoff et al. 2023)
LOADER_STEPS, LOADER_S = 20, 3.0  # at most

# A fresh model's loss above and below ln(vocabulary): logits of standard deviation s add about s^2 / 2.
LOSS_ABOVE, LOSS_BELOW = 1.5, 0.5


# --- run folder -------------------------------------------------------------------------------------------------------


def check_run_folder(s: PreflightContext) -> Finding:
    """Check whether the run would start, resume or be refused."""

    def look() -> tuple[Path | None, str]:
        folder, checkpoint, _ = choose_folder(s.args)
        if checkpoint is None:
            found = "" if s.args.resume is None else f" (--resume {s.args.resume} finds no checkpoint)"
            return None, f"{folder if s.args.out_dir is not None else 'runs/NAME-DATE-TIME'}: a new run{found}"
        opened = Checkpoint(checkpoint)
        kind = "sharded" if opened.sharded else "full"
        return (
            checkpoint,
            f"resumes {checkpoint}, step {opened.meta['step']}, {kind}, {len(opened.names())} tensors",
        )

    advice = "choose another --out_dir, resume with --resume latest, or name an older checkpoint"
    outcomes = s.together(lambda: look() if s.ranks.rank == 0 else None, advice)
    assert outcomes[0].result is not None
    s.checkpoint, measured = outcomes[0].result
    return Finding("ok", measured)


# --- trackers ---------------------------------------------------------------------------------------------------------


def check_tracker_setup(s: PreflightContext) -> Finding:
    """Check whether the trackers could start, as a run does before it makes its folder."""
    names = ", ".join(s.args.log.trackers)
    if not names:
        return Finding("ok", "metrics.csv alone (--log.trackers)")
    outcomes = s.ranks.together(lambda: check_trackers(s.args.log, s.folder) if s.ranks.rank == 0 else None)
    if fault := faults(outcomes):
        if s.checkpoint is not None:
            return Finding("warning", f"{fault}; a resumed run continues without it", "see the message")
        return Finding("failed", fault, "see the message, or leave the tracker out of --log.trackers")
    return Finding("ok", f"{names}: installed and configured; no connection was attempted")


# --- data -------------------------------------------------------------------------------------------------------------


def check_data(s: PreflightContext) -> Finding:
    """Open the datasets on every rank, compare them with the model, verify some checksums, time the loader."""
    args = s.args
    if args.data.synthetic.tokens:
        s.config = model_config(args, args.data.synthetic.vocab_size, s.checkpoint)
        return Finding("skipped", "the data is made when the run starts (--data.synthetic.tokens)")
    s.config = s.config or config_without_data(args)

    def look() -> tuple[int, int]:
        s.datasets, s.config = open_datasets(args, s.kind, s.checkpoint)
        return check_sample(s.datasets, s.ranks)

    outcomes = s.together(look, "see the message; the folder must be the same on all nodes")
    assert s.datasets is not None
    read = [sum(r[i] for r in results(outcomes)) for i in range(2)]
    tokens = sum(d.n_tokens for d in s.datasets.train)
    measured = f"{len(s.datasets.train)} dataset{'s' * (len(s.datasets.train) > 1)}, {tokens:,} tokens, "
    checked = f"checksums of {read[0]} files ({read[1] / 1e9:.2f} GB) match"
    if not s.launched or s.failed("network"):
        why = "network failed" if s.launched else s.not_launched
        with_steps = args.train.max_epochs is None
        s.max_steps = length_of(args, s.datasets.block_size, 0, first_segments(args))[0] if with_steps else None
        return Finding("ok", f"{measured}{checked}; loader not timed: {why}")

    loaded = s.watched(lambda: load_some(s), "see the message")
    assert s.data is not None
    rows, s.max_steps = sum(r.n_windows for r in s.data.rows), s.data.max_steps
    s.loader_tokens_per_s = min(results(loaded))
    slowest = min((o for o in loaded if o.result is not None), key=lambda o: o.result or 0.0)
    G = args.train.global_batch_samples
    epochs = max(s.data.epochs(s.data.end_sample or s.data.max_steps * G))
    measured += (
        f"{rows:,} rows of {s.data.block_size}, {s.data.max_steps:,} steps are {epochs:.2f} epochs; {checked}; "
        f"loader {s.loader_tokens_per_s:,.0f} tokens/s" + (f" on {slowest.who}" if s.ranks.world_size > 1 else "")
    )
    if rows < G:
        return Finding(
            "warning", f"{measured}; fewer rows than the {G} of a step", "lower --train.global_batch_samples"
        )
    if epochs > MANY_EPOCHS:
        measured = f"{measured}; rows are seen more than {MANY_EPOCHS:g} times"
        return Finding("warning", measured, "shorten the run (--train.max_steps, --train.max_tokens), or add data")
    if s.datasets.notes:
        return Finding("warning", "; ".join([measured, *s.datasets.notes]), "put the tokenizer beside the model")
    return Finding("ok", measured)


def config_without_data(args: RunArgs) -> ModelConfig | None:
    """The model's config from the flags alone, to estimate its memory if no data can be opened."""
    try:
        vocab_size = args.model.vocab_size or (get_config(args.model.name).vocab_size if args.model.name else None)
        return None if vocab_size is None else config_of(args.model, vocab_size, args.train.block_size)
    except ValueError:
        return None


def check_sample(datasets: Datasets, ranks: Ranks) -> tuple[int, int]:
    """Compare files of this rank's share of the shards with the manifest. Returns (files, bytes) read."""
    opened: list[PackedDataset] = [*datasets.train, *datasets.val.values()]
    files = [
        (dataset.path / f"{shard.name}.{kind}", shard.sizes[kind], sha256)
        for dataset in opened
        for shard in dataset.manifest.shards
        for kind, sha256 in shard.sha256.items()
    ]
    n_files = n_bytes = 0
    for path, size, sha256 in files[ranks.rank :: ranks.world_size]:
        if n_bytes + size > CHECKSUM_BYTES:
            continue
        if file_sha256(path) != sha256:
            raise ValueError(f"{path}: its content does not match the manifest's checksum; prepare the dataset again")
        n_files, n_bytes = n_files + 1, n_bytes + size
    return n_files, n_bytes


def load_some(s: PreflightContext) -> float:
    """Open the rows, see that a checkpoint fits, and read some steps: this rank's tokens a second."""
    assert s.ranks.fabric is not None and s.datasets is not None and s.config is not None
    segments = first_segments(s.args)
    s.data = open_data(s.args, s.ranks.fabric, s.datasets, segments)
    if s.checkpoint is not None:
        meta = Checkpoint(s.checkpoint).meta
        check_meta(meta, s.checkpoint)
        _, taught_by = resolve_teachers(s.args.distillation)
        check_resume(plain(s.args), meta, s.data, s.config, taught_by, s.checkpoint)
    args = without_side_outputs(s.args)
    if args.train.is_automatic:  # chosen later; the loader's speed hardly depends on it
        first = candidates(args, s.config.n_layer, s.data.block_size, s.ranks.world_size, s.kind or "cpu")[0]
        args = first.apply(args)
    loader = training_loader(args, s.ranks.fabric, s.data, segments)
    try:
        began, tokens = time.perf_counter(), 0
        for step in range(min(LOADER_STEPS, s.data.max_steps)):
            tokens += sum(batch.tokens.numel() for batch in loader.read_step(step).micro_batches)
            if time.perf_counter() - began > LOADER_S:
                break
        return tokens / (time.perf_counter() - began)
    finally:
        loader.close()


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass
class StepMeasure:
    """Measurements of the steps on one rank."""

    loss: float
    """Of the first, nats per target, all ranks."""
    last_loss: float
    skipped: int
    first_s: float
    last_s: float
    throughput: dict[str, float]
    peak: int
    """Bytes beyond those in use before the model was built."""


def check_one_step(s: PreflightContext) -> Finding:
    """Take optimizer steps with the run's model, optimizer, loader and shapes, in a temporary run folder."""
    if not s.launched:
        return Finding("skipped", s.not_launched)
    if s.failed("memory"):
        return Finding("skipped", "the estimate is larger than the memory: see memory")
    if (cause := next((n for n in ("devices", "network", "data") if s.failed(n)), None)) is not None:
        return Finding("skipped", f"{cause} failed")
    if s.scratch is None:  # out_dir is not writable
        advice = "make the temporary folder (TMPDIR) writable on that rank"
        made = s.together(lambda: tempfile.mkdtemp(prefix="preflight-") if s.ranks.rank == 0 else None, advice)
        s.scratch = Path(made[0].result or "")
    folder = s.scratch / "run"
    outcomes = s.ranks.watched(lambda: take_steps(s, folder), s.give_up)
    if fault := faults(outcomes):
        return Finding("failed", fault, step_advice(s, fault))
    return judge_steps(s, results(outcomes))


def take_steps(s: PreflightContext, folder: Path) -> StepMeasure:
    """Set the run up as `main` does, and train."""
    args = as_new_run(without_side_outputs(s.args), folder, s.checkpoint)
    if args.data.synthetic.tokens:
        small = replace(args.data.synthetic, tokens=min(args.data.synthetic.tokens, 200_000))
        args = replace(args, data=replace(args.data, synthetic=small))
    fabric = s.ranks.fabric
    assert fabric is not None
    before = begin_peak(fabric.device)
    run = set_up(args, watched=False)
    seconds, losses = [], []
    try:
        throughput = Throughput(run.config, run.data.block_size, run.device, run.world_size)
        for data in run.loader.steps(0, min(STEPS, run.data.max_steps)):
            began = time.perf_counter()
            throughput.read()
            result = train_step(run, data)
            run.step += 1
            total = result.loss_sum.clone()
            if run.world_size > 1:
                dist.all_reduce(total)
            losses.append(float(total / result.n_targets.clamp(min=1)))  # waits for the device
            throughput.add(args.train.global_batch_samples * run.data.block_size)
            seconds.append(time.perf_counter() - began)
        row = throughput.read()
        peak = peak_bytes(run.device) - before
        return StepMeasure(losses[0], losses[-1], int(run.skipped.item()), seconds[0], seconds[-1], row, peak)
    finally:
        run.close()


def begin_peak(device: torch.device) -> int:
    """Reset the peak memory. Returns the bytes that the estimate does not cover: on a CPU, those resident now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak becomes what is resident now
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on CUDA, else resident; since `begin_peak` where the system can tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8") if device.type != "cuda" else ""
    except OSError:
        status = ""
    resident = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(resident[0]) * 1024 if resident else int(peak_memory_gib(device) * 2**30)


def judge_steps(s: PreflightContext, measures: list[StepMeasure]) -> Finding:
    assert s.config is not None and s.ranks.fabric is not None
    slowest, expected = max(measures, key=lambda m: m.last_s), math.log(s.config.vocab_size)
    rate, mfu = slowest.throughput["tokens_per_s"], slowest.throughput.get("mfu")
    estimate = f", estimate {show_bytes(s.memory.total)}" if s.memory is not None else ""
    measured = (
        f"{slowest.last_s:.3f} s a step (the first {slowest.first_s:.1f}), {rate:,.0f} tokens/s"
        + (f", MFU {mfu:.1%}" if mfu is not None else "")
        + f", peak {show_bytes(max(m.peak for m in measures))}{estimate}, loss {slowest.loss:.3f}"
        + f" (ln of the vocabulary {expected:.3f})"
    )
    finite = math.isfinite(slowest.loss) and math.isfinite(slowest.last_loss)
    if not finite or (slowest.skipped and s.args.precision != "fp16"):
        measured = f"{measured}; then {slowest.last_loss:.3f}, {slowest.skipped} steps were not finite"
        return Finding(
            "failed", measured, "lower --optim.lr, lengthen --optim.warmup_steps, or look at --precision and the data"
        )
    fresh = s.args.init_from is None
    if slowest.loss > expected + LOSS_ABOVE or (fresh and slowest.loss < expected - LOSS_BELOW):
        return Finding(
            "warning",
            f"{measured}; it is far from the loss of a random model",
            "look at the initialisation and at the tokenizer",
        )
    loader = s.loader_tokens_per_s
    if loader is not None and loader < rate / s.ranks.world_size:
        measured = f"{measured}; the loader gives {loader:,.0f} tokens/s a rank, less than a training step consumes"
        return Finding("warning", measured, "use --data.cache_dir, or a faster file system")
    return Finding("ok", measured)


def step_advice(s: PreflightContext, fault: str) -> str:
    if "OutOfMemory" in fault or "allocate memory" in fault or "MemoryError" in fault:
        assert s.config is not None
        return "out of memory: " + memory_advice(
            s,
            s.config,
            training_setting(s.args, s.config, s.kind or "cuda", s.world_size),
            0.9 * (s.memory.total if s.memory else 0),
        )
    return "see the message; a run would fail in the same way"
