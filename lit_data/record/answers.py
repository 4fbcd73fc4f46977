"""Answers to queries of a run's datapoint record, each as JSON records and as readable lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_data.packed.documents import Documents
from lit_data.record.exposures import Exposures
from lit_data.record.sql import difference
from lit_data.record.trace import TracedRun, left_out_of_document, spans_of_document, spans_of_step
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_files.checkpoint_name import checkpoint_step

NUMBER = re.compile(r"#(?:(\d+):)?(\d+)")
Answer = Iterator[tuple[dict[str, Any] | None, str | None]]
"""Pairs of a record and its readable form; None: this form leaves it out."""


def step_answer(run: TracedRun, step: int, max_chars: int) -> Answer:
    """The spans of a step with their text; the readable form shows its first `max_chars` characters."""
    folder = run.folder / "tokenizer"
    tokenizer = open_tokenizer(folder) if folder.is_dir() else None
    rows = spans_of_step(run, step).to_pylist()
    documents = [Documents(dataset) for dataset in run.datasets]
    facts = [
        dataset.facts([row["document"] for row in rows if row["dataset"] == number], ["id", "source"])
        for number, dataset in enumerate(documents)
    ]
    for row in rows:
        about, dataset = facts[row["dataset"]][row["document"]], documents[row["dataset"]]
        start = dataset.start(row["document"]) + row["start"]
        tokens = dataset.tokens(start, start + row["length"]).tolist()
        text = tokenizer.decode(tokens) if tokenizer is not None else " ".join(map(str, tokens))
        yield (
            {**row, **about, "text": text},
            f"row {row['row']:4d}  rank {row['rank']}  {about['id']}  tokens {_span(row)}  loss {_mean(row)}\n"
            f"          {' '.join(text[:max_chars].split())}",
        )


def document_answer(run: TracedRun, name: str) -> Answer:
    """The steps that saw a document, given by its id (or all documents with that id), or as #N or #D:N."""
    for number, document in find_documents(run, name):
        dataset = Documents(run.datasets[number])
        about = dataset.facts([document], ["id", "source"])[document]
        rows = spans_of_document(run, document, number).to_pylist()
        length = dataset.start(document + 1) - dataset.start(document)
        steps = len({row["step"] for row in rows})
        title = f"document {document_name(run, number, document)} {about['id']} ({about['source']})"
        yield None, f"{title}: {length} tokens, seen in {steps} steps"
        for row in rows:
            line = f"step {row['step']:8d}  row {row['row']:4d}  tokens {_span(row)}"
            yield {**row, "id": about["id"]}, f"  {line}  mean loss {_mean(row)}"
        for sample, reason in left_out_of_document(run, document, number):
            record = {"document": document, "dataset": number, "id": about["id"], "left_out": sample, "reason": reason}
            yield record, f"  left out: sample {sample} ({reason})"


def difference_answer(run: TracedRun, first: str, last: str, *, new: bool, sort: str, limit: int) -> Answer:
    """The documents seen between two checkpoints, each given by its name or its number of steps; see `difference`."""
    begin, end = _steps_done(run, first), _steps_done(run, last)
    if begin >= end:
        raise ValueError(f"diff {first} {last}: the first must be before the second")
    found = difference(run.folder, run.datasets, begin, end, new=new, sort=sort, limit=limit)
    loss = "-" if found.mean_loss is None else f"{found.mean_loss:.4f}"
    kind = "new documents" if new else "documents"
    yield None, f"steps {begin} to {end - 1}: {found.documents} {kind}, {found.tokens} tokens, mean loss {loss}"
    for row in found.rows:
        loss = "     -" if row["mean_loss"] is None else f"{row['mean_loss']:6.4f}"
        seen = f"{row['tokens']:8d} tokens  {row['exposures']:7.3f} times  mean loss {loss}"
        yield row, f"  {seen}  {document_name(run, row['dataset'], row['document'])} {row['id']}"
    if len(found.rows) < found.documents:
        yield None, f"  and {found.documents - len(found.rows)} more (--limit 0 shows all)"


def exposures_answer(run: TracedRun, counted: list[Exposures]) -> Answer:
    """How often the tokens of each dataset were seen: records along the steps, one line after the last step."""
    for number, seen in enumerate(counted):
        for step, shares in zip(seen.steps.tolist(), seen.shares.tolist(), strict=True):
            yield {"dataset": number, "path": str(seen.path), "steps": step, "shares": shares}, None
        text = ", ".join(f"{n} times {share:.4f}" for n, share in enumerate(seen.shares[-1].tolist()))
        yield None, f"{seen.path} after {run.steps} steps, share of the tokens seen: {text}"


def find_documents(run: TracedRun, name: str) -> list[tuple[int, int]]:
    """(dataset, document) of each document with a name. Raises ValueError if there is none."""
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
        folders = ", ".join(str(d.path) for d in run.datasets)
        raise ValueError(f"no document has the id {name!r} in {folders} (give #N for document number N, from 0)")
    return found


def _steps_done(run: TracedRun, name: str) -> int:
    """Optimizer steps completed, from a number, or the name or path of a checkpoint."""
    steps = int(name) if name.isdigit() else checkpoint_step(Path(name))
    if steps is None:
        raise ValueError(f"{name!r} is neither a number of steps nor a checkpoint's name (iter-XXXXXXXX-ckpt.pth)")
    if steps > run.steps:
        raise ValueError(f"{name}: the record of {run.folder} ends with the checkpoint after {run.steps} steps")
    return steps


def document_name(run: TracedRun, dataset: int, document: int) -> str:
    return f"#{dataset}:{document}" if len(run.datasets) > 1 else f"#{document}"


def _span(row: dict[str, Any]) -> str:
    return f"{row['start']}..{row['start'] + row['length']}"


def _mean(row: dict[str, Any]) -> str:
    return f"{row['loss'] / row['targets']:.4f}" if row["targets"] else "-"
