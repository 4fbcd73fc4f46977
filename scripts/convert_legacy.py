"""Convert a checkpoint of TinyLlama, LLäMmlein, lit-gpt or litgpt to this project's format, with the optimizer state.

    python scripts/convert_legacy.py out/LLaMmlein_1B/iter-00100000-ckpt.pth imported/llammlein-1B.pth

The result works with evaluation, generation and scripts/convert_to_hf.py, and training can continue from it with
--init_from (docs/legacy.md). The source is a .pth, or a litgpt folder with lit_model.pth and model_config.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import NOTHING_WRITTEN, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a .pth file, or a folder with lit_model.pth")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="checkpoint file to write; must not exist")
    parser.add_argument(
        "--model",
        metavar="NAME|FILE",
        help="a registered model, or a model_config.yaml or lit_config.json; default: the one beside SOURCE, or the "
        "name among its hparams",
    )
    parser.add_argument("--vocab_size", type=int, help="number of token ids; default: the model's")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="folder or file of the tokenizer it was trained with, so that training can check the data against it; "
        "default: the one beside SOURCE",
    )
    parser.add_argument("--weights_only", action="store_true", help="leave the optimizer's state out")
    args = vars(parser.parse_args())
    from pretrain.convert.legacy import import_legacy

    imported = import_legacy(**args)
    print(imported.summary(args["output"]))
    if not imported.tokenizer.named:
        why = imported.tokenizer.unreadable or "give it by --tokenizer"
        print(f"warning: its tokenizer is not known ({why}): training cannot see whether the data fits it")
    print(f"train on with: {imported.command(args['output'])} --data.train DIR --out_dir DIR")


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
