"""Write a report as one HTML file: of a run, also while it runs; or a comparison of several runs, models or results.

python scripts/report.py runs/mine                             # writes runs/mine/report.html
python scripts/report.py runs/a runs/b --output compare.html
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import NOTHING_WRITTEN, ScriptParser, check_file, end_on_ctrl_c, run_script

end_on_ctrl_c()

from lit_eval.report.defaults import RECORD_S
from lit_files.run_files import REPORT


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="RUN|RESULTS",
        help="run folders, checkpoints, Hugging Face folders, files of results; a single run gets its own report",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=f"HTML file (default: RUN/{REPORT}, or comparison.html for several)"
    )
    parser.add_argument(
        "--record_s", type=float, default=RECORD_S, metavar="S",
        help=f"seconds at most for reading the run's record (default {RECORD_S:g})",
    )  # fmt: skip
    args = parser.parse_args()
    check_file("--output", args.output, ".html")
    if not 0 <= args.record_s < float("inf"):
        raise ValueError(f"--record_s {args.record_s} must be a number of 0 or more")
    from lit_eval.compare.entries import read_entries
    from lit_eval.report.comparison_report import comparison_report
    from lit_eval.report.run_report import run_report
    from lit_eval.run_facts import is_run
    from lit_files.publish import write_text
    from pretrain.logs.report import default_settings

    if len(args.paths) == 1 and is_run(args.paths[0]):
        output = args.output or args.paths[0] / REPORT
        html = run_report(args.paths[0], default_settings(), args.record_s)
    else:
        output = args.output or Path("comparison.html")
        html = comparison_report(read_entries(args.paths))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, html)
    print(f"{output}: {len(html.encode()) / 1000:,.0f} kB")


if __name__ == "__main__":
    run_script(main, NOTHING_WRITTEN)
