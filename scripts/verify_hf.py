"""Compare the loss of every validation span between a run's checkpoint and its converted folder in transformers.

With --eval.max_samples in training, of the spans in these rows.

python scripts/verify_hf.py --run runs/mine --hf hf/
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import ScriptParser, end_on_ctrl_c, run_script

end_on_ctrl_c()


def main() -> int:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--hf", type=Path, required=True, help="its newest checkpoint as convert_to_hf.sh wrote it")
    args = parser.parse_args()
    from pretrain.convert.agreement import TOLERANCE, compare_with_transformers

    agreements = compare_with_transformers(args.run, args.hf)
    for name, agreement in agreements.items():
        print(f"{name}: {agreement}" if name else agreement)
    return 0 if all(agreement.largest_difference <= TOLERANCE for agreement in agreements.values()) else 1


if __name__ == "__main__":
    run_script(main, "interrupted")
