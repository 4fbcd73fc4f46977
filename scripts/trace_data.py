"""Query a run's datapoint record: the data of a step, the steps of a document and their effect, the data between two
checkpoints.

    python scripts/trace_data.py step runs/mine 100
    python scripts/trace_data.py document runs/mine ID
    python scripts/trace_data.py verify runs/mine
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import PICTURES, ScriptParser, check_file, end_on_ctrl_c, run_script

end_on_ctrl_c()


def parser() -> ScriptParser:
    top = ScriptParser(description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> ScriptParser:
        made = commands.add_parser(name, help=help)
        made.add_argument("run", type=Path, help="run folder")
        return made

    step = command("step", "the documents and token spans of a step (0-based), with their text")
    step.add_argument("step", type=int)
    step.add_argument("--max_chars", type=int, default=80, help="characters of text shown of a span (default 80)")
    document = command("document", "every step that saw a document, and its loss there")
    document.add_argument("document", help="its id, or #N for number N of the dataset, from 0, #D:N of dataset D")
    between = command("diff", "the documents seen between two checkpoints (needs duckdb)")
    between.add_argument("first", metavar="A", help="a checkpoint's name, or a number of steps done; 0: the beginning")
    between.add_argument("last", metavar="B", help="likewise, later")
    between.add_argument("--new", action="store_true", help="only documents of which nothing was seen before A")
    between.add_argument(
        "--sort", choices=["document", "tokens", "loss"], default="tokens", help="order of documents (default tokens)"
    )
    between.add_argument("--limit", type=int, default=20, help="documents shown, 0 for all (default 20)")
    command("verify", "re-read the tokens from the shards and compare with the record")
    out = command("export", "write the record for users of SQL or tables (needs duckdb)")
    out.add_argument("file", type=Path, help=".duckdb (tables spans, documents, steps; view seen), .parquet or .csv")
    exposures = command("exposures", "how often the tokens were seen, over the steps")
    exposures.add_argument("--picture", type=Path, help="a .png, .pdf or .svg to draw it to (needs matplotlib)")
    without = command(
        "influence", "a document's effect on later losses: its steps re-executed with its targets ignored"
    )
    without.add_argument(
        "--document", required=True, help="its id, or #N, #D:N; all documents with the id are ignored together"
    )
    without.add_argument(
        "--steps", type=int, help="steps to execute from its first exposure on (default: up to the newest checkpoint)"
    )
    without.add_argument(
        "--random", type=int, default=3, help="control runs that ignore random spans of the same steps (default 3)"
    )
    without.add_argument("--seed", type=int, default=0, help="of these random spans (default 0)")
    without.add_argument("--devices", type=int, help="ranks on this machine (default: as many as in the run)")
    without.add_argument(
        "--work",
        type=Path,
        help="new folder for the executed runs, kept without their tensors, with room for one checkpoint (default: a "
        "temporary folder)",
    )
    for made in commands.choices.values():
        made.add_argument("--data", type=Path, help="where the packed training data is now, if it was moved")
        made.add_argument("--json", action="store_true", help="print one JSON object a line")
    return top


def show(answer: Iterable[tuple[dict[str, Any] | None, str | None]], as_json: bool) -> None:
    for record, text in answer:
        if as_json and record is not None:
            print(json.dumps(record, ensure_ascii=False))
        elif not as_json and text is not None:
            print(text)


def main() -> int:
    args = parser().parse_args()
    check_file("--picture", getattr(args, "picture", None), *PICTURES)
    from lit_data.record.answers import difference_answer, document_answer, exposures_answer, step_answer
    from lit_data.record.exposures import count_exposures, draw_exposures
    from lit_data.record.sql import export
    from lit_data.record.trace import open_run
    from lit_data.record.verify import verify

    run = open_run(args.run, args.data)
    if args.command == "step":
        show(step_answer(run, args.step, args.max_chars), args.json)
    elif args.command == "document":
        show(document_answer(run, args.document), args.json)
    elif args.command == "diff":
        answer = difference_answer(run, args.first, args.last, new=args.new, sort=args.sort, limit=args.limit)
        show(answer, args.json)
    elif args.command == "export":
        export(run.folder, run.datasets, run.steps, args.file)
        print(f"{args.file}: {run.steps} steps")
    elif args.command == "exposures":
        counted = count_exposures(run)
        if args.picture is not None:
            draw_exposures(counted, args.picture)
        show(exposures_answer(run, counted), args.json)
    elif args.command == "influence":
        from pretrain.fabric_train import leave
        from pretrain.launch import is_first_process
        from pretrain.release.influence import InfluenceArgs, influence

        settings = InfluenceArgs(args.document, args.steps, args.random, args.seed, args.devices, args.work)
        try:  # in as many processes as the run had; the first one prints
            for record in influence(run, settings, [] if args.data is None else [args.data]):
                if is_first_process():
                    show([record], args.json)
        except (ValueError, OSError):
            if is_first_process():
                raise
            leave(2)
        leave(0)
    else:
        faults = verify(run)
        verdict = f"{len(faults)} faults" if faults else "no fault"
        data = ", ".join(str(d.path) for d in run.datasets)
        print(*faults, f"{run.folder}: {run.steps} steps checked against {data}, {verdict}", sep="\n")
        return 1 if faults else 0
    return 0


if __name__ == "__main__":
    run_script(main, "interrupted")
