"""From text to packed datasets: identical for any number of workers, and written completely or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tokenizers
from document_facts import facts_of

from lit_data.packed.reader import PackedDataset
from lit_data.packed.summary import faults_of
from lit_data.prepare import run as prepare_module
from lit_data.prepare import stages as module
from lit_data.prepare.executors import run_on_executors
from lit_data.prepare.report import PrepareReport
from lit_data.prepare.run import run_stage
from lit_data.prepare.settings import Execution, Settings
from lit_data.prepare.stages import in_validation
from lit_data.tokenizers.files import copy_tokenizer
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_files.lock import lock_folder

TEXT = "der die das Haus und ein Garten mit vielen Bäumen steht am Fluss wo die Vögel singen"
WORDS = TEXT.split()


def arguments(
    inputs: Sequence[Path], tokenizer: Path, output: Path, val_inputs: Sequence[Path] | None = None, **given: Any
) -> tuple[Settings, Execution]:
    """Settings and Execution from the fields of both that are given."""
    execution = {f.name: given.pop(f.name) for f in dataclasses.fields(Execution) if f.name in given}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    val_input = None if val_inputs is None else tuple(map(str, val_inputs))
    warn = "split_documents" not in settings
    return (
        Settings(tuple(map(str, inputs)), str(tokenizer), val_input=val_input, **settings),
        Execution(output, warn_of_large_text=warn, **execution),
    )


def prepare(*paths: Any, **given: Any) -> PrepareReport:
    return prepare_module.prepare(*arguments(*paths, **given))


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
        facts = facts_of(dataset, number)
        ids = dataset.tokens(facts["start"], facts["start"] + facts["tokens"]).tolist()
        assert ids[-1] == dataset.eos_id
        found.append(tokenizer.decode(ids[:-1]))
        assert facts["bytes"] == len(found[-1].encode())
    return found


def test_documents_decode_to_the_text(corpus, tokenizer_folder, tmp_path):
    report = prepare([corpus], tokenizer_folder, tmp_path / "out", workers=1, metadata=["genre"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.json", "tokenizer", "train"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "out"]
    tokenizer = open_tokenizer(tmp_path / "out" / "tokenizer")
    expected = [json.loads(line)["text"] for line in (corpus / "a.jsonl").read_text().splitlines()]
    expected.append((corpus / "b.txt").read_text())
    assert texts(tmp_path / "out" / "train", tokenizer) == expected

    dataset = PackedDataset(tmp_path / "out" / "train")
    assert facts_of(dataset, 3) | {"start": 0, "tokens": 0} == {
        "number": 3, "id": "doc-3", "source": str(corpus / "a.jsonl"), "place": 4, "bytes": len(expected[3].encode()),
        "words": len(expected[3].split()), "genre": "g1", "start": 0, "tokens": 0,
    }  # fmt: skip
    assert facts_of(dataset, 200)["id"] == "b.txt" and facts_of(dataset, 200)["genre"] == ""
    manifest = dataset.manifest
    assert manifest.tokenizer["folder"] == "../tokenizer" and manifest.tokenizer["fingerprint"] == tokenizer.fingerprint
    assert dataset.tokenizer_folder == (tmp_path / "out" / "tokenizer").resolve()
    assert dataset.vocab_size == tokenizer.vocab_size and dataset.eos_id == tokenizer.eos_id
    assert report.total.documents == 201 and report.total.tokens == dataset.n_tokens
    assert report.total.bytes == sum(len(t.encode()) for t in expected) == manifest.bytes
    assert faults_of(dataset.path) == []


def test_the_result_does_not_depend_on_workers(corpus, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 7)  # more batches than may be in flight
    for workers in (1, 3):
        out = tmp_path / f"out-{workers}"
        prepare(
            [corpus], tokenizer_folder, out, val_fraction=0.2, workers=workers, shard_tokens=500, metadata=["genre"]
        )
    first = content(tmp_path / "out-1")
    assert "train/data-00002.bin" in first and "val/manifest.json" in first
    assert content(tmp_path / "out-3") == first


def test_special_tokens_in_documents_are_encoded_as_text(tokenizer_folder, tmp_path):
    text = "vorher </s> nachher</s></s>"
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "</s>"}) + "\n")
    prepare([tmp_path / "x.jsonl"], tokenizer_folder, tmp_path / "out", workers=1)
    dataset = PackedDataset(tmp_path / "out" / "train")
    ids = dataset.tokens(0, dataset.n_tokens).tolist()
    assert ids.count(dataset.eos_id) == dataset.n_documents == 2
    assert texts(tmp_path / "out" / "train", open_tokenizer(tokenizer_folder)) == [text, "</s>"]


def test_the_split_is_decided_by_a_hash_of_the_id(corpus, tokenizer_folder, tmp_path):
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

    # With other documents and another order, each document stays in its split.
    lines = (corpus / "a.jsonl").read_text().splitlines(keepends=True)
    (corpus / "a.jsonl").write_text("".join(reversed(lines[50:])))
    prepare([corpus], tokenizer_folder, tmp_path / "two", val_fraction=0.25, seed=3, workers=1)
    assert ids(tmp_path / "two", "val") < val
    prepare([corpus], tokenizer_folder, tmp_path / "three", val_fraction=0.25, seed=4, workers=1)
    assert ids(tmp_path / "three", "val") != ids(tmp_path / "two", "val")


def test_a_larger_fraction_keeps_earlier_validation_documents():
    ids = [f"d{i}" for i in range(5000)]
    small, large = ({i for i in ids if in_validation(i, f, 0)} for f in (0.1, 0.3))
    assert small < large and 400 < len(small) < 600 and 1350 < len(large) < 1650
    assert not any(in_validation(i, 0.0, 0) for i in ids) and all(in_validation(i, 1.0, 0) for i in ids)


def test_separate_validation_text(corpus, tokenizer_folder, tmp_path):
    val = tmp_path / "val.txt"
    val.write_text("Bäume und Vögel")
    report = prepare([corpus], tokenizer_folder, tmp_path / "out", val_inputs=[val], workers=1)
    assert report.sides["val"].documents == 1 and report.sides["train"].documents == 201
    assert texts(tmp_path / "out" / "val", open_tokenizer(tokenizer_folder)) == ["Bäume und Vögel"]
    assert PackedDataset(tmp_path / "out" / "val").manifest.source["inputs"] == [str(val)]
    with pytest.raises(ValueError, match=r"b\.txt is in both --input and --val_input"):
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
    assert_refused(tmp_path, "--metadata source: the name is reserved", [corpus], tok, out, metadata=["source"])
    assert_refused(tmp_path, "--metadata gerne: no document has", [corpus], tok, out, metadata=["gerne"])


def test_existing_output(corpus, tokenizer_folder, tmp_path):
    out = tmp_path / "out"
    prepare([corpus], tokenizer_folder, out, workers=1)
    before = content(out)
    assert_refused(tmp_path, "exists already; .*--overwrite", [corpus], tokenizer_folder, out)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert_refused(tmp_path, "not UTF-8", [tmp_path / "bad.txt"], tokenizer_folder, out, overwrite=True)
    assert content(out) == before
    # The tokenizer may be in the folder that is replaced.
    prepare([corpus], out / "tokenizer", out, workers=1, val_fraction=0.2, overwrite=True)
    assert (out / "val").is_dir() and sorted(p.name for p in tmp_path.iterdir()) == ["bad.txt", "corpus", "out"]
    assert_refused(tmp_path, "was not written by this program", [out], tokenizer_folder, corpus, overwrite=True)
    assert (corpus / "a.jsonl").exists()


def test_a_failed_replacement_restores_the_old_folder(corpus, tokenizer_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare([corpus], tokenizer_folder, out, workers=1)
    before = content(out)
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if target == out and ".replaced" not in str(source):
            raise OSError("no rename")
        rename(source, target)

    again = {"workers": 1, "val_fraction": 0.2, "overwrite": True}
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="no rename") as error:
            prepare([corpus], tokenizer_folder, out, **again)
    assert "kept in" in error.value.__notes__[0] and "the same command resumes it" in error.value.__notes__[0]
    assert content(out) == before
    report = prepare([corpus], tokenizer_folder, out, **again)
    assert report.resumed and report.sides["val"].documents > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "out"] and (out / "val").is_dir()


@pytest.mark.parametrize(
    ("error", "workers"),
    [(KeyboardInterrupt, 1), (OSError, 1), (KeyboardInterrupt, 2), pytest.param(OSError, 2, marks=pytest.mark.slow)],
)
def test_an_interruption_before_the_first_commit_leaves_nothing(
    corpus, tokenizer_folder, tmp_path, monkeypatch, error, workers
):
    interrupt(monkeypatch, error, after=100)
    with pytest.raises(error):
        prepare([corpus], tokenizer_folder, tmp_path / "out", workers=workers, shard_tokens=50)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus"]


def interrupt(monkeypatch: pytest.MonkeyPatch, error: type[BaseException], after: int) -> None:
    """Reading fails after this many documents of this call."""
    read = module.read_documents

    def documents(*args: object, **kw: object):
        for count, document in enumerate(read(*args, **kw)):
            if count == after:
                raise error("stop here")
            yield document

    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(module, "read_documents", documents)


REPEATED = {"dedup": "exact", "dedup_min_characters": 5, "near_dedup": 0.6}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        REPEATED,
        pytest.param({"dedup": "bloom", "dedup_min_characters": 5, "bloom_paragraphs": 1000}, marks=pytest.mark.slow),
        {"parts": 3, **REPEATED},
    ],
    ids=["plain", "exact", "bloom", "parts"],
)
def test_repeated_interruptions_do_not_change_the_result(repetitive, tokenizer_folder, tmp_path, monkeypatch, settings):
    call = {"val_fraction": 0.2, "shard_tokens": 600, "workers": 1, **settings}
    prepare([repetitive], tokenizer_folder, tmp_path / "whole", **call)
    expected = content(tmp_path / "whole")
    interruptions = 0
    for after in range(20, 400, 30):
        with monkeypatch.context() as patch:
            interrupt(patch, KeyboardInterrupt, after)
            try:
                report = prepare([repetitive], tokenizer_folder, tmp_path / "out", commit_seconds=0, **call)
                break
            except KeyboardInterrupt:
                interruptions += 1
                assert not (tmp_path / "out").exists() and (tmp_path / ".out.preparing" / "plan.json").exists()
    assert interruptions >= 3 and report.resumed
    assert content(tmp_path / "out") == expected
    assert not (tmp_path / ".out.preparing").exists()


@pytest.fixture
def repetitive(tmp_path) -> Path:
    """Five files of documents with repeated paragraphs, and near-duplicate documents."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=9)) for _ in range(120)]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(5):
        documents = ["\n".join(draw.choices(lines, k=draw.randint(1, 6))) for _ in range(60)]
        documents[7] = f"{documents[6]} Garten"
        records = [json.dumps({"id": f"{number}.{i}", "text": text}) for i, text in enumerate(documents)]
        (folder / f"{number}.jsonl").write_text("\n".join(records) + "\n")
    return folder


