"""Converting a sharded checkpoint to Hugging Face, compared with a plain copy and litgpt's converter, in the same call.

    python benchmarks/convert.py --json FILE --peer litgpt=PYTHON [--model LLaMmlein_1B] [--ranks 2]

Random float32 weights are written by `--ranks` ranks, each its shards, as in training. Each conversion runs in a
separate process; the rounds alternate. `copy` is `cp` of our output followed by a sync, since ours syncs too; litgpt
does not. litgpt reads a file with the same weights, and is checked to write the same tensors. In warm rounds the input
is in the page cache, which favours the copy most; before each cold round it is dropped from it.

Seconds are those of the conversion without the imports, which are listed separately. Memory is the peak resident set
above its size after the imports, mapped files included. Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.peer_convert import measure
from benchmarks.provenance import provenance
from lit_files.publish import sync_file
from lit_model.cost import count_parameters
from lit_model.load import MODEL_PREFIX, OPTIMIZER_PREFIX, Checkpoint
from lit_model.model import parameter_shapes
from lit_model.registry import get_config
from pretrain.convert.export import export_to_hf

CHECKPOINT = "iter-00000001-ckpt.pth"
SETTLE_S = 3.0


def write_shards(folder: Path, rank: int, ranks: int, model: str, optimizer: bool) -> None:
    """One rank's shards of random weights (and AdamW's moments)."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    generator = torch.Generator().manual_seed(rank)
    tensors: dict[str, Any] = {}
    for name, shape in parameter_shapes(get_config(model)).items():
        keys = [MODEL_PREFIX + name]
        if optimizer:
            keys += [f"{OPTIMIZER_PREFIX}{name}/{moment}" for moment in ("exp_avg", "exp_avg_sq")]
        rows = [len(part) for part in torch.empty(shape[0], 0).chunk(ranks)]
        for key in keys:
            local = torch.rand(rows[rank] if rank < len(rows) else 0, *shape[1:], generator=generator)
            stride = torch.empty(shape, device="meta").stride()
            tensors[key] = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size(shape), stride=stride)
    dcp_save(tensors, storage_writer=FileSystemWriter(folder / CHECKPOINT, sync_files=True))
    if rank == 0:
        meta = {"format_version": 1, "step": 1, "model_config": get_config(model).to_dict()}
        (folder / CHECKPOINT / "meta.json").write_text(json.dumps(meta))
    dist.destroy_process_group()


def start(script: str, *arguments: object, python: str = sys.executable) -> subprocess.Popen[str]:
    command = [python, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate()
    if process.returncode:
        raise RuntimeError((errors.strip().splitlines() or ["it printed nothing"])[-1])
    return out


def files_of(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]


def prime(path: Path, warm: bool) -> None:
    """Load the input into the page cache, or drop it from there."""
    for file in files_of(path):
        with open(file, "rb", buffering=0) as f:
            if warm:
                buffer = bytearray(1 << 24)
                while f.readinto(buffer):
                    pass
            else:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def convert(command: list[object], plan: dict[str, Any], python: str, warm: bool) -> dict[str, Any]:
    """One measured conversion; keeps its output."""
    plan_file = Path(plan["output"]).parent / "plan.json"
    plan_file.write_text(json.dumps(plan))
    prime(Path(plan["source"]), warm)
    began = time.perf_counter()
    lines = finish(start(str(command[0]), *command[1:], plan_file, python=python)).splitlines()
    answer: dict[str, Any] = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    return {**answer, "process_seconds": time.perf_counter() - began}


def copy(source: Path, target: Path, warm: bool) -> dict[str, Any]:
    """cp and a sync of the copy, which is kept."""
    prime(source, warm)
    cpu, began = _children_cpu(), time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    subprocess.run(["sync", str(target)], check=True)
    return {"seconds": time.perf_counter() - began, "cpu_seconds": _children_cpu() - cpu}


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def settle(output: Path) -> None:
    """Remove a measurement's output, and wait, so that each starts with memory and disk in the same state."""
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)
    os.sync()
    time.sleep(SETTLE_S)


