"""Which rank failed first, as reported by real processes."""

from __future__ import annotations

import ctypes
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from failing_ranks import Case, run_cases

from lit_files.run_files import LOGS
from pretrain.failure.first_failure import FILE, Failure, begin_attempt, lost_connection, publish, report_failure
from pretrain.failure.rank_log import RankLog
from pretrain.failure.watchdog import RECENT_INTERVALS, Watchdog

CASES = ["one_fails", "one_fails_without_file", "two_fail", "one_killed", "host_killed"]
FAILURE = Failure("now", 3, "h", 7, "ValueError", "planted", "2030-01-01", 3)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Each case's folder contains the failure of an earlier attempt, by rank 9."""
    return run_cases(tmp_path_factory, "failures", CASES)


@pytest.mark.parametrize("name", ["one_fails", "one_fails_without_file"])
def test_the_failing_rank_is_named_by_all(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    assert case.statuses == [1, 1, 1]
    for rank in range(3):
        stopped = "" if rank == 1 else f"rank {rank} stopped because "
        begin = f"error: {stopped}rank 1 failed first (host "
        assert case.message(rank).startswith(begin) and ", step 3, ValueError: planted)" in case.message(rank)
        assert begin.removeprefix("error: ") in case.log(rank)
        assert "Traceback" in case.log(rank) and (", in planted_error" in case.log(rank)) == (rank == 1)
    assert (case.folder / LOGS / FILE).exists() == (name == "one_fails")


def test_the_first_of_two_failing_ranks_is_named(cases: dict[str, Case]) -> None:
    case = cases["two_fail"]
    assert case.statuses == [1, 1, 1]
    assert all("rank 2 failed first (host" in case.message(rank) for rank in range(3))
    assert "it also has an error of its own: ValueError: planted in 0" in case.message(0)
    facts = json.loads((case.folder / LOGS / FILE).read_text())
    assert (facts["rank"], facts["step"], facts["error"], facts["message"]) == (2, 3, "ValueError", "planted in 2")
    assert facts["host"] and facts["time"].endswith("+00:00") and facts["attempt"] != "earlier"


@pytest.mark.parametrize(("name", "killed"), [("one_killed", 1), ("host_killed", 0)])
def test_a_killed_rank_is_named_by_the_others(cases: dict[str, Case], name: str, killed: int) -> None:
    case = cases[name]
    for rank in range(3):
        assert case.statuses[rank] == (-9 if rank == killed else 1)
        if rank != killed:
            assert f"rank {rank} stopped because rank {killed} failed first (host" in case.message(rank)
            assert "Silent: no heartbeat for" in case.message(rank)
    facts = json.loads((case.folder / LOGS / FILE).read_text())
    assert facts["rank"] == killed and facts["seen_by"] != killed and facts["attempt"] != "earlier"


def test_a_stopped_rank_names_itself_and_not_those_that_gave_up_on_it(tmp_path: Path) -> None:
    store, interval_s = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), 0.05
    watchdog = Watchdog(store, 1, 3, RankLog(tmp_path, 1, 3, "now"), 60.0, interval_s)
    try:
        time.sleep(4 * interval_s)  # ranks 0 and 2 send no heartbeat either
        ctypes.PyDLL(None).usleep(400_000)  # PyDLL: keeps the GIL, so nothing else runs
        assert 0.4 <= watchdog.stopped_s() < 10
        first = report_failure(RuntimeError("Connection closed by peer"), 7, watchdog)
        assert (first.rank, first.seen_by, first.step, first.error) == (1, 1, 7, "Silent")
        assert "this process itself did not run for" in first.message
        until = time.monotonic() + 30
        while watchdog.stopped_s():
            assert time.monotonic() < until
            time.sleep(RECENT_INTERVALS * interval_s)
    finally:
        watchdog.close()


def test_the_first_published_failure_counts(tmp_path: Path) -> None:
    file = tmp_path / FILE
    assert publish(file, FAILURE) == FAILURE
    assert publish(file, replace(FAILURE, rank=4)) == FAILURE
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_failure_of_an_earlier_attempt_does_not_count(tmp_path: Path) -> None:
    begin_attempt(tmp_path)
    file = tmp_path / LOGS / FILE
    publish(file, replace(FAILURE, attempt="earlier"))
    assert begin_attempt(tmp_path) != begin_attempt(tmp_path) and not file.exists()
    publish(file, replace(FAILURE, attempt="earlier"))  # by one of its processes that exits only now
    assert publish(file, FAILURE) == FAILURE
    assert json.loads(file.read_text())["attempt"] == "now"


def test_errors_that_mean_a_lost_peer() -> None:
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    assert lost_connection(gloo) and lost_connection(dist.DistNetworkError("Broken pipe"))
    assert lost_connection(dist.DistBackendError("NCCL error: ncclRemoteError"))
    try:
        try:
            raise gloo
        except RuntimeError as error:
            raise OSError("a rank has gone") from error
    except OSError as error:
        assert lost_connection(error)
    assert not lost_connection(dist.DistBackendError("NCCL error: unhandled cuda error"))
    assert not lost_connection(ValueError("Broken pipe")) and not lost_connection(RuntimeError("shapes differ"))
    assert not lost_connection(torch.OutOfMemoryError("CUDA out of memory"))
