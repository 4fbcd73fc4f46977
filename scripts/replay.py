"""Re-execute the recorded steps between two checkpoints of a run, and compare every loss and the resulting state.

    python scripts/replay.py release/step1000 release/step2000 --data data/train
    python scripts/replay.py runs/mine/iter-00001000-ckpt.pth runs/mine/iter-00002000-ckpt.pth

Exits with 1 if the replay departs from the record, and names the first step that does.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()


def parser() -> ScriptParser:
    made = ScriptParser(description=__doc__)
    made.add_argument("start", metavar="FROM", type=Path, help="checkpoint with its training state, or a revision")
    made.add_argument("target", metavar="TO", type=Path, help="later checkpoint or revision of the same run")
    made.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="packed training data, one folder per dataset (default: the run's paths); where shards are missing, "
        "manifest.json and the .idx files are enough",
    )
    made.add_argument(
        "--devices",
        type=int,
        help="ranks on this machine (default: as many as in the run, needed for bit equality unless it was trained "
        "with --train.topology_invariant true)",
    )
    made.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="new folder for the replayed run, kept afterwards, with room for one checkpoint, or two in another "
        "environment than the run's; ranks on several nodes must share it (default: a temporary folder)",
    )
    return made


def main() -> int:
    args = parser().parse_args()
    from pretrain.fabric_train import leave
    from pretrain.launch import is_first_process
    from pretrain.release.replay import replay

    try:
        report = replay(args.start, args.target, data=args.data, devices=args.devices, work=args.work)
    except (ValueError, OSError):
        if is_first_process():
            raise
        leave(2)
    if is_first_process():
        print(*report.lines, sep="\n")
    leave(0 if report.passed else 1)


if __name__ == "__main__":
    run_script(main, "interrupted")
