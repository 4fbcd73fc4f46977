"""Run as `watchdog_worker.py FOLDER CASE ...`: starts the ranks of all cases at once, and reports how they exited.

A case is a function below, run by each rank in place of training. Its ranks are forked from this process, which has
imported torch, and rendezvous through a TCPStore in rank 0. FOLDER/CASE is the run folder, with the failure report of
an earlier attempt in it. Each rank's standard error goes to FOLDER/CASE/stderr-RANK.
Prints {case: {"statuses": [...], "seconds": [...]}}: exit statuses (negative: signal), and seconds from the fault to
the rank's exit.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.failure.first_failure import begin_attempt, report_failure
from pretrain.failure.rank_log import RankLog
from pretrain.failure.watchdog import Watchdog

WORLD = 3
TIMEOUT_S, INTERVAL_S = 2.5, 0.25
FAULT_STEP = 3
LIMIT_S = 60


def wait_for_ever() -> None:
    while True:
        time.sleep(1000)


def stop_myself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def keep_the_lock() -> None:
    ctypes.PyDLL(None).sleep(1000)  # PyDLL: keeps the GIL


class Rank:
    """One rank of a case, in its own process."""

    def __init__(self, folder: Path, rank: int, world_size: int, listener: socket.socket) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        port = listener.getsockname()[1]
        at = listener.detach() if rank == 0 else None
        self.base = dist.TCPStore("127.0.0.1", port, None, rank == 0, wait_for_workers=False, master_listen_fd=at)
        if rank == 0:
            self.base.set("attempt", begin_attempt(folder))
        attempt = self.base.get("attempt").decode()
        self.log = RankLog(folder, rank, world_size, attempt)
        store = dist.PrefixStore(attempt, self.base) if world_size > 1 else None
        self.watchdog = Watchdog(store, rank, world_size, self.log, TIMEOUT_S, INTERVAL_S)

    def join(self) -> None:
        dist.init_process_group("gloo", store=self.base, rank=self.rank, world_size=self.world_size)

    def fault(self) -> None:
        (self.folder / "fault").write_text(str(time.monotonic()))

    def train(self, guilty: int, fault=None) -> None:
        """Run steps with an all-reduce; in one of them rank `guilty` runs its fault first."""
        self.join()
        for step in range(10):
            self.watchdog.beat(step, "train")
            if step == FAULT_STEP and self.rank == guilty:
                self.fault()
                fault()
            dist.all_reduce(torch.ones(1))
            time.sleep(INTERVAL_S)


def asleep(rank: Rank) -> None:
    rank.train(1, wait_for_ever)


def stopped(rank: Rank) -> None:
    rank.train(1, stop_myself)


def host_stopped(rank: Rank) -> None:
    rank.train(0, stop_myself)


def lock_kept(rank: Rank) -> None:
    rank.train(1, keep_the_lock)


def behind(rank: Rank) -> None:
    """No collectives; one rank is a step behind."""
    rank.watchdog.beat(4 if rank.rank == 2 else 5, "train")
    rank.fault()
    wait_for_ever()


def one_idle(rank: Rank) -> None:
    """No collectives; one rank makes no progress, the others do."""
    rank.fault()
    for step in range(1000):
        if rank.rank == 2 and step == FAULT_STEP:
            wait_for_ever()
        rank.watchdog.beat(step, "train")
        time.sleep(INTERVAL_S)


def host_killed_asleep(rank: Rank) -> None:
    """The store dies with rank 0; the others get no error, and wait."""
    rank.watchdog.beat(5, "train")
    time.sleep(3 * INTERVAL_S)
    rank.watchdog.beat(6, "train")
    if rank.rank == 0:
        rank.fault()
        kill_myself()
    wait_for_ever()


def alone(rank: Rank) -> None:
    rank.watchdog.beat(7, "save")
    rank.fault()
    wait_for_ever()


def log_stuck(rank: Rank) -> None:
    """Writes to the log block."""
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    os.dup2(writer, rank.log.file.fileno())
    alone(rank)


def healthy(rank: Rank) -> None:
    """Runs longer than the timeout, with waiting collectives; then rank 1 continues alone for longer than the silence
    after which other ranks count as lost."""
    rank.join()
    rank.fault()
    for step in range(5):
        rank.watchdog.beat(step, "train")
        time.sleep(0.6 if rank.rank == 2 else 0)
        dist.all_reduce(torch.ones(1))
    if rank.rank == 1:
        time.sleep(6 * INTERVAL_S)
        assert rank.watchdog.exchange.silent_ranks() == [], rank.watchdog.exchange.silent_ranks()
    rank.watchdog.close()
    rank.base.add("done", 1)
    while rank.rank == 0 and rank.base.add("done", 0) < WORLD:  # the store is in this process
        time.sleep(0.05)


def planted_error() -> None:
    raise ValueError("planted")


def one_fails(rank: Rank) -> None:
    rank.train(1, planted_error)


def one_fails_without_file(rank: Rank) -> None:
    """The file system accepts no more writes; the store decides."""

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    os.link = no_space
    rank.train(1, planted_error)


def two_fail(rank: Rank) -> None:
    """Rank 2 fails slightly before rank 0, each with a different error."""

    def both() -> None:
        time.sleep(0.0 if rank.rank == 2 else 0.5)
        raise ValueError(f"planted in {rank.rank}")

    rank.train(rank.rank if rank.rank != 1 else -1, both)


def one_killed(rank: Rank) -> None:
    rank.train(1, kill_myself)


def host_killed(rank: Rank) -> None:
    rank.train(0, kill_myself)


WORLDS = {"alone": 1, "log_stuck": 1}


def run_rank(case: str, folder: Path, rank: int, listener: socket.socket) -> None:
    output = os.open(folder / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    this = Rank(folder, rank, WORLDS.get(case, WORLD), listener)
    try:
        globals()[case](this)
    except Exception as error:
        report_failure(error, FAULT_STEP, this.watchdog)
        if rank == 0:
            time.sleep(4 * INTERVAL_S)  # the store is in this process
        os._exit(1)
    this.watchdog.close()
    this.log.close()


def main(root: Path, cases: list[str]) -> None:
    ranks: dict[int, tuple[str, int]] = {}
    for case in cases:
        folder = root / case
        (folder / "logs").mkdir(parents=True)
        earlier = {"attempt": "earlier", "rank": 9, "host": "h", "step": 1, "error": "E", "message": "m"}
        (folder / "logs" / "first_failure.json").write_text(json.dumps(earlier | {"time": "t", "seen_by": 9}))
        listener = socket.create_server(("127.0.0.1", 0))
        for rank in range(WORLDS.get(case, WORLD)):
            pid = os.fork()
            if pid == 0:
                run_rank(case, folder, rank, listener)
                os._exit(0)
            ranks[pid] = (case, rank)
        listener.close()
    ended: dict[int, tuple[int, float]] = {}
    began = time.monotonic()
    while len(ended) < len(ranks):
        time.sleep(0.02)
        for pid, (case, _) in ranks.items():
            if pid in ended:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[pid] = (os.waitstatus_to_exitcode(status), time.monotonic())
            elif case.endswith("stopped") and sum(ranks[p][0] == case for p in ended) == WORLD - 1:
                os.kill(pid, signal.SIGCONT)  # once the others have exited
            elif time.monotonic() - began > LIMIT_S:
                os.kill(pid, signal.SIGKILL)
    outcome = {case: {"statuses": [], "seconds": []} for case in cases}
    for pid, (case, _) in ranks.items():
        status, at = ended[pid]
        outcome[case]["statuses"].append(status)
        outcome[case]["seconds"].append(at - float((root / case / "fault").read_text()))
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
