"""For tests of the record: a run without a model. Publishes parts of two ranks, writes empty checkpoints, merges.

    python tests/harness/record_writer.py RUN [--kill CALL:N]

resumes RUN from its newest checkpoint to the last step, as training would after a crash. --kill ends the process like a
SIGKILL at its N-th call of os.rename or os.fsync. It does not import torch: the loader's batches are read from
RUN/steps.pickle, written by `prepare`.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lit_data.record.merge import compact  # noqa: E402
from lit_data.record.parts import newest_checkpoint_step  # noqa: E402
from lit_data.record.rewind import cut_record  # noqa: E402
from lit_data.record.writer import DatapointRecorder, remove_temporaries  # noqa: E402
from lit_files.publish import sync_file  # noqa: E402

RANKS, ROWS, STEPS, EVERY = 2, 4, 24, 2  # ranks, rows per micro-batch, steps, steps between checkpoints
MAX_ROWS = 150  # per merged file: a few steps


def enter(run: Path, phase: str) -> None:
    """Mark the start of a phase; with a folder, since creating one is not a counted call."""
    folder = run / "phases"
    number = sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
    (folder / f"{number:05d}-{phase}").mkdir(parents=True)


def record_step(recorder: DatapointRecorder, step: int, batches: list[dict[str, Any]]) -> None:
    """Queue one step; its losses are functions of its hashes, so that a rerun writes the same."""
    losses = [(b["hash"] % np.uint64(1000)).astype(np.float64) / 100 for b in batches]
    data = SimpleNamespace(
        step=step, micro_batches=[SimpleNamespace(spans=SimpleNamespace(**b), tokens=b["tokens"]) for b in batches]
    )
    recorder.add(data, lambda: (losses, True))  # type: ignore[arg-type]


def write(run: Path) -> None:
    """Resume from the newest checkpoint and run to the end."""
    steps = pickle.loads((run / "steps.pickle").read_bytes())
    done = newest_checkpoint_step(run)
    enter(run, "start")
    remove_temporaries(run / "datapoints")
    cut_record(run / "datapoints", done)
    recorders = [DatapointRecorder(run / "datapoints", rank, RANKS, ROWS, done) for rank in range(RANKS)]
    for step in range(done, STEPS):
        for rank, recorder in enumerate(recorders):
            record_step(recorder, step, steps[rank][step])
        if (step + 1) % EVERY == 0:
            enter(run, "publication")
            for recorder in recorders:
                recorder.publish()
            enter(run, "checkpoint")
            temporary = run / ".checkpoint.tmp"
            with open(temporary, "wb") as f:
                os.fsync(f.fileno())
            os.rename(temporary, run / f"iter-{step + 1:08d}-ckpt.pth")
            sync_file(run)
            enter(run, "compaction")
            if (step + 1) % (2 * EVERY) == 0:
                compact(run, MAX_ROWS)
    for recorder in recorders:
        recorder.close()


def kill_at(call: str, number: int) -> None:
    """Make the process exit just before its `number`-th call of os.rename or os.fsync."""
    original: Callable[..., Any] = getattr(os, call)
    calls = iter(range(1, number + 1))

    def counted(*arguments: Any) -> Any:
        if next(calls) == number:
            os._exit(137)
        return original(*arguments)

    setattr(os, call, counted)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--kill", metavar="CALL:N")
    arguments = parser.parse_args()
    if arguments.kill:
        name, _, count = arguments.kill.partition(":")
        kill_at(name, int(count))
    write(arguments.run)
