"""Quantize a model for transformers (torchao) or llama.cpp (GGUF), and report size, speed and change in bits per byte.

    python scripts/quantize.py --checkpoint runs/mine --method int8 --output int8/ --text val.jsonl
    python scripts/quantize.py --checkpoint runs/mine --method q8_0 --output model.gguf --text val.jsonl

Prints the size, the bits per byte of the text before and after, the speed relative to float32, and limits. The output
is published only once it was reopened and measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import NOTHING_WRITTEN, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()

from pretrain.convert.quantization_methods import METHODS


def main() -> None:
    methods = "\n".join(f"  {name:13} {text}" for name, text in METHODS.items())
    parser = ScriptParser(description=__doc__, epilog=f"methods:\n{methods}")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="an iter-XXXXXXXX-ckpt.pth, a run folder (its newest), or a Hugging Face folder",
    )
    parser.add_argument("--method", choices=list(METHODS), required=True, help="see below")
    parser.add_argument("--output", type=Path, required=True, help="folder, or GGUF file, to write; must not exist")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text, .jsonl or Parquet files to score")
    parser.add_argument("--max_documents", type=int, help="documents of --text to use (default: all)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder or file (default: the model's)")
    parser.add_argument("--pre_tokenizer", help="GGUF only: as for convert_to_gguf.py")
    args = parser.parse_args()
    from pretrain.convert.quantization import quantize

    report = quantize(
        args.checkpoint,
        args.output,
        args.method,
        args.text,
        max_documents=args.max_documents,
        tokenizer=args.tokenizer,
        pre_tokenizer=args.pre_tokenizer,
    )
    print(f"{args.checkpoint} -> {args.output}\n{report}")


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
