"""Sample OUTPUT/train.jsonl and OUTPUT/val.jsonl from a grammar of known entropy.

python scripts/make_synthetic.py --output corpus/ --tokens 1000000 --seed 1
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import NOTHING_WRITTEN, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()

from lit_data.corpus.synthetic import LEVELS, describe_level, describe_texts, write_synthetic


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to create; it must not exist")
    parser.add_argument("--tokens", type=int, required=True, help="words in both files together, approximately")
    parser.add_argument("--level", choices=LEVELS, default="simple", help="(default simple)")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--val_fraction", type=float, default=0.1, help="share of the words in val.jsonl (default 0.1)")
    args = parser.parse_args()
    for path in write_synthetic(**vars(args)):
        print(describe_texts(path))
    print(describe_level(args.level))


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
