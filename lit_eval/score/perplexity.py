"""Perplexity and bits per byte of texts, each token scored once in windows of the model's context.

For texts as they are, the numbers equal those of lm-evaluation-harness (`wikitext`-like tasks: `word_perplexity`,
`byte_perplexity`, `bits_per_byte`), whose windows these are. Bits per byte compares models of different tokenizers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_data.corpus.readers import read_documents
from lit_data.packed.documents import Documents
from lit_data.packed.reader import PackedDataset
from lit_eval.model.likelihood import Scorer
from lit_eval.score.results import Group, Result
from lit_eval.spacing import evenly_spaced

CHUNK_TOKENS = 1 << 20  # tokens of documents that are sorted by length and scored together
LENGTHS = (128, 512, 2048, 8192)
"""Limits of the groups by document length, in tokens."""
MOST_ITEMS = 10_000  # of which the score is kept one by one


@dataclass
class Text:
    """A document to score.

    Attributes:
        tokens: its ids, without BOS or EOS.
        bytes: of its UTF-8 text.
        words: separated by white space; None if unknown.
        end_id: scored behind its last token, apart from the others; None: not scored.
        source: the group it belongs to.
    """

    tokens: Sequence[int]
    bytes: int
    words: int | None
    end_id: int | None = None
    source: str = ""


@dataclass
class _Sums:
    n: int = 0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    nats: float = 0.0
    first_nats: float = 0.0
    ends: int = 0
    end_nats: float = 0.0
    unknown_words: bool = False

    def add(self, text: Text, nats: float, tokens: int, first: float, end: float | None) -> None:
        self.n += 1
        self.tokens += tokens
        self.bytes += text.bytes
        self.words += text.words or 0
        self.unknown_words |= text.words is None
        self.nats += nats
        self.first_nats += first
        if end is not None:
            self.ends += 1
            self.end_nats += end

    def metrics(self) -> dict[str, float]:
        bits = self.nats / math.log(2)
        found: dict[str, float] = {}
        if self.bytes:
            found |= {"bits_per_byte": bits / self.bytes, "byte_perplexity": _exp(self.nats / self.bytes)}
        loss = self.nats / max(self.tokens, 1)
        found |= {"loss": loss, "perplexity": _exp(loss)}
        if self.words and not self.unknown_words:
            found["word_perplexity"] = _exp(self.nats / self.words)
        found |= {"nats": self.nats, "tokens": self.tokens, "bytes": self.bytes, "first_token_nats": self.first_nats}
        if self.ends:
            found |= {"end_loss": self.end_nats / self.ends, "end_nats": self.end_nats}
        return found


def perplexity(scorer: Scorer, texts: Iterable[Text], prefix_id: int | None) -> Result:
    """Score texts.

    Args:
        prefix_id: precedes each text; None: a text's first token is context only, and not scored.

    Returns:
        Metrics: `bits_per_byte` and `byte_perplexity` (all scored tokens over all bytes), `loss` in nats a token and
        `perplexity`, its exponential; `word_perplexity` where words are known; the sums `nats`, `tokens`, `bytes`;
        `first_token_nats`, the part of the texts' first tokens, which a model trained without BOS has never had to
        predict; `end_loss` and `end_nats`, of the ends of the documents, which no other number contains.
        Groups: `source`, and `length` in tokens. Items: bits per byte of each text, if there are at most 10,000.

    Raises ValueError if nothing can be scored.
    """
    total = _Sums()
    groups: dict[str, dict[str, _Sums]] = {"source": {}, "length": {}}
    items: list[float] = []
    for part in _parts(texts):
        documents = [[*t.tokens, *([t.end_id] if t.end_id is not None else [])] for t in part]
        for text, windows in zip(part, scorer.score_documents(documents, prefix_id), strict=True):
            if not windows:
                continue
            scores = np.concatenate([w.log_probabilities for w in windows]).astype(np.float64)
            end = None
            if text.end_id is not None:
                end, scores = -float(scores[-1]), scores[:-1]
            nats = -float(scores.sum())
            first = -float(scores[0]) if prefix_id is not None and len(scores) else 0.0
            some = [total, groups["length"].setdefault(length_name(len(text.tokens)), _Sums())]
            if text.source:
                some.append(groups["source"].setdefault(text.source, _Sums()))
            for sums in some:
                sums.add(text, nats, len(scores), first, end)
            if text.bytes:
                items.append(nats / math.log(2) / text.bytes)
    if not total.tokens:
        raise ValueError("the texts hold no token to score")
    return Result(
        kind="perplexity",
        n=total.n,
        metrics=total.metrics(),
        groups={
            by: {name: Group(s.n, s.metrics()) for name, s in sorted(found.items(), key=_order)}
            for by, found in groups.items()
            if found
        },
        items=items if len(items) <= MOST_ITEMS else [],
    )


def texts_of_dataset(dataset: PackedDataset, limit: int | None = None) -> Iterator[Text]:
    """Documents of a packed dataset, whole and in order; `limit` of them, evenly spaced. Their EOS is scored."""
    documents, bos, eos = Documents(dataset), dataset.manifest.bos_id, dataset.eos_id
    numbers = evenly_spaced(range(dataset.n_documents), limit)
    for some in (numbers[i : i + 1024] for i in range(0, len(numbers), 1024)):
        facts = documents.facts(some)
        for number in some:
            start, stop = dataset.document_start(np.asarray([number, number + 1])).tolist()
            tokens = dataset.tokens(start, stop).tolist()
            tokens = tokens[1:] if bos is not None and tokens[:1] == [bos] else tokens
            end = tokens.pop() if tokens and tokens[-1] == eos else None
            source = Path(str(facts[number]["source"])).name
            yield Text(tokens, int(facts[number]["bytes"] or 0), None, end, source)


def texts_of_files(
    paths: Sequence[str | Path],
    encode: Callable[[Sequence[str]], list[list[int]]],
    *,
    text_field: str = "text",
    split_documents: str = "file",
    source_field: str | None = None,
    limit: int | None = None,
) -> Iterator[Text]:
    """Documents of text files, .jsonl or Parquet as preparation reads them, the first `limit` of them.

    `source_field` names the field to group by; without it documents are grouped by file. Raises ValueError naming the
    file and place of a fault.
    """
    metadata = [source_field] if source_field else []
    read = read_documents(paths, text_field=text_field, metadata=metadata, split_documents=split_documents)
    waiting: list[Text] = []
    texts: list[str] = []
    for number, document in enumerate(read):
        if number == limit:
            break
        source = document.meta.get(source_field, "") if source_field else Path(document.source).name
        texts.append(document.text)
        waiting.append(Text([], len(document.text.encode("utf-8")), len(re.split(r"\s+", document.text)), None, source))
        if len(texts) == 256:
            yield from _encoded(waiting, texts, encode)
            waiting, texts = [], []
    yield from _encoded(waiting, texts, encode)


def _encoded(
    waiting: list[Text], texts: list[str], encode: Callable[[Sequence[str]], list[list[int]]]
) -> Iterator[Text]:
    for text, ids in zip(waiting, encode(texts) if texts else [], strict=True):
        text.tokens = ids
        yield text


def _parts(texts: Iterable[Text]) -> Iterator[list[Text]]:
    part: list[Text] = []
    tokens = 0
    for text in texts:
        part.append(text)
        tokens += len(text.tokens)
        if tokens >= CHUNK_TOKENS:
            yield part
            part, tokens = [], 0
    if part:
        yield part


def length_name(tokens: int) -> str:
    """The group of a document's length: `below 128`, `128 to 511`, ..., `8192 and more`."""
    for low, high in zip((0, *LENGTHS), LENGTHS, strict=False):
        if tokens < high:
            return f"below {high}" if not low else f"{low} to {high - 1}"
    return f"{LENGTHS[-1]} and more"


def _order(entry: tuple[str, _Sums]) -> tuple[int, str]:
    """Lengths ascending, others by name."""
    number = re.match(r"\d+ (to|and)", entry[0])
    return (int(number[0].split()[0]) if number else 0, entry[0])


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # JSON knows no infinity
