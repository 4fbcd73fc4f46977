"""Any configuration resumes any other's checkpoint: the same state, and the losses of a single process.

To print the table of all pairs in docs/parallelism.md, run `python -m pytest -m slow -s --timeout 5400` on this file.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from parallel_configurations import column, difference, settings_of, shared_trainer
from running import flags

from lit_model.load import Checkpoint

COLUMNS = ("train_loss", "grad_norm", "val_loss")
NAMES = ("single", "ddp2", "ddp4", "full2", "full4", "sgo2", "hybrid4")
KINDS = ("full", "sharded")


class Matrix:
    """Runs of some steps, resumed halfway by other configurations."""

    def __init__(self, data: Path, folder: Path, steps: int) -> None:
        self.data, self.folder, self.steps, self.saved = data, folder, steps, steps // 2
        self.trainer = shared_trainer()

    def arguments(self, name: str, run: Path, **changes: object) -> list[str]:
        settings = {"train__max_steps": self.steps, "save__every_steps": self.saved, "train__clip_norm": 0.5}
        return flags(self.data, run, **settings, **settings_of(name), **changes)

    def undisturbed(self, name: str, kind: str = "full") -> Path:
        """The folder of an uninterrupted run."""
        run = self.folder / f"{name}-{kind}"
        if not run.exists():
            self.trainer.run(name, self.arguments(name, run, save__state_dict_type=kind))
        return run

    def worst(self, kind: str, saves: str, loads: str) -> float:
        """The largest relative difference from one uninterrupted process, after a change of configuration halfway.

        The worker asserts that the loaded state equals the checkpoint's.
        """
        saved = self.undisturbed(saves, kind) / f"iter-{self.saved:08d}-ckpt.pth"
        assert saved.is_dir() == (kind == "sharded")
        run = self.folder / f"{kind}-{saves}-{loads}"
        run.mkdir()
        (shutil.copytree if saved.is_dir() else shutil.copy2)(saved, run / saved.name)
        self.trainer.run(loads, self.arguments(loads, run, resume=saved.name), loaded=saved)
        single = self.undisturbed("single")
        for name in COLUMNS[:2]:
            assert len(column(run, name, after=self.saved)) == self.steps - self.saved
        return max(difference(column(run, c, after=self.saved), column(single, c, after=self.saved)) for c in COLUMNS)


@pytest.fixture(scope="module")
def matrix(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(data, tmp_path_factory.mktemp("matrix"), steps=8)


@pytest.fixture(scope="module")
def long_matrix(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(data, tmp_path_factory.mktemp("long-matrix"), steps=16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair(long_matrix: Matrix, kind: str) -> None:
    worst = {(saves, loads): long_matrix.worst(kind, saves, loads) for saves in NAMES for loads in NAMES}
    print(f"\n| {kind}: saved by | {' | '.join(NAMES)} |\n|{'---|' * (len(NAMES) + 1)}")
    for saves in NAMES:
        print(f"| {saves} | {' | '.join(f'{worst[saves, loads]:.0e}' for loads in NAMES)} |")
    assert all(value < 1e-5 for value in worst.values()), worst


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_full_and_sharded_checkpoints_are_equal(matrix: Matrix, name: str) -> None:
    """Bit for bit; and the same as a single process's, up to the order of sums."""
    path = f"iter-{matrix.saved:08d}-ckpt.pth"
    full, sharded = (Checkpoint(matrix.undisturbed(name, kind) / path) for kind in KINDS)
    single = Checkpoint(matrix.undisturbed("single") / path)
    assert sorted(full.names()) == sorted(sharded.names()) == sorted(single.names())
    for key in full.names():
        assert torch.equal(full.tensor(key), sharded.tensor(key)), key
        scale = single.tensor(key).abs().max().item()
        torch.testing.assert_close(full.tensor(key), single.tensor(key), rtol=1e-4, atol=1e-4 * scale, msg=key)
