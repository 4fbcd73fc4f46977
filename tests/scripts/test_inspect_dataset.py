"""scripts/inspect_dataset.py, compared with counts made in plain Python."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from running import ROOT, script

from lit_data.packed.writer import PackedWriter
from lit_data.tokenizers.tokenizer import open_tokenizer

SCRIPT = ROOT / "scripts" / "inspect_dataset.py"
LENGTHS = [1, 2, 3, 4, 7, 8, 9, 300, 5, 5, 2, 1]
IDS = ["a", "b", "a", "c", "d", "b", "a", "e", "f", "g", "h", "i"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "hallo": 1, "welt": 2}, unk_token="hallo"))
    (folder / "tokenizer").mkdir()
    model.save(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer = open_tokenizer(folder / "tokenizer")
    with PackedWriter(
        folder / "set",
        tokenizer={**tokenizer.facts(), "folder": "../tokenizer"},
        vocab_size=3,
        eos_id=0,
        shard_tokens=100,
    ) as writer:
        for number, (length, id) in enumerate(zip(LENGTHS, IDS, strict=True)):
            ids = [1 + number % 2] * (length - 1) + [0]
            writer.add(ids, id=id, source=f"part{number % 3}.jsonl", place=number, n_bytes=2 * length)
    return folder / "set"


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return script("inspect_dataset.py", *arguments)


def test_json(dataset):
    done = call(dataset, "--json", "--samples", 3, "--seed", 1)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["documents"], found["tokens"], found["text_bytes"]) == (12, sum(LENGTHS), 2 * sum(LENGTHS))
    assert found["dtype"] == "uint16" and found["shards"] == 3
    lengths = found["lengths"]
    assert (lengths["shortest"], lengths["longest"], lengths["mean"]) == (1, 300, sum(LENGTHS) / 12)
    for low in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        inside = [n for n in LENGTHS if low <= n < 2 * low]
        (b,) = (b for b in lengths["bins"] if b["low"] == low)
        assert (b["high"], b["documents"], b["tokens"]) == (2 * low - 1, len(inside), sum(inside))
    assert sum(b["documents"] for b in lengths["bins"]) == 12
    per_source = Counter()
    for number, length in enumerate(LENGTHS):
        per_source[f"part{number % 3}.jsonl"] += length
    assert found["sources"]["count"] == 3
    largest = [(s["source"], s["tokens"]) for s in found["sources"]["largest"]]
    assert largest == sorted(per_source.items(), key=lambda item: (-item[1], item[0]))
    assert found["repeated_ids"] == {"ids": 2, "documents": 5, "most": {"a": 3, "b": 2}}
    assert len(found["samples"]) == 3
    for sample in found["samples"]:
        number = sample["number"]
        words = [["hallo", "welt"][number % 2]] * (LENGTHS[number] - 1)
        assert sample["text"] == " ".join([*words, "</s>"])[:400]
        assert sample["tokens"] == LENGTHS[number] and sample["id"] == IDS[number]
    assert call(dataset, "--json", "--samples", 3, "--seed", 1).stdout == done.stdout


def test_text_and_picture(dataset, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "lengths.png"
    done = call(dataset, "--samples", 12, "--max_chars", 10, "--sources", 1, "--picture", picture)
    assert done.returncode == 0, done.stderr
    assert "12 documents, 347 tokens, 694 bytes of text, 2.000 bytes per token" in done.stdout
    assert ["256", "to", "511", "1", "86.5%", "#" * 10] in [line.split() for line in done.stdout.splitlines()]
    assert "(3 in all)" in done.stdout and "part1.jsonl" in done.stdout
    assert "2 ids repeat, in 5 documents" in done.stdout and "#11 i (part2.jsonl, 11), 1 tokens" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_verify_names_each_bad_file(dataset, tmp_path):
    assert call(dataset, "--verify").stdout.strip().endswith("no fault")
    copy = tmp_path / "set"
    copy.mkdir()
    for file in dataset.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    flipped = bytearray((copy / "data-00001.bin").read_bytes())
    flipped[5] ^= 4
    (copy / "data-00001.bin").write_bytes(flipped)
    (copy / "data-00000.idx").write_bytes((copy / "data-00000.idx").read_bytes()[:-1])
    (copy / "data-00002.docs.parquet").unlink()
    done = call(copy, "--verify")
    assert done.returncode == 1
    assert "data-00001.bin has changed since it was written" in done.stdout
    assert "data-00000.idx has" in done.stdout and "data-00002.docs.parquet is missing" in done.stdout
    assert "3 faults" in done.stdout
    assert len(json.loads(call(copy, "--verify", "--json").stdout)["faults"]) == 3
    done = call(copy)
    assert done.returncode == 2 and "error: " in done.stderr and "data-0000" in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes(dataset, tmp_path):
    for arguments, message in [
        ((tmp_path,), "is not a packed dataset"),
        ((dataset / "manifest.json",), f"did you mean {dataset}?"),
        ((dataset, "--samples", -1), "--samples -1"),
        ((dataset, "--samples", 1, "--tokenizer", tmp_path / "none"), "no tokenizer at"),
    ]:
        done = call(*arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_without_a_tokenizer_ids_are_shown(tmp_path):
    with PackedWriter(tmp_path / "set", tokenizer={"fingerprint": "f" * 64}, vocab_size=9, eos_id=0) as writer:
        writer.add([4, 5, 0], id="x")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "set"), "--samples", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)  # as a user calls it
    assert done.returncode == 0 and "4 5 0" in done.stdout and "bytes of text unknown" in done.stdout
    assert "\n0 ids repeat\n" in done.stdout