def test_changed_settings_are_named(corpus, tokenizer_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt(patch, KeyboardInterrupt, after=60)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], tokenizer_folder, out, workers=1, commit_seconds=0, seed=1)
    with pytest.raises(ValueError, match=r"other settings: --seed 1, now 2. Give the same .* or --fresh"):
        prepare([corpus], tokenizer_folder, out, workers=1, seed=2)
    text = (corpus / "b.txt").read_text()
    (corpus / "b.txt").write_text(text + "!")
    with pytest.raises(ValueError, match=r"files have changed, such as .*b\.txt"):
        prepare([corpus], tokenizer_folder, out, workers=1, seed=1)
    report = prepare([corpus], tokenizer_folder, out, workers=1, seed=2, fresh=True)
    assert not report.resumed and report.total.documents == 201
    with pytest.raises(ValueError, match=r"--fresh works without --stage .* delete .*/\.new\.preparing instead"):
        Execution(tmp_path / "new", stage="hash", fresh=True)


def test_concurrent_preparations_are_refused(corpus, tokenizer_folder, tmp_path):
    lock = lock_folder(Execution(tmp_path / "out").work_folder, "wait")
    with pytest.raises(ValueError, match=r"\.out\.preparing is in use by another job \(process \d+ .*; wait for it or"):
        prepare([corpus], tokenizer_folder, tmp_path / "out", workers=1)
    lock.close()


