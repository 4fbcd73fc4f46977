"""Evaluates a model, or every checkpoint of runs. Tasks that the results file already has are skipped, and the file is
written after each task."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lit_eval.evaluation.jobs import Evaluation, Job, default_output
from lit_eval.evaluation.named_tasks import check_given, find_jobs
from lit_eval.evaluation.picture import draw
from lit_eval.evaluation.settings import EvaluationSettings
from lit_eval.evaluation.table import samples_of
from lit_eval.model.eval_model import EvalModel, open_model, recorded_checksum
from lit_eval.score.results import Results, read_results
from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_files.nested_run import did_you_mean_run
from lit_files.progress import TaskProgress
from lit_files.publish import write_text
from lit_model.load import Checkpoint, is_hf_folder, resolve

SAMPLES = "generation_samples.txt"
Say = Callable[[str], None]


def say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def evaluate(path: str | Path, settings: EvaluationSettings, say: Say = say_on_stderr) -> tuple[Results, Path]:
    """Evaluate a run's newest checkpoint, a checkpoint or a Hugging Face folder.

    Tasks, data and the file of results are checked before the model is opened.

    Returns the results, and the file that holds them. Raises ValueError or FileNotFoundError that names the fault. An
    interrupted call leaves the tasks done so far in the file, and the same call completes it.
    """
    model = resolve(path)
    output = settings.output if settings.output is not None else default_output(model)
    jobs = find_jobs(model, settings)
    before = _read_earlier(output)
    check_whole(model)
    if before is not None and not settings.overwrite and _is_done(before, jobs, settings, model):
        for job in jobs:
            say(f"{job.name}: done before")
        return before, output
    opened = open_model(model, tokenizer=settings.tokenizer, device=settings.device, precision=settings.precision)
    results = _evaluate(opened, jobs, settings, output, before, say)
    write_views(results, output, say)
    return results, output


def _is_done(before: Results, jobs: Sequence[Job], settings: EvaluationSettings, model: Path) -> bool:
    """Whether every task is done, as far as that can be decided without opening the model."""
    done = all(before.has(job.name, job.source, job.settings_of(settings)) for job in jobs)
    return done and before.model.checksum == recorded_checksum(model)


def _read_earlier(output: Path) -> Results | None:
    try:
        return read_results(output) if output.exists() else None
    except ValueError as error:
        raise ValueError(f"{error}; remove the file, or choose another --output") from error


def check_whole(model: Path) -> None:
    """Compare a checkpoint with its checksums. Raises ValueError naming the damage."""
    if is_hf_folder(model):
        return
    checkpoint = Checkpoint(model)
    if "checksums" in checkpoint.meta and (faults := checkpoint.verify()):
        raise ValueError(f"{faults[0]}; the checkpoint is damaged")


def _evaluate(
    model: EvalModel, jobs: Sequence[Job], settings: EvaluationSettings, output: Path, before: Results | None, say: Say
) -> Results:
    for job in jobs:
        job.prepare(model)
    for warning in dict.fromkeys([*model.warnings, *(warning for job in jobs for warning in job.warnings)]):
        say(f"warning: {warning}")
    results = Results(model.facts, environment=environment(model))
    if before is not None and before.model.checksum == results.model.checksum:
        results.tasks = before.tasks
    elif before is not None:
        say(f"{output} was of other weights: all of its results are replaced")
    evaluation = Evaluation(model, settings, TaskProgress())
    for job in jobs:
        wanted = job.settings_of(settings)
        if not settings.overwrite and results.has(job.name, job.source, wanted):
            say(f"{job.name}: done before")
            continue
        begun = time.monotonic()
        try:
            with evaluation.progress.task(job.name):
                result = job.run(evaluation)
        except KeyboardInterrupt as error:
            error.add_note(f"finished tasks are kept in {output}; repeat the command to run the others")
            raise
        result.source = {**job.source, **result.source}
        if result.settings:  # of the task: constants, or derived from EvaluationSettings
            result.details["settings"] = result.settings
        result.settings = wanted
        result.seconds = time.monotonic() - begun
        results.tasks[job.name] = result
        results.write(output)
        if skipped := result.source.get("n_skipped"):
            why = "; ".join(f"{n} with {reason}" for reason, n in result.source.get("skipped", {}).items())
            say(f"warning: {job.name}: {skipped} of {result.source['n_items']} items were not scored: {why}")
    return results


def write_views(results: Results, output: Path, say: Say = say_on_stderr) -> None:
    """Write the picture beside the results, and the generated texts as generation_samples.txt."""
    try:
        draw(results, output.with_suffix(".png"))
    except ValueError as error:
        say(f"warning: {error}")
    if texts := samples_of(results):
        write_text(output.with_name(SAMPLES), texts)


def environment(model: EvalModel) -> dict[str, Any]:
    """Hardware and versions that computed the numbers."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine()
    return {
        "device": f"{model.device} ({device})",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@dataclass
class RunEvaluation:
    """The results of evaluating every checkpoint of a run.

    Attributes:
        results: of each checkpoint, by step.
        left_out: damaged checkpoints, each with its fault.
    """

    run: Path
    results: list[Results] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)


def without_repeats(say: Say) -> Say:
    """`say`, which leaves out a warning that it has said before."""
    said: set[str] = set()

    def once(text: str) -> None:
        if text not in said:
            say(text)
        if text.startswith("warning: "):
            said.add(text)

    return once


def evaluate_all(runs: Sequence[Path], settings: EvaluationSettings, say: Say = say_on_stderr) -> list[RunEvaluation]:
    """Evaluate every checkpoint of runs, each into RUN/evaluation/; a damaged one is left out with the reason.

    Raises ValueError or FileNotFoundError for a folder without checkpoints, or if no checkpoint can be evaluated; and
    for tasks and data as `evaluate` does, before any checkpoint is read.
    """
    if settings.output is not None:
        raise ValueError("--output goes with one model; --all_checkpoints writes RUN/evaluation/")
    for run in runs:
        if not run.is_dir():
            raise FileNotFoundError(f"no run at {run}: give the folder that training wrote (--out_dir)")
        if not list_checkpoints(run):
            raise ValueError(f"{run} holds no checkpoint (iter-XXXXXXXX-ckpt.pth){did_you_mean_run(run)}")
    check_given(settings)
    say = without_repeats(say)
    found = []
    for run in runs:
        one = RunEvaluation(run)
        checkpoints = list_checkpoints(run)
        for number, checkpoint in enumerate(checkpoints, start=1):
            say(f"{run}: step {checkpoint_step(checkpoint)} ({number}/{len(checkpoints)})")
            try:
                check_whole(checkpoint)
            except (ValueError, OSError) as error:
                one.left_out[checkpoint] = str(error)
                say(f"warning: {checkpoint.name} is left out: {error}")
                continue
            one.results.append(evaluate(checkpoint, settings, say)[0])
        found.append(one)
        if not one.results:
            raise ValueError(f"{run}: none of its checkpoints can be read: {next(iter(one.left_out.values()))}")
    return found
