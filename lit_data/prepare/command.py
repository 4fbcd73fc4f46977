"""One call of scripts/prepare_data.py: a complete preparation in this process, one stage of it, or all stages on an
executor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_data.corpus.readers import OnError
from lit_data.prepare.executors import run_on_executors
from lit_data.prepare.run import Stage, prepare, run_stage
from lit_files.cores import usable_cores


@dataclass(frozen=True)
class Execution:
    """Execution options of a preparation; none of them changes the datasets. The fields are flags of the script."""

    output: Path
    """Folder to write; it must not exist."""
    on_error: OnError = "stop"
    """On invalid UTF-8 or JSON, or a document without text: stop with an error, or skip and count the document."""
    workers: int | None = None
    """Processes, with --executor those of each task. Default: all cores (1 with --executor)."""
    overwrite: bool = False
    """Replace an OUTPUT that this program wrote, once the new one is complete."""
    fresh: bool = False
    """Discard the work of an interrupted call instead of resuming it."""
    dry_run: bool = False
    """Process everything and report, but write nothing."""
    work: Path | None = None
    """Working folder, on the file system of OUTPUT. Default: .OUTPUT.preparing beside it."""
    commit_seconds: float = 30.0
    """Seconds between commits; a kill loses at most this much work."""
    stage: Stage | None = None
    """Run only this stage, of part --part if it is one of hash and encode."""
    part: int = 0
    """Part that --stage works on, from 0."""
    executor: Literal["local", "slurm"] | None = None
    """Run the stages as tasks of datatrove's executors."""
    tasks: int | None = None
    """Tasks of --executor at the same time. Default: --parts."""
    executor_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the executor, such as '{"time": "10:00:00", "partition": "cpu", "cpus_per_task": 16}'."""

    def __post_init__(self) -> None:
        if self.executor is not None and self.stage is not None:
            raise ValueError("--executor and --stage exclude each other: the executor runs all stages")
        if self.dry_run and (self.executor is not None or self.stage is not None):
            raise ValueError("--dry_run processes the whole corpus on this machine: remove --executor and --stage")


def carry_out(execution: Execution, settings: dict[str, Any]) -> str:
    """Prepare data. `settings`: the fields of `Settings` that were given. Returns a human-readable report; empty when
    the tasks of an executor print their own. Raises what `prepare` raises.
    """
    rest = dict(settings)
    call: dict[str, Any] = {
        "inputs": rest.pop("input"),
        "tokenizer_path": rest.pop("tokenizer"),
        "val_inputs": rest.pop("val_input", None),
        "output": execution.output,
        "on_error": execution.on_error,
        "overwrite": execution.overwrite,
        "work": execution.work,
        "commit_seconds": execution.commit_seconds,
        **rest,
    }
    if execution.executor is not None:
        call |= {"workers": execution.workers or 1, "tasks_at_once": execution.tasks or settings.get("parts", 1)}
        run_on_executors(execution.executor, **call, executor=execution.executor_args)
        return ""
    call["workers"] = execution.workers if execution.workers is not None else usable_cores()
    if execution.stage is not None:
        report = run_stage(execution.stage, execution.part, **call)
        return report.summary() if report is not None else f"{execution.stage}: part {execution.part} is done"
    return prepare(**call, fresh=execution.fresh, dry_run=execution.dry_run).summary()
