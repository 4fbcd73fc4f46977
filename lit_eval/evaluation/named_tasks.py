"""Named tasks of --tasks that need more than a file of items.

To add one, add it to NAMED_JOBS and to TASK_NAMES (lit_eval/evaluation/settings.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_eval.evaluation.babylm_tasks import PREFIX as BABYLM
from lit_eval.evaluation.babylm_tasks import babylm_jobs
from lit_eval.evaluation.generated_text import GENERATION_JOBS
from lit_eval.evaluation.jobs import Evaluation, Job, job_of_task, needs_tokenizer
from lit_eval.evaluation.settings import TASK_NAMES, EvaluationSettings
from lit_eval.evaluation.synthetic import model_and_generator, synthetic_text
from lit_eval.evaluation.text_data import PERPLEXITY, jobs_of_data, validation_jobs
from lit_eval.score.babylm_data import read_babylm
from lit_eval.score.harness import ALIASES, PREFIX, data_files, run_harness
from lit_eval.score.results import Result
from lit_eval.score.tasks import find_task
from lit_files.checksum import file_sha256

MakeJob = Callable[[str, Path, EvaluationSettings], Job]
"""A task's name as given, the checkpoint or Hugging Face folder, and the settings -> the job. Raises ValueError if the
task cannot be done for it."""


def _synthetic(name: str, model: Path, given: EvaluationSettings) -> Job:
    path, _ = synthetic_text(model)
    source = {"file": str(path.resolve()), "sha256": file_sha256(path)}
    return Job(name, model_and_generator, source, settings=("num_samples",))


def _lm_eval(name: str, model: Path, given: EvaluationSettings) -> Job:
    task = name.removeprefix(PREFIX)

    def run(evaluation: Evaluation) -> Result:
        return run_harness(
            evaluation.model,
            task,
            data=given.lm_eval_data,
            tasks=given.lm_eval_tasks,
            num_fewshot=given.num_fewshot,
            limit=given.num_samples,
            batch_tokens=given.batch_tokens,
        )

    source: dict[str, Any] = {}
    if given.lm_eval_data is not None:
        files = data_files(given.lm_eval_data, ALIASES.get(task, task))
        source = {split: file_sha256(file) for split, file in files.items()}
    return Job(name, run, source, ("num_samples", "num_fewshot"), lambda opened: needs_tokenizer(opened, name))


NAMED_JOBS: dict[str, MakeJob] = {
    **GENERATION_JOBS,
    "synthetic": _synthetic,
}
PREFIXED_JOBS: dict[str, MakeJob] = {
    "lm_eval": _lm_eval,
}
"""Tasks `PREFIX:NAME`."""


def check_given(settings: EvaluationSettings) -> None:
    """Check tasks and data as far as that needs no model. Raises as `find_jobs` does."""
    jobs_of_data(settings)
    for given in settings.tasks:
        if given.startswith(f"{BABYLM}:"):
            read_babylm(Path(given.removeprefix(f"{BABYLM}:")))
        elif not (given == PERPLEXITY or given in NAMED_JOBS or given.partition(":")[0] in PREFIXED_JOBS):
            find_task(given, TASK_NAMES)


def find_jobs(model: Path, settings: EvaluationSettings) -> list[Job]:
    """The jobs for a checkpoint or Hugging Face folder, in the order requested.

    Raises ValueError or FileNotFoundError: an unknown task (with the nearest names), a fault in a file, missing data,
    a task that cannot be done for the model.
    """
    jobs = jobs_of_data(settings)
    if not settings.tasks and not jobs:
        jobs = validation_jobs(model, settings)
    for given in dict.fromkeys(settings.tasks):
        prefix, colon, _ = given.partition(":")
        if given == PERPLEXITY:
            jobs += [] if settings.data else validation_jobs(model, settings)
        elif given in NAMED_JOBS:
            jobs.append(NAMED_JOBS[given](given, model, settings))
        elif colon and prefix in PREFIXED_JOBS:
            jobs.append(PREFIXED_JOBS[prefix](given, model, settings))
        elif colon and prefix == BABYLM:
            jobs += babylm_jobs(given, model, settings)
        else:
            jobs.append(job_of_task(find_task(given, TASK_NAMES)))
    names = [job.name for job in jobs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"--tasks has two tasks named {repeated}: rename one of the files")
    return jobs
