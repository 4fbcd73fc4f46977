"""Hung ranks in real processes: which rank is named, what the logs contain, how and when the processes exit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist
from failing_ranks import Case, run_cases

from pretrain.failure.heartbeats import Heartbeat, blame, spans
from pretrain.failure.rank_log import RankLog
from pretrain.failure.watchdog import EXIT_HUNG, GRACE_INTERVALS, Watchdog, default_interval_s

SILENT = {"stopped": 1, "lock_kept": 1, "host_stopped": 0, "host_killed_asleep": 0}  # case: rank
CASES = ["asleep", "behind", "one_idle", "alone", "log_stuck", "healthy", *SILENT]
LIMIT_S = 2.5 + 0.25 * GRACE_INTERVALS  # of tests/harness/watchdog_worker.py


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return run_cases(tmp_path_factory, "watchdog", CASES)


def test_a_sleeping_rank_is_named_and_all_stacks_are_logged(cases: dict[str, Case]) -> None:
    case = cases["asleep"]
    assert case.statuses == [EXIT_HUNG] * 3 and max(case.seconds) < LIMIT_S
    for rank in range(3):
        message = case.message(rank)
        named, _, waiting = message.partition("waiting in torch.distributed: ")
        assert "held up by rank 1 on" in named and "in wait_for_ever" in named and "in step 3, train" in named
        assert waiting.startswith("ranks 0, 2 on") and "all_reduce" in waiting
        assert str(case.folder / "logs") in message and message.removeprefix(f"rank {rank}: ") in case.log(rank)
        assert (" in wait_for_ever\n" in case.log(rank)) == (rank == 1)
        assert (" in all_reduce\n" in case.log(rank)) == (rank != 1)


@pytest.mark.parametrize(("name", "culprit"), SILENT.items())
def test_a_silent_rank_is_named(cases: dict[str, Case], name: str, culprit: int) -> None:
    case = cases[name]
    for rank in {0, 1, 2} - {culprit}:
        assert case.statuses[rank] == EXIT_HUNG and case.seconds[rank] < LIMIT_S
        assert f"; rank {culprit} has sent no heartbeat for" in case.message(rank)
        assert case.message(rank).count("no heartbeat") == 1
        assert ("all_reduce" if name != "host_killed_asleep" else "wait_for_ever") in case.log(rank)


def test_a_process_that_holds_the_gil_exits_with_its_stacks(cases: dict[str, Case]) -> None:
    case = cases["lock_kept"]
    assert case.statuses[1] == 1 and case.seconds[1] < LIMIT_S + 0.5  # one round may pass before the timer is reset
    assert " in keep_the_lock\n" in case.log(1)


@pytest.mark.parametrize(("name", "rank"), [("stopped", 1), ("host_stopped", 0)])
def test_a_process_that_wakes_up_too_late_exits_too(cases: dict[str, Case], name: str, rank: int) -> None:
    case = cases[name]
    assert case.statuses[rank] in (EXIT_HUNG, 1)
    assert " in stop_myself\n" in case.log(rank) or "this process itself did not run for" in case.message(rank)


def test_a_rank_a_step_behind_is_named(cases: dict[str, Case]) -> None:
    case = cases["behind"]
    assert case.statuses == [EXIT_HUNG] * 3 and max(case.seconds) < LIMIT_S
    for rank in range(3):
        assert "behind: rank 2 on" in case.message(rank) and "the others: ranks 0-1 on" in case.message(rank)


def test_ranks_that_make_progress_exit_with_the_stuck_one(cases: dict[str, Case]) -> None:
    case = cases["one_idle"]
    assert case.statuses == [EXIT_HUNG] * 3
    for rank in range(3):
        assert "rank 2 made no progress" in case.message(rank) and "behind: rank 2 on" in case.message(rank)
        assert "in step 2, train" in case.message(rank) and "Current thread" in case.log(rank)


def test_the_end_of_the_store_is_logged(cases: dict[str, Case]) -> None:
    case = cases["host_killed_asleep"]
    assert case.statuses[0] == -9
    for rank in (1, 2):
        assert "the store is gone" in case.log(rank) and "the store has given no answer for" in case.message(rank)


def test_one_process(cases: dict[str, Case]) -> None:
    case = cases["alone"]
    assert case.statuses == [EXIT_HUNG] and case.seconds[0] < LIMIT_S
    assert "in step 7, save" in case.message(0) and " in wait_for_ever\n" in case.log(0)


def test_a_blocked_log_does_not_delay_the_exit(cases: dict[str, Case]) -> None:
    case = cases["log_stuck"]
    assert case.statuses == [EXIT_HUNG] and case.seconds[0] < LIMIT_S
    assert "in step 7, save" in case.message(0)


def test_no_alarm_in_a_healthy_run(cases: dict[str, Case]) -> None:
    case = cases["healthy"]
    assert case.statuses == [0, 0, 0]
    for rank in range(3):
        assert (case.folder / f"stderr-{rank}").read_text() == ""
        assert "alarm" not in case.log(rank) and "gone" not in case.log(rank)


def heartbeat(**facts: object) -> Heartbeat:
    usual = {"step": 1, "phase": "train", "idle_s": 9.0, "frame": "a.py:1 in f", "collective": False, "host": "h"}
    return Heartbeat(**usual | {"alarmed": True, "ended": False, "number": 1} | facts)  # type: ignore[arg-type]


def test_blame_in_order() -> None:
    waits = heartbeat(collective=True, frame="d.py:2 in all_reduce")
    silent = blame({0: waits, 1: heartbeat(step=0), 2: None, 3: heartbeat(host="k")}, {2: 40.0, 3: 50.0})
    life = "has sent no heartbeat for"
    assert silent.startswith(f"rank 2 {life} 40 s; rank 3 {life} 50 s; last seen on k in step 1, train")
    assert blame({0: waits, 1: heartbeat(step=0), 2: heartbeat()}, {}).startswith("behind: rank 1 on h in step 0")
    assert blame({0: waits, 1: heartbeat(), 2: waits}, {}).startswith("held up by rank 1 on h")
    every = blame({0: heartbeat(), 1: heartbeat(phase="save"), 2: heartbeat()}, {})
    assert every.startswith("all are in the same step: rank 1 on h in step 1, save") and "ranks 0, 2 on h" in every
    ended = blame({0: heartbeat(phase="failed", ended=True), 1: waits}, {})
    assert ended.startswith("rank 1 on h") and "; ended already: rank 0 on h in step 1, failed" in ended


def test_spans() -> None:
    assert spans([0, 2, 3, 4, 7]) == "0, 2-4, 7"


@pytest.mark.parametrize("kind", ["hash", "file"])
def test_silent_ranks(tmp_path: Path, kind: str) -> None:
    """Rank 1 closes its watchdog; rank 2 never started."""
    store = dist.HashStore() if kind == "hash" else dist.FileStore(str(tmp_path / "store"), -1)
    logs = [RankLog(tmp_path, rank, 3) for rank in range(2)]
    dogs = [Watchdog(store, rank, 3, logs[rank], timeout_s=0, interval_s=0.1) for rank in range(2)]
    dogs[1].beat(4, "save")
    time.sleep(0.3)
    dogs[1].close()
    until = time.monotonic() + 10
    while [rank for rank, _ in dogs[0].exchange.silent_ranks()] != [2] and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)  # by now rank 1 has been silent for more than three intervals
    ((rank, seconds),) = dogs[0].exchange.silent_ranks()
    assert rank == 2 and seconds > 0.3
    last = dogs[0].exchange.last(1)
    assert last is not None and (last.step, last.phase, last.ended) == (4, "save", True)
    dogs[0].close()
    for log in reversed(logs):
        log.close()


def test_interval() -> None:
    assert default_interval_s(900, 8) == 1.125 and default_interval_s(900, 512) == 9 and default_interval_s(2, 8) == 0.1
    assert default_interval_s(0, 1) == 1 + 1 / 64
