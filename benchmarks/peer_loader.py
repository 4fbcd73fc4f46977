"""Other projects' loaders and the plain gather baseline. Run by benchmarks/loader.py; does not import this project.

    PYTHON peer_loader.py NAME PLAN.json

Keys of the plan: tokens (a flat uint16 file), megatron (path prefix of a .bin/.idx of the same documents), block_size,
batch, vocab_size, eos_id, out (a folder), seed. For each line `N` on standard input it reads N batches and prints a
JSON line with the seconds. Every batch is int64 [batch, block_size], inputs at least.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

Plan = dict[str, Any]
Batches = Iterator[Any]


def gather(plan: Plan) -> Batches:
    """The floor: rows from random places of the map into a new int64 tensor, inputs only."""
    tokens = np.memmap(plan["tokens"], dtype=np.uint16, mode="r").view(np.ndarray)
    rng = np.random.default_rng(plan["seed"])
    b, t = plan["batch"], plan["block_size"]
    while True:
        for starts in rng.integers(0, len(tokens) - t - 1, (1024, b)).tolist():
            batch = torch.empty((b, t), dtype=torch.int64)
            rows = batch.numpy()
            for row, start in enumerate(starts):
                rows[row] = tokens[start : start + t]
            yield batch


def gather_targets(plan: Plan) -> Batches:
    """The same with the targets: a second int64 tensor, shifted by one token."""
    tokens = np.memmap(plan["tokens"], dtype=np.uint16, mode="r").view(np.ndarray)
    rng = np.random.default_rng(plan["seed"])
    b, t = plan["batch"], plan["block_size"]
    while True:
        for starts in rng.integers(0, len(tokens) - t - 1, (1024, b)).tolist():
            batch, targets = (torch.empty((b, t), dtype=torch.int64) for _ in range(2))
            rows, shifted = batch.numpy(), targets.numpy()
            for row, start in enumerate(starts):
                rows[row] = tokens[start : start + t]
                shifted[row] = tokens[start + 1 : start + t + 1]
            yield batch, targets


def gather_stacked(plan: Plan) -> Batches:
    """As in small trainers: a slice of np.memmap and a tensor per row, stacked."""
    tokens = np.memmap(plan["tokens"], dtype=np.uint16, mode="r")
    rng = np.random.default_rng(plan["seed"])
    b, t = plan["batch"], plan["block_size"]
    while True:
        starts = rng.integers(0, len(tokens) - t - 1, b)
        yield torch.stack([torch.from_numpy(tokens[s : s + t].astype(np.int64)) for s in starts])


def tinyllama(plan: Plan) -> Batches:
    """A model of TinyLlama's PackedDataset, written from its description: files of fixed chunks, the blocks of
    `n_chunks` = 8 of them shuffled in memory at a time, a row at a time, batched by torch's DataLoader."""
    t, n_chunks = plan["block_size"], 8
    tokens = np.memmap(plan["tokens"], dtype=np.uint16, mode="r")
    chunk_blocks = min(256, len(tokens) // ((t + 1) * n_chunks))  # blocks of t + 1 tokens in a chunk
    if chunk_blocks == 0:
        raise SystemExit(f"tinyllama: {len(tokens)} tokens are fewer than {n_chunks} blocks of {t + 1}")
    n_files = len(tokens) // (chunk_blocks * (t + 1))

    class Packed(torch.utils.data.IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            rng = np.random.default_rng(plan["seed"])
            while True:
                for first in range(0, n_files - n_chunks + 1, n_chunks):
                    size = chunk_blocks * (t + 1)
                    chunks = [tokens[(first + c) * size : (first + c + 1) * size] for c in range(n_chunks)]
                    for block in rng.permutation(n_chunks * chunk_blocks):
                        chunk, inside = divmod(int(block), chunk_blocks)
                        piece = chunks[chunk][inside * (t + 1) : (inside + 1) * (t + 1)]
                        yield torch.from_numpy(piece.astype(np.int64))

    return iter(torch.utils.data.DataLoader(Packed(), batch_size=plan["batch"]))


def litdata(plan: Plan) -> Batches:
    """litdata: StreamingDataset of TokensLoader items from its own chunks, shuffled, in this process."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    folder = f"{plan['out']}/litdata"
    if not Path(folder).exists():
        optimize(
            fn=_LitdataPiece(plan["tokens"]),
            inputs=list(range(len(np.memmap(plan["tokens"], dtype=np.uint16)) // _LITDATA_PIECE)),
            output_dir=folder,
            num_workers=1,
            chunk_bytes="64MB",
            item_loader=TokensLoader(block_size=plan["block_size"] + 1),
        )
    while True:
        dataset = StreamingDataset(
            folder, item_loader=TokensLoader(block_size=plan["block_size"] + 1), shuffle=True, drop_last=True
        )
        yield from (batch.long() for batch in StreamingDataLoader(dataset, batch_size=plan["batch"], num_workers=0))


_LITDATA_PIECE = 1 << 20


class _LitdataPiece:
    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, number: int) -> Iterator[torch.Tensor]:
        tokens = np.memmap(self.path, dtype=np.uint16, mode="r")
        yield torch.from_numpy(tokens[number * _LITDATA_PIECE : (number + 1) * _LITDATA_PIECE].astype(np.int32))


def olmo(plan: Plan) -> Batches:
    """OLMo-core: NumpyFSLDataset and its data loader with document lengths, in this process."""
    from olmo_core.data import NumpyFSLDataset
    from olmo_core.data.collator import DataCollator
    from olmo_core.data.data_loader import NumpyFSLDataLoader

    dataset = NumpyFSLDataset(
        plan["tokens"],
        sequence_length=plan["block_size"],
        pad_token_id=0,
        eos_token_id=plan["eos_id"],
        vocab_size=plan["vocab_size"],
        dtype=np.uint16,
        generate_doc_lengths=True,
    )
    loader = NumpyFSLDataLoader(
        dataset,
        collator=DataCollator(pad_token_id=0),
        global_batch_size=plan["batch"] * plan["block_size"],
        work_dir=plan["out"],
        seed=plan["seed"],
        num_workers=0,
    )
    epoch = 1
    while True:
        loader.reshuffle(epoch)
        yield from loader
        loader.reset()
        epoch += 1


def megatron(plan: Plan) -> Batches:
    """megatron-core: GPTDataset, shuffled by its own index, positions and loss mask reset at document ends."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        eod, pad, vocab_size = plan["eos_id"], 0, plan["vocab_size"]
        unique_identifiers: ClassVar = {"class": "none"}

    config = GPTDatasetConfig(
        random_seed=plan["seed"],
        sequence_length=plan["block_size"],
        split="1,0,0",
        tokenizer=Tokenizer(),
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
        create_attention_mask=False,
        path_to_cache=f"{plan['out']}/megatron",
    )
    indexed = IndexedDataset(plan["megatron"])
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, plan["megatron"], documents, None, Split.train, config)
    while True:
        yield from torch.utils.data.DataLoader(dataset, batch_size=plan["batch"], drop_last=True)


LOADERS: dict[str, Callable[[Plan], Batches]] = {
    "gather": gather,
    "gather-targets": gather_targets,
    "gather-stacked": gather_stacked,
    "tinyllama": tinyllama,
    "litdata": litdata,
    "olmo-core": olmo,
    "megatron": megatron,
}


def serve(batches: Batches) -> None:
    """For each input line, read that many batches and print the seconds."""
    next(batches)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            next(batches)
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    serve(LOADERS[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text())))
