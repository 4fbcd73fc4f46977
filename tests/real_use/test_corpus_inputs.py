"""Unusual inputs of a preparation: files given twice, mixed splits, odd fields, large text files, decompression
bombs.
"""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from running import script

from lit_data.corpus.files import ReadErrors
from lit_data.corpus.readers import Place, read_documents
from lit_data.packed.documents import Documents
from lit_data.packed.reader import PackedDataset
from lit_data.prepare import stages as preparation
from lit_data.prepare.job import Job, differences
from lit_data.prepare.settings import Settings
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_data.tokenizers.training import train_on_texts

TEXTS = ["der Hund und die Katze laufen über die Straße", "ein Satz\n\nnoch einer", "the cat sat on the mat"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tok"
    train_on_texts(TEXTS * 5, 270, "byte_bpe", folder)
    return folder


def lines(*records: object) -> str:
    return "".join(json.dumps(r) + "\n" for r in records)


def prepare(*arguments: object, tokenizer: Path, output: Path, workers: int = 1):
    """Run scripts/prepare_data.py in this process; returns status, standard output and standard error."""
    fixed = ("--tokenizer", tokenizer, "--output", output, "--workers", workers)
    return script("prepare_data.py", *arguments, *fixed)


def documents(output: Path, side: str = "train") -> list[tuple[str, str]]:
    """(id, decoded text) of all documents."""
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
    """One file is in --input under two names; its documents are packed once, and a warning names it."""
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


def test_a_file_in_training_and_validation_is_refused(tmp_path, tokenizer):
    """Validation text that is also in --input, through a hard link, is refused before anything is written."""
    folder = corpus(tmp_path / "corp")
    os.link(folder / "a.jsonl", tmp_path / "val.jsonl")
    done = prepare(
        "--input", folder, "--val_input", tmp_path / "val.jsonl", tokenizer=tokenizer, output=tmp_path / "out"
    )
    assert done.returncode == 2 and "in both --input and --val_input" in done.stderr
    assert not (tmp_path / "out").exists() and "Traceback" not in done.stderr


@pytest.mark.parametrize("held_out", ["b.dev", "b.test", "b.dev.gz", "deep/b.DEV"])
def test_train_and_dev_files_in_one_input_are_refused(tmp_path, tokenizer, held_out):
    """BabyLM's .train and .dev files in one folder would make a model train on its validation text."""
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
        # The remedy named in the message.
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
    """`--input custom/` with train/ and dev/ in it is packed as one dataset, after a warning."""
    for name in (*names, "training_manuals/x.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(lines({"text": name}))
    done = prepare("--input", tmp_path / "in", tokenizer=tokenizer, output=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert "go into one dataset" in warning and "--val_input" in warning
    assert all(name.split("/")[0] in warning for name in names)


def test_a_file_next_to_its_compressed_copy_is_warned_about(tmp_path, tokenizer):
    """a.jsonl was compressed with `gzip -k`, so the folder contains its documents twice."""
    folder = corpus(tmp_path / "corp")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    done = prepare("--input", folder, tokenizer=tokenizer, output=tmp_path / "out")
    assert done.returncode == 0 and "a.jsonl.gz differ in their compression only" in done.stderr


def test_work_of_an_older_version_is_resumed(tmp_path, tokenizer):
    """A preparation killed before a setting existed is resumed after the update."""
    here = Job.make(Settings((str(corpus(tmp_path / "corp")),), str(tokenizer))).to_dict()
    there = json.loads(json.dumps(here))
    for new in ("allow_mixed_splits", "seed", "metadata"):
        del there["settings"][new]
    assert differences(there, here) == []
    here["settings"]["seed"] = 3
    assert differences(there, here) == ["--seed 0, now 3"]


def read(path: Path, **options) -> list[tuple[str, str]]:
    return [(d.id, d.text) for d in read_documents([path], **options)]


FAR = pa.array([2**53, 0], pa.timestamp("ms"))
ODD_VALUES = {
    "number": (pa.array([1, 2**60]), ["1", str(2**60)]),
    "null": (pa.array([None, "b"]), ["x.parquet:1", "b"]),
    "bytes that are no UTF-8": (pa.array([b"\xff\x00", b"ok"]), ["ff00", "ok"]),
    "text that is no UTF-8": (
        pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffb")), ["ff", "b"]
    ),
    "a dictionary of such bytes": (pa.array([b"\xff", b"\xff"]).dictionary_encode(), ["ff", "ff"]),
    "nested": (pa.array([{"a": [1]}, {"a": None}]), ['{"a": [1]}', '{"a": null}']),
    "a year beyond 9999": (FAR, [FAR[0].cast(pa.string()).as_py(), '"1970-01-01 00:00:00"']),
    "not a number": (pa.array([float("nan"), 0.5]), ["NaN", "0.5"]),
    "nothing but null": (pa.nulls(2), ["x.parquet:1", "x.parquet:2"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_VALUES)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_id_or_metadata_of_any_kind_is_read(tmp_path, kind, on_error):
    """A binary id used to make all documents "not UTF-8", and `skip` dropped every one of them."""
    column, expected = ODD_VALUES[kind]
    pq.write_table(pa.table({"text": ["x", "y"], "id": column, "m": column}), tmp_path / "x.parquet")
    errors = ReadErrors()
    found = list(read_documents([tmp_path / "x.parquet"], on_error=on_error, metadata=["m"], errors=errors))
    assert [d.text for d in found] == ["x", "y"] and errors.count == 0
    assert [d.id for d in found] == expected
    missing = [f"x.parquet:{n}" for n in (1, 2)]
    assert [d.meta.get("m", m) for d, m in zip(found, missing, strict=True)] == expected


@pytest.mark.parametrize("value", [7, 1.5, True, None, [1], {"a": 1}, "\ud800", "", int("9" * 4000)])
def test_an_id_or_metadata_of_any_kind_is_read_from_json(tmp_path, value):
    """The same in JSON lines: half a surrogate pair or a number of 5000 digits is a valid id."""
    text = json.dumps({"text": "x", "id": value, "m": value}).replace("9" * 4000, "9" * 5000)
    (tmp_path / "x.jsonl").write_text(text + "\n" + lines({"text": "y"}))
    found = list(read_documents([tmp_path / "x.jsonl"], metadata=["m"]))
    assert [d.text for d in found] == ["x", "y"] and found[1].id == "x.jsonl:2"
    expected = (
        {None: "x.jsonl:1", "\ud800": "\\ud800", "": ""}.get(value) if not isinstance(value, (list, dict)) else None
    )
    expected = expected if expected is not None else "9" * 5000 if value == int("9" * 4000) else json.dumps(value)
    assert found[0].id == expected and found[0].meta == ({} if value is None else {"m": expected})
    found[0].id.encode("utf-8")


def test_two_columns_of_one_name(tmp_path):
    """Two columns named id used to be a KeyError; the first is used. Two text columns are refused by name."""
    columns = [pa.array(v) for v in (["x"], ["first"], ["second"], [1], [2])]
    table = pa.Table.from_arrays(columns, names=["text", "id", "id", "m", "m"])
    pq.write_table(table, tmp_path / "x.parquet")
    (found,) = read_documents([tmp_path / "x.parquet"], metadata=["m"])
    assert (found.id, found.text, found.meta) == ("first", "x", {"m": "1"})
    pq.write_table(table.rename_columns(["text", "text", "text", "m", "m"]), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet has 3 columns named 'text' \(--text_field\)"):
        read(tmp_path / "x.parquet", on_error="skip")


def test_fields_inside_fields(tmp_path, tokenizer):
    """--text_field translation.de, an id and metadata inside other fields, in JSON lines and Parquet."""
    records = [{"translation": {"de": text, "en": "x"}, "meta": {"key": i, "url": {"host": f"h{i}"}}} for i, text in
               enumerate(TEXTS)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text(lines(*records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "b.parquet", row_group_size=2)
    fields = ("--text_field", "translation.de", "--id_field", "meta.key", "--metadata", "meta.url.host")
    for name in ("a.jsonl", "b.parquet"):
        done = prepare("--input", tmp_path / name, *fields, tokenizer=tokenizer, output=tmp_path / f"{name}.out")
        assert done.returncode == 0, done.stderr
        assert documents(tmp_path / f"{name}.out") == [(str(i), text) for i, text in enumerate(TEXTS)]
        facts = Documents(PackedDataset(tmp_path / f"{name}.out" / "train")).facts([2])
        assert facts[2]["meta.url.host"] == "h2"
    (tmp_path / "c.jsonl").write_text(lines({"translation.de": "flat", "translation": {"de": "deep"}}))
    assert read(tmp_path / "c.jsonl", text_field="translation.de") == [("c.jsonl:1", "flat")]
    for field, message in [
        ("translation", "holds a JSON object, not text; give one of its own fields, such as translation.de"),
        ("translation.fr", "has no column 'translation.fr'.*translation.de, translation.en"),
    ]:
        path = tmp_path / ("a.jsonl" if field == "translation" else "b.parquet")
        with pytest.raises(ValueError, match=message):
            read(path, text_field=field)


def test_metadata_that_some_tables_lack(tmp_path, tokenizer):
    """One of two Parquet files lacks the column: it is accepted; a name that no file has is refused."""
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["x"], "m": [1]}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"text": ["y"]}), tmp_path / "in" / "b.parquet")
    base = ("--input", tmp_path / "in", "--metadata", "m")
    done = prepare(*base, tokenizer=tokenizer, output=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    facts = Documents(PackedDataset(tmp_path / "out" / "train")).facts([0, 1])
    assert [facts[n]["m"] for n in (0, 1)] == ["1", ""]
    done = prepare(*base, "typo", tokenizer=tokenizer, output=tmp_path / "other")
    assert done.returncode == 2 and "has no column 'typo' (--metadata); its columns are" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


PLAIN = "\ufefferste Zeile\r\nzweite\r\n \t\r\n\r\n\u00a0\ndritte\n\n\n  vierte \nfünfte ohne Ende"
BY_LINE = [(1, "erste Zeile"), (2, "zweite"), (6, "dritte"), (9, "  vierte "), (10, "fünfte ohne Ende")]
BY_BLANK_LINE = [(1, "erste Zeile\r\nzweite"), (6, "dritte"), (9, "  vierte \nfünfte ohne Ende")]


@pytest.mark.parametrize("name", ["a.txt", "a.train", "a.dev.gz", "a.test.zst"])
def test_plain_text_is_split(tmp_path, name):
    """--split_documents line, blank_line, file: CRLF, a BOM, blank lines of spaces, no newline at the end."""
    data = PLAIN.encode()
    packed = gzip.compress(data) if name.endswith("gz") else zstandard.compress(data) if "zst" in name else data
    path = tmp_path / name
    path.write_bytes(packed)
    for split, expected in (("line", BY_LINE), ("blank_line", BY_BLANK_LINE)):
        found = list(read_documents([path], split_documents=split))
        assert [(d.place, d.text) for d in found] == expected
        assert [d.id for d in found] == [f"{name}:{place}" for place, _ in expected]
        for i, document in enumerate(found):  # resumed after each document
            rest = read_documents([path], split_documents=split, start=Place(0, document.place))
            assert [(d.place, d.text) for d in rest] == expected[i + 1 :]
    assert read(path, split_documents="file") == read(path) == [(name, PLAIN)]


@pytest.mark.parametrize("split, faults", [("line", 2), ("blank_line", 2)])
def test_errors_in_split_text(tmp_path, split, faults):
    """A line that is not UTF-8, or too long, affects only its own document, also when resuming."""
    long = b"x" * ((1 << 20) + 1)
    (tmp_path / "a.txt").write_bytes(b"eins\n\nzw\xffei\n\n" + long + b"\n\ndrei\n\nvier")
    options = {"split_documents": split, "max_document_mb": 1}
    with pytest.raises(ValueError, match=r"a\.txt, line 3: not UTF-8 .*byte 2 of the line"):
        read(tmp_path / "a.txt", **options)
    errors = ReadErrors()
    found = list(read_documents([tmp_path / "a.txt"], on_error="skip", errors=errors, **options))
    assert [d.text for d in found] == ["eins", "drei", "vier"] and errors.count == faults
    assert "line 5: a" in errors.first[1] and "--max_document_mb" in errors.first[1]
    rest = list(read_documents([tmp_path / "a.txt"], on_error="skip", start=Place(0, 1), **options))
    assert [(d.text, d.faults) for d in rest] == [(d.text, d.faults - found[0].faults) for d in found[1:]]


@pytest.mark.parametrize("split", ["line", "blank_line"])
def test_split_text_in_parts_gives_the_same_bytes(tmp_path, tokenizer, split):
    """The same bytes for any number of parts; the setting is in the manifest and compared when resuming."""
    (tmp_path / "in").mkdir()
    for i in range(3):
        text = "\r\n".join(f"Satz {n}" + "\r\n" * (n % 3) for n in range(40))
        (tmp_path / "in" / f"{i}.train").write_text(text, newline="")
    base = ("--input", tmp_path / "in", "--split_documents", split, "--val_fraction", "0.3")
    for parts in (1, 3):
        out = tmp_path / f"out-{parts}"
        done = prepare(*base, "--parts", parts, tokenizer=tokenizer, output=out)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    for path in sorted((tmp_path / "out-1").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "out-3" / path.relative_to(tmp_path / "out-1")).read_bytes()
    manifest = json.loads((tmp_path / "out-1" / "train" / "manifest.json").read_text())
    assert manifest["source"]["split_documents"] == split
    texts = {text for side in ("train", "val") for _, text in documents(tmp_path / "out-1", side)}
    whole = (tmp_path / "in" / "0.train").read_bytes().decode()
    pieces = whole.split("\r\n") if split == "line" else whole.replace("\r\n\r\n\r\n", "\r\n\r\n").split("\r\n\r\n")
    assert texts == {piece for piece in pieces if piece}


@pytest.mark.parametrize("split", ["line", "blank_line"])
def test_split_text_is_resumed(tmp_path, tokenizer, monkeypatch, split):
    """A preparation of split text that is interrupted repeatedly gives the same bytes."""
    (tmp_path / "in").mkdir()
    for i in range(2):
        text = "\r\n".join(f"Satz {n}" + "\r\n" * (n % 3) for n in range(30))
        (tmp_path / "in" / f"{i}.train").write_text(text, newline="")
    base = ("--input", tmp_path / "in", "--split_documents", split, "--commit_seconds", 0)
    assert prepare(*base, tokenizer=tokenizer, output=tmp_path / "whole").returncode == 0
    whole_read = preparation.read_documents

    def interrupted(*arguments, **options):
        for count, document in enumerate(whole_read(*arguments, **options)):
            if count == 8 + 15 * len(statuses):
                raise KeyboardInterrupt
            yield document

    statuses = []
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "read_documents", interrupted)
        patch.setattr(preparation, "BATCH_DOCUMENTS", 5)
        while 0 not in statuses:
            statuses.append(prepare(*base, tokenizer=tokenizer, output=tmp_path / "out").returncode)
    assert statuses[-1] == 0 and len(statuses) > 2
    for path in (p for p in sorted((tmp_path / "whole").rglob("*")) if p.is_file()):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes(), path


def test_a_large_plain_text_is_named_once(tmp_path, tokenizer):
    """A .train file of over 1 MB becomes one document, which one line reports unless the flag is given."""
    (tmp_path / "in").mkdir()
    for name in ("a.train", "b.train"):
        (tmp_path / "in" / name).write_text(("ein Satz " * 1200 + "\n") * 110)
    (tmp_path / "in" / "small.train").write_text("ein Satz\n")
    base = ("--input", tmp_path / "in", "--dry_run")
    done = prepare(*base, tokenizer=tokenizer, output=tmp_path / "out")
    (line,) = done.stderr.splitlines()
    assert "a.train (1.2 MB) is read as one document, and so are 1 more" in line and "--split_documents" in line
    assert "3 documents" in done.stdout
    done = prepare(*base, "--split_documents", "line", tokenizer=tokenizer, output=tmp_path / "out")
    assert done.returncode == 0 and done.stderr == "" and "221 documents" in done.stdout


@pytest.mark.parametrize("profile", ["babylm", "babylm-paper"])
def test_babylm_names_of_2024_have_cleaners(tmp_path, tokenizer, profile):
    """The files childes and simple_wiki of 2024 and 2025 are cleaned like their 2023 counterparts."""
    (tmp_path / "in").mkdir()
    text = "A1: one  two , [x]\n\n\n\n== Berlin ==\n"
    for name in ("bnc_spoken", "childes", "gutenberg", "open_subtitles", "simple_wiki", "switchboard"):
        (tmp_path / "in" / f"{name}.train").write_text(text)
    done = prepare("--input", tmp_path / "in", "--cleaner", profile, tokenizer=tokenizer, output=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = dict(documents(tmp_path / "out"))
    spoken, wiki = {
        "babylm": ("one two , == Berlin ==", "A1: one  two , [x]\n\nBerlin\n"),
        "babylm-paper": ("A1: one two, [x]\n\n\n\n== Berlin ==\n", "A1: one  two , [x]\n== Berlin =="),
    }[profile]
    assert found["childes.train"] == found["bnc_spoken.train"] == spoken and found["simple_wiki.train"] == wiki
    assert found["gutenberg.train"] == text


def bomb(path: Path, megabytes: int) -> None:
    """An unterminated JSON line or a text: many megabytes compressed to a few kilobytes."""
    head, zeros = (b'{"text": "' if ".jsonl" in path.name else b""), b"0" * (1 << 20)
    opener = gzip.open if path.name.endswith("gz") else zstandard.open
    with opener(path, "wb") as f:
        f.write(head)
        for _ in range(megabytes):
            f.write(zeros)


@pytest.mark.parametrize(
    "name, on_error",
    [(n, "skip") for n in ("b.jsonl.zst", "b.jsonl.gz", "b.txt.zst", "b.train.gz", "b.jsonl")]
    + [(n, "stop") for n in ("b.jsonl.zst", "b.txt.gz")],
)
def test_a_bomb_is_refused_in_bounded_memory(tmp_path, tokenizer, name, on_error):
    """A few kilobytes that decompress to any size, or an unterminated line, are handled by --on_error."""
    path = tmp_path / "in" / name
    path.parent.mkdir()
    if name == "b.jsonl":
        path.write_bytes(b"0" * (30 << 20))
    else:
        bomb(path, 40)
    (path.parent / "z.jsonl").write_text(lines({"text": "gut"}))
    tracemalloc.start()
    done = prepare(
        *("--input", path.parent, "--max_document_mb", 1, "--on_error", on_error),
        tokenizer=tokenizer, output=tmp_path / "out",
    )  # fmt: skip
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25e6  # one zstd step yields 8 MB
    said = done.stderr if on_error == "stop" else done.stdout
    assert name in said and "of more than 1 MB (--max_document_mb" in said and "Traceback" not in done.stderr
    if on_error == "stop":
        assert done.returncode == 2 and not (tmp_path / "out").exists()
    else:
        assert done.returncode == 0 and documents(tmp_path / "out") == [("z.jsonl:1", "gut")]
        manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
        assert manifest["source"]["max_document_mb"] == 1


def test_a_long_line_is_omitted_and_the_next_read(tmp_path):
    """Only an overlong line is omitted; one that does not end for a long time ends the file."""
    long = b'{"text": "' + b"x" * (3 << 20) + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a"}).encode() + long + lines({"text": "b"}).encode())
    errors = ReadErrors()
    found = read(tmp_path / "a.jsonl", max_document_mb=2, on_error="skip", errors=errors)
    assert found == [("a.jsonl:1", "a"), ("a.jsonl:3", "b")] and errors.count == 1
    assert len(read(tmp_path / "a.jsonl", max_document_mb=4)) == 3


def test_a_parquet_of_one_large_value_in_many_rows(tmp_path):
    """A dictionary stores a large text once for many rows, which must not be read all at once."""
    value = "x" * (2 << 20)
    table = pa.table({"text": pa.array([value, "gut"] * 40).dictionary_encode()})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 1 << 20
    before = pa.total_allocated_bytes()
    errors, most, texts = ReadErrors(), 0, []
    for document in read_documents([path], max_document_mb=1, on_error="skip", errors=errors):
        most = max(most, pa.total_allocated_bytes() - before)
        texts.append(document.text)
    assert texts == ["gut"] * 40 and errors.count == 40 and "row 1: a text of more than 1 MB" in errors.first[0]
    assert most < 25 << 20  # 64 rows at once would take 64 MB


@pytest.mark.parametrize(
    "flag, value",
    [
        ("max_document_mb", 0), ("max_document_mb", -5), ("workers", 0), ("workers", -1), ("workers", 10**9),
        ("shard_tokens", 0), ("shard_tokens", -1), ("commit_seconds", "nan"), ("commit_seconds", -1), ("parts", 0),
        ("parts", 10**12), ("min_language_probability", 7), ("near_dedup", "nan"), ("max_token_word_ratio", "nan"),
        ("bloom_paragraphs", 10**15), ("split_documents", "word"),
    ],
)  # fmt: skip
def test_absurd_numbers_are_refused(tmp_path, tokenizer, flag, value):
    """Absurdly large numbers are refused immediately, naming the flag, and leave no files."""
    folder = corpus(tmp_path / "in")
    more = ("--dedup", "bloom") if flag == "bloom_paragraphs" else ()
    done = script(
        "prepare_data.py",
        *("--input", folder, "--tokenizer", tokenizer, "--output", tmp_path / "out", f"--{flag}", value, *more),
        *(() if flag == "workers" else ("--workers", 1)),
    )
    assert done.returncode == 2 and flag.removeprefix("parts") in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_very_large_shard_is_one_shard(tmp_path, tokenizer):
    """--shard_tokens 99999999999 allocates nothing in advance: it only means that there is one shard."""
    folder = corpus(tmp_path / "in")
    done = prepare("--input", folder, "--shard_tokens", 99999999999, tokenizer=tokenizer, output=tmp_path / "out")
    assert done.returncode == 0 and len(PackedDataset(tmp_path / "out" / "train").manifest.shards) == 1
