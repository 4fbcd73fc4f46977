"""Progress output with and without a terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
from pathlib import Path

import pytest
from running import flags, metrics, train, train_in_process

from lit_files.progress import TaskProgress, track
from pretrain.logs.progress import ProgressDisplay


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_of_a_short_run(data: Path, tmp_path: Path) -> None:
    """A SLURM log has loss, perplexity, tokens/s and memory at the first and last log step and at validations."""
    done = train(*flags(data, tmp_path / "run", train__max_steps=8))
    lines = [line for line in done.stdout.splitlines() if re.match(r"step \d+/8:", line)]
    assert [line.split(":")[0] for line in lines] == ["step 0/8", "step 1/8", "step 6/8", "step 8/8"]
    rows = {row["step"]: row for row in metrics(tmp_path / "run")}
    for line in lines:
        row = rows[line.split("/")[0].removeprefix("step ")]
        if row["train_loss"]:
            assert f"loss {float(row['train_loss']):.4f}" in line
            assert re.search(r"[\d,]+ tokens/s, \d+\.\d GiB", line)
        if row["val_loss"]:
            loss = float(row["val_loss"])
            assert f"validation loss {loss:.4f} (perplexity {2.718281828459045**loss:,.2f}, " in line
    assert "left" in lines[2] and "left" not in lines[3]


def test_at_most_one_line_in_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Log steps every 4 s give a line every 12 s; the first, the last and validations always give one."""
    clock = Clock()
    display = ProgressDisplay(0, 20, 1000, show=True, clock=clock)
    for step in range(1, 21):
        clock.now += 4.0
        row = {"step": step, "train_loss": 2.0, "tokens_per_s": 250.0} | ({"val_loss": 1.0} if step == 6 else {})
        display.row(row)
        display.advance(step)
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.match(r"step (\d+)/20", line)[1]) for line in lines] == [1, 4, 6, 9, 12, 15, 18, 20]  # type: ignore[index]
    assert lines[1] == "step 4/20: loss 2.0000, 250 tokens/s, 0:01:04 left"


def test_a_line_per_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """With rare log steps or a long validation: a line per minute, which reads nothing from the device."""
    clock = Clock()
    display = ProgressDisplay(0, 1000, 6000, show=True, clock=clock)
    for step in range(1, 31):
        clock.now += 6.0
        display.advance(step)
    for i in range(130):
        display.phase("validating", i, 130)
        clock.now += 1.0
    assert capsys.readouterr().out.splitlines() == [
        "step 10/1000: 1,000 tokens/s, 1:39:00 left",
        "step 20/1000: 1,000 tokens/s, 1:38:00 left",
        "step 30/1000: 1,000 tokens/s, 1:37:00 left",
        "step 30/1000: validating 60/130",
        "step 30/1000: validating 120/130",
    ]


def test_a_phase_names_the_step_that_it_follows(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validating and saving after step 2 are lines of step 2, as its losses are."""
    monkeypatch.setattr("pretrain.logs.progress.QUIET_S", 0.0)
    settings = {"train__max_steps": 2, "eval__every_steps": 2, "save__every_steps": 2, "log__every_steps": 1}
    train_in_process(flags(data, tmp_path / "run", **settings))
    lines = capsys.readouterr().out.splitlines()
    at = {text: line.split("/")[0] for line in lines for text in ("validating", "saving") if text in line}
    assert at == {"validating": "step 2", "saving": "step 2"}, lines


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 1 prints nothing."""
    clock = Clock()
    display = ProgressDisplay(0, 2, 10, show=False, clock=clock)
    display.phase("compiling")
    clock.now += 100
    display.row({"step": 1, "train_loss": 1.0, "val_loss": 1.0})
    display.advance(1)
    display.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bar_shows_the_current_phase(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """On a terminal of any width the bar shows compiling, validating 3/56, saving, and fits on one line."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                shown.extend(os.read(master, 4096))
            except OSError:
                return

    reader = threading.Thread(target=read)
    reader.start()
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", terminal)
        display = ProgressDisplay(0, 100, 1000, show=True, clock=(clock := Clock()))
        bar = display._bar
        assert bar is not None
        for done, of, phase in [(None, None, "compiling"), (3, 56, "validating"), (None, None, "saving")]:
            display.phase(phase, done, of)
            bar._progress.refresh()
        display.advance(1)
        clock.now += 5.0
        display.row({"step": 2, "train_loss": 2.5, "tokens_per_s": 12345.6, "memory_gib": 3.21})
        display.advance(2)
        bar._progress.refresh()
        display.close()
    reader.join(timeout=5)
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    frames = [line.strip("\r") for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert all(len(frame) <= width for frame in frames)
    for wanted in ("compiling", "validating 3/56", "saving", "training", "loss 2.500", "0:08:10 left", "2/100"):
        assert any(wanted in frame for frame in frames), wanted


def test_long_work_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """A line every half minute with the time left, which earlier work does not shorten; nothing for short work."""
    clock = Clock()
    progress = TaskProgress(clock=clock)
    with progress.task("copying"):
        for done in range(50, 101):
            progress(done, 100, "files")
            clock.now += 2.0
    assert capsys.readouterr().err.splitlines() == [
        "copying: 66/100 files, 0:01:08 left",
        "copying: 82/100 files, 0:00:36 left",
        "copying: 98/100 files, 0:00:04 left",
    ]
    assert list(track(iter([1, 2]), "short", "files")) == [1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("no_color", [False, True])
def test_a_bar_without_colors(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR leaves no color in a bar, which is removed at its end and shows the cursor again."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    progress = TaskProgress(clock=(clock := Clock()))
    with pytest.raises(ValueError), progress.task("copying"):
        for done in (10, 20, 30):
            progress(done, 100, "files")
            clock.now += 2.0
        raise ValueError
    shown = terminal.getvalue()
    assert "copying" in shown and "0:00:14 left" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert no_color != bool(re.search(r"\x1b\[([0-9;]*;)?(3|4|9)\d(;|m)", shown))
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1
