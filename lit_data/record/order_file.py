"""Reads and writes `RUN/datapoints/order.json`: everything that determines the order of a run's data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_data.loading.mixture import Mixture, Phase, check_phases
from lit_data.loading.order import Segment, check_segments
from lit_data.loading.rows import Packing, Rows
from lit_files.publish import write_json
from lit_files.reading import read_dataclass
from lit_files.run_files import ORDER


@dataclass(frozen=True)
class _Dataset:
    path: str
    fingerprint: str


@dataclass(frozen=True)
class _Shuffle:
    block_windows: int
    group_blocks: int


@dataclass(frozen=True)
class _Skip:
    step: int
    first_sample: int
    end_sample: int
    reason: str


@dataclass(frozen=True)
class OrderFacts:
    """Schema of order.json, see `describe_order` and `write_order`."""

    datasets: list[_Dataset]
    packing: Packing
    plan_dir: str | None
    seed: int
    shuffle: _Shuffle
    phases: list[Phase]
    block_size: int
    document_mask: bool
    end_sample: int | None
    segments: list[Segment]
    layouts: list[tuple[int, int, int]]
    skips: list[_Skip] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_segments(self.segments)
        check_phases(self.phases, len(self.datasets))
        if not self.datasets or self.block_size < 1:
            raise ValueError(f"it names {len(self.datasets)} datasets and rows of {self.block_size} tokens")
        if self.shuffle.block_windows < 0 or self.shuffle.group_blocks < 1:
            raise ValueError(f"shuffle is {asdict(self.shuffle)}")
        if any(step < 0 or world < 1 or rows < 1 for step, world, rows in self.layouts):
            raise ValueError(f"layouts is {self.layouts!r:.80}")


def describe_order(
    rows: Sequence[Rows],
    mixture: Mixture,
    segments: Sequence[Segment],
    *,
    document_mask: bool = True,
    end_sample: int | None = None,
    plan_dir: Path | None = None,
    skips: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Everything that determines the order of a run, as JSON.

    `skips` are samples skipped on purpose: {"step", "first_sample", "end_sample", "reason"}.
    """
    order = mixture.orders[0]
    return {
        "datasets": [{"path": os.path.abspath(r.dataset.path), "fingerprint": r.dataset.fingerprint} for r in rows],
        "packing": rows[0].packing,
        "plan_dir": os.path.abspath(plan_dir) if plan_dir is not None else None,
        "seed": mixture.seed,
        "shuffle": {"block_windows": order.block_windows, "group_blocks": order.group_blocks},
        "phases": [p.to_dict() for p in mixture.phases],
        "block_size": rows[0].block_size,
        "document_mask": document_mask,
        "end_sample": end_sample,
        "segments": [s.to_dict() for s in segments],
        "skips": list(skips),
    }


def write_order(folder: Path, facts: dict[str, Any], layout: tuple[int, int, int]) -> None:
    """Write the order facts of a run to RUN/datapoints/order.json, atomically.

    Args:
        facts: from `describe_order`.
        layout: (from_step, world_size, micro_batch_samples) from now on; earlier ones are kept.

    An unreadable file is kept as order.json.damaged; earlier layouts are lost, with a warning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ORDER
    try:
        earlier = read_dataclass(OrderFacts, path).layouts if os.path.lexists(path) else []
    except (OSError, ValueError) as error:
        aside = path.with_name(f"{ORDER}.damaged")
        os.rename(path, aside)
        warnings.warn(
            f"{error}; kept as {aside}, and the layouts of ranks before step {layout[0]} are lost", stacklevel=2
        )
        earlier = []
    layouts = [list(entry) for entry in earlier if entry[0] < layout[0]] + [list(layout)]
    write_json(path, {**facts, "layouts": layouts})
