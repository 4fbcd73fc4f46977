"""Log-probabilities of texts under a model, from batches of unequal length, on one process or several.

The windows are those of lm-evaluation-harness (`_loglikelihood_tokens` and `get_rolling_token_windows` there), so that
the numbers are comparable: a continuation is scored behind the last `block_size` tokens of what precedes it.

Dimensions: B rows of a batch, T tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_model.loss import CPU_CHUNK_BYTES, IGNORE_INDEX, Chunk, chunked_head_loss, tokens_of_chunk, wide


class Span(NamedTuple):
    """Tokens to score, and those before them."""

    context: Sequence[int]
    """At least one token."""
    continuation: Sequence[int]
    """At least one token."""


class Row(NamedTuple):
    """A row of a batch."""

    tokens: tuple[int, ...]
    """Input, and the last target."""
    n_targets: int
    """Tokens at its end that are predicted."""


class SpanScore(NamedTuple):
    """The score of a continuation."""

    log_probabilities: npt.NDArray[np.float32]
    """Of each of its tokens, in nats."""
    greedy: bool
    """Whether each token is the model's most probable one."""

    @property
    def total(self) -> float:
        """log p(continuation | context), in nats."""
        return float(self.log_probabilities.sum(dtype=np.float64))


class Forward(Protocol):
    """A model: tokens and targets int64 (B, T) -> numbers of each target, float32 (numbers, B, T); for `Scorer.score`
    those of `score_targets`, log-probability and greediness."""

    def __call__(self, tokens: Tensor, targets: Tensor, /) -> Tensor: ...


class Ranks(Protocol):
    """The processes that share the work. All call the same methods with the same spans."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, in order, on every rank."""
        ...


class OneProcess:
    """No other process."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


def numbers_of_targets(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    /,
    *,
    bias: Tensor | None,
    softcap: float | None,
    z_loss: float,
    of_logits: Callable[[Tensor, Tensor], Sequence[Tensor]],
    n_numbers: int,
) -> Tensor:
    """A head for `GPT.forward` (lit_model.loss.Head): `n_numbers` numbers of each target, float32 (n_numbers, B, T), 0
    where it is ignored. The full logits are never held.

    `of_logits`: logits (n, vocab_size) and targets int64 (n, 1) of some tokens -> their numbers, (n,) each.
    """
    del z_loss
    return chunked_head_loss(
        *(hidden, weight, bias, targets),
        partial(_numbers_of_chunk, vocab_size=vocab_size, softcap=softcap, of_logits=of_logits),
        lambda numbers: numbers[0].sum(),
        n_numbers=n_numbers,
        chunk_tokens=tokens_of_chunk(hidden.device.type, weight.shape[0], None, CPU_CHUNK_BYTES),
        needs_gradient=False,
    )[1]


def _numbers_of_chunk(
    chunk: Chunk, vocab_size: int, softcap: float | None, of_logits: Callable[[Tensor, Tensor], Sequence[Tensor]]
) -> tuple[Tensor, None]:
    logits = F.linear(chunk.hidden, chunk.weight, chunk.bias)[:, :vocab_size]
    logits = logits.to(wide(logits.dtype))  # (n, vocab_size)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.stack([number.to(logits.dtype) for number in of_logits(logits, chunk.target)]), None


def _score(logits: Tensor, target: Tensor) -> Sequence[Tensor]:
    return logits.log_softmax(-1).gather(1, target).squeeze(-1), logits.argmax(-1) == target.squeeze(-1)


score_targets = partial(numbers_of_targets, of_logits=_score, n_numbers=2)
"""The head of a Scorer's model: the log-probability of each target, and whether it is the most probable token."""


