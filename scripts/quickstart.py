"""From text to a Hugging Face model: each step runs and prints one of the project's commands.

    python scripts/quickstart.py                                          # Shakespeare, in runs/quickstart/
    python scripts/quickstart.py --input corpus/ --output runs/german     # your text, in any language
    python scripts/quickstart.py --input TinyStories-train.txt --val_input TinyStories-valid.txt \
        --split_documents '<|endoftext|>' --vocab_size 10000 --config configs/nano-llama.yaml --output runs/nano-llama

Finished steps are skipped, so that a killed quickstart resumes; `--fresh` starts over. Without a GPU a config's
compilation and bf16 are switched off. `make quickstart` calls this with the Python of `.venv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import RESUMES, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()

from lit_data.corpus.options import check_split
from lit_files.reading import read_object
from lit_files.run_files import METRICS, REPORT, STOPPED
from pretrain.pipeline.steps import (
    ROOT,
    STATE,
    Pipeline,
    Step,
    absent,
    begin,
    call,
    check_flags,
    from_root,
    names_of,
    python,
    run_work,
)

DEFAULT = Path("runs/quickstart")
CONFIG = "configs/quickstart.yaml"
VOCAB_SIZE = 4096
VAL_FRACTION = 0.02
FEW_FILES = 10  # too few to hold some out
HELD_OUT = 6  # documents to hold out of few, on average: with none the preparation would stop
MOST_HELD_OUT = 0.3  # of the documents
# (prompt, seed), like the start of a document. With the document mask no first token is trained, so none is empty.
PROMPTS = (
    ("SCENE I.", 1),
    ("FIRST WITCH\n", 2),
    ("[Enter HAMLET and a Ghost]\n\nHAMLET\n", 3),
    ("ROMEO\nWhat light", 4),
)
OWN = ("val_input", "config", "split_documents", "vocab_size", "val_fraction")  # flags for a text of your own
WRITTEN = ("data", "tokenizer", "run", "hf")  # folders in --output
START_OVER = ", or start over with --fresh"
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
        return self.run / REPORT

    @property
    def hf(self) -> Path:
        return self.top / "hf"


def training_command(paths: Paths, args: argparse.Namespace) -> tuple[str, ...]:
    command = python(
        "pretrain/fabric_train.py", "--config", args.config or CONFIG, "--out_dir", paths.run,
        "--data.train", paths.packed / "train", "--data.val", paths.packed / "val", "--resume", "auto",
    )  # fmt: skip
    if args.steps:
        own = {"train.max_steps": str(args.steps), "optim.warmup_steps": str(args.steps // 10)}
        command += tuple(absent(own, names_of(args.flags)))
    return command


def plan(paths: Paths, args: argparse.Namespace, training: tuple[str, ...]) -> list[Step]:
    """From text to the Hugging Face folder. Results are those of Paths, so that each command can be typed alone."""
    if args.input is None:
        make_text = [
            Step(
                f"corpus -> {paths.text}",
                (python("scripts/quickstart_corpus.py", "--output", paths.text),),
                output=paths.text / "val.jsonl",
            )
        ]
        text: list[str | Path] = [paths.text / "train.jsonl"]
        split: list[str | Path] = ["--val_input", paths.text / "val.jsonl"]
    else:
        make_text, text = [], list(args.input)
        split = ["--val_input", *args.val_input] if args.val_input else ["--val_fraction", str(args.val_fraction)]
    reading = ["--split_documents", args.split_documents] if args.split_documents is not None else []
    length = f"{args.steps} steps" if args.steps else "three to five minutes on two cores"
    if args.config is not None and not args.steps:
        length = f"as long as {args.config} says"
    return [
        *make_text,
        Step(
            f"tokenizer -> {paths.tokenizer}",
            (
                python(
                    "scripts/train_tokenizer.py", "--input", *text, *reading, "--vocab_size", str(args.vocab_size),
                    "--output", paths.tokenizer,
                ),
            ),
            output=paths.tokenizer / "tokenizer.json",
        ),
        Step(
            f"packed data -> {paths.packed}",
            (
                python(
                    "scripts/prepare_data.py", "--input", *text, *split, *reading, "--tokenizer", paths.tokenizer,
                    "--output", paths.packed,
                ),
            ),
            output=paths.packed / "val" / "manifest.json",
        ),
        Step(
            f"training -> {paths.run} ({length}; you may interrupt it, the next call resumes)",
            (training,),
            stopped=paths.run / STOPPED,
        ),
        Step(
            f"Hugging Face folder, with the validation loss of every document compared with transformers -> {paths.hf}",
            (
                python("scripts/convert_to_hf.py", "--checkpoint", paths.run, "--output", paths.hf),
                python("scripts/verify_hf.py", "--run", paths.run, "--hf", paths.hf),
            ),
            replaces=paths.hf,
        ),
        Step(f"report -> {paths.report}", (python("scripts/report.py", paths.run),)),
    ]  # fmt: skip


def first_words(texts: Iterable[str]) -> list[tuple[str, int]]:
    """(prompt, seed) from the first three words of the first few documents that have more."""
    starts = (re.match(r"\s*(?:\S+\s+){3}", text[:1000]) for text in texts)
    found = (start[0].strip() for start in starts if start is not None)
    return list(zip(dict.fromkeys(found), range(1, len(PROMPTS) + 1), strict=False))


def show_samples(paths: Paths, prompts: Sequence[tuple[str, int]], copy_of: Callable[[list[int]], str]) -> None:
    """`copy_of`: describes the longest copy from the training text in the ids of a sample."""
    begin(f"samples, written by {paths.hf}")
    context = json.loads((ROOT / paths.hf / "config.json").read_text())["max_position_embeddings"]
    for prompt, seed in prompts:
        command = python(
            "scripts/generate.py", "--model", paths.hf, "--prompt", prompt, "--seed", str(seed),
            "--max_new_tokens", str(context - RESERVED_TOKENS), "--temperature", "0.8", "--json",
        )  # fmt: skip
        output = call(command, capture=True)
        sample = json.loads(output)
        end = "ended by itself (EOS)" if sample["stopped_on_eos"] else "cut at the end of the context"
        print(f"{prompt}{sample['text']}")
        print(f"--- {len(sample['ids'])} tokens, {end}; {copy_of(sample['ids'])}\n")


def summarise(paths: Paths, prompt: str) -> None:
    with (ROOT / paths.run / METRICS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["val_bits_per_byte"]]
    begin("done")
    for row in (measured[0], measured[-1]):
        print(
            f"validation after {row['step']} steps: {float(row['val_loss']):.3f} nats a token, "
            f"{float(row['val_bits_per_byte']):.3f} bits a byte (documents that were never trained on)"
        )
    runs = ".venv/bin/python" if Path(sys.prefix) == ROOT / ".venv" else sys.executable
    contents = {
        paths.text: "the corpus, one document a line",
        paths.tokenizer: "the tokenizer",
        paths.packed: "the tokens: train/, val/",
        paths.run: "checkpoints, metrics.csv, config.yaml; datapoints/: which document was seen when, with its loss",
        paths.report: "curves, data seen, events and settings of the run: open it in a browser",
        paths.hf: f'the model for transformers: AutoModelForCausalLM.from_pretrained("{paths.hf}")',
    }
    contents = {path: text for path, text in contents.items() if (ROOT / path).exists()}
    width = max(len(str(path)) for path in contents)
    print("", *(f"{path!s:{width}}  {text}" for path, text in contents.items()), sep="\n")
    print(f"""