def test_killed_after_the_output_was_published(corpus, tokenizer_folder, tmp_path, monkeypatch):
    """Then only the working folder needs removing; the existing output must not be an error."""
    for removed in (0, 1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(prepare_module, "_remove_work", lambda *_: None)
            patch.setattr(prepare_module.shutil, "rmtree", lambda *_, **__: None)
            prepare([corpus], tokenizer_folder, tmp_path / f"out{removed}", workers=1)
        work = tmp_path / f".out{removed}.preparing"
        assert (work / "plan.json").exists() and (work / "part-00000").exists()
        if removed:
            shutil.rmtree(work / "part-00000")
        if removed == 2:
            (work / "plan.json").unlink()
        report = prepare([corpus], tokenizer_folder, tmp_path / f"out{removed}", workers=1)
        assert report.total.documents == 201 and not work.exists()


def test_parts_equal_a_single_machine(repetitive, tokenizer_folder, tmp_path, monkeypatch):
    val = tmp_path / "val.jsonl"
    val.write_text((repetitive / "3.jsonl").read_text() + '{"id": "own", "text": "ein eigener langer Absatz"}\n')
    call = {"shard_tokens": 700, "workers": 1, "val_inputs": [val], **REPEATED}
    prepare([repetitive], tokenizer_folder, tmp_path / "one", **call)
    expected = content(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "report.json").read_text())["sides"]["val"]["documents"] == 1

    prepare([repetitive], tokenizer_folder, tmp_path / "parts", parts=4, **call)
    assert content(tmp_path / "parts") == expected

    def stage(name: str, part: int = 0) -> object:
        folders = [repetitive], tokenizer_folder, tmp_path / "staged"
        return run_stage(*arguments(*folders, parts=3, stage=name, part=part, **call))

    for part in (2, 0, 1):
        stage("hash", part)
    with pytest.raises(ValueError, match="--stage encode --part 1: the duplicates are not known yet"):
        stage("encode", 1)
    stage("join")
    stage("encode", 1)
    with pytest.raises(ValueError, match="--stage merge: part 0 is not encoded yet"):
        stage("merge")
    stage("encode", 0)
    stage("encode", 2)
    with monkeypatch.context() as patch:  # killed after it published
        patch.setattr(prepare_module, "_remove_work", lambda *_: None)
        assert stage("merge") is not None
    assert content(tmp_path / "staged") == expected
    assert stage("merge") is not None and not (tmp_path / ".staged.preparing").exists()
    with pytest.raises(ValueError, match="6 files cannot be split into 7 parts"):
        prepare([repetitive], tokenizer_folder, tmp_path / "no", parts=7, **call)


