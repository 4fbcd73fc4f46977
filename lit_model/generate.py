"""Sampling with a key/value cache, many prompts of unequal lengths at a time.

Dimensions: B rows, T prompt tokens, n new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_model.attention import KVCache
from lit_model.device import sums_device, to_float64
from lit_model.loss import head_logits
from lit_model.model import GPT
from lit_model.sampling import GREEDY, Sampling


class Continuation(NamedTuple):
    """A model's continuation of a prompt."""

    ids: list[int]
    """New tokens; an end-of-document token is included."""
    finish: Literal["eos", "stop", "length"]
    """Why it ended: the end-of-document token, the caller's `stop`, or the limit of tokens."""


class NewToken(NamedTuple):
    """One token of a stream."""

    row: int
    """The prompt's number."""
    id: int
    finish: Literal["eos", "stop", "length"] | None
    """Why the row ends with this token; None: it does not."""


Stop = Callable[[int, list[int]], bool]
"""Called with a row's number and all its new tokens after each of them; true ends the row."""


def generate_batch(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    seeds: Sequence[int] | None = None,
    eos_id: int | None = None,
    excluded_ids: Sequence[int] = (),
    stop: Stop | None = None,
    batch_size: int = 8,
) -> list[Continuation]:
    """Continue each prompt (token ids) by up to `max_new_tokens` tokens; the order is kept.

    A row's randomness is its own seed's (default 0 for each): it does not depend on the other rows, on `batch_size` or
    on the device. Nor do its logits, except for the rounding of matrix products, which depends on their shapes.

    Args:
        eos_id: ends a row, and is included.
        excluded_ids: never sampled, above all ids without a token.
        stop: see Stop.
        batch_size: rows at a time; prompts of similar length go together.

    Raises ValueError for a setting out of range, an empty prompt, ids outside the vocabulary, or more tokens than
    block_size; the number of the prompt is in the message if there are several.
    """
    check_prompts(model, prompts, max_new_tokens)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    seeds = [0] * len(prompts) if seeds is None else seeds
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    done: dict[int, Continuation] = {}
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        new: list[list[int]] = [[] for _ in numbers]
        finish: list[Literal["eos", "stop", "length"]] = ["length"] * len(numbers)
        for token in stream(
            model,
            [prompts[i] for i in numbers],
            max_new_tokens,
            sampling,
            seeds=[seeds[i] for i in numbers],
            eos_id=eos_id,
            excluded_ids=excluded_ids,
            stop=None if stop is None else _renumbered(stop, numbers),
        ):
            new[token.row].append(token.id)
            finish[token.row] = token.finish or "length"
        done.update((i, Continuation(ids, why)) for i, ids, why in zip(numbers, new, finish, strict=True))
    return [done[i] for i in range(len(prompts))]


def _renumbered(stop: Stop, numbers: Sequence[int]) -> Stop:
    return lambda row, ids: stop(numbers[row], ids)


@torch.inference_mode()
def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    seeds: Sequence[int] | None = None,
    eos_id: int | None = None,
    excluded_ids: Sequence[int] = (),
    stop: Stop | None = None,
) -> Iterator[NewToken]:
    """Yield each token as it is chosen: one of every unfinished row, then the next of each. As `generate_batch`, in one
    batch.
    """
    check_prompts(model, prompts, max_new_tokens)
    if not prompts or max_new_tokens == 0:
        return
    training = model.training
    model.eval()
    try:
        sampler = _Sampler(model, prompts, max_new_tokens, sampling, seeds or [0] * len(prompts), excluded_ids)
        cache, logits = _prefill(model, prompts, max_new_tokens)
        rows = list(range(len(prompts)))  # the row of each line of the cache
        new: list[list[int]] = [[] for _ in rows]
        for step in range(max_new_tokens):
            tokens = sampler.choose(logits, step)
            ended = []
            # Sync, one for all rows: the host must know whether a row ends.
            for line, (row, id) in enumerate(zip(rows, tokens.tolist(), strict=True)):
                new[row].append(id)
                finish: Literal["eos", "stop", "length"] | None = None
                if id == eos_id:
                    finish = "eos"
                elif stop is not None and stop(row, new[row]):
                    finish = "stop"
                elif step + 1 == max_new_tokens:
                    finish = "length"
                if finish is not None:
                    ended.append(line)
                yield NewToken(row, id, finish)
            if len(ended) == len(rows):
                return
            if ended:  # copying the rest of the cache costs about as much as one step
                left = [line for line in range(len(rows)) if line not in set(ended)]
                kept = torch.tensor(left, device=tokens.device)
                rows, tokens = [rows[line] for line in left], tokens[kept]
                cache.select(kept)
                sampler.select(kept)
            logits = model(tokens[:, None], cache=cache)[:, 0]  # (B, V)
    finally:
        model.train(training)


