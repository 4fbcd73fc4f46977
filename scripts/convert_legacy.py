"""Convert a checkpoint of TinyLlama, LLäMmlein, lit-gpt or litgpt to this project's format, with the optimizer state.

python scripts/convert_legacy.py out/LLaMmlein_1B/iter-00100000-ckpt.pth imported/llammlein-1B.pth

The result works with evaluation, generation and scripts/convert_to_hf.py, and training can continue from it with
--init_from (docs/legacy.md). The source is a .pth, or a litgpt folder with lit_model.pth and model_config.yaml.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

from lit_model.cost import count_parameters
from pretrain.cli.command_line import ScriptParser
from pretrain.convert.legacy import Imported, import_legacy


def command_to_go_on(imported: Imported, output: Path) -> str:
    """The trainer command that continues the old run, with the settings its checkpoint records."""
    flags: dict[str, object] = {"init_from": output}
    if imported.optimizer:
        flags |= {"init_optimizer": "true", "optim.steps_before": imported.step}
        flags |= imported.settings
    return "python pretrain/fabric_train.py " + " ".join(f"--{flag} {value}" for flag, value in flags.items())


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = ScriptParser(description=__doc__, formatter_class=formatter)
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
    args = parser.parse_args()
    try:
        imported = import_legacy(
            args.source,
            args.output,
            model=args.model,
            vocab_size=args.vocab_size,
            weights_only=args.weights_only,
            tokenizer=args.tokenizer,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config = imported.config
    optimizer = "with its optimizer's state" if imported.optimizer else "without an optimizer's state"
    print(f"{imported.path} -> {args.output}: step {imported.step:,}, {optimizer}")
    print(f"  model {config.name or 'custom'}: {count_parameters(config):,} parameters, {config.vocab_size:,} ids")
    if not imported.tokenizer.named:
        why = imported.tokenizer.unreadable or "give it by --tokenizer"
        print(f"warning: its tokenizer is not known ({why}): training cannot see whether the data fits it")
    print(f"train on with: {command_to_go_on(imported, args.output)} --data.train DIR --out_dir DIR")
    return 0


if __name__ == "__main__":
    sys.exit(main())
