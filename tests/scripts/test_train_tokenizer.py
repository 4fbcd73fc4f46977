"""scripts/train_tokenizer.py as a user calls it, and its refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from running import script_error

from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_data.tokenizers.training import TokenizerSettings, train_on_texts, train_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_tokenizer.py"
LINES = [f"Zeile {i}: der Hund und die Katze </s> laufen {i * 37} Meter über die Straße.\n\n  Ende" for i in range(200)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


def call(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def train(paths: list[Path], vocab_size: int, kind: str, output: Path, **more: bool) -> Tokenizer:
    return train_tokenizer(TokenizerSettings(tuple(map(str, paths)), vocab_size, output, kind, **more))


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_trains_and_prints_where(tmp_path, corpus, kind):
    done = call("--input", corpus, "--vocab_size", 340, "--output", "new/tok", "--type", kind, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "340 ids" in done.stdout and done.stderr == ""
    opened = open_tokenizer(tmp_path / "new" / "tok")
    assert opened.vocab_size == 340 and opened.eos_token == "</s>" and opened.bos_id is not None
    assert opened.pad_id is not None and opened.pad_id != opened.eos_id
    for text in [LINES[0], "ÿ日本😀\r\n\t x", *map(chr, range(1, 256))]:
        assert opened.decode(opened.encode(text)) == text
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tok"]


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_the_same_text_gives_the_same_tokenizer(tmp_path, corpus, kind):
    first, second = (train([corpus], 340, kind, tmp_path / name) for name in ("a", "b"))
    assert first.fingerprint == second.fingerprint


def test_digits_are_grouped_and_spaces_belong_to_words(tmp_path):
    opened = train_on_texts(["abc 1234567 abc 1234567 abc"] * 50, 266, "byte_bpe", tmp_path / "a")
    pieces = [opened.decode([i]) for i in opened.encode("abc 1234567 abc")]
    assert pieces == ["abc", " ", "123", "456", "7", " abc"]
    opened = train_on_texts(["abc 1234567 abc 1234567 abc"] * 50, 271, "sentencepiece", tmp_path / "b")
    ids = opened.encode("abc 123 abc")
    assert [opened.decode([i]) for i in ids if opened.decode([i]).isdigit()] == ["1", "2", "3"]


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_mistakes_are_named_and_leave_nothing(tmp_path, corpus, kind):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "  "}\n')
    bad = tmp_path / "bad.jsonl"
    bad.write_text(corpus.read_text() + "{bad\n")
    taken = tmp_path / "taken"
    taken.mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    out = tmp_path / "out"
    for paths, size, output, message in [
        ([corpus], 259, out, r"--vocab_size 259 is too small: 256 bytes and \d special tokens .*; give 26\d or more"),
        ([corpus], 99999999999, out, r"--vocab_size 99999999999 is too large: give 10000000 or less"),
        ([empty], 340, out, r"--input .*empty.jsonl holds no text to train"),
        ([bad], 340, out, r"bad.jsonl.*201"),
        ([corpus], 340, taken, r"--output .*taken exists already"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(paths, size, kind, output)
    with pytest.raises(FileNotFoundError, match="missing"):
        train([tmp_path / "missing.jsonl"], 340, kind, out)
    with pytest.raises(ValueError, match="is not a tokenizer's folder"):
        train([corpus], 340, kind, taken, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_a_text_that_yields_fewer_ids_than_requested(tmp_path, corpus, kind):
    reached = train([corpus], 90000, kind, tmp_path / "most").vocab_size
    assert 340 < reached < 90000
    exact = train([corpus], reached, kind, tmp_path / "exact")
    assert (exact.vocab_size, exact.fingerprint) == (reached, open_tokenizer(tmp_path / "most").fingerprint)


def test_too_many_characters_for_the_vocabulary(tmp_path):
    texts = ["".join(chr(0x4E00 + i) for i in range(500))] * 20
    with pytest.raises(ValueError, match=r"--vocab_size 300 is too small: .*take \d+; give more"):
        train_on_texts(texts, 300, "sentencepiece", tmp_path / "a")


def test_overwrite_replaces_a_tokenizer(tmp_path, corpus):
    train([corpus], 340, "byte_bpe", tmp_path / "tok")
    train([corpus], 350, "sentencepiece", tmp_path / "tok", overwrite=True)
    assert open_tokenizer(tmp_path / "tok").kind == "sentencepiece"
    assert not (tmp_path / "tok" / "tokenizer.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "tok"]


def test_the_script_reports_errors_without_a_traceback(tmp_path, corpus):
    for arguments in (["--input", "missing", "--vocab_size", 340], ["--input", corpus, "--vocab_size", 100]):
        done = call(*arguments, "--output", "out", cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_skipped_documents_are_counted_and_named(tmp_path, corpus):
    corpus.write_text('{"text": 1}\n' + corpus.read_text())
    done = call("--input", corpus, "--vocab_size", 340, "--output", "tok", "--on_error", "skip", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "skipped: 1 unreadable documents" in done.stdout and "line 1" in done.stdout


def test_an_output_in_a_folder_of_text(tmp_path: Path) -> None:
    """The next call would read it as text."""
    (tmp_path / "text" / "more").mkdir(parents=True)
    (tmp_path / "text" / "a.txt").write_text("ein Text\n" * 99)
    (tmp_path / "link").symlink_to(tmp_path / "text")
    before = sorted(tmp_path.rglob("*"))
    for output in (tmp_path / "text" / "out", tmp_path / "text" / "more" / "out", tmp_path / "link" / "out"):
        for name, *words in (("train_tokenizer.py", "--vocab_size", 300), ("prepare_data.py", "--tokenizer", tmp_path)):
            error = script_error(name, "--input", tmp_path / "text", *words, "--output", output)
            assert f"--output {output} is inside the input folder {tmp_path / 'text'}" in error
    assert sorted(tmp_path.rglob("*")) == before
