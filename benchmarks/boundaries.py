"""Sizes of cu_seqlens: for steps of several widths, how many sizes a run meets and how many of the pieces are empty.

    python benchmarks/boundaries.py --data PACKED [PACKED ...] --json FILE

Micro-batches of random windows of each packed dataset, and of documents with log-normal lengths (`--mean`, sigma 1), as
in `--data.packing concat`. A size is the next multiple of 2^n / STEPS above the number of pieces, n the power of two
below it, at least 16; `exact` pads nothing. `empty` is the share of pieces that is padding, on average and at most.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np

from benchmarks.provenance import provenance
from lit_data.loading.batches import bucket
from lit_data.packed.index import IntArray
from lit_data.packed.reader import PackedDataset
from lit_files.publish import write_json

STEPS = (1, 2, 4, 8)
IN_USE = 4  # as lit_data.loading.batches.bucket


def count_pieces(lengths: IntArray, block_size: int, rows: int, micro_batches: int) -> IntArray:
    """Pieces of documents in each micro-batch: random windows of the stream, int64 (micro_batches,)."""
    ends = np.cumsum(lengths)
    windows = np.random.default_rng(0).integers(0, ends[-1] // block_size, (micro_batches, rows))
    first = np.searchsorted(ends, windows * block_size, side="right")
    last = np.searchsorted(ends, (windows + 1) * block_size - 1, side="right")
    counts: IntArray = (last - first + 1).sum(1)
    return counts


def sizes_of(pieces: IntArray, steps: int | None) -> IntArray:
    """Elements of cu_seqlens, which has one more than there are pieces."""
    boundaries = pieces + 1
    if steps is None:
        return boundaries
    below = 1 << np.floor(np.log2(boundaries - 1)).astype(np.int64)
    width = np.maximum(below // steps, 1)
    sizes: IntArray = np.maximum(-(-boundaries // width) * width, 16)
    return sizes


def measure(lengths: IntArray, block_size: int, rows: int, micro_batches: int) -> dict[str, Any]:
    pieces = count_pieces(lengths, block_size, rows, micro_batches)
    assert (sizes_of(pieces, IN_USE) == bucket(pieces)).all()
    found: dict[str, Any] = {"pieces": [int(pieces.min()), float(pieces.mean()), int(pieces.max())]}
    for steps in (*STEPS, None):
        sizes = sizes_of(pieces, steps)
        empty = 1 - pieces / (sizes - 1)
        found["exact" if steps is None else f"{steps} steps"] = {
            "sizes": len(np.unique(sizes)),
            "empty": float(empty.mean()),
            "empty_at_most": float(empty.max()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="packed datasets")
    parser.add_argument(
        "--mean", type=float, nargs="*", default=[200.0, 400.0], help="mean tokens of log-normal lengths"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 12, 32], help="rows of a micro-batch")
    parser.add_argument("--block_size", type=int, default=2048)
    parser.add_argument("--micro_batches", type=int, default=10000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts: dict[str, IntArray] = {}
    for path in args.data:
        dataset = PackedDataset(path)
        starts = dataset.document_start(np.arange(dataset.n_documents + 1))
        texts[f"{path.parent.name}/{path.name}"] = np.diff(starts)
    for mean in args.mean:
        drawn = np.random.default_rng(1).lognormal(np.log(mean) - 0.5, 1.0, 200_000)
        texts[f"log-normal, mean {mean:g}"] = np.maximum(drawn, 2).astype(np.int64)
    results = []
    print(f"{'documents':24s} {'rows':>4s} {'pieces':>16s}  sizes / empty, for steps per doubling")
    for name, lengths in texts.items():
        for rows in args.rows:
            found = measure(lengths, args.block_size, rows, args.micro_batches)
            results.append({"documents": name, "mean_tokens": float(lengths.mean()), "rows": rows} | found)
            low, mean, high = found["pieces"]
            columns = [f"{k}: {v['sizes']} / {v['empty']:.0%}" for k, v in found.items() if k != "pieces"]
            print(f"{name:24s} {rows:4d} {low:4d} {mean:6.1f} {high:4d}  {'   '.join(columns)}")
    if args.json is not None:
        command = "benchmarks/boundaries.py " + " ".join(sys.argv[1:])
        write_json(args.json, provenance(command, "numpy") | {"results": results})


if __name__ == "__main__":
    main()
