"""Word counts per document in docs.parquet, and their sum in the manifest."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from chat_tokenizers import write_tokenizer
from document_facts import facts_of
from running import script

from lit_data.packed.manifest import MANIFEST, read_manifest
from lit_data.packed.reader import PackedDataset
from lit_data.packed.summary import faults_of
from lit_files.checksum import file_sha256

TEXTS = ["one two  three\nfour", "eins\tzwei", "a", "  viele   Wörter \n\n hier und da ", "x " * 500]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder / "tokenizer", "smollm2")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 3))
    done = prepare(folder, folder / "data")
    assert done.returncode == 0, done.stderr
    return folder


def prepare(folder: Path, output: Path, *more: object):
    return script("prepare_data.py", "--input", folder / "corpus.jsonl", "--tokenizer", folder / "tokenizer",
                  "--output", output, "--workers", 1, "--shard_tokens", 200, *more)  # fmt: skip


def count(*arguments: object):
    return script("count_words.py", *arguments, "--workers", 1)


def words_of(folder: Path) -> list[int | None]:
    shards = read_manifest(folder).shards
    return [w for s in shards for w in pq.read_table(folder / f"{s.name}.docs.parquet")["words"].to_pylist()]


def as_version_1(folder: Path) -> None:
    """As written by the previous version: no column, no counts."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for shard in manifest["shards"]:
        path = folder / f"{shard['name']}.docs.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["words"]), path)
        shard["sizes"]["docs.parquet"], shard["sha256"]["docs.parquet"] = path.stat().st_size, file_sha256(path)
        del shard["words"]
    del manifest["words"]
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format_version": 1}))


def copy(source: Path, target: Path) -> Path:
    """A copy that shares no files."""
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target / "train"


