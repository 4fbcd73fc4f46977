"""Evaluation during training: tasks (docs/evaluation.md) and continuations of prompts, between two steps.

An evaluation does not affect training: neither random state nor parameters nor the prefetched data change. Its results
go to metrics.csv, one column a task, and in full to RUN/evaluations.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_eval.generation.text import text_of
from lit_eval.model.likelihood import Scorer, score_targets
from lit_eval.run_facts import EVALUATION_COLUMN
from lit_eval.score.results import Result
from lit_eval.score.tasks import run_task
from lit_files.run_files import EVALUATIONS
from lit_model.generate import generate_batch
from lit_model.sampling import Sampling
from pretrain.evaluation_plan import Evaluation
from pretrain.logs.messages import warn
from pretrain.logs.metrics import append
from pretrain.run import Run


class Stopped(Exception):
    """The ranks have agreed to stop, in the same batch."""


class _Ranks:
    """The ranks of a run; see lit_eval.model.likelihood.Ranks."""

    def __init__(self, run: Run) -> None:
        self.rank, self.size = run.fabric.global_rank, run.world_size

    def gather(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


class _Forward:
    """The run's model as a Scorer calls it.

    Except under FSDP, whose forward is a collective, an error is kept, and the remaining batches are left out: the
    ranks still meet at every batch, and agree about the error at the end.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.error: str | None = None

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        run = self.run
        if self.error is None:
            try:
                with run.placement.autocast():
                    scores: Tensor = run.raw_model(tokens, targets, head=score_targets)
                return scores
            except Exception as error:
                if run.placement.fsdp:
                    raise
                self.error = describe_error(error)
        return torch.zeros(2, *tokens.shape, device=tokens.device)


def evaluate(
    run: Run, evaluation: Evaluation, check_stop: Callable[[], bool], on_phase: Callable[..., None]
) -> dict[str, float]:
    """Run the tasks and continue the prompts. Returns the columns of metrics.csv.

    One that fails is left out with a warning, on every rank alike.

    Args:
        check_stop: called before each batch, a collective; true if the ranks have agreed to stop.
        on_phase: called with a name, and the numbers of batches done and of all.

    Raises Stopped if the ranks have agreed to stop; nothing is written then.
    """
    run.model.eval()
    ranks = _Ranks(run)
    batch_rows = evaluation.args.micro_batch_samples or run.args.train.micro_batch
    columns: dict[str, float] = {}
    lines: list[dict[str, Any]] = []
    with _without_compiling(run):
        for task in evaluation.tasks:

            def on_batch(done: int, total: int, name: str = task.name) -> None:
                if check_stop():
                    raise Stopped
                on_phase(f"evaluating {name}", done, total)

            forward = _Forward(run)
            scorer = Scorer(forward, run.data.block_size, batch_rows * run.data.block_size, run.device, ranks, on_batch)
            result, fault = None, None
            try:
                result = run_task(task, scorer, evaluation.encoder)
            except ValueError as error:  # of the items: every rank finds the same
                fault = str(error)
            fault = next((found for found in ranks.gather(forward.error or fault) if found is not None), None)
            if fault is not None or result is None:
                run.say(f"warning: step {run.step}: the evaluation {task.name} failed and is left out: {fault}")
                continue
            columns[EVALUATION_COLUMN + task.name] = headline(result)
            lines.append({"task": task.name, **dataclasses.asdict(dataclasses.replace(result, items=[]))})
        if evaluation.prompts:
            if check_stop():
                raise Stopped
            on_phase("generating", None, None)
            lines += _samples(run, evaluation, ranks)
    if ranks.rank == 0 and lines:
        facts = {"step": run.step, "tokens": int(run.tokens.item())}
        text = "".join(json.dumps(facts | line, ensure_ascii=False) + "\n" for line in lines)
        try:
            with (run.folder / EVALUATIONS).open("ab", buffering=0) as file:
                append(file, text.encode("utf-8"))
        except OSError as error:
            warn(f"step {run.step}: {EVALUATIONS} could not be written: {error}")
    return columns


def _samples(run: Run, evaluation: Evaluation, ranks: _Ranks) -> list[dict[str, Any]]:
    """Continue the prompts, on every rank alike: under FSDP each forward is a collective, so that all texts are
    written to their full length and cut at their end afterwards."""
    args = evaluation.args
    written: list[dict[str, Any]] = []
    fault = None
    try:
        with _generation_precision(run):
            found = generate_batch(
                *(run.raw_model, [ids for _, ids in evaluation.prompts], evaluation.sample_tokens),
                Sampling(temperature=args.sample_temperature),
                seeds=[run.args.seed + i for i in range(len(evaluation.prompts))],
                eos_id=None if run.placement.fsdp else evaluation.tokenizer.eos_id,
                excluded_ids=evaluation.excluded_ids,
            )
        for (prompt, before), continuation in zip(evaluation.prompts, found, strict=True):
            ids = list(continuation.ids)
            ended = evaluation.tokenizer.eos_id in ids
            ids = ids[: ids.index(evaluation.tokenizer.eos_id)] if ended else ids
            written.append({"prompt": prompt, "text": text_of(evaluation.tokenizer, before, ids), "ended": ended})
    except Exception as error:
        if run.placement.fsdp:
            raise
        fault = describe_error(error)
    fault = next((other for other in ranks.gather(fault) if other is not None), None)
    if fault is not None:
        run.say(f"warning: step {run.step}: the prompts could not be continued: {fault}")
        return []
    return written


def _generation_precision(run: Run) -> AbstractContextManager[Any]:
    """Under FSDP the weights are cast to the policy's type, which the key/value cache follows under autocast only."""
    if run.placement.fsdp and run.placement.dtype != torch.float32:
        return torch.autocast(run.device.type, run.placement.dtype)
    return run.placement.autocast()


def _without_compiling(run: Run) -> AbstractContextManager[Any]:
    """Batches of an evaluation have many shapes: each would recompile every block."""
    return torch.compiler.set_stance("force_eager") if run.args.compile else nullcontext()


def describe_error(error: BaseException) -> str:
    """In one line. Memory of the device that a failed forward held is given back."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def headline(result: Result) -> float:
    """The number to show for a task: the macro average where there is one, or else the first metric."""
    return result.metrics.get("accuracy_macro", next(iter(result.metrics.values())))
