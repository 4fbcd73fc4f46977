"""Tokenizes text by units, encoding each distinct unit once.

A unit is the text between two positions that no token can span: usually a word with the space or newline before it.
Natural text repeats its words, so most units are found in a dictionary and only the rest is tokenized. The ids equal
the tokenizer's own: if that can't be verified when the tokenizer is opened (see `Tokenizer.separators`), texts are
encoded without splitting.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_data.tokenizers.cutting import LIMIT_CHARACTERS, SAFE, cut_samples, too_long
from lit_data.tokenizers.tokenizer import Tokenizer

MAX_UNITS = 1 << 18  # units cached at once, about 50 MB
LONG_UNIT = 64  # characters; longer units rarely recur
SLICE_CHARACTERS = 1 << 20
GROUP_CHARACTERS = 1 << 12  # characters of new units encoded as one text
FIRST = "\0"  # marks a text's first unit, where a tokenizer may add a space; others start with a separator
CONTEXT = "a"  # prefix of units encoded outside their text


class _Units(dict[str, bytes]):
    """Maps units to the bytes of their ids; records missing ones."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: list[str] = []

    def __missing__(self, unit: str) -> bytes:
        self.missing.append(unit)
        return b""


class UnitEncoder:
    """Encodes texts into one array of ids, each text ending in EOS.

    Args:
        tokenizer: decides the ids.
        dtype: of the ids.
        max_units: units cached; the cache is cleared when full.
        bos: start each text with the tokenizer's BOS, which must exist.
        parse: parse special tokens in the text to their ids, see `Tokenizer.encode_parsed`. A text that already starts
            with BOS or ends with EOS gets no second one.

    Attributes:
        by_units: False if texts are encoded without splitting.
        marks: number of ids of a text without tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        dtype: npt.DTypeLike,
        max_units: int = MAX_UNITS,
        *,
        bos: bool = False,
        parse: bool = False,
    ) -> None:
        self.tokenizer, self.dtype, self.max_units = tokenizer, np.dtype(dtype), max_units
        self.parse = parse
        self._bos = np.asarray([tokenizer.bos_id] if bos else [], dtype=self.dtype)
        self._eos = np.asarray([tokenizer.eos_id], dtype=self.dtype)
        self.marks = len(self._bos) + 1
        self.by_units = False
        if not tokenizer.separators:
            return
        self._units = _Units()
        self._pattern, self._cut = unit_patterns(tokenizer.separators)
        self._context = tokenizer.encode_plain([CONTEXT])[0]
        fence = self._find_fence()
        if fence is None:
            return
        self._fence, self._fence_id = fence
        samples = cut_samples(tokenizer.added_texts())
        ids, lengths = self._encode_by_units(samples)
        mine = np.split(ids, np.cumsum(lengths)[:-1])
        first, end = len(self._bos), -1
        encoded = tokenizer.encode_plain(samples)
        self.by_units = all(a[first:end].tolist() == b for a, b in zip(mine, encoded, strict=True))

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Encode texts [n]: concatenated ids, and each text's length including BOS and EOS, int64 [n].

        A text without tokens has length `marks`. Raises ValueError for text that is too long and can't be cut (see
        `Tokenizer.encode_batch`).
        """
        if self.parse and any(map(self.tokenizer.may_hold_special, texts)):
            return self._encode_whole(texts)
        return self._encode_by_units(texts) if self.by_units else self._encode_whole(texts)

    def _encode_whole(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        encode = self.tokenizer.encode_parsed if self.parse else self.tokenizer.encode_batch
        parts: list[npt.NDArray[Any]] = []
        lengths = np.empty(len(texts), dtype=np.int64)
        for i, found in enumerate(encode(texts)):
            ids = found.astype(self.dtype)
            begun = self.parse and len(ids) and (ids[:1] == self._bos).all()
            ended = self.parse and len(ids) and ids[-1] == self._eos[0]
            whole = [self._bos[: 0 if begun else None], ids, self._eos[: 0 if ended else None]]
            lengths[i] = sum(map(len, whole))
            parts += whole
        return np.concatenate([*parts, self._eos[:0]]), lengths

    def _encode_by_units(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        bos, eos = self._bos.tobytes(), self._eos.tobytes()
        between = eos + bos
        sizes = np.full(len(texts), len(between), dtype=np.int64)
        parts: list[bytes] = [bos]
        last = 0
        for numbers, slices in self._together(texts):
            for number, data in zip(numbers, self._look_up(slices), strict=True):
                parts.extend(repeat(between, number - last))  # of the texts before, which are complete
                parts.append(data)
                sizes[number] += len(data)
                last = number
        parts.extend(repeat(between, len(texts) - last))
        lengths = sizes // self.dtype.itemsize
        # The BOS added with the last EOS starts no text.
        return np.frombuffer(b"".join(parts), dtype=self.dtype, count=int(lengths.sum())), lengths

    def _together(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[list[str]]]]:
        """Iterate over the units of texts in slices of about SLICE_CHARACTERS: lists of (text number, its units)."""
        numbers: list[int] = []
        slices: list[list[str]] = []
        n_characters = 0
        for number, text in enumerate(texts):
            for units, size in self._split(text):
                numbers.append(number)
                slices.append(units)
                n_characters += size
                if n_characters >= SLICE_CHARACTERS:
                    yield numbers, slices
                    numbers, slices, n_characters = [], [], 0
        yield numbers, slices

    def _split(self, text: str) -> Iterator[tuple[list[str], int]]:
        """Iterate over the units of a text in slices, with the number of characters of each."""
        start = 0
        while start < len(text):
            stop = len(text)
            if stop - start > 2 * SLICE_CHARACTERS:
                found = self._cut.search(text, start + SLICE_CHARACTERS)
                stop = found.start() if found else stop
            units = self._pattern.findall(text[start:stop] if stop - start < len(text) else text)
            if not units[-1]:
                units.pop()
            if start == 0:
                units[0] = FIRST + units[0]
            yield units, stop - start
            start = stop

    def _look_up(self, slices: list[list[str]]) -> list[bytes]:
        """The ids of each slice, as bytes."""
        known = self._units
        found = []
        for units in slices:
            before = len(known.missing)
            data = b"".join(map(known.__getitem__, units))
            found.append(data if len(known.missing) == before else None)
        if not known.missing:
            return found  # type: ignore[return-value]
        new = list(dict.fromkeys(known.missing))
        known.missing = []
        if len(known) + len(new) > self.max_units:
            known.clear()
            new = list(
                dict.fromkeys(unit for units, data in zip(slices, found, strict=True) if data is None for unit in units)
            )
        self._learn(new)
        whole = [
            b"".join(map(known.__getitem__, units)) if data is None else data
            for units, data in zip(slices, found, strict=True)
        ]
        for unit in new:
            if len(unit) > LONG_UNIT:
                del known[unit]
        return whole

    def _learn(self, units: list[str]) -> None:
        """Encode units and cache them."""
        first = [unit[1:] for unit in units if unit[0] == FIRST]
        for text, ids in zip(first, self.tokenizer.encode_plain(first), strict=True):
            self._units[FIRST + text] = self._bytes(ids)
        groups = list(_grouped(unit for unit in units if unit[0] != FIRST))
        alone: list[str] = []
        for group, ids in zip(groups, self._encode([self._fence.join(group) for group in groups]), strict=True):
            if not self._take_apart(group, ids):
                alone.extend(group)
        for unit, ids in zip(alone, self._encode(alone), strict=True):
            self._units[unit] = self._bytes(ids)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that start with a separator, as in the middle of a text."""
        n = len(self._context)
        encoded = self.tokenizer.encode_plain([CONTEXT + text for text in texts])
        for text, ids in zip(texts, encoded, strict=True):
            assert ids[:n] == self._context, f"{self.tokenizer.path}: a token reaches over the cut before {text[:40]!r}"
        return [ids[n:] for ids in encoded]

    def _take_apart(self, units: list[str], ids: list[int]) -> bool:
        """Assign each unit its ids from the fenced text; False if a unit contains the fence."""
        array = np.asarray(ids)
        fences = np.flatnonzero(array == self._fence_id)
        if len(fences) != len(units) - 1:
            return False
        data, size = self._bytes(ids), self.dtype.itemsize
        ends = [*(fences * size).tolist(), len(data)]
        start = 0
        for unit, end in zip(units, ends, strict=True):
            self._units[unit] = data[start:end]
            start = end + size
        return True

    def _find_fence(self) -> tuple[str, int] | None:
        """Find a rare single-token unit to separate new units that are encoded together."""
        words = [(id, text) for id, text in self.tokenizer.vocabulary() if re.fullmatch(" [A-Za-z]+", text)]
        for id, text in sorted(words, reverse=True):
            if self.tokenizer.encode_plain([CONTEXT + text])[0] == [*self._context, id]:
                return text, id
        return None

    def _bytes(self, ids: list[int]) -> bytes:
        return np.asarray(ids, dtype=self.dtype).tobytes()


def unit_patterns(separators: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns: `findall` gives all units of a text, with an empty one at the end; `search` the next position to cut.

    A text is cut before separators that follow a character of SAFE. Inside long texts, whose continuation is not
    examined, a character of SAFE must also follow.
    """
    sep, other = f"[{re.escape(separators)}]", f"[^{re.escape(separators)}]"
    return re.compile(rf"{sep}*{other}*(?:(?<!{SAFE}){sep}+{other}*)*"), re.compile(rf"(?<={SAFE}){sep}(?={SAFE})")


def _grouped(units: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for unit in units:
        if len(unit) > LIMIT_CHARACTERS:
            raise too_long(unit)
        group.append(unit)
        size += len(unit)
        if size >= GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
