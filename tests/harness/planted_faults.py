"""For tests: faults injected into a training process before it starts. Each is a dictionary: `kind` and its fields.

nan     {rank, steps: [a, b)}               the loss of this rank is not a number in these steps
spike   {samples: [a, b), factor}           the parameters are multiplied after a step with one of the samples
signal  {rank, name, when, number}          the process signals itself at the number-th step | validation | set | saving
hang    {rank, step}                        the rank sleeps for ever before this step
raise   {rank, step}                        the rank raises before this step
error   {ranks, where, type, file}          the ranks raise an error of this type, once: in set-up | resume | save |
                                            validation | end; the time is written to the file
ballast {rank, file, from_step, to_step}    a file fills the disk before one step, and is removed before the other
blind   {}                                  skips the free-space check before a save, which then hits the full disk
kill    {rank, step}                        the rank is killed before this step
code    {rank, text}                        the rank, or every rank if none is given, runs this Python first
"""

from __future__ import annotations

import builtins
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from lit_data.record.writer import DatapointRecorder  # noqa: E402
from lit_model.dtensor import local  # noqa: E402
from pretrain import build, loop  # noqa: E402
from pretrain.checkpoint import commit, saver  # noqa: E402


def plant(faults: list[dict[str, Any]]) -> None:
    """Inject faults into this process, before it starts training."""
    for fault in faults:
        PLANTS[fault["kind"]](fault)


def _before_step(fault: dict[str, Any], act: Callable[[Any, Any], None]) -> None:
    """Call `act(run, data)` before each step of the fault's rank."""
    original = loop.train_step

    def train_step(run: Any, data: Any, *more: Any) -> Any:
        if fault.get("rank", run.fabric.global_rank) == run.fabric.global_rank:
            act(run, data)
        return original(run, data, *more)

    loop.train_step = train_step


def _nan(fault: dict[str, Any]) -> None:
    first, end = fault["steps"]
    step = -1

    def act(run: Any, data: Any) -> None:
        nonlocal step
        if step < 0:
            forward = run.raw_model.forward

            def spoiled(*arguments: Any, **keywords: Any) -> Any:
                out = forward(*arguments, **keywords)
                return out._replace(loss_sum=out.loss_sum * float("nan")) if first <= step < end else out

            run.raw_model.forward = spoiled
        step = data.step

    _before_step(fault, act)


def _spike(fault: dict[str, Any]) -> None:
    first, end = fault["samples"]
    original = loop.train_step

    def train_step(run: Any, data: Any, *more: Any) -> Any:
        result = original(run, data, *more)
        begin, count = loop.first_sample_of_step(run.segments, data.step)
        if begin < end and begin + count > first:
            with torch.no_grad():
                for parameter in run.raw_model.parameters():
                    local(parameter).mul_(fault["factor"])
        return result

    loop.train_step = train_step


def _signal(fault: dict[str, Any]) -> None:
    calls = [0]

    def strike() -> None:
        calls[0] += 1
        if calls[0] == fault["number"]:
            os.kill(os.getpid(), getattr(signal, fault["name"]))
            time.sleep(0.01)  # lets the handler run before continuing

    def before(name: str, owner: Any) -> None:
        original = getattr(owner, name)

        def struck(first: Any, *arguments: Any, **keywords: Any) -> Any:
            rank = first.fabric.global_rank if owner is loop else first.rank
            if rank == fault["rank"]:
                strike()
            return original(first, *arguments, **keywords)

        setattr(owner, name, struck)

    if fault["when"] == "saving":
        before("write", commit.CheckpointWriter)
    else:
        before({"step": "train_step", "validation": "validate", "set": "add_losses"}[fault["when"]], loop)


def _at_step(step: int, work: Callable[[], None]) -> Callable[[Any, Any], None]:
    def act(run: Any, data: Any) -> None:
        if data.step == step:
            work()

    return act


def hang_for_ever() -> None:
    while True:
        time.sleep(3600)


def fail() -> None:
    raise RuntimeError("planted failure")


def throw(kind: str) -> None:
    """Raise an error of a kind: the name of a built-in exception, or "C++" for one raised inside torch."""
    if kind == "C++":
        torch.ones(2) @ torch.ones(3)
    raise getattr(builtins, kind)("planted")


def _error(fault: dict[str, Any]) -> None:
    owner, name = {
        "set-up": (build, "open_data"),
        "resume": (build, "restore"),
        "save": (saver.Saver, "save"),
        "validation": (loop, "validate"),
        "end": (DatapointRecorder, "close"),
    }[fault["where"]]
    original, armed = getattr(owner, name), [True]

    def fail_once(*arguments: Any, **keywords: Any) -> Any:
        if armed[0] and dist.get_rank() in fault["ranks"]:
            armed[0] = False
            Path(fault["file"]).write_text(str(time.monotonic()))
            throw(fault["type"])
        return original(*arguments, **keywords)

    setattr(owner, name, fail_once)


def _ballast(fault: dict[str, Any]) -> None:
    file = Path(fault["file"])

    def fill() -> None:
        with open(file, "wb", buffering=0) as f:
            with contextlib.suppress(OSError):
                while f.write(bytes(4096)):
                    pass
            f.truncate(f.tell() - 96 * 1024)

    _before_step(fault, _at_step(fault["from_step"], fill))
    _before_step(fault, _at_step(fault["to_step"], lambda: file.unlink()))


def _blind(fault: dict[str, Any]) -> None:
    commit.check_free_space = lambda folder, n_bytes: None


def _code(fault: dict[str, Any]) -> None:
    if fault.get("rank", int(os.environ["RANK"])) == int(os.environ["RANK"]):
        exec(fault["text"], {})


PLANTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "nan": _nan,
    "spike": _spike,
    "signal": _signal,
    "hang": lambda fault: _before_step(fault, _at_step(fault["step"], hang_for_ever)),
    "error": _error,
    "raise": lambda fault: _before_step(fault, _at_step(fault["step"], fail)),
    "kill": lambda fault: _before_step(fault, _at_step(fault["step"], lambda: os.kill(os.getpid(), signal.SIGKILL))),
    "ballast": _ballast,
    "blind": _blind,
    "code": _code,
}
