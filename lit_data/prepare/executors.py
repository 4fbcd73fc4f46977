"""Runs the stages of a preparation as tasks of datatrove's executors: local processes or SLURM jobs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_data.prepare.run import run_stage
from lit_data.prepare.settings import Execution, Settings, Stage

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class StageStep:
    """A datatrove pipeline of one step: a stage, whose part is the task's rank."""

    settings: Settings
    execution: Execution

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        report = run_stage(self.settings, dataclasses.replace(self.execution, part=rank))
        if report is not None:
            print(report.summary())


def run_on_executors(settings: Settings, execution: Execution) -> None:
    """Run or submit all stages, each after the one before; one task per part where parts are independent.

    With `--executor local` this returns when all stages are done, with `slurm` once the jobs are submitted.

    Raises:
        ValueError: datatrove is not installed, it does not know an argument, or a task failed.
    """
    kind = execution.executor
    try:
        from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    except ImportError as error:
        raise ValueError(f"--executor {kind} needs datatrove: pip install 'llammlein[data]' ({error})") from error
    stages: list[tuple[Stage, int]] = [("encode", settings.parts), ("merge", 1)]
    if settings.needs_hashes:
        stages = [("hash", settings.parts), ("join", 1), *stages]
    work = execution.work_folder
    given = {"logging_dir": str(work.with_name(f"{work.name}.logs")), **execution.executor_args}
    if kind == "slurm":
        missing = [k for k in ("time", "partition") if k not in given]
        if missing:
            raise ValueError(f"--executor slurm needs {' and '.join(missing)} in --executor_args")
        given["env_command"] = f"export PYTHONPATH={ROOT}:$PYTHONPATH; {given.get('env_command') or ''}"
    last: Any = None
    for stage, tasks in stages:
        own = {**given, "logging_dir": f"{given['logging_dir']}/{stage}"}
        if kind == "slurm":
            own = {"job_name": f"llammlein-{stage}", **own}
        make = LocalPipelineExecutor if kind == "local" else SlurmPipelineExecutor
        task = dataclasses.replace(execution, executor=None, stage=stage, workers=execution.workers or 1)
        at_once = min(tasks, execution.tasks or settings.parts)
        try:
            last = make(pipeline=[StageStep(settings, task)], tasks=tasks, workers=at_once, depends=last, **own)
        except TypeError as error:
            raise ValueError(f"--executor_args: {make.__name__} of datatrove refuses them: {error}") from error
    last.run()
