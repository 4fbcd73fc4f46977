"""Turn text into packed datasets: OUTPUT/train, OUTPUT/val, OUTPUT/tokenizer and OUTPUT/report.json.

    python scripts/prepare_data.py --input corpus/ --tokenizer tokenizer/ --output data/ --val_fraction 0.01

Reads .txt (one document a file, or as --split_documents says), .jsonl and .json lines, each also .gz or .zst, .parquet;
folders and patterns of these; hf:NAME[@CONFIG][:SPLIT] for a dataset of Hugging Face. A call that was killed is resumed
when it is repeated. On a cluster, --executor slurm submits the stages as jobs; with a scheduler of your own, call
--stage hash, join, encode, merge.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

from lit_data.corpus.readers import MAX_DOCUMENT_MB, SPLITS
from lit_data.prepare.executors import run_on_executors
from lit_data.prepare.run import prepare, run_stage
from lit_data.prepare.settings import Settings
from lit_files.cores import usable_cores
from pretrain.cli.command_line import ScriptParser


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    formatter = argparse.RawDescriptionHelpFormatter
    parser = ScriptParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders, patterns, datasets")
    add(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="a tokenizer.json, a sentencepiece .model, or a folder (tokenizer.json is taken before .model)",
    )
    add("--output", required=True, metavar="DIR", help="folder to write; it must not exist")
    val = parser.add_mutually_exclusive_group()
    val.add_argument(
        "--val_fraction",
        type=float,
        metavar="F",
        help="share of the documents for validation, chosen by a hash of (seed, id); without this and --val_input "
        "only OUTPUT/train is written",
    )
    val.add_argument("--val_input", nargs="+", metavar="PATH", help="inputs of validation text")
    add(
        "--allow_mixed_splits",
        action="store_true",
        help="let .train files and .dev or .test files make up one dataset",
    )
    add("--seed", type=int, metavar="S", help="of the split by --val_fraction (0)")
    add("--eos_token", metavar="TOKEN", help="the token that ends a document, where the tokenizer does not say")
    add("--bos", action="store_true", help="begin each document with the tokenizer's BOS, as Llama 3 and Gemma 2 do")
    add(
        "--special_tokens",
        choices=("text", "parse"),
        help="names of special tokens in a document: encode them as the text they are (a page about </s> does not end "
        "there), or parse them to their ids, for text that a chat template made (text)",
    )
    add("--shard_tokens", type=int, metavar="N", help="tokens a shard (2^31)")

    group = parser.add_argument_group("reading")
    add = group.add_argument
    add("--text_field", metavar="NAME", help="JSON key or column of the text, such as text or translation.de (text)")
    add("--id_field", metavar="NAME", help="key or column of the id; documents without one are named path:line (id)")
    add("--require_id", action="store_true", help="take a document without an id for an error")
    add("--metadata", nargs="*", metavar="NAME", help="further keys or columns to keep with each document")
    add(
        "--split_documents",
        choices=SPLITS,
        help="how to split plain text into documents: per file, per block between blank lines, or per line (file)",
    )
    add("--max_document_mb", type=int, metavar="N", help=f"a longer document is an error ({MAX_DOCUMENT_MB})")
    add(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="at invalid UTF-8 or JSON or a document without text: stop with an error, or leave it out and count it "
        "(default: %(default)s)",
    )

    group = parser.add_argument_group("what is left out; each stage reports what and why")
    add = group.add_argument
    add("--cleaner", metavar="C", help="a profile (babylm, babylm-paper, wikipedia, subtitles, dialogue) or "
        "module:function, text -> text or None")  # fmt: skip
    add("--filter", nargs="*", metavar="F", help="module:function, text -> whether to keep it")
    add("--min_characters", type=int, metavar="N", help="leave out shorter documents")
    add("--max_characters", type=int, metavar="N", help="leave out longer documents")
    add("--language", nargs="*", metavar="XX", help="keep documents in these languages (ISO 639-1)")
    add("--min_language_probability", type=float, metavar="P", help="of --language (0.5)")
    add("--max_token_word_ratio", type=float, metavar="R", help="leave out documents with more tokens a word")
    add(
        "--dedup",
        choices=("none", "exact", "bloom"),
        help="leave out paragraphs that occurred before: exactly in two passes, or by a Bloom filter in one (none)",
    )
    add("--dedup_min_characters", type=int, metavar="N", help="always keep shorter paragraphs (20)")
    add("--bloom_paragraphs", type=int, metavar="N", help="how many paragraphs the filter is made for")
    add("--bloom_false_positives", type=float, metavar="P", help="share of new ones it may take for old (1e-6)")
    add(
        "--near_dedup",
        type=float,
        metavar="J",
        help="leave out documents whose similarity (Jaccard, by MinHash) to an earlier one is at least J",
    )

    group = parser.add_argument_group("how it is done")
    add = group.add_argument
    add("--workers", type=int, metavar="N", help="processes, of each task with --executor (default: the cores)")
    add("--overwrite", action="store_true", help="replace an OUTPUT that this program wrote, once the new one is whole")
    add("--fresh", action="store_true", help="discard what an interrupted call left, instead of going on with it")
    add("--dry_run", action="store_true", help="do all of it but write nothing, and report")
    add("--work", metavar="DIR", help="working folder, on OUTPUT's file system (.OUTPUT.preparing beside it)")
    add("--commit_seconds", type=float, default=30.0, metavar="S", help="a kill costs about so much (%(default)s)")
    add("--parts", type=int, metavar="N", help="cut the input files into N ranges, to be prepared on their own (1)")
    add("--stage", choices=("hash", "join", "encode", "merge"), help="do only this, of --part where parts are apart")
    add("--part", type=int, default=0, metavar="I", help="of --stage, from 0")
    add("--executor", choices=("local", "slurm"), help="run the stages as tasks of datatrove's executors")
    add("--tasks", type=int, metavar="N", help="tasks of --executor at the same time (default: --parts)")
    add("--executor_args", type=json.loads, default={}, metavar="JSON",
        help='of the executor, such as \'{"time": "10:00:00", "partition": "cpu", "cpus_per_task": 16}\'')  # fmt: skip
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given; the others have the defaults of `Settings`."""
    names = set(Settings.__dataclass_fields__) - {"input", "tokenizer", "val_input"}
    return {k: v for k, v in vars(args).items() if k in names and v is not None}


