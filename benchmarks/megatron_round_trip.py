"""Reads our packed datasets with megatron-core, and its datasets with our reader, and compares them token by token.

    python benchmarks/megatron_round_trip.py --peer megatron=/path/to/an/environment/bin/python

The peer's environment needs megatron-core and torch, not this project. Without --peer it reports that nothing was
compared, and exits with 3. The layout itself is tested without megatron-core by tests/data/test_packed.py and
test_token_files.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import numpy.typing as npt

from lit_data.packed.reader import PackedDataset
from lit_data.packed.summary import faults_of
from lit_data.packed.token_import import ImportSettings, import_tokens
from lit_data.packed.writer import PackedWriter

PEER = Path(__file__).resolve().with_name("peer_megatron.py")
EOS = 2
VOCABULARIES = {"uint16": 32_000, "int32": 128_256}  # Megatron's two types

Ints = npt.NDArray[np.int64]


def random_documents(n: int, vocab_size: int, seed: int) -> tuple[Ints, Ints]:
    """Tokens of all documents and their lengths; each ends with EOS, some hold nothing else."""
    random = np.random.default_rng(seed)
    lengths = np.maximum(1, random.lognormal(4, 1.5, n)).astype(np.int64)
    tokens = random.integers(0, vocab_size, lengths.sum())
    tokens[np.cumsum(lengths) - 1] = EOS
    return tokens, lengths


def ours_read_by_theirs(peer: str, folder: Path, vocab_size: int, n: int) -> str:
    tokens, lengths = random_documents(n, vocab_size, seed=1)
    starts = np.cumsum(lengths) - lengths
    with PackedWriter(
        folder / "ours", tokenizer={"fingerprint": "made"}, vocab_size=vocab_size, eos_id=EOS, shard_tokens=1 << 21
    ) as writer:
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            writer.add(tokens[start : start + length], id=str(number))
    shards = PackedDataset(folder / "ours").manifest.shards
    read: list[npt.NDArray[np.generic]] = []
    read_lengths: list[Ints] = []
    for shard in shards:
        call(peer, "read", folder / "ours" / shard.name, folder / "read.npz")
        found = np.load(folder / "read.npz")
        assert found["documents"].tolist() == list(range(shard.documents + 1)), "one document a sequence"
        read.append(found["tokens"])
        read_lengths.append(found["lengths"])
    assert np.array_equal(np.concatenate(read_lengths), lengths), "the documents' lengths differ"
    assert np.array_equal(np.concatenate(read), tokens), "the tokens differ"
    return f"{n:,} documents, {len(tokens):,} tokens of {len(shards)} shards are the same"


def theirs_read_by_ours(peer: str, folder: Path, vocab_size: int, n: int) -> str:
    tokens, lengths = random_documents(n, vocab_size, seed=2)
    per_document = np.random.default_rng(3).integers(1, 4, n)  # sequences, of which Megatron may have several
    ends = np.cumsum(lengths)
    sequence_ends: list[int] = []
    for end, length, pieces in zip(ends.tolist(), lengths.tolist(), per_document.tolist(), strict=True):
        sequence_ends.extend(end - length + length * piece // pieces for piece in range(1, pieces + 1))
    dtype = np.uint16 if vocab_size < 65_500 else np.int32
    np.savez(
        folder / "made.npz",
        tokens=tokens.astype(dtype),
        lengths=np.diff(sequence_ends, prepend=0),
        documents=np.concatenate([[0], np.cumsum(per_document)]),
    )
    call(peer, "write", folder / "made.npz", folder / "theirs")
    report = import_tokens(
        ImportSettings((str(folder / "theirs"),), folder / "imported", vocab_size=vocab_size, eos_id=EOS)
    )
    dataset = PackedDataset(folder / "imported")
    starts = dataset.document_start(np.arange(dataset.n_documents + 1))
    assert np.array_equal(np.diff(starts), lengths), "the documents' lengths differ"
    assert np.array_equal(dataset.tokens(0, dataset.n_tokens), tokens), "the tokens differ"
    assert faults_of(dataset.path) == [], "the checksums differ"
    how = "linked" if report.linked else "copied"
    return f"{n:,} documents of {len(sequence_ends):,} sequences, {len(tokens):,} tokens ({how}) are the same"


def call(peer: str, *arguments: str | Path) -> None:
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}  # megatron-core warns of Apex, which reading does not need
    subprocess.run([peer, str(PEER), *map(str, arguments)], check=True, env=quiet)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="megatron=PYTHON", help="the Python of an environment with megatron-core")
    parser.add_argument("--documents", type=int, default=50_000, metavar="N", help="default: %(default)s")
    args = parser.parse_args()
    if args.peer is None:
        print("skipped: no --peer megatron=PYTHON was given, so nothing was compared")
        return 3
    peer = args.peer.removeprefix("megatron=")
    rounds = {"ours through theirs": ours_read_by_theirs, "theirs through ours": theirs_read_by_ours}
    for (type_name, vocab_size), (name, compare) in itertools.product(VOCABULARIES.items(), rounds.items()):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{type_name}, {name}: {compare(peer, Path(folder), vocab_size, args.documents)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
