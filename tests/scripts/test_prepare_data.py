"""scripts/prepare_data.py as a user calls it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from document_facts import facts_of
from running import ROOT, script

from lit_data.packed.reader import PackedDataset
from lit_data.tokenizers.tokenizer import open_tokenizer

SCRIPT = ROOT / "scripts" / "prepare_data.py"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory) -> Path:
    """A byte-level tokenizer whose end-of-document token has an unusual name."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["[ENDE]", *alphabet])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["[ENDE]"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.save(str(path))
    return path


def call(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return script("prepare_data.py", *arguments, cwd=cwd)


def test_prepare_with_two_workers(tmp_path, tokenizer_file):
    lines = [{"body": f"Zeile {i} äö", "key": f"k{i}", "genre": "prose"} for i in range(50)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + "{bad\n")
    command = [
        sys.executable, str(SCRIPT),
        "--input", "x.jsonl", "--tokenizer", str(tokenizer_file), "--output", "new/out", "--val_fraction", "0.3",
        "--workers", "2", "--on_error", "skip", "--text_field", "body", "--id_field", "key", "--metadata", "genre",
        "--shard_tokens", "200", "--seed", "1", "--eos_token", "[ENDE]",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)  # as a user calls it
    assert done.returncode == 0, done.stderr
    train, val = (PackedDataset(tmp_path / "new" / "out" / side) for side in ("train", "val"))
    assert train.n_documents + val.n_documents == 50 and len(train.manifest.shards) > 1
    n_bytes = sum(len(r["body"].encode()) for r in lines)
    assert train.manifest.bytes + val.manifest.bytes == n_bytes == train.n_tokens + val.n_tokens - 50
    assert f"{train.n_documents} documents, {train.n_tokens:,} tokens" in done.stdout
    assert "MB/s" in done.stdout and "bytes per token" in done.stdout
    assert "skipped: 1 unreadable documents, 0 empty ones" in done.stdout and "x.jsonl, line 51" in done.stdout
    assert facts_of(train, 0)["genre"] == "prose" and facts_of(train, 0)["id"].startswith("k")
    assert facts_of(train, 0)["source"] == "x.jsonl"
    # The tokenizer's copy stores the token given by --eos_token.
    assert open_tokenizer(tmp_path / "new" / "out" / "tokenizer").eos_id == train.eos_id == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "gone.txt"], "gone.txt does not exist"),
        (["--input", "bad.txt", "--workers", "2"], "bad.txt, line 2: not UTF-8"),
        (["--input", "x.csv"], "x.csv is of an unknown type"),
        (["--input", "good.txt", "--val_fraction", "2"], "--val_fraction 2.0"),
        (["--input", "good.txt", "--output", "there"], "there exists already"),
    ],
)
def test_errors_give_one_line_and_exit_2(tmp_path, tokenizer_file, arguments, message):
    (tmp_path / "bad.txt").write_bytes(b"one\n\xff\n")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "there").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    output = [] if "--output" in arguments else ["--output", "out"]
    done = call("--tokenizer", tokenizer_file, *output, "--eos_token", "[ENDE]", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_tokenizer_without_eos_is_refused_with_the_remedy(tmp_path, tokenizer_file):
    (tmp_path / "good.txt").write_text("good")
    done = call("--input", "good.txt", "--tokenizer", tokenizer_file, "--output", "out", cwd=tmp_path)
    assert done.returncode == 2 and "--eos_token" in done.stderr and not (tmp_path / "out").exists()


def writing_end(fifo, process):
    """A descriptor that keeps a FIFO open without writing, as soon as the process has opened it for reading."""
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:  # ENXIO: no reader yet
            assert error.errno == errno.ENXIO and process.poll() is None
            time.sleep(0.02)


def wait_until_blocked(process):
    """Wait until it uses no CPU: a signal that comes between Python's last look at signals and the system call that
    blocks is seen when that call returns, and a FIFO that nobody writes to never lets it."""

    def used():
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]

    before = used()
    while True:
        time.sleep(0.2)
        if before == (before := used()):
            return


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_files(tmp_path, tokenizer_file, number, code):
    os.mkfifo(tmp_path / "endless.txt")  # reading blocks here
    command = [sys.executable, str(SCRIPT), "--input", "endless.txt", "--tokenizer", str(tokenizer_file)]
    with subprocess.Popen(
        [*command, "--output", "out", "--eos_token", "[ENDE]"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in background jobs SIGINT is ignored
    ) as process:
        held = writing_end(tmp_path / "endless.txt", process)
        wait_until_blocked(process)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        os.close(held)
    assert process.returncode == code and "Traceback" not in stderr
    assert [p.name for p in tmp_path.iterdir()] == ["endless.txt"]


def test_a_full_disk_is_named_and_the_preparation_resumes(tmp_path, tokenizer_file):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        lines = [json.dumps({"id": f"{i}", "text": f"Zeile {i} " * 50}) for i in range(600)]
        (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
        command = ["--input", "x.jsonl", "--tokenizer", tokenizer_file, "--eos_token", "[ENDE]", "--workers", 1,
                   "--commit_seconds", 0]  # fmt: skip
        done = call(*command, "--output", "small/out", cwd=tmp_path)
        assert done.returncode == 2 and "No space left on device" in done.stderr, done.stderr
        assert "the same command resumes it" in done.stderr and not (small / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        done = call(*command, "--output", "small/out", cwd=tmp_path)
        assert done.returncode == 0 and "the rest was done before" in done.stdout, done.stderr
        assert call(*command, "--output", "whole", cwd=tmp_path).returncode == 0
        for name in ("data-00000.bin", "data-00000.idx", "data-00000.docs.parquet", "manifest.json"):
            assert (small / "out" / "train" / name).read_bytes() == (tmp_path / "whole" / "train" / name).read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_stages_called_separately(tmp_path, tokenizer_file):
    """Another scheduler calls each stage separately, with the same flags in all calls."""
    for number in range(3):
        lines = [json.dumps({"text": f"Absatz {i % 7} der Datei\nZeile {number} {i}"}) for i in range(20)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    common = ["--input", "*.jsonl", "--tokenizer", tokenizer_file, "--eos_token", "[ENDE]", "--workers", 1,
              "--dedup", "exact", "--dedup_min_characters", 3]  # fmt: skip
    for stage, part in (("hash", 0), ("hash", 1), ("join", 0), ("encode", 0), ("encode", 1), ("merge", 0)):
        flags = ["--stage", stage, "--part", part, "--parts", 2, "--output", "parts"]
        done = call(*common, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "60 documents" in done.stdout and "seen before" in done.stdout
    assert call(*common, "--output", "one", cwd=tmp_path).returncode == 0
    for name in ("data-00000.bin", "manifest.json"):
        assert (tmp_path / "parts" / "train" / name).read_bytes() == (tmp_path / "one" / "train" / name).read_bytes()
    refused = call(*common, "--output", "two", "--stage", "join", "--executor", "local", cwd=tmp_path)
    assert refused.returncode == 2 and "exclude each other" in refused.stderr
