"""Writes RUN/report.html at the end of a run, in which the settings that differ from the defaults come first."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from lit_eval.report.run_report import run_report
from lit_files.publish import write_text
from pretrain.args import RunArgs, plain
from pretrain.logs.messages import say, warn

FILE = "report.html"  # in the run folder


def default_settings(section: type = RunArgs, prefix: str = "") -> dict[str, Any]:
    """Flag -> default of every setting, as config.yaml would hold it; None for one that has none."""
    found: dict[str, Any] = {}
    hints = get_type_hints(section)
    for f in dataclasses.fields(section):
        kind = hints.get(f.name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found |= default_settings(kind, f"{prefix}{f.name}.")
        elif f.default is not dataclasses.MISSING:
            found[prefix + f.name] = plain(f.default)
        else:
            made = None if f.default_factory is dataclasses.MISSING else f.default_factory()
            found[prefix + f.name] = plain(made)
    return found


def write_report(run: Path) -> None:
    """Write the report of a run that has ended, and print where. A failure is a warning: the run itself is complete."""
    try:
        write_text(run / FILE, run_report(run, default_settings()))
    except Exception as error:  # also what a damaged file or a library's defect may raise
        warn(f"the report of {run} could not be written ({error}); try python scripts/report.py {run}")
    else:
        say(f"report: {run / FILE}")
