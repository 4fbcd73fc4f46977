"""scripts/import_tokens.py as a user calls it."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
from running import ROOT, script

from lit_data.packed.reader import PackedDataset


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return script("import_tokens.py", *arguments)


def test_legacy_chunks(tmp_path):
    """Chunks as TinyLlama's builder writes them: BOS before each document, one document split, the last chunk
    padded."""
    (tmp_path / "in").mkdir()
    for number, ids in enumerate([[1, 5, 6, 1, 7], [8, 9, 1, 1, 1]]):
        data = b"LITPKDS" + struct.pack("<QBQ", 1, 8, 5) + struct.pack("<5H", *ids)
        (tmp_path / "in" / f"train_{number:010d}.bin").write_bytes(data)
    command = [sys.executable, str(ROOT / "scripts" / "import_tokens.py"), "--input", "in", "--output", "out"]
    command += ["--vocab_size", "10", "--eos_id", "2", "--split_at", "1", "--across_files", "--append_eos"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)  # as a user calls it
    assert done.returncode == 0, done.stderr
    assert "2 documents, 7 tokens, 1 shards" in done.stdout and "EOS appended to 2 documents" in done.stdout
    dataset = PackedDataset(tmp_path / "out")
    assert dataset.tokens(0, 7).tolist() == [5, 6, 2, 7, 8, 9, 2]
    assert dataset.manifest.source["kinds"] == ["chunk"]


def test_flat_file(tmp_path):
    np.asarray([5, 6, 2, 7, 2], dtype=np.uint32).tofile(tmp_path / "x.bin")
    base = ("--input", tmp_path / "x.bin", "--output", tmp_path / "out", "--vocab_size", 10, "--eos_id", 2)
    done = call(*base)
    assert done.returncode == 2 and "give the type of its ids with --dtype" in done.stderr
    done = call(*base, "--dtype", "uint32", "--split_at", 2)
    assert done.returncode == 0, done.stderr
    assert PackedDataset(tmp_path / "out").n_documents == 2
    done = call(*base, "--dtype", "uint32", "--split_at", 2)
    assert done.returncode == 2 and "exists already" in done.stderr and "Traceback" not in done.stderr


def test_errors_leave_no_output(tmp_path):
    np.save(tmp_path / "x.npy", np.asarray([5, 60, 2]))
    for arguments, message in [
        (("--vocab_size", 10, "--eos_id", 2), "holds token id 60, outside the vocabulary of 10"),
        ((), "give --tokenizer, or --vocab_size and --eos_id"),
        (("--vocab_size", 10, "--eos_id", 2, "--across_files"), "--across_files needs --split_at"),
        (("--vocab_size", 99, "--eos_id", 3), "give --append_eos"),
    ]:
        done = call("--input", tmp_path / "x.npy", "--output", tmp_path / "out", *arguments)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]
