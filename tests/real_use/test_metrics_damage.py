"""No damage to metrics.csv prevents a resume, and no disk error on it stops training."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from running import PYTHON_PATH, flags, metrics, train, warm_python

from lit_files.checkpoint_name import list_checkpoints
from pretrain.logs.metrics import MetricsFile, cut_metrics


def cut_off_tail(whole: bytes) -> bytes:
    return whole[:-25]


def zero_tail(whole: bytes) -> bytes:
    *_, before, last = whole.splitlines()
    size = len(last) + len(before) // 2  # rows differ in length: the last one, and part of the one before
    return whole[:-size] + b"\0" * size


def without_header(whole: bytes) -> bytes:
    return whole.split(b"\n", 1)[1]


def torn_in_the_middle(whole: bytes) -> bytes:
    lines = whole.splitlines(keepends=True)
    return b"".join([*lines[:4], lines[4][:20], *lines[5:]])


def other_text(whole: bytes) -> bytes:
    return b"<html>504 Gateway Time-out</html>\n"


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], set[int], str | None]] = {
    # the file's content, the steps whose rows must survive a resume at step 8, and the expected message
    "a torn last row": (cut_off_tail, set(range(8)), None),
    "empty": (lambda _: b"", set(), "it is empty"),
    "zeros at its end": (zero_tail, set(range(7)), "zero bytes"),
    "zeros only": (lambda whole: b"\0" * len(whole), set(), "it has no header"),
    "no header": (without_header, set(range(9)), "it has no header"),
    "half a header": (lambda whole: whole[:7], set(), "it has no header"),
    "bytes at random": (lambda _: bytes(range(256)) * 9, set(), "it has no header"),
    "a torn row in the middle": (torn_in_the_middle, {0, 1, 2, 5, 6, 7, 8}, "1 of its"),
    "another file's text": (other_text, set(), "it has no header"),
}


QUICK: dict[str, object] = {"train__micro_batch_samples": 8}


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    train(*flags(data, run, **QUICK, train__max_steps=8))
    return run


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_metrics_csv(stopped: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """metrics.csv is damaged (empty, truncated, zeros ...): complete rows are kept, and one message reports it."""
    damage, survivors, says = DAMAGES[name]
    path = tmp_path / "metrics.csv"
    shutil.copy(stopped / "metrics.csv", path)
    whole = {row["step"]: row for row in metrics(tmp_path)}
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    cut_metrics(path, 8)
    rows = metrics(tmp_path)
    assert {int(row["step"]) for row in rows} == survivors
    assert all(row == whole[row["step"]] for row in rows)
    told, kept = capfd.readouterr().err, [other.read_bytes() for other in tmp_path.glob("metrics.csv.damaged-*")]
    if says is None:
        assert not told and not kept
    else:
        assert told.startswith("warning: ") and says in told and told.count("\n") == 1
        assert kept == ([damaged] if damaged else [])
    cut_metrics(path, 8)
    assert metrics(tmp_path) == rows and not capfd.readouterr().err


def test_resume_with_zeros_at_the_end_of_metrics_csv(data: Path, stopped: Path, tmp_path: Path) -> None:
    """A power failure left zeros in metrics.csv; the run resumes, and its rows follow the complete ones."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    path = run / "metrics.csv"
    path.write_bytes(zero_tail(path.read_bytes()))
    done = train(*flags(data, run, **QUICK, resume="latest", train__max_steps=10, resume_allow="train.max_steps"))
    assert [int(row["step"]) for row in metrics(run)] == [*range(7), 9, 10]
    assert done.stdout.count("metrics.csv:") == 1 and "kept as metrics.csv.damaged-1" in done.stdout


def test_resume_where_metrics_csv_is_a_folder(data: Path, stopped: Path, tmp_path: Path) -> None:
    """metrics.csv is not even a file."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    (run / "metrics.csv").unlink()
    (run / "metrics.csv").mkdir()
    done = train(*flags(data, run, **QUICK, resume="iter-00000004-ckpt.pth", train__max_steps=8))
    assert "it is not a file; kept as metrics.csv.damaged-1" in done.stdout
    assert [int(row["step"]) for row in metrics(run)] == [5, 6, 7, 8]


def test_rows_continue_after_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk is full for some rows (one is written partially), then has space: no row is lost or damaged."""
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, ["step", "train_loss"])
    file.write({"step": 1, "train_loss": 1.5})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, hard))
        for step in (2, 3, 4):
            file.write({"step": step, "train_loss": 1.25})
            assert path.read_text().splitlines() == ["step,train_loss", "1,1.5"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    file.write({"step": 5, "train_loss": 1.0})
    file.close()
    assert path.read_text().splitlines() == ["step,train_loss", "1,1.5", "2,1.25", "3,1.25", "4,1.25", "5,1.0"]
    told = capsys.readouterr()
    assert told.err.startswith("warning: ") and told.err.count("\n") == 1
    assert told.out == f"{path} is written again\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_metrics_csv(tmp_path: Path) -> None:
    """metrics.csv belongs to another user; training continues without it."""
    path = tmp_path / "metrics.csv"
    path.write_text("step,train_loss\n")
    path.chmod(0o400)
    file = MetricsFile(path, ["step", "train_loss"])
    file.write({"step": 1, "train_loss": 1.5})
    path.chmod(0o600)
    file.write({"step": 2, "train_loss": 1.25})
    file.close()
    assert path.read_text().splitlines() == ["step,train_loss", "1,1.5", "2,1.25"]


def test_training_with_an_unwritable_log(data: Path, tmp_path: Path) -> None:
    """Nothing can be written to the log (here /dev/full), not even warnings; the run trains and saves."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    run = tmp_path / "run"
    script = (
        "import sys; from pretrain.fabric_train import main; full = open('/dev/full', 'w'); "
        "sys.stdout = sys.stderr = full; import os; status = main(sys.argv[1:]); os._exit(status)"
    )
    arguments = [*flags(data, run, train__max_steps=4), "--save.asynchronous=true"]
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([warm_python(), "-c", script, *arguments], env=environment, timeout=200)
    assert done.returncode == 0
    assert [path.name for path in list_checkpoints(run)] == ["iter-00000004-ckpt.pth"]
