"""Questions to a run's datapoint record: `step RUN N`, `document RUN ID`, `verify RUN`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lit_data.datapoints import rows_of
from lit_data.tokenizer import open_tokenizer
from lit_data.trace import TracedRun, open_run, spans_of_document, spans_of_step, verify


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="the documents and token spans of a step (0-based), with their text")
    step.add_argument("run", type=Path)
    step.add_argument("step", type=int)
    step.add_argument("--max_chars", type=int, default=80, help="characters of text shown of a span (default 80)")
    document = commands.add_parser("document", help="every step that saw a document, and its loss there")
    document.add_argument("run", type=Path)
    document.add_argument("document", help="its id, or #N for the N-th document of the dataset")
    check = commands.add_parser("verify", help="re-read the tokens from the shards and compare with the record")
    check.add_argument("run", type=Path)
    for command in (step, document, check):
        command.add_argument("--data", type=Path, help="where the packed training data lies now, if it was moved")
        command.add_argument("--json", action="store_true", help="print one JSON object a line")
    return top


def print_step(run: TracedRun, args: argparse.Namespace) -> None:
    folder = run.folder / "tokenizer"
    tokenizer = open_tokenizer(folder) if folder.is_dir() else None
    for row in rows_of(spans_of_step(run, args.step)):
        facts = run.dataset.document(row["document"])
        start = facts["start"] + row["start"]
        tokens = run.dataset.tokens(start, start + row["length"]).tolist()
        text = tokenizer.decode(tokens) if tokenizer is not None else " ".join(map(str, tokens))
        if args.json:
            print(json.dumps({**row, "id": facts["id"], "source": facts["source"], "text": text}, ensure_ascii=False))
        else:
            loss = f"loss {row['loss'] / row['targets']:.4f}" if row["targets"] else "no target"
            span = f"{row['start']}..{row['start'] + row['length']}"
            print(f"row {row['row']:4d}  rank {row['rank']}  {facts['id']}  tokens {span}  {loss}")
            print(f"          {' '.join(text[: args.max_chars].split())}")


def print_document(run: TracedRun, args: argparse.Namespace) -> None:
    name: str = args.document
    numbers = [int(name[1:])] if name.startswith("#") and name[1:].isdigit() else run.dataset.find(name)
    if not numbers:
        raise ValueError(f"no document has the id {name!r} in {run.dataset.path} (give #N for the N-th document)")
    for number in numbers:
        facts = run.dataset.document(number)
        rows = list(rows_of(spans_of_document(run, number)))
        if not args.json:
            seen = sorted({r["step"] for r in rows})
            print(
                f"document #{number} {facts['id']} ({facts['source']}): {facts['tokens']} tokens, "
                f"seen in {len(seen)} steps"
            )
        for row in rows:
            if args.json:
                print(json.dumps({**row, "id": facts["id"]}, ensure_ascii=False))
            else:
                loss = f"{row['loss'] / row['targets']:.4f}" if row["targets"] else "-"
                span = f"{row['start']}..{row['start'] + row['length']}"
                print(f"  step {row['step']:8d}  row {row['row']:4d}  tokens {span}  mean loss {loss}")


def main() -> int:
    args = parser().parse_args()
    try:
        run = open_run(args.run, args.data)
        if args.command == "step":
            print_step(run, args)
        elif args.command == "document":
            print_document(run, args)
        else:
            faults = verify(run)
            for fault in faults:
                print(fault)
            verdict = "no fault" if not faults else f"{len(faults)} faults"
            print(f"{run.folder}: {run.steps} steps checked against {run.dataset.path}, {verdict}")
            return 1 if faults else 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
