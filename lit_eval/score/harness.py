"""lm-evaluation-harness on our checkpoints, without converting them: `--tasks lm_eval:NAME`.

Needs the package `lm-eval` (the extra `eval`). Texts are encoded as the exported tokenizer would encode them, so the
numbers are those of the harness' own Hugging Face backend on the exported folder.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_eval.model.eval_model import EvalModel
from lit_eval.model.likelihood import Span
from lit_eval.score.results import Group, Result
from lit_files.checksum import file_sha256
from lit_files.near_names import did_you_mean
from lit_model.generate import generate_batch
from lit_model.sampling import Sampling

PREFIX = "lm_eval:"
ALIASES = {"belebele_deu": "belebele_deu_Latn", "multiblimp_de": "multiblimp_deu"}
SPLITS = ("train", "validation", "test", "dev")
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
WITHOUT_PACKAGE = "the tasks of lm-evaluation-harness need the package lm-eval: pip install 'llammlein[eval]'"


def harness_model(model: EvalModel, batch_tokens: int = 16384) -> Any:
    """An `lm_eval.api.model.LM` of a model: pass it to `lm_eval.simple_evaluate(model=...)`.

    Args:
        batch_tokens: most tokens of a batch when texts are scored.

    Raises ValueError if lm-eval is not installed or the model has no tokenizer.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    except ImportError as error:
        raise ValueError(WITHOUT_PACKAGE) from error

    tokenizer = model.need_tokenizer()
    scorer = model.scorer(batch_tokens)
    block_size = model.config.block_size

    class Native(TemplateLM):  # type: ignore[misc]
        """Names and semantics are those of lm_eval.models.huggingface.HFLM."""

        max_length = block_size

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            prefix = model.prefix_id()
            assert prefix is not None
            return prefix

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = model.encode([string])[0]
            bos = model.encoding.bos_id
            return [bos, *ids] if bos is not None and add_special_tokens is not False else ids

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            scores = scorer.score([Span(context, continuation) for _, context, continuation in requests])
            return [(score.total, score.greedy) for score in scores]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            documents = [self.tok_encode(request.args[0]) for request in requests]
            found = scorer.score_documents(documents, self.prefix_token_id)
            return [sum(window.total for window in windows) for windows in found]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return [self._continue(*request.args) for request in requests]

        def _continue(self, context: str, settings: dict[str, Any]) -> str:
            given = normalize_gen_kwargs(settings, 256)
            eos = tokenizer.decode([tokenizer.eos_id])
            until = [text for text in handle_stop_sequences(given["until"], eos or None) if text]
            most = min(int(given["max_gen_toks"]), block_size - 1)
            prompt = (self.tok_encode(context) or [self.prefix_token_id])[most - block_size :]
            sampling = Sampling(
                temperature=float(given.get("temperature") or 0.0),
                top_k=given.get("top_k"),
                top_p=given.get("top_p"),
                repetition_penalty=float(given.get("repetition_penalty") or 1.0),
            )

            def ends(_: int, ids: list[int]) -> bool:
                return any(text in tokenizer.decode(ids) for text in until)

            with model.autocast():
                (found,) = generate_batch(
                    *(model.model, [prompt], most, sampling),
                    eos_id=tokenizer.eos_id,
                    excluded_ids=model.excluded_ids,
                    stop=ends if until else None,
                )
            ids = found.ids[:-1] if found.ids[-1:] == [tokenizer.eos_id] else found.ids
            written = tokenizer.decode(ids)
            for text in until:
                written = written.split(text)[0]
            return written

    return Native()


