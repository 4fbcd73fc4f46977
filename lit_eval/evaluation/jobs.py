"""The jobs of an evaluation, one a task; their files are checked before any model is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_eval.evaluation.settings import EvaluationSettings
from lit_eval.model.eval_model import EvalModel
from lit_eval.model.likelihood import Scorer
from lit_eval.model.text_encoder import TextEncoder
from lit_eval.score.results import Result
from lit_eval.score.task_files import Task
from lit_eval.score.tasks import run_task
from lit_files.progress import TaskProgress
from lit_files.run_files import EVALUATION
from lit_model.load import is_hf_folder


@dataclass
class Evaluation:
    """The model being evaluated, and the settings, with a scorer and an encoder made when first needed."""

    model: EvalModel
    settings: EvaluationSettings
    progress: TaskProgress = field(default_factory=lambda: TaskProgress(show=False))

    @cached_property
    def scorer(self) -> Scorer:
        return self.model.scorer(self.settings.batch_tokens, on_batch=self.progress)

    @cached_property
    def encoder(self) -> TextEncoder:
        return self.model.encoder(self.settings.prefix)


@dataclass(frozen=True)
class Job:
    """One task to run.

    Attributes:
        name: in the results.
        run: runs it.
        source: identifies the scored data; part of `Result.source`.
        settings: names of the EvaluationSettings that change its numbers.
        prepare: called once the model is open; raises ValueError if the task cannot be run on it.
        warnings: about the data, whatever the model.
    """

    name: str
    run: Callable[[Evaluation], Result]
    source: dict[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ("num_samples", "prefix")
    prepare: Callable[[EvalModel], None] = lambda model: None
    warnings: tuple[str, ...] = ()

    def settings_of(self, settings: EvaluationSettings) -> dict[str, Any]:
        """The settings that change the task's numbers, as kept with its result."""
        given = dataclasses.asdict(settings)
        found = {name: given[name] for name in self.settings if given[name] not in (None, ())}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
        return {"precision": settings.precision, **plain}


def job_of_task(task: Task) -> Job:
    """The job of scoring a task's items."""

    def run(evaluation: Evaluation) -> Result:
        n = evaluation.settings.num_samples
        return run_task(task if n is None else task.evenly_spaced(n), evaluation.scorer, evaluation.encoder)

    source = {"file": task.file, "sha256": task.sha256}
    return Job(task.name, run, source, prepare=lambda model: needs_tokenizer(model, task.file))


def needs_tokenizer(model: EvalModel, what: str) -> None:
    """Raises ValueError if the model has no tokenizer. `what`: names the task or data that needs it."""
    if model.tokenizer is None:
        raise ValueError(f"{model.path} has no tokenizer files, which {what} needs: give --tokenizer FOLDER")


def default_output(model: Path) -> Path:
    """RUN/evaluation/iter-00001000-ckpt.json for a checkpoint; evaluation/NAME.json for a Hugging Face folder."""
    if is_hf_folder(model):
        return Path(EVALUATION) / f"{model.resolve().name}.json"
    return model.parent / EVALUATION / f"{model.name.removesuffix('.pth')}.json"
