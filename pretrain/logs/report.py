"""Writes RUN/report.html at the end of a run, in which the settings that differ from the defaults come first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_eval.report.run_report import run_report
from lit_files.publish import write_text
from lit_files.run_files import REPORT
from pretrain.args import RunArgs, plain
from pretrain.cli.fields import REQUIRED, flags_of
from pretrain.logs.messages import say, warn


def default_settings() -> dict[str, Any]:
    """Flag -> default of every setting, as config.yaml would hold it; None for one that has none."""
    return {flag.name: None if flag.default is REQUIRED else plain(flag.default) for flag in flags_of(RunArgs)}


def write_report(run: Path) -> None:
    """Write the report of a run that has ended, and print where. A failure is a warning: the run itself is complete."""
    try:
        write_text(run / REPORT, run_report(run, default_settings()))
    except Exception as error:  # also what a damaged file or a library's defect may raise
        warn(f"the report of {run} could not be written ({error}); try python scripts/report.py {run}")
    else:
        say(f"report: {run / REPORT}")