def run_harness(
    model: EvalModel,
    name: str,
    *,
    data: Path | None = None,
    tasks: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_tokens: int = 16384,
) -> Result:
    """Run a task, group or tag of lm-evaluation-harness.

    Args:
        name: as in the harness, or one of ALIASES.
        data: folder with the items, read in place of the hub: NAME.jsonl (.parquet, .csv) for all splits, or a folder
            NAME with train, validation, test, dev of these endings; NAME is that of the task.
        tasks: folder with more task files (YAML).
        limit: score at most this many items of each task.

    Returns:
        Metrics under the harness' names; the first is that of the group, or the mean over tasks of a tag. Groups:
        `task`, one entry each.

    Raises ValueError for an unknown task (with near names), missing data, or without the package lm-eval.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise ValueError(WITHOUT_PACKAGE) from error
    manager = task_manager(tasks)
    name = ALIASES.get(name, name)
    entry = manager.task_index.get(name)
    if entry is None:
        raise ValueError(f"lm-evaluation-harness has no task {name}{did_you_mean(name, manager.task_index)}")
    source: dict[str, Any] = {"task": name, "lm_eval": lm_eval.__version__}
    overrides = None
    if data is not None:
        files = data_files(data, name)
        overrides = {
            "dataset_path": READERS[next(iter(files.values())).suffix],
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
        }
        source |= {split: file_sha256(path) for split, path in files.items()}
    try:
        # The public method (TaskManager.load) takes no overrides for tasks it knows.
        built = manager._factory.build(entry, overrides=overrides, registry=manager._index)
        found = lm_eval.simple_evaluate(
            model=harness_model(model, batch_tokens),
            tasks=built if isinstance(built, list) else [built],
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "" if data is not None else f"; give its data with --lm_eval_data FOLDER (FOLDER/{name}.jsonl)"
        raise ValueError(f"the task {name} of lm-evaluation-harness cannot be run: {reason}{hint}") from error
    return result_of(found, name, source, {"num_fewshot": num_fewshot, "limit": limit})


@functools.cache
def task_manager(tasks: Path | None = None) -> Any:
    """The harness' own tasks and those of a folder. Reading them takes some seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks) if tasks is not None else None)


def data_files(folder: Path, name: str) -> dict[str, Path]:
    """Split -> file of a task's local data. Raises ValueError naming what is expected."""
    for ending in READERS:
        if (folder / f"{name}{ending}").is_file():
            return dict.fromkeys(SPLITS, folder / f"{name}{ending}")
    found = {
        split: folder / name / f"{split}{ending}"
        for split in SPLITS
        for ending in READERS
        if (folder / name / f"{split}{ending}").is_file()
    }
    if not found:
        raise ValueError(
            f"{folder} has no data for {name}: {name}.jsonl (or .parquet, .csv), or a folder {name} with test.jsonl"
        )
    return found


def result_of(found: dict[str, Any], name: str, source: dict[str, Any], settings: dict[str, Any]) -> Result:
    """The results of `lm_eval.simple_evaluate` in our form."""
    by_task = {task: numbers(row) for task, row in found["results"].items()}
    tasks = {task: row for task, row in by_task.items() if task in found["samples"]}
    counts = {task: len({sample["doc_id"] for sample in found["samples"][task]}) for task in tasks}
    metrics = by_task.get(name) or mean_over(list(tasks.values()))
    first = next((metric for metric in ("acc", "exact_match", *metrics) if metric in metrics), None)
    if first is not None:
        metrics = {first: metrics[first], **metrics}
    samples = [sample for task in tasks for sample in found["samples"][task]]
    items = [float(sample[first]) for sample in samples if first in sample and is_number(sample[first])]
    return Result(
        kind="lm_eval",
        n=sum(counts.values()),
        metrics=metrics,
        groups={"task": {task: Group(counts[task], row) for task, row in tasks.items()}} if len(tasks) > 1 else {},
        items=items if len(items) == len(samples) else [],
        source=source,
        settings=settings,
    )


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """`acc,none` -> `acc`; names of filters stay for those that have one."""
    return {
        key.removesuffix(",none").replace(",", "/"): float(value)
        for key, value in row.items()
        if is_number(value) and "," in key
    }


def mean_over(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric that all have."""
    shared = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    return {name: sum(row[name] for row in rows) / len(rows) for name in shared}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
