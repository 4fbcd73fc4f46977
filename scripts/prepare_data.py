"""Turn text into packed datasets: OUTPUT/train, OUTPUT/val and OUTPUT/tokenizer.

    python scripts/prepare_data.py --input corpus/ --tokenizer tokenizer/ --output data/ --val_fraction 0.01 --workers 8

Reads .txt (also .train, .dev, .test; one document a file), .jsonl, .jsonl.zst, .parquet, and folders of these.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lit_data.prepare import available_cores, prepare


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files and folders of text")
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
    val.add_argument("--val_input", nargs="+", metavar="PATH", help="files and folders of validation text")
    add(
        "--workers",
        type=int,
        default=available_cores(),
        metavar="N",
        help="processes (default: %(default)s, the cores)",
    )
    add(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="at invalid UTF-8 or JSON or a document without text: stop with an error, or leave it out and count it "
        "(default: %(default)s)",
    )
    add("--text_field", default="text", metavar="NAME", help="JSON key or column of the text (default: %(default)s)")
    add(
        "--id_field",
        default="id",
        metavar="NAME",
        help="JSON key or column of the id (default: %(default)s); documents without one are named path:line",
    )
    add("--metadata", nargs="*", default=[], metavar="NAME", help="further keys or columns to keep with each document")
    add("--shard_tokens", type=int, default=1 << 31, metavar="N", help="tokens a shard (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of the split by --val_fraction (default: %(default)s)")
    add("--eos_token", metavar="TOKEN", help="the token that ends a document, where the tokenizer does not say")
    add("--overwrite", action="store_true", help="replace an OUTPUT that this program wrote, once the new one is whole")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers 1 means one core
    try:
        report = prepare(
            args.input,
            args.tokenizer,
            args.output,
            val_fraction=args.val_fraction,
            val_inputs=args.val_input,
            workers=args.workers,
            on_error=args.on_error,
            text_field=args.text_field,
            id_field=args.id_field,
            metadata=args.metadata,
            shard_tokens=args.shard_tokens,
            seed=args.seed,
            eos_token=args.eos_token,
            overwrite=args.overwrite,
        )
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(report.summary())
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is removed
    sys.exit(main())
