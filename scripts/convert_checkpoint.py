"""Convert a checkpoint, including the optimizer state, to one file (full) or a folder (sharded).

python scripts/convert_checkpoint.py runs/mine/iter-00001000-ckpt.pth whole/iter-00001000-ckpt.pth --to full
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
        "checkpoint", type=Path, metavar="CHECKPOINT", help="an iter-XXXXXXXX-ckpt.pth, or a run folder (its newest)"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="file or folder to write; must not exist")
    parser.add_argument("--to", choices=["full", "sharded"], required=True)
    args = parser.parse_args()
    from pretrain.convert.full_and_sharded import convert_checkpoint

    path = convert_checkpoint(args.checkpoint, args.output, args.to)
    print(f"{path} -> {args.output} ({args.to})")


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