@pytest.mark.slow
def test_datatrove_executors_give_the_same_result(repetitive, tokenizer_folder, tmp_path):
    pytest.importorskip("datatrove")
    call = {"shard_tokens": 700, "workers": 1, "val_fraction": 0.2, **REPEATED}
    prepare([repetitive], tokenizer_folder, tmp_path / "one", **call)
    paths = [repetitive], tokenizer_folder, tmp_path / "out"
    run_on_executors(*arguments(*paths, executor="local", tasks=2, parts=2, **call))
    assert content(tmp_path / "out") == content(tmp_path / "one")
    with pytest.raises(ValueError, match="needs time and partition in --executor_args"):
        run_on_executors(*arguments([repetitive], tokenizer_folder, tmp_path / "no", executor="slurm"))


def test_first_occurrences_of_paragraphs_are_kept(repetitive, tokenizer_folder, tmp_path):
    """Compared with a naive pass that uses a set."""
    tokenizer = open_tokenizer(tokenizer_folder)
    seen: set[str] = set()
    expected = []
    for file in sorted(repetitive.iterdir()):
        for record in map(json.loads, file.read_text().splitlines()):
            kept = []
            for paragraph in record["text"].splitlines(keepends=True):
                key = " ".join(paragraph.split())
                if len(key) < 40 or key not in seen:
                    kept.append(paragraph)
                if len(key) >= 40:
                    seen.add(key)
            if "".join(kept).strip():
                expected.append("".join(kept))
    call = {"workers": 1, "dedup_min_characters": 40}
    report = prepare([repetitive], tokenizer_folder, tmp_path / "exact", dedup="exact", **call)
    assert texts(tmp_path / "exact" / "train", tokenizer) == expected
    stage = report.stage_reports.stages["paragraphs"]
    assert stage.documents_kept == len(expected) < stage.documents_in == 300
    assert stage.removed["seen before"].pieces > 500 and "seen before" in report.summary()
    prepare([repetitive], tokenizer_folder, tmp_path / "bloom", dedup="bloom", bloom_paragraphs=10_000, **call)
    assert texts(tmp_path / "bloom" / "train", tokenizer) == expected


