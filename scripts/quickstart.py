"""From text to a Hugging Face model in runs/quickstart/: each step runs and prints one of the project's commands.

Finished steps are skipped, so that a killed quickstart resumes; `--fresh` starts over. `make quickstart` calls this
with the Python of `.venv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from pretrain.cli.command_line import ScriptParser, end_on_ctrl_c

end_on_ctrl_c()


DEFAULT = Path("runs/quickstart")
VOCAB_SIZE = 4096
# (prompt, seed), like the start of a document. With the document mask no first token is trained, so none is empty.
PROMPTS = (
    ("SCENE I.", 1),
    ("FIRST WITCH\n", 2),
    ("[Enter HAMLET and a Ghost]\n\nHAMLET\n", 3),
    ("ROMEO\nWhat light", 4),
)
RESERVED_TOKENS = 24  # of the context, for the prompt
SHORTEST_COPY = 4  # tokens of a copy from the training text that is shown


@dataclass(frozen=True)
class Paths:
    """Output paths, relative to ROOT where the commands run."""

    top: Path

    @property
    def text(self) -> Path:
        return self.top / "data" / "text"

    @property
    def tokenizer(self) -> Path:
        return self.top / "tokenizer"

    @property
    def packed(self) -> Path:
        return self.top / "data" / "packed"

    @property
    def run(self) -> Path:
        return self.top / "run"

    @property
    def report(self) -> Path:
        return self.run / "report.html"

    @property
    def hf(self) -> Path:
        return self.top / "hf"


class StepFailed(Exception):
    """A command failed and has printed its error."""


def shown(command: list[str]) -> str:
    """A command as a user would type it with the environment active."""
    return shlex.join(["python" if part == sys.executable else part for part in command])


def call(*command: str | Path, capture: bool = False) -> str:
    words = [str(c) for c in command]
    print(f"$ {shown(words)}", flush=True)
    # PYTHON is for the shell scripts. Waiting threads sleep instead of spinning: on two cores shared with other
    # programs, spinning cost five sixths of the speed.
    env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHON": sys.executable}
    result = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE if capture else None, text=True)
    if result.returncode:
        raise StepFailed(f"exit code {result.returncode}: {shown(words)}")
    return result.stdout or ""


def begin(title: str, done: bool = False) -> bool:
    """Print a step's title; False if there is nothing to do."""
    print(f"\n=== {title}{': done before' if done else ''}", flush=True)
    return not done


def make_data(python: str, paths: Paths) -> None:
    if begin(f"corpus -> {paths.text}", (ROOT / paths.text / "val.jsonl").exists()):
        call(python, "scripts/quickstart_corpus.py", "--output", paths.text)
    if begin(f"tokenizer -> {paths.tokenizer}", (ROOT / paths.tokenizer / "tokenizer.json").exists()):
        text = paths.text / "train.jsonl"
        call(
            python, "scripts/train_tokenizer.py", "--input", text, "--vocab_size", str(VOCAB_SIZE),
            "--output", paths.tokenizer,
        )  # fmt: skip
    if begin(f"packed data -> {paths.packed}", (ROOT / paths.packed / "val" / "manifest.json").exists()):
        call(
            python, "scripts/prepare_data.py", "--input", paths.text / "train.jsonl",
            "--val_input", paths.text / "val.jsonl", "--tokenizer", paths.tokenizer, "--output", paths.packed,
        )  # fmt: skip


