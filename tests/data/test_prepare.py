"""From text to packed datasets: the same for any number of workers, and all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tokenizers

from lit_data import prepare as module
from lit_data.corpus.readers import ReadErrors
from lit_data.packed import PackedDataset
from lit_data.prepare import copy_tokenizer, in_validation, prepare
from lit_data.tokenizer import open_tokenizer

TEXT = "der die das Haus und ein Garten mit vielen Bäumen steht am Fluss wo die Vögel singen"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    folder.mkdir()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 5, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    records = [
        {
            "id": f"doc-{i}",
            "text": " ".join(WORDS[j % len(WORDS)] for j in range(i, i + 3 + i % 7)),
            "genre": f"g{i % 2}",
        }
        for i in range(200)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "b.txt").write_text("Ein Text\nmit Zeilen.\n")
    return folder


def content(folder: Path) -> dict[str, str]:
    """Hash of each file below a folder."""
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def texts(folder: Path, tokenizer) -> list[str]:
    """The text of each document, decoded; checks that each ends in EOS."""
    dataset = PackedDataset(folder)
    found = []
    for number in range(dataset.n_documents):
        facts = dataset.document(number)
        ids = dataset.tokens(facts["start"], facts["start"] + facts["tokens"]).tolist()
        assert ids[-1] == dataset.eos_id
        found.append(tokenizer.decode(ids[:-1]))
        assert facts["bytes"] == len(found[-1].encode())
    return found


def test_the_result_is_the_text(corpus, tokenizer_folder, tmp_path):
    report = prepare([corpus], tokenizer_folder, tmp_path / "out", workers=1, metadata=["genre"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tokenizer", "train"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "out"]
    tokenizer = open_tokenizer(tmp_path / "out" / "tokenizer")
    expected = [json.loads(line)["text"] for line in (corpus / "a.jsonl").read_text().splitlines()]
    expected.append((corpus / "b.txt").read_text())
    assert texts(tmp_path / "out" / "train", tokenizer) == expected

    dataset = PackedDataset(tmp_path / "out" / "train")
    assert dataset.document(3) | {"start": 0, "tokens": 0} == {
        "number": 3, "id": "doc-3", "source": str(corpus / "a.jsonl"), "place": 4, "bytes": len(expected[3].encode()),
        "genre": "g1", "start": 0, "tokens": 0,
    }  # fmt: skip
    assert dataset.document(200)["id"] == "b.txt" and dataset.document(200)["genre"] == ""
    manifest = dataset.manifest
    assert manifest.tokenizer["folder"] == "../tokenizer" and manifest.tokenizer["fingerprint"] == tokenizer.fingerprint
    assert dataset.tokenizer_folder == (tmp_path / "out" / "tokenizer").resolve()
    assert dataset.vocab_size == tokenizer.vocab_size and dataset.eos_id == tokenizer.eos_id
    assert report.total.documents == 201 and report.total.tokens == dataset.n_tokens
    assert report.total.bytes == sum(len(t.encode()) for t in expected) == manifest.bytes
    assert dataset.verify() == []


def test_the_result_does_not_depend_on_workers(corpus, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 7)  # many batches, more than may be in flight
    for workers in (1, 2, 3):
        out = tmp_path / f"out-{workers}"
        prepare(
            [corpus], tokenizer_folder, out, val_fraction=0.2, workers=workers, shard_tokens=500, metadata=["genre"]
        )
    first = content(tmp_path / "out-1")
    assert "train/data-00002.bin" in first and "val/manifest.json" in first
    assert content(tmp_path / "out-2") == first and content(tmp_path / "out-3") == first


def test_special_tokens_in_a_text_are_text(tokenizer_folder, tmp_path):
    text = "vorher </s> nachher</s></s>"
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "</s>"}) + "\n")
    prepare([tmp_path / "x.jsonl"], tokenizer_folder, tmp_path / "out", workers=1)
    dataset = PackedDataset(tmp_path / "out" / "train")
    ids = dataset.tokens(0, dataset.n_tokens).tolist()
    assert ids.count(dataset.eos_id) == dataset.n_documents == 2
    assert texts(tmp_path / "out" / "train", open_tokenizer(tokenizer_folder)) == [text, "</s>"]


def test_the_split_is_a_hash_of_the_id(corpus, tokenizer_folder, tmp_path):
    def ids(out: Path, side: str) -> set[str]:
        return set(pq.read_table(next((out / side).glob("*.parquet")))["id"].to_pylist())

    prepare([corpus], tokenizer_folder, tmp_path / "one", val_fraction=0.25, seed=3, workers=1)
    val = ids(tmp_path / "one", "val")
    everything = val | ids(tmp_path / "one", "train")
    assert len(everything) == 201 and not val & ids(tmp_path / "one", "train")
    expected = {
        i for i in everything if int(hashlib.sha256(f"3\n{i}".encode()).hexdigest()[:16], 16) / 2**64 < 0.25
    }  # fmt: skip
    assert val == expected and 30 < len(val) < 70

    # Other documents, another order: each document stays on its side.
    lines = (corpus / "a.jsonl").read_text().splitlines(keepends=True)
    (corpus / "a.jsonl").write_text("".join(reversed(lines[50:])))
    prepare([corpus], tokenizer_folder, tmp_path / "two", val_fraction=0.25, seed=3, workers=1)
    assert ids(tmp_path / "two", "val") < val
    prepare([corpus], tokenizer_folder, tmp_path / "three", val_fraction=0.25, seed=4, workers=1)
    assert ids(tmp_path / "three", "val") != ids(tmp_path / "two", "val")


def test_a_larger_fraction_keeps_what_was_validation():
    ids = [f"d{i}" for i in range(5000)]
    small, large = ({i for i in ids if in_validation(i, f, 0)} for f in (0.1, 0.3))
    assert small < large and 400 < len(small) < 600 and 1350 < len(large) < 1650
    assert not any(in_validation(i, 0.0, 0) for i in ids) and all(in_validation(i, 1.0, 0) for i in ids)


def test_validation_text_of_its_own(corpus, tokenizer_folder, tmp_path):
    val = tmp_path / "val.txt"
    val.write_text("Bäume und Vögel")
    report = prepare([corpus], tokenizer_folder, tmp_path / "out", val_inputs=[val], workers=1)
    assert report.sides["val"].documents == 1 and report.sides["train"].documents == 201
    assert texts(tmp_path / "out" / "val", open_tokenizer(tokenizer_folder)) == ["Bäume und Vögel"]
    assert PackedDataset(tmp_path / "out" / "val").manifest.source["inputs"] == [str(val)]
    with pytest.raises(ValueError, match=r"b\.txt is given by --input and by --val_input"):
        prepare([corpus], tokenizer_folder, tmp_path / "bad", val_inputs=[corpus / "b.txt"], workers=1)


def test_empty_documents_and_skipped_ones_are_counted(tokenizer_folder, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": ""}\n{bad\n{"text": "b"}\n{"text": ""}\n')
    report = prepare([tmp_path / "x.jsonl"], tokenizer_folder, tmp_path / "out", workers=1, on_error="skip")
    assert (report.total.documents, report.empty_documents, report.errors.count) == (2, 2, 1)
    summary = report.summary()
    assert "skipped: 1 unreadable documents, 2 empty ones" in summary and "x.jsonl, line 3: invalid JSON" in summary


def assert_refused(
    tmp_path: Path, match: str, *args: object, error: type[Exception] = ValueError, **kw: object
) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error, match=match):
        prepare(*args, **({"workers": 1} | kw))  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_mistakes_are_named_and_leave_nothing(corpus, tokenizer_folder, tmp_path):
    out, tok = tmp_path / "out", tokenizer_folder
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "one.txt").write_text("one")
    missing = FileNotFoundError
    assert_refused(tmp_path, "nowhere does not exist", [tmp_path / "nowhere"], tok, out, error=missing)
    assert_refused(tmp_path, "nowhere", [corpus], tmp_path / "nowhere", out, error=missing)
    assert_refused(tmp_path, "nowhere does not", [corpus], tok, out, val_inputs=[tmp_path / "nowhere"], error=missing)
    assert_refused(tmp_path, "empty holds no text", [tmp_path / "empty"], tok, out)
    assert_refused(tmp_path, r"--input .*empty\.jsonl holds no documents", [tmp_path / "empty.jsonl"], tok, out)
    assert_refused(tmp_path, r"no documents \(1 empty and 0 unread", [tmp_path / "blank.txt"], tok, out)
    assert_refused(tmp_path, r"bad\.jsonl, line 2: invalid JSON", [tmp_path / "bad.jsonl"], tok, out)
    assert_refused(tmp_path, r"bad\.jsonl, line 2: invalid JSON", [tmp_path / "bad.jsonl"], tok, out, workers=2)
    assert_refused(tmp_path, r"--val_input .*: val would be", [corpus], tok, out, val_inputs=[tmp_path / "blank.txt"])
    assert_refused(tmp_path, "0.001 leaves no document for val out of 1: give a larger",
                   [tmp_path / "one.txt"], tok, out, val_fraction=0.001)  # fmt: skip
    assert_refused(tmp_path, "0.999 leaves no document for train out of 1: give a smaller",
                   [tmp_path / "one.txt"], tok, out, val_fraction=0.999)  # fmt: skip
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        assert_refused(tmp_path, "--val_fraction .*between 0 and 1", [corpus], tok, out, val_fraction=fraction)
    assert_refused(tmp_path, "exclude each other", [corpus], tok, out, val_fraction=0.1, val_inputs=[corpus])
    assert_refused(tmp_path, "--workers 0", [corpus], tok, out, workers=0)
    assert_refused(tmp_path, "--shard_tokens 0", [corpus], tok, out, shard_tokens=0)
    assert_refused(tmp_path, "--metadata source: the name is taken", [corpus], tok, out, metadata=["source"])
    assert_refused(tmp_path, "--metadata gerne: no document has", [corpus], tok, out, metadata=["gerne"])


def test_existing_output(corpus, tokenizer_folder, tmp_path):
    out = tmp_path / "out"
    prepare([corpus], tokenizer_folder, out, workers=1)
    before = content(out)
    assert_refused(tmp_path, "exists already; .*--overwrite", [corpus], tokenizer_folder, out)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert_refused(tmp_path, "not UTF-8", [tmp_path / "bad.txt"], tokenizer_folder, out, overwrite=True)
    assert content(out) == before
    # The tokenizer may come from the folder that is replaced.
    prepare([corpus], out / "tokenizer", out, workers=1, val_fraction=0.2, overwrite=True)
    assert (out / "val").is_dir() and sorted(p.name for p in tmp_path.iterdir()) == ["bad.txt", "corpus", "out"]
    assert_refused(tmp_path, "no folder that this program wrote", [out], tokenizer_folder, corpus, overwrite=True)
    assert (corpus / "a.jsonl").exists()


def test_a_replacement_that_fails_puts_the_old_folder_back(corpus, tokenizer_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare([corpus], tokenizer_folder, out, workers=1)
    before = content(out)
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if target == out and ".tmp-" in str(source):
            raise OSError("no rename")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no rename"):
        prepare([corpus], tokenizer_folder, out, workers=1, val_fraction=0.2, overwrite=True)
    assert content(out) == before and sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "out"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interruption_leaves_nothing(corpus, tokenizer_folder, tmp_path, monkeypatch, workers, error):
    def documents(*_: object, errors: ReadErrors, **__: object):
        yield from list(module_read([corpus]))[:100]
        raise error("stop here")

    module_read = module.read_documents
    monkeypatch.setattr(module, "read_documents", documents)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 10)
    with pytest.raises(error):
        prepare([corpus], tokenizer_folder, tmp_path / "out", workers=workers, shard_tokens=50)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus"]


def test_a_worker_that_dies_is_an_error(corpus, tokenizer_folder, tmp_path, monkeypatch):
    class Deadly:
        """Ends the process that unpickles it."""

        def __init__(self) -> None:
            self.opened = open_tokenizer(tokenizer_folder)

        def __getattr__(self, name: str) -> object:
            return getattr(self.opened, name)

        def __reduce__(self) -> tuple[object, ...]:
            return os._exit, (1,)

    monkeypatch.setattr(module, "open_tokenizer", lambda *_: Deadly())
    match = "a worker process ended unexpectedly.*--workers 2"
    assert_refused(tmp_path, match, [corpus], tokenizer_folder, tmp_path / "out", workers=2)


def test_a_tokenizer_file_of_any_name_is_found_again(corpus, tokenizer_folder, tmp_path):
    (tmp_path / "mine.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    prepare([corpus], tmp_path / "mine.json", tmp_path / "out", workers=1)
    assert [p.name for p in (tmp_path / "out" / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert open_tokenizer(tmp_path / "out" / "tokenizer").fingerprint == open_tokenizer(tokenizer_folder).fingerprint


def test_another_end_of_document_is_kept_with_the_tokenizer(corpus, tokenizer_folder, tmp_path):
    prepare([corpus], tokenizer_folder, tmp_path / "out", workers=1, eos_token="a")
    copied = open_tokenizer(tmp_path / "out" / "tokenizer")
    assert copied.eos_token == "a" and copied.eos_id == PackedDataset(tmp_path / "out" / "train").eos_id


def test_copy_tokenizer_takes_the_tokenizer_only(tokenizer_folder, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    for file in tokenizer_folder.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "model.safetensors").write_bytes(b"weights")
    (source / "config.json").write_text("{}")
    copy_tokenizer(source, tmp_path / "run" / "tokenizer")
    assert content(tmp_path / "run" / "tokenizer") == content(tokenizer_folder)
    assert open_tokenizer(tmp_path / "run" / "tokenizer").fingerprint == open_tokenizer(tokenizer_folder).fingerprint
    with pytest.raises(ValueError, match="exists already"):
        copy_tokenizer(source, tmp_path / "run" / "tokenizer")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        copy_tokenizer(tmp_path / "other", tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        copy_tokenizer(tmp_path / "gone", tmp_path / "new")
    assert not (tmp_path / "new").exists() and [p.name for p in (tmp_path / "run").iterdir()] == ["tokenizer"]
