"""Resuming a checkpoint outside --out_dir, and the epoch count at the end of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from running import flags, metrics, train, write_dataset

from lit_files.checkpoint_name import list_checkpoints
from lit_model.load import Checkpoint
from pretrain.checkpoint.load import find_checkpoint

NAME = "iter-00000004-ckpt.pth"
EIGHT: dict[str, object] = {"train__max_steps": 8, "train__micro_batch_samples": 8}


def test_epoch_counts_real_rows(tmp_path: Path) -> None:
    """3 passes over 5 rows in steps of 16 rows are 3 epochs, though the step is filled up with empty rows."""
    write_dataset(tmp_path / "data" / "train", [80, 79])
    run = tmp_path / "run"
    changes = {"train__max_steps": None, "train__max_epochs": 3, "train__global_batch_samples": 16}
    train(*flags(tmp_path / "data", run, data__val=None, optim__warmup_steps=0, **changes))
    assert metrics(run)[-1]["epoch"] == "3.0"


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("first") / "first"
    train(*flags(data, run, **EIGHT))
    return run


def test_checkpoint_of_another_run(data: Path, first: Path, tmp_path: Path) -> None:
    """--resume with a checkpoint outside --out_dir is refused, and nothing is created."""
    other = tmp_path / "other"
    done = train(*flags(data, other, resume=first / NAME), check=False)
    assert done.returncode == 2 and not other.exists()
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert f"--out_dir {first}" in line and f"--init_from {first / NAME}" in line


def test_path_to_a_checkpoint_of_the_run(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths to a checkpoint of the run: absolute, relative, through links, and a copy of it elsewhere."""
    link = tmp_path / "link"
    link.symlink_to(first)
    archive = tmp_path / "archive"
    archive.mkdir()
    shutil.copy(first / NAME, archive / NAME)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / NAME).symlink_to(archive / NAME)
    monkeypatch.chdir(first.parent)
    for resume, run in [
        (str(first / NAME), first),
        (f"{first.name}/{NAME}", Path(first.name)),
        (f"../{first.parent.name}/{first.name}/{NAME}", first),
        (str(first / NAME), link),
        (str(link / NAME), first),
        (NAME, link),
        (str(archive / NAME), linked),
        (str(archive / NAME), first),
        (f"{first.name}/../{first.name}/{NAME}", link),
    ]:
        found = find_checkpoint(resume, run)
        assert found is not None and (found.parent.samefile(run) or found.parent == archive), (resume, run)
        assert Checkpoint(found).meta["step"] == 4


def test_paths_outside_the_run(first: Path, tmp_path: Path) -> None:
    """A checkpoint that the run lacks, an abandoned one, a run folder, a missing path: refused, with the remedy."""
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    (copy / "iter-00000008-ckpt.pth").unlink()
    with pytest.raises(ValueError, match=f"--out_dir {first} to resume that run"):
        find_checkpoint(str(first / "iter-00000008-ckpt.pth"), copy)
    with pytest.raises(FileNotFoundError, match=f"--out_dir {copy} --resume latest"):
        find_checkpoint(str(copy), first)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        find_checkpoint(str(tmp_path / NAME), copy)
    abandoned = copy / "abandoned" / "000-from-00000002" / NAME
    abandoned.parent.mkdir(parents=True)
    (copy / NAME).rename(abandoned)
    with pytest.raises(ValueError, match="was abandoned .* --init_from"):
        find_checkpoint(str(abandoned), copy)


def test_path_without_out_dir(data: Path, tmp_path: Path, first: Path) -> None:
    """--resume PATH alone resumes the run that contains the checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(first, run)
    arguments = [flag for flag in flags(data, run, **EIGHT) if not flag.startswith("--out_dir")]
    train(*arguments, f"--resume={run / NAME}")
    assert [p.name for p in list_checkpoints(run)] == [NAME, "iter-00000008-ckpt.pth"]
    assert len(list((run / "abandoned").glob("*/iter-*"))) == 1
