"""How fast a model reads a prompt (prefill) and writes a continuation (decode), by batch size."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from lit_eval.model.eval_model import EvalModel
from lit_eval.score.results import Group, Result
from lit_model.generate import stream
from lit_model.sampling import GREEDY

BATCH_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class SpeedSettings:
    """Settings of the timed generations.

    Attributes:
        batch_sizes: rows at a time.
        prompt_tokens, new_tokens: of each row; cut to the model's context.
        repeats: timed generations of each batch size.
        warmup: generations of each batch size before them.
    """

    batch_sizes: tuple[int, ...] = BATCH_SIZES
    prompt_tokens: int = 64
    new_tokens: int = 32
    repeats: int = 3
    warmup: int = 1

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes is {list(self.batch_sizes)}; give whole numbers from 1")
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass
class BatchTimes:
    """Times of one batch size, in seconds.

    Attributes:
        prefill: of each generation: from the call to the first token of every row.
        steps: of each later token of all rows together.
    """

    prefill: list[float]
    steps: list[float]


def time_batch(model: EvalModel, batch: int, settings: SpeedSettings) -> BatchTimes:
    """Time generations of `batch` random prompts. Each token is read by the host before the next one is begun, so the
    clock needs no other synchronization with the device."""
    prompt_tokens, new_tokens = fit(model.config.block_size, settings)
    generator = torch.Generator().manual_seed(0)
    times = BatchTimes([], [])
    for repeat in range(settings.warmup + settings.repeats):
        prompts = torch.randint(model.config.vocab_size, (batch, prompt_tokens), generator=generator).tolist()
        with model.autocast():
            marks = [time.perf_counter()]
            for token in stream(model.model, prompts, new_tokens, GREEDY, excluded_ids=model.excluded_ids):
                if token.row == batch - 1:
                    marks.append(time.perf_counter())
        if repeat >= settings.warmup:
            seconds = np.diff(marks).tolist()
            times.prefill.append(seconds[0])
            times.steps += seconds[1:]
    return times


def fit(block_size: int, settings: SpeedSettings) -> tuple[int, int]:
    """Prompt and new tokens that fit into the context, at least 1 and 2. Raises ValueError for a context below 3."""
    if block_size < 3:
        raise ValueError(f"the model's context of {block_size} tokens is too short to time generation")
    new = min(settings.new_tokens, max(2, block_size // 2))
    return min(settings.prompt_tokens, block_size - new), new


def evaluate_speed(model: EvalModel, settings: SpeedSettings | None = None) -> Result:
    """Time prefill and decode for each batch size, apart and after a warm-up.

    Returns:
        n: generations that were timed.
        metrics: `decode_tokens_per_s` of the largest batch, and `decode_tokens_per_s_1` of the smallest.
        groups: `batch_size`: for each `prefill_tokens_per_s`, `decode_tokens_per_s` (all rows, by the median time), and
            `prefill_ms_p50`, `prefill_ms_p95`, `step_ms_p50`, `step_ms_p95` (a step is one token of each row);
            `peak_bytes` of memory on a GPU.
    """
    settings = settings or SpeedSettings()
    prompt_tokens, new_tokens = fit(model.config.block_size, settings)
    groups = {}
    for batch in settings.batch_sizes:
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        groups[str(batch)] = Group(
            settings.repeats, batch_metrics(time_batch(model, batch, settings), batch, prompt_tokens)
        )
        if model.device.type == "cuda":
            groups[str(batch)].metrics["peak_bytes"] = float(torch.cuda.max_memory_allocated(model.device))
    smallest, largest = (str(f(settings.batch_sizes)) for f in (min, max))
    metrics = {
        "decode_tokens_per_s": groups[largest].metrics["decode_tokens_per_s"],
        f"decode_tokens_per_s_{smallest}": groups[smallest].metrics["decode_tokens_per_s"],
        "prefill_tokens_per_s": groups[largest].metrics["prefill_tokens_per_s"],
    }
    return Result(
        kind="speed",
        n=settings.repeats * len(settings.batch_sizes),
        metrics=metrics,
        groups={"batch_size": groups},
        settings={**asdict(settings), "batch_sizes": list(settings.batch_sizes)}
        | {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "device": str(model.device)}
        | {"threads": torch.get_num_threads(), "dtype": str(model.dtype).removeprefix("torch.")},
    )


def batch_metrics(times: BatchTimes, batch: int, prompt_tokens: int) -> dict[str, float]:
    """The numbers of one batch size; see `evaluate_speed`."""

    def ms(seconds: Sequence[float], percent: int) -> float:
        return 1000 * float(np.percentile(seconds, percent))

    return {
        "prefill_tokens_per_s": 1000 * batch * prompt_tokens / ms(times.prefill, 50),
        "decode_tokens_per_s": 1000 * batch / ms(times.steps, 50),
        "prefill_ms_p50": ms(times.prefill, 50),
        "prefill_ms_p95": ms(times.prefill, 95),
        "step_ms_p50": ms(times.steps, 50),
        "step_ms_p95": ms(times.steps, 95),
    }
