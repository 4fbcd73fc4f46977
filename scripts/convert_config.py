"""Convert a training config of another trainer to one of ours, for pretrain/fabric_train.py --config.

    python scripts/convert_config.py config/llama-10M.yaml --output llama-10M.yaml
    python scripts/convert_config.py pretrain/tinyllama.py --output tinyllama.yaml --from tinyllama

Every key is mapped, or listed as left out with the reason; an unknown key is an error. Settings whose meaning differs
have a comment. The first lines of the output are the commands that prepare the data and train
(docs/coming-from.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import NOTHING_WRITTEN, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()

SOURCES = ("babyllama", "babylm2025", "tinyllama", "litgpt")


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument(
        "input", type=Path, metavar="INPUT", help="a YAML file, or a script with its settings as constants (TinyLlama)"
    )
    parser.add_argument("--output", type=Path, required=True, help="YAML file to write; must not exist")
    parser.add_argument(
        "--from", dest="source", choices=SOURCES, help="trainer of INPUT (default: recognized by its keys)"
    )
    args = parser.parse_args()
    from pretrain.convert.foreign_config import convert_config

    done = convert_config(args.input, args.output, args.source)
    print(f"{args.input} ({done.title}) -> {args.output}: {len(done.settings)} settings")
    for line in done.left_out:
        print(f"left out: {line}")
    print("\n".join(["next:", *(f"  {command}" for command in done.commands)]))


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
