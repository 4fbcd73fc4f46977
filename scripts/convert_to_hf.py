"""Convert a checkpoint to a Hugging Face folder: safetensors, configs, tokenizer, model card.

python scripts/convert_to_hf.py --checkpoint runs/mine --output hf/
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import RESUMES, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="an iter-XXXXXXXX-ckpt.pth, or a run folder (its newest)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder or file (default: the run's)")
    parser.add_argument(
        "--word_budgets", action="store_true", help="write a run's checkpoints at word budgets as OUTPUT/chck_1M, ..."
    )
    args = parser.parse_args()
    from lit_eval.model.model_tokenizer import find_tokenizer
    from pretrain.convert.export import export_to_hf, export_word_budgets

    def warn(written: list[Path]) -> None:
        if written and args.tokenizer is None and find_tokenizer(written[0]) is None:
            print(
                f"warning: {args.checkpoint} has no tokenizer beside it, so {args.output} has none either: give one by "
                "--tokenizer",
                file=sys.stderr,
            )

    if args.word_budgets:
        exported = export_word_budgets(args.checkpoint, args.output, args.tokenizer)
        for folder, found in exported.items():
            print(f"{found} -> {folder}" if found is not None else f"{folder} exists already; left unchanged")
        warn([found for found in exported.values() if found is not None])
        return
    path = export_to_hf(args.checkpoint, args.output, args.tokenizer)
    warn([path])
    print(f"{path} -> {args.output}: open it with AutoModelForCausalLM.from_pretrained({str(args.output)!r})")


if __name__ == "__main__":
    run_script(main, RESUMES)
