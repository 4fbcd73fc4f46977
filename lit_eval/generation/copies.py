"""The longest passages of generated texts that occur in the training data, token by token, and where they came from.

Passages do not cross documents. The search reads the packed data once, in pieces of bounded memory: a window of
`min_tokens` tokens slides over the stream, its hash is looked up among those of the generated texts, and what is found
is compared token by token and extended. So the result is exact for copies of `min_tokens` or more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lit_data.packed.documents import Documents
from lit_data.packed.reader import PackedDataset
from lit_data.record.trace import TracedRun, spans_of_document
from lit_data.tokenizers.tokenizer import Tokenizer

Ids = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

PIECE_TOKENS = 1 << 20  # of the stream at a time: about 50 MB of work arrays
PAIRS = 1 << 20  # candidates compared at a time
FILTER_BITS = 22  # the filter before the exact look-up: 4 MB, one candidate in 40 by chance for 10^5 windows
PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it loses nothing modulo 2^64
PLACES = 5  # places of a copy that are listed


@dataclass
class Place:
    """An occurrence of a passage in the training data.

    Attributes:
        dataset: the dataset's number in the run, else in the order given.
        document: the document's number in the dataset.
        start: the passage's first token, counted from the document's.
        id, source: of the document.
        steps: optimizer steps (0-based) that had a token of the passage as input; None: no record was given.
    """

    dataset: int
    document: int
    start: int
    id: str = ""
    source: str = ""
    steps: list[int] | None = None


@dataclass
class Copy:
    """The longest passage of one text that occurs in the training data.

    Attributes:
        length: tokens; 0: none of `min_tokens` or more.
        start: its first token in the generated ids; of several, the first.
        occurrences: places in the data where it occurs.
        places: the first PLACES of them.
        text: decoded; None: no tokenizer.
        copied: tokens of the generated text inside any passage of `min_tokens` or more that occurs in the data.
        tokens: of the generated text, without the end-of-document token.
    """

    length: int = 0
    start: int = 0
    occurrences: int = 0
    places: list[Place] = field(default_factory=list)
    text: str | None = None
    copied: int = 0
    tokens: int = 0


@dataclass
class _Queries:
    """All texts as one array, and an index of their windows of `m` tokens.

    Attributes:
        ids: int64 (N,), the texts joined.
        ends: int64 (N,), where the text of each token ends.
        text: int64 (N,), the number of the text.
        hashes: of the different windows, ascending.
        first: int64 (len(hashes) + 1,), where the places of each begin in `places`.
        places: int64, starts of windows by hash.
        filter: bool (2^FILTER_BITS,), which high bits occur.
    """

    ids: Ids
    ends: Ids
    text: Ids
    hashes: Hashes
    first: Ids
    places: Ids
    filter: npt.NDArray[np.bool_]


def find_copies(
    texts: Sequence[Sequence[int]], datasets: Sequence[PackedDataset], *, min_tokens: int = 8, piece: int = PIECE_TOKENS
) -> list[Copy]:
    """The longest copy of each text (token ids) in packed datasets.

    Args:
        texts: a token that ends documents is never part of a copy.
        min_tokens: shortest copy that is found.
        piece: tokens of the stream read at a time.

    Time is linear in the data (about 10 s for 10^8 tokens on one core) as long as few of its windows occur in the
    texts. Raises ValueError for `min_tokens` below 1.
    """
    if min_tokens < 1:
        raise ValueError(f"min_tokens is {min_tokens}; it must be at least 1")
    ends = {dataset.eos_id for dataset in datasets}
    copies = [Copy(tokens=sum(id not in ends for id in ids)) for ids in texts]
    queries = _index(texts, min_tokens, ends)
    if queries is None:
        return copies
    reach = np.zeros(len(queries.ids), dtype=np.int64)  # of each token: the longest copy that starts with it
    found: list[list[tuple[int, int, int]]] = [[] for _ in texts]  # (dataset, position, start): of the longest so far
    for number, dataset in enumerate(datasets):
        for stream, place, lengths in _matches(queries, dataset, min_tokens, piece):
            np.maximum.at(reach, place, lengths)
            of = queries.text[place]
            for text in np.unique(of).tolist():
                mine = np.flatnonzero(of == text)
                longest = int(lengths[mine].max())
                copy = copies[text]
                if longest < copy.length:
                    continue
                if longest > copy.length:
                    copy.length, copy.occurrences, found[text] = longest, 0, []
                best = mine[lengths[mine] == longest]
                copy.occurrences += len(best)
                new = [(number, int(stream[i]), int(place[i])) for i in best[: PLACES - len(found[text])]]
                found[text] += new
    _describe(copies, found, queries, reach, datasets)
    return copies


def _describe(
    copies: Sequence[Copy],
    found: Sequence[Sequence[tuple[int, int, int]]],
    queries: _Queries,
    reach: Ids,
    datasets: Sequence[PackedDataset],
) -> None:
    """Fill in what follows from the matches."""
    covered = np.zeros(len(reach) + 1, dtype=np.int64)
    starts = np.flatnonzero(reach)
    np.add.at(covered, starts, 1)
    np.add.at(covered, starts + reach[starts], -1)
    inside = covered[:-1].cumsum() > 0
    for text, (copy, places) in enumerate(zip(copies, found, strict=True)):
        own = np.flatnonzero(queries.text == text)
        if not places:
            continue
        copy.copied = int(inside[own].sum())
        begins = [start for _, _, start in places]
        copy.start = min(begins) - int(own[0])
        for number, position, start in places:
            if start != min(begins):  # another passage of the same length
                copy.occurrences -= 1
                continue
            dataset = datasets[number]
            at = np.asarray([position], dtype=np.int64)
            document = dataset.document_of(at)
            offset = position - int(dataset.document_start(document)[0])
            copy.places.append(Place(number, int(document[0]), offset))
    for number, dataset in enumerate(datasets):
        places_here = [place for copy in copies for place in copy.places if place.dataset == number]
        facts = Documents(dataset).facts(sorted({p.document for p in places_here}), ["id", "source"])
        for place in places_here:
            place.id, place.source = (str(facts[place.document][key]) for key in ("id", "source"))


def _index(texts: Sequence[Sequence[int]], m: int, ends: set[int]) -> _Queries | None:
    """None if no text has a window without an end of a document."""
    ids = np.asarray([id for text in texts for id in text], dtype=np.int64)
    lengths = np.asarray([len(text) for text in texts], dtype=np.int64)
    stops = lengths.cumsum()
    number = np.repeat(np.arange(len(texts)), lengths)
    if len(ids) < m:
        return None
    whole = stops[number] - np.arange(len(ids)) >= m  # the window ends inside the text
    apart = np.isin(ids, list(ends))
    last_end = np.maximum.accumulate(np.where(apart, np.arange(len(ids)), -1))
    n = len(ids) - m + 1
    usable = np.flatnonzero(whole[:n] & (last_end[m - 1 :] < np.arange(n)))
    if not len(usable):
        return None
    hashes = _window_hashes(ids, m)[usable]
    order = np.argsort(hashes, kind="stable")
    distinct, first = np.unique(hashes[order], return_index=True)
    table = np.zeros(1 << FILTER_BITS, dtype=bool)
    table[distinct >> np.uint64(64 - FILTER_BITS)] = True
    return _Queries(ids, stops[number], number, distinct, np.append(first, len(order)), usable[order], table)


def _window_hashes(ids: Ids, m: int) -> Hashes:
    """Of every window of m tokens, uint64 (n - m + 1,): sum of f(id_j) PRIME^(m-1-j) modulo 2^64.

    Built by doubling: the hash of a + b tokens is that of the first a times PRIME^b plus that of the other b.
    """
    with np.errstate(over="ignore"):
        power = (ids.astype(np.uint64) + np.uint64(1)) * PRIME
        power ^= power >> np.uint64(29)
        factor, size = PRIME, 1
        result: Hashes | None = None
        done = 0
        while True:
            if m & size:
                if result is None:
                    result, done = power, size
                else:
                    n = len(ids) - done - size + 1
                    result = result[:n] * factor + power[done : done + n]
                    done += size
            if size << 1 > m:
                break
            power = power[:-size] * factor + power[size:]
            factor, size = factor * factor, size << 1
        assert result is not None
        # Mixed, since the filter takes the high bits.
        return (result ^ (result >> np.uint64(32))) * PRIME


def _matches(queries: _Queries, dataset: PackedDataset, m: int, piece: int) -> Iterator[tuple[Ids, Ids, Ids]]:
    """Yield (positions in the stream, places in the queries, lengths) of maximal common passages, m tokens or more."""
    margin = int((queries.ends - np.arange(len(queries.ids))).max())  # no passage is longer than a text
    for begin in range(0, dataset.n_tokens, piece):
        start = max(0, begin - 1)  # with the token before, to know what a passage begins with
        stop = min(begin + piece + margin, dataset.n_tokens)
        ids = dataset.tokens(start, stop).astype(np.int64)
        n = min(begin + piece, stop - m + 1) - begin  # windows that begin in this piece
        if n <= 0:
            break
        hashes = _window_hashes(ids[begin - start : begin - start + n + m - 1], m)
        near = np.flatnonzero(queries.filter[hashes >> np.uint64(64 - FILTER_BITS)])
        at = np.searchsorted(queries.hashes, hashes[near])
        at[at == len(queries.hashes)] = 0
        equal = queries.hashes[at] == hashes[near]
        near, at = near[equal] + (begin - start), at[equal]
        counts = queries.first[at + 1] - queries.first[at]
        for low, high in _slices(counts):
            own, here = counts[low:high], at[low:high]
            stream = np.repeat(near[low:high], own)
            within = np.arange(own.sum()) - np.repeat(own.cumsum() - own, own)
            place = queries.places[np.repeat(queries.first[here], own) + within]
            stream, place, lengths = _extend(queries, ids, stream, place, dataset.eos_id, m)
            yield stream + start, place, lengths


def _slices(counts: Ids) -> list[tuple[int, int]]:
    """Split so that each part has about PAIRS pairs; an entry is never split."""
    bounds = [0]
    total = counts.cumsum()
    while bounds[-1] < len(counts):
        before = int(total[bounds[-1] - 1]) if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(total, before + PAIRS, side="right"))))
    return list(pairwise(bounds))


def _extend(queries: _Queries, ids: Ids, stream: Ids, place: Ids, eos_id: int, m: int) -> tuple[Ids, Ids, Ids]:
    """The passages that begin at these pairs and at no earlier one, of m tokens or more, and their lengths."""
    text_starts = np.append(0, np.flatnonzero(np.diff(queries.text)) + 1)
    inner = ~np.isin(place, text_starts) & (stream > 0)
    inner[inner] = (ids[stream[inner] - 1] == queries.ids[place[inner] - 1]) & (ids[stream[inner] - 1] != eos_id)
    stream, place = stream[~inner], place[~inner]
    room = np.minimum(len(ids) - stream, queries.ends[place] - place)
    lengths = np.zeros(len(stream), dtype=np.int64)
    active = np.arange(len(stream))
    while len(active):
        active = active[room[active] > lengths[active]]
        tokens = ids[stream[active] + lengths[active]]
        active = active[(tokens == queries.ids[place[active] + lengths[active]]) & (tokens != eos_id)]
        lengths[active] += 1
    kept = lengths >= m
    return stream[kept], place[kept], lengths[kept]


def add_steps(copies: Sequence[Copy], run: TracedRun, before_step: int | None = None) -> None:
    """Fill in the steps of a run that had a token of each place as input, from its datapoint record.

    Args:
        before_step: leave out this step and later ones: a model after n steps has seen steps 0 to n - 1.
    """
    for copy in copies:
        for place in copy.places:
            spans = spans_of_document(run, place.document, place.dataset)
            step, start, length = (spans[name].to_numpy() for name in ("step", "start", "length"))
            seen = (start < place.start + copy.length) & (place.start < start + length)
            if before_step is not None:
                seen &= step < before_step
            place.steps = np.unique(step[seen]).tolist()


def describe_copy(ids: list[int], run: TracedRun, tokenizer: Tokenizer, min_tokens: int) -> str:
    """The longest copy from a run's training data in a text, the document it is from, and how often the run saw it."""
    (copy,) = find_copies([ids], run.datasets, min_tokens=min_tokens)
    add_steps([copy], run)
    if not copy.length:
        return f"no copy of {min_tokens} tokens or more from the training text"
    text = tokenizer.decode(ids[copy.start : copy.start + copy.length])
    place = copy.places[0]
    seen = f"seen at steps {', '.join(map(str, place.steps[:5]))}" if place.steps else "not seen yet"
    return f"longest copy from the training text: {copy.length} tokens, {text!r}, of document {place.id}, {seen}"
