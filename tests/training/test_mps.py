"""What can be said about mps without an Apple GPU: it has no float64, and nothing on the device is converted to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import flags, train_in_process
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_model.device import best_kind, to_float64
from lit_model.generate import draw
from lit_model.sampling import Sampling
from pretrain.cli.run_parser import parse
from pretrain.parallel import choose_placement


class Conversions(TorchDispatchMode):
    """Collects the operations that make float64 of another floating dtype outside of `to_float64`."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed, self.found = 0, set[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = op(*args, **(kwargs or {}))
        made = any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(results))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if made and any(t.dtype != torch.float64 for t in inputs):
            frame, code = sys._getframe(1), to_float64.__code__
            where: Any = frame
            while where is not None and where.f_code is not code:
                where = where.f_back
            if where is None:
                ours = frame
                while ours.f_back is not None and "site-packages" in ours.f_code.co_filename:
                    ours = ours.f_back
                self.found.add(f"{op} in {ours.f_code.co_filename}:{ours.f_lineno}")
            else:
                self.allowed += 1
        return results


def test_float64_is_reached_by_one_function(data: Path, tmp_path: Path) -> None:
    with Conversions() as conversions:
        train_in_process(
            flags(
                data, tmp_path / "run", train__max_steps=2, eval__every_steps=2, save__every_steps=2, log__layers=True
            )
        )
        draw(torch.randn(2, 7), Sampling(temperature=1.0, top_p=0.9), torch.rand(2, 1, dtype=torch.float64))
    assert conversions.found == set()
    assert conversions.allowed > 10


def test_refusals(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(flags(data, tmp_path, accelerator="mps"))
    with pytest.raises(ValueError, match="--accelerator mps: torch finds no Apple GPU here"):
        choose_placement(args)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_placement(args).kind == best_kind() == "mps"
    with pytest.raises(ValueError, match="sums in float64, which mps lacks"):
        choose_placement(parse(flags(data, tmp_path, accelerator="mps", train__topology_invariant=True)))