def run(args: argparse.Namespace) -> None:
    call: dict[str, Any] = {
        "inputs": args.input,
        "tokenizer_path": args.tokenizer,
        "output": args.output,
        "val_inputs": args.val_input,
        "workers": args.workers if args.workers is not None else usable_cores(),
        "on_error": args.on_error,
        "overwrite": args.overwrite,
        "work": args.work,
        "commit_seconds": args.commit_seconds,
        **settings_of(args),
    }
    if args.executor is not None and args.stage is not None:
        raise ValueError("--executor and --stage exclude each other: the executor runs all stages")
    if args.dry_run and (args.executor or args.stage):
        raise ValueError("--dry_run goes over the whole corpus on this machine: leave out --executor and --stage")
    if args.executor is not None:
        tasks = args.tasks or args.parts or 1
        call["workers"] = args.workers or 1  # of each task
        run_on_executors(args.executor, **call, tasks_at_once=tasks, executor=args.executor_args)
        return
    if args.stage is not None:
        report = run_stage(args.stage, args.part, **call)
        print(report.summary() if report is not None else f"{args.stage}: part {args.part} is done")
        return
    print(prepare(**call, fresh=args.fresh, dry_run=args.dry_run).summary())


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers 1 means one core
    sys.path.append(os.getcwd())  # for module:function of the user's own
    try:
        run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        notes(error)
        return 2
    except OSError as error:  # a full disk, a quota, a device that fails
        print(f"error: {error.strerror or error}: {error.filename or args.output}", file=sys.stderr)
        notes(error)
        return 2
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        notes(error)
        return 130
    return 0


def notes(error: BaseException) -> None:
    for note in getattr(error, "__notes__", []):
        print(note, file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
