"""Show the contents of a checkpoint; with --verify, check its checksums (exits with 1 on a mismatch).

python scripts/inspect_checkpoint.py runs/mine              # newest checkpoint of a run
python scripts/inspect_checkpoint.py runs/mine/iter-00001000-ckpt.pth --verify
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()

from lit_model.load import Checkpoint, is_hf_folder, resolve
from pretrain.checkpoint.contents import contents_of, describe, faults_of


def main() -> int:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a run folder (its newest)")
    parser.add_argument("--verify", action="store_true", help="compare all of it with its checksums, and only this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    path = resolve(args.path)
    if is_hf_folder(path):
        raise ValueError(f"{path} is a Hugging Face folder, not a checkpoint")
    if not args.verify:
        contents = contents_of(Checkpoint(path))
        print(json.dumps(contents) if args.json else describe(contents))
        return 0
    faults = faults_of(path)
    if args.json:
        print(json.dumps({"path": str(path), "faults": faults}))
    else:
        print("\n".join([*faults, f"{path}: {f'{len(faults)} faults' if faults else 'no fault'}"]))
    return 1 if faults else 0


if __name__ == "__main__":
    run_script(main)
