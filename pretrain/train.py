"""Trains a run that has been set up, to its end or to a stop."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from lit_eval.metrics_file import read_metrics
from lit_files.checkpoint_name import checkpoint_name
from lit_files.publish import write_json
from lit_files.run_files import METRICS, STOPPED
from pretrain.checkpoint.commit import SaveError
from pretrain.endings import AgreedError, Mistake
from pretrain.failure.first_failure import lost_connection
from pretrain.launch import is_first_process
from pretrain.logs.messages import warn
from pretrain.loop import fit
from pretrain.overview import describe
from pretrain.run import Run

MEMORY_ADVICE = (
    "Out of memory: give --train.micro_batch_samples auto, or fewer rows (the result is the same), then "
    "--train.activation_checkpointing auto; scripts/plan_run.py lists what fits"
)


def train(run: Run) -> int:
    """Train, and print how it ended. Returns the exit status."""
    try:
        run.say(describe(run))
        stopped = fit(run)
        if stopped is not None and run.fabric.global_rank == 0:
            mark_stopped(run, stopped)
        run.close()
        if stopped is None:
            run.say(f"done: {run.step} steps; the run is in {run.folder}")
            if run.fabric.global_rank == 0:
                warn_if_nothing_was_learned(run.folder)
            return 0
        run.say(f"stopped by {stopped} after step {run.step}; resume with --resume latest")
        return 130 if stopped == "SIGINT" else run.args.stop.exit_code
    except (AgreedError, SaveError, Mistake) as error:
        if lost_connection(error):  # a save that failed because another rank is lost
            run.peers.give_up(error, run.step)
        run.watchdog.log.exception(error)
        if is_first_process():
            print(f"error: {error}\nthe newest checkpoint is {run.peers.newest_checkpoint}", file=sys.stderr)
        run.close()
        return 1
    except BaseException as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # of a GPU; of a CPU
            error.add_note(MEMORY_ADVICE)
        run.peers.give_up(error, run.step)


def warn_if_nothing_was_learned(folder: Path) -> None:
    """Warn of a run whose validation loss ended no lower than it began."""
    try:
        metrics = read_metrics(folder / METRICS)
        losses = metrics["val_loss"][metrics.written["val_loss"]].tolist()
    except (OSError, ValueError, KeyError):  # no validation, or lost in the meantime; the run is complete
        return
    if len(losses) > 1 and not losses[-1] < losses[0]:  # NaN too
        warn(
            f"the validation loss ended at {losses[-1]:.3f}, no lower than the first, {losses[0]:.3f}: look at the "
            "curve in the report, and try a lower --optim.lr (docs/guides/troubleshooting.md)"
        )


def mark_stopped(run: Run, by: str) -> None:
    """Write RUN/stopped.json, and requeue the job with --stop.requeue."""
    facts = {"signal": by, "step": run.step, "checkpoint": checkpoint_name(run.step), "time": time.time()}
    try:
        write_json(run.folder / STOPPED, facts)
    except OSError as error:
        print(f"warning: {STOPPED} could not be written: {error}", file=sys.stderr)
    job = os.environ.get("SLURM_JOB_ID")
    finished = run.step == run.data.max_steps and run.unfinished is None
    if not run.args.stop.requeue or finished or by == "SIGINT":
        return
    if job is None:
        print("warning: --stop.requeue: not running in a SLURM job (SLURM_JOB_ID is not set)", file=sys.stderr)
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"warning: --stop.requeue: job {job} could not be requeued: {error}", file=sys.stderr)
