"""For tests of the record: a run folder without a model, whose record tests/harness/record_writer.py writes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import record_writer
import yaml
from record_writer import RANKS, ROWS, STEPS
from running import write_dataset
from whole_record import read_record

from lit_data.loading.loader import Loader, RankLayout
from lit_data.loading.mixture import Mixture
from lit_data.loading.order import Order, Segment, row_of
from lit_data.loading.rows import ConcatRows
from lit_data.packed.reader import PackedDataset
from lit_data.record.order_file import describe_order, write_order
from lit_data.record.parts import newest_checkpoint_step
from lit_data.record.schema import SCHEMA
from lit_data.record.span_hash import hash_spans
from lit_data.record.trace import open_run
from lit_data.record.verify import verify

BLOCK_SIZE, SEED = 16, 5
WRITER = Path(__file__).resolve().parent / "record_writer.py"


def prepare(folder: Path) -> tuple[Path, pa.Table]:
    """Create a started run folder in `folder`; returns it and the expected final record, taken from the loader."""
    path = write_dataset(folder / "data", [1 + 7 * i % 40 for i in range(60)])
    dataset = PackedDataset(path)
    rows_of = ConcatRows(dataset, BLOCK_SIZE)
    mixture = Mixture.single(Order(rows_of.n_windows, SEED))
    segments = [Segment(0, 0, RANKS * ROWS)]
    steps, rows = [], []
    for rank in range(RANKS):
        loader = Loader([rows_of], mixture, RankLayout(BLOCK_SIZE, ROWS, rank, RANKS), segments)
        read = [loader.read_step(step).micro_batches for step in range(STEPS)]
        steps.append([[vars(b.spans) | {"tokens": b.tokens.numpy()} for b in batches] for batches in read])
        for step, batches in enumerate(steps[-1]):
            for m, b in enumerate(batches):
                b["hash"] = hash_spans(b["tokens"].reshape(-1), b["length"])
                for i in range(len(b["document"])):
                    if b["document"][i] < 0:
                        continue
                    row = int(b["row"][i])
                    values = [step, rank, m, row_of(m, rank, row, RANKS, ROWS), b["sample"][row], 0]
                    values += [b[k][i] for k in ("document", "start", "length", "targets", "hash")]
                    rows.append([*map(int, values), int(b["hash"][i]) % 1000 / 100, True])
    rows.sort(key=lambda r: (r[0], r[3], r[6], r[7]))
    run = folder / "run"
    run.mkdir()
    (run / "steps.pickle").write_bytes(pickle.dumps(steps))
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"train": str(path)}}))
    write_order(run / "datapoints", describe_order([rows_of], mixture, segments), (0, RANKS, ROWS))
    return run, pa.Table.from_pylist([dict(zip(SCHEMA.names, r, strict=True)) for r in rows], schema=SCHEMA)


def write(run: Path, *arguments: str, before: tuple[str, ...] = ()) -> int:
    """Resume the writer; returns its exit status (137 or -9 for a kill, which needs a separate process)."""
    if not arguments and not before:
        record_writer.write(run)
        return 0
    command = [*before, sys.executable, str(WRITER), str(run), *arguments]
    return subprocess.run(command, timeout=120, check=False).returncode


def check(run: Path, expected: pa.Table) -> int:
    """Check that the record up to the newest checkpoint is exact and passes `verify`; returns that step."""
    steps = newest_checkpoint_step(run)
    assert read_record(run).equals(expected.filter(pc.less(expected["step"], steps)))
    if steps:
        assert verify(open_run(run)) == []
    return steps