def write_for_litgpt(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir()
    with open(folder / "lit_model.pth", "wb") as f:
        torch.save({"model": dict(checkpoint.model_tensors())}, f)
        sync_file(f)


def same_tensors(ours: Path, theirs: Path) -> None:
    """Assert that both outputs hold the same, read from maps."""
    from safetensors import safe_open

    other = torch.load(theirs, mmap=True, weights_only=True)
    with safe_open(ours, framework="pt") as file:
        names = list(file.keys())
        assert set(names) == set(other), "the converters disagree about names"
        for name in names:
            assert torch.equal(file.get_tensor(name), other[name]), name


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", action="append", default=[], metavar="litgpt=PYTHON")
    parser.add_argument("--model", default="LLaMmlein_1B", help="a name of the registry (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="that write the checkpoint (default %(default)s)")
    parser.add_argument("--optimizer", action="store_true", help="AdamW's state in the checkpoint too")
    parser.add_argument("--rounds", type=int, default=5, help="warm ones (default %(default)s)")
    parser.add_argument("--cold_rounds", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work: 4 times the weights (default: a temporary one)")
    args = parser.parse_args()
    peers = dict(p.split("=", 1) for p in args.peer)
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llammlein-bench-", dir=args.folder) as name:
        result = run(args, Path(name), peers.get("litgpt"))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}")


def run(args: argparse.Namespace, folder: Path, litgpt: str | None) -> dict[str, Any]:
    config = get_config(args.model)
    shards = [
        start("convert.py", "--shards", folder, r, args.ranks, args.model, int(args.optimizer))
        for r in range(args.ranks)
    ]
    for process in shards:
        finish(process)
    ours = {"source": str(folder / CHECKPOINT), "output": str(folder / "ours")}
    theirs = {"source": str(folder / "lit"), "output": str(folder / "theirs"), "config": config.to_dict()}
    weights = 4 * count_parameters(config)
    print(f"{args.model}: {weights / 1e9:.3f} GB of weights by {args.ranks} ranks")
    reference, made = folder / "reference.safetensors", folder / "ours" / "model.safetensors"
    rows: dict[str, dict[str, list[Any]]] = {}
    skipped = "" if litgpt else "no --peer litgpt=PYTHON"
    if litgpt:
        write_for_litgpt(Checkpoint(folder / CHECKPOINT), folder / "lit")
    sizes, loads = {"weights": weights}, [os.getloadavg()[1]]
    for number in range(args.rounds + args.cold_rounds):
        warm = number < args.rounds
        row = rows.setdefault("warm" if warm else "cold", {"ours": [], "copy": [], "litgpt": []})
        row["ours"].append(convert(["convert.py", "--ours"], ours, sys.executable, warm))
        if number == 0:
            shutil.copyfile(made, reference)
            sizes["ours"] = reference.stat().st_size
            sizes["ours_header"] = 8 + int.from_bytes(reference.open("rb").read(8), "little")
        settle(folder / "ours")
        row["copy"].append(copy(reference, folder / "copy", warm))
        settle(folder / "copy")
        if litgpt and not skipped:
            try:
                row["litgpt"].append(convert(["peer_convert.py", "litgpt"], theirs, litgpt, warm))
            except (RuntimeError, StopIteration, OSError) as error:
                skipped = str(error)
            else:
                if number == 0:
                    sizes["litgpt"] = (folder / "theirs" / "model.pth").stat().st_size
                    same_tensors(reference, folder / "theirs" / "model.pth")
            settle(folder / "theirs")
        loads.append(os.getloadavg()[1])
        timings = ", ".join(
            f"{k} {v[-1]['seconds']:.2f} s ({v[-1]['cpu_seconds']:.2f} of a CPU)" for k, v in row.items() if v
        )
        print(f"{'warm' if warm else 'cold'}: {timings}", flush=True)
    return {**report(args, rows, sizes, skipped), "load_averages": loads}


def ratio(above: list[dict[str, float]], below: list[dict[str, float]], field: str = "seconds") -> float:
    """The median over the rounds; of the process as a whole, `below` has no other time."""
    return statistics.median(a[field] / b.get(field, b["seconds"]) for a, b in zip(above, below, strict=True))


def report(args: argparse.Namespace, rows: dict[str, Any], sizes: dict[str, int], skipped: str) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "bytes_beyond_weights_and_header": sizes["ours"] - sizes["ours_header"] - sizes["weights"]
    }
    for kind, row in rows.items():
        summary[kind] = {
            "ours / copy": ratio(row["ours"], row["copy"]),
            "ours / copy, CPU": ratio(row["ours"], row["copy"], "cpu_seconds"),
            "ours with imports / copy": ratio(row["ours"], row["copy"], "process_seconds"),
            "ours GB above imports": max(r["above_bytes"] for r in row["ours"]) / 1e9,
        }
        if row["litgpt"] and not skipped:
            summary[kind] |= {
                "litgpt / copy": ratio(row["litgpt"], row["copy"]),
                "litgpt / ours": ratio(row["litgpt"], row["ours"]),
                "litgpt / ours, CPU": ratio(row["litgpt"], row["ours"], "cpu_seconds"),
                "litgpt GB above imports": max(r["above_bytes"] for r in row["litgpt"]) / 1e9,
            }
        print(f"{kind}: " + ", ".join(f"{k} {v:.2f}" for k, v in summary[kind].items()))
    if "litgpt" in sizes:
        summary["litgpt bytes / weights"] = sizes["litgpt"] / sizes["weights"]
    print(f"bytes: {sizes}" + (f"; litgpt skipped: {skipped}" if skipped else ""))
    return {
        **provenance(
            f"python benchmarks/convert.py --model {args.model} --ranks {args.ranks} --rounds {args.rounds} "
            f"--cold_rounds {args.cold_rounds}"
            + (" --optimizer" if args.optimizer else "")
            + (" --peer litgpt=PYTHON" if args.peer else ""),
            "torch",
            "safetensors",
        ),
        "skipped": skipped,
        "summary": summary,
        "bytes": sizes,
        "rounds": rows,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--shards"]:
        write_shards(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6] == "1")
    elif sys.argv[1:2] == ["--ours"]:
        plan = json.loads(Path(sys.argv[2]).read_text())
        measure(lambda: export_to_hf(Path(plan["source"]), Path(plan["output"])))
    else:
        main()
