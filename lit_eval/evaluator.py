"""A model in a notebook: perplexity, minimal pairs, tasks and generated texts in one line each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lit_eval.generation.settings import GenerationSettings
from lit_eval.generation.text import generate_texts
from lit_eval.model.choices import Prefix
from lit_eval.model.eval_model import EvalModel, open_model
from lit_eval.score.perplexity import Text, perplexity
from lit_eval.score.results import Result
from lit_eval.score.task_files import Task, task_of_records
from lit_eval.score.tasks import find_task, run_task
from lit_model.sampling import Sampling


class Evaluator:
    """A run (its newest checkpoint), a checkpoint or a Hugging Face folder, opened for evaluation.

    Args:
        tokenizer: folder or file; by default the model's own.
        device: a torch device; by default cuda where there is one.
        precision: fp32, or bf16 or fp16 by autocast.
        prefix: the token before a text that nothing else precedes: auto, bos, eos or none; see `EvalModel.prefix_id`.
        batch_tokens: tokens in a batch, padding included.

    Raises ValueError or FileNotFoundError that names the path and the fault; ValueError if there is no tokenizer.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: str | Path | None = None,
        device: str | None = None,
        precision: str = "fp32",
        prefix: Prefix = "auto",
        batch_tokens: int = 16384,
    ) -> None:
        self.model: EvalModel = open_model(path, tokenizer=tokenizer, device=device, precision=precision)
        self.encoder = self.model.encoder(prefix)
        self.scorer = self.model.scorer(batch_tokens)

    def perplexity(self, texts: Sequence[str]) -> Result:
        """Score texts; `metrics` and `items` (bits per byte of each text) as in lit_eval/score/perplexity.py.

        Raises ValueError if there is no token to score.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = self.model.encode(texts)
        scored = [
            Text(ids, len(text.encode("utf-8")), len(re.split(r"\s+", text)))
            for text, ids in zip(texts, encoded, strict=True)
        ]
        return perplexity(self.scorer, scored, self.encoder.prefix_id)

    def pairs(self, pairs: str | Path | Sequence[tuple[str, str]]) -> Result:
        """Score minimal pairs: a task file, or (good, bad) sentences. `items`: 1 where the good one wins, in order.

        Raises ValueError or FileNotFoundError: a fault in the file, items of another kind, no pair.
        """
        if isinstance(pairs, (str, Path)):
            task = find_task(pairs)
        else:
            records = [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs]
            task = task_of_records(records, "pairs", "the pairs")
        if task.kind != "pairs":
            raise ValueError(f"{task.file} holds items of kind {task.kind}, not minimal pairs")
        return self.task(task)

    def task(self, task: str | Path | Task) -> Result:
        """Run a task by name, or a task file. Raises as `find_task` and `run_task` do."""
        found = task if isinstance(task, Task) else find_task(task)
        return run_task(found, self.scorer, self.encoder)

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 100,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
    ) -> list[str]:
        """Continue each prompt: the new text of each, up to `max_new_tokens` tokens or the end of the document.

        `temperature` 0 takes the most probable token. Each prompt has the same `seed`, independent of the others.

        Raises ValueError for a setting out of range, or a prompt that with the new tokens exceeds the model's context.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
        settings = GenerationSettings(sampling, max_new_tokens, seed=seed, batch_size=batch_size)
        return [written.text or "" for written in generate_texts(self.model, prompts, settings)]
