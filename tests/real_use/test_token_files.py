"""Token files of other trainers: read according to their headers, or refused with a remedy; headers are never
packed.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from running import script

from lit_data.packed.reader import PackedDataset
from lit_data.packed.summary import faults_of

EOS = 0
DOCUMENTS = [[5, 6, 7], [8], [9, 3, 4, 2]]
CLOSED = [[*d, EOS] for d in DOCUMENTS]
STREAM = [id for d in CLOSED for id in d]


def imported(path: Path | list[Path], *more: object, output: Path | None = None, vocab_size: int = 100):
    """Run scripts/import_tokens.py in this process."""
    paths = path if isinstance(path, list) else [path]
    output = output or paths[0].parent / "out"
    return script(
        "import_tokens.py",
        *("--input", *paths, "--output", output, "--vocab_size", vocab_size, "--eos_id", EOS, *more),
    )


def documents(folder: Path) -> list[list[int]]:
    dataset = PackedDataset(folder)
    assert faults_of(dataset.path) == []
    starts = dataset.document_start(np.arange(dataset.n_documents + 1)).tolist()
    return [dataset.tokens(a, b).tolist() for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_raw_memory_map_named_npy(tmp_path, dtype):
    """OLMo's .npy files have no header. Without --dtype the message asks for it; with it they are read."""
    path = tmp_path / "part-0-00000.npy"
    mapped = np.memmap(path, dtype=dtype, mode="w+", shape=(len(STREAM),))
    mapped[:] = STREAM
    mapped.flush()
    done = imported(path, "--split_at", EOS)
    assert done.returncode == 2 and "it has no header of NumPy" in done.stderr and "--dtype" in done.stderr
    assert "pickle" not in done.stderr
    done = imported(path, "--split_at", EOS, "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    assert documents(tmp_path / "out") == CLOSED


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


BAD_NPY = {
    "objects": npy(np.asarray([{}], object)),
    "objects, a pickle cut short": npy(np.asarray([{}], object))[:-4],
    "a pickle": pickle.dumps([1, 2, 3]),
    "nothing": b"",
    "a header cut short": npy(np.arange(3))[:20],
    "a header without an end": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{",
    "a header that is code": b"\x93NUMPY\x01\x00" + struct.pack("<H", 20) + b"__import__('os').x()",
    "no more than a header": npy(np.arange(3))[:128],
    "two dimensions": npy(np.ones((2, 2), int)),
    "one number": npy(np.asarray(3)),
    "floats": npy(np.ones(3)),
    "an archive": b"PK\x03\x04" + bytes(80),
}


@pytest.mark.parametrize("kind", BAD_NPY)
def test_an_unreadable_npy_never_suggests_pickles(tmp_path, kind):
    """Numpy's advice, allow_pickle=True, would run code of the file; no message passes it on."""
    (tmp_path / "x.npy").write_bytes(BAD_NPY[kind])
    done = imported(tmp_path / "x.npy")
    assert done.returncode == 2 and "x.npy" in done.stderr and "pickle" not in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("token_size", [2, 4])
@pytest.mark.parametrize("metadata", [True, False])
def test_tokens_of_datatrove(tmp_path, token_size, metadata):
    """A .ds as datatrove writes it, with its index; given by shell pattern, folder or name."""
    writers = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    (tmp_path / "in").mkdir()
    file = writers.TokenizedFile(
        str(tmp_path / "in"), "00000_00000_shuffled.ds", token_size=token_size, save_final_metadata=metadata,
        tokenizer_name_or_path="some/tokenizer|eos", save_loss_metadata=False,
    )  # fmt: skip
    for document in CLOSED:
        file.write(document, None)
    file.close()
    path = tmp_path / "in" / "00000_00000_shuffled.ds"
    assert path.with_name(path.name + ".metadata").exists() == metadata
    for number, given in enumerate([[path], [path.parent], sorted(path.parent.iterdir())]):
        done = imported(given, output=tmp_path / f"out-{number}")
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert documents(tmp_path / f"out-{number}") == CLOSED
    done = imported(path, "--split_at", EOS)
    assert done.returncode == 2 and "has an index of its documents; leave" in done.stderr
    # Without the index, the metadata gives the type; without both, --dtype does.
    path.with_name(path.name + ".index").unlink()
    done = imported(path, "--split_at", EOS, output=tmp_path / "flat")
    if not metadata:
        assert done.returncode == 2 and "give the type of its ids with --dtype" in done.stderr
        done = imported(path, "--split_at", EOS, "--dtype", f"uint{8 * token_size}", output=tmp_path / "flat")
    assert done.returncode == 0, done.stderr
    assert documents(tmp_path / "flat") == CLOSED


def test_damage_in_a_ds_is_named(tmp_path):
    """A truncated .ds, an index out of order or beyond the file, are named; nothing is written."""
    path, index = tmp_path / "x.ds", tmp_path / "x.ds.index"
    good, ends = np.asarray(STREAM, "<u2").tobytes(), np.cumsum([len(d) for d in CLOSED]).tolist()
    for data, numbers, message in [
        (good[:-2], ends, "x.ds has"),
        (good, [ends[1], ends[0], ends[2]], "x.ds.index is damaged"),
        (good, [2**64 - 1, *ends[1:]], "x.ds.index is damaged"),
        (good, ends[:-1], "x.ds has"),
    ]:
        path.write_bytes(data)
        index.write_bytes(struct.pack(f"<{len(numbers)}Q", *numbers))
        done = imported(path)
        assert done.returncode == 2 and message in done.stderr and not (tmp_path / "out").exists(), done.stderr
    index.write_bytes(b"123")
    assert "x.ds.index has 3 bytes" in imported(path).stderr


def llmc(magic: int, version: int, tokens: int, data: bytes) -> bytes:
    return np.asarray([magic, version, tokens, *[0] * 253], "<i4").tobytes() + data


@pytest.mark.parametrize("magic, version, dtype", [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_shards_of_llmc_and_modded_nanogpt(tmp_path, magic, version, dtype):
    """Their header of 1024 bytes used to be packed as 512 tokens with --dtype uint16."""
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(llmc(magic, version, len(STREAM), np.asarray(STREAM, dtype).tobytes()))
    done = imported(path, "--split_at", EOS)
    assert done.returncode == 0, done.stderr
    assert documents(tmp_path / "out") == CLOSED
    assert PackedDataset(tmp_path / "out").manifest.source["kinds"] == ["llm.c"]
    done = imported(path, "--split_at", EOS, "--dtype", "int64", output=tmp_path / "other")
    assert done.returncode == 2 and "--dtype int64: the header of" in done.stderr
    path.write_bytes(path.read_bytes()[:-1])
    done = imported(path, "--dtype", "uint16", output=tmp_path / "other")
    assert done.returncode == 2 and "it is truncated" in done.stderr


def litdata_chunk() -> bytes:
    items = [np.asarray(d, "<u2").tobytes() for d in DOCUMENTS]
    places = np.cumsum([4 * (len(items) + 2), *map(len, items)])
    return struct.pack(f"<{len(places) + 1}I", len(items), *places.tolist()) + b"".join(items)


TOKENS = np.asarray(STREAM * 50, "<u2").tobytes()
NO_TOKENS = {
    "gzip": (gzip.compress(TOKENS), "a gzip file"),
    "zstd": (zstandard.compress(TOKENS), "a zstd file"),
    "zip": (b"PK\x03\x04" + TOKENS, "a zip archive"),
    "an .npy named .bin": (npy(np.asarray(STREAM)), "name it .npy"),
    "Parquet": (b"PAR1" + TOKENS, "a Parquet file"),
    "an index": (b"MMIDIDX\0\0" + TOKENS, "an index of Megatron"),
    "an old index": (b"TNTIDX\0\0" + TOKENS, "an index of fairseq"),
    "GGUF": (b"GGUF" + TOKENS, "a model in GGUF"),
    "a model of llm.c": (llmc(20240326, 3, 0, TOKENS), "a model of llm.c"),
    "questions of llm.c": (llmc(20240522, 1, 0, TOKENS), "multiple-choice questions"),
    "litdata": (litdata_chunk(), "a chunk of litdata"),
}


@pytest.mark.parametrize(
    "kind, name",
    [(k, n) for k in NO_TOKENS for n in ("x.bin", "x.ds", "x.npy") if (k, n) != ("an .npy named .bin", "x.npy")],
)
def test_files_without_token_streams_are_never_packed(tmp_path, kind, name):
    """Archives, indices, models and chunks of other programs are refused, whatever --dtype says."""
    data, message = NO_TOKENS[kind]
    (tmp_path / name).write_bytes(data + bytes(-len(data) % 2 if kind != "litdata" else 0))
    done = imported(tmp_path / name, "--dtype", "uint16", vocab_size=65_535)
    assert done.returncode == 2 and message in done.stderr and name in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_nanogpt_and_legacy_chunks_are_read_as_before(tmp_path):
    """nanoGPT's raw uint16 needs --dtype, as the message says; TinyLlama's chunks need nothing."""
    (tmp_path / "train.bin").write_bytes(np.asarray(STREAM, "<u2").tobytes())
    done = imported(tmp_path / "train.bin")
    assert done.returncode == 2 and "nanoGPT's are uint16" in done.stderr
    assert imported(tmp_path / "train.bin", "--dtype", "uint16", "--split_at", EOS).returncode == 0
    (tmp_path / "c.bin").write_bytes(
        b"LITPKDS" + struct.pack("<QBQ", 1, 8, len(STREAM)) + np.asarray(STREAM, "<u2").tobytes()
    )
    assert imported(tmp_path / "c.bin", "--split_at", EOS, output=tmp_path / "chunk").returncode == 0
    assert documents(tmp_path / "out") == documents(tmp_path / "chunk") == CLOSED


def test_token_files_given_twice_are_read_once(tmp_path):
    """`megatron/*` gave .bin and .idx of each dataset, and every document twice."""
    folder = tmp_path / "megatron"
    folder.mkdir()
    lengths = [len(d) for d in CLOSED]
    (folder / "c.bin").write_bytes(np.asarray(STREAM, "<u2").tobytes())
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4) + struct.pack("<3i", *lengths)
    index += struct.pack("<3q", *(2 * np.cumsum([0, *lengths[:-1]])).tolist()) + struct.pack("<4q", 0, 1, 2, 3)
    (folder / "c.idx").write_bytes(index)
    done = imported(sorted(folder.iterdir()), output=tmp_path / "pattern")
    assert done.returncode == 0 and done.stderr == "" and documents(tmp_path / "pattern") == CLOSED
    (tmp_path / "link").symlink_to(folder)
    done = imported([folder, tmp_path / "link" / "c", folder / "c.bin"], output=tmp_path / "twice")
    assert done.returncode == 0 and documents(tmp_path / "twice") == CLOSED
    assert done.stderr.count("it is read once") == 2 and "link/c.bin is the same file as" in done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ("--vocab_size", 99999999999), ("--vocab_size", 0), ("--vocab_size", -1), ("--eos_id", 10**12),
        ("--shard_tokens", 0), ("--shard_tokens", -3), ("--document_tokens", 0), ("--document_tokens", 10**12),
        ("--split_at", -1), ("--split_at", 10**12),
    ],
)  # fmt: skip
def test_absurd_numbers_are_refused(tmp_path, flags):
    """Absurd numbers are refused, naming the flag, before any token is read."""
    np.save(tmp_path / "x.npy", np.asarray(STREAM))
    done = imported(tmp_path / "x.npy", *flags)
    assert done.returncode == 2 and flags[0] in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy"]


def test_an_unread_loss_mask_is_reported(tmp_path):
    """datatrove's .ds.loss marks tokens without loss; a message says that it is not read."""
    (tmp_path / "x.ds").write_bytes(np.asarray(STREAM, "<u2").tobytes())
    (tmp_path / "x.ds.index").write_bytes(np.cumsum([len(d) for d in CLOSED]).astype("<u8").tobytes())
    (tmp_path / "x.ds.loss").write_bytes(bytes(len(STREAM)))
    done = imported(tmp_path, output=tmp_path / "out")
    assert (
        done.returncode == 0 and "x.ds.loss says which tokens to leave out of the loss; it is not read" in done.stderr
    )
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]["kinds"] == ["datatrove"]
