"""Readers: the right documents from each kind of file, and errors that name file and line."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_data.corpus.files import ReadErrors, list_files, part_of_files
from lit_data.corpus.readers import Place, check_metadata, read_documents
from lit_data.corpus.streams import after_lines, lines_of


def read(*paths: Path, **kw) -> list[tuple[str, str, int]]:
    return [(d.id, d.text, d.place) for d in read_documents(list(paths), **kw)]


def pack(data: bytes, name: str) -> bytes:
    """Compressed according to the file's extension."""
    return gzip.compress(data) if name.endswith("gz") else zstandard.compress(data) if "zst" in name else data


def json_lines(*records: object) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in records)


def test_text_files_are_one_document_unchanged(tmp_path):
    text = "\ufeff Zeile\r\nmit \x00 und\x85 ä\n\n"
    for name in ("a.txt", "b.train", "c.dev", "d.test", "E.TXT", "f.txt.gz", "g.train.zst", "h.txt.zstd"):
        (tmp_path / name).write_bytes(pack(text.encode(), name))
        (document,) = read_documents([tmp_path / name])
        assert (document.id, document.text, document.place) == (name, text, 0)
        assert document.source == str(tmp_path / name)


def test_folders_are_read_recursively_in_order(tmp_path):
    for name in ("b.txt", "a/2.txt", "a/10.txt", "a/deep/1.txt", ".hidden/x.txt", ".x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "lines.jsonl").write_bytes(json_lines({"text": "one"}, {"text": "two", "id": "own"}))
    (tmp_path / "README.md").write_text("not text to train on")
    errors = ReadErrors()
    found = read(tmp_path, errors=errors)
    assert found == [
        ("a/10.txt", "a/10.txt", 0),
        ("a/2.txt", "a/2.txt", 0),
        ("a/deep/1.txt", "a/deep/1.txt", 0),
        ("b.txt", "b.txt", 0),
        ("lines.jsonl:1", "one", 1),
        ("own", "two", 2),
    ]
    assert errors.count == 0 and errors.ignored_files == 1 and "README.md" in errors.ignored_first[0]


def test_links_are_followed_and_loops_end(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "in")
    assert read(tmp_path / "in") == [("link/a.txt", "a", 0)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".json.gz", ".jsonlines.zstd"])
def test_json_lines(tmp_path, suffix):
    data = (
        b'\xef\xbb\xbf{"text": "first", "id": 7, "genre": "drama", "year": 1623}\n'
        b"\n"
        b'{"text": "a\\u2028b\\n", "id": null}\r\n' + '{"text": "roh \u2028 ä"}'.encode()
    )
    file = tmp_path / f"x{suffix}"
    file.write_bytes(pack(data, suffix))
    documents = list(read_documents([file], metadata=["genre", "year"]))
    assert [(d.id, d.text, d.place) for d in documents] == [
        ("7", "first", 1),
        (f"x{suffix}:3", "a\u2028b\n", 3),
        (f"x{suffix}:4", "roh \u2028 ä", 4),
    ]
    assert documents[0].meta == {"genre": "drama", "year": "1623"} and documents[1].meta == {}


