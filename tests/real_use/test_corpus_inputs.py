"""What a user points a preparation at: files given twice, splits mixed up, odd fields, whole files, bombs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from running import script

from lit_data.corpus.tokenizer_training import train_on_texts
from lit_data.documents import Documents
from lit_data.packed import PackedDataset

TEXTS = ["der Hund und die Katze laufen über die Straße", "ein Satz\n\nnoch einer", "the cat sat on the mat"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tok"
    train_on_texts(TEXTS * 5, 270, "byte_bpe", folder)
    return folder


def lines(*records: object) -> str:
    return "".join(json.dumps(r) + "\n" for r in records)


def prepare(*arguments: object, tokenizer: Path, output: Path, workers: int = 1):
    """scripts/prepare_data.py in this process; status, output, and what it wrote to stderr."""
    fixed = ("--tokenizer", tokenizer, "--output", output, "--workers", workers)
    return script("prepare_data.py", *arguments, *fixed)


def documents(output: Path, side: str = "train") -> list[tuple[str, str]]:
    """(id, decoded text) of all documents."""
    from lit_data.tokenizer import open_tokenizer

    opened, dataset = open_tokenizer(output / "tokenizer"), PackedDataset(output / side)
    found = Documents(dataset)
    facts = found.facts(range(dataset.n_documents), ["id"])
    spans = [(found.start(n), found.start(n + 1)) for n in range(dataset.n_documents)]
    return [(facts[n]["id"], opened.decode(found.tokens(a, b - 1))) for n, (a, b) in enumerate(spans)]


def corpus(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines({"text": "eins", "id": "1"}, {"text": "zwei", "id": "2"}))
    (folder / "b.txt").write_text("drei")
    return folder


WAYS_TO_GIVE_A_FILE_TWICE = {
    "the folder and the file": ("corp", "corp/a.jsonl"),
    "the file, then the folder": ("corp/a.jsonl", "corp"),
    "the same word twice": ("corp", "corp"),
    "another way to write it": ("corp", "./corp/../corp/a.jsonl"),
    "overlapping patterns": ("corp/*.jsonl", "corp/*"),
    "a link to it": ("corp", "link.jsonl"),
    "a hard link to it": ("corp", "hard.jsonl"),
    "an absolute path": ("corp", "{here}/corp/a.jsonl"),
}


@pytest.mark.parametrize("way", WAYS_TO_GIVE_A_FILE_TWICE)
def test_a_file_given_twice_is_read_once(tmp_path, tokenizer, monkeypatch, way):
    """Point 6: one file reaches --input by two names; its documents are packed once, and a warning names it."""
    monkeypatch.chdir(tmp_path)
    corpus(tmp_path / "corp")
    (tmp_path / "link.jsonl").symlink_to("corp/a.jsonl")
    os.link("corp/a.jsonl", "hard.jsonl")
    given = [w.format(here=tmp_path) for w in WAYS_TO_GIVE_A_FILE_TWICE[way]]
    done = prepare("--input", *given, tokenizer=tokenizer, output=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert sorted(text for _, text in documents(tmp_path / "out")) == ["drei", "eins", "zwei"]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert any("it is read once" in w and ("a.jsonl" in w or "hard" in w) for w in warnings), done.stderr


def test_a_file_of_both_sides_is_refused(tmp_path, tokenizer):
    """Point 6: validation text that --input takes in too, by a hard link, is refused before anything is written."""
    folder = corpus(tmp_path / "corp")
    os.link(folder / "a.jsonl", tmp_path / "val.jsonl")
    done = prepare(
        "--input", folder, "--val_input", tmp_path / "val.jsonl", tokenizer=tokenizer, output=tmp_path / "out"
    )
    assert done.returncode == 2 and "given by --input and by --val_input" in done.stderr
    assert not (tmp_path / "out").exists() and "Traceback" not in done.stderr


@pytest.mark.parametrize("held_out", ["b.dev", "b.test", "b.dev.gz", "deep/b.DEV"])
def test_train_and_dev_files_in_one_input_are_refused(tmp_path, tokenizer, held_out):
    """Point 6: BabyLM's .train and .dev files in one folder would make a model train on its validation text."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.train").write_text("eins")
    held = tmp_path / "in" / held_out
    held.write_bytes(b"zwei")
    done = prepare("--input", tmp_path / "in", tokenizer=tokenizer, output=tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    for part in (str(held), "a.train", "--val_input", "--allow_mixed_splits"):
        assert part in done.stderr
    if held_out == "b.dev":
        out = tmp_path / "out"
        done = prepare("--input", tmp_path / "in", "--allow_mixed_splits", tokenizer=tokenizer, output=out)
        assert done.returncode == 0 and "warning" not in done.stderr and len(documents(out)) == 2
        # The way that the message names.
        pattern = f"{tmp_path}/in/**/*"
        done = prepare(
            *("--input", f"{pattern}.train*", "--val_input", f"{pattern}.dev*"),
            tokenizer=tokenizer, output=tmp_path / "apart",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert [documents(tmp_path / "apart", s) for s in ("train", "val")] == [
            [("a.train", "eins")],
            [(held.name, "zwei")],
        ]


@pytest.mark.parametrize(
    "names",
    [
        ("train/a.txt", "dev/a.txt"), ("train/a.txt", "valid/a.txt"), ("train_10M/a.txt", "eval/a.txt"),
        ("train-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl"), ("wiki.train.txt", "wiki.test.txt"),
    ],
)  # fmt: skip
def test_folders_named_after_splits_are_warned_about(tmp_path, tokenizer, names):
    """Point 6: `--input custom/` with train/ and dev/ in it is packed as one dataset, with a warning first."""
    for name in (*names, "training_manuals/x.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(lines({"text": name}))
    done = prepare("--input", tmp_path / "in", tokenizer=tokenizer, output=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert "go into one dataset" in warning and "--val_input" in warning
    assert all(name.split("/")[0] in warning for name in names)


def test_a_file_beside_its_compressed_copy_is_warned_about(tmp_path, tokenizer):
    """Point 6: a.jsonl was packed by `gzip -k`, so that the folder holds its documents twice."""
    import gzip

    folder = corpus(tmp_path / "corp")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    done = prepare("--input", folder, tokenizer=tokenizer, output=tmp_path / "out")
    assert done.returncode == 0 and "a.jsonl.gz differ in their compression only" in done.stderr


def test_work_of_an_older_version_is_resumed(tmp_path, tokenizer):
    """Point 6: a preparation that was killed before a setting existed is gone on with after the update."""
    from lit_data.plan import Plan, Settings, differences

    here = Plan.make(Settings((str(corpus(tmp_path / "corp")),), str(tokenizer))).to_dict()
    there = json.loads(json.dumps(here))
    for new in ("allow_mixed_splits", "seed", "metadata"):
        del there["settings"][new]
    assert differences(there, here) == []
    here["settings"]["seed"] = 3
    assert differences(there, here) == ["--seed 0, now 3"]
