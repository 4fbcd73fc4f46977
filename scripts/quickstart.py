"""From text to a Hugging Face model in runs/quickstart/: each step is a command of the project, printed as it runs.

Finished steps are left alone, so that a killed quickstart goes on where it was; `--fresh` begins again.
`make quickstart` calls this with the Python of `.venv`. Standard library only.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from lit_eval.overlap import longest_overlap

HERE = Path("runs/quickstart")  # relative to ROOT, where every command runs
TEXT, TOKENIZER, PACKED, RUN, HF = (HERE / p for p in ("data/text", "tokenizer", "data/packed", "run", "hf"))
VOCAB_SIZE = 4096
# (prompt, seed); an empty prompt begins a document.
PROMPTS = (("", 1), ("", 2), ("[Enter HAMLET and a Ghost]", 3), ("ROMEO\nWhat light", 4))
RESERVED_TOKENS = 24  # of the context, for the prompt


class StepFailed(Exception):
    """A command ended with an error, which it has printed."""


def shown(command: list[str]) -> str:
    """A command as one would type it with the environment active."""
    return shlex.join(["python" if part == sys.executable else part for part in command])


def call(*command: str | Path, capture: bool = False) -> str:
    words = [str(c) for c in command]
    print(f"$ {shown(words)}", flush=True)
    env = {**os.environ, "PYTHON": sys.executable}  # for the shell scripts
    result = subprocess.run(words, cwd=ROOT, env=env, stdout=subprocess.PIPE if capture else None, text=True)
    if result.returncode:
        raise StepFailed(shown(words))
    return result.stdout or ""


def begin(title: str, done: bool = False) -> bool:
    """Print a step's title; False where there is nothing to do."""
    print(f"\n=== {title}{': done before' if done else ''}", flush=True)
    return not done


def make_data(python: str) -> None:
    if begin(f"corpus -> {TEXT}", (ROOT / TEXT / "val.jsonl").exists()):
        call(python, "scripts/quickstart_corpus.py", "--output", TEXT)
    if begin(f"tokenizer -> {TOKENIZER}", (ROOT / TOKENIZER / "tokenizer.json").exists()):
        text = TEXT / "train.jsonl"
        call(
            python, "scripts/train_tokenizer.py", "--input", text, "--vocab_size", str(VOCAB_SIZE),
            "--output", TOKENIZER,
        )  # fmt: skip
    if begin(f"packed data -> {PACKED}", (ROOT / PACKED / "val" / "manifest.json").exists()):
        call(
            python, "scripts/prepare_data.py", "--input", TEXT / "train.jsonl", "--val_input", TEXT / "val.jsonl",
            "--tokenizer", TOKENIZER, "--output", PACKED,
        )  # fmt: skip


def train(python: str) -> None:
    begin(f"training -> {RUN} (about three minutes on two cores; it may be interrupted, a second call goes on)")
    call(
        python, "pretrain/fabric_train.py", "--config", "configs/quickstart.yaml", "--out_dir", RUN,
        "--data.train", PACKED / "train", "--data.val", PACKED / "val", "--resume", "auto",
    )  # fmt: skip


def convert() -> None:
    config = ROOT / HF / "config.json"
    newest = max((p.stat().st_mtime for p in (ROOT / RUN).glob("iter-*-ckpt.pth")), default=math.inf)
    if begin(f"Hugging Face folder -> {HF}", config.exists() and config.stat().st_mtime >= newest):
        shutil.rmtree(ROOT / HF, ignore_errors=True)
        call("scripts/convert_to_hf.sh", RUN, HF)


def show_samples(python: str) -> None:
    begin(f"samples, written by {HF}")
    lines = (ROOT / TEXT / "train.jsonl").read_text(encoding="utf-8").splitlines()
    # Documents stay apart: nothing the model could have seen runs from one into the next.
    training_text = "\0".join(json.loads(line)["text"] for line in lines)
    context = json.loads((ROOT / HF / "config.json").read_text())["max_position_embeddings"]
    for prompt, seed in PROMPTS:
        output = call(
            python, "scripts/generate.py", "--model", HF, "--prompt", prompt, "--seed", str(seed),
            "--max_new_tokens", str(context - RESERVED_TOKENS), "--temperature", "0.8", "--json", capture=True,
        )  # fmt: skip
        sample = json.loads(output)
        copied = longest_overlap(sample["text"], training_text)
        end = "ended by itself (EOS)" if sample["stopped_on_eos"] else "cut at the end of the context"
        print(f"{prompt}{sample['text']}")
        print(
            f"--- {len(sample['ids'])} tokens, {end}; longest copy from the training text: "
            f"{copied.length} of {len(sample['text'])} characters, {copied.text!r}\n"
        )


def summarise() -> None:
    with (ROOT / RUN / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["val_bits_per_byte"]]
    begin("done")
    for row in (measured[0], measured[-1]):
        print(
            f"validation after {row['step']} steps: {float(row['val_loss']):.3f} nats a token, "
            f"{float(row['val_bits_per_byte']):.3f} bits a byte (two plays that were never trained on)"
        )
    python = ".venv/bin/python" if Path(sys.prefix) == ROOT / ".venv" else sys.executable
    generate = f"{python} scripts/generate.py --model {HF} --prompt 'HAMLET' --max_new_tokens 200"
    print(f"""
{TEXT}     the corpus, one document a line
{TOKENIZER}     the tokenizer
{PACKED}   the tokens: train/, val/
{RUN}           checkpoints, metrics.csv, config.yaml; datapoints/: which document was seen when, with its loss
{HF}            the model for transformers: AutoModelForCausalLM.from_pretrained("{HF}")

Try next:
  {generate}
  {python} scripts/trace_data.py --help
  {python} scripts/quickstart.py --fresh
Your own text: the commands above marked $, with other paths. More in README.md.""")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help=f"remove {HERE} first")
    if parser.parse_args().fresh:
        shutil.rmtree(ROOT / HERE, ignore_errors=True)
    start = time.monotonic()
    try:
        make_data(sys.executable)
        train(sys.executable)
        convert()
        show_samples(sys.executable)
        summarise()
    except StepFailed as failed:
        print(f"error: this step failed, its message stands above:\n  {failed}", file=sys.stderr)
        print("The next call goes on from here; `make quickstart ARGS=--fresh` begins again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the next call goes on from here", file=sys.stderr)
        return 130
    print(f"\n{time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