def test_other_field_names(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(json_lines({"body": "t", "key": "k", "text": 3}))
    assert read(tmp_path / "x.jsonl", text_field="body", id_field="key") == [("k", "t", 1)]


def test_parquet(tmp_path):
    table = pa.table({"id": ["a", None, "c"], "text": ["x", "ä\n", ""], "n": [1, 2, None], "unread": [[1], [2], [3]]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    documents = list(read_documents([tmp_path / "x.parquet"], metadata=["n"]))
    assert [(d.id, d.text, d.place) for d in documents] == [("a", "x", 1), ("x.parquet:2", "ä\n", 2), ("c", "", 3)]
    assert [d.meta for d in documents] == [{"n": "1"}, {"n": "2"}, {}]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_string_types(tmp_path, kind):
    column = pa.array(["é", "é"], pa.string())
    pq.write_table(pa.table({"text": column.cast(kind)}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == [("x.parquet:1", "é", 1), ("x.parquet:2", "é", 2)]


BAD_LINES = {
    "json": (b'{"text": "x"', "line 2: invalid JSON"),
    "utf8": (b'{"text": "\xff"}', r"line 2: not UTF-8 \(invalid start byte, byte 10 of the line\)"),
    "array": (b'["text"]', "line 2: a JSON array where an object is needed"),
    "missing": (b'{"body": "x"}', r"line 2: no field 'text' \(--text_field\); its fields: 'body'"),
    "number": (b'{"text": 3}', "line 2: the field 'text' holds a JSON number"),
    "null": (b'{"text": null}', "line 2: the field 'text' holds a JSON null"),
    "surrogate": (b'{"text": "\\ud800"}', "line 2: the field 'text' contains an unpaired surrogate"),
    "depth": (b'{"text": ' + b"[" * 100_000, "line 2: invalid JSON"),
}


@pytest.mark.parametrize("fault", BAD_LINES)
def test_a_bad_line_stops_or_is_skipped(tmp_path, fault):
    line, message = BAD_LINES[fault]
    file = tmp_path / "x.jsonl"
    file.write_bytes(json_lines({"text": "one"}) + line + b"\n" + json_lines({"text": "three"}))
    documents = read_documents([file])
    assert next(documents).text == "one"
    with pytest.raises(ValueError, match=rf"x\.jsonl, {message}.*--on_error skip"):
        next(documents)
    errors = ReadErrors()
    assert [t for _, t, _ in read(file, on_error="skip", errors=errors)] == ["one", "three"]
    assert errors.count == 1 and f"{file}, line 2" in errors.first[0]


def test_bad_text_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nth\xe9ee")
    (tmp_path / "b.txt").write_text("good")
    with pytest.raises(ValueError, match=r"a\.txt, line 3: not UTF-8 .*byte 10 of the file"):
        read(tmp_path)
    errors = ReadErrors()
    assert read(tmp_path, on_error="skip", errors=errors) == [("b.txt", "good", 0)] and errors.count == 1


def test_only_the_first_errors_are_kept(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"{\n" * 50)
    errors = ReadErrors()
    assert read(tmp_path, on_error="skip", errors=errors) == []
    assert errors.count == 50 and len(errors.first) == 5


def big_lines() -> bytes:
    return json_lines(*({"text": f"document {i} " + "x" * (i % 977)} for i in range(2000)))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "not zstd", "between frames"])
def test_damaged_zstd_is_named(tmp_path, damage):
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(big_lines())
    data = {
        "truncated": packed[:-5],
        "flipped": packed[:-1] + bytes([packed[-1] ^ 1]),
        "empty": b"",
        "not zstd": b'{"text": "x"}\n',
        "between frames": packed + packed[:1000],
    }[damage]
    file = tmp_path / "x.jsonl.zst"
    file.write_bytes(data)
    (tmp_path / "y.txt").write_text("next file")
    with pytest.raises(ValueError, match=r"x\.jsonl\.zst, after line \d+: .*(truncated|damaged)"):
        read(file)
    errors = ReadErrors()
    found = read(tmp_path, on_error="skip", errors=errors)
    assert found[-1] == ("y.txt", "next file", 0) and errors.count == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "not gzip", "between members"])
@pytest.mark.parametrize("kind", [".jsonl.gz", ".txt.gz"])
def test_damaged_gzip_is_named(tmp_path, damage, kind):
    packed = gzip.compress(big_lines())
    data = {
        "truncated": packed[:-5],
        "flipped": packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:],
        "empty": b"",
        "not gzip": b'{"text": "x"}\n',
        "between members": packed + packed[:1000],
    }[damage]
    (tmp_path / f"x{kind}").write_bytes(data)
    (tmp_path / "y.txt").write_text("next file")
    with pytest.raises(ValueError, match=r"x\.(jsonl|txt)\.gz, .*(truncated|damaged)"):
        read(tmp_path / f"x{kind}")
    errors = ReadErrors()
    found = read(tmp_path, on_error="skip", errors=errors)
    assert found[-1] == ("y.txt", "next file", 0) and errors.count == 1


