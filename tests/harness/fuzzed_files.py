"""Fuzzes every file format that the system reads and checks how its reader reacts.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/harness/fuzzed_files.py [--count 200] [--seed 0] [--only KIND ...]

makes one small example of every kind of file, mutates each `count` times (bits, truncation, other types, deep nesting,
huge numbers) and opens it as the system does, in processes forked from this one. It prints a table of the outcomes and
every fault: an error that does not name the file, a value outside the file's schema, damage that a checksum covers but
does not detect, more than 5 s of CPU time or 500 MB of memory, a command executed, a file left behind.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from running import VOCAB, flags, write_dataset

from lit_data.loading.batches import read_rows
from lit_data.loading.rows import open_rows
from lit_data.packed.documents import Documents
from lit_data.packed.reader import PackedDataset
from lit_data.packed.summary import faults_of
from lit_data.prepare.job import read_job
from lit_data.record.reader import read_steps, stream_record
from lit_data.record.schema import SCHEMA
from lit_data.record.trace import open_run, spans_of_step
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_data.tokenizers.training import train_on_texts
from lit_files.publish import write_json
from lit_model.load import Checkpoint, load_tensors
from pretrain.checkpoint.load import check_meta, check_whole
from pretrain.cli.run_parser import build_parser, parse
from pretrain.convert.export import export_to_hf
from pretrain.convert.full_and_sharded import convert_checkpoint
from pretrain.distillation.teacher_cache import CachedTeacher, CacheFacts, begin_cache, check_finished, read_facts
from pretrain.fabric_train import main
from pretrain.logs.metrics import cut_metrics

CPU_S, WALL_S, MEMORY_MB = 5.0, 120.0, 500
CHECKPOINT = "iter-00000004-ckpt.pth"
TEXT = "Ein kleiner Text, der nicht lang ist. "
FORBIDDEN = ("os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "socket.connect", "os.rmdir")


@dataclass
class Kind:
    """One kind of file: the path of its example, and how it is read.

    `read` takes the folder, reads as the system does, and asserts that the result matches the file's schema. `covered`
    also takes the folder and returns whether the file's checksum test finds a fault.
    """

    name: str
    folder: str
    file: str
    read: Callable[[Path], Any]
    covered: Callable[[Path], bool] | None = None
    text: bool = False


# --- readers ---------------------------------------------------------------------------------------------------------


def read_dataset(folder: Path) -> None:
    dataset = PackedDataset(folder)
    n, total = dataset.n_documents, dataset.n_tokens
    starts = dataset.document_start(np.arange(n + 1))
    assert starts[0] == 0 and starts[-1] == total and (np.diff(starts) > 0).all()
    assert (dataset.document_of(starts[:-1]) == np.arange(n)).all()
    assert len(dataset.tokens(0, total)) == total
    assert isinstance(dataset.fingerprint, str)
    dataset.tokenizer_folder  # noqa: B018 - it may raise


def read_documents(folder: Path) -> None:
    documents = Documents(PackedDataset(folder))
    n = documents.dataset.n_documents
    for facts in documents.facts(range(n)).values():
        assert isinstance(facts["id"], str | None) and isinstance(facts["bytes"], int | None), facts
    documents.find("doc-3")
    assert sum(table.num_rows for table in documents.batches()) == n
    documents.dataset.document_start(np.asarray([1, 2]))


def read_plan_of_rows(folder: Path) -> None:
    rows = open_rows(PackedDataset(folder / "data"), "best_fit", 32, folder / "plans")
    pieces = rows.pieces(np.arange(rows.n_windows))
    assert pieces.document.min() >= 0 and pieces.document.max() < rows.dataset.n_documents
    assert pieces.length.min() > 0 and pieces.start.min() >= 0
    rows.windows_of_document(3)


def read_checkpoint(folder: Path) -> None:
    path = folder / CHECKPOINT
    checkpoint = Checkpoint(path)
    if "segments" in checkpoint.meta:
        check_meta(checkpoint.meta, path)
    config = checkpoint.model_config
    assert config.n_layer >= 1
    for name in checkpoint.names():
        assert checkpoint.tensor(name).shape == checkpoint.layout(name).shape
    for tensor in load_tensors(path)[1].values():
        assert tensor.is_floating_point()


def checkpoint_damaged(folder: Path) -> bool:
    try:
        checkpoint = Checkpoint(folder / CHECKPOINT)
        check_whole(checkpoint)
        return bool(checkpoint.verify()) or "checksums" not in checkpoint.meta
    except (ValueError, OSError):
        return True


def read_model(folder: Path) -> None:
    config, tensors = load_tensors(folder)
    assert config.vocab_size >= 1
    for tensor in tensors.values():
        assert tensor.is_floating_point()


def read_tokenizer(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    ids = tokenizer.encode(TEXT)
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
    assert isinstance(tokenizer.decode(ids), str) and len(tokenizer.fingerprint) == 64


def read_run_record(folder: Path) -> None:
    for some in stream_record(folder, 0, 4):
        assert some.schema.equals(SCHEMA)
    read_steps(folder, [1, 2]).to_pylist()


def read_order(folder: Path) -> None:
    run = open_run(folder)
    assert run.mixture.locate(np.arange(8))[2].max() < run.rows[0].n_windows
    spans_of_step(run, 1)


def read_metrics(folder: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        cut_metrics(folder / "metrics.csv", 3)


def read_cache(folder: Path) -> None:
    facts = read_facts(folder / "cache")
    check_finished(folder / "cache", facts)
    teacher = CachedTeacher(folder / "cache", torch.device("cpu"))
    rows = open_rows(PackedDataset(folder / "data"), "concat", 8)
    if (facts.block_size, facts.n_windows) != (8, 9):  # check_cache rejects it
        return
    for row in (0, 5, 8):
        ids, _ = teacher.read(read_rows(rows, np.asarray([row]), np.asarray([0]), True))
        assert int(ids.max()) < facts.vocab_size


def read_config(folder: Path) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse(["--config", str(folder / "config.yaml")])
    except SystemExit as left:
        assert left.code == 2
        raise ValueError(f"{folder / 'config.yaml'}: {said.getvalue()}") from None  # it names the flags
    except ValueError as error:
        assert "--" in str(error) or str(folder / "config.yaml") in str(error), str(error)
        raise ValueError(f"{folder / 'config.yaml'}: {error}") from None


def dataset_damaged(folder: Path) -> bool:
    try:
        return bool(faults_of(folder))
    except (ValueError, OSError):
        return True


KINDS = [
    Kind("manifest.json", "data", "manifest.json", read_dataset, text=True),
    Kind(".idx", "data", "data-00000.idx", read_dataset, dataset_damaged),
    Kind(".bin", "data", "data-00000.bin", read_dataset, dataset_damaged),
    Kind("docs.parquet", "data", "data-00001.docs.parquet", read_documents, dataset_damaged),
    Kind("plan.json (rows)", "planned", "plans/*/plan.json", read_plan_of_rows, text=True),
    Kind("plan: rows.bin", "planned", "plans/*/rows.bin", read_plan_of_rows),
    Kind("plan: pieces.bin", "planned", "plans/*/pieces.bin", read_plan_of_rows),
    Kind("plan.json (preparation)", "prepared", "plan.json", lambda f: read_job(f / "plan.json"), text=True),
    Kind("checkpoint: meta.json", "sharded", f"{CHECKPOINT}/meta.json", read_checkpoint, text=True),
    Kind("checkpoint: .metadata", "sharded", f"{CHECKPOINT}/.metadata", read_checkpoint, checkpoint_damaged),
    Kind("checkpoint: .distcp", "sharded", f"{CHECKPOINT}/*.distcp", read_checkpoint, checkpoint_damaged),
    Kind("checkpoint: one file", "full", CHECKPOINT, read_checkpoint),
    Kind("safetensors", "hf", "model.safetensors", read_model),
    Kind("config.json", "hf", "config.json", read_model, text=True),
    Kind("index.json", "shards", "model.safetensors.index.json", read_model, text=True),
    Kind("tokenizer.json", "tokenizer", "tokenizer.json", read_tokenizer, text=True),
    Kind("tokenizer_config.json", "tokenizer", "tokenizer_config.json", read_tokenizer, text=True),
    Kind("tokenizer.model", "sentencepiece", "tokenizer.model", read_tokenizer),
    Kind("record part", "run", "datapoints/*.parquet", read_run_record),
    Kind("order.json", "run", "datapoints/order.json", read_order, text=True),
    Kind("metrics.csv", "run", "metrics.csv", read_metrics),
    Kind("teacher cache: cache.json", "cached", "cache/cache.json", read_cache, text=True),
    Kind("teacher cache: .npy", "cached", "cache/log_probs-00000.npy", read_cache),
    Kind("run config.yaml", "run", "config.yaml", read_config, text=True),
]


# --- examples --------------------------------------------------------------------------------------------------------


def make_examples(top: Path) -> None:
    """Write one small example of each kind, in the folders named in KINDS."""
    rng = np.random.default_rng(7)
    write_dataset(top / "data", rng.integers(1, 30, size=60).tolist())
    write_dataset(top / "sets" / "train", rng.integers(1, 30, size=60).tolist())
    (top / "planned").mkdir()
    shutil.copytree(top / "data", top / "planned" / "data")
    open_rows(PackedDataset(top / "planned" / "data"), "best_fit", 32, top / "planned" / "plans")
    (top / "prepared").mkdir()
    plan = {"version": 1, "settings": {"input": ["a.jsonl"], "seed": 0}, "tokenizer": "f", "files": [["a.jsonl", 9, 8]]}
    write_json(top / "prepared" / "plan.json", plan)
    of = {"train__max_steps": 4, "save__state_dict_type": "sharded", "data__val": None, "eval__every_steps": 100}
    assert main(flags(top / "sets", top / "run", **of)) == 0
    for name in ("sharded", "full"):
        (top / name).mkdir()
    shutil.copytree(top / "run" / CHECKPOINT, top / "sharded" / CHECKPOINT)
    convert_checkpoint(top / "run" / CHECKPOINT, top / "full" / CHECKPOINT, "full")
    export_to_hf(top / "full" / CHECKPOINT, top / "hf", None)
    shutil.copytree(top / "hf", top / "shards")
    (top / "shards" / "model.safetensors").rename(top / "shards" / "model-00001-of-00001.safetensors")
    names = list(safe_names(top / "hf" / "model.safetensors"))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    write_json(top / "shards" / "model.safetensors.index.json", index)
    train_on_texts([TEXT * 3, "Noch ein Satz über nichts."], 270, "byte_bpe", top / "tokenizer")
    train_on_texts([TEXT * 3, "Noch ein Satz über nichts."], 300, "sentencepiece", top / "sentencepiece")
    (top / "cached").mkdir()
    shutil.copytree(top / "data", top / "cached" / "data")
    facts = CacheFacts("d", "concat", 8, True, 9, VOCAB, [], "logits", 2.0, "fp32", 4, "float16", 9)
    begin_cache(top / "cached" / "cache", facts)
    for name in ("ids", "log_probs"):
        values = np.full(facts.shape(0), 3 if name == "ids" else -1, facts.dtype_of(name))
        np.save(facts.path(top / "cached" / "cache", name, 0), values)


def safe_names(path: Path) -> Iterator[str]:
    content = path.read_bytes()
    yield from (n for n in json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]) if n != "__metadata__")


# --- mutations -------------------------------------------------------------------------------------------------------

HUGE: list[Any] = [10**30, -(10**30), 10**400, 2**63, -1, 0, 1e300, 10**9, 2**31]
OTHER: list[Any] = [
    None,
    True,
    False,
    "",
    "x",
    "../../x",
    "\0",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    1.5,
    float("nan"),
    -1.0,
]


def mutate(content: bytes, text: bool, rng: random.Random) -> tuple[str, bytes]:
    """Pick a kind of damage; returns its name and the damaged content."""
    ways = [flip_bits, truncate, overwrite, insert, *([change_type, change_number, nest, change_key] if text else [])]
    way = rng.choice(ways)
    return way.__name__, way(content, rng)


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice((0, 1, len(content) - 1, rng.randrange(len(content))))]


def overwrite(content: bytes, rng: random.Random) -> bytes:
    """Overwrite some bytes with zeros, ones, the largest number or noise; half of the time in a header or footer."""
    size = rng.choice((1, 4, 8, 64, 4096))
    at = rng.choice((0, 8, 16, 24, len(content) - 8, rng.randrange(len(content)), rng.randrange(len(content))))
    new = rng.choice((b"\0" * size, b"\xff" * size, b"\xff" * 7 + b"\x7f", rng.randbytes(size)))
    return content[: max(at, 0)] + new[: len(content)] + content[max(at, 0) + len(new) :]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.choice((0, len(content), rng.randrange(len(content))))
    return content[:at] + rng.choice((b"\0", rng.randbytes(9), content[:100], b"[" * 200_000)) + content[at:]


def nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a document."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        nodes(value[key], found)
    return found


def edited(content: bytes, rng: random.Random, edit: Callable[[Any, Any], None]) -> bytes:
    as_json = content.lstrip()[:1] == b"{"
    document = json.loads(content) if as_json else yaml.safe_load(content)
    edit(*rng.choice(nodes(document, [])))
    return (json.dumps(document) if as_json else yaml.safe_dump(document)).encode()


def change_type(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return json.dumps(rng.choice(OTHER)).encode()
    return edited(content, rng, lambda holder, key: holder.__setitem__(key, rng.choice(OTHER)))


def change_number(content: bytes, rng: random.Random) -> bytes:
    return edited(content, rng, lambda holder, key: holder.__setitem__(key, rng.choice(HUGE)))


def nest(content: bytes, rng: random.Random) -> bytes:
    deep: Any = 1
    for _ in range(rng.choice((3, 70, 300))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return edited(content, rng, lambda holder, key: holder.__setitem__(key, deep))


def change_key(content: bytes, rng: random.Random) -> bytes:
    def edit(holder: Any, key: Any) -> None:
        value = holder.pop(key)
        if isinstance(holder, dict) and rng.random() < 0.5:
            holder[rng.choice(("x", "__class__", "", "version"))] = value

    return edited(content, rng, edit)


# --- trials ----------------------------------------------------------------------------------------------------------


@dataclass
class Outcomes:
    """Outcomes of the mutations of one kind: rejected with a clean error, or read; and the faults."""

    mutations: int = 0
    refused: int = 0
    read: int = 0
    covered: int = 0
    cpu_s: float = 0.0
    memory_mb: float = 0.0
    faults: list[str] = field(default_factory=list)


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p.relative_to(folder)), p.stat().st_size if p.is_file() else 0) for p in folder.rglob("*"))


def trial(kind: Kind, folder: Path, file: Path, original: bytes, seed: str) -> dict[str, Any]:
    """Damage the file once and read it. Returns {"way", "outcome": refused | read, "fault": ..., ...}."""
    way, content = mutate(original, kind.text, random.Random(seed))
    file.write_bytes(content)
    before, memory, began = listing(folder), resident_mb(), time.process_time()
    result: dict[str, Any] = {"way": way, "outcome": "read", "fault": None, "covered": False}
    try:
        kind.read(folder)
    except (ValueError, OSError) as error:
        result["outcome"] = "refused"
        message = str(error)
        clean = type(error) is ValueError or isinstance(error, OSError)
        if not clean or not any(str(name) in message for name in (file, file.parent, folder / CHECKPOINT)):
            result["fault"] = f"{type(error).__name__} that does not name the file: {message[:200]}"
    except BaseException as error:
        result["fault"] = f"{type(error).__name__}: {str(error)[:200]}"
    result["cpu_s"], result["memory_mb"] = time.process_time() - began, resident_mb() - memory
    if result["cpu_s"] > CPU_S or result["memory_mb"] > MEMORY_MB:
        result["fault"] = f"{result['cpu_s']:.1f} s, {result['memory_mb']:.0f} MB"
    if kind.name != "metrics.csv" and listing(folder) != before:
        result["fault"] = "files were changed"
    if kind.covered is not None and content != original:
        result["covered"] = True
        if not kind.covered(folder):
            result["fault"] = "its checksum shows no damage"
    return result


def resident_mb() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(kind: Kind, folder: Path, numbers: range, seed: int, write: int) -> None:
    """In a forked process: run the mutations with these numbers; one line of JSON each."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = size + (4 << 30)  # allocations beyond it fail; the fault is judged by the memory used
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    ran: list[str] = []
    sys.addaudithook(lambda event, _: ran.append(event) if event in FORBIDDEN else None)
    file = next(folder.glob(kind.file))
    original = file.read_bytes()
    copy = folder.with_name(f"{folder.name}.copy")
    for number in numbers:
        ran.clear()
        result = trial(kind, folder, file, original, f"{seed}:{kind.name}:{number}")
        if ran and kind.name != "metrics.csv":
            result["fault"] = f"it ran {ran}"
        os.write(write, (json.dumps({"number": number, **result}) + "\n").encode())
        if kind.name == "metrics.csv":
            shutil.rmtree(folder)
            shutil.copytree(copy, folder)


