"""Compare runs, models and results: ranks, sizes, speeds, scores with intervals, paired tests, settings that differ.

python scripts/compare.py runs/sweep/*
python scripts/compare.py runs/a runs/b --html comparison.html --png curves.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import ScriptParser, check_file, end_on_ctrl_c, run_script

end_on_ctrl_c()


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="MODEL|RUN|RESULTS",
        help="run folders, checkpoints, Hugging Face folders, results of scripts/evaluate.py",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the comparison page")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the learning curves (needs matplotlib)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap (default 0)")
    args = parser.parse_args()
    check_file("--html", args.html, ".html")
    check_file("--png", args.png, ".png")
    from lit_eval.compare.comparison import compare
    from lit_eval.compare.entries import read_entries
    from lit_eval.compare.learning_curves import draw, learning_curves
    from lit_eval.compare.text import as_json, as_text
    from lit_eval.report.comparison_report import comparison_report
    from lit_files.publish import write_text

    entries = read_entries(args.paths)
    comparison = compare(entries, args.seed)
    if args.html is not None:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.html, comparison_report(entries, args.seed))
    if args.png is not None:
        args.png.parent.mkdir(parents=True, exist_ok=True)
        draw(learning_curves(comparison.entries, args.seed), args.png)
    print(json.dumps(as_json(comparison), ensure_ascii=False) if args.json else as_text(comparison))


if __name__ == "__main__":
    run_script(main, "interrupted")
