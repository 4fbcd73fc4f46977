"""`--tasks babylm:FOLDER`: BabyLM's zero-shot tasks, with predictions laid out as in its pipeline's `results`."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from lit_eval.evaluation.jobs import Evaluation, Job, default_output, needs_tokenizer
from lit_eval.evaluation.settings import EvaluationSettings
from lit_eval.score.babylm import run_babylm, write_predictions
from lit_eval.score.babylm_data import BabylmTask, Set, read_babylm
from lit_eval.score.results import Result
from lit_files.checkpoint_name import budget_name, list_checkpoints
from lit_model.load import Checkpoint, is_hf_folder

PREFIX = "babylm"
_REVISION = re.compile(r"chck_[0-9.]+M")


def babylm_jobs(name: str, model: Path, settings: EvaluationSettings) -> list[Job]:
    """A job for each dataset in `babylm:FOLDER`. One warning names all that are missing there.

    Raises ValueError and FileNotFoundError as `read_babylm`.
    """
    folder = Path(name.removeprefix(f"{PREFIX}:"))
    tasks, missing = read_babylm(folder)
    warnings = (f"{folder} holds no data of {', '.join(missing)}: left out",) if missing else ()
    results = settings.babylm_results
    if results is None:
        output = settings.output if settings.output is not None else default_output(model)
        results = output.parent / PREFIX

    return [
        Job(
            task.name,
            partial(_run, task=task, results=results),
            {"file": str(task.path.resolve()), "sha256": task.sha256},
            ("num_samples",),
            lambda opened: needs_tokenizer(opened, name),
            warnings if task is tasks[0] else (),
        )
        for task in tasks
    ]


def _run(evaluation: Evaluation, task: BabylmTask, results: Path) -> Result:
    model, most = evaluation.model, evaluation.settings.num_samples
    result, predictions = run_babylm(task, evaluation.scorer, model.aligned_encoder(), most)
    if most is None:  # part of the items is no submission
        named, revisions = name_and_revisions(model.path, task.set)
        places = [
            write_predictions(results / named / revision, task, predictions, model.facts.checksum)
            for revision in revisions
        ]
        result.details["predictions"] = [str(place) for place in places]
    return result


def name_and_revisions(model: Path, which: Set) -> tuple[str, list[str]]:
    """The model's name and its revisions in the pipeline's `results`.

    The newest checkpoint of a run, and an exported folder, are `main`. A checkpoint at word budgets is chck_1M and so
    on for the fast set, and for the full set unless it is the newest; another checkpoint has its own name.
    """
    if is_hf_folder(model):
        folder = model.resolve()
        if _REVISION.fullmatch(folder.name):
            return folder.parent.stem, [folder.name]
        return folder.stem, ["main"]
    run = model.resolve().parent
    budgets = [f"chck_{budget_name(words)}" for words in Checkpoint(model).meta.get("word_budgets") or []]
    newest = list_checkpoints(run)[-1:] == [model.resolve()]
    if budgets and (which == "fast" or not newest):
        return run.stem, budgets
    return run.stem, ["main" if newest else model.name.removesuffix("-ckpt.pth")]
