"""Exact deduplication, compared with a plain dictionary, for any division of the corpus into parts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_data.prepare import exact_dedup
from lit_data.prepare.exact_dedup import Dropped, DuplicateCounts, HashWriter, find_duplicates
from lit_data.prepare.paragraphs import drop_paragraphs, hash_paragraphs, split_paragraphs

MEMORY = 1 << 28
MIN_CHARACTERS = 12


def make_corpus(documents: int = 400, seed: int = 0) -> list[str]:
    """Documents of 0 to 12 lines, most of them drawn from a small pool, some of them short."""
    rng = random.Random(seed)
    stock = [f"line number {rng.randrange(10**6)} of the stock" for _ in range(300)] + ["yes", "no", "", "  "]
    return ["\n".join(rng.choices(stock, k=rng.randrange(13))) for _ in range(documents)]


def expected_without_duplicates(corpus: Sequence[str]) -> tuple[list[str], DuplicateCounts]:
    """Computed with a set of the lines themselves."""
    seen: set[str] = set()
    texts, counted, repeated = [], 0, 0
    for text in corpus:
        kept = []
        for paragraph in split_paragraphs(text):
            key = " ".join(paragraph.split())
            if len(key) >= MIN_CHARACTERS:
                counted += 1
                if key in seen:
                    repeated += 1
                    continue
                seen.add(key)
            kept.append(paragraph)
        texts.append("".join(kept))
    return texts, DuplicateCounts(counted, repeated)


def deduplicate(corpus: Sequence[str], cuts: Sequence[int], folder: Path) -> tuple[list[str], DuplicateCounts]:
    """Deduplicate with parts that end before the given documents."""
    folder.mkdir()
    parts = [corpus[a:b] for a, b in zip([0, *cuts], [*cuts, len(corpus)], strict=True)]
    hash_files = [folder / f"hashes-{p}.parquet" for p in range(len(parts))]
    outputs = [folder / f"dropped-{p}.parquet" for p in range(len(parts))]
    for part, path in zip(parts, hash_files, strict=True):
        writer = HashWriter(path)
        for number, text in enumerate(part):
            writer.add(number, hash_paragraphs(text, MIN_CHARACTERS))
        writer.close()
    counts = find_duplicates(hash_files, outputs, memory_bytes=MEMORY, temporary=folder)
    texts = []
    for part, path in zip(parts, outputs, strict=True):
        dropped = Dropped(path)
        texts += [drop_paragraphs(text, dropped.of(number)) for number, text in enumerate(part)]
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in [*hash_files, *outputs])
    return texts, counts


@pytest.mark.parametrize("cuts", [[], [50, 300], [1, 1, 7, 100, 250, 399]], ids=["1 part", "3 parts", "7 parts"])
def test_the_first_occurrence_is_kept_for_any_number_of_parts(
    cuts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_dedup, "ROWS_PER_GROUP", 97)  # groups end in the middle of documents
    corpus = make_corpus()
    texts, counts = deduplicate(corpus, cuts, tmp_path / "it's")
    expected, expected_counts = expected_without_duplicates(corpus)
    assert 500 < expected_counts.duplicates < expected_counts.paragraphs
    assert texts == expected
    assert counts == expected_counts


def test_documents_may_be_looked_up_with_gaps_and_across_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_data.prepare.tables.READ_ROWS", 4)
    rows = [(2, 0), (2, 1), (2, 5), (2, 6), (2, 7), (5, 1), (6, 0), (6, 2), (9, 3)]
    table = pa.table(list(zip(*rows, strict=True)), schema=exact_dedup.DUPLICATES)
    pq.write_table(table, tmp_path / "d.parquet")
    for asked in (range(12), [2, 6, 9], [0, 5, 10, 11], [6], [11]):
        dropped = Dropped(tmp_path / "d.parquet")
        assert {d: dropped.of(d) for d in asked} == {d: [p for e, p in rows if e == d] for d in asked}


def test_paragraphs_of_dropped_documents_do_not_count(tmp_path: Path) -> None:
    corpus = [
        "a long shared line\n",
        "a long shared line\nanother long line\n",
        "another long line\na long shared line",
    ]
    hash_files, outputs, excluded = (
        [tmp_path / f"{kind}-{p}.parquet" for p in range(2)] for kind in ("hashes", "dropped", "excluded")
    )
    for path, part in zip(hash_files, (corpus[:1], corpus[1:]), strict=True):
        writer = HashWriter(path)
        for number, text in enumerate(part):
            writer.add(number, hash_paragraphs(text, 1))
        writer.close()
    # Number 1 in the corpus is number 0 of the second part.
    for path, numbers in zip(excluded, ([], [0]), strict=True):
        pq.write_table(pa.table({"document": pa.array(numbers, pa.int64())}), path)
    counts = find_duplicates(hash_files, outputs, memory_bytes=MEMORY, temporary=tmp_path, excluded=excluded)
    assert counts == DuplicateCounts(paragraphs=3, duplicates=1)
    assert pq.read_table(outputs[0]).to_pylist() == []
    assert pq.read_table(outputs[1]).to_pylist() == [{"document": 1, "paragraph": 1}]


def test_hashes_are_published_only_when_closed(tmp_path: Path) -> None:
    path = tmp_path / "hashes.parquet"
    writer = HashWriter(path)
    writer.add(0, hash_paragraphs("some line", 1))
    assert not path.exists()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []

    writer = HashWriter(path)
    high_and_low = bytes(range(16))
    writer.add(3, [None, high_and_low])
    writer.close()
    writer.abandon()  # does nothing now
    assert pq.read_table(path).to_pylist() == [
        {"hash_high": 0x0001020304050607, "hash_low": 0x08090A0B0C0D0E0F, "document": 3, "paragraph": 1}
    ]


def test_intermediate_files_are_removed_after_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "hashes.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(ValueError, match="hashes.parquet"):
        find_duplicates(
            [tmp_path / "hashes.parquet"], [tmp_path / "out.parquet"], memory_bytes=MEMORY, temporary=tmp_path
        )
    assert [p.name for p in tmp_path.iterdir()] == ["hashes.parquet"]


def test_too_little_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1000 bytes of memory"):
        find_duplicates([tmp_path / "h"], [tmp_path / "o"], memory_bytes=1000, temporary=tmp_path)
