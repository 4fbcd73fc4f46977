"""An error on one rank, or on both, in each collective step of a run of two ranks.

    python -m pytest -m slow -s tests/real_use/test_rank_errors.py

prints the table of docs/reliability.md.
"""

from __future__ import annotations

import itertools
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from rank_server import Answer, RankServer
from running import flags, shared_rank_server, train, write_dataset

LIMIT_S = 20.0
STEPS = ("set-up", "resume", "save", "validation", "end")
KINDS = ("ValueError", "OSError", "MemoryError", "KeyboardInterrupt", "C++")
WHO: tuple[tuple[int, ...], ...] = ((0,), (1,), (0, 1))
TWO_RANKS = {"devices": 2, "strategy": "ddp", "train__micro_batch_samples": 4, "log__every_steps": 2}
NEWEST = {"set-up": None, "resume": 4, "save": 4, "validation": 4, "end": 12}  # the step of the error


@dataclass
class Trials:
    """Runs of two ranks with one planted error each."""

    server: RankServer
    data: Path
    folder: Path
    stopped: Path  # a run that has saved step 4

    def run(self, where: str, kind: str, ranks: tuple[int, ...]) -> tuple[Answer, Path, float]:
        """Run one trial; returns the answer, the run folder, and seconds from the error to the last rank's exit."""
        run, mark = self.folder / f"{where}-{kind}-{ranks}", self.folder / "mark"
        changes: dict[str, object] = {**TWO_RANKS, "eval__every_steps": 6}
        if where in ("resume", "save", "validation"):  # from step 4; the error is in step 6 or 8
            shutil.copytree(self.stopped, run)
            changes["resume"] = "latest"
        plant = {"kind": "error", "ranks": list(ranks), "where": where, "type": kind, "file": str(mark)}
        answer = self.server.run(2, run, flags(self.data, run, **changes), plants=[plant], timeout_s=90)
        return answer, run, time.monotonic() - float(mark.read_text())


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    folder = tmp_path_factory.mktemp("trials")
    write_dataset(folder / "data" / "train", [60] * 60)
    write_dataset(folder / "data" / "val", [60] * 10, seed=1)
    stopped = folder / "stopped"
    server = shared_rank_server()
    strike = {"kind": "signal", "rank": 0, "name": "SIGTERM", "when": "step", "number": 4}
    command = flags(folder / "data", stopped, **TWO_RANKS)
    assert server.run(2, stopped, command, plants=[strike]).statuses == [0, 0]
    return Trials(server, folder / "data", folder, stopped)


def newest(run: Path) -> str:
    names = sorted(p.name for p in run.glob("iter-*-ckpt.pth"))
    return names[-1] if names else "none"


def check(answer: Answer, run: Path, seconds: float, where: str, kind: str, ranks: tuple[int, ...]) -> str:
    """Check the outcome; returns it in a few words."""
    name = {"C++": "RuntimeError"}.get(kind, kind)
    text = "size" if kind == "C++" else "planted"
    output, both = answer.output, len(ranks) == 2
    assert not answer.exceeded and all(status > 0 for status in answer.statuses), (answer.statuses, output)
    assert seconds < LIMIT_S, (seconds, output)
    early = where in ("set-up", "resume")
    if both and early and kind in ("ValueError", "OSError"):  # an error that all ranks detect: reported once
        assert answer.statuses == [2, 2] and output.count("error: planted") == 1, output
        assert "Traceback" not in output
        how = "one message, status 2"
    elif both and early and kind == "KeyboardInterrupt":
        assert answer.statuses == [130, 130] and output.count("planted") == 1 and "Traceback" not in output, output
        how = "one line, status 130"
    else:
        status = 130 if kind == "KeyboardInterrupt" else 1
        assert set(answer.statuses) == {status}, (answer.statuses, output)
        named = [r for r in (0, 1) if f"rank {r} failed first (host " in output or f"rank {r} failed (host " in output]
        assert named and set(named) <= set(ranks), output
        assert f"{name}: " in output and text in output
        for rank in ranks:
            assert text in answer.outputs[rank]
        for rank in {0, 1} - set(ranks):
            assert f"rank {rank} stopped because rank {ranks[0]} failed first (host " in answer.outputs[rank], output
        how = f"named by both, status {status}"
    if not (early and where == "set-up"):
        assert f"the newest checkpoint is {newest(run)}" in output, output
    saved = newest(run)
    before = NEWEST[where]
    if before is None:
        assert saved == "none"
    elif both and where in ("save", "validation"):  # the state was consistent: saved before the exit
        assert saved == f"iter-{8 if where == 'save' else 6:08d}-ckpt.pth", (saved, output)
        how += ", saved first"
    else:
        assert saved == f"iter-{before:08d}-ckpt.pth", (saved, output)
    return how


