"""Near-duplicates, compared with exact Jaccard indices, for any division of the corpus into parts."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lit_data.prepare import near_dedup
from lit_data.prepare.near_dedup import (
    NearDuplicateCounts,
    NearDuplicates,
    SignatureWriter,
    choose_bands,
    find_near_duplicates,
    signatures,
)

THRESHOLD = 0.75
MARGIN = 0.15
MEMORY = 1 << 28


def shingles(text: str, words: int = 5) -> set[str]:
    found = re.findall(r"\w+", text.lower())
    return {" ".join(found[i : i + words]) for i in range(max(1, len(found) - words + 1))}


def jaccard(a: str, b: str) -> float:
    one, other = shingles(a), shingles(b)
    return len(one & other) / len(one | other)


def make_corpus(families: int = 40, seed: int = 0) -> list[str]:
    """Texts of 60 to 300 words, each with up to 6 variants in which some words were replaced; shuffled."""
    rng = random.Random(seed)
    vocabulary = [f"w{n}" for n in range(5000)]
    corpus = []
    for _ in range(families):
        base = rng.choices(vocabulary, k=rng.randrange(60, 300))
        corpus.append(" ".join(base))
        for _ in range(rng.randrange(7)):
            variant = list(base)
            for _ in range(rng.choice([0, 1, 2, 4, 8, 16])):
                variant[rng.randrange(len(variant))] = rng.choice(vocabulary)
            corpus.append(rng.choice(["  ", " ", ", "]).join(variant).capitalize())
    rng.shuffle(corpus)
    return corpus


Match = tuple[int, int, float]  # a dropped document and the kept near-duplicate, as numbers in the corpus; similarity


def deduplicate(corpus: Sequence[str], cuts: Sequence[int], folder: Path) -> tuple[list[Match], NearDuplicateCounts]:
    """Deduplicate with parts that end before the given documents. Numbers in a part increase by 3."""
    folder.mkdir()
    bounds = [0, *cuts, len(corpus)]
    files, outputs = ([folder / f"{kind}-{p}.parquet" for p in range(len(bounds) - 1)] for kind in ("in", "out"))
    for part, path in enumerate(files):
        writer = SignatureWriter(path)
        for number, text in enumerate(corpus[bounds[part] : bounds[part + 1]]):
            writer.add(3 * number, signatures(text))
        writer.close()
    counts = find_near_duplicates(files, outputs, threshold=THRESHOLD, memory_bytes=MEMORY, temporary=folder)
    assert sorted(folder.iterdir()) == sorted([*files, *outputs])
    matches = [
        (
            bounds[part] + row["document"] // 3,
            bounds[row["of_part"]] + row["of_document"] // 3,
            round(row["similarity"], 6),
        )
        for part, path in enumerate(outputs)
        for row in pq.read_table(path).to_pylist()
    ]
    return matches, counts


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_similar_documents_are_dropped_and_others_kept(seed: int, tmp_path: Path) -> None:
    corpus = make_corpus(seed=seed)
    matches, counts = deduplicate(corpus, [], tmp_path / "d")
    dropped = {document: (of, similarity) for document, of, similarity in matches}
    kept = [n for n in range(len(corpus)) if n not in dropped]
    assert counts.documents == len(corpus) >= counts.candidates > counts.duplicates == len(dropped) > 20
    for document, text in enumerate(corpus):
        nearest = max((jaccard(corpus[k], text) for k in kept if k < document), default=0.0)
        if nearest > THRESHOLD + MARGIN:
            assert document in dropped
        if nearest < THRESHOLD - MARGIN:
            assert document not in dropped
    for document, (of, similarity) in dropped.items():
        assert of in kept and of < document
        assert similarity == pytest.approx(jaccard(corpus[of], corpus[document]), abs=MARGIN)


def test_the_result_equals_a_plain_loop_over_all_signatures(tmp_path: Path) -> None:
    """Pairs that share no band would be missed; with this threshold and seed there are none."""
    corpus = make_corpus(seed=5)
    matches, _ = deduplicate(corpus, [], tmp_path / "d")
    made = [signatures(text) for text in corpus]
    expected: list[Match] = []
    kept: list[int] = []
    for number, signature in enumerate(made):
        best, similarity = -1, 0.0
        for k in kept:
            share = float((made[k] == signature).mean())
            if share > similarity:
                best, similarity = k, share
        if similarity >= THRESHOLD:
            expected.append((number, best, round(similarity, 6)))
        else:
            kept.append(number)
    assert matches == expected


def test_the_result_does_not_depend_on_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(seed=4)
    whole, counts = deduplicate(corpus, [], tmp_path / "1")
    assert len(whole) > 20
    monkeypatch.setattr(near_dedup, "ROWS_PER_GROUP", 7)
    monkeypatch.setattr("lit_data.prepare.tables.READ_ROWS", 5)
    for name, cuts in (("3", [20, 90]), ("7", [1, 1, 8, 30, 31, 100])):
        assert deduplicate(corpus, cuts, tmp_path / name) == (whole, counts)


def test_memory_is_freed_once_no_later_document_can_match(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = np.arange(8, dtype=np.uint32), np.arange(8, 16, dtype=np.uint32)
    files = {Path("a"): [(np.array([0, 1, 2, 3]), np.stack([one, two, one, two]))]}
    monkeypatch.setattr(near_dedup, "_read_signatures", lambda path: iter(files[path]))

    class NoTable:
        rows = 0

        def write(self, columns: object) -> None: ...
        def close(self) -> None: ...
        def abandon(self) -> None: ...

    monkeypatch.setattr(near_dedup, "TableWriter", lambda *args: NoTable())
    ordered_pass = near_dedup._Pass(0.5)
    sizes = []

    def candidates() -> object:
        for number, bands in enumerate([[(7, 2), (8, 2)], [(9, 3)], [(7, 2), (8, 2)], [(9, 3)]]):
            sizes.append((len(ordered_pass.kept), len(ordered_pass.by_band)))
            yield number, bands

    ordered_pass.run(candidates(), list(files), [Path("out")])  # type: ignore[arg-type]
    assert sizes == [(0, 0), (1, 2), (2, 3), (1, 1)]
    assert not ordered_pass.kept and not ordered_pass.by_band


def test_signatures_depend_on_the_words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"Wort{n % 97}" for n in range(1000)]
    signature = signatures(" ".join(words))
    assert signature.shape == (128,) and signature.dtype == np.uint32
    assert np.array_equal(signature, signatures(" - ".join(words).upper() + "!\n"))
    assert not np.array_equal(signature, signatures(" ".join(words), seed=2))
    assert signatures("a b c", permutations=64, words=2).shape == (64,)
    for slice_characters in (1, 7, 100):  # a long text is processed in pieces
        monkeypatch.setattr(near_dedup, "SLICE_CHARACTERS", slice_characters)
        assert np.array_equal(signature, signatures(" ".join(words)))
        assert np.array_equal(signatures("a b c"), signatures("A, B, C."))
        assert np.array_equal(signatures("a b c", words=1), signatures("c b a b", words=1))


def test_texts_shorter_than_a_shingle_are_compared_as_a_whole() -> None:
    assert np.array_equal(signatures("one two"), signatures("One, two!"))
    assert (signatures("one two") == signatures("one two three")).mean() < 0.2
    assert np.array_equal(signatures(""), signatures(" ?! "))


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.99])
def test_the_number_of_bands_is_the_smallest_sufficient_one(threshold: float) -> None:
    def missed(bands: int) -> float:
        return float((1 - threshold ** (128 // bands)) ** bands)

    bands = choose_bands(128, threshold)
    assert missed(bands) <= 0.01
    assert bands == 1 or missed(bands // 2) > 0.01


def test_documents_are_looked_up_in_order(tmp_path: Path) -> None:
    path, output = tmp_path / "s.parquet", tmp_path / "n.parquet"
    writer = SignatureWriter(path)
    for number, text in [(0, "a"), (4, "b"), (5, "b"), (9, "a"), (11, "c")]:
        writer.add(number, signatures(text))
    writer.close()
    writer.abandon()  # does nothing now
    find_near_duplicates([path], [output], threshold=0.9, memory_bytes=MEMORY, temporary=tmp_path)
    for asked in (range(13), [5, 9], [9], [12]):
        near = NearDuplicates(output)
        assert [near.of(n) for n in asked] == [1.0 if n in (5, 9) else None for n in asked]


def test_mistakes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, permutations in zip(files, (128, 64), strict=True):
        SignatureWriter(path, permutations).close()
    outputs = [tmp_path / "c", tmp_path / "d"]

    def find(n_files: int, threshold: float, bands: int | None = None) -> NearDuplicateCounts:
        return find_near_duplicates(
            files[:n_files],
            outputs[:n_files],
            threshold=threshold,
            bands=bands,
            memory_bytes=MEMORY,
            temporary=tmp_path,
        )

    for threshold in (0.0, 1.1):
        with pytest.raises(ValueError, match=f"--near_dedup {threshold}"):
            find(2, threshold)
    with pytest.raises(ValueError, match="b.parquet.*another number of permutations.*a.parquet"):
        find(2, 0.8)
    with pytest.raises(ValueError, match="the 128 values of a signature cannot be divided into 7 bands"):
        find(1, 0.8, bands=7)
    assert find(1, 0.8) == NearDuplicateCounts(0, 0, 0)
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ValueError, match=r"rensa: pip install 'llammlein\[data\]'"):
        signatures("text")
