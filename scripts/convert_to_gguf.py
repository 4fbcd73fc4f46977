"""Convert a Llama-like model and its tokenizer to one GGUF file, for llama.cpp and programs built on it.

python scripts/convert_to_gguf.py --checkpoint runs/mine --output mine.gguf --dtype q8_0
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import NOTHING_WRITTEN, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="an iter-XXXXXXXX-ckpt.pth, a run folder (its newest), or a Hugging Face folder",
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16", "q8_0"],
        default="float16",
        help="of the matrices (default: float16)",
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder or file (default: the model's)")
    parser.add_argument("--pre_tokenizer", help="llama.cpp's pre-tokenizer by name, if none matches the tokenizer file")
    args = parser.parse_args()
    from pretrain.convert.export import export_to_gguf

    path = export_to_gguf(**vars(args))
    print(f"{path} -> {args.output}")


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
