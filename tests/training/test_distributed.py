"""World sizes 1, 2 and 4 and all strategies train the same run: gradients, norms, losses, checkpoints.

test_strategy_matrix.py tests resuming each one's checkpoints in the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_configurations import CONFIGURATIONS, GLOBAL_BATCH, column, settings_of, shared_trainer
from running import flags

from lit_data.loading.rows import count_windows
from lit_data.packed.reader import PackedDataset
from pretrain.args import TrainArgs
from pretrain.parallel import check_batch

CLIP_NORM = 0.5
EVERY = [(24, "ddp2"), pytest.param(24, "full2", marks=pytest.mark.slow)]  # steps, configuration
EVERY += [pytest.param(300, n, marks=pytest.mark.slow) for n in CONFIGURATIONS if n != "single"]


class Runs:
    """A run of each length in each configuration, trained on first use."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder
        self.trainer = shared_trainer()
        self.gradients: dict[Path, dict[int, dict[str, Any]]] = {}

    def of(self, name: str, steps: int) -> Path:
        """The run's folder."""
        run = self.folder / f"{name}-{steps}"
        if run not in self.gradients:
            rows = count_windows(PackedDataset(self.data / "train").n_tokens, 32)
            changes: dict[str, object] = {
                "train__max_steps": None,
                # Ends three rows into the last step, so that its later micro-batches have no rows.
                "train__max_epochs": (GLOBAL_BATCH * (steps - 1) + 3) / rows,
                "train__clip_norm": CLIP_NORM,
                "optim__lr": 2e-3,
                "eval__every_steps": steps // 3,
                "save__every_steps": steps,
                "data__datapoints": "false",
            }
            arguments = flags(self.data, run, **changes, **settings_of(name))
            self.gradients[run] = self.trainer.run(name, arguments, gradient_steps=(0, steps - 1))
        return run


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(data, tmp_path_factory.mktemp("strategies"))


@pytest.mark.parametrize(("steps", "name"), EVERY)
def test_losses_norms_and_all_gradients_agree(runs: Runs, steps: int, name: str) -> None:
    """One test, so that no two processes of the suite train the same runs."""
    single, run = runs.of("single", steps), runs.of(name, steps)
    for measured, count in (("train_loss", steps), ("grad_norm", steps), ("val_loss", 4)):
        ours, theirs = column(single, measured), column(run, measured)
        assert len(ours) == count
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    assert (column(single, "grad_norm") > CLIP_NORM).sum() > steps // 3, (
        "too few steps clip: the test would prove nothing"
    )
    for step in (0, steps - 1):
        one, other = runs.gradients[single][step], runs.gradients[run][step]
        gradients_agree(name, one, other)
        if step == steps - 1:
            assert any(0 in c for c in other["counts"]), "there is no micro-batch without targets"