def try_kind(kind: Kind, examples: Path, work: Path, count: int, seed: int) -> Outcomes:
    """Run all mutations of a kind in forked processes, a new one whenever one is killed."""
    outcomes, first = Outcomes(), 0
    while first < count:
        folder = work / kind.folder
        for path in (folder, work / f"{kind.folder}.copy"):
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(examples / kind.folder, path)
        lines, status = forked(lambda write, f=folder, n=first: child(kind, f, range(n, count), seed, write))
        for line in lines:
            result = json.loads(line)
            first = result["number"] + 1
            outcomes.mutations += 1
            outcomes.refused += result["outcome"] == "refused"
            outcomes.read += result["outcome"] == "read"
            outcomes.covered += result["covered"]
            outcomes.cpu_s = max(outcomes.cpu_s, result["cpu_s"])
            outcomes.memory_mb = max(outcomes.memory_mb, result["memory_mb"])
            if result["fault"]:
                outcomes.faults.append(f"{kind.name} #{result['number']} ({result['way']}): {result['fault']}")
        if status != 0:
            outcomes.faults.append(f"{kind.name} #{first}: the process ended with {status}")
            first, outcomes.mutations = first + 1, outcomes.mutations + 1
    return outcomes


def forked(work: Callable[[int], None]) -> tuple[list[str], int]:
    """Run `work` in a forked process with a pipe to write to. Returns the lines written and the exit status."""
    sys.stdout.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        status = 1
        try:
            work(write)
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(write)
    content = b""
    while select.select([read], [], [], WALL_S)[0]:
        if not (piece := os.read(read, 1 << 16)):
            break
        content += piece
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(read)
    return content.decode().splitlines(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_all(count: int, seed: int, only: list[str]) -> dict[str, Outcomes]:
    build_parser()
    with tempfile.TemporaryDirectory(prefix="llammlein-fuzz-") as name:
        top = Path(name)
        made = forked(lambda _: make_examples(top / "examples"))
        assert made[1] == 0, "the examples could not be made"
        kinds = [kind for kind in KINDS if not only or kind.name in only]
        return {kind.name: try_kind(kind, top / "examples", top / "work", count, seed) for kind in kinds}


def table(found: dict[str, Outcomes]) -> str:
    lines = [
        "| file | mutations | refused by name | read, within its schema | found by its checksum | s | MB | faults |",
        "|---|---|---|---|---|---|---|---|",
    ]
    total = collections.Counter[str]()
    for name, o in found.items():
        lines.append(
            f"| {name} | {o.mutations} | {o.refused} | {o.read} | {o.covered or '-'} | {o.cpu_s:.1f} | "
            f"{o.memory_mb:.0f} | {len(o.faults)} |"
        )
        total.update(mutations=o.mutations, refused=o.refused, read=o.read, covered=o.covered, faults=len(o.faults))
    t = total
    lines.append(f"| all | {t['mutations']} | {t['refused']} | {t['read']} | {t['covered']} | | | {t['faults']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--count", type=int, default=200, help="mutations of each kind (%(default)s)")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", nargs="+", default=[], metavar="KIND")
    arguments.add_argument("--json", type=Path, help="write the outcomes to this file too")
    args = arguments.parse_args()
    found = run_all(args.count, args.seed, args.only)
    print("\n".join([*(fault for o in found.values() for fault in o.faults), "", table(found)]))
    if args.json:
        args.json.write_text(json.dumps({name: asdict(o) for name, o in found.items()}))
    sys.exit(any(o.faults for o in found.values()))