def check_prompts(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ValueError unless the model can continue each prompt by `max_new_tokens` tokens."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    for number, prompt in enumerate(prompts, start=1):
        which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        if len(prompt) == 0:
            raise ValueError(f"{which} is empty; give at least one token id")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= model.config.vocab_size:
            raise ValueError(
                f"{which}: id {low if low < 0 else high} is outside the model's vocabulary of {model.config.vocab_size}"
            )
        if len(prompt) + max_new_tokens > model.config.block_size:
            raise ValueError(
                f"{which}: its {len(prompt)} tokens and max_new_tokens {max_new_tokens} exceed the model's context "
                f"(block_size {model.config.block_size}); shorten one of them"
            )


def _prefill(model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[KVCache, Tensor]:
    """The cache after the prompts, and the logits of the tokens that follow them, (B, V). Equal prompts, of which
    several samples are drawn, are computed once."""
    device = model.head_weight.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.head_weight.dtype
    number: dict[tuple[int, ...], int] = {}
    row_of = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    lengths = [len(prompt) for prompt in number]
    cache = KVCache(model.config, len(number), max(lengths) + max_new_tokens, device, dtype, lengths)
    tokens = torch.tensor([id for prompt in number for id in prompt], device=device)
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    tokens = tokens.view(len(number) if cache.prompts is None else 1, -1)
    logits = model(tokens, cache=cache, head=_LastLogits(ends))
    if len(number) < len(prompts):
        rows = torch.tensor(row_of, device=device)
        cache.select(rows)
        logits = logits[rows]
    return cache, logits


class _LastLogits(NamedTuple):
    """A head that computes only the logits of the tokens at these places of the flattened batch."""

    places: Tensor
    """int64 (B,)."""

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: None,
        vocab_size: int,
        /,
        *,
        bias: Tensor | None,
        softcap: float | None,
        z_loss: float,
    ) -> Tensor:
        return head_logits(hidden.flatten(0, 1)[self.places], weight, vocab_size, bias=bias, softcap=softcap)


class _Sampler:
    """Chooses the next token of each row. All random numbers are drawn beforehand, one for each token, and a token is
    found by inverting the cumulative distribution: no sync, and no dependence between rows."""

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        excluded_ids: Sequence[int],
    ) -> None:
        device = model.head_weight.device
        self.sampling = sampling
        self.excluded = torch.tensor(excluded_ids, dtype=torch.int64, device=device) if excluded_ids else None
        self.uniform: Tensor | None = None  # float64 (B, n)
        if sampling.temperature > 0:
            # On the CPU, so that a seed means the same on every device.
            self.uniform = torch.stack([uniform_numbers(seed, max_new_tokens) for seed in seeds]).to(
                sums_device(device)
            )
        self.seen: Tensor | None = None  # bool (B, V)
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self.seen[row, list(prompt)] = True
            self.seen = self.seen.to(device)

    def select(self, rows: Tensor) -> None:
        if self.uniform is not None:
            self.uniform = self.uniform[rows.to(self.uniform.device)]
        if self.seen is not None:
            self.seen = self.seen[rows]

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """logits (B, V) -> tokens int64 (B,)."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.seen is not None:
            penalty = self.sampling.repetition_penalty
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.seen, penalised, logits)
        if self.excluded is not None:
            logits = logits.index_fill(1, self.excluded, -torch.inf)
        if self.uniform is None:
            tokens = logits.argmax(-1)
        else:
            tokens = draw(logits, self.sampling, self.uniform[:, step : step + 1]).to(logits.device)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens


def uniform_numbers(seed: int, n: int) -> Tensor:
    """The random numbers of a row: float64 (n,) in [0, 1), the first ones the same for every n."""
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Draw one token of each row: logits (B, V), uniform float64 (B, 1) in [0, 1) -> int64 (B,).

    The token is the first whose cumulative probability exceeds the random number. Temperature must be above 0.
    """
    cumulative = to_float64(distribution(logits, sampling)).cumsum(-1)  # (B, V)
    total = cumulative[:, -1:].contiguous()
    token = torch.searchsorted(cumulative, uniform * total, right=True)  # (B, 1)
    # The last one with any probability is the bound: the product may be rounded up to the total.
    return torch.minimum(token, torch.searchsorted(cumulative, total)).squeeze(1)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Numbers proportional to the probabilities of the tokens that are kept, 0 for the others: (B, V) -> (B, V).

    Temperature, top_k, top_p and min_p in this order. Ties at the edge of top_k and top_p are all kept.
    """
    logits = logits / sampling.temperature
    V = logits.shape[-1]
    if sampling.top_k is not None and sampling.top_k < V:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = _descending(probabilities)
        # A token stays if the mass before it is below top_p: the first one always does.
        count = (ordered.cumsum(-1) - ordered < sampling.top_p).sum(-1, keepdim=True)  # (B, 1)
        smallest = ordered.gather(1, (count - 1).clamp(min=0))
        probabilities = probabilities.masked_fill(probabilities < smallest, 0)
    if sampling.min_p:
        largest = probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * largest, 0)
    return probabilities


def _descending(values: Tensor) -> Tensor:
    """Sort each row of (B, V). On a CPU by numpy, in a tenth of the time: torch always sorts the places too."""
    if values.device.type != "cpu":
        return values.sort(descending=True).values
    ascending = values.clone()
    ascending.numpy().sort(axis=-1)
    return ascending.flip(-1)
