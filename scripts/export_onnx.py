"""Export a model to ONNX, for onnxruntime and programs built on it, and compare the file's logits with the model's.

    python scripts/export_onnx.py --checkpoint runs/mine --output onnx/

Writes OUTPUT/model.onnx with config and tokenizer, and prints the largest difference of a logit, the size, the speed
relative to PyTorch, and the limits of the file. A file whose logits differ by more than 1e-4 is not kept.
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
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder or file (default: the model's)")
    parser.add_argument("--no_cache", action="store_true", help="without inputs and outputs for cached keys and values")
    args = parser.parse_args()
    from pretrain.convert.onnx_export import export_to_onnx

    report = export_to_onnx(args.checkpoint, args.output, cache=not args.no_cache, tokenizer=args.tokenizer)
    print(f"{args.checkpoint} -> {args.output}\n{report}")


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
