"""Ctrl-C, other signals and a time limit stop a run at any point, and completed work is saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, flags, metrics, same_checkpoints, shared_rank_server, train, write_dataset

from lit_model.load import Checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "train", [60] * 60)
    write_dataset(folder / "val", [60] * 20, seed=1)
    return folder


def short(data: Path, run: Path, **changes: object) -> list[str]:
    """A run of 6 steps that validates before the first, after the third and after the last step."""
    settings = {"train__max_steps": 6, "train__micro_batch_samples": 4, "save__every_steps": 2, "eval__every_steps": 3}
    return flags(data, run, **settings | changes)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(*short(data, run))
    return run


@pytest.fixture
def ranks() -> Any:
    return shared_rank_server()


def test_ctrl_c_saves_and_a_resume_gives_the_same_result(data: Path, whole: Path, tmp_path: Path, ranks: Any) -> None:
    """Ctrl-C after step 3 saves step 3, prints that, and exits with 130 whatever stop.exit_code is."""
    run = tmp_path / "run"
    strike = {"kind": "signal", "rank": 0, "name": "SIGINT", "when": "step", "number": 3}
    done = ranks.run(1, run, short(data, run, stop__exit_code=7), plants=[strike])
    assert done.statuses == [130], done.output
    assert "stopped by SIGINT after step 3; resume with --resume latest" in done.output
    assert "press it again to end at once" in done.output and "Traceback" not in done.output
    assert (run / "iter-00000003-ckpt.pth").exists()
    assert json.loads((run / "stopped.json").read_text())["signal"] == "SIGINT"
    train(*short(data, run, stop__exit_code=7, resume="latest"))
    same_checkpoints(run / "iter-00000006-ckpt.pth", whole / "iter-00000006-ckpt.pth")


def test_ctrl_c_reaches_all_ranks(data: Path, tmp_path: Path, ranks: Any) -> None:
    """SIGINT to both ranks, or to only one, saves on both at the same step; both exit with 130."""
    for name, struck in (("both", (0, 1)), ("one", (1,))):
        run = tmp_path / name
        plants = [{"kind": "signal", "rank": r, "name": "SIGINT", "when": "step", "number": 2} for r in struck]
        done = ranks.run(2, run, short(data, run, devices=2, strategy="ddp"), plants=plants)
        assert done.statuses == [130, 130], done.output
        assert (run / "iter-00000002-ckpt.pth").exists() and "Traceback" not in done.output


def test_other_signals_keep_their_status(data: Path, tmp_path: Path, ranks: Any) -> None:
    """stop.exit_code is the status after SIGTERM, as before."""
    run = tmp_path / "run"
    strike = {"kind": "signal", "rank": 0, "name": "SIGTERM", "when": "step", "number": 1}
    done = ranks.run(1, run, short(data, run, stop__exit_code=7), plants=[strike])
    assert done.statuses == [7] and (run / "iter-00000001-ckpt.pth").exists(), done.output


def test_a_signal_in_the_first_validation_leaves_a_resumable_run(
    data: Path, whole: Path, tmp_path: Path, ranks: Any
) -> None:
    """A signal during the validation before the first step ends the run within a batch; the saved state can be
    resumed, with the same result as an uninterrupted run."""
    run = tmp_path / "run"
    strike = {"kind": "signal", "rank": 0, "name": "SIGTERM", "when": "validation", "number": 1}
    done = ranks.run(1, run, short(data, run), plants=[strike])
    assert done.statuses == [0] and "after step 0" in done.output, done.output
    assert "step 0: SIGTERM; the resume will repeat the validation" in done.output
    assert (run / "iter-00000000-ckpt.pth").exists()
    train(*short(data, run, resume="latest"))
    same_checkpoints(run / "iter-00000006-ckpt.pth", whole / "iter-00000006-ckpt.pth")
    assert [r["step"] for r in metrics(run)] == [r["step"] for r in metrics(whole)]


def test_a_signal_during_a_validation_does_not_wait_for_its_end(data: Path, tmp_path: Path, ranks: Any) -> None:
    """Both ranks react to a signal to one of them during a validation before the next batch."""
    run = tmp_path / "run"
    strike = {"kind": "signal", "rank": 1, "name": "SIGUSR1", "when": "validation", "number": 2}
    done = ranks.run(2, run, short(data, run, devices=2, strategy="ddp"), plants=[strike])
    assert done.statuses == [0, 0] and "stopped by SIGUSR1 after step 3" in done.output, done.output
    assert "step 3: SIGUSR1; the resume will repeat the validation" in done.output
    assert [r["step"] for r in metrics(run)] == [str(n) for n in range(3)]
    assert (run / "iter-00000003-ckpt.pth").exists()
    assert ranks.run(2, run, short(data, run, devices=2, strategy="ddp", resume="latest")).statuses == [0, 0]
    rows = metrics(run)
    assert [r["step"] for r in rows] == [str(n) for n in range(7)]
    assert [int(r["step"]) for r in rows if r["val_loss"]] == [0, 3, 6] and all(r["train_loss"] for r in rows[1:])


def test_stop_after_minutes(data: Path, tmp_path: Path, ranks: Any) -> None:
    """--stop.after_minutes stops like a signal: after a step, saved, with stop.exit_code; on all ranks."""
    run = tmp_path / "run"
    limit = short(data, run, stop__after_minutes=1e-6, stop__exit_code=9, devices=2, strategy="ddp", data__val=None)
    done = ranks.run(2, run, limit)
    assert done.statuses == [9, 9] and "stopped by stop.after_minutes after step 1" in done.output, done.output
    assert (run / "iter-00000001-ckpt.pth").exists()
    assert json.loads((run / "stopped.json").read_text())["step"] == 1
    spent = Checkpoint(run / "iter-00000001-ckpt.pth").meta["time"]
    assert spent["device_seconds"] == 2 * spent["seconds"] == 2 * spent["seconds_of_start"] > 0
    refused = train(*short(data, tmp_path / "no", stop__after_minutes=0), check=False)
    assert refused.returncode == 2 and "--stop.after_minutes 0.0 must be greater than 0" in refused.stderr


def begun(data: Path, run: Path, **changes: object) -> subprocess.Popen[str]:
    """A long run as a user starts it, in a separate process group, as in a terminal."""
    line = [sys.executable, str(ROOT / "pretrain" / "fabric_train.py")]
    line += flags(
        data, run, train__max_steps=1_000_000, save__every_steps=500_000, eval__every_steps=500_000, **changes
    )
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def steps_of(run: Path) -> int:
    path = run / "metrics.csv"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(what: Any, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not what():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_ctrl_c_in_a_terminal(devices: int, data: Path, tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the launching process and all ranks it started: one save, status 130."""
    run = tmp_path / "run"
    process = begun(data, run, devices=devices, strategy="ddp" if devices > 1 else None)
    wait_for(lambda: steps_of(run) > 4, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert len(list(run.glob("iter-*-ckpt.pth"))) == 1 and "Traceback" not in output
    assert output.count("stopped by SIGINT after step") == 1


@pytest.mark.slow
def test_ctrl_c_under_torchrun(data: Path, tmp_path: Path) -> None:
    """torchrun forwards Ctrl-C to its ranks, which also get it from the terminal: it counts once."""
    run = tmp_path / "run"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line += [str(ROOT / "pretrain" / "fabric_train.py")]
    line += flags(data, run, train__max_steps=1_000_000, save__every_steps=500_000, devices=2, strategy="ddp")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)
    wait_for(lambda: steps_of(run) > 4, process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "stopped by SIGINT after step" in output and len(list(run.glob("iter-*-ckpt.pth"))) == 1


@pytest.mark.slow
def test_a_second_ctrl_c_exits_immediately(data: Path, tmp_path: Path) -> None:
    """A second Ctrl-C ends the process with 130 without saving, here during a hanging step."""
    run = tmp_path / "run"
    process = begun(data, run)
    wait_for(lambda: steps_of(run) > 4, process)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGINT)
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(0.005)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "ending without saving" in output or "stopped by SIGINT" in output