Try next:
  {runs} scripts/generate.py --model {paths.hf} --prompt {shlex.quote(prompt)} --max_new_tokens 200
  {runs} scripts/trace_data.py step {paths.run} {int(rows[-1]["step"]) - 1}
  {runs} scripts/trace_data.py verify {paths.run}
  {runs} scripts/quickstart.py --input YOUR_TEXT/ --output runs/mine
A larger model: the commands above marked $, with another --config.
Guides to your own corpus, evaluating, publishing and the rest: docs/index.md""")


def check_folder(top: Path, args: argparse.Namespace) -> None:
    """Raise ValueError if the folder to work in already holds files of someone else's where this command writes and
    --fresh deletes, or if the text is there."""
    top = top.resolve()
    for name in (*(args.input or ()), *(args.val_input or ())):
        text = (ROOT / name).resolve()
        if any(text.is_relative_to(top / folder) or (top / folder).is_relative_to(text) for folder in WRITTEN):
            raise ValueError(
                f"{name} overlaps the folders that this command writes in {top} and that --fresh deletes: choose "
                "another --output"
            )
    theirs = [folder for folder in WRITTEN if os.path.lexists(top / folder)]
    if theirs and not (top / STATE).exists():
        raise ValueError(f"{top / theirs[0]} exists and was not written by this command: choose another --output")


def main() -> int:
    parser = ScriptParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier call wrote, and begin again")
    parser.add_argument("--steps", type=int, metavar="N", help="train N steps instead of those of the config")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"folder to work in (default: {DEFAULT}; --input needs one)"
    )
    own = parser.add_argument_group("your own text, in any language")
    own.add_argument(
        "--input", nargs="+", metavar="PATH", help="files, folders, patterns or hf:NAME, as for prepare_data.py"
    )
    own.add_argument(
        "--val_input", nargs="+", metavar="PATH", help="validation text (default: --val_fraction of the documents)"
    )
    own.add_argument("--config", type=Path, metavar="FILE", help=f"model and training (default: {CONFIG})")
    own.add_argument(
        "--split_documents",
        metavar="UNIT",
        help="documents in plain text: file (default), blank_line, line, or the line between them",
    )
    own.add_argument("--vocab_size", type=int, default=VOCAB_SIZE, metavar="N", help=f"default: {VOCAB_SIZE}")
    own.add_argument(
        "--val_fraction", type=float, default=VAL_FRACTION, metavar="F",
        help=f"fraction of the documents held out for validation (default: {VAL_FRACTION}, more of few files)",
    )  # fmt: skip
    parser.add_argument("flags", nargs="*", default=[], metavar="-- FLAGS", help="more flags of fabric_train.py")
    args = parser.parse_args()
    if args.input is None and (extra := parser.given.keys() & set(OWN)):
        raise ValueError(f"--{min(extra)} is for text of your own: give it by --input")
    if args.input is not None and args.output is None:
        raise ValueError(f"--input {' '.join(args.input)} needs --output DIR, a folder for its model")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps}: at least 1 is needed")
    if {"val_input", "val_fraction"} <= parser.given.keys():
        raise ValueError("give --val_input or --val_fraction, not both")
    check_flags(args.flags, "quickstart.py")
    if args.split_documents is not None:
        check_split(args.split_documents)
    if args.config is not None:
        from pretrain.cli.choices import check_config

        check_config(args.config)
        args.config = str(from_root(args.config))
    if args.input is not None:
        from lit_data.corpus.files import TEXT_SUFFIXES, list_files

        local = [name for name in args.input if not name.startswith("hf:")]
        files = list_files(local)
        whole = (
            args.val_input is None
            and args.split_documents in (None, "file")
            and all(file.kind in TEXT_SUFFIXES for file in files)
        )
        if whole and 0 < len(files) < FEW_FILES and len(local) == len(args.input):
            raise ValueError(
                f"--input {' '.join(args.input)} holds {len(files)} plain-text files, each one document: too few to "
                "hold some out for validation. Give --split_documents blank_line or line, --val_input, or more files"
            )
        if args.split_documents is not None:
            from lit_data.corpus.separators import check_separator

            held_out = list_files([name for name in args.val_input or () if not name.startswith("hf:")])
            check_separator(files, held_out, args.split_documents)  # its commands print the warnings
        state = args.output / STATE
        if "val_fraction" not in parser.given and state.exists() and not args.fresh:  # files may have come since
            args.val_fraction = read_object(state).get("settings", {}).get("val_fraction", args.val_fraction)
        elif whole and files and "val_fraction" not in parser.given:  # enough documents of few
            args.val_fraction = max(args.val_fraction, round(min(MOST_HELD_OUT, HELD_OUT / len(files)), 3))
        for flag in ("input", "val_input"):
            named = getattr(args, flag)
            if named is not None:
                setattr(args, flag, [name if name.startswith("hf:") else str(from_root(Path(name))) for name in named])
    paths = Paths(from_root(args.output or ROOT / DEFAULT))
    check_folder(ROOT / paths.top, args)
    if args.fresh:
        for folder in WRITTEN:  # by name: DIR may hold other things
            shutil.rmtree(ROOT / paths.top / folder, ignore_errors=True)
        (ROOT / paths.top / STATE).unlink(missing_ok=True)
    settings = {flag: getattr(args, flag) for flag in ("steps", "input", *OWN)}
    pipeline = Pipeline(ROOT / paths.top, settings, START_OVER)
    training = training_command(paths, args)
    if args.config is not None or args.flags:
        from pretrain.pipeline.training import flags_of_this_machine, parse_quietly

        adapted = flags_of_this_machine(parse_quietly((*training, *args.flags)))
        training += (*absent(adapted, names_of(args.flags)), *args.flags)

    def work() -> None:
        (ROOT / paths.top).mkdir(parents=True, exist_ok=True)
        pipeline.run(plan(paths, args, training))
        from lit_data.packed.open_dataset import open_dataset
        from lit_data.record.trace import open_run
        from lit_data.tokenizers.tokenizer import open_tokenizer
        from lit_eval.generation.copies import describe_copy

        run = open_run(ROOT / paths.run, ROOT / paths.packed / "train")
        tokenizer = open_tokenizer(ROOT / paths.tokenizer)
        held_out = open_dataset(ROOT / paths.packed / "val")
        prompts = PROMPTS if args.input is None else first_words(document.text for document in islice(held_out, 50))
        show_samples(paths, prompts, lambda ids: describe_copy(ids, run, tokenizer, SHORTEST_COPY))
        summarise(paths, prompts[0][0] if prompts else "")

    return run_work(work, hint=START_OVER)


if __name__ == "__main__":
    run_script(main, RESUMES)