def test_gzip_of_several_members_and_padding(tmp_path):
    data = gzip.compress(b'{"text": "cut ') + gzip.compress(b"") + gzip.compress(b'in two"}\n') + bytes(700)
    (tmp_path / "x.jsonl.gz").write_bytes(data)
    assert [t for _, t, _ in read(tmp_path)] == ["cut in two"]


def test_zstd_of_several_frames_and_long_windows(tmp_path):
    one, two = json_lines({"text": "one"}), b'{"text": "cut '
    long = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, write_content_size=0)
    frames = [
        zstandard.compress(one + two),
        b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc",  # a skippable frame
        zstandard.ZstdCompressor(compression_params=long).compress(b'in two"}\n'),
    ]
    (tmp_path / "x.jsonl.zst").write_bytes(b"".join(frames))
    assert [t for _, t, _ in read(tmp_path)] == ["one", "cut in two"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "not parquet", "page"])
def test_damaged_parquet_is_named(tmp_path, damage):
    file = tmp_path / "x.parquet"
    table = pa.table({"text": [f"document {i}" for i in range(3000)]})
    pq.write_table(table, file, compression="none", use_dictionary=False, write_page_checksum=True)
    data = bytearray(file.read_bytes())
    place = data.index(b"document 1500")
    data[place + 3] ^= 1
    damaged = {"truncated": data[:-100], "empty": b"", "not parquet": b"x" * 5000, "page": data}
    file.write_bytes(damaged[damage])
    (tmp_path / "y.txt").write_text("next file")
    with pytest.raises(ValueError, match=r"x\.parquet, after row \d+: a damaged or truncated Parquet file"):
        read(file)
    errors = ReadErrors()
    found = read(tmp_path, on_error="skip", errors=errors)
    assert found[-1] == ("y.txt", "next file", 0) and errors.count == 1


def test_parquet_errors(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"body": ["a"], "other": [1]}), file)
    for on_error in ("stop", "skip"):  # a wrong column name is a user's mistake, not damage to be skipped
        with pytest.raises(ValueError, match=r"no column 'text' \(--text_field\); its columns are body, other"):
            read(file, on_error=on_error)
    with pytest.raises(ValueError, match=r"no column 'genre' \(--metadata\)"):
        check_metadata(list_files([file]), ["other", "genre"])
    bad = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    pq.write_table(pa.table({"text": bad}), file)
    with pytest.raises(ValueError, match=r"x\.parquet, row 2: not UTF-8"):
        read(file)
    assert [t for _, t, _ in read(file, on_error="skip")] == ["a", "c"]
    pq.write_table(pa.table({"text": ["a", None]}), file)
    with pytest.raises(ValueError, match=r"x\.parquet, row 2: the field 'text' holds a JSON null"):
        read(file)


def test_paths_are_checked_immediately(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_documents([tmp_path / "nowhere"])
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"x\.csv is of an unknown type; text is read from \.txt.*\.parquet"):
        read_documents([tmp_path / "x.csv"])
    with pytest.raises(ValueError, match=r"holds no text: none of its files ends in \.txt.*\.zst"):
        read_documents([tmp_path])
    with pytest.raises(ValueError, match="choose stop or skip"):
        read_documents([], on_error="ignore")  # type: ignore[arg-type]


def test_a_file_that_cannot_be_read_is_an_error_even_with_skip(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"a\.txt cannot be read: No such file"):
        read(tmp_path, on_error="skip")