def train(python: str, paths: Paths, steps: int | None) -> None:
    length = f"{steps} steps" if steps else "three to five minutes on two cores"
    begin(f"training -> {paths.run} ({length}; you may interrupt it, the next call resumes)")
    override = ["--train.max_steps", str(steps), "--optim.warmup_steps", str(steps // 10)] if steps else []
    call(
        python, "pretrain/fabric_train.py", "--config", "configs/quickstart.yaml", "--out_dir", paths.run,
        "--data.train", paths.packed / "train", "--data.val", paths.packed / "val", "--resume", "auto",
        *override,
    )  # fmt: skip
    # After a signal it saves and exits without an error.
    wanted = re.search(r"^  max_steps: (\d+)$", (ROOT / paths.run / "config.yaml").read_text(), re.MULTILINE)
    newest = max((ROOT / paths.run).glob("iter-*-ckpt.pth")).name
    if wanted is not None and int(newest.split("-")[1]) < int(wanted[1]):
        raise StepFailed(f"training was stopped at {newest}, before its {wanted[1]} steps")


def convert(python: str, paths: Paths) -> None:
    config = ROOT / paths.hf / "config.json"
    newest = max((p.stat().st_mtime for p in (ROOT / paths.run).glob("iter-*-ckpt.pth")), default=math.inf)
    if begin(f"Hugging Face folder -> {paths.hf}", config.exists() and config.stat().st_mtime >= newest):
        shutil.rmtree(ROOT / paths.hf, ignore_errors=True)
        call("scripts/convert_to_hf.sh", paths.run, paths.hf)
    begin("the validation loss of every document, here and in transformers")
    call(python, "scripts/verify_hf.py", "--run", paths.run, "--hf", paths.hf)


def show_samples(python: str, paths: Paths, copy_of: Callable[[list[int]], str]) -> None:
    """`copy_of`: describes the longest copy from the training text in the ids of a sample."""
    begin(f"samples, written by {paths.hf}")
    context = json.loads((ROOT / paths.hf / "config.json").read_text())["max_position_embeddings"]
    for prompt, seed in PROMPTS:
        output = call(
            python, "scripts/generate.py", "--model", paths.hf, "--prompt", prompt, "--seed", str(seed),
            "--max_new_tokens", str(context - RESERVED_TOKENS), "--temperature", "0.8", "--json", capture=True,
        )  # fmt: skip
        sample = json.loads(output)
        end = "ended by itself (EOS)" if sample["stopped_on_eos"] else "cut at the end of the context"
        print(f"{prompt}{sample['text']}")
        print(f"--- {len(sample['ids'])} tokens, {end}; {copy_of(sample['ids'])}\n")


def report(python: str, paths: Paths) -> None:
    begin(f"report -> {paths.report}")
    call(python, "scripts/report.py", paths.run)


def summarise(paths: Paths) -> None:
    with (ROOT / paths.run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["val_bits_per_byte"]]
    begin("done")
    for row in (measured[0], measured[-1]):
        print(
            f"validation after {row['step']} steps: {float(row['val_loss']):.3f} nats a token, "
            f"{float(row['val_bits_per_byte']):.3f} bits a byte (two plays that were never trained on)"
        )
    python = ".venv/bin/python" if Path(sys.prefix) == ROOT / ".venv" else sys.executable
    generate = f"{python} scripts/generate.py --model {paths.hf} --prompt 'HAMLET' --max_new_tokens 200"
    contents = {
        paths.text: "the corpus, one document a line",
        paths.tokenizer: "the tokenizer",
        paths.packed: "the tokens: train/, val/",
        paths.run: "checkpoints, metrics.csv, config.yaml; datapoints/: which document was seen when, with its loss",
        paths.report: "curves, data seen, events and settings of the run: open it in a browser",
        paths.hf: f'the model for transformers: AutoModelForCausalLM.from_pretrained("{paths.hf}")',
    }
    width = max(len(str(path)) for path in contents)
    print("", *(f"{path!s:{width}}  {text}" for path, text in contents.items()), sep="\n")
    print(f"""
Try next:
  {generate}
  {python} scripts/trace_data.py step {paths.run} {int(rows[-1]["step"]) - 1}
  {python} scripts/trace_data.py verify {paths.run}
  {python} scripts/quickstart.py --fresh
Your own text: the commands above marked $, with other paths. More in README.md.""")


def main() -> int:
    parser = ScriptParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier call wrote, and begin again")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="train N steps instead of those of configs/quickstart.yaml"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / DEFAULT, metavar="DIR", help=f"folder to work in (default: {DEFAULT})"
    )
    args = parser.parse_args()
    top = Path(os.path.abspath(args.output))
    paths = Paths(top.relative_to(ROOT) if top.is_relative_to(ROOT) else top)
    if args.fresh:
        for folder in ("data", "tokenizer", "run", "hf"):  # by name: DIR may hold other things
            shutil.rmtree(top / folder, ignore_errors=True)
    start = time.monotonic()
    try:
        make_data(sys.executable, paths)
        train(sys.executable, paths, args.steps)
        convert(sys.executable, paths)
        from lit_data.record.trace import open_run
        from lit_data.tokenizers.tokenizer import open_tokenizer
        from lit_eval.generation.copies import describe_copy

        run = open_run(ROOT / paths.run, ROOT / paths.packed / "train")
        tokenizer = open_tokenizer(ROOT / paths.tokenizer)
        show_samples(sys.executable, paths, lambda ids: describe_copy(ids, run, tokenizer, SHORTEST_COPY))
        report(sys.executable, paths)
        summarise(paths)
    except StepFailed as failed:
        print(f"error: this step failed, see its message above:\n  {failed}", file=sys.stderr)
        print("The next call resumes here; `make quickstart ARGS=--fresh` starts over.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the next call resumes here", file=sys.stderr)
        return 130
    print(f"\n{time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
