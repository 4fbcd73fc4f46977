"""Score of `plan_run.py --predict_loss`: small runs predict larger ones, which are then trained.

    python benchmarks/plan_loss.py --data DATA [--out_dir DIR] [--scale 1.0] [--json FILE]

DATA holds `train` and `val`, as scripts/prepare_data.py writes them. Eight small runs are trained, and twenty held-out
ones, most of them larger, by up to fourteen times in parameters and eight times in tokens. From the first 3, 4, 6 and 8
small runs each held-out loss is predicted with a 90 % interval. Printed: how many intervals contain the loss, their
median width, and the median error of the prediction, both relative to the loss. Finished runs in DIR are used again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.corpus_runs import call
from benchmarks.provenance import provenance
from lit_eval.run_facts import read_run
from lit_model.cost import count_multiplying_parameters
from pretrain.planning.loss import FinishedRun, predict_loss, read_finished_runs

BLOCK_SIZE, ROWS = 128, 8
SHAPES = {"xs": (2, 48), "s": (2, 64), "m": (3, 80), "l": (3, 112), "xl": (4, 144), "xxl": (4, 192)}
"""(layers, width)."""
SMALL = [("xs", 400), ("m", 400), ("s", 1200), ("xs", 1200), ("m", 800), ("s", 400), ("m", 1200), ("xs", 800)]
"""(shape, steps), in the order in which they are used: the first three differ in both."""
HELD_OUT = [
    *(("xs", steps) for steps in (2000, 3200)),
    *(("s", steps) for steps in (800, 1600, 2000, 3200)),
    *(("m", steps) for steps in (600, 1600, 2400)),
    *(("l", steps) for steps in (400, 600, 800, 1200, 1600)),
    *(("xl", steps) for steps in (400, 600, 800, 1200)),
    *(("xxl", steps) for steps in (400, 800)),
]
USED = (3, 4, 6, 8)


def train(shape: str, steps: int, data: Path, folder: Path) -> Path:
    """The run folder of a finished run."""
    layers, width = SHAPES[shape]
    run = folder / f"{shape}-{steps}"
    flags: dict[str, object] = {
        "out_dir": run,
        "data.train": data / "train",
        "data.val": data / "val",
        "data.datapoints": "false",
        "accelerator": "cpu",
        "model.n_layer": layers,
        "model.n_embd": width,
        "model.n_head": width // 16,
        "model.intermediate_size": 8 * width // 3 // 16 * 16,
        "model.tie_embeddings": "true",
        "train.block_size": BLOCK_SIZE,
        "train.micro_batch_samples": ROWS,
        "train.global_batch_samples": ROWS,
        "train.max_steps": steps,
        "optim.lr": 3e-3,
        "optim.lr_min": 3e-4,
        "optim.warmup_steps": steps // 20,
        "log.every_steps": 50,
        "log.report": "false",
        "eval.every_steps": steps,
        "eval.max_samples": 512,
        "eval.micro_batch_samples": 16,
        "save.every_steps": steps,
        "resume": "auto",
    }
    if not (run / f"iter-{steps:08}-ckpt.pth").exists():
        call("pretrain/fabric_train.py", *(f"--{key}={value}" for key, value in flags.items()))
    return run


def score(small: list[FinishedRun], held_out: list[tuple[Path, FinishedRun]]) -> dict[str, Any]:
    """Predictions of all held-out runs from some small ones."""
    rows = {}
    for folder, run in held_out:
        config = read_run(folder).model
        assert config is not None
        found = predict_loss(small, config, run.tokens)
        rows[run.name] = {
            "parameters": count_multiplying_parameters(config),
            "tokens": run.tokens,
            "loss": run.loss,
            "low": found.low,
            "median": found.median,
            "high": found.high,
        }
    return {
        "covered": sum(row["low"] <= row["loss"] <= row["high"] for row in rows.values()),
        "median_width": statistics.median((row["high"] - row["low"]) / row["loss"] for row in rows.values()),
        "median_error": statistics.median(abs(row["median"] - row["loss"]) / row["loss"] for row in rows.values()),
        "runs": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with packed train and val")
    parser.add_argument("--out_dir", type=Path, help="keep the runs here (a temporary folder)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all steps (1.0)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    result: dict[str, Any] = provenance(" ".join(["python", *sys.argv]), "torch") | {"from": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out_dir or Path(temporary)).resolve()
        data = args.data.resolve()
        folders = {}
        for name, steps in dict.fromkeys([*SMALL, *HELD_OUT]):
            folders[name, steps] = train(name, max(1, round(args.scale * steps)), data, folder)
            print(
                f"{name:4}{steps:6} steps: loss {read_run(folders[name, steps]).metrics.last('val_loss'):.4f}",
                flush=True,
            )
        runs = dict(zip(folders, read_finished_runs(list(folders.values())), strict=True))
        held_out = [(folders[key], runs[key]) for key in HELD_OUT]
        for n in USED:
            row = result["from"][n] = score([runs[key] for key in SMALL[:n]], held_out)
            print(
                f"from {n} runs: {row['covered']} of {len(held_out)} intervals contain the loss, "
                f"median width {row['median_width']:.1%}, median error {row['median_error']:.2%}"
            )
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