@settings(deadline=None)
@given(data=st.binary(max_size=60).map(lambda b: b.replace(b"a", b"\n")), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_lines_do_not_depend_on_chunk_boundaries(data, cuts):
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    chunks = [data[a:b] for a, b in pairwise(edges)]
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert list(lines_of(iter(chunks))) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    data = b'{"text": "' + b"word " * 2000 + b'"}\n'
    file = tmp_path / f"x{suffix}"
    openers = {".jsonl": open, ".jsonl.zst": zstandard.open, ".jsonl.gz": gzip.open}
    with openers[suffix](file, "wb") as f:
        for _ in range(3000):  # 30 MB
            f.write(data)
    tracemalloc.start()
    count = sum(1 for _ in read_documents([file]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 3000 and peak < 20e6


def corpus_of_all_kinds(folder: Path) -> None:
    (folder / "b").mkdir()
    lines = big_lines()[: 1 << 16] + b'\n\n{"text": 3}\n{"text": "last, without a newline"}'
    for name in ("a.jsonl", "b/c.jsonl.zst", "d.json.gz"):
        (folder / name).write_bytes(pack(lines, name))
    (folder / "b" / "e.txt").write_text("whole")
    (folder / "f.txt.gz").write_bytes(pack(b"packed", "f.txt.gz"))
    table = pa.table({"text": [None if i == 100 else f"row {i}" for i in range(500)], "id": range(500)})
    pq.write_table(table, folder / "g.parquet", row_group_size=130)


def test_reading_resumes_after_any_document(tmp_path):
    corpus_of_all_kinds(tmp_path)
    errors = ReadErrors()
    documents = list(read_documents([tmp_path], on_error="skip", errors=errors))
    assert [f.relative for f in list_files([tmp_path])] == [
        "a.jsonl", "b/c.jsonl.zst", "b/e.txt", "d.json.gz", "f.txt.gz", "g.parquet"
    ]  # fmt: skip
    assert errors.count == 4 + 3 and sorted({d.file for d in documents}) == list(range(6))
    ends = [i for i, (a, b) in enumerate(pairwise(documents)) if a.file != b.file]
    for last in {*range(0, len(documents), 61), *ends, *(e + 1 for e in ends), *(e - 1 for e in ends)}:
        place = Place(documents[last].file, documents[last].place)
        rest_errors = ReadErrors()
        rest = list(read_documents([tmp_path], on_error="skip", errors=rest_errors, start=place))
        assert [(d.id, d.text, d.place, d.file) for d in rest] == [
            (d.id, d.text, d.place, d.file) for d in documents[last + 1 :]
        ]
        # The documents omitted before and after the position add up, document by document.
        before = documents[last].faults
        assert [before + d.faults for d in rest] == [d.faults for d in documents[last + 1 :]]
        assert before + rest_errors.count == errors.count


def test_documents_between_separators(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text(
        "One.\n\nStill one.\n<|endoftext|>\n\nTwo.\r\n <|endoftext|> \n\n \n<|endoftext|>\nThree <|endoftext|>\n"
    )
    found = list(read_documents([path], split_documents="<|endoftext|>"))
    assert [document.text for document in found] == ["One.\n\nStill one.", "Two.", "Three <|endoftext|>"]
    for i, document in enumerate(found):
        rest = read_documents([path], split_documents="<|endoftext|>", start=Place(document.file, document.place))
        assert [other.text for other in rest] == [other.text for other in found[i + 1 :]]
    for wrong in ("blanklines", " ###", ""):
        with pytest.raises(ValueError, match="--split_documents"):
            read_documents([path], split_documents=wrong)


def test_documents_before_a_position_are_not_parsed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"no JSON\n" * 70_000 + json_lines({"text": "one"}, {"text": "two"}))
    (tmp_path / "b.txt.gz").write_bytes(b"no gzip file")
    (tmp_path / "c.txt").write_text("c")
    assert read(tmp_path / "a.jsonl", start=Place(0, 70_001)) == [("a.jsonl:70002", "two", 70_002)]
    assert read(tmp_path, start=Place(1, 0)) == [("c.txt", "c", 0)]
    assert read(tmp_path, start=Place(2, 0)) == []


def test_a_position_that_does_not_exist_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "one"}))
    with pytest.raises(ValueError, match="file number 1 of 1: the inputs have changed"):
        read(tmp_path, start=Place(1, 0))
    with pytest.raises(ValueError, match=r"a\.jsonl.* ends 4 lines before the line to resume after"):
        read(tmp_path, start=Place(0, 5))


@given(
    data=st.binary(max_size=40).map(lambda b: b.replace(b"a", b"\n")),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    skipped=st.integers(0, 5),
)
def test_skipping_lines_equals_reading_them(data, cuts, skipped):
    edges = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    chunks = [data[a:b] for a, b in pairwise(edges) if b > a]
    lines = list(lines_of(iter(chunks)))
    if skipped > len(lines):
        with pytest.raises(ValueError, match="before the line to resume after"):
            list(after_lines(iter(chunks), skipped, "x"))
    else:
        assert list(lines_of(after_lines(iter(chunks), skipped, "x"))) == lines[skipped:]


