"""Trackers are part of a run. TensorBoard is the real one, if installed; wandb is a stand-in that stores
its input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from running import flags, metrics

from pretrain.args import LogArgs
from pretrain.fabric_train import main
from pretrain.logs.trackers import Trackers, abandon

OLDER = "iter-00000004-ckpt.pth"


class FakeWandB(ModuleType):
    """Keeps the rows of each run by its id, as the server does: a step older than the newest is dropped."""

    def __init__(self, fault: Exception | None = None) -> None:
        super().__init__("wandb")
        self.rows: dict[str, list[dict[str, float]]] = {}
        self.inits: list[dict[str, Any]] = []
        self.init_fault, self.log_fault = fault, None

    def login(self, prompt: bool = True) -> bool:
        return True

    def init(self, **settings: Any) -> FakeRun:
        if self.init_fault is not None:
            (Path(settings["dir"]) / "wandb").mkdir(exist_ok=True)
            raise self.init_fault
        self.inits.append(settings)
        return FakeRun(self, self.rows.setdefault(settings["id"], []))

    def steps(self, id: str) -> list[float]:
        return [row["step"] for row in self.rows[id]]


class FakeRun:
    def __init__(self, server: FakeWandB, rows: list[dict[str, float]]) -> None:
        self.server, self.rows = server, rows

    def log(self, values: dict[str, float], step: int) -> None:
        if self.server.log_fault is not None:
            raise self.server.log_fault
        if not self.rows or step > self.rows[-1]["step"]:
            self.rows.append({"step": step, **values})

    def finish(self) -> None:
        pass


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def error_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return [line for line in captured.err.splitlines() if line.startswith(("error:", "warning:"))]


def test_going_back_at_wandb(data: Path, tmp_path: Path, wandb: FakeWandB) -> None:
    """--resume iter-...: what wandb shows is metrics.csv, no abandoned step and none missing."""
    run = tmp_path / "run"
    assert main(flags(data, run, train__max_steps=8, log__trackers="wandb")) == 0
    id = json.loads((run / "run_id.json").read_text())["id"]
    assert wandb.steps(id) == [*range(9)]
    changes = {"train__max_steps": 10, "resume": OLDER, "resume_allow": "train.max_steps"}
    assert main(flags(data, run, log__trackers="wandb", **changes)) == 0
    first, second = (settings["id"] for settings in wandb.inits)
    assert first == id != second
    assert wandb.steps(second) == list(range(11))
    for shown, row in zip(wandb.rows[second], metrics(run), strict=True):
        assert shown == {k: float(v) for k, v in row.items() if v}
    assert [settings["config"]["run_id"] for settings in wandb.inits] == [id, id]


def test_two_runs_of_one_name(tmp_path: Path, wandb: FakeWandB) -> None:
    """Two run folders called `run`, and a copy of one, are three runs at wandb; a moved folder stays one."""
    folders = [tmp_path / name / "run" for name in ("a", "b", "c")]
    for folder in folders[:2]:
        folder.mkdir(parents=True)
        Trackers(folder, LogArgs(trackers="wandb"), {}, 0, strict=True).close()
    shutil.copytree(folders[0], folders[2])
    Trackers(folders[2], LogArgs(trackers="wandb"), {}, 0, strict=True).close()
    ids = [settings["id"] for settings in wandb.inits]
    assert len(set(ids)) == 3 and "run" not in ids
    moved = folders[1].rename(tmp_path / "moved")
    Trackers(moved, LogArgs(trackers="wandb"), {}, 0, strict=True).close()
    assert wandb.inits[-1]["id"] == ids[1]


def test_folder_from_before_keeps_its_id(tmp_path: Path, wandb: FakeWandB) -> None:
    """A folder without run_id.json that wandb has written to keeps its name as its id until it goes back."""
    run = tmp_path / "old-run"
    (run / "wandb").mkdir(parents=True)
    (run / "metrics.csv").write_text("step,train_loss\n1,2.0\n2,1.5\n3,1.25\n")
    Trackers(run, LogArgs(trackers="wandb"), {}, 3, strict=False).log({"step": 4, "train_loss": 1.0})
    assert wandb.steps("old-run") == [4]  # the others exist already
    abandon(run, LogArgs())
    Trackers(run, LogArgs(trackers="wandb"), {}, 2, strict=False).log({"step": 3, "train_loss": 1.0})
    assert wandb.inits[1]["id"] != "old-run" and wandb.steps(wandb.inits[1]["id"]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("tracker", "says"),
    [
        ("wandb", "pip install llammlein[wandb]"),
        ("tensorboard", "pip install llammlein[tensorboard]"),
        ("tensorbord", "choose tensorboard or wandb"),
    ],
)
def test_tracker_that_is_not_installed(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tracker: str,
    says: str,
) -> None:
    """A tracker that is not installed or unknown: one error line, status 2, and no folder."""
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    run = tmp_path / "runs" / "run"
    try:
        status = main(flags(data, run, log__trackers=tracker))
    except SystemExit as left:
        status = int(left.code or 0)
    assert status == 2 and not run.parent.exists()
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"log__project": "a/b"}, "--log.project 'a/b'"),
        ({"log__project": "x" * 129}, "1 to 128 characters"),
        ({"log__run_name": " "}, "--log.run_name ' '"),
    ],
)
def test_names_that_wandb_refuses(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wandb: FakeWandB,
    changes: dict[str, object],
    says: str,
) -> None:
    """A project or run name that wandb refuses: one error line that names the flag, and no folder."""
    assert main(flags(data, tmp_path / "run", log__trackers="wandb", **changes)) == 2
    (line,) = error_lines(capsys)
    assert says in line and not (tmp_path / "run").exists() and not wandb.inits


def test_no_key(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wandb: FakeWandB, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key is configured: one error line and no prompt at the terminal; offline mode needs none."""
    monkeypatch.setattr(wandb, "login", lambda prompt: prompt)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert main(flags(data, tmp_path / "run", log__trackers="wandb")) == 2
    (line,) = error_lines(capsys)
    assert "wandb login" in line and not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(flags(data, tmp_path / "run", log__trackers="wandb", train__max_steps=2)) == 0


