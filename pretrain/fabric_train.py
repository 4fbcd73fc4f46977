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

import torch
import torch.distributed as dist

from lit_files.checkpoint_name import checkpoint_name
from lit_files.descriptors import raise_open_file_limit
from lit_files.publish import write_json
from lit_model.attention import attention_variant
from lit_model.config import ModelConfig
from lit_model.cost import count_active_parameters, count_parameters
from lit_model.hf.families import family_of
from lit_model.kernels.choose import AttentionChoice, choose_attention
from pretrain.args import RunArgs
from pretrain.build import RunFinished, set_up
from pretrain.checkpoint.commit import SaveError
from pretrain.cli.command_line import make_printable
from pretrain.cli.run_parser import parse
from pretrain.failure.first_failure import lost_connection
from pretrain.failure.peers import Mistake, status_of
from pretrain.guards import AgreedError, Interrupted, StopSignals
from pretrain.launch import has_gpus, is_first_process
from pretrain.logs.messages import Unfailing, say
from pretrain.logs.report import write_report
from pretrain.loop import fit
from pretrain.parallel import DTYPES
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
        describe(run)
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


def rank_name() -> str:
    return next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")


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


def describe(run: Run) -> None:
    """Print model, data, devices, and the attention kernels with the reason for each."""
    args, data, config = run.args, run.data, run.config
    dtype = torch.float32 if args.precision == "fp32" else DTYPES[args.precision]
    how = type(run.fabric.strategy).__name__.removesuffix("Strategy")
    documents, tokens = sum(d.n_documents for d in data.train), sum(d.n_tokens for d in data.train)
    rows = sum(r.n_windows for r in data.rows)
    parameters = f"{count_parameters(config):,} parameters"
    if config.n_expert:
        parameters += f" ({count_active_parameters(config):,} for a token)"
    lines = [
        f"run      {run.folder}" + (f", resumed after step {run.step}" if run.step else ""),
        f"model    {config.name or 'custom'}: {parameters}, vocabulary {config.vocab_size}",
        f"data     {documents:,} documents, {tokens:,} tokens, {rows:,} rows of {data.block_size}, {args.data.packing}",
        f"steps    {data.max_steps:,} of {args.train.global_batch_samples * data.block_size:,} tokens",
        f"devices  {run.world_size} x {run.device.type} by {how}, {args.precision}, {torch.get_num_threads()} threads",
        *kernels(run.device, dtype, config, args),
    ]
    if run.taught_by:
        d = args.distillation
        names = " + ".join(f"{t['name']} x {t['weight']:g}" for t in run.taught_by)
        alpha = f"{d.alpha:g}" + (f" to {d.alpha_end:g}, {d.alpha_schedule}" if d.alpha_end is not None else "")
        how = f"{d.divergence} at temperature {d.temperature:g}, {d.reduction}, alpha {alpha}"
        lines.append(f"teachers {names}{', cached' if d.cache is not None else ''}; {how}")
    try:
        family_of(config)
    except ValueError as error:  # no model of transformers, but it can be trained
        lines.append(f"warning  it can be trained and opened here, but not exported to Hugging Face: {error}")
    if run.device.type == "cpu" and args.accelerator == "auto" and has_gpus(os.environ):
        lines.append("warning  SLURM gave this job GPUs, but torch finds none (the driver, or apptainer's --nv?)")
    if args.data.mock:
        lines.append("mock     the first step's data again and again (--data.mock); nothing is recorded")
    run.say("\n".join(lines))


def kernels(device: torch.device, dtype: torch.dtype, config: ModelConfig, args: RunArgs) -> list[str]:
    """One line for each attention kernel that will run: name, reason, and its layers if there are several."""
    layers: dict[AttentionChoice, list[int]] = {}
    for i in range(config.n_layer):
        chunked = config.layer_attention(i) == "chunked"
        choice = choose_attention(
            device,
            dtype,
            config.head_size,
            args.train.attention,
            documents=args.data.document_mask or chunked,
            variant=attention_variant(config, i),
        )
        layers.setdefault(choice, []).append(i)
    return [
        f"kernel   {choice.name}: {choice.reason}"
        + (f" (layers {', '.join(map(str, some))})" if len(layers) > 1 else "")
        for choice, some in layers.items()
    ]


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
