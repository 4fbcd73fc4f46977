"""A separator of --split_documents that is not in the text is named, before any work."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from running import script_error

from lit_data.corpus import separators
from lit_data.corpus.files import list_files
from lit_data.corpus.separators import check_separator

END = "<|endoftext|>"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text(f"One\n{END}\nTwo\n{END}\nThree\n")
    (folder / "b.txt").write_text("All of it")
    with gzip.open(folder / "c.txt.gz", "wt") as file:
        file.write(f"Four\r\n {END} \r\nFive")
    return folder


def test_found_in_some_file(corpus: Path) -> None:
    files = list_files([corpus])
    assert check_separator(files, [], END) == check_separator(files[1:], [], END) == []
    assert check_separator(files[1:2], [], "file") == check_separator(files[1:2], [], "line") == []
    (warning,) = check_separator(files, files[1:2], END)
    assert warning.startswith(f"held-out text: --split_documents {END}: it is on no line of its own in {corpus}/b.txt")
    (warning,) = check_separator(files[1:2], files, END)
    assert warning.startswith("training text: ")
    (warning,) = check_separator(files, [], "blank_line")
    assert "there is no blank line in the 3 plain-text files" in warning


def test_found_nowhere(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typo = "<|endofttext|>"
    with pytest.raises(ValueError, match=r"one document; did you mean <\|endoftext\|>\?$"):
        check_separator(list_files([corpus]), [], typo)
    (corpus / "d.txt").write_text(f"Six{typo}Seven")
    with pytest.raises(ValueError, match=r"d.txt has it within a line, where it does not count$"):
        check_separator(list_files([corpus]), [], typo)
    monkeypatch.setattr(separators, "SCANNED_BYTES", 10)  # the rest may have it: no error
    (warning,) = check_separator(list_files([corpus]), [], typo)
    assert "in the first 0 MB" in warning


def test_the_scripts_refuse_it(corpus: Path, tmp_path: Path) -> None:
    text = ("--input", corpus, "--split_documents", "<|eot|>", "--output", tmp_path / "out")
    for words in (("train_tokenizer.py", *text, "--vocab_size", 300), ("quickstart.py", *text)):
        assert "--split_documents <|eot|>: it is on no line of its own" in script_error(*words)
    assert not (tmp_path / "out").exists()
