"""Only a damaged checkpoint prevents a resume, and only an error in training itself stops training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, flags, metrics, same_checkpoints, train, write_dataset
from whole_record import read_record

from lit_data.record.parts import list_parts
from pretrain.args import SaveArgs
from pretrain.checkpoint import retention
from pretrain.checkpoint.commit import clear
from pretrain.checkpoint.retention import retain, rewind
from pretrain.failure.first_failure import begin_attempt, to_failure
from pretrain.failure.rank_log import RankLog


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "train", [60] * 60)
    write_dataset(folder / "val", [60] * 10, seed=1)
    return folder


QUICK: dict[str, object] = {"train__micro_batch_samples": 8}
LONGER = {**QUICK, "train__max_steps": 12, "optim__schedule": "constant", "resume_allow": "train.max_steps"}


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints at 4 and 8, and the final state of a run of 12 steps."""
    folder = tmp_path_factory.mktemp("done")
    train(*flags(data, folder / "run", **QUICK, train__max_steps=8, optim__schedule="constant"))
    shutil.copytree(folder / "run", folder / "whole")
    train(*flags(data, folder / "whole", **LONGER, resume="latest"))
    return folder


def full(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


def a_file(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.write_bytes(b"\x00\x01")


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "inside").write_text("x")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x00\xff{[")


SPOILED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "stopped.json is a folder": ("stopped.json", a_folder),
    "first_failure.json is a folder": ("logs/first_failure.json", a_folder),
    "first_failure.json is damaged": ("logs/first_failure.json", garbage),
    "logs is a file": ("logs", a_file),
    "a log on a full disk": ("logs/rank-00000.log", full),
    "config.yaml is damaged": ("config.yaml", garbage),
    "config.yaml is a folder": ("config.yaml", a_folder),
    "a leftover of a save": (".iter-00000012-ckpt.pth.tmp", a_folder),
    "a leftover of a deletion": (".deleting-iter-00000002-ckpt.pth", a_folder),
    "abandoned is a file": ("abandoned", a_file),
    "order.json is damaged": ("datapoints/order.json", garbage),
    "order.json is empty": ("datapoints/order.json", lambda path: path.write_bytes(b"")),
    "a leftover of the record": ("datapoints/.part-rank00000.tmp", garbage),
    "the tokenizer is a file": ("tokenizer", a_file),
}


def test_a_resume_ignores_other_damage(data: Path, done: Path, tmp_path: Path) -> None:
    """Everything in a run folder except its checkpoints and its record is damaged, in two ways: the run resumes
    and gives the same weights, metrics and record as one with an intact folder."""
    names = list(SPOILED)
    for some in (names[0::2], names[1::2]):
        run = tmp_path / str(names.index(some[0]))
        shutil.copytree(done / "run", run)
        for name in some:
            place, spoil = SPOILED[name]
            spoil(run / place)
        resumed = train(*flags(data, run, **LONGER, resume="latest"), check=False)
        assert resumed.returncode == 0, resumed.stdout
        assert "Traceback" not in resumed.stdout
        same_checkpoints(run / "iter-00000012-ckpt.pth", done / "whole" / "iter-00000012-ckpt.pth")
        assert read_record(run).equals(read_record(done / "whole"))
        assert [r["train_loss"] for r in metrics(run)] == [r["train_loss"] for r in metrics(done / "whole")]


def test_going_back_with_a_damaged_abandoned_folder(data: Path, done: Path, tmp_path: Path) -> None:
    """Going back to step 4 works if abandoned/ is a file, or if its numbers have a gap."""
    for name in ("file", "gap"):
        run = tmp_path / name
        shutil.copytree(done / "run", run)
        if name == "file":
            a_file(run / "abandoned")
        else:
            (run / "abandoned" / "001-from-00000004").mkdir(parents=True)
        train(*flags(data, run, **LONGER, resume="iter-00000004-ckpt.pth"))
        assert len(list(run.glob("abandoned/*/iter-00000008-ckpt.pth"))) == 1
        same_checkpoints(run / "iter-00000012-ckpt.pth", done / "whole" / "iter-00000012-ckpt.pth")


def test_a_damaged_record_beyond_the_checkpoint(done: Path, tmp_path: Path, capsys: Any) -> None:
    """A resume from a step within a damaged merged file of the record: the file is set aside, and a message names
    the steps that are lost."""
    run = tmp_path / "run"
    shutil.copytree(done / "run", run)
    whole, part = list_parts(run / "datapoints")
    assert (part.first_step, part.end_step) == (4, 8)
    part.path.write_bytes(part.path.read_bytes()[:100])
    rewind(run, 6)
    assert [p.name for p in (run / "datapoints").glob("*.damaged")] == [part.path.name + ".damaged"]
    assert list_parts(run / "datapoints") == [whole]
    assert "the record of steps 4 to 5 is damaged" in capsys.readouterr().err
    assert not (run / "iter-00000008-ckpt.pth").exists() and (run / "iter-00000004-ckpt.pth").exists()


def test_a_checkpoint_that_cannot_be_deleted(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A checkpoint that cannot be deleted (the file system reports it as busy) causes one warning; the others are
    deleted, and nothing is raised."""
    for step in (1, 2, 3, 4):
        (tmp_path / f"iter-{step:08d}-ckpt.pth").write_bytes(b"x")
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if "00000001" in str(source):
            raise OSError(16, "Device or resource busy", str(source))
        real(source, target)

    monkeypatch.setattr(retention.os, "rename", rename)
    undeletable: set[Path] = set()
    for _ in range(3):
        retain(tmp_path, SaveArgs(keep_last=1), undeletable)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter-00000001-ckpt.pth", "iter-00000004-ckpt.pth"]
    assert capsys.readouterr().err.count("could not be deleted: [Errno 16] Device or resource busy") == 1


def test_leftovers_that_cannot_be_deleted(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leftovers of killed saves and deletions that cannot be deleted prevent neither a resume nor the next save
    of the same name."""
    run = tmp_path / "run"
    shutil.copytree(done / "run", run)
    for name in (".iter-00000012-ckpt.pth.tmp", ".deleting-iter-00000002-ckpt.pth"):
        a_folder(run / name)

    def rmtree(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(retention.shutil, "rmtree", rmtree)
    rewind(run, 8)
    clear(run / ".iter-00000012-ckpt.pth.tmp")
    assert not (run / ".iter-00000012-ckpt.pth.tmp").exists()


def test_a_log_that_cannot_be_written(tmp_path: Path, capsys: Any) -> None:
    """A rank's log on a full disk, or in a folder that cannot be created, causes one line of warning."""
    full_run = tmp_path / "full"
    (full_run / "logs").mkdir(parents=True)
    full(full_run / "logs" / "rank-00000.log")
    (tmp_path / "file").mkdir()
    a_file(tmp_path / "file" / "logs")
    for run in (full_run, tmp_path / "file"):
        log = RankLog(run, 0, 1)
        for _ in range(3):
            log.event("something")
        log.close()
        errors = capsys.readouterr().err
        assert errors.count("warning: ") == 1 and "Traceback" not in errors
    assert begin_attempt(tmp_path / "file")
    assert to_failure('{"attempt": "a"', "a") is None and to_failure("[]", "a") is None
    assert to_failure(json.dumps({"attempt": "a"}), "a") is None


@pytest.mark.slow
def test_output_on_a_full_disk(data: Path, tmp_path: Path) -> None:
    """A run whose standard output and error are on a full disk trains to the end."""
    line = [sys.executable, str(ROOT / "pretrain" / "fabric_train.py"), *flags(data, tmp_path / "run")]
    with open("/dev/full", "w") as disk:
        ended = subprocess.run(line, stdout=disk, stderr=disk, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert ended.returncode == 0 and (tmp_path / "run" / "iter-00000012-ckpt.pth").exists()