@pytest.mark.parametrize(
    ("where", "kind", "ranks"),
    [
        pytest.param("set-up", "ValueError", (1,), marks=pytest.mark.slow),
        ("set-up", "OSError", (0, 1)),
        ("resume", "KeyboardInterrupt", (0, 1)),
        ("validation", "C++", (0, 1)),
        ("save", "MemoryError", (1,)),
    ],
)
def test_an_error_ends_all_ranks(trials: Trials, where: str, kind: str, ranks: tuple[int, ...]) -> None:
    """An error in set-up, resume, validation or a save, on one rank or both: all exit, and the right one is named."""
    check(*trials.run(where, kind, ranks), where, kind, ranks)


@pytest.mark.slow
def test_the_table_of_errors(trials: Trials, tmp_path: Path) -> None:
    """75 trials: each step and each error type, on rank 0, on rank 1 and on both."""
    trials.folder = tmp_path
    rows: dict[tuple[str, tuple[int, ...]], dict[str, tuple[str, float]]] = {}
    failed: list[str] = []
    for where, ranks, kind in itertools.product(STEPS, WHO, KINDS):
        answer, run, seconds = trials.run(where, kind, ranks)
        try:
            how = check(answer, run, seconds, where, kind, ranks)
        except AssertionError as error:
            how = "FAILED"
            failed.append(f"{where} {kind} {ranks}: {error}")
        rows.setdefault((where, ranks), {})[kind] = how, seconds
        shutil.rmtree(run, ignore_errors=True)
    print(f"\n| step | on rank | {' | '.join(KINDS)} |\n|{'---|' * (len(KINDS) + 2)}")
    for (where, ranks), cells in rows.items():
        who = " and ".join(map(str, ranks))
        print(f"| {where} | {who} | " + " | ".join(f"{how}; {s:.1f} s" for how, s in cells.values()) + " |")
    assert not failed, "\n\n".join(failed)


def test_an_unusable_folder_found_by_rank_zero_only(trials: Trials, tmp_path: Path) -> None:
    """An out_dir that cannot be created, on two ranks: one message, status 2 on both, no waiting."""
    (tmp_path / "file").write_text("x")
    run = tmp_path / "file" / "run"
    answer = trials.server.run(2, run, flags(trials.data, run, devices=2, strategy="ddp"), timeout_s=60)
    assert answer.statuses == [2, 2] and answer.output.count("error: ") == 1, answer.output
    assert f"--out_dir {run} cannot be used: Not a directory" in answer.outputs[0]


def test_a_single_process_saves_before_exiting_on_an_error(trials: Trials, tmp_path: Path) -> None:
    """An error that occurs on every rank, here the only one, saves first if the state is consistent."""
    run = tmp_path / "run"
    command = flags(trials.data, run, data__val=None, train__max_steps=4)
    answer = trials.server.run(1, run, command, plants=[{"kind": "raise", "rank": 0, "step": 3}])
    assert answer.statuses == [1] and "planted failure" in answer.output
    assert "the newest checkpoint is iter-00000003-ckpt.pth" in answer.output
    train(*command, "--resume=latest")
    assert newest(run) == "iter-00000004-ckpt.pth"
