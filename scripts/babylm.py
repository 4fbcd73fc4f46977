"""The BabyLM challenge in one call: from its text files to a trained model, scores, a report and the submission.

    python scripts/babylm.py --train train_10M/ --dev dev/ --out_dir runs/babylm
    python scripts/babylm.py --train train_10M/ --dev dev/ --out_dir runs/babylm --evaluation_data evaluation_data/
    python scripts/babylm.py --train train_100M/ --dev dev/ --out_dir runs/strict --model llama-95M -- --devices 4
    python scripts/babylm.py --train train_10M/ --dev dev/ --out_dir runs/babyllama --model distillation \
        --teachers llama-360M gpt-705M

Runs commands of this project, each printed with a $ before it. Flags after -- go to every call of fabric_train.py, but
those of --distillation to the model's alone. Steps that are done are skipped: repeat an interrupted call to resume it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import RESUMES, ScriptParser, end_on_ctrl_c, given_fields, run_script

end_on_ctrl_c()

from pretrain.pipeline.babylm_settings import BabylmSettings


def main() -> int:
    parser = ScriptParser(description=__doc__, allow_abbrev=False)
    parser.add_fields(BabylmSettings)
    parser.add_argument("flags", nargs="*", default=[], metavar="-- FLAGS", help="more flags of fabric_train.py")
    args = parser.parse_args()
    settings = BabylmSettings(**given_fields(BabylmSettings, args))
    sys.path.append(os.getcwd())  # for the user's module:function
    from pretrain.pipeline.babylm import babylm

    return babylm(settings, args.flags)


if __name__ == "__main__":
    run_script(main, RESUMES)
