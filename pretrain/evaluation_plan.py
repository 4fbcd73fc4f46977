"""Tasks and prompts that a run evaluates between steps, and when; read and encoded before the first step."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_data.corpus.readers import read_documents
from lit_data.loading.order import Segment, first_sample_of_step
from lit_data.packed.reader import PackedDataset
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_eval.model.likelihood import Span
from lit_eval.model.text_encoder import TextEncoder
from lit_eval.model.text_encoding import Encoding, encode_prompt, encode_texts, first_token
from lit_eval.run_facts import EVALUATION_COLUMN
from lit_eval.score.task_files import Task
from lit_eval.score.tasks import find_task
from lit_files.publish import replace_file
from lit_files.reading import regular
from pretrain.args import EvalArgs
from pretrain.logs.messages import warn


@dataclass
class Encoded:
    """Ids of texts, computed once: a TextEncoder's `encode`."""

    tokenizer: Tokenizer
    encoding: Encoding
    ids: dict[str, list[int]] = field(default_factory=dict)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        new = [text for text in texts if text not in self.ids]
        self.ids.update(zip(new, encode_texts(self.tokenizer, new, self.encoding), strict=True))
        return [self.ids[text] for text in texts]


@dataclass
class Evaluation:
    """The tasks and prompts evaluated during a run.

    Attributes:
        encoder: holds the ids of every text of the tasks.
        prompts: texts and their ids.
        sample_tokens: to write after each, as many as fit.
        excluded_ids: ids without a token, never written.
    """

    args: EvalArgs
    tasks: list[Task]
    encoder: TextEncoder
    tokenizer: Tokenizer
    prompts: list[tuple[str, list[int]]]
    sample_tokens: int
    excluded_ids: list[int]

    @property
    def columns(self) -> list[str]:
        return [EVALUATION_COLUMN + task.name for task in self.tasks]


def open_evaluation(args: EvalArgs, dataset: PackedDataset, vocab_size: int, block_size: int) -> Evaluation | None:
    """Read and encode the tasks and prompts; None if there are none. `dataset` is the training data, whose tokenizer
    and encoding are the model's.

    Raises ValueError or OSError that names the flag, the file and the fault.
    """
    if not args.tasks and args.prompts is None:
        return None
    if dataset.tokenizer_folder is None:
        raise ValueError(f"--eval.tasks and --eval.prompts need a tokenizer, and {dataset.path} has none beside it")
    tokenizer = open_tokenizer(dataset.tokenizer_folder)
    encoding = Encoding(dataset.manifest.bos_id, dataset.manifest.special_tokens)
    encoder = TextEncoder(Encoded(tokenizer, encoding), encoding.bos_id, first_token(tokenizer, encoding))
    tasks: list[Task] = []
    for given in args.tasks:
        try:
            task = find_task(given)
        except (ValueError, OSError) as error:
            raise ValueError(f"--eval.tasks: {error}") from error
        if task.name in (other.name for other in tasks):
            raise ValueError(f"--eval.tasks: two tasks are named {task.name}")
        if args.max_items is not None:
            task = task.evenly_spaced(args.max_items)
        # This computes and keeps the ids.
        spans = iter(encoder.spans([candidate for item in task.items for candidate in item.candidates]))
        fitting = [[_fits(next(spans), block_size) for _ in item.candidates] for item in task.items]
        if not any(all(item) for item in fitting):
            raise ValueError(f"--eval.tasks {given}: no item fits the model's context of {block_size} tokens")
        tasks.append(task)
    prompts: list[tuple[str, list[int]]] = []
    if args.prompts is not None:
        for document in read_documents([args.prompts], split_documents="line", text_field="prompt"):
            ids = encode_prompt(tokenizer, document.text, encoding)
            if len(ids) >= block_size:
                raise ValueError(
                    f"--eval.prompts {args.prompts}: a prompt of {len(ids)} tokens leaves no room in the context of "
                    f"{block_size} tokens"
                )
            prompts.append((document.text, ids))
        if not prompts:
            raise ValueError(f"--eval.prompts {args.prompts} holds no prompt")
    excluded = [id for id in range(vocab_size) if tokenizer.id_to_token(id) is None]
    room = block_size - max((len(ids) for _, ids in prompts), default=0)
    return Evaluation(args, tasks, encoder, tokenizer, prompts, min(args.sample_tokens, room), excluded)


def _fits(span: Span | None, block_size: int) -> bool:
    return span is not None and len(span.continuation) <= block_size


def is_due(args: EvalArgs, segments: Sequence[Segment], block_size: int, step: int, max_steps: int) -> bool:
    """Whether tasks and prompts are evaluated after `step` steps, by steps or tokens (for words see
    pretrain/word_budgets.py): a pure function, the same on every rank and after every resume."""
    if step in (0, max_steps):
        return True
    if args.tasks_every_tokens is None:
        return step % (args.tasks_every_steps or args.every_steps) == 0
    before, now = (first_sample_of_step(segments, s)[0] * block_size for s in (step - 1, step))
    return now // args.tasks_every_tokens > before // args.tasks_every_tokens


def cut_evaluations(path: Path, step: int, *, again: bool) -> None:
    """Drop the lines after `step` (if `again`, those of `step` too), and damaged ones, as a kill leaves the last.

    Disk errors and damage are warnings: a run can be resumed without this file.
    """
    if not os.path.lexists(path):
        return
    try:
        lines = regular(path).read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step - again]
        if len(kept) < len(lines):
            with replace_file(path) as temporary:
                temporary.write_bytes(b"".join(kept))
    except (OSError, ValueError) as error:
        warn(f"{path} could not be cut back to step {step}: {error}")


def _step_of(line: bytes) -> int | None:
    """The step of a whole line; None for a damaged one."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else None
