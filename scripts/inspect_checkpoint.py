"""Show the contents of a checkpoint; with --verify, check its checksums (exits with 1 on a mismatch).

Of a run with --save.at_words also the checkpoint of each word budget.

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


def main() -> int:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a run folder (its newest)")
    parser.add_argument("--verify", action="store_true", help="compare all of it with its checksums, and only this")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    from lit_files.checkpoint_name import budget_name
    from lit_model.load import Checkpoint, is_hf_folder, resolve
    from pretrain.checkpoint.contents import contents_of, describe, faults_of, word_budgets_in

    path = resolve(args.path)
    if is_hf_folder(path):
        raise ValueError(f"{path} is a Hugging Face folder, not a checkpoint")
    if not args.verify:
        contents = contents_of(Checkpoint(path))
        budgets = {budget_name(words): found.name for words, found in word_budgets_in(args.path).items()}
        if args.json:
            print(json.dumps(contents | ({"run_word_budgets": budgets} if budgets else {})))
        else:
            print("\n".join([describe(contents), *(f"  at {name} words: {found}" for name, found in budgets.items())]))
        return 0
    faults = faults_of(path)
    if args.json:
        print(json.dumps({"path": str(path), "faults": faults}))
    else:
        print("\n".join([*faults, f"{path}: {f'{len(faults)} faults' if faults else 'no fault'}"]))
    return 1 if faults else 0


if __name__ == "__main__":
    run_script(main, "interrupted")
