"""Add word counts per document to a dataset without them: one from an earlier version, or from imported tokens.

    python scripts/count_words.py data/train

Words are separated by whitespace and counted in the text decoded from the tokens (preparation counts them in the
original text). Replaces docs.parquet and manifest.json; tokens and the dataset's fingerprint don't change. Repeat a
killed call to finish it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

from lit_data.prepare.word_counts import add_word_counts
from lit_files.cores import usable_cores
from pretrain.cli.command_line import ScriptParser


def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    formatter = argparse.RawDescriptionHelpFormatter
    parser = ScriptParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="the folder with manifest.json")
    parser.add_argument("--tokenizer", metavar="PATH", help="decodes the tokens (default: the one beside the dataset)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes, a shard each (default: the cores)")
    args = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        workers = args.workers if args.workers is not None else usable_cores()
        words = add_word_counts(args.dataset, args.tokenizer, workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.dataset}: {words:,} words")
    return 0


if __name__ == "__main__":
    sys.exit(main())