def test_tracker_that_cannot_start(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wandb: FakeWandB
) -> None:
    """No network: an error line and no folder for a new run; a resumed run warns and trains without the tracker."""
    wandb.init_fault = TimeoutError("no route\nto host")
    run = tmp_path / "run"
    assert main(flags(data, run, log__trackers="wandb")) == 2
    (line,) = error_lines(capsys)
    assert "TimeoutError: no route to host" in line and not run.exists()
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert main(flags(data, run, log__trackers="wandb")) == 2
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    assert main(flags(data, run, train__max_steps=4)) == 0
    error_lines(capsys)
    changes = {"train__max_steps": 8, "resume": "latest", "resume_allow": "train.max_steps"}
    assert main(flags(data, run, log__trackers="wandb", **changes)) == 0
    (line,) = error_lines(capsys)
    assert "no route" in line and "continues without it" in line
    assert [int(row["step"]) for row in metrics(run)] == list(range(9))


def test_tracker_that_fails_while_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wandb: FakeWandB
) -> None:
    """The tracker's process dies during training: one warning, and the run completes."""
    wandb.log_fault = BrokenPipeError("gone")  # type: ignore[assignment]
    assert main(flags(data, tmp_path / "run", log__trackers="wandb", train__max_steps=4)) == 0
    (line,) = error_lines(capsys)
    assert line.startswith("warning: wandb failed to log a row (BrokenPipeError: gone)")


@pytest.mark.parametrize(
    "given",
    ["tensorboard,wandb", "[tensorboard, wandb]", ["tensorboard", "wandb"], "tensorboard wandb", "[tensorboard,wandb]"],
)
def test_forms_of_the_trackers_flag(given: list[str] | str) -> None:
    """--log.trackers accepts a name, comma-separated names, and a list."""
    assert LogArgs(trackers=given).trackers == ["tensorboard", "wandb"]
    assert LogArgs(trackers="wandb").trackers == ["wandb"] and LogArgs(trackers="[]").trackers == []


def test_going_back_in_tensorboard(data: Path, tmp_path: Path) -> None:
    """--resume iter-...: TensorBoard shows every step of metrics.csv once; it began after the run did."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    longer = {"resume_allow": "train.max_steps"}
    assert main(flags(data, run, train__max_steps=4)) == 0
    assert main(flags(data, run, train__max_steps=8, resume="latest", log__trackers="tensorboard", **longer)) == 0
    assert main(flags(data, run, train__max_steps=10, resume=OLDER, log__trackers="tensorboard", **longer)) == 0
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = metrics(run)
    for name in ("train_loss", "val_loss", "grad_norm"):
        wanted = [(int(row["step"]), pytest.approx(float(row[name]))) for row in rows if row[name]]
        assert [(e.step, e.value) for e in events.Scalars(name)] == wanted


def test_preflight_checks_trackers(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wandb: FakeWandB
) -> None:
    """A preflight reports the tracker errors of a real start, but starts no tracker."""
    small = flags(data, tmp_path / "run", log__trackers="wandb", log__project="a/b", train__max_steps=2)
    assert main([*small, "--preflight"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed   trackers:")]
    assert "--log.project 'a/b'" in line and not wandb.inits and not (tmp_path / "run").exists()