@dataclass
class Scorer:
    """Scores spans of tokens under a model.

    Attributes:
        forward: the model, called in `torch.no_grad`.
        block_size: the longest row, in tokens.
        batch_tokens: most tokens of a batch, padding included; at least one row is taken.
        device: where batches go.
        ranks: the processes that share the batches. One without a batch runs a row of ignored targets, so that
            collectives inside `forward` meet.
        on_batch: called before each batch with the numbers of batches done and of all; may raise to stop.
    """

    forward: Forward
    block_size: int
    batch_tokens: int = 16384
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ranks: Ranks = field(default_factory=OneProcess)
    on_batch: Callable[[int, int], None] = lambda done, total: None

    def score(self, spans: Sequence[Span]) -> list[SpanScore]:
        """The score of each continuation, on every rank. Raises as `numbers` does."""
        return [SpanScore(log_probabilities, bool(greedy.all())) for log_probabilities, greedy in self.numbers(spans)]

    @torch.no_grad()
    def numbers(self, spans: Sequence[Span]) -> list[npt.NDArray[np.float32]]:
        """The output of `forward` for each continuation, float32 (numbers, tokens), on every rank.

        A context is cut on the left to what fits into `block_size`, as in lm-evaluation-harness. Equal spans are
        computed once: rounding depends on the place in a batch, and equal candidates would not tie.
        Raises ValueError for an empty context or continuation, and for a continuation longer than `block_size`.
        """
        place: dict[Row, int] = {}
        places = [place.setdefault(self._row(span), len(place)) for span in spans]
        rows = list(place)
        batches = self._batches(rows)
        mine: dict[int, npt.NDArray[np.float32]] = {}
        rounds = -(-len(batches) // self.ranks.size)
        for round_ in range(rounds):
            self.on_batch(round_, rounds)
            number = round_ * self.ranks.size + self.ranks.rank
            batch = batches[number] if number < len(batches) else []
            tokens, targets = self._tensors([rows[i] for i in batch])
            numbers = self.forward(tokens, targets).float().cpu().numpy()  # (numbers, B, T)
            for row, i in enumerate(batch):
                stop = len(rows[i].tokens) - 1
                mine[i] = numbers[:, row, stop - rows[i].n_targets : stop].copy()
        found = {i: values for some in self.ranks.gather(mine) for i, values in some.items()}
        return [found[i] for i in places]

    def score_documents(self, documents: Sequence[Sequence[int]], prefix_id: int | None) -> list[list[SpanScore]]:
        """Score every token of each document once, in windows of `block_size`: the scores of a document's windows.

        `prefix_id` precedes each document; None: a document's first token is context only, and not scored.
        """
        windows = [list(rolling_windows(document, prefix_id, self.block_size)) for document in documents]
        flat = iter(self.score([span for spans in windows for span in spans]))
        return [[next(flat) for _ in spans] for spans in windows]

    def _row(self, span: Span) -> Row:
        if not span.context or not span.continuation:
            raise ValueError("a context and its continuation need at least one token each")
        n = len(span.continuation)
        if n > self.block_size:
            raise ValueError(f"a continuation of {n} tokens exceeds the model's context (block_size {self.block_size})")
        return Row((*span.context, *span.continuation)[-self.block_size - 1 :], n)

    def _batches(self, rows: Sequence[Row]) -> list[list[int]]:
        """Numbers of rows by batch: the longest first, so that memory runs out at once or not at all."""
        batches: list[list[int]] = []
        width = 0
        for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i].tokens), i)):
            if not batches or (len(batches[-1]) + 1) * width > self.batch_tokens:
                batches.append([])
                width = len(rows[i].tokens) - 1
            batches[-1].append(i)
        return batches

    def _tensors(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Tokens and targets (B, T), padded on the right; one row without a target if there are no rows."""
        width = max((len(tokens) - 1 for tokens, _ in rows), default=1)
        tokens = torch.zeros(max(len(rows), 1), width, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORE_INDEX)
        for row, (ids, n) in enumerate(rows):
            whole = torch.tensor(ids, dtype=torch.int64)
            tokens[row, : len(ids) - 1] = whole[:-1]
            targets[row, len(ids) - 1 - n : len(ids) - 1] = whole[-n:]
        return tokens.to(self.device), targets.to(self.device)


def rolling_windows(document: Sequence[int], prefix_id: int | None, block_size: int) -> Iterator[Span]:
    """Cut a document into spans that score each token once, with at most `block_size` inputs each.

    The first window scores up to `block_size` tokens behind `prefix_id`; each later one is filled with as many earlier
    tokens as fit (`get_rolling_token_windows` with context_len=1 and `make_disjoint_window` in lm-evaluation-harness).
    """
    tokens = list(document) if prefix_id is None else [prefix_id, *document]
    scored = 1  # tokens behind us, the first one included: it is context only
    while scored < len(tokens):
        stop = min(scored + block_size, len(tokens))
        # The harness keeps one token of context in a full window, and fills a shorter last one from the left.
        yield Span(tokens[max(stop - block_size - 1, 0) : scored], tokens[scored:stop])
        scored = stop
