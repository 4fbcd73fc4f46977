"""Convert a Hugging Face folder to a checkpoint, to continue training from it with --init_from.

python scripts/convert_from_hf.py --input hf/ --output start.pth
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import NOTHING_WRITTEN, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="Hugging Face folder with safetensors")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint file to write; must not exist")
    args = parser.parse_args()
    from pretrain.convert.export import import_from_hf

    tokenizer = import_from_hf(args.input, args.output)
    print(f"{args.input} -> {args.output}: train on with --init_from {args.output}")
    if not tokenizer.named:
        why = tokenizer.unreadable or "there is none in the folder"
        print(f"warning: its tokenizer is not known ({why}): training cannot see whether the data fits it")


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
