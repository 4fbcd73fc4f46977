"""A mixture of experts in the real training loop: the same on several ranks, balanced by its loss, resumed bit for
bit.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from parallel_configurations import column
from running import flags, metrics, train

from lit_model.config import ModelConfig
from lit_model.load import Checkpoint
from lit_model.moe import RouterStatistics, load_balance_loss
from pretrain.args import TrainArgs
from pretrain.data import router_losses
from pretrain.logs.metrics import ROUTER_COLUMNS, router_values
from pretrain.loop import add_routers

# A dense layer followed by one with experts.
EXPERTS: dict[str, object] = {
    "model__n_expert": 4,
    "model__n_expert_per_token": 2,
    "model__moe_intermediate_size": 16,
    "model__moe_layers": "[false,true]",
}


def run_of(data: Path, folder: Path, **changes: object) -> Path:
    train(*flags(data, folder, **EXPERTS, **changes))
    return folder


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single-process run without load balancing."""
    folder = tmp_path_factory.mktemp("experts") / "one"
    return run_of(data, folder, train__load_balance_loss=0, train__micro_batch_samples=4)


@pytest.mark.slow
def test_two_ranks_train_as_one_and_resume_bit_for_bit(data: Path, tmp_path: Path, one: Path) -> None:
    """Without the load-balancing loss, which is computed per micro-batch and so depends on the assignment of rows."""
    changes: dict[str, object] = {"train__load_balance_loss": 0, "devices": 2, "strategy": "fsdp"}
    two = run_of(data, tmp_path / "two", **changes)
    for measured in ("train_loss", "grad_norm", "val_loss"):
        torch.testing.assert_close(column(two, measured), column(one, measured), rtol=1e-5, atol=0)
    for name in ROUTER_COLUMNS:  # the same sums in the first step; later a tie may select another expert
        torch.testing.assert_close(column(two, name)[0], column(one, name)[0], rtol=1e-6, atol=0)
    assert column(one, "train_loss")[-1] < column(one, "train_loss")[0] - 0.3, "the loss did not fall"

    last = Checkpoint(two / "iter-00000012-ckpt.pth")
    before, rows = {name: last.tensor(name).clone() for name in last.names()}, metrics(two)
    run_of(data, two, resume="iter-00000004-ckpt.pth", **changes)
    again = Checkpoint(two / "iter-00000012-ckpt.pth")
    assert any("experts.gate_up" in name for name in before)
    assert all(torch.equal(again.tensor(name), tensor) for name, tensor in before.items())
    for name in ("train_loss", "val_loss", "grad_norm", *ROUTER_COLUMNS):
        assert [row[name] for row in metrics(two)] == [row[name] for row in rows], name


def test_the_losses_balance_the_experts(data: Path, tmp_path: Path, one: Path) -> None:
    weights = {"train__load_balance_loss": 0.3, "train__router_z_loss": 0.01, "train__micro_batch_samples": 4}
    balanced = run_of(data, tmp_path / "balanced", **weights)
    first = [metrics(run)[1] for run in (one, balanced)]
    assert all(first[0][name] == first[1][name] for name in ("train_loss", *ROUTER_COLUMNS))
    assert first[0]["grad_norm"] != first[1]["grad_norm"], "the first step's loss differs"
    without, with_them = ({name: column(run, name)[-4:].mean() for name in ROUTER_COLUMNS} for run in (one, balanced))
    assert 1 <= with_them["expert_load_max"] < without["expert_load_max"]
    assert 1 >= with_them["expert_load_min"] > without["expert_load_min"]
    assert with_them["load_balance_loss"] < without["load_balance_loss"]
    assert without["router_entropy"] < with_them["router_entropy"] <= 1


def test_a_dense_model_has_no_such_columns(data: Path, tmp_path: Path) -> None:
    train(*flags(data, tmp_path / "run", train__max_steps=1, optim__warmup_steps=0, data__val=None))
    assert not set(ROUTER_COLUMNS) & set(metrics(tmp_path / "run")[0])


def test_weights_of_the_losses() -> None:
    sizes = {"n_embd": 8, "n_head": 2}
    dense, experts = ModelConfig(**sizes), ModelConfig(n_expert=2, **sizes)

    def of(config: ModelConfig, **given: float) -> tuple[float, ...]:
        losses = router_losses(TrainArgs(max_steps=1, **given), config)
        return losses["load_balance_loss"], losses["router_z_loss"]

    assert of(dense) == of(dense, load_balance_loss=0.0) == (0, 0)
    assert of(experts) == (0.001, 0)
    assert of(experts, load_balance_loss=0.0, router_z_loss=0.5) == (0, 0.5)
    for name in ("load_balance_loss", "router_z_loss"):
        with pytest.raises(ValueError, match=f"--train.{name} 0.01 is for a model with experts"):
            of(dense, **{name: 0.01})
        with pytest.raises(ValueError, match=f"--train.{name} -1"):
            of(experts, **{name: -1.0})


def test_logged_values_of_a_step() -> None:
    """Two layers of three experts, in two micro-batches."""
    parts = [
        RouterStatistics(
            torch.tensor([[2.0, 3, 1], [6, 0, 0]]),
            torch.tensor([[1.0, 1, 1], [2.5, 0.25, 0.25]]),
            torch.zeros(2),
            torch.tensor([3.0, 3]),
        ),
        RouterStatistics(
            torch.tensor([[1.0, 2, 0], [2, 1, 0]]),
            torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.25, 0.25]]),
            torch.zeros(2),
            torch.tensor([1.5, 1.5]),
        ),
    ]
    total = add_routers(parts)
    assert total is not None and total.tokens.tolist() == [4.5, 4.5]
    load_max, load_min, entropy, balance = router_values(total).tolist()
    assert load_max == pytest.approx(8 / 3) and load_min == 0
    p = [3.5 / 4.5, 0.5 / 4.5, 0.5 / 4.5]
    assert entropy == pytest.approx((1 - sum(x * math.log(x) for x in p) / math.log(3)) / 2)
    assert balance == pytest.approx((1 + 3 * (8 / 9 * p[0] + 1 / 9 * p[1])) / 2)
    assert balance == pytest.approx(load_balance_loss(total).item())
    assert add_routers([]) is None