def test_cleaner_and_filters_report_removals(tokenizer_folder, tmp_path, monkeypatch):
    (tmp_path / "own_rules.py").write_text(
        "def shout(text):\n    return text.upper() if text != 'weg' else None\n\n"
        "def no_numbers(text):\n    return not any(c.isdigit() for c in text)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kept = ["das haus und der garten", "ein fluss"]
    dropped = ["weg", "haus 7", "x" * 900, "qqqqqqqqqqqqqqqq"]
    lines = [json.dumps({"id": str(i), "text": text}) for i, text in enumerate([*kept, *dropped])]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    call = {
        "cleaner": "own_rules:shout", "filter": ["own_rules:no_numbers"], "max_characters": 100, "workers": 2,
        "max_token_word_ratio": 10,
    }  # fmt: skip
    dry = prepare([tmp_path / "x.jsonl"], tokenizer_folder, tmp_path / "out", dry_run=True, **call | {"workers": 1})
    assert not (tmp_path / "out").exists() and "dry run: nothing was written" in dry.summary()
    report = prepare([tmp_path / "x.jsonl"], tokenizer_folder, tmp_path / "out", **call)
    assert texts(tmp_path / "out" / "train", open_tokenizer(tokenizer_folder)) == [t.upper() for t in kept]
    assert vars(dry.sides["train"]) == vars(report.sides["train"])
    assert dry.to_dict() == report.to_dict()
    stages = {name: (s.documents_in, s.documents_kept) for name, s in report.stage_reports.stages.items()}
    assert list(stages.values()) == [(6, 5), (5, 4), (4, 3), (3, 2)]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.to_dict()
    manifest = PackedDataset(tmp_path / "out" / "train").manifest
    assert manifest.source["cleaner"] == "own_rules:shout" and manifest.source["max_token_word_ratio"] == 10


def test_length_and_language(tokenizer_folder, tmp_path):
    pytest.importorskip("py3langid")
    german = "Das Haus steht am Fluss, und die Vögel singen in den Bäumen des Gartens."
    english = "The house stands by the river, and the birds are singing in the trees of the garden."
    lines = [json.dumps({"id": name, "text": t}) for name, t in (("de", german), ("en", english), ("kurz", "Haus"))]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    call = {"min_characters": 10, "language": ["de"], "workers": 1}
    report = prepare([tmp_path / "x.jsonl"], tokenizer_folder, tmp_path / "out", **call)
    assert texts(tmp_path / "out" / "train", open_tokenizer(tokenizer_folder)) == [german]
    assert [s.documents_kept for s in report.stage_reports.stages.values()] == [2, 1]
    assert_refused(
        tmp_path, "--language xx", [tmp_path / "x.jsonl"], tokenizer_folder, tmp_path / "no", language=["xx"]
    )
    assert_refused(tmp_path, "--min_characters 9, --max_characters 5", [tmp_path / "x.jsonl"], tokenizer_folder,
                   tmp_path / "no", min_characters=9, max_characters=5)  # fmt: skip


def test_a_worker_that_dies_is_an_error(corpus, tokenizer_folder, tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text("import os\n\ndef kill(text):\n    os._exit(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    match = "a worker process ended unexpectedly.*lower --workers \\(now 2\\)"
    call = {"cleaner": "deadly:kill", "workers": 2}
    assert_refused(tmp_path, match, [corpus], tokenizer_folder, tmp_path / "out", **call)


def test_a_tokenizer_file_with_any_name_is_found_again(corpus, tokenizer_folder, tmp_path):
    (tmp_path / "mine.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    prepare([corpus], tmp_path / "mine.json", tmp_path / "out", workers=1)
    assert [p.name for p in (tmp_path / "out" / "tokenizer").iterdir()] == ["tokenizer.json"]
    assert open_tokenizer(tmp_path / "out" / "tokenizer").fingerprint == open_tokenizer(tokenizer_folder).fingerprint


def test_a_custom_eos_is_stored_with_the_tokenizer(corpus, tokenizer_folder, tmp_path):
    prepare([corpus], tokenizer_folder, tmp_path / "out", workers=1, eos_token="a")
    copied = open_tokenizer(tmp_path / "out" / "tokenizer")
    assert copied.eos_token == "a" and copied.eos_id == PackedDataset(tmp_path / "out" / "train").eos_id


def test_copy_tokenizer_copies_only_the_tokenizer(tokenizer_folder, tmp_path):
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
    with pytest.raises(ValueError, match="contains no tokenizer"):
        copy_tokenizer(tmp_path / "other", tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        copy_tokenizer(tmp_path / "gone", tmp_path / "new")
    assert not (tmp_path / "new").exists() and [p.name for p in (tmp_path / "run").iterdir()] == ["tokenizer"]
