"""State shared by the items of a preflight, and their findings."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from lit_model.config import ModelConfig
from lit_model.cost import TrainingMemory
from pretrain.args import RunArgs
from pretrain.data import Data, Datasets
from pretrain.preflight.outcomes import Outcome, Ranks
from pretrain.run_folder import named_folder

T = TypeVar("T")
Verdict = Literal["ok", "warning", "failed", "skipped"]


@dataclass
class Finding:
    """The result of an item. `advice`: how to fix it, if it is not ok."""

    verdict: Verdict
    measured: str
    advice: str = ""


class ItemFailed(Exception):
    """Ends an item as failed, on all ranks alike. Its arguments: the measurement and the advice."""


@dataclass
class PreflightContext:
    """State shared by the items: earlier ones fill it in for later ones. None: unknown, a finding names the reason."""

    args: RunArgs
    ranks: Ranks
    kind: str | None = None
    """cpu, cuda or mps."""
    devices: int | None = None
    """Per node; None: the requested ones are not available, and no processes were started."""
    shape_fault: str = ""
    launch_fault: str = ""
    give_up: Callable[[list[Outcome[Any]]], None] = lambda _: None
    findings: dict[str, Finding] = field(default_factory=dict)
    checkpoint: Path | None = None
    datasets: Datasets | None = None
    data: Data | None = None
    config: ModelConfig | None = None
    max_steps: int | None = None
    loader_tokens_per_s: float | None = None
    """Of the slowest rank."""
    memory: TrainingMemory | None = None
    nccl_logs: Path | None = None
    """Folder of this process for NCCL's log."""
    scratch: Path | None = None
    """Folder of temporary files."""
    holding: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """On rank 0, of `scratch` in out_dir: if this preflight is killed, the next one removes it."""
    new_folders: list[Path] = field(default_factory=list)
    """Folders that did not exist before the preflight, innermost first."""

    @property
    def launched(self) -> bool:
        return self.ranks.fabric is not None

    @property
    def not_launched(self) -> str:
        """Why an item that needs the processes is skipped."""
        return "the processes were not started: see devices and environment"

    @property
    def world_size(self) -> int:
        """As requested, even if the devices are not available."""
        if self.launched:
            return self.ranks.world_size
        return (self.devices or (self.args.devices if isinstance(self.args.devices, int) else 1)) * self.args.num_nodes

    @property
    def folder(self) -> Path:
        """The run folder, or the folder in which a new one will be made."""
        return named_folder(self.args) or Path("runs")

    def failed(self, name: str) -> bool:
        return name in self.findings and self.findings[name].verdict == "failed"

    def together(self, work: Callable[[], T], advice: str) -> list[Outcome[T]]:
        """Do work on every rank that needs no other rank. Raises ItemFailed, with `advice`, if a rank fails."""
        return all_sound(self.ranks.together(work), advice)

    def watched(self, work: Callable[[], T], advice: str) -> list[Outcome[T]]:
        """As `together`, for work in which ranks wait for each other."""
        return all_sound(self.ranks.watched(work, self.give_up), advice)


def all_sound(outcomes: list[Outcome[T]], advice: str) -> list[Outcome[T]]:
    if fault := faults(outcomes):
        raise ItemFailed(fault, advice)
    return outcomes


def faults(outcomes: Sequence[Outcome[Any]]) -> str:
    """The errors of the ranks, by rank and host; an error that many ranks share is listed once. Empty: none failed."""
    ranks_of: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.fault is not None:
            ranks_of.setdefault(outcome.fault, []).append(outcome.who)
    return "; ".join(
        f"{', '.join(who[:3])}{f' and {len(who) - 3} more' if len(who) > 3 else ''}: {fault}"
        for fault, who in ranks_of.items()
    )


def results(outcomes: Sequence[Outcome[T]]) -> list[T]:
    """Of ranks none of which failed."""
    return [outcome.result for outcome in outcomes if outcome.fault is None]  # type: ignore[misc]


def odd_ones(outcomes: Sequence[Outcome[dict[str, Any]]], key: str) -> str:
    """Which ranks differ from most of them in one of their facts; empty if none does."""
    values = [facts[key] for facts in results(outcomes)]
    most = Counter(values).most_common(1)[0][0]
    odd = [f"{o.who} has {v}" for o, v in zip(outcomes, values, strict=True) if v != most]
    return f"{'; '.join(odd[:3])}{f' and {len(odd) - 3} more' if len(odd) > 3 else ''}, most have {most}" if odd else ""
