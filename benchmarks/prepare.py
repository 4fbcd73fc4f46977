"""Preparation of a corpus, compared with the tokenizers alone and with other projects (peers), in the same call.

    python benchmarks/prepare.py --corpus FILE.jsonl.zst --tokenizer DIR --json FILE --peer data=PYTHON

Ours is the complete command `scripts/prepare_data.py`, including interpreter start, reading, checks, hashes, writing
and syncs. For the others imports are not counted; `encode_batch_fast` and `sentencepiece` are the libraries alone, with
the texts in memory and the ids discarded. The rounds alternate between all of them. Ratios are computed within each
round; reported is their median over the rounds.

Peers are imported in the Python given by --peer NAME=PYTHON: NAME is one of them, or anything for all; a missing one
is a skipped row. `--memory` also measures the peak memory of ours (all its processes) for the corpus and for 8 copies.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.peer_prepare import PEERS
from benchmarks.provenance import provenance
from lit_data.corpus.readers import read_documents
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_files.platform import usable_cores

JSON_ROWS = ("encode_batch_fast", "datatrove", "megatron", "litdata")
MODEL_ROWS = ("sentencepiece", "megatron-sentencepiece")


def write_corpus(corpus: str, megabytes: float, folder: Path, parts: int) -> tuple[Path, int]:
    """The first so many MB of text as one .jsonl file and, dealt out, as `parts` files. Returns the file, its bytes."""
    whole = folder / "corpus.jsonl"
    halves = folder / "halves"
    halves.mkdir()
    total = 0
    files = [open(halves / f"{i}.jsonl", "w", encoding="utf-8") for i in range(parts)]  # noqa: SIM115
    sizes = [0] * parts
    with open(whole, "w", encoding="utf-8") as out:
        for document in read_documents([corpus]):
            line = json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n"
            size = len(document.text.encode())
            out.write(line)
            smallest = sizes.index(min(sizes))
            files[smallest].write(line)
            sizes[smallest] += size
            total += size
            if megabytes and total >= megabytes * 1e6:
                break
    for file in files:
        file.close()
    return whole, total


def run_ours(plan: dict[str, Any], kind: str, inputs: list[str], out: Path) -> tuple[float, int]:
    """(seconds, peak bytes of all processes) of our command."""
    command = [
        sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--input", *inputs,
        "--tokenizer", f"{plan['tokenizer']}/{'tokenizer.json' if kind == 'json' else 'tokenizer.model'}",
        "--output", str(out), "--workers", str(plan["workers"]),
    ]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    watch = Memory(process.pid)
    watch.start()
    code = process.wait()
    seconds = time.perf_counter() - began
    watch.stop()
    if code:
        raise SystemExit(f"our own command failed: {' '.join(command)}")
    return seconds, watch.peak


class Memory(threading.Thread):
    """The peak of the summed proportional set size (PSS) of a session's processes, sampled every 50 ms."""

    def __init__(self, session: int) -> None:
        super().__init__(daemon=True)
        self.session, self.peak = session, 0
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.05):
            total = 0
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit():
                    total += self._pss(int(entry.name))
            self.peak = max(self.peak, total)

    def _pss(self, pid: int) -> int:
        try:
            if os.getsid(pid) != self.session:
                return 0
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    return int(line.split()[1]) << 10
        except OSError:  # it has ended
            pass
        return 0

    def stop(self) -> None:
        self._end.set()
        self.join()


