"""Runs the stages of a preparation as tasks of datatrove's executors: local processes or SLURM jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_data.prepare.run import Stage, run_stage, work_folder

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class StageStep:
    """A datatrove pipeline of one step: a stage, whose part is the task's rank.

    Attributes:
        stage: see `lit_data.prepare.run.run_stage`.
        arguments: of `run_stage`, except stage and part.
    """

    stage: Stage
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        report = run_stage(self.stage, rank, **self.arguments)
        if report is not None:
            print(report.summary())


def run_on_executors(
    kind: Literal["local", "slurm"],
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    tasks_at_once: int,
    executor: dict[str, Any] | None = None,
    **arguments: Any,
) -> None:
    """Run or submit all stages, each after the one before; one task per part where parts are independent.

    Args:
        kind: `local` returns when all stages are done, `slurm` once the jobs are submitted.
        tasks_at_once: number of tasks that run in parallel.
        executor: extra arguments of datatrove's LocalPipelineExecutor or SlurmPipelineExecutor, e.g. time, partition,
            cpus_per_task, sbatch_args.
        arguments: of `lit_data.prepare.run.run_stage`.

    Raises:
        ValueError: datatrove is not installed, it does not know an argument, or a task failed.
    """
    try:
        from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    except ImportError as error:
        raise ValueError(f"--executor {kind} needs datatrove: pip install 'llammlein[data]' ({error})") from error
    call = {"inputs": inputs, "tokenizer_path": tokenizer_path, "output": output, **arguments}
    parts = int(arguments.get("parts", 1))
    stages: list[tuple[Stage, int]] = [("encode", parts), ("merge", 1)]
    if arguments.get("dedup", "none") == "exact" or arguments.get("near_dedup"):
        stages = [("hash", parts), ("join", 1), *stages]
    work = Path(arguments.get("work") or work_folder(Path(output).absolute()))
    given = dict(executor or {})
    given.setdefault("logging_dir", str(work.with_name(f"{work.name}.logs")))
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
        try:
            last = make(
                pipeline=[StageStep(stage, call)], tasks=tasks, workers=min(tasks, tasks_at_once), depends=last, **own
            )
        except TypeError as error:
            raise ValueError(f"--executor_args: datatrove's {make.__name__} says: {error}") from error
    last.run()
