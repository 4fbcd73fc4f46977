"""CPU seconds, wall seconds and modules of each command's start: --help, a wrong argument, and up to the first step.

    python benchmarks/startup.py [--baseline TREE] [--rounds N] [--only WORD ...] [--json FILE]

With --baseline, another checkout of this repository is measured in turns with this one, and the ratio is that of the
medians. CPU seconds include child processes; on a busy machine they are inflated too, but less than wall seconds.
`first step` is `configs/debug.yaml` up to the end of its first optimizer step: synthetic text, tokenizer, data and a
validation come before it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.provenance import provenance

TRAINER = "pretrain/fabric_train.py"
DEBUG = ["--config", "configs/debug.yaml"]
HEAVY = ("torch", "numpy", "pyarrow", "lightning_fabric", "torch._dynamo", "torch.distributed.tensor", "pandas")
# In a process of its own, as __main__: run the command and write the figures as it ends.
PROGRAM = """
import atexit, json, os, resource, runpy, sys

output, first_step, *sys.argv = sys.argv[1:]

def write():
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    figures = {"cpu_s": sum(u.ru_utime + u.ru_stime for u in usage), "modules": sorted(sys.modules)}
    with open(output, "w") as file:
        json.dump(figures, file)

sys.path[0] = os.path.dirname(sys.argv[0])
if first_step == "yes":
    sys.path.insert(0, os.getcwd())
    import pretrain.loop

    def and_leave(*arguments, train_step=pretrain.loop.train_step):
        train_step(*arguments)
        write()
        sys.stdout.flush()
        os._exit(0)

    pretrain.loop.train_step = and_leave
    sys.path.pop(0)
else:
    atexit.register(write)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def commands() -> dict[str, list[str]]:
    """Name -> command line, of the commands of this tree."""
    without = ("install", "run_checks", "run_tests")  # no arguments, or the standard library alone
    scripts = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem not in without)
    return {
        "fabric_train --help": [TRAINER, "--help"],
        "fabric_train, a wrong argument": [TRAINER, *DEBUG, "--optim.lr", "-1"],
        "fabric_train, first step": [TRAINER, *DEBUG],
        **{f"{name} --help": [f"scripts/{name}.py", "--help"] for name in scripts},
    }


def measure(tree: Path, name: str, words: list[str], folder: Path) -> dict[str, Any]:
    """One start of a command of a checkout."""
    output, step = folder / "figures.json", name.endswith("first step")
    more = ["--out_dir", tempfile.mkdtemp(dir=folder) + "/run"] if step else []
    line = [sys.executable, "-c", PROGRAM, str(output), "yes" if step else "no", *words, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(line, cwd=tree, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - began
    assert done.returncode == (2 if "wrong" in name else 0), done.stdout + done.stderr
    figures = json.loads(output.read_text())
    return {
        "cpu_s": figures["cpu_s"],
        "wall_s": seconds,
        "modules": len(figures["modules"]),
        "heavy": [module for module in HEAVY if module in figures["modules"]],
    }


def median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    middle = {key: round(statistics.median(one[key] for one in rounds), 3) for key in ("cpu_s", "wall_s")}
    return {**rounds[-1], **middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, metavar="TREE", help="another checkout, measured in turns with this")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each command (default 3)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="commands whose name contains one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    args = parser.parse_args()
    results = []
    print(f"{'command':32} {'CPU s':>7} {'wall s':>7} {'modules':>7}  with --baseline: its CPU s, ratio")
    with tempfile.TemporaryDirectory() as temporary:
        for name, words in commands().items():
            if not any(word in name for word in args.only):
                continue
            ours, theirs = [], []
            for _ in range(args.rounds):
                ours.append(measure(ROOT, name, words, Path(temporary)))
                if args.baseline is not None:
                    theirs.append(measure(args.baseline.resolve(), name, words, Path(temporary)))
            row: dict[str, Any] = {"command": name, "ours": median(ours)}
            line = "{cpu_s:7.2f} {wall_s:7.2f} {modules:7}".format(**row["ours"])
            if theirs:
                row |= {"baseline": median(theirs)}
                row["ratio"] = round(row["ours"]["cpu_s"] / row["baseline"]["cpu_s"], 3)
                line += f" {row['baseline']['cpu_s']:7.2f} {row['ratio']:5.2f}"
            print(f"{name:32} {line}", flush=True)
            results.append(row)
    if args.json is not None:
        facts = provenance(" ".join(["python benchmarks/startup.py", *sys.argv[1:]]), "torch", "jsonargparse")
        args.json.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