def gradients_agree(name: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    counts = other["counts"]
    assert len(counts) == CONFIGURATIONS[name].world_size and all(len(c) == 2 for c in counts), "accumulation 2"
    assert sum(map(sum, counts)) == sum(map(sum, one["counts"]))
    if len(counts) > 1:
        assert len({sum(c) for c in counts}) > 1, "all ranks have the same number of targets"
    torch.testing.assert_close(other["norm"], one["norm"], rtol=1e-5, atol=0)
    torch.testing.assert_close(other["norm"].double(), norm_of(other["gradients"].values()), rtol=1e-6, atol=0)
    assert set(other["gradients"]) == set(one["gradients"])
    for key, gradient in one["gradients"].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(other["gradients"][key], gradient, rtol=1e-5, atol=1e-5 * scale, msg=f"{name} {key}")


def norm_of(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The global 2-norm of full gradients, in float64."""
    return torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()


def test_clipping_counts_replicas_once_and_adds_shards(runs: Runs) -> None:
    """Gradients on several meshes at once, some with empty shards."""
    answer = runs.trainer.ask("clip", 4)
    norm = norm_of(answer["gradients"])
    torch.testing.assert_close(answer["norm"].double(), norm, rtol=1e-6, atol=0)
    for before, after in zip(answer["gradients"], answer["clipped"], strict=True):
        torch.testing.assert_close(after.double(), before.double() * 0.5 / norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "batch", "message"),
    [
        (4, 8, 100, "4 x 8 = 32; the nearest are 96 or 128; micro-batches that fit 100 are 5 or 25"),
        (8, 16, 24, "8 x 16 = 128; the nearest are 128; micro-batches that fit 24 are 3"),
        (
            3,
            2,
            8,
            "3 x 2 = 6; the nearest are 6 or 12; no micro-batch fits 8, which is not a multiple of the 3 devices",
        ),
    ],
)
def test_valid_batch_sizes_are_suggested(world_size: int, micro_batch: int, batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_batch(TrainArgs(max_steps=1, global_batch_samples=batch, micro_batch_samples=micro_batch), world_size)
    # Every suggested global batch and micro-batch is accepted.
    for number in map(int, re.findall(r"\d+", message.split("nearest are ")[1].split(";")[0])):
        check_batch(TrainArgs(max_steps=1, global_batch_samples=number, micro_batch_samples=micro_batch), world_size)
    for number in map(int, re.findall(r"\d+", message.partition("are ")[2].partition(f"fit {batch} are ")[2])):
        check_batch(TrainArgs(max_steps=1, global_batch_samples=batch, micro_batch_samples=number), world_size)


OPTIONS = {
    "full": {"train__activation_checkpointing": "full"},
    "block": {"train__activation_checkpointing": "block"},
    "op": {"train__activation_checkpointing": "op"},
    "offload": {"train__cpu_offload": "true"},
    "prefetch": {"train__prefetch_blocks": 2},
    "all": {"train__activation_checkpointing": "op", "train__cpu_offload": "true", "train__prefetch_blocks": 1},
}


CASES = [pytest.param("full2", o, marks=pytest.mark.slow) for o in OPTIONS]
CASES += [pytest.param("ddp2", o, marks=pytest.mark.slow) for o in ("op", "full")]


@pytest.mark.parametrize(("name", "option"), CASES)
def test_memory_options_change_no_bit(runs: Runs, tmp_path: Path, name: str, option: str) -> None:
    """Losses and gradient norms are bit-equal, with dropout."""
    base: dict[str, object] = {**settings_of(name), "model__dropout": 0.1, "model__n_layer": 4}
    base |= {"train__max_steps": 4, "eval__every_steps": 2}
    for run, changes in (("plain", {}), ("with", OPTIONS[option])):
        runs.trainer.run(name, flags(runs.data, tmp_path / run, **base, **changes))
    for measured in ("train_loss", "grad_norm", "val_loss"):
        assert torch.equal(column(tmp_path / "plain", measured), column(tmp_path / "with", measured)), measured


def test_z_loss_is_optimized_but_not_logged(runs: Runs, tmp_path: Path) -> None:
    answers, short = {}, {"train__max_steps": 3, "save__every_steps": 100}
    for name, configuration, z_loss in (("plain", "single", 0.0), ("z", "single", 0.1), ("z2", "full2", 0.1)):
        arguments = flags(runs.data, tmp_path / name, train__z_loss=z_loss, **short, **settings_of(configuration))
        answers[name] = runs.trainer.run(configuration, arguments, gradient_steps=(0,))[0]
    losses = {name: column(tmp_path / name, "train_loss") for name in answers}
    assert losses["plain"][0] == losses["z"][0] and losses["plain"][-1] != losses["z"][-1]
    assert answers["z"]["norm"] > 1.01 * answers["plain"]["norm"]
    torch.testing.assert_close(losses["z2"], losses["z"], rtol=1e-5, atol=0)
    for key, gradient in answers["z"]["gradients"].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(answers["z2"]["gradients"][key], gradient, rtol=1e-5, atol=1e-5 * scale, msg=key)


@pytest.mark.slow
def test_gradients_reduced_in_bf16_differ_by_rounding(runs: Runs, tmp_path: Path) -> None:
    answers = []
    for dtype in ("fp32", "bf16"):
        arguments = flags(runs.data, tmp_path / dtype, train__reduce_dtype=dtype, **settings_of("full2"))
        answers.append(runs.trainer.run("full2", arguments, gradient_steps=(0,))[0]["gradients"])
    for key, exact in answers[0].items():
        error = (answers[1][key] - exact).abs().max() / exact.abs().max()
        assert 0 < error < 4 * 2**-8, key  # two micro-batches on two ranks, each rounded to 8 bits, and their sum
