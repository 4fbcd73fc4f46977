"""Removes near-duplicate documents by MinHash (Broder, 1997) with banded LSH (Leskovec et al., Mining of Massive
Datasets, section 3.4), in bounded memory.

The first pass writes each document's signature (`SignatureWriter`), computed by rensa, one file per section of the
corpus. `find_near_duplicates` then goes through the documents in order: one is dropped if its estimated similarity to
an earlier kept one is at least the threshold. The result depends only on the order of the documents, not on how they
are split into files.

Similarity is the Jaccard index of two documents' sets of shingles: runs of `words` lower-cased words without the
characters between them. Its estimate, the share of the P values of two signatures that agree, has a standard error of
at most sqrt(J (1 - J) / P): 0.035 for J = 0.8, P = 128.
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
from lit_files.database import quoted, showing
from lit_files.progress import track

PERMUTATIONS = 128
WORDS = 5
SEED = 1
ROWS_PER_GROUP = 1 << 12
SLICE_CHARACTERS = 1 << 20  # slice size for long documents: shingles take a hundred times the memory of their text
MISSED = 0.01  # accepted fraction of pairs at the threshold that share no band

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
    """Compute a document's MinHash signature, uint32 [permutations].

    A text with fewer words than a shingle is a single shingle.
    """
    sketch = _rensa().RMinHash(permutations, seed)
    carried: list[str] = []  # shingles may span two slices, so slices overlap
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


class SignatureWriter(TableWriter):
    """Writes the signatures of one section of the corpus."""

    def __init__(self, path: Path, permutations: int = PERMUTATIONS) -> None:
        schema = pa.schema(
            [("document", pa.int64()), ("signature", pa.binary(4 * permutations))],
            metadata={"sketch": f"rensa RMinHash {_rensa().RMinHash.ALGORITHM_VERSION}"},
        )
        self._permutations = permutations
        super().__init__(path, schema)
        self._documents: list[int] = []
        self._signatures: list[bytes] = []

    def add(self, document: int, signature: Signature) -> None:
        """Add the signature of a document; documents must come in ascending order."""
        assert signature.shape == (self._permutations,)
        self._documents.append(document)
        self._signatures.append(signature.astype("<u4").tobytes())
        if len(self._documents) >= ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        self.write([self._documents, self._signatures])
        self._documents, self._signatures = [], []


@dataclass(frozen=True)
class NearDuplicateCounts:
    """Counts of all documents, of those compared because they share a band, and of near duplicates."""

    documents: int
    candidates: int
    duplicates: int


def choose_bands(permutations: int, threshold: float) -> int:
    """The smallest number of bands b, of r = permutations / b values each, that misses at most `MISSED` of the pairs at
    the threshold.

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
    """Find each document that is a near duplicate of an earlier kept one.

    Only documents that share a band are compared; DuckDB finds them out of core, band by band, in
    `temporary`/find-near-duplicates, which is removed at the end (8 bytes per document and band). The pass keeps a kept
    document in memory as long as a later one shares a band with it: about 1 KB each plus 150 bytes per shared band.
    Only this grows with the corpus.

    Args:
        signature_files: signature files of the entire corpus, in order.
        outputs: the file to write for each, with columns (document int64, of_part int32, of_document int64, similarity
            float32). `of_*` is the most similar kept document (the first on ties); `of_part` indexes `signature_files`.
        threshold: minimum estimated similarity, above 0, at most 1.
        memory_bytes: DuckDB's limit.
        temporary: an existing folder; one join at a time may use it.
        bands: a divisor of the number of permutations; see `choose_bands`. More bands find more duplicates and cost
            more.

    Raises:
        ValueError: the threshold or the bands are impossible, the signatures were made with different settings; also
            see `tables.open_scratch_database`.
    """
    assert len(signature_files) == len(outputs) > 0
    if not 0 < threshold <= 1:
        raise ValueError(f"--near_dedup {threshold}: give a similarity above 0 and up to 1, such as 0.8")
    permutations = _permutations_of(signature_files)
    bands = choose_bands(permutations, threshold) if bands is None else bands
    if bands < 1 or permutations % bands:
        raise ValueError(f"the {permutations} values of a signature cannot be divided into {bands} bands")
    scratch = temporary / "find-near-duplicates"
    with open_scratch_database(scratch, memory_bytes) as database:
        documents = _write_bands(signature_files, bands, scratch / "bands.parquet")
        table = f"read_parquet({quoted(scratch / 'bands.parquet')})"
        database.execute("CREATE TABLE shared (number BIGINT, band UBIGINT, last BIGINT)")
        for band in track(range(bands), "looking for similar documents", "bands"):
            database.execute(
                f"""INSERT INTO shared SELECT number, band_{band}, last FROM {table} JOIN (
                    SELECT band_{band}, max(number) AS last FROM {table} GROUP BY ALL HAVING count(*) > 1
                ) USING (band_{band})"""
            )
        (candidates,) = database.execute("SELECT count(DISTINCT number) FROM shared").fetchone()
        shared = scratch / "shared.parquet"
        with showing(database, "sorting similar documents"):
            database.execute(f"COPY (FROM shared ORDER BY number, band) TO {quoted(shared)} (FORMAT parquet)")
        similar = track(_candidates(shared), "comparing similar documents", "documents", candidates)
        duplicates = _Pass(threshold).run(similar, signature_files, outputs)
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
    """Iterate over documents [n] and signatures [n, P] in batches."""
    for batch in read_batches(path):
        width = batch["signature"].type.byte_width
        joined = b"".join(batch["signature"].to_pylist())
        yield batch["document"].to_numpy(), np.frombuffer(joined, "<u4").reshape(-1, width // 4)


def _write_bands(signature_files: Sequence[Path], bands: int, path: Path) -> int:
    """Write each document's index in the corpus and its band hashes; returns the number of documents."""
    schema = pa.schema([("number", pa.int64()), *((f"band_{band}", pa.uint64()) for band in range(bands))])
    table = TableWriter(path, schema)
    total = sum(pq.read_metadata(file).num_rows for file in signature_files)
    read = (batch for file in signature_files for batch in _read_signatures(file))
    try:
        for documents, values in track(read, "reading signatures", "documents", total, size=lambda b: len(b[0])):
            numbers = np.arange(table.rows, table.rows + len(documents))
            table.write([numbers, *_band_hashes(values, bands)])
        table.close()
    finally:
        table.abandon()
    return table.rows


def _band_hashes(values: npt.NDArray[np.uint32], bands: int) -> npt.NDArray[np.uint64]:
    """Hash signatures [n, P] to [bands, n]; a collision only costs an extra comparison."""
    n, permutations = values.shape
    columns = values.reshape(n, bands, permutations // bands).astype(np.uint64)
    hashes = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), (n, bands)).copy()
    for i in range(permutations // bands):  # xorshift and multiply, as in splitmix64 (Steele et al., 2014)
        hashes = (hashes ^ columns[:, :, i]) * np.uint64(0xBF58476D1CE4E5B9)
        hashes ^= hashes >> np.uint64(31)
    return np.ascontiguousarray(hashes.T)


def _candidates(shared: Path) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Documents that share bands, by number, with (band, last document in that band) for each band."""
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
    n_bands: int  # shared with a later document


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
        """Write the near duplicates of each file; returns their number."""
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
        """(file, document, similarity) of the most similar kept document, if it reaches the threshold."""
        numbers = sorted({number for band, _ in bands for number in self.by_band.get(band, ())})
        if not numbers:
            return None
        similarities = (np.stack([self.kept[n].signature for n in numbers]) == signature).mean(axis=1)
        best = int(similarities.argmax())  # the first on ties
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
        """Forget documents that share no band with a later one."""
        for band, last in bands:
            if last == number:
                for other in self.by_band.pop(band, ()):
                    self.kept[other].n_bands -= 1
                    if not self.kept[other].n_bands:
                        del self.kept[other]


class NearDuplicates:
    """Reads one output file of `find_near_duplicates` in constant memory."""

    def __init__(self, path: Path) -> None:
        self._rows = (
            row
            for batch in read_batches(path)
            for row in zip(batch["document"].to_pylist(), batch["similarity"].to_pylist(), strict=True)
        )
        self._next: tuple[int, float] | None = next(self._rows, None)

    def of(self, document: int) -> float | None:
        """The document's similarity to the kept one it duplicates, or None if it is kept. Query in ascending order."""
        while self._next is not None and self._next[0] < document:
            self._next = next(self._rows, None)
        return self._next[1] if self._next is not None and self._next[0] == document else None