def test_a_signal_in_the_last_validation(data: Path, whole: Path, tmp_path: Path, ranks: Any) -> None:
    """A run stopped in its last validation is not finished; a resume validates and finishes it."""
    run = tmp_path / "run"
    strike = {"kind": "signal", "rank": 0, "name": "SIGINT", "when": "validation", "number": 3}
    done = ranks.run(1, run, short(data, run), plants=[strike])
    assert done.statuses == [130] and "stopped by SIGINT after step 6" in done.output, done.output
    train(*short(data, run, resume="latest"))
    for column in ("step", "val_loss", "train_loss"):
        assert [r[column] for r in metrics(run)] == [r[column] for r in metrics(whole)]
    same_checkpoints(run / "iter-00000006-ckpt.pth", whole / "iter-00000006-ckpt.pth")


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_every_script_ends_with_one_line(path: Path) -> None:
    """Ctrl-C ends each script with one line and 130: the handler is installed before the slow imports."""
    text = path.read_text()
    hook = text.find("end_on_ctrl_c()")
    if hook < 0:  # standard library only, and quick to import
        assert "except KeyboardInterrupt" in text and "import torch" not in text
    else:
        ours = ("from lit_", "import lit_", "import torch", "from pretrain.")
        before = [line for line in text[:hook].splitlines() if line.startswith(ours)]
        assert len(before) == 1 and before[0].startswith("from pretrain.cli.command_line import ")


IN_A_FINALIZER = """
import os, signal, sys, time
from pretrain.cli.command_line import end_on_ctrl_c, run_script

end_on_ctrl_c()


class Mapped:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        for _ in range(1000):  # the handler raises here, where Python ignores the exception
            pass


def main():
    mapped = Mapped()
    del mapped
    time.sleep(60)


run_script(main, "interrupted")
"""


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_a_finalizer_ends_a_script_quietly(number: signal.Signals, status: int) -> None:
    """It is neither printed as an ignored exception nor lost."""
    line = [sys.executable, "-c", IN_A_FINALIZER, str(int(number))]
    done = subprocess.run(
        line, capture_output=True, text=True, cwd=ROOT, timeout=30, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in the background
    )  # fmt: skip
    assert done.returncode == status and "ignored" not in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_ctrl_c_ends_a_script_with_one_line(data: Path) -> None:
    """Ctrl-C during a script's imports: one line, status 130."""
    line = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / "inspect_dataset.py"), str(data / "train")]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for text in process.stderr:  # written after each import
        if "numpy" in text:  # the first of them; many more follow
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # 0: the signal came in a callback of the import, where Python cannot raise.
    assert process.returncode in (0, 130), errors
    assert "Traceback" not in errors and (process.returncode == 0 or errors.rstrip().endswith("interrupted"))
