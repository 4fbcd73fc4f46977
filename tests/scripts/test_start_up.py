"""--help and a mistake in the arguments import nothing heavy: entry points parse first, and import their work then."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from running import ROOT

from lit_data.record.sql import SORTS
from lit_eval.evaluation.babylm_tasks import PREFIX as BABYLM
from lit_eval.evaluation.named_tasks import NAMED_JOBS, PREFIXED_JOBS
from lit_eval.evaluation.settings import TASK_NAMES
from lit_eval.evaluation.text_data import PERPLEXITY
from lit_eval.model.choices import Precision
from lit_eval.model.eval_model import PRECISIONS
from lit_eval.score.tasks import NAMED
from lit_model.hf.gguf import DTYPES

HEAVY = (
    "torch", "numpy", "lightning_fabric", "safetensors", "pyarrow", "duckdb", "pandas", "transformers", "datasets",
    "tokenizers", "sentencepiece", "zstandard", "matplotlib", "rich", "multiprocessing", "asyncio",
)  # fmt: skip
ONLY_TRAINER = ("jsonargparse", "yaml")
# Each command in one process, as __main__: a heavy module that one of them imports is recorded for it.
PROGRAM = """
import contextlib, io, json, os, runpy, signal, sys

commands, heavy, output = json.loads(sys.argv[1])
imported = []

class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name in heavy:
            imported.append(name)

sys.meta_path.insert(0, Recorder())
found = []
for words in commands:
    sys.argv, text, imported[:] = words, io.StringIO(), []
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as left:
            found.append((left.code, text.getvalue(), list(imported)))
with open(output, "w") as file:
    json.dump(found, file)
"""


def outcomes(commands: list[list[str]], heavy: tuple[str, ...], output: Path) -> list[tuple[int, str, list[str]]]:
    """(exit status, output, heavy modules imported) of each command."""
    words = json.dumps([commands, heavy, str(output)])
    environment = {**os.environ, "COLUMNS": "80"}
    subprocess.run([sys.executable, "-c", PROGRAM, words], check=True, cwd=ROOT, env=environment, timeout=300)
    found: list[Any] = json.loads(output.read_text())
    assert len(found) == len(commands)
    return [tuple(one) for one in found]


def test_scripts_parse_first(tmp_path: Path) -> None:
    without = {"install", "run_checks", "run_tests"}  # no arguments, or the standard library alone
    everything = [str(path) for path in sorted((ROOT / "scripts").glob("*.py"))]
    scripts = [path for path in everything if Path(path).stem not in without]
    wrong = {
        "prepare_data": ["--input", "a", "--tokenizer", "b", "--output", "c", "--val_fraction", "3"],
        "generate": ["--model", "a", "--prompt", "b", "--temperature", "-1"],
        "evaluate": ["a", "--precision", "int4"],
        "import_tokens": ["--input", "a", "--output", "b", "--across_files"],
        "cache_teacher": [
            *("--teachers", "a", "--data", "b", "--output", "c"), *("--block_size", "0", "--k", "1")
        ],
        "compare": ["a", "--seed", "-1"],
        "report": ["a", "--record_s", "-1"],
    }  # fmt: skip
    mistakes = [[path, *wrong.get(Path(path).stem, ["--no_such_flag"])] for path in scripts]
    sorts = [str(ROOT / "scripts" / "trace_data.py"), "diff", "--help"]
    commands = [*([path, "--help"] for path in everything), sorts, *mistakes]
    found = outcomes(commands, HEAVY + ONLY_TRAINER, tmp_path / "found.json")
    texts = {}
    for words, (status, text, imported) in zip(commands, found, strict=True):
        assert imported == [] and status == (0 if "--help" in words else 2), (words, status, imported, text)
        name = Path(words[0]).stem
        texts[" ".join([name, *words[1:]])] = text
        if name not in without:
            assert text.startswith("usage: " if status == 0 else "error: "), text
        if words[1:] == ["--help"]:  # fits a screen of 80 columns, and has an example
            assert len(text.splitlines()) <= 50 and f" scripts/{name}.py" in text, text
    # Choices that are written out, so that the parser needs no torch.
    assert f"{{{','.join(DTYPES)}}}" in texts["convert_to_gguf --help"]
    assert f"{{{','.join(SORTS)}}}" in texts["trace_data diff --help"]
    assert f"{{{','.join(PRECISIONS)}}}" in texts["generate --help"]

    check_near_names(scripts, texts, tmp_path)


def check_near_names(scripts: list[str], texts: dict[str, str], tmp_path: Path) -> None:
    """A misspelled flag, or value of a flag with choices, gets the right one suggested, in every script."""
    commands, meant = [], []
    for path in scripts:
        text = texts[f"{Path(path).stem} --help"]
        for flag in re.findall(r"^  (--[a-z_]+)", text, re.MULTILINE)[:1]:
            commands.append([path, f"{flag[:-1]}q{flag[-1]}"])
            meant.append(flag)
        for flag, choices in re.findall(r"^  (--[a-z_]+) \{([^}]+)\}", text, re.MULTILINE):
            commands.append([path, flag, f"{choices.split(',')[0]}q"])
            meant.append(choices.split(",")[0])
    commands.append([str(ROOT / "scripts" / "trace_data.py"), "stpe", "runs/mine"])
    found = outcomes(commands, (), tmp_path / "near.json")
    for words, right, (status, text, _) in zip(commands, [*meant, "step"], found, strict=True):
        assert status == 2 and re.search(rf"did you mean (.* or )?{right}( or .*)?\?", text), (words, text)


def test_the_trainer_parses_first(tmp_path: Path) -> None:
    config = ["--config", str(ROOT / "configs" / "debug.yaml")]
    wrong = [["--optim.lr", "x"], ["--train.max_steps", "0"], ["--no_such_flag", "1"]]
    commands = [[str(ROOT / "pretrain" / "fabric_train.py"), *config, *words] for words in (["--help"], *wrong)]
    found = outcomes(commands, HEAVY, tmp_path / "found.json")
    assert [imported for _, _, imported in found] == [[]] * 4 and [status for status, _, _ in found] == [0, 2, 2, 2]


def test_a_plain_run_imports_no_compiler(tmp_path: Path) -> None:
    """On one CPU without --compile: neither torch.compile's machinery nor that of sharding, half of a run's start."""
    heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.checkpoint", "sympy")
    small = [
        "--train.max_steps",
        "2",
        "--optim.warmup_steps",
        "1",
        "--data.synthetic.tokens",
        "10000",
        "--out_dir",
        str(tmp_path / "run"),
    ]
    command = [str(ROOT / "pretrain" / "fabric_train.py"), "--config", str(ROOT / "configs" / "debug.yaml"), *small]
    ((status, text, imported),) = outcomes([command], (*heavy, "pandas"), tmp_path / "found.json")
    assert status == 0 and "step 2: saved" in text and imported == [], (text, imported)


def test_choices_are_complete() -> None:
    """The names that a parser lists without importing what they stand for."""
    prefixed = [f"{prefix}:NAME" for prefix in PREFIXED_JOBS]
    assert list(TASK_NAMES) == sorted([PERPLEXITY, *NAMED, *NAMED_JOBS, *prefixed, f"{BABYLM}:FOLDER"])
    assert list(PRECISIONS) == list(Precision.__args__)  # type: ignore[attr-defined]
