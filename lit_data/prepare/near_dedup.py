"""Removal of near-duplicate documents by MinHash (Broder, 1997) and bands of it (Leskovec et al., Mining of Massive
Datasets, section 3.4), in limited memory.

The first pass writes each document's signature (`SignatureWriter`), made by rensa, one file a stretch of the corpus.
`find_near_duplicates` then goes through the documents in order: one is dropped when an earlier kept one is estimated to
be as similar as the threshold or more. The outcome depends on the order of the documents only, not on how they are cut
into files.

Similarity is the Jaccard index of two documents' sets of shingles: runs of `words` words in lower case without what
stands between them. Its estimate, the share of the P values of two signatures that agree, has a standard error of at
most sqrt(J (1 - J) / P): 0.035 for J = 0.8, P = 128.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from lit_data.prepare.tables import TableWriter, open_scratch_database, read_batches
from lit_files.database import quoted

PERMUTATIONS = 128
WORDS = 5
SEED = 1
ROWS_PER_GROUP = 1 << 12
SLICE_CHARACTERS = 1 << 20  # of a long document at once: shingles take a hundred times the memory of their text
MISSED = 0.01  # of the pairs whose similarity is the threshold, those that share no band

NEAR_DUPLICATES = pa.schema(
    [
        ("document", pa.int64()),
        ("of_part", pa.int32()),
        ("of_document", pa.int64()),
        ("similarity", pa.float32()),
    ]
)

_WORD = re.compile(r"\w+")
_NO_WORD = re.compile(r"\W")

Signature = npt.NDArray[np.uint32]


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise ValueError("--near_dedup needs the package rensa: pip install 'llammlein[data]'") from error
    return rensa


def signatures(text: str, *, permutations: int = PERMUTATIONS, words: int = WORDS, seed: int = SEED) -> Signature:
    """A document's MinHash signature, uint32 [permutations].

    A text of fewer words than a shingle has one shingle, all of it.
    """
    sketch = _rensa().RMinHash(permutations, seed)
    carried: list[str] = []  # the last words of one slice begin shingles that end in the next
    start, any_shingle = 0, False
    while start < len(text):
        gap = _NO_WORD.search(text, start + SLICE_CHARACTERS)
        end = gap.start() if gap else len(text)
        found = carried + _WORD.findall(text[start:end].lower())
        n_shingles = max(0, len(found) - words + 1)
        sketch.update([" ".join(found[i : i + words]) for i in range(n_shingles)])
        carried, start, any_shingle = found[n_shingles:], end, any_shingle or n_shingles > 0
    if not any_shingle:
        sketch.update([" ".join(carried)])
    return np.array(sketch.digest(), np.uint32)


class SignatureWriter:
    """Writes the signatures of one stretch of the corpus; the file is there, whole and synced, after `close`."""

    def __init__(self, path: Path, permutations: int = PERMUTATIONS) -> None:
        schema = pa.schema(
            [("document", pa.int64()), ("signature", pa.binary(4 * permutations))],
            metadata={"sketch": f"rensa RMinHash {_rensa().RMinHash.ALGORITHM_VERSION}"},
        )
        self._permutations = permutations
        self._table = TableWriter(path, schema)
        self._documents: list[int] = []
        self._signatures: list[bytes] = []

    def add(self, document: int, signature: Signature) -> None:
        """The signature of a document; documents come in ascending order."""
        assert signature.shape == (self._permutations,)
        self._documents.append(document)
        self._signatures.append(signature.astype("<u4").tobytes())
        if len(self._documents) >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._table.write([self._documents, self._signatures])
        self._documents, self._signatures = [], []

    def close(self) -> None:
        """Publish the file."""
        self._flush()
        self._table.close()

    def abandon(self) -> None:
        """Remove what was written; nothing after `close`."""
        self._table.abandon()


@dataclass(frozen=True)
class NearDuplicateCounts:
    """All documents, those that share a band with another (and were compared), and the near duplicates."""

    documents: int
    candidates: int
    duplicates: int


def choose_bands(permutations: int, threshold: float) -> int:
    """The fewest bands b of r = permutations / b values that all but `MISSED` of the pairs at the threshold share.

    A pair of similarity t shares no band with probability (1 - t^r)^b.
    """
    for bands in range(1, permutations):
        if permutations % bands == 0 and (1 - threshold ** (permutations // bands)) ** bands <= MISSED:
            return bands
    return permutations


def find_near_duplicates(
    signature_files: Sequence[Path],
    outputs: Sequence[Path],
    *,
    threshold: float,
    memory_bytes: int,
    temporary: Path,
    bands: int | None = None,
) -> NearDuplicateCounts:
    """Go through the corpus and drop each document that is nearly the same as an earlier kept one.

    Only documents that share a band with another are looked at; DuckDB finds them out of core, band by band, in
    `temporary`/find-near-duplicates, which is removed at the end (8 bytes a document and band). The pass itself holds
    those kept documents that share a band with a later one, from the first to the last of the band: about 1 KB each and
    150 bytes more for each such band. That is the one thing here that grows with the corpus.

    Args:
        signature_files: of the whole corpus, in its order.
        outputs: a file for each, to be written, with columns (document int64, of_part int32, of_document int64,
            similarity float32): the kept document that is most similar, the first of several, by the number of its
            file in `signature_files`.
        threshold: of the estimated similarity, above 0, at most 1.
        memory_bytes: DuckDB's limit.
        temporary: an existing folder; one join at a time may use it.
        bands: a divisor of the number of permutations; see `choose_bands`. More find more and cost more.

    Raises:
        ValueError: the threshold or the bands are impossible, the signatures were made in different ways; also see
            `tables.open_scratch_database`.
    """
    assert len(signature_files) == len(outputs) > 0
    if not 0 < threshold <= 1:
        raise ValueError(f"--near_dedup {threshold}: give a similarity above 0 and up to 1, such as 0.8")
    permutations = _permutations_of(signature_files)
    bands = choose_bands(permutations, threshold) if bands is None else bands
    if bands < 1 or permutations % bands:
        raise ValueError(f"{bands} bands: the {permutations} values of a signature can't be cut into so many")
    scratch = temporary / "find-near-duplicates"
    with open_scratch_database(scratch, memory_bytes) as database:
        documents = _write_bands(signature_files, bands, scratch / "bands.parquet")
        table = f"read_parquet({quoted(scratch / 'bands.parquet')})"
        database.execute("CREATE TABLE shared (number BIGINT, band UBIGINT, last BIGINT)")
        for band in range(bands):
            database.execute(
                f"""INSERT INTO shared SELECT number, band_{band}, last FROM {table} JOIN (
                    SELECT band_{band}, max(number) AS last FROM {table} GROUP BY ALL HAVING count(*) > 1
                ) USING (band_{band})"""
            )
        (candidates,) = database.execute("SELECT count(DISTINCT number) FROM shared").fetchone()
        shared = scratch / "shared.parquet"
        database.execute(f"COPY (FROM shared ORDER BY number, band) TO {quoted(shared)} (FORMAT parquet)")
        duplicates = _Pass(threshold).run(_candidates(shared), signature_files, outputs)
    return NearDuplicateCounts(documents, candidates, duplicates)


def _permutations_of(signature_files: Sequence[Path]) -> int:
    first = pq.read_schema(signature_files[0])
    for path in signature_files[1:]:
        if not pq.read_schema(path).equals(first, check_metadata=True):
            raise ValueError(
                f"the signatures of {path} were made with another number of permutations or another version of rensa "
                f"than those of {signature_files[0]}"
            )
    return int(first.field("signature").type.byte_width) // 4


def _read_signatures(path: Path) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]]:
    """Documents [n] and signatures [n, P], some at a time."""
    for batch in read_batches(path):
        width = batch["signature"].type.byte_width
        joined = b"".join(batch["signature"].to_pylist())
        yield batch["document"].to_numpy(), np.frombuffer(joined, "<u4").reshape(-1, width // 4)


def _write_bands(signature_files: Sequence[Path], bands: int, path: Path) -> int:
    """Write each document's number in the corpus and the hashes of its bands; returns how many documents there are."""
    schema = pa.schema([("number", pa.int64()), *((f"band_{band}", pa.uint64()) for band in range(bands))])
    table = TableWriter(path, schema)
    try:
        for file in signature_files:
            for documents, values in _read_signatures(file):
                numbers = np.arange(table.rows, table.rows + len(documents))
                table.write([numbers, *_band_hashes(values, bands)])
        table.close()
    finally:
        table.abandon()
    return table.rows


