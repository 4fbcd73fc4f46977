"""Processes a batch of documents in a worker: cleaning, filters, deduplication, encoding."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_data.corpus.cleaners import Cleaner, open_cleaner
from lit_data.corpus.readers import Document
from lit_data.packed.index import dtype_of
from lit_data.prepare.filters import (
    Filter,
    count_words,
    language_filter,
    length_filter,
    open_filter,
    token_word_ratio,
)
from lit_data.prepare.near_dedup import signatures
from lit_data.prepare.paragraphs import drop_paragraphs, hash_paragraphs, split_paragraphs
from lit_data.prepare.report import StageReports
from lit_data.prepare.settings import Settings
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_data.tokenizers.unit_encoder import UnitEncoder


@dataclass
class Item:
    """A document to process.

    Attributes:
        number: 0-based number of the document in its part.
        side: train or val.
        dropped: indices of the duplicate paragraphs.
        near: reason for dropping it as a near duplicate; empty to keep it.
    """

    number: int
    side: str
    document: Document
    dropped: Collection[int] = ()
    near: str = ""


@dataclass
class Hashed:
    """The paragraph hashes and signature of each kept document, with its number in the part."""

    numbers: list[int]
    paragraphs: list[list[bytes | None]]
    signatures: list[npt.NDArray[np.uint32]]


@dataclass
class Encoded:
    """The kept documents of a batch, by side: concatenated tokens, lengths [n], columns of n values."""

    sides: dict[str, tuple[npt.NDArray[Any], npt.NDArray[np.int64], dict[str, list[Any]]]]
    report: StageReports


def open_filters(settings: Settings) -> list[Filter]:
    """The text filters requested by the settings. Raises ValueError if one can't be opened."""
    filters = [open_filter(f) for f in settings.filter]
    if settings.min_characters or settings.max_characters:
        filters.append(length_filter(settings.min_characters, settings.max_characters or None))
    if settings.language:
        filters.append(language_filter(settings.language, settings.min_language_probability))
    return filters


class Worker:
    """Processes batches; built once in each worker.

    Args:
        settings: settings of the preparation.
        with_tokenizer: False for the first pass, which only hashes.
    """

    def __init__(self, settings: Settings, with_tokenizer: bool) -> None:
        self.settings = settings
        self.cleaner: Cleaner | None = open_cleaner(settings.cleaner) if settings.cleaner else None
        self.filters = open_filters(settings)
        if with_tokenizer:
            self.tokenizer: Tokenizer = open_tokenizer(settings.tokenizer, settings.eos_token)
            dtype = dtype_of(self.tokenizer.vocab_size)
            parse = settings.special_tokens == "parse"
            self.encoder = UnitEncoder(self.tokenizer, dtype, bos=settings.bos, parse=parse)

    def hash(self, batch: list[Item]) -> Hashed:
        """First pass: compute hashes and signatures for deduplication."""
        s = self.settings
        done = Hashed([], [], [])
        for item in batch:
            text = self._clean(item.document, StageReports())
            if text is None:
                continue
            done.numbers.append(item.number)
            done.paragraphs.append(hash_paragraphs(text, s.dedup_min_characters) if s.dedup != "none" else [])
            if s.near_dedup:
                done.signatures.append(signatures(text))
        return done

    def encode(self, batch: list[Item]) -> Encoded:
        """Second (or only) pass: encode the kept documents."""
        report = StageReports()
        kept: list[tuple[Item, str]] = []
        for item in batch:
            report.fields |= item.document.meta.keys()
            text = self._clean(item.document, report)
            if text is not None and (text := self._drop_duplicates(item, text, report)) is not None:
                kept.append((item, text))
        tokens, lengths = self.encoder.encode([text for _, text in kept])
        keep = np.ones(len(kept), dtype=np.bool_)
        for i, (item, text) in enumerate(kept):
            n_tokens = int(lengths[i]) - self.encoder.marks
            if n_tokens <= 0:
                report.empty += 1
                keep[i] = False
            elif self.settings.max_token_word_ratio:
                keep[i] = self._judge_ratio(item.document, text, n_tokens, report)
        sides = {}
        for side in self.settings.sides:
            mine = np.asarray([item.side == side for item, _ in kept], dtype=np.bool_) & keep
            chosen = [kept[i] for i in np.flatnonzero(mine)]
            if chosen:
                part = tokens if mine.all() else tokens[np.repeat(mine, lengths)]
                sides[side] = (part, lengths[mine], self._rows(chosen))
        return Encoded(sides, report)

    def _clean(self, document: Document, report: StageReports) -> str | None:
        """The text after cleaning and filters, or None if the document is dropped."""
        text = document.text
        if self.cleaner is not None:
            stage = report.stage("cleaner")
            cleaned = self.cleaner(document)
            stage.count(text, cleaned)
            if cleaned is None:
                stage.add("document dropped", document, text)
                return None
            stage.add_change("changed", document, text, cleaned)
            if cleaned != text:
                text = cleaned
                document = Document(document.id, text, document.source, document.place, document.meta)
        for filter in self.filters:
            stage = report.stage(filter.name)
            reason = filter.keep(document)
            stage.count(text, text if reason is None else None)
            if reason is not None:
                stage.add(reason, document, text)
                return None
        return text

    def _drop_duplicates(self, item: Item, text: str, report: StageReports) -> str | None:
        if self.settings.near_dedup:
            stage = report.stage("near duplicates")
            stage.count(text, None if item.near else text)
            if item.near:
                stage.add(item.near, item.document, text)
                return None
        if self.settings.dedup != "none":
            stage = report.stage("paragraphs")
            left = text
            if len(item.dropped):
                paragraphs = split_paragraphs(text)
                for number in item.dropped:
                    stage.add("seen before", item.document, paragraphs[number])
                left = drop_paragraphs(text, item.dropped)
            empty = not left.strip() and bool(text.strip())
            stage.count(text, None if empty else left)
            if empty:
                return None
            text = left
        return text

    def _judge_ratio(self, document: Document, text: str, n_tokens: int, report: StageReports) -> bool:
        stage = report.stage("tokens per word")
        ratio = token_word_ratio(n_tokens, text)
        keep = ratio <= self.settings.max_token_word_ratio
        stage.count(text, text if keep else None)
        if not keep:
            stage.add(f"too many tokens per word: {ratio:.2f}", document, text)
        return keep

    def _rows(self, kept: list[tuple[Item, str]]) -> dict[str, list[Any]]:
        documents = [item.document for item, _ in kept]
        return {
            "id": [d.id for d in documents],
            "source": [d.source for d in documents],
            "place": [d.place for d in documents],
            "bytes": [len(text.encode()) for _, text in kept],
            "words": [count_words(text) for _, text in kept],
            **{m: [d.meta.get(m, "") for d in documents] for m in self.settings.metadata},
        }
