"""Compare the loss of every validation span between a run's checkpoint and its converted folder in transformers."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()

import yaml

from lit_data.packed.manifest import MANIFEST
from lit_data.packed.reader import PackedDataset
from lit_data.record.trace import find_recorded
from lit_eval.agreement import largest_difference, our_span_losses, transformers_span_losses
from lit_eval.model.model_tokenizer import compare, describe_difference, of_data, of_model
from lit_eval.model.text_encoding import check_folder
from lit_model.load import Checkpoint, resolve
from pretrain.cli.command_line import ScriptParser

TOLERANCE = 1e-4


def last_validation(run: Path) -> float | None:
    """The newest val_loss in metrics.csv."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as f:
        values = [row["val_loss"] for row in csv.DictReader(f) if row["val_loss"]]
    return float(values[-1]) if values else None


def main() -> int:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--hf", type=Path, required=True, help="its newest checkpoint as convert_to_hf.sh wrote it")
    args = parser.parse_args()
    try:
        if not (args.run / "config.yaml").is_file():
            raise FileNotFoundError(f"{args.run} is no run folder: it has no config.yaml")
        data = yaml.safe_load((args.run / "config.yaml").read_text(encoding="utf-8"))["data"]
        if data["val"] is None:
            raise ValueError(f"{args.run} has no validation split (data.val)")
        checkpoint = Checkpoint(resolve(args.run))
        dataset = PackedDataset(find_recorded(args.run, data["val"], MANIFEST))
        block_size = checkpoint.meta["config"]["train"]["block_size"] or checkpoint.model_config.block_size
        known, data_known = of_model(args.hf), of_data(dataset)
        verdict = compare(known, data_known)
        if verdict == "different":
            raise ValueError(
                f"--hf {args.hf} holds another tokenizer than the run's data: "
                f"{describe_difference(known, data_known, str(dataset.path))}"
            )
        if known.opened is not None:
            check_folder(args.run, args.hf, known.opened, dataset)
        ours = our_span_losses(args.run, dataset, block_size)
        theirs = transformers_span_losses(args.hf, dataset, ours)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if verdict == "unknown":
        print("warning: whether the folder's tokenizer is that of the data is not known: one of them names none")
    worst, trainer = largest_difference(ours, theirs), last_validation(args.run)
    print(
        f"{len(ours.loss)} spans, {ours.targets.sum()} targets: mean loss {ours.mean:.6f} here, "
        f"{theirs.mean:.6f} in transformers"
    )
    if trainer is not None:
        print(f"the trainer's last validation: {trainer:.6f}, relative difference {abs(trainer / theirs.mean - 1):.2e}")
    print(f"largest relative difference of a span's loss: {worst:.2e} (tolerance {TOLERANCE:.0e})")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
