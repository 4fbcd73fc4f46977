"""Queries over the entire record by DuckDB within a memory limit: differences and export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lit_data.packed.documents import Documents
from lit_data.packed.reader import PackedDataset
from lit_data.record.parts import Part, committed_parts, list_parts
from lit_files.database import open_database, quoted, showing
from lit_files.progress import track
from lit_files.publish import publish, scratch_folder, sync_file
from lit_files.run_files import DATAPOINTS

MERGED = " (if the run is still training, parts of its record were merged meanwhile: try again)"
EXPORTS = (".duckdb", ".parquet", ".csv")
SORTS = {
    "document": "dataset, document",
    "tokens": "tokens DESC, dataset, document",
    "loss": "mean_loss DESC NULLS LAST, dataset, document",
}


def record_sql(run: Path, first_step: int, end_step: int) -> str:
    """SQL that selects the committed rows of steps `first_step` to `end_step - 1`, each once."""
    whole = set(list_parts(run / DATAPOINTS))
    inside = [p for p in committed_parts(run) if p.end_step > first_step and p.first_step < end_step]
    if not inside:
        raise ValueError(f"{run} has no committed record of steps {first_step} to {end_step - 1}")
    selects = []
    if uncut := [p for p in inside if p in whole]:
        selects.append(_select(uncut, first_step, end_step))
    for part in inside:
        if part not in whole:
            selects.append(_select([part], max(part.first_step, first_step), min(part.end_step, end_step)))
    return "(" + " UNION ALL ".join(selects) + ")"


def _select(parts: Sequence[Part], first: int, end: int) -> str:
    files = ", ".join(quoted(p.path) for p in parts)
    return f"SELECT * FROM read_parquet([{files}]) WHERE step >= {first} AND step < {end}"


@dataclass
class Difference:
    """The data a run saw between two steps.

    Attributes:
        documents, tokens, mean_loss: over all of it.
        rows: per document, in the requested order and number: dataset, document, spans, tokens (seen in between),
            exposures (tokens seen over the document's length), mean_loss (nats per target, None without targets), id
            and source.
    """

    documents: int
    tokens: int
    mean_loss: float | None
    rows: list[dict[str, Any]]


def difference(
    run: Path,
    datasets: Sequence[PackedDataset],
    first_step: int,
    end_step: int,
    *,
    new: bool = False,
    sort: str = "tokens",
    limit: int = 20,
) -> Difference:
    """The documents seen in steps `first_step` to `end_step - 1`.

    Args:
        new: only documents not seen at all before; this reads two columns of the entire earlier record.
        sort: a key of SORTS.
        limit: maximum number of rows, 0 for all.
    """
    grouped = (
        "SELECT dataset, document, count(*) AS spans, sum(length)::BIGINT AS tokens, sum(loss) AS loss, "
        f"sum(targets)::BIGINT AS targets FROM {record_sql(run, first_step, end_step)} GROUP BY dataset, document"
    )
    with open_database(hint=MERGED) as database, showing(database, "reading the record"):
        database.execute(f"CREATE TEMP TABLE seen AS {grouped}")
        if new and first_step > 0:
            before = f"{record_sql(run, 0, first_step)} AS before"
            database.execute(
                f"CREATE TEMP TABLE old AS SELECT DISTINCT dataset, document FROM {before} "
                "SEMI JOIN seen USING (dataset, document)"
            )
            database.execute(
                "DELETE FROM seen USING old WHERE seen.dataset = old.dataset AND seen.document = old.document"
            )
        totals = "SELECT count(*), coalesce(sum(tokens), 0)::BIGINT, sum(loss) / nullif(sum(targets), 0) FROM seen"
        documents, tokens, mean_loss = database.execute(totals).fetchone()
        asked = (
            "SELECT dataset, document, spans, tokens, loss / nullif(targets, 0) AS mean_loss FROM seen "
            f"ORDER BY {SORTS[sort]} {f'LIMIT {limit}' if limit else ''}"
        )
        rows = database.execute(asked).fetchall()
    found: list[dict[str, Any]] = [
        {"dataset": d, "document": n, "spans": s, "tokens": t, "mean_loss": loss} for d, n, s, t, loss in rows
    ]
    for number, dataset in enumerate(datasets):
        mine = [row for row in found if row["dataset"] == number]
        lookup = Documents(dataset)
        facts = lookup.facts([row["document"] for row in mine], ["id", "source"])
        for row in mine:
            n = row["document"]
            row["exposures"] = row["tokens"] / (lookup.start(n + 1) - lookup.start(n))
            row |= facts[n]
    return Difference(documents, tokens, mean_loss, found)


def export(run: Path, datasets: Sequence[PackedDataset], end_step: int, file: Path) -> None:
    """Export the record for SQL or tabular tools. Atomic.

    `.duckdb` has the tables spans (the record), documents (dataset, document, id, source, place, bytes, tokens) and
    steps (one row per step), and the view seen, which joins spans with ids. `.parquet` and `.csv` contain that view,
    sorted.

    Raises ValueError for any other suffix, or if the file exists.
    """
    if file.suffix not in EXPORTS:
        raise ValueError(f"{file}: the ending decides the format and must be one of {', '.join(EXPORTS)}")
    if file.exists():
        raise ValueError(f"{file} exists already; choose another name or remove it")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent} is not a folder, so {file.name} cannot be written there")
    with scratch_folder(file) as work:
        with open_database(work / "record.duckdb", folder=work, hint=MERGED) as database:
            _fill(database, run, datasets, end_step)
            made = work / "record.duckdb"
            if file.suffix != ".duckdb":
                made = work / f"record{file.suffix}"
                form = "FORMAT parquet, COMPRESSION zstd" if file.suffix == ".parquet" else "FORMAT csv, HEADER"
                sorted_rows = "SELECT * FROM seen ORDER BY step, row, document, start"
                with showing(database, f"writing {file.name}"):
                    database.execute(f"COPY ({sorted_rows}) TO {quoted(made)} ({form})")
        sync_file(made)
        publish(made, file)


def _fill(database: Any, run: Path, datasets: Sequence[PackedDataset], end_step: int) -> None:
    with showing(database, "reading the record"):
        database.execute(f"CREATE TABLE spans AS SELECT * FROM {record_sql(run, 0, end_step)}")
    database.execute(
        "CREATE TABLE documents (dataset INTEGER, document BIGINT, id VARCHAR, source VARCHAR, place BIGINT, "
        "bytes BIGINT, tokens BIGINT)"
    )
    columns = ["document", "id", "source", "place", "bytes", "tokens"]
    for number, dataset in enumerate(datasets):
        tables = Documents(dataset).batches()
        for table in track(tables, "adding documents", "documents", dataset.n_documents, size=lambda t: t.num_rows):
            numbers = pa.array(np.full(table.num_rows, number, dtype=np.int32))
            database.register("batch", table.select(columns).add_column(0, "dataset", numbers))
            database.execute("INSERT INTO documents SELECT * FROM batch")
            database.unregister("batch")
    with showing(database, "adding steps"):
        database.execute(
            "CREATE TABLE steps AS SELECT step, max(sample) - min(sample) + 1 AS samples, count(*) AS spans, "
            "sum(length)::BIGINT AS tokens, sum(targets)::BIGINT AS targets, "
            "sum(loss) / nullif(sum(targets), 0) AS mean_loss, bool_and(applied) AS applied "
            "FROM spans GROUP BY step ORDER BY step"
        )
    database.execute(
        "CREATE VIEW seen AS SELECT spans.*, documents.id, documents.source "
        "FROM spans LEFT JOIN documents USING (dataset, document)"
    )