def run_peer(name: str, python: str, plan: dict[str, Any], folder: Path, log: Path) -> dict[str, Any] | str:
    """What the peer's worker printed, or why there is nothing."""
    file = folder / "plan.json"
    file.write_text(json.dumps({**plan, "out": str(folder / "out")}))
    command = [python, str(ROOT / "benchmarks" / "peer_prepare.py"), name, str(file)]
    with open(log, "w") as errors:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=1800)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return (log.read_text().strip().splitlines() or ["it printed nothing"])[-1][:200]
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json, tokenizer.model or both")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument(
        "--megabytes", type=float, default=60, help="of text (default 60); 0: all, read by ours as it is"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    pythons = dict(p.split("=", 1) for p in args.peer)
    default = next((python for name, python in pythons.items() if name not in PEERS), sys.executable)
    with tempfile.TemporaryDirectory(prefix="llammlein-bench-") as name:
        folder = Path(name)
        corpus, n_bytes = write_corpus(args.corpus, args.megabytes, folder, args.workers)
        mine = str(corpus) if args.megabytes else args.corpus
        kinds = [k for k in ("json", "model") if (Path(args.tokenizer) / f"tokenizer.{k}").is_file()]
        plan = {
            "corpus": str(corpus),
            "halves": str(folder / "halves"),
            "tokenizer": os.path.abspath(args.tokenizer),
            "workers": args.workers,
            "eos_id": open_tokenizer(args.tokenizer).eos_id,
        }
        rates: dict[str, list[float]] = {}
        skipped: dict[str, str] = {}
        for round_number in range(args.rounds):
            for kind in kinds:
                seconds, _ = run_ours(plan, kind, [mine], folder / f"ours-{kind}-{round_number}")
                rates.setdefault(f"llammlein {kind}", []).append(n_bytes / 1e6 / seconds)
                for row in JSON_ROWS if kind == "json" else MODEL_ROWS:
                    if row in skipped:
                        continue
                    own = folder / f"{row}-{round_number}"
                    own.mkdir()
                    answer = run_peer(row, pythons.get(row, default), plan, own, folder / f"{row}.log")
                    if isinstance(answer, str):
                        skipped[row] = answer
                    else:
                        rates.setdefault(row, []).append(n_bytes / 1e6 / answer["seconds"])
        result = report(args, n_bytes, rates, skipped)
        if args.memory:
            result["memory"] = measure_memory(plan, kinds, corpus, folder)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}")


def report(
    args: argparse.Namespace, n_bytes: int, rates: dict[str, list[float]], skipped: dict[str, str]
) -> dict[str, Any]:
    print(f"{n_bytes / 1e6:.1f} MB of text, {args.workers} workers, {args.rounds} rounds\n")
    print(f"{'':28} {'MB/s':>8} {'ours is':>9}")
    rows: dict[str, Any] = {}
    for kind, names in (("json", JSON_ROWS), ("model", MODEL_ROWS)):
        ours = rates.get(f"llammlein {kind}")
        if ours is None:
            continue
        rows[f"llammlein {kind}"] = {"mb_per_s": ours}
        print(f"{'llammlein, tokenizer.' + kind:28} {statistics.median(ours):8.2f}")
        for name in names:
            if name in skipped:
                print(f"{name:28} skipped: {skipped[name]}")
                rows[name] = {"skipped": skipped[name]}
                continue
            ratios = [a / b for a, b in zip(ours, rates[name], strict=True)]
            rows[name] = {"mb_per_s": rates[name], "ratio": statistics.median(ratios)}
            print(f"{name:28} {statistics.median(rates[name]):8.2f} {statistics.median(ratios):8.2f} x")
    return {
        **provenance(
            "python benchmarks/prepare.py --corpus "
            + f"{Path(args.corpus).name} --tokenizer {Path(args.tokenizer).name} --megabytes {args.megabytes} "
            + f"--rounds {args.rounds} --workers {args.workers}",
            "tokenizers",
            "sentencepiece",
            "numpy",
            "pyarrow",
            "zstandard",
        ),
        "bytes": n_bytes,
        "rows": rows,
    }


def measure_memory(plan: dict[str, Any], kinds: list[str], corpus: Path, folder: Path) -> dict[str, Any]:
    """Peak memory for the corpus and for eight copies of it."""
    copies = folder / "copies"
    copies.mkdir()
    for i in range(8):
        os.link(corpus, copies / f"{i}.jsonl")
    found: dict[str, Any] = {}
    print()
    for kind in kinds:
        _, once = run_ours(plan, kind, [str(corpus)], folder / f"memory-{kind}-1")
        _, eight = run_ours(plan, kind, [str(copies)], folder / f"memory-{kind}-8")
        found[kind] = {"once_bytes": once, "eight_times_bytes": eight, "ratio": eight / once}
        print(f"peak memory, tokenizer.{kind}: {once / 1e6:.0f} MB; 8 times the corpus {eight / 1e6:.0f} MB"
              f" ({eight / once:.3f})")  # fmt: skip
    return found


if __name__ == "__main__":
    main()
