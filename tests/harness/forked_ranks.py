"""For kill tests: a process with everything imported that forks the ranks of one training run after another.

    python tests/harness/forked_ranks.py

reads requests from standard input and answers on standard output, one JSON object per line (see `trial`); the client is
rank_server.py. Importing torch and Lightning takes seconds, a fork a few milliseconds. Nothing that a fork would break
exists before it: no process group and no library thread, which is asserted.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
import warm_python
from planted_faults import plant
from watched_calls import PHASES, Call, Watch

import pretrain.logs.report
import pretrain.loop
import pretrain.memory_trial
import pretrain.preflight.preflight
import pretrain.train
from pretrain.cli.run_parser import build_parser
from pretrain.fabric_train import leave, main

# What runs and scripts import only when they need it, since each fork would import it again.
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lit_files", "lit_model", "lit_data", "lit_eval", "pretrain")
OURS = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LATE = [f"torch.{name}" for name in ("_dynamo", "distributed.checkpoint", "distributed.fsdp", "distributed.tensor")]
for module in (*LATE, *(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in OURS)):
    with contextlib.suppress(ModuleNotFoundError):  # of an extra that is not installed
        importlib.import_module(module)

SLOTS = 3 + len(PHASES)  # int64 in shared memory, per rank:
STEP, KILLED_NS, PHASE, ENTERED = 0, 1, 2, 3  # steps completed, time of its kill, current phase; entries per phase


class Reporter:
    """In a rank: reports its phase in shared memory, and kills at the requested call."""

    def __init__(self, rank: int, request: dict[str, Any], slots: memoryview) -> None:
        self.slots = slots
        kill = request["kill"]
        self.kill = kill if kill is not None and kill["rank"] == rank else None
        self.calls, self.write = os.open(f"{request['log']}-calls-{rank}", os.O_CREAT | os.O_WRONLY), os.write
        self.watch = Watch(Path(request["run"]), self.called)
        for name, phase in (
            ("train_step", "step"),
            ("validate", "validation"),
            ("evaluate", "evaluation"),
            ("save", "saving"),
        ):
            setattr(pretrain.loop, name, self.phased(getattr(pretrain.loop, name), phase))

    def enter(self, phase: str) -> None:
        place = PHASES.index(phase)
        self.slots[PHASE] = place
        self.slots[ENTERED + place] += 1

    def phased(self, function: Any, phase: str) -> Any:
        def entered(run: Any, *arguments: Any) -> Any:
            self.watch.begun = True
            self.slots[STEP] = run.step
            self.enter(phase)
            return function(run, *arguments)

        return entered

    def called(self, call: Call, half: Any) -> None:
        self.write(self.calls, (json.dumps(call) + "\n").encode())
        self.enter(call.phase)
        if self.kill is not None and [call.kind, call.phase, call.number] == self.kill["call"]:
            if self.kill["half"] and half is not None:
                half()
            self.slots[KILLED_NS] = time.monotonic_ns()
            if self.kill["everyone"]:
                os.killpg(0, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def trial(request: dict[str, Any]) -> dict[str, Any] | list[str]:
    """Fork the ranks of a run and wait for them. Returns the answer; in a rank, its command line.

    The request:
        world_size, run, arguments: ranks, run folder, command line.
        log: path prefix of each rank's output (LOG-R) and calls (LOG-calls-R).
        env, plants: extra environment of the ranks, and faults of tests/harness/planted_faults.py.
        watch: record all calls that change the run folder, and the current phase; required for the keys below.
        kill: {rank, call: [kind, phase, number], half, everyone}: SIGKILL before this call of this rank; with `half`,
            after half of its bytes are written. Kills this rank, or `everyone`.
        moment: {rank, phase, entry, delay_s, everyone}: SIGKILL `delay_s` after the rank enters the phase for the
            `entry`-th time.
        timeout_s: after this, live processes dump their stacks to their output or log, and are killed.

    The answer: the ranks' `statuses` (negative: signal); whether one was `killed`, in which `phase`, after which
    `step`, and how long the others `survived_s`; whether `timeout_s` was `exceeded`; total `seconds`, and `train_s`
    from the first step on; how often each rank `entered` each phase.
    """
    world_size, moment, kill = request["world_size"], request["moment"], request["kill"]
    endings = [(request["timeout_s"], signal.SIGABRT), (request["timeout_s"] + 2, signal.SIGKILL)]
    memory = memoryview(mmap.mmap(-1, 8 * SLOTS * world_size)).cast("q")
    slots = [memory[rank * SLOTS : (rank + 1) * SLOTS] for rank in range(world_size)]
    # Bound but not listening: reserves the port, and rank 0 can still bind it, as both set SO_REUSEADDR.
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    began, first_step, killed, phase, exceeded = time.monotonic(), 0.0, 0.0, "", False
    ranks: list[int] = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, ranks[0] if ranks else 0)
            become(rank, request, reserved.getsockname()[1], slots[rank])
            reserved.close()
            return list(request["arguments"])
        ranks.append(pid)
        os.setpgid(pid, ranks[0])
    alive, statuses = dict(enumerate(ranks)), [0] * world_size
    while alive:
        time.sleep(0.0003 if moment and not killed else 0.002)
        for rank, pid in list(alive.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[rank] = os.waitstatus_to_exitcode(status)
                del alive[rank]
        now = time.monotonic()
        if not first_step and slots[0][ENTERED + PHASES.index("step")]:
            first_step = now
        if moment and not killed and slots[moment["rank"]][ENTERED + PHASES.index(moment["phase"])] >= moment["entry"]:
            time.sleep(moment["delay_s"])
            if moment["rank"] in alive:
                phase, killed = PHASES[slots[moment["rank"]][PHASE]], time.monotonic()
                (os.killpg if moment["everyone"] else os.kill)(
                    ranks[0] if moment["everyone"] else alive[moment["rank"]], signal.SIGKILL
                )
        if alive and endings and now - began > endings[0][0]:
            exceeded = True
            os.killpg(ranks[0], endings.pop(0)[1])
    reserved.close()
    if kill and slots[kill["rank"]][KILLED_NS]:
        phase, killed = kill["call"][1], slots[kill["rank"]][KILLED_NS] / 1e9
    ended = time.monotonic()
    return {
        "statuses": statuses,
        "killed": bool(killed),
        "phase": phase,
        "step": slots[(kill or moment or {"rank": 0})["rank"]][STEP],
        "survived_s": ended - killed if killed else 0.0,
        "exceeded": exceeded,
        "seconds": ended - began,
        "train_s": ended - first_step if first_step else 0.0,
        "entered": [dict(zip(PHASES, s[ENTERED:], strict=True)) for s in slots],
    }


def become(rank: int, request: dict[str, Any], port: int, slots: memoryview) -> None:
    """Turn a forked child into a rank as torchrun would start it, with its output in a file."""
    output = os.open(f"{request['log']}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    faulthandler.enable()
    world = str(request["world_size"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "server"}
    os.environ |= request["env"]
    plant(request["plants"])
    if request["watch"]:
        Reporter(rank, request, slots)


def serve_python(address: str) -> dict[str, Any]:
    """Fork the process that serves tests/harness/warm_python.py at this address; its scripts exit in this function."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(32)
    if os.fork():
        listener.close()
        return {"address": address}
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)  # the child must not keep this process's pipes
    os.dup2(null, 1)
    words = warm_python.serve(listener)
    try:
        warm_python.run(words)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        end(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    end(0)


def serve() -> list[str] | None:
    """Serve until the requests end (None). In a forked rank, return its command line."""
    for line in sys.stdin:
        assert not dist.is_initialized() and len(os.listdir("/proc/self/task")) == 1
        request = json.loads(line)
        outcome = serve_python(request["address"]) if "address" in request else trial(request)
        if isinstance(outcome, list):
            return outcome
        print(json.dumps(outcome), flush=True)
    return None


def end(status: int) -> NoReturn:
    """Exit a rank like the interpreter but without teardown, which would take ten times as long as most runs here, as
    every page it touches is copied first."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    build_parser()  # half the time of a short run; done once instead of per fork
    gc.freeze()  # keeps garbage collection in a fork from touching pages shared with this process
    arguments = serve()
    if arguments is not None:
        try:
            leave(main(arguments))
        except SystemExit as ended:
            end(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
