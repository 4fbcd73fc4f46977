"""Other projects' text-to-token preparation. Run by benchmarks/prepare.py in a peer's Python, without this project.

    PYTHON peer_prepare.py NAME PLAN.json

Keys of the plan: corpus (a .jsonl file), halves (a folder with the same text in several files), tokenizer (folder),
workers, out (a folder), eos_id. Prints one JSON line: seconds without imports, and the number of tokens written.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Plan = dict[str, Any]


def texts(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def tokenizers_batch(plan: Plan) -> Callable[[], int]:
    """The library alone: texts in memory, batches on all threads, ids discarded. An upper bound for all callers."""
    os.environ["RAYON_NUM_THREADS"] = str(plan["workers"])
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{plan['tokenizer']}/tokenizer.json")
    documents = list(texts(plan["corpus"]))
    batches = [documents[i : i + 128] for i in range(0, len(documents), 128)]

    def work() -> int:
        return sum(len(e) for b in batches for e in tokenizer.encode_batch_fast(b, add_special_tokens=False))

    return work


def sentencepiece_batch(plan: Plan) -> Callable[[], int]:
    """The library alone, on all threads."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=f"{plan['tokenizer']}/tokenizer.model")
    documents = list(texts(plan["corpus"]))
    batches = [documents[i : i + 128] for i in range(0, len(documents), 128)]

    def work() -> int:
        return sum(len(ids) for b in batches for ids in processor.encode(b, num_threads=plan["workers"]))

    return work


def datatrove(plan: Plan) -> Callable[[], int]:
    """datatrove's DocumentTokenizer, one task per worker."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    def work() -> int:
        LocalPipelineExecutor(
            pipeline=[
                JsonlReader(plan["halves"], glob_pattern="*.jsonl"),
                DocumentTokenizer(
                    output_folder=f"{plan['out']}/tokens",
                    local_working_dir=f"{plan['out']}/local",
                    tokenizer_name_or_path=f"{plan['tokenizer']}/tokenizer.json",
                    eos_token="</s>",
                    shuffle_documents=False,
                    upload_block_size=20 << 20,
                ),
            ],
            tasks=plan["workers"],
            workers=plan["workers"],
            logging_dir=f"{plan['out']}/logs",
        ).run()
        return sum(f.stat().st_size // 2 for f in Path(plan["out"]).rglob("*.ds"))

    return work


_encode: Any = None  # of a worker of megatron's driver


def _start_megatron(tokenizer: str, eos_id: int) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if tokenizer.endswith(".model"):
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=tokenizer)
        _encode = lambda text: [*processor.encode(text), eos_id]  # noqa: E731
    else:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(tokenizer)
        _encode = lambda text: [*backend.encode(text, add_special_tokens=False).ids, eos_id]  # noqa: E731


def _encode_line(line: str) -> list[int]:
    ids: list[int] = _encode(json.loads(line)["text"])
    return ids


def megatron(plan: Plan, file: str = "tokenizer.json") -> Callable[[], int]:
    """Like Megatron's preprocessing: lines to a process pool, ids to its IndexedDatasetBuilder."""
    import multiprocessing

    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def work() -> int:
        builder = IndexedDatasetBuilder(f"{plan['out']}/m.bin", dtype=np.uint16)
        total = 0
        with (
            multiprocessing.Pool(
                plan["workers"], _start_megatron, (f"{plan['tokenizer']}/{file}", plan["eos_id"])
            ) as pool,
            open(plan["corpus"], encoding="utf-8") as lines,
        ):
            for ids in pool.imap(_encode_line, lines, chunksize=32):
                builder.add_document(torch.IntTensor(ids), [len(ids)])
                total += len(ids)
        builder.finalize(f"{plan['out']}/m.idx")
        return total

    return work


def megatron_sentencepiece(plan: Plan) -> Callable[[], int]:
    return megatron(plan, "tokenizer.model")


class _Lines:
    """litdata's function of an item: the documents of a file, for its TokensLoader."""

    def __init__(self, tokenizer: str, eos_id: int) -> None:
        self.tokenizer, self.eos_id = tokenizer, eos_id
        self.backend: Any = None

    def __call__(self, path: str) -> Iterator[Any]:
        import torch
        from tokenizers import Tokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.backend = self.backend or Tokenizer.from_file(self.tokenizer)
        for text in texts(path):
            ids = self.backend.encode(text, add_special_tokens=False).ids
            yield torch.tensor([*ids, self.eos_id], dtype=torch.int32)


def litdata(plan: Plan) -> Callable[[], int]:
    """litdata's optimize, half of the corpus per worker."""
    from litdata import TokensLoader, optimize

    function = _Lines(f"{plan['tokenizer']}/tokenizer.json", plan["eos_id"])
    inputs = sorted(str(p) for p in Path(plan["halves"]).glob("*.jsonl"))

    def work() -> int:
        optimize(
            fn=function,
            inputs=inputs,
            output_dir=f"{plan['out']}/litdata",
            num_workers=plan["workers"],
            chunk_bytes="64MB",
            item_loader=TokensLoader(block_size=2049),
        )
        return sum(f.stat().st_size // 4 for f in Path(plan["out"]).rglob("*.bin"))

    return work


PEERS = {
    "encode_batch_fast": tokenizers_batch,
    "datatrove": datatrove,
    "megatron": megatron,
    "litdata": litdata,
    "sentencepiece": sentencepiece_batch,
    "megatron-sentencepiece": megatron_sentencepiece,
}


def main() -> None:
    name, plan_file = sys.argv[1:]
    plan: Plan = json.loads(Path(plan_file).read_text())
    Path(plan["out"]).mkdir(parents=True, exist_ok=True)
    work = PEERS[name](plan)
    began = time.perf_counter()
    tokens = work()
    print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