def test_words_are_counted_after_cleaning(prepared: Path, tmp_path: Path) -> None:
    """Documents and manifest count white-space-separated words after cleaning."""
    expected = [len(t.split()) for t in TEXTS * 3]
    assert words_of(prepared / "data/train") == expected
    assert PackedDataset(prepared / "data/train").n_words == sum(expected)
    (tmp_path / "first_two.py").write_text("def clean(text):\n    return ' '.join(text.split()[:2])\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert prepare(prepared, tmp_path / "out", "--cleaner", "first_two:clean").returncode == 0
    assert words_of(tmp_path / "out/train") == [min(2, n) for n in expected]


def test_prepared_in_parts_is_the_same(prepared: Path, tmp_path: Path) -> None:
    """Two input files prepared in two parts give the same bytes as a single pass, including word counts."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    for name, some in (("a", TEXTS), ("b", TEXTS * 2)):
        (inputs / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in some))
    for parts in (1, 2):
        done = script("prepare_data.py", "--input", inputs, "--tokenizer", prepared / "tokenizer", "--output",
                      tmp_path / f"out{parts}", "--workers", 1, "--parts", parts, "--bos",
                      "--shard_tokens", 200)  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = tmp_path / "out1/train", tmp_path / "out2/train"
    files = sorted(p.name for p in one.iterdir())
    assert files == sorted(p.name for p in two.iterdir()) and len(files) > 4
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)


def test_an_older_dataset_opens_and_gets_word_counts(prepared: Path, tmp_path: Path) -> None:
    """A dataset of version 1 opens; errors about missing counts name the command, which keeps the fingerprint."""
    folder = copy(prepared / "data", tmp_path)
    as_version_1(folder)
    dataset = PackedDataset(folder)
    assert dataset.fingerprint == PackedDataset(prepared / "data/train").fingerprint
    assert facts_of(dataset, 0)["id"] and dataset.manifest.words is None
    with pytest.raises(ValueError, match=r"python scripts/count_words\.py"):
        print(dataset.n_words)
    assert "scripts/count_words.py" in script("inspect_dataset.py", folder).stdout
    done = count(folder)
    assert done.returncode == 0 and f"{sum(words_of(folder)):,} words" in done.stdout, done.stderr
    assert words_of(folder) == words_of(prepared / "data/train")  # this tokenizer decodes to the text itself
    assert PackedDataset(folder).fingerprint == dataset.fingerprint and faults_of(folder) == []
    assert pq.read_schema(folder / "data-00000.docs.parquet").names == pq.read_schema(
        prepared / "data/train/data-00000.docs.parquet"
    ).names  # fmt: skip
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert count(folder).returncode == 0
    assert before == {p: p.stat().st_mtime_ns for p in folder.iterdir()}, "a second call changed something"


def test_counting_that_was_interrupted_is_finished(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that dies at any of its renames leaves a dataset that opens; the next call completes it."""
    fingerprint = PackedDataset(prepared / "data/train").fingerprint
    for at in (1, 2, 3):
        folder = copy(prepared / "data", tmp_path / str(at))
        as_version_1(folder)
        done, real = 0, os.rename

        def replace_until(source: Path, target: Path) -> None:
            nonlocal done
            if Path(source).parent.name == ".words" and Path(target).parent == folder:  # noqa: B023
                done += 1
                if done > at:  # noqa: B023
                    raise OSError("died")
            real(source, target)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", replace_until)
            assert count(folder).returncode == 2
        assert PackedDataset(folder).fingerprint == fingerprint
        (fault,) = faults_of(folder)
        assert "count_words.py was interrupted; run it again" in fault
        assert count(folder).returncode == 0
        assert faults_of(folder) == [] and not (folder / ".words").exists()
        assert words_of(folder) == words_of(prepared / "data/train")


def test_imported_tokens_have_no_words_until_they_are_counted(prepared: Path, tmp_path: Path) -> None:
    """Imported token files, without text; without a tokenizer the command names what it needs."""
    source = prepared / "data/train/data-00000"
    assert script("import_tokens.py", "--input", source, "--output", tmp_path / "a", "--tokenizer",
                  prepared / "tokenizer").returncode == 0  # fmt: skip
    assert read_manifest(tmp_path / "a").words is None and set(words_of(tmp_path / "a")) == {None}
    assert count(tmp_path / "a").returncode == 0
    expected = pq.read_table(f"{source}.docs.parquet")["words"].to_pylist()
    assert words_of(tmp_path / "a") == expected
    facts = read_manifest(prepared / "data/train")
    assert script("import_tokens.py", "--input", source, "--output", tmp_path / "b", "--vocab_size",
                  facts.vocab_size, "--eos_id", facts.eos_id).returncode == 0  # fmt: skip
    done = count(tmp_path / "b")
    assert done.returncode == 2 and "give one with --tokenizer" in done.stderr and not (tmp_path / "b/.words").exists()
    assert count(tmp_path / "b", "--tokenizer", prepared / "tokenizer").returncode == 0
    assert words_of(tmp_path / "b") == expected
    done = count(tmp_path / "none")
    assert done.returncode == 2 and "is not a packed dataset" in done.stderr


def test_metadata_of_that_name_is_refused(prepared: Path, tmp_path: Path) -> None:
    """--metadata words would be a second column of that name; in an older dataset it is kept."""
    done = prepare(prepared, tmp_path / "out", "--metadata", "words")
    assert done.returncode == 2 and "--metadata words: the name is reserved" in done.stderr
    folder = copy(prepared / "data", tmp_path)
    manifest = read_manifest(folder)
    shards = []
    for shard in manifest.shards:
        path = folder / f"{shard.name}.docs.parquet"
        table = pq.read_table(path)
        text = table["words"].cast("string")
        pq.write_table(table.set_column(table.schema.get_field_index("words"), "words", text), path)
        sizes, sums = {**shard.sizes, "docs.parquet": path.stat().st_size}, shard.sha256
        shards.append(replace(shard, sizes=sizes, sha256={**sums, "docs.parquet": file_sha256(path)}, words=None))
    older = replace(manifest, format_version=1, shards=shards, words=None)
    (folder / MANIFEST).write_text(json.dumps(older.to_dict()))
    assert facts_of(PackedDataset(folder), 1)["words"] == "2"
    done = count(folder)
    assert done.returncode == 2 and "has a metadata column named words" in done.stderr
    assert faults_of(folder) == []
