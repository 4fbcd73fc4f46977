"""Add word counts per document to a dataset without them: one from an earlier version, or from imported tokens.

    python scripts/count_words.py data/train

Words are separated by whitespace and counted in the text decoded from the tokens (preparation counts them in the
original text). Replaces docs.parquet and manifest.json; tokens and the dataset's fingerprint don't change. Repeat a
killed call to finish it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import RESUMES, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()


def main() -> None:
    parser = ScriptParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="the folder with manifest.json")
    parser.add_argument("--tokenizer", metavar="PATH", help="decodes the tokens (default: the one beside the dataset)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes, a shard each (default: the cores)")
    args = parser.parse_args()
    from lit_data.prepare.word_counts import add_word_counts
    from lit_files.platform import usable_cores

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    workers = args.workers if args.workers is not None else usable_cores()
    words = add_word_counts(args.dataset, args.tokenizer, workers)
    print(f"{args.dataset}: {words:,} words")


if __name__ == "__main__":
    run_script(main, RESUMES)