def _band_hashes(values: npt.NDArray[np.uint32], bands: int) -> npt.NDArray[np.uint64]:
    """Of signatures [n, P]: [bands, n], different for different bands (but for chance: a comparison more)."""
    n, permutations = values.shape
    columns = values.reshape(n, bands, permutations // bands).astype(np.uint64)
    hashes = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), (n, bands)).copy()
    for i in range(permutations // bands):  # xorshift and multiply, as in splitmix64 (Steele et al., 2014)
        hashes = (hashes ^ columns[:, :, i]) * np.uint64(0xBF58476D1CE4E5B9)
        hashes ^= hashes >> np.uint64(31)
    return np.ascontiguousarray(hashes.T)


def _candidates(shared: Path) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Documents that share bands, by their number: (band, the last document that has it) each."""
    number = -1
    bands: list[tuple[int, int]] = []
    for batch in read_batches(shared):
        for row, band, last in zip(*(batch[c].to_pylist() for c in ("number", "band", "last")), strict=True):
            if row != number:
                if bands:
                    yield number, bands
                number, bands = row, []
            bands.append((band, last))
    if bands:
        yield number, bands


@dataclass
class _Kept:
    file: int
    document: int
    signature: Signature
    n_bands: int  # that a later document shares


class _Pass:
    """The ordered pass over the documents that share bands."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.kept: dict[int, _Kept] = {}  # by number
        self.by_band: dict[int, list[int]] = {}  # kept documents, in order

    def run(
        self,
        candidates: Iterator[tuple[int, list[tuple[int, int]]]],
        signature_files: Sequence[Path],
        outputs: Sequence[Path],
    ) -> int:
        """Write the near duplicates of each file; returns how many there are."""
        duplicates, first = 0, 0
        number, bands = next(candidates, (-1, []))
        for file, (path, output) in enumerate(zip(signature_files, outputs, strict=True)):
            table = TableWriter(output, NEAR_DUPLICATES)
            try:
                for documents, values in _read_signatures(path):
                    rows: list[tuple[int, int, int, float]] = []
                    while first <= number < first + len(documents):
                        signature, document = values[number - first], int(documents[number - first])
                        match = self._most_similar(signature, bands)
                        if match is None:
                            self._keep(number, _Kept(file, document, signature.copy(), 0), bands)
                        else:
                            rows.append((document, *match))
                        self._forget(number, bands)
                        number, bands = next(candidates, (-1, []))
                    first += len(documents)
                    table.write(list(zip(*rows, strict=True)) if rows else [[]] * len(NEAR_DUPLICATES))
                duplicates += table.rows
                table.close()
            finally:
                table.abandon()
        return duplicates

    def _most_similar(self, signature: Signature, bands: list[tuple[int, int]]) -> tuple[int, int, float] | None:
        """(file, document, similarity) of the kept document that is nearest, if it is near enough."""
        numbers = sorted({number for band, _ in bands for number in self.by_band.get(band, ())})
        if not numbers:
            return None
        similarities = (np.stack([self.kept[n].signature for n in numbers]) == signature).mean(axis=1)
        best = int(similarities.argmax())  # the first of several
        if similarities[best] < self.threshold:
            return None
        kept = self.kept[numbers[best]]
        return kept.file, kept.document, float(similarities[best])

    def _keep(self, number: int, kept: _Kept, bands: list[tuple[int, int]]) -> None:
        for band, last in bands:
            if last > number:
                self.by_band.setdefault(band, []).append(number)
                kept.n_bands += 1
        if kept.n_bands:
            self.kept[number] = kept

    def _forget(self, number: int, bands: list[tuple[int, int]]) -> None:
        """Drop what no later document can meet."""
        for band, last in bands:
            if last == number:
                for other in self.by_band.pop(band, ()):
                    self.kept[other].n_bands -= 1
                    if not self.kept[other].n_bands:
                        del self.kept[other]


class NearDuplicates:
    """Reads what `find_near_duplicates` wrote for one file, in constant memory."""

    def __init__(self, path: Path) -> None:
        self._rows = (
            row
            for batch in read_batches(path)
            for row in zip(batch["document"].to_pylist(), batch["similarity"].to_pylist(), strict=True)
        )
        self._next: tuple[int, float] | None = next(self._rows, None)

    def of(self, document: int) -> float | None:
        """The similarity to the kept document it nearly equals; None: it is kept. Ask in ascending order."""
        while self._next is not None and self._next[0] < document:
            self._next = next(self._rows, None)
        return self._next[1] if self._next is not None and self._next[0] == document else None
