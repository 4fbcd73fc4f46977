"""Plan a run before you pay for it: parameters, memory for each strategy, time, disk, GPU hours and energy.

    python scripts/plan_run.py --gpu h100 --gpus 8 --config configs/llammlein_1B.yaml
    python scripts/plan_run.py --gpu cpu --config configs/debug.yaml --train.max_steps 2000
    python scripts/plan_run.py --gpu h100 --config configs/llammlein_120M.yaml --predict_loss runs/a runs/b runs/c

All other flags, but --devices and --num_nodes, are those of pretrain/fabric_train.py. Nothing is started, and the data
need not exist; where it does, passes over it and document lengths are taken from there. docs/planning.md says what the
figures rest on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()

NAMES = ("h100", "h200", "a100", "b200", "rtx4090", "cpu")


def main() -> None:
    parser = ScriptParser(description=__doc__, allow_abbrev=False, other_flags=True)
    parser.add_argument(
        "--gpu", required=True, type=str.lower, choices=NAMES, help="kind of device; cpu: this machine's"
    )
    parser.add_argument("--gpus", type=int, default=1, help="devices, eight a node (1)")
    parser.add_argument(
        "--predict_loss", type=Path, nargs="+", metavar="RUN", help="predict the final loss from three or more runs"
    )
    args, flags = parser.parse_known_args()
    from pretrain.planning.command import plan_for

    print(*plan_for(args.gpu, args.gpus, flags, args.predict_loss or []), sep="\n")


if __name__ == "__main__":
    run_script(main, "interrupted")
