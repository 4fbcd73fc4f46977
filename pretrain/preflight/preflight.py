"""Preflight: checks everything that a run needs before it starts. `python pretrain/fabric_train.py --preflight ...`

No run is touched: temporary files go to one folder in out_dir, which is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pretrain.args import RunArgs
from pretrain.launch import is_first_process, rank_name
from pretrain.parallel import build_fabric, choose_placement, device_kind
from pretrain.preflight.context import Finding, ItemFailed, PreflightContext, Verdict, faults
from pretrain.preflight.machine import check_devices, check_disk, check_environment, check_network
from pretrain.preflight.memory import check_memory
from pretrain.preflight.nccl_transport import ask_for_log
from pretrain.preflight.outcomes import Outcome, RankLostError, Ranks, describe
from pretrain.preflight.trial_run import check_data, check_one_step, check_run_folder, check_tracker_setup

# Each checks one thing, and is called on all ranks. Work that differs between ranks is done in `context.together`
# (no rank needs another) or `context.watched` (ranks wait for each other). The finding follows from the outcomes of all
# ranks, and is the same on all.
ITEMS: tuple[tuple[str, Callable[[PreflightContext], Finding]], ...] = (
    ("devices", check_devices),
    ("environment", check_environment),
    ("network", check_network),
    ("run folder", check_run_folder),
    ("trackers", check_tracker_setup),
    ("data", check_data),
    ("disk", check_disk),
    ("memory", check_memory),
    ("one step", check_one_step),
)

COLOURS: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "cyan"}
MEETING_S = 600  # at most, for the ranks to connect and for any collective
FAREWELL_S = 30.0  # the time that a rank which cannot begin leaves rank 0 to report: its exit may end the job


def preflight(args: RunArgs) -> int:
    """Check everything, and print a table from rank 0. Returns the exit status: 0 if nothing failed, else 1.

    Every rank calls this; it starts the processes as a run does.
    """
    args = dataclasses.replace(args, timeout_s=min(args.timeout_s, MEETING_S))
    s = start(args)
    if not s.launched and not is_first_process():
        return leave_to_rank_zero(s)
    try:
        look(s)
        failed = any(finding.verdict == "failed" for finding in s.findings.values())
        if s.ranks.rank == 0:
            show(s)
        return int(failed)
    finally:
        clean(s)


def start(args: RunArgs) -> PreflightContext:
    """Start or join the processes if the devices fit the flags; else record why not."""
    s = PreflightContext(args, Ranks(None, timedelta(seconds=args.timeout_s)))
    folder = s.folder.absolute()
    s.new_folders = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        s.kind = device_kind(args)
        placement = choose_placement(args)
        s.devices = placement.devices
    except ValueError as error:
        s.shape_fault = str(error)
        return s
    if args.train.only_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        if s.kind == "cuda":
            s.nccl_logs = ask_for_log()
        fabric = build_fabric(args, placement)
        s.ranks = Ranks(fabric, timedelta(seconds=args.timeout_s))
    except Exception as error:
        s.launch_fault = describe(error)
    return s


def leave_to_rank_zero(s: PreflightContext) -> int:
    """On another rank that cannot join: print why, and give rank 0 the time to check what it can."""
    fault = s.shape_fault or s.launch_fault
    who = f"rank {rank_name()} (host {socket.gethostname()})"
    print(f"preflight: {who} cannot start: {fault}", file=sys.stderr, flush=True)
    time.sleep(FAREWELL_S)
    return 1


def look(s: PreflightContext) -> None:
    """Check every item, also after one has failed."""
    for i, (name, item) in enumerate(ITEMS):

        def give_up(outcomes: list[Outcome[Any]], name: str = name, later: int = i + 1) -> NoReturn:
            """The ranks would wait for each other forever: print the findings so far, and end this process."""
            s.findings[name] = Finding("failed", faults(outcomes), "fix this rank first; the others are blocked on it")
            for skipped, _ in ITEMS[later:]:
                s.findings[skipped] = Finding("skipped", f"lost the ranks during: {name}")
            end_stuck(s)

        s.give_up = give_up
        try:
            s.findings[name] = item(s)
        except ItemFailed as failure:
            s.findings[name] = Finding("failed", *failure.args)
        except RankLostError as error:
            give_up([s.ranks.failed(str(error))])
        except Exception as error:
            s.findings[name] = Finding("failed", describe(error), "see the message")


def end_stuck(s: PreflightContext) -> NoReturn:
    if s.ranks.rank == 0:
        show(s)
    clean(s)
    sys.stdout.flush()
    try:
        s.ranks.gather(None)  # the others wait for the table: the first to end may end all
    except RankLostError:
        time.sleep(1.0)
    os._exit(1)


def show(s: PreflightContext) -> None:
    """Print the table, and below it one unbroken line with advice for each item that is not ok."""
    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=False)
    table = Table(title=f"Preflight: {s.world_size} x {s.kind or s.args.accelerator}", show_lines=True)
    table.add_column("item", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("measured", overflow="fold")
    for name, finding in s.findings.items():
        table.add_row(name, Text(finding.verdict, COLOURS[finding.verdict]), Text(finding.measured))
    console.print(table)
    for name, finding in s.findings.items():
        if finding.verdict != "ok":
            advice = f" -> {finding.advice}" if finding.advice else ""
            console.print(Text(f"{finding.verdict:8} {name}: {finding.measured}{advice}"), soft_wrap=True)
    counts = {v: sum(f.verdict == v for f in s.findings.values()) for v in COLOURS}
    console.print(Text("preflight: " + ", ".join(f"{n} {v}" for v, n in counts.items())), soft_wrap=True)


def clean(s: PreflightContext) -> None:
    """Remove the temporary files, and new folders that are empty. On every rank: where out_dir is not shared, each node
    has its own."""
    if s.nccl_logs is not None:
        shutil.rmtree(s.nccl_logs, ignore_errors=True)
    s.holding.close()
    if s.scratch is not None:
        shutil.rmtree(s.scratch, ignore_errors=True)
    for folder in s.new_folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
