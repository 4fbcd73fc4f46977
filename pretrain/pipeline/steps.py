"""Pipelines of the project's own commands: each is printed and run, and a step whose result exists is skipped."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_files.platform import end_with_parent
from lit_files.publish import write_json
from lit_files.reading import read_object

ROOT = Path(__file__).resolve().parents[2]
STATE = "pipeline.json"  # in the folder of a pipeline: its settings and the steps that are done


class StepFailed(Exception):
    """A command failed and has printed its error, or was stopped before its end."""


@dataclass(frozen=True)
class Step:
    """Commands, run one after another in ROOT.

    Attributes:
        title: names the step, in the output and in the state file.
        commands: each of which can be repeated, unless `output` exists.
        output: exists once the step is done. For a result that appears complete under this name or not at all; without
            it, the step is done once its commands have ended and it is noted in the state file.
        stopped: exists if the command was stopped early by a signal; its exit status may be 0.
        replaces: a folder that is removed before the commands run.
        note: printed below the title of a step to be done.
    """

    title: str
    commands: tuple[tuple[str, ...], ...]
    output: Path | None = None
    stopped: Path | None = None
    replaces: Path | None = None
    note: str = ""


def python(script: str, *words: str | Path) -> tuple[str, ...]:
    """A command that runs a Python script of this project."""
    return (sys.executable, script, *map(str, words))


def shown(command: Sequence[str]) -> str:
    """A command as a user would type it in ROOT with the environment active."""
    return shlex.join(["python" if part == sys.executable else part for part in command])


def names_of(flags: Sequence[str]) -> set[str]:
    """The names of some flags of fabric_train.py, without values and dashes."""
    return {flag.partition("=")[0].removeprefix("--") for flag in flags if flag.startswith("--")}


# Flags of fabric_train.py that every pipeline sets: its other steps rest on them.
OWN_FLAGS = {"config", "out_dir", "data.train", "data.val", "resume"}


def check_flags(flags: Sequence[str], script: str, own: Collection[str] = OWN_FLAGS) -> None:
    """Raise ValueError for a flag of the user that the pipeline `script` sets itself."""
    if taken := sorted(names_of(flags) & set(own)):
        raise ValueError(f"--{taken[0]} after -- is a flag that {script} sets itself: remove it")


def absent(own: Mapping[str, str], given: set[str]) -> list[str]:
    """The words of flags that are not among `given`."""
    return [word for name, value in own.items() if name not in given for word in (f"--{name}", value)]


def from_root(path: Path) -> Path:
    """The path as commands name it: relative to ROOT if it is below it, else absolute."""
    absolute = Path(os.path.abspath(path))
    return absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute


def call(command: Sequence[str], capture: bool = False) -> str:
    """Print a command and run it in ROOT. Returns its standard output, if captured.

    After Ctrl-C the command, which has received it too, is waited for: training saves a checkpoint first. SIGTERM is
    passed on. If this process is killed by SIGKILL, so is the command, on Linux: it would otherwise hold its locks, and
    the next call would be refused. Raises StepFailed if the exit status is not 0.
    """
    print(f"$ {shown(command)}", flush=True)
    # PYTHON is for the shell scripts. Waiting threads sleep instead of spinning: on two cores shared with other
    # programs, spinning cost five sixths of the speed.
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHON": sys.executable}
    process = subprocess.Popen(
        list(command), cwd=ROOT, env=env, stdout=subprocess.PIPE if capture else None, text=True,
        preexec_fn=end_with_parent(),
    )  # fmt: skip
    try:
        output, _ = process.communicate()
    except KeyboardInterrupt:
        process.wait()
        raise
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode:
        raise StepFailed(f"exit code {process.returncode}: {shown(command)}")
    return output or ""


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def begin(title: str, done: bool = False, note: str = "") -> None:
    """Print a step's title, and its note unless it was done before."""
    print(f"\n=== {title}{': done before' if done else ''}", flush=True)
    if note and not done:
        print(note, flush=True)


class Pipeline:
    """The steps of a folder, and its settings, those of the first call, which later calls must repeat.

    Attributes:
        facts: what the first call found out, as JSON has it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], remedy: str = "") -> None:
        """Open the state file, or start without one.

        Args:
            settings: flag -> value, as JSON has it.
            remedy: ends the message of a setting that differs.

        Raises ValueError if a setting differs, or for a damaged state file.
        """
        self.file = folder / STATE
        state = read_object(self.file) if self.file.exists() else {}
        self.settings: dict[str, Any] = state.get("settings", dict(settings))
        self.done: list[str] = state.get("done", [])
        self.facts: dict[str, Any] = state.get("facts", {})
        for flag, value in settings.items():
            old = self.settings.get(flag)
            if old != value:
                now, was = (f"--{flag} {_words(v)}" if v is not None else f"no --{flag}" for v in (value, old))
                raise ValueError(
                    f"{now}: {folder} was started with {was}; repeat that, or choose another folder{remedy}"
                )

    def save(self) -> None:
        """Write the state file."""
        write_json(self.file, {"settings": self.settings, "facts": self.facts, "done": self.done})

    def is_done(self, step: Step) -> bool:
        """Whether the step's result exists."""
        return (ROOT / step.output).exists() if step.output is not None else step.title in self.done

    def run(self, steps: Sequence[Step]) -> int:
        """Run the steps that are not done. After one that runs, all without an `output` run too.

        Returns the number of steps that ran. Raises StepFailed.
        """
        ran = 0
        for number, step in enumerate(steps):
            done = self.is_done(step)
            begin(step.title, done, step.note)
            if done:
                continue
            ran += 1
            earlier = {other.title for other in steps[:number]}
            self.done = [title for title in self.done if title in earlier]
            self.save()
            if step.replaces is not None:
                shutil.rmtree(ROOT / step.replaces, ignore_errors=True)
            for command in step.commands:
                call(command)
            if step.stopped is not None and (ROOT / step.stopped).exists():
                raise StepFailed(f"stopped by a signal before its end ({step.stopped}): {step.title}")
            if step.output is None:
                self.done.append(step.title)
                self.save()
        return ran


def run_work(work: Callable[[], object], hint: str = "") -> int:
    """Run a pipeline's work. Returns the exit status: 1 after a failed step, 130 after Ctrl-C, each with a message."""
    start = time.monotonic()
    try:
        work()
    except StepFailed as failed:
        print(f"error: this step failed, see its message above:\n  {failed}", file=sys.stderr)
        print(f"Repeat the command to resume here{hint}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; repeat the command to resume here", file=sys.stderr)
        return 130
    except SystemExit:  # by SIGTERM
        print("stopped; repeat the command to resume here", file=sys.stderr)
        raise
    print(f"\n{time.monotonic() - start:.0f} s")
    return 0
