"""A plan as text for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from lit_eval.formats import duration
from lit_model.cost import TrainingMemory
from pretrain.free_memory import CUDA_RESERVE_BYTES
from pretrain.planning.advice import warnings
from pretrain.planning.devices import Range
from pretrain.planning.loss import COVERAGE, PredictedLoss
from pretrain.planning.plan import DISK_BYTES_PER_S, Plan, least_devices


def describe(plan: Plan, loss: PredictedLoss | None = None, runs: int = 0) -> Iterator[str]:
    """The lines of a plan. `loss`: predicted from so many runs."""
    args, config, device = plan.args, plan.config, plan.device
    active = f", {plan.active / 1e6:,.1f}M of them for each token" if plan.active != plan.parameters else ""
    shape = f"{config.n_layer} layers of width {config.n_embd}"
    yield f"model     {plan.parameters / 1e6:,.1f}M parameters{active}; {shape}"
    batch = f"{args.train.global_batch_samples} x {plan.block_size} tokens"
    epochs = f", {plan.epochs:.2f} passes over the data" if plan.epochs is not None else ""
    per_parameter = f"{plan.tokens / plan.active:,.1f} per parameter"
    yield f"run       {plan.steps:,} steps of {batch}: {plan.tokens:,} tokens ({per_parameter}){epochs}"
    yield f"compute   {plan.flops:.2e} FLOPs (attention in full)"
    yield f"devices   {plan.devices} x {device.name}, {args.precision}, {device.memory / 2**30:.0f} GiB each"
    yield ""
    yield from memory_table(plan)
    yield ""
    yield f"speed     {thousands(plan.speed)} tokens/s"
    yield f"time      {durations(plan.seconds)}"
    if device.kind == "cuda":
        hours = plan.seconds.times(*[plan.devices / 3600] * 3)
        yield f"cost      {thousands(hours)} GPU hours"
        if device.watts is not None:
            kwh = hours.times(*[device.watts / 1000] * 3)
            yield f"energy    at most {thousands(kwh)} kWh at {device.watts:.0f} W a GPU, without hosts and cooling"
    save_s = plan.checkpoint / DISK_BYTES_PER_S
    yield f"saving    {size(plan.checkpoint)} a checkpoint, {save_s:.1f} s at 1 GB/s (--preflight measures the disk)"
    kept, data, record = map(size, plan.disk)
    yield f"disk      {kept} for checkpoints, {data} for packed data, {record} for the record"
    if loss is not None:
        interval = f"{loss.low:.3f} to {loss.high:.3f} at {COVERAGE:.0%}"
        yield f"loss      {loss.median:.3f} nats a token ({interval}), predicted from {runs} runs"
    if not any(s.fits for s in plan.strategies):
        yield from changes(plan)
    for warning in warnings(plan):
        yield f"warning: {warning}"


def memory_table(plan: Plan) -> Iterator[str]:
    """A line for each strategy, in GiB, or MiB for a small model."""
    unit, name = (2**30, "GiB") if max(s.memory.total for s in plan.strategies) >= 2**30 else (2**20, "MiB")
    title = f"memory of one device, {name}"
    yield f"{title:34}{'rows':>5}{'state':>8}{'activ.':>8}{'other':>8}{'total':>8}   largest micro-batch"
    for s in plan.strategies:
        numbers = "".join(f"{n / unit:8.2f}" for n in (*parts(s.memory), s.memory.total))
        verdict = f"{s.largest} rows" if s.largest else "none"
        yield f"  {s.name:32}{s.rows:5}{numbers}   {verdict}{'' if s.fits else ', does not fit as given'}"
    if plan.device.kind == "cuda":
        yield f"  not counted: about {CUDA_RESERVE_BYTES / 2**30:.1f} GiB for CUDA and its libraries"
    else:
        yield "  not counted: the process with its imports, freed memory that the allocator keeps (docs/planning.md)"


def parts(memory: TrainingMemory) -> tuple[int, int, int]:
    """(state, activations, everything else); parts that are not alive at once are not in the rest."""
    state = memory.parameters + memory.gradients + memory.optimizer
    return state, memory.activations, max(0, memory.total - state - memory.activations)


def changes(plan: Plan) -> Iterator[str]:
    """What to change where nothing fits as configured."""
    fitting = [s for s in plan.strategies if s.largest]
    if fitting:
        for s in fitting:
            yield f"fits with: --train.micro_batch_samples {s.largest} {s.flags}".rstrip()
    elif (n := least_devices(plan)) is not None:
        yield f"fits on {n} of these devices, one row each, with --strategy fsdp --train.activation_checkpointing full"
    else:
        yield "nothing fits: use devices with more memory, a shorter --train.block_size, or a smaller model"


def size(n: float) -> str:
    unit, name = next((pair for pair in ((1e12, "TB"), (1e9, "GB")) if n >= pair[0]), (1e6, "MB"))
    return f"{n / unit:,.1f} {name}"


def thousands(speed: Range) -> str:
    return f"{speed.likely:,.0f} ({speed.low:,.0f} to {speed.high:,.0f})"


def durations(seconds: Range) -> str:
    return f"{duration(seconds.likely)} ({duration(seconds.low)} to {duration(seconds.high)})"
