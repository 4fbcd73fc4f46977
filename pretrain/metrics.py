"""What is written while training: metrics.csv always, trackers when asked, a progress bar on a terminal."""

from __future__ import annotations

import csv
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from lit_model.config import ModelConfig
from lit_model.cost import flops_per_token
from lit_model.moe import RouterStatistics, load_balance_loss
from pretrain.args import LogArgs

COLUMNS = (
    "step",  # optimizer steps done
    "tokens",  # input tokens seen, padding not counted
    "epoch",
    "train_loss",  # of this very step, nats per target
    "val_loss",
    "val_bits_per_byte",
    "lr",
    "grad_norm",  # before clipping
    "skipped",  # steps skipped so far because a gradient was not finite
    "loss_scale",
    "tokens_per_s",
    "mfu",
    "mfu_causal",  # with half the attention's work counted
    "memory_gib",  # peak: allocated on CUDA, resident on a CPU
    "seconds",  # since this process began training
)

# Only for models with experts; of all tokens of this very step that have a target.
ROUTER_COLUMNS = (
    "expert_load_max",  # tokens of the busiest expert of any layer, as a share of an even load
    "expert_load_min",  # of the least busy one
    "router_entropy",  # of the mean of the router's probabilities, as a share of ln(experts); mean over the layers
    "load_balance_loss",  # before its weight, 1 at an even load
)

# Only for --objective distillation; train_loss is the cross-entropy alone.
DISTILLATION_COLUMNS = (
    "alpha",  # the weight of the cross-entropy
    "divergence",  # from the teachers, nats a target (mse: squared logits); empty where alpha is 1
    "total_loss",  # what is minimised, of the mean target, without z-loss and the routers' losses
)

# Dense bf16 peak of one device in FLOP/s, by a part of its name (vendor data sheets).
PEAK_FLOPS = {
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.5e12,
    "GH200": 989.5e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
}


def cut_metrics(path: Path, step: int) -> None:
    """Drop the rows after `step` from metrics.csv, and a last row that a killed run left unfinished. Atomic.

    A run at step 0 begins with a row of its own, so that none is kept.
    """
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    header, rows = lines[0], lines[1:] if step > 0 else []
    rows = [line for line in rows if line.endswith("\n") and int(line.split(",", 1)[0]) <= step]
    temporary = path.with_name(".metrics.csv.tmp")
    with open(temporary, "w") as f:
        f.writelines([header, *rows])
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def add_columns(path: Path, columns: Sequence[str]) -> list[str]:
    """Give metrics.csv the columns it lacks, empty so far; returns all of them. Atomic."""
    lines = path.read_text(encoding="utf-8").splitlines()
    there = lines[0].split(",")
    more = [name for name in columns if name not in there]
    if more:
        temporary = path.with_name(".metrics.csv.tmp")
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(f"{lines[0]},{','.join(more)}\n")
            f.writelines(f"{line}{',' * len(more)}\n" for line in lines[1:])
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    return [*there, *more]


class MetricsWriter:
    """Rank 0's metrics.csv and trackers. Rows are appended and flushed one by one."""

    def __init__(self, run: Path, args: LogArgs, config: dict[str, Any], more: Sequence[str] = ()) -> None:
        path = run / "metrics.csv"
        columns = [*COLUMNS, *(name for name in more if name not in COLUMNS)]
        new = not path.exists()
        if not new:
            columns = add_columns(path, columns)
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 - closed by close
        self._csv = csv.DictWriter(self._file, columns, restval="")
        if new:
            self._csv.writeheader()
            self._file.flush()
        self._trackers: list[Any] = []
        name = args.run_name or run.resolve().name
        if "tensorboard" in args.trackers:
            self._trackers.append(_TensorBoard(run))
        if "wandb" in args.trackers:
            self._trackers.append(_WandB(run, args.project, name, config))

    def write(self, row: dict[str, float]) -> None:
        """`row` maps names of COLUMNS to numbers; what was not measured is left out."""
        self._csv.writerow({k: _number(v) for k, v in row.items()})
        self._file.flush()
        for tracker in self._trackers:
            tracker.log({k: v for k, v in row.items() if k != "step"}, int(row["step"]))

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))


class _TensorBoard:
    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "--log.trackers tensorboard: install it with `pip install llammlein[tensorboard]`"
            ) from error
        self._writer = SummaryWriter(str(run / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: Path, project: str, name: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("--log.trackers wandb: install it with `pip install llammlein[wandb]`") from error
        # WANDB_MODE=offline and the key come from the environment; the id keeps a resumed run one run.
        self._run = wandb.init(project=project, name=name, id=name, dir=str(run), config=config, resume="allow")

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def router_values(router: RouterStatistics) -> Tensor:
    """The values of ROUTER_COLUMNS, on the device, from sums over a step (of L layers and E experts)."""
    n_expert = router.assigned.shape[-1]
    load = n_expert * router.assigned / router.assigned.sum(-1, keepdim=True).clamp(min=1)  # (L, E)
    mean = router.probability / router.tokens.unsqueeze(-1).clamp(min=1)  # (L, E)
    entropy = torch.special.entr(mean).sum(-1).mean() / math.log(n_expert) if n_expert > 1 else load.new_ones(())
    return torch.stack([load.max(), load.min(), entropy, load_balance_loss(router)])


class Throughput:
    """Tokens per second and model FLOPs utilisation between two log steps."""

    def __init__(self, config: ModelConfig, block_size: int, device: torch.device, world_size: int) -> None:
        self.flops = flops_per_token(config, block_size)
        self.flops_causal = flops_per_token(config, block_size, causal=True)
        self.device, self.world_size = device, world_size
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
        self._tokens, self._start = 0, time.perf_counter()
        self.begin = self._start

    def add(self, tokens: int) -> None:
        """Count the slots of a step, over all ranks (padding included: the model computes it too)."""
        self._tokens += tokens

    def pause(self) -> float:
        """Begin an interval that is not training; give the returned value to `go_on`."""
        return time.perf_counter()

    def go_on(self, paused: float) -> None:
        self._start += time.perf_counter() - paused

    def read(self) -> dict[str, float]:
        """Values since the last read. The caller has just waited for the device."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._start, 1e-9)
        self._tokens, self._start = 0, now
        row = {"tokens_per_s": rate, "memory_gib": peak_memory_gib(self.device), "seconds": now - self.begin}
        if self.peak is not None:
            row["mfu"] = rate * self.flops / (self.peak * self.world_size)
            row["mfu_causal"] = rate * self.flops_causal / (self.peak * self.world_size)
        return row


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on CUDA, resident otherwise; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class ProgressBar:
    """A rich progress bar with the time left; nothing where standard error is no terminal."""

    def __init__(self, first_step: int, max_steps: int, show: bool) -> None:
        console = Console(stderr=True)
        self._progress: Progress | None = None
        if show and console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._progress.start()
            self._task = self._progress.add_task("train", total=max_steps, completed=first_step, note="")

    def advance(self) -> None:
        if self._progress is not None:
            self._progress.advance(self._task)

    def note(self, row: dict[str, float]) -> None:
        """Show the newest numbers beside the bar."""
        if self._progress is not None and "train_loss" in row:
            note = f"loss {row['train_loss']:.3f}  {row.get('tokens_per_s', 0):,.0f} tokens/s"
            self._progress.update(self._task, note=note)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
