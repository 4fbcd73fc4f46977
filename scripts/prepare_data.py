"""Turn text into packed datasets: OUTPUT/train, OUTPUT/val, OUTPUT/tokenizer and OUTPUT/report.json.

    python scripts/prepare_data.py --input corpus/ --tokenizer tokenizer/ --output data/ --val_fraction 0.01

Reads .txt (one document per file, or see --split_documents), .jsonl and .json lines, each also .gz or .zst, .parquet;
folders and glob patterns of these; hf:NAME[@CONFIG][:SPLIT] for a Hugging Face dataset. Repeat a killed call to resume
it. On a cluster, --executor slurm submits the stages as jobs; with another scheduler, call --stage hash, join, encode,
merge.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import RESUMES, ScriptParser, end_on_ctrl_c, given_fields, run_script

end_on_ctrl_c()

from lit_data.prepare.settings import Execution, Settings

EXECUTION = "execution: processes, machines and interrupted calls"
GROUPS = {
    "text_field": "reading: fields and documents of the input",
    "cleaner": "cleaning, filters and deduplication; each stage reports what it removed and why",
    "parts": EXECUTION,
}


def main() -> None:
    parser = ScriptParser(description=__doc__, allow_abbrev=False)
    parser.add_fields(Settings, GROUPS, leave_out=["name"])
    parser.add_fields(Execution, {"workers": EXECUTION}, leave_out=["warn_of_large_text"])
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # so that --workers 1 uses one core
    sys.path.append(os.getcwd())  # for the user's module:function
    given = given_fields(Settings, args)
    settings = Settings(**given)
    execution = Execution(**given_fields(Execution, args), warn_of_large_text="split_documents" not in given)
    from lit_data.prepare.command import carry_out

    report = carry_out(settings, execution)
    print(report, end="\n" if report else "")


if __name__ == "__main__":
    run_script(main, RESUMES)
