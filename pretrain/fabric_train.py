"""Train a model: `python pretrain/fabric_train.py --config configs/debug.yaml [--any.field value]`.

`main` imports its work once the arguments are parsed: torch takes seconds, --help and a wrong argument must not.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    # The checkout in place of this folder: `import pretrain` finds it, and no module here can shadow another library's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from pretrain.cli.command_line import end_on_ctrl_c

    end_on_ctrl_c()

from lit_files.platform import raise_open_file_limit
from pretrain.cli.command_line import make_printable, raised_by_import
from pretrain.cli.run_parser import parse
from pretrain.endings import Interrupted, Mistake, RunFinished, status_of
from pretrain.launch import is_first_process, rank_name
from pretrain.logs.messages import Unfailing, say
from pretrain.stop_signals import StopSignals


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
                from pretrain.preflight.preflight import preflight

                return preflight(args)
            from pretrain.build import set_up
            from pretrain.memory_trial import peak_of_steps
            from pretrain.train import train

            run = set_up(args, argv, signals, trial=peak_of_steps)
            signals.kept = True
        except RunFinished as finished:
            if not is_first_process():
                return 0
            say(str(finished))
            if args.save.hf:
                from pretrain.convert.export import export_run

                return export_run(finished.folder, again=False)
            return 0
        except (ValueError, OSError) as error:
            if raised_by_import(error):
                raise
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
            from pretrain.logs.report import write_report

            write_report(run.folder)
        if run.args.save.hf and status == 0 and run.fabric.global_rank == 0:
            from pretrain.convert.export import export_run

            return export_run(run.folder)
        return status


def leave(status: int) -> NoReturn:
    """End the process with `status`.

    Several ranks end without tearing down their process groups, and without the interpreter's tear-down: threads of
    gloo that still run then sometimes end the process by a signal, after all work is done.
    """
    dist = sys.modules.get("torch.distributed")  # not imported by --help, nor by a mistake in the arguments
    if dist is not None and dist.is_initialized():
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
