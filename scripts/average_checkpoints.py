"""Average the weights of several checkpoints, for example the last of a run with a constant learning rate.

    python scripts/average_checkpoints.py runs/mine --last 5 --output average.pth
    python scripts/average_checkpoints.py one/iter-00001000-ckpt.pth other/iter-00002000-ckpt.pth --output average.pth

The output is a checkpoint without optimizer state: evaluate.py, generate.py, convert_to_hf.py and --init_from open it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import NOTHING_WRITTEN, ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="checkpoints; or a run folder, with --last")
    parser.add_argument("--last", type=int, metavar="K", help="average the newest K checkpoints of the run folder")
    parser.add_argument("--output", type=Path, required=True, help="file to write; must not exist")
    args = parser.parse_args()
    from pretrain.convert.averaging import average_checkpoints, last_checkpoints

    paths = args.paths
    if args.last is not None:
        if len(paths) > 1:
            raise ValueError(f"--last {args.last} takes one run folder; got {len(paths)} paths")
        paths = last_checkpoints(paths[0], args.last)
    average_checkpoints(paths, args.output)
    print(f"{', '.join(path.name for path in paths)} -> {args.output}")


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