def test_patterns(tmp_path):
    for name in ("c/a/1.jsonl", "c/a/deep/2.jsonl", "c/b/3.jsonl", "c/b/4.txt", "c/b/5.md", "c/.h/6.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(json_lines({"text": name}))
    (tmp_path / "c" / "again").symlink_to(tmp_path / "c" / "a")

    def found(pattern: str) -> list[str]:
        return [f.relative for f in list_files([f"{tmp_path}/{pattern}"])]

    assert found("c/**/*.jsonl") == ["a/1.jsonl", "a/deep/2.jsonl", "b/3.jsonl"]
    assert found("c/**") == ["a/1.jsonl", "a/deep/2.jsonl", "b/3.jsonl", "b/4.txt"]
    assert found("c/[ab]/*.jsonl") == ["a/1.jsonl", "b/3.jsonl"]
    assert found("c/b/[34].*") == ["3.jsonl", "4.txt"]
    errors = ReadErrors()
    list_files([tmp_path / "c" / "b" / "*"], errors)
    assert errors.ignored_files == 1 and "5.md" in errors.ignored_first[0]
    with pytest.raises(FileNotFoundError, match=r"no file matches .*c/\*/none\*"):
        found("c/*/none*")
    with pytest.raises(ValueError, match=r"\*\.md holds no text"):
        found("c/b/*.md")


def test_an_existing_path_is_not_a_pattern(tmp_path):
    (tmp_path / "x[12].txt").write_text("itself")
    (tmp_path / "x1.txt").write_text("matched")
    assert read(tmp_path / "x[12].txt") == [("x[12].txt", "itself", 0)]
    (tmp_path / "x[12].txt").unlink()
    assert read(tmp_path / "x[12].txt") == [("x1.txt", "matched", 0)]


def test_an_id_can_be_required(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(json_lines({"text": "a", "key": 1}, {"text": "b"}, {"text": "c", "key": None}))
    assert len(read(tmp_path, id_field="key")) == 3
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: no field 'key' \(--id_field\)"):
        read(tmp_path, id_field="key", require_id=True)
    errors = ReadErrors()
    assert read(tmp_path, id_field="key", require_id=True, on_error="skip", errors=errors) == [("1", "a", 1)]
    assert errors.count == 2
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match=r"y\.parquet has no column 'id' \(--id_field\)"):
        read(tmp_path / "y.parquet", require_id=True, on_error="skip")


def test_a_json_file_that_is_not_json_lines_is_explained(tmp_path):
    (tmp_path / "x.json").write_text('[\n{"text": "a"}\n]')
    with pytest.raises(ValueError, match=r"line 1: invalid JSON.*; a \.json file is read as JSON lines"):
        read(tmp_path)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=12), n_parts=st.integers(1, 12))
def test_parts_are_contiguous_complete_and_balanced(tmp_path_factory, sizes, n_parts):
    folder = tmp_path_factory.mktemp("parts")
    for i, size in enumerate(sizes):
        (folder / f"{i:02d}.txt").write_bytes(bytes(size))
    files = list_files([folder])
    if n_parts > len(files):
        with pytest.raises(ValueError, match=f"{len(files)} files cannot be split into {n_parts} parts"):
            part_of_files(files, 0, n_parts)
        return
    parts = [part_of_files(files, part, n_parts) for part in range(n_parts)]
    assert [f for part in parts for f in part] == files and all(parts)
    # A part deviates from its share by at most one file at each end, and a single file.
    for part in parts:
        total = sum(f.path.stat().st_size for f in part)
        assert len(part) == 1 or total <= sum(sizes) / n_parts + max(sizes)
    with pytest.raises(ValueError, match="numbered from 0"):
        part_of_files(files, n_parts, n_parts)


def test_parts_of_equal_files_are_equal(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02d}.txt").write_bytes(bytes(100))
    files = list_files([tmp_path])
    assert [len(part_of_files(files, part, 4)) for part in range(4)] == [3, 3, 3, 3]
    assert read(*part_of_files(files, 2, 4))[0][0] == "06.txt"
