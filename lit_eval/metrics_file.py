"""Reads a run's metrics.csv of any length into columns. Lines that cannot be read are left out and counted."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv

from lit_files.reading import read_bytes

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

MOST_BYTES = 4 << 30
NAME = re.compile(rb"[^\W\d][^,\r\n]*")


@dataclass(frozen=True)
class Metrics:
    """The rows of a metrics.csv, by ascending step.

    Attributes:
        columns: float64 [rows] by name; NaN where a row has no value.
        written: bool [rows] by name: whether the row has a value, which may be NaN or infinite.
        left_out: lines that could not be read.
    """

    columns: dict[str, FloatArray] = field(default_factory=dict)
    written: dict[str, BoolArray] = field(default_factory=dict)
    left_out: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, name: str) -> FloatArray:
        """A column; NaN in every row if the file does not have it."""
        return self.columns[name] if name in self.columns else np.full(len(self), np.nan)

    def finite(self, name: str) -> FloatArray:
        """The finite values of a column."""
        values = self[name]
        return values[np.isfinite(values)]

    def has(self, name: str) -> bool:
        """Whether a column has at least one finite value."""
        return len(self.finite(name)) > 0

    def not_finite(self, name: str) -> FloatArray:
        """The steps at which a column's value is NaN or infinite."""
        if name not in self.columns:
            return np.zeros(0)
        return self["step"][self.written[name] & ~np.isfinite(self.columns[name])]

    def last(self, name: str) -> float | None:
        """The newest finite value of a column."""
        return float(values[-1]) if len(values := self.finite(name)) else None

    def best(self, name: str) -> float | None:
        """The smallest finite value of a column."""
        return min(self.finite(name).tolist(), default=None)

    def median(self, name: str) -> float | None:
        """The median of a column's finite values."""
        return float(np.median(values)) if len(values := self.finite(name)) else None


def read_metrics(path: Path) -> Metrics:
    """Read a metrics.csv. A last line without an end is being written, or was left by a kill, and is not counted.

    Raises FileNotFoundError, and ValueError that names the file if it has no header.
    """
    content = read_bytes(path, MOST_BYTES)
    content = content[: content.rfind(b"\n") + 1]
    header, _, body = content.partition(b"\n")
    names = header.rstrip(b"\r").split(b",")
    if names[0] != b"step" or len(set(names)) < len(names) or not all(map(NAME.fullmatch, names)):
        raise ValueError(f"{path} has no header of metrics: its first line must begin with `step`")
    columns = [name.decode("utf-8", "replace") for name in names]
    table, left_out = _parse(columns, body)
    step = table["step"].to_numpy()
    order = np.argsort(step, kind="stable") if len(step) and np.any(np.diff(step) < 0) else None
    values, written = {}, {}
    for name in columns:
        column = table[name]
        mine = column.to_numpy(zero_copy_only=False).astype(np.float64)
        there = column.is_valid().to_numpy(zero_copy_only=False)
        values[name], written[name] = (mine, there) if order is None else (mine[order], there[order])
    return Metrics(values, written, left_out)


def _parse(columns: list[str], body: bytes) -> tuple[pa.Table, int]:
    """The rows as float64 columns, null where empty; and the number of lines left out."""
    skipped = 0

    def skip(_row: object) -> str:
        nonlocal skipped
        skipped += 1
        return "skip"

    if not body.strip():
        return pa.table({name: pa.array([], pa.float64()) for name in columns}), 0
    try:
        table = csv.read_csv(
            io.BytesIO(body),
            read_options=csv.ReadOptions(column_names=columns, use_threads=False),
            parse_options=csv.ParseOptions(quote_char=False, invalid_row_handler=skip),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.float64()), null_values=[""]),
        )
        if not table["step"].null_count:
            return table, skipped
    except pa.ArrowInvalid:  # a value that is no number: line by line
        pass
    rows, left_out = [], 0
    for line in body.split(b"\n")[:-1]:
        cells = line.rstrip(b"\r").split(b",")
        try:
            row = [float(cell) if cell else None for cell in cells]
        except ValueError:
            row = []
        if len(row) == len(columns) and row[0] is not None:
            rows.append(row)
        else:
            left_out += 1
    arrays = zip(*rows, strict=True) if rows else ([] for _ in columns)
    return pa.table({n: pa.array(a, pa.float64()) for n, a in zip(columns, arrays, strict=True)}), left_out
