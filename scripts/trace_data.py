"""Query a run's datapoint record: the data of a step, the steps of a document, the data between two checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pretrain.cli.command_line import end_on_ctrl_c

end_on_ctrl_c()


from lit_data.packed.documents import Documents
from lit_data.record.exposures import count_exposures, draw_exposures
from lit_data.record.sql import SORTS, difference, export
from lit_data.record.trace import TracedRun, left_out_of_document, open_run, spans_of_document, spans_of_step
from lit_data.record.verify import verify
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_files.checkpoint_name import checkpoint_step
from pretrain.cli.command_line import ScriptParser

NUMBER = re.compile(r"#(?:(\d+):)?(\d+)")


def parser() -> ScriptParser:
    top = ScriptParser(description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> ScriptParser:
        made = commands.add_parser(name, help=help)
        made.add_argument("run", type=Path)
        return made

    step = command("step", "the documents and token spans of a step (0-based), with their text")
    step.add_argument("step", type=int)
    step.add_argument("--max_chars", type=int, default=80, help="characters of text shown of a span (default 80)")
    document = command("document", "every step that saw a document, and its loss there")
    document.add_argument("document", help="its id, or #N for the N-th document of the dataset, #D:N of dataset D")
    between = command("diff", "the documents seen between two checkpoints (needs duckdb)")
    between.add_argument(
        "first", metavar="A", help="a checkpoint's name, or a number of steps done; 0 is the beginning"
    )
    between.add_argument("last", metavar="B", help="likewise, later")
    between.add_argument("--new", action="store_true", help="only documents of which nothing was seen before A")
    between.add_argument(
        "--sort", choices=list(SORTS), default="tokens", help="order of the documents (default tokens)"
    )
    between.add_argument("--limit", type=int, default=20, help="documents shown, 0 for all (default 20)")
    command("verify", "re-read the tokens from the shards and compare with the record")
    out = command("export", "write the record for users of SQL or tables (needs duckdb)")
    out.add_argument("file", type=Path, help=".duckdb (tables spans, documents, steps; view seen), .parquet or .csv")
    exposures = command("exposures", "how often the tokens were seen, over the steps")
    exposures.add_argument("--picture", type=Path, help="a .png, .pdf or .svg to draw it to (needs matplotlib)")
    for made in commands.choices.values():
        made.add_argument("--data", type=Path, help="where the packed training data is now, if it was moved")
        made.add_argument("--json", action="store_true", help="print one JSON object a line")
    return top


def say(record: dict[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=False))


def mean(row: dict[str, Any]) -> str:
    return f"{row['loss'] / row['targets']:.4f}" if row["targets"] else "-"


def print_step(run: TracedRun, args: argparse.Namespace) -> None:
    folder = run.folder / "tokenizer"
    tokenizer = open_tokenizer(folder) if folder.is_dir() else None
    rows = spans_of_step(run, args.step).to_pylist()
    documents = [Documents(dataset) for dataset in run.datasets]
    facts = []
    for number, dataset in enumerate(documents):
        mine = [row["document"] for row in rows if row["dataset"] == number]
        facts.append(dataset.facts(mine, ["id", "source"]))
    for row in rows:
        about = facts[row["dataset"]][row["document"]]
        dataset = documents[row["dataset"]]
        start = dataset.start(row["document"]) + row["start"]
        # A token may be a single byte of a character.
        shown = row["length"] if args.json else min(row["length"], 4 * args.max_chars)
        tokens = dataset.tokens(start, start + shown).tolist()
        text = tokenizer.decode(tokens) if tokenizer is not None else " ".join(map(str, tokens))
        if args.json:
            say({**row, **about, "text": text})
        else:
            span = f"{row['start']}..{row['start'] + row['length']}"
            print(f"row {row['row']:4d}  rank {row['rank']}  {about['id']}  tokens {span}  loss {mean(row)}")
            print(f"          {' '.join(text[: args.max_chars].split())}")


def find_documents(run: TracedRun, name: str) -> list[tuple[int, int]]:
    """(dataset, document) of all documents with an id, or of the one given as `#N` or `#D:N`."""
    if match := NUMBER.fullmatch(name):
        if match[1] is None and len(run.datasets) > 1:
            raise ValueError(f"{name}: the run has {len(run.datasets)} datasets; give #D:N for document N of dataset D")
        dataset, number = int(match[1] or 0), int(match[2])
        if dataset >= len(run.datasets):
            raise ValueError(f"{name}: the run has {len(run.datasets)} datasets, numbered from 0")
        if number >= run.datasets[dataset].n_documents:
            raise ValueError(
                f"{name}: {run.datasets[dataset].path} has {run.datasets[dataset].n_documents} documents, from 0 on"
            )
        return [(dataset, number)]
    found = [(d, n) for d, dataset in enumerate(run.datasets) for n in Documents(dataset).find(name)]
    if not found:
        places = ", ".join(str(d.path) for d in run.datasets)
        raise ValueError(f"no document has the id {name!r} in {places} (give #N for the N-th document)")
    return found


def print_document(run: TracedRun, args: argparse.Namespace) -> None:
    for number, document in find_documents(run, args.document):
        dataset = Documents(run.datasets[number])
        about = dataset.facts([document], ["id", "source"])[document]
        rows = spans_of_document(run, document, number).to_pylist()
        if not args.json:
            name = f"#{number}:{document}" if len(run.datasets) > 1 else f"#{document}"
            length = dataset.start(document + 1) - dataset.start(document)
            steps = len({r["step"] for r in rows})
            print(f"document {name} {about['id']} ({about['source']}): {length} tokens, seen in {steps} steps")
        for row in rows:
            if args.json:
                say({**row, "id": about["id"]})
            else:
                span = f"{row['start']}..{row['start'] + row['length']}"
                print(f"  step {row['step']:8d}  row {row['row']:4d}  tokens {span}  mean loss {mean(row)}")
        for sample, reason in left_out_of_document(run, document, number):
            if args.json:
                say({"document": document, "dataset": number, "id": about["id"], "left_out": sample, "reason": reason})
            else:
                print(f"  left out: sample {sample} ({reason})")


def steps_done(run: TracedRun, name: str) -> int:
    """Optimizer steps completed, from a number, or the name or path of a checkpoint."""
    steps = int(name) if name.isdigit() else checkpoint_step(Path(name))
    if steps is None:
        raise ValueError(f"{name!r} is neither a number of steps nor a checkpoint's name (iter-XXXXXXXX-ckpt.pth)")
    if steps > run.steps:
        raise ValueError(f"{name}: the record of {run.folder} ends with the checkpoint after {run.steps} steps")
    return steps


def print_difference(run: TracedRun, args: argparse.Namespace) -> None:
    first, last = steps_done(run, args.first), steps_done(run, args.last)
    if first >= last:
        raise ValueError(f"diff {args.first} {args.last}: the first must lie before the second")
    found = difference(run.folder, run.datasets, first, last, new=args.new, sort=args.sort, limit=args.limit)
    if args.json:
        for row in found.rows:
            say(row)
        return
    loss = "-" if found.mean_loss is None else f"{found.mean_loss:.4f}"
    kind = "new documents" if args.new else "documents"
    print(f"steps {first} to {last - 1}: {found.documents} {kind}, {found.tokens} tokens, mean loss {loss}")
    for row in found.rows:
        loss = "     -" if row["mean_loss"] is None else f"{row['mean_loss']:6.4f}"
        name = f"#{row['dataset']}:{row['document']}" if len(run.datasets) > 1 else f"#{row['document']}"
        print(f"  {row['tokens']:8d} tokens  {row['exposures']:7.3f} times  mean loss {loss}  {name} {row['id']}")
    if len(found.rows) < found.documents:
        print(f"  and {found.documents - len(found.rows)} more (--limit 0 shows all)")


def print_exposures(run: TracedRun, args: argparse.Namespace) -> None:
    counted = count_exposures(run)
    if args.picture is not None:
        draw_exposures(counted, args.picture)
    for number, seen in enumerate(counted):
        if args.json:
            for step, shares in zip(seen.steps.tolist(), seen.shares.tolist(), strict=True):
                say({"dataset": number, "path": str(seen.path), "steps": step, "shares": shares})
        else:
            shares = ", ".join(f"{n} times {share:.4f}" for n, share in enumerate(seen.shares[-1].tolist()))
            print(f"{seen.path} after {run.steps} steps, share of the tokens seen: {shares}")


def main() -> int:
    args = parser().parse_args()
    try:
        run = open_run(args.run, args.data)
        if args.command == "step":
            print_step(run, args)
        elif args.command == "document":
            print_document(run, args)
        elif args.command == "diff":
            print_difference(run, args)
        elif args.command == "export":
            export(run.folder, run.datasets, run.steps, args.file)
            print(f"{args.file}: {run.steps} steps")
        elif args.command == "exposures":
            print_exposures(run, args)
        else:
            faults = verify(run)
            for fault in faults:
                print(fault)
            verdict = "no fault" if not faults else f"{len(faults)} faults"
            data = ", ".join(str(d.path) for d in run.datasets)
            print(f"{run.folder}: {run.steps} steps checked against {data}, {verdict}")
            return 1 if faults else 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
