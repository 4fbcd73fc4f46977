"""Megatron's side of megatron_round_trip.py, run by a Python that has megatron-core: numpy, torch and megatron only.

python benchmarks/peer_megatron.py read PREFIX OUTPUT.npz     # every document as megatron-core reads it
python benchmarks/peer_megatron.py write INPUT.npz PREFIX     # sequences and documents, written by its builder
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder


def read(prefix: str, output: str) -> None:
    dataset = IndexedDataset(prefix, mmap=True)
    sequences = [dataset[number] for number in range(len(dataset))]
    np.savez(
        output,
        tokens=np.concatenate(sequences),
        lengths=np.asarray([len(s) for s in sequences]),
        documents=np.asarray(dataset.document_indices),
    )


def write(source: str, prefix: str) -> None:
    given = np.load(source)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=given["tokens"].dtype.type)
    sequences = np.split(given["tokens"], np.cumsum(given["lengths"])[:-1])
    ends = set(given["documents"][1:].tolist())
    for number, sequence in enumerate(sequences, 1):
        builder.add_item(torch.from_numpy(sequence.astype(np.int64)))
        if number in ends:
            builder.end_document()
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](*sys.argv[2:])
