"""Train a model: `python pretrain/fabric_train.py --config configs/debug.yaml [--any.field value]`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    # The checkout in place of this folder: `import pretrain` finds it, and no module here can shadow another library's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from pretrain.cli.command_line import end_on_ctrl_c

    end_on_ctrl_c()

import torch.distributed as dist

from lit_files.checkpoint_name import checkpoint_name
from lit_files.descriptors import raise_open_file_limit
from lit_files.publish import write_json
from pretrain.build import RunFinished, set_up
from pretrain.checkpoint.commit import SaveError
from pretrain.cli.command_line import make_printable
from pretrain.cli.run_parser import parse
from pretrain.failure.first_failure import lost_connection
from pretrain.failure.peers import Mistake, status_of
from pretrain.guards import AgreedError, Interrupted, StopSignals
from pretrain.launch import is_first_process, rank_name
from pretrain.logs.messages import Unfailing, say
from pretrain.logs.report import write_report
from pretrain.loop import fit
from pretrain.overview import describe
from pretrain.preflight.preflight import preflight
from pretrain.run import Run
from pretrain.run_folder import STOPPED


def main(argv: list[str] | None = None) -> int:
    """Run. Returns the exit status: 0 when the run is done; `stop.exit_code` when it was stopped after saving, 130 by
    Ctrl-C; 1 when all ranks agreed that it cannot continue; 2 on a mistake. An exception of one rank alone ends the
    process."""
    make_printable()
    raise_open_file_limit()
    with StopSignals() as signals:
        try:
            args = parse(argv)
            signals.exit_code = args.stop.exit_code
            if args.preflight:
                return preflight(args)
            run = set_up(args, argv, signals)
            signals.kept = True
        except RunFinished as finished:
            if is_first_process():
                say(str(finished))
            return 0
        except (ValueError, OSError) as error:
            # Before the ranks have met each sees its own: a file may be missing on one node.
            if is_first_process():
                print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
            elif not isinstance(error, Mistake):
                print(f"error: rank {rank_name()} on {socket.gethostname()}: {error}", file=sys.stderr)
            return 2
        except (Interrupted, KeyboardInterrupt) as error:
            if is_first_process():
                print("\n".join([str(error) or "interrupted", *getattr(error, "__notes__", [])]), file=sys.stderr)
            return status_of(error)
        status = train(run)
        if run.args.log.report and run.fabric.global_rank == 0:
            write_report(run.folder)
        return status


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
        run.peers.give_up(error, run.step)


def mark_stopped(run: Run, by: str) -> None:
    """Write RUN/stopped.json, and requeue the job with --stop.requeue."""
    facts = {"signal": by, "step": run.step, "checkpoint": checkpoint_name(run.step), "time": time.time()}
    try:
        write_json(run.folder / STOPPED, facts)
    except OSError as error:
        print(f"warning: {STOPPED} could not be written: {error}", file=sys.stderr)
    job = os.environ.get("SLURM_JOB_ID")
    if not run.args.stop.requeue or run.step == run.data.max_steps or by == "SIGINT":
        return
    if job is None:
        print("warning: --stop.requeue: this is no SLURM job (SLURM_JOB_ID is not set)", file=sys.stderr)
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"warning: --stop.requeue: job {job} could not be requeued: {error}", file=sys.stderr)


def leave(status: int) -> NoReturn:
    """End the process with `status`.

    Several ranks end without tearing down their process groups, and without the interpreter's tear-down: threads of
    gloo that still run then sometimes end the process by a signal, after all work is done.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    make_printable()
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
    try:
        leave(main())
    except (Exception, KeyboardInterrupt):  # of this rank alone: the interpreter's tear-down would wait for the others
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
