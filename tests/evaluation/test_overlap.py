"""The longest overlap, compared with brute force over all substrings."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_eval.overlap import Overlap, longest_overlap, longest_overlap_in_files

texts = st.text(alphabet="ab\0ü", max_size=14)


def brute_force(sample: str, documents: list[str]) -> Overlap:
    pieces = [(j - i, -i) for i in range(len(sample)) for j in range(i + 1, len(sample) + 1)]
    found = [(n, i) for n, i in pieces if any(sample[-i : n - i] in document for document in documents)]
    length, start = max(found, default=(0, 0))
    return Overlap(length, sample[-start : length - start], -start)


@given(sample=texts, corpus=texts)
def test_equals_brute_force(sample: str, corpus: str) -> None:
    assert longest_overlap(sample, corpus) == brute_force(sample, [corpus])


@given(sample=texts, files=st.lists(st.lists(texts, max_size=3), max_size=3))
def test_files_equal_brute_force(sample: str, files: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("files")
    paths = []
    for number, documents in enumerate(files):
        paths.append(folder / f"{number}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    assert longest_overlap_in_files(sample, paths) == brute_force(sample, [d for file in files for d in file])


def test_finds_a_planted_passage_in_five_megabytes() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(5000)]
    corpus = " ".join(rng.choices(words, k=800_000))
    assert len(corpus) > 5_000_000
    planted = corpus[3_000_000:3_000_200]
    sample = "X" * 400 + planted + "Y" * 400
    assert longest_overlap(sample, corpus) == Overlap(200, planted, 400)


def test_plain_text_file_and_no_overlap(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Die Tür ist offen.", encoding="utf-8")
    assert longest_overlap_in_files("eine Tür ist zu", [tmp_path / "a.txt"]) == Overlap(10, "e Tür ist ", 3)
    assert longest_overlap("xyz", "abc") == Overlap(0, "", 0)
    assert longest_overlap("", "abc") == longest_overlap("abc", "") == Overlap(0, "", 0)


@pytest.mark.parametrize("line", ['{"text": 5}', "[]", '{"id": "a"}', "{", '"text"'])
def test_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2"):
        longest_overlap_in_files("a", [path])


def test_bad_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"bad\.txt.*byte 3"):
        longest_overlap_in_files("a", [tmp_path / "bad.txt"])
