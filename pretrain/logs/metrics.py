"""metrics.csv: columns, appending rows while training, and repair when a run is resumed."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from lit_data.packed.reader import PackedDataset
from lit_eval.formats import perplexity
from lit_files.publish import replace_file
from lit_model.moe import RouterStatistics, load_balance_loss
from pretrain.logs.messages import say, warn

COLUMNS = (
    "step",  # optimizer steps completed
    "tokens",  # input tokens seen, padding not counted
    "words",  # words seen, repeats counted; empty if the data's are not counted
    "epoch",
    "train_loss",  # of this step alone, nats per target
    "val_loss",
    "val_bits_per_byte",
    "lr",
    "grad_norm",  # before clipping
    "skipped",  # steps skipped so far because a gradient was not finite
    "loss_scale",
    "tokens_per_s",
    "mfu",
    "mfu_causal",  # counting half of the attention FLOPs
    "memory_gib",  # peak: allocated on CUDA, resident on a CPU
    "seconds",  # since this process began training
)

# Only for models with experts; over all tokens of this step that have a target.
ROUTER_COLUMNS = (
    "expert_load_max",  # tokens of the busiest expert in any layer, relative to an even load
    "expert_load_min",  # of the least busy one
    "router_entropy",  # of the mean router probabilities, relative to ln(experts); mean over layers
    "load_balance_loss",  # unweighted; 1 at an even load
)

# Only for --objective distillation; train_loss is then the cross-entropy alone.
DISTILLATION_COLUMNS = (
    "alpha",  # weight of the cross-entropy
    "divergence",  # from the teachers, nats per target (mse: squared logits); empty where alpha is 1
    "total_loss",  # minimised loss per target, without z-loss and router losses
)

# Only for named validation sets, as COLUMN/NAME; val_loss and val_bits_per_byte are then those of all sets together.
VALIDATION_COLUMNS = ("val_loss", "val_perplexity", "val_bits_per_byte")

KEPT_ROWS = 10_000  # limit on rows buffered while the disk is full


@dataclass
class Rows:
    """The content of a metrics.csv: header and complete rows, as bytes with line ends."""

    header: bytes
    text: list[bytes]
    damage: str | None

    def steps(self) -> list[int]:
        return [int(row.split(b",", 1)[0]) for row in self.text]


def read_rows(content: bytes, expected: Sequence[str] = COLUMNS) -> Rows:
    """Parse the complete rows of a metrics.csv in any state.

    An unterminated last line comes from a killed run and does not count as damage. `expected`: the columns to assume if
    the header was lost and the rows have that many.
    """
    *lines, torn = content.split(b"\n")
    header, rows, damage = header_line(expected), lines, None
    if not content:
        damage = "it is empty"
    elif lines and columns_of(lines[0]) is not None:
        header, rows = lines[0] + b"\n", lines[1:]
    else:
        damage = "it has no header"
    width = header.count(b",")
    whole = [row + b"\n" for row in rows if is_row(row, width)]
    if damage is None and len(whole) < len(rows):
        damage = f"{len(rows) - len(whole)} of its {len(rows)} rows cannot be read"
    if damage is None and b"\0" in torn:
        damage = "it ends in zero bytes"
    return Rows(header, whole, damage)


def header_line(columns: Sequence[str]) -> bytes:
    return ",".join(columns).encode() + b"\r\n"


def columns_of(header: bytes) -> list[str] | None:
    """The column names, if a line is a header."""
    if re.fullmatch(rb"step(,[A-Za-z][\w./-]*)+\s*", header) is None:
        return None
    names = header.decode().rstrip().split(",")
    return names if len(set(names)) == len(names) else None


def is_row(line: bytes, width: int) -> bool:
    """Whether a line is a step and `width` numbers, any of which may be missing."""
    step, *values = line.rstrip(b"\r").split(b",")
    if len(values) != width or re.fullmatch(rb"\d{1,18}", step) is None:
        return False
    try:
        return all(float(value or b"0") is not None for value in values)
    except ValueError:
        return False


def logged_steps(path: Path) -> list[int]:
    """The steps in metrics.csv; a row is written once, whole. Empty if it cannot be read."""
    try:
        return read_rows(path.read_bytes()).steps() if path.is_file() else []
    except OSError:
        return []


def has_row(path: Path, step: int) -> bool:
    return step in logged_steps(path)


def cut_metrics(path: Path, step: int, columns: Sequence[str] = COLUMNS, *, again: bool = False) -> None:
    """Drop the rows after `step` from metrics.csv, and a last row left incomplete by a kill.

    At step 0 no row is kept, since the run writes that row itself. A damaged file never raises: it is kept as
    metrics.csv.damaged-N, its complete rows stay in metrics.csv, and standard error gets one warning line.

    Args:
        columns: to assume if the header was lost.
        again: drop the row of `step` as well.
    """
    if not os.path.lexists(path):
        return
    try:
        content = path.read_bytes() if path.is_file() else None
        rows = read_rows(content or b"", columns)
        damage = rows.damage if content is not None else "it is not a file"
    except OSError as error:
        content, rows, damage = None, read_rows(b"", columns), f"it cannot be read ({error.strerror})"
    if step == 0 and content is not None and b"\n" not in content:
        damage = None  # killed before the header was written
    kept = [row for row, n in zip(rows.text, rows.steps(), strict=True) if n <= step - again and step > 0]
    new = b"".join([rows.header, *kept])
    try:
        if damage is None and content is not None and content.startswith(new):
            os.truncate(path, len(new))  # needs no disk space
            return
        if damage is not None and content != b"":
            damage += f"; kept as {set_aside(path).name}"
        with replace_file(path) as temporary:
            temporary.write_bytes(new)
    except OSError as error:
        damage = f"{damage or 'rows of later steps'}; it cannot be rewritten ({error.strerror})"
    if damage is not None:
        until = f" up to step {read_rows(new).steps()[-1]}" if kept else ""
        warn(f"{path}: {damage}; {len(kept)} whole rows{until} remain")


def set_aside(path: Path) -> Path:
    """Rename a damaged file to NAME.damaged-1, -2, ..."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    os.rename(path, aside)
    return aside


class MetricsFile:
    """Appends rows to a CSV file with one write each, so that readers see them at once. Disk errors never raise.

    Rows that could not be written (disk full, quota) are buffered in memory until there is space again; a partially
    written one is cut off first. The failure and the recovery are reported once each.

    Args:
        path: an existing file keeps its columns and gains the missing ones.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)
        self._file: IO[bytes] | None = None
        self._pending: deque[dict[str, float]] = deque(maxlen=KEPT_ROWS)
        self._failing = False
        self._flush()

    def write(self, row: dict[str, float]) -> None:
        """Append a row: column names to numbers, without the unmeasured ones."""
        self._pending.append(row)
        self._flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            if self._pending:
                append(self._file, b"".join(self._line(row) for row in self._pending))
                self._pending.clear()
            if self._failing:
                say(f"{self.path} is written again")
            self._failing = False
        except OSError as error:
            if self._file is not None:
                self._file.close()
                self._file = None
            if not self._failing:
                warn(
                    f"{self.path} cannot be written ({error.strerror}); training continues, and its rows are written "
                    "once that is possible again"
                )
            self._failing = True

    def _line(self, row: dict[str, float]) -> bytes:
        assert not row.keys() - self.columns, f"unknown columns {row.keys() - self.columns}"
        return (",".join(_number(row[name]) if name in row else "" for name in self.columns) + "\r\n").encode()

    def _open(self) -> IO[bytes]:
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        columns = columns_of(whole.partition(b"\n")[0])
        if columns is None:
            if content:
                set_aside(self.path)
            with open(self.path, "ab", buffering=0) as file:
                append(file, header_line(self.columns))
        else:
            if len(whole) < len(content):
                os.truncate(self.path, len(whole))  # drop a partial row left by a full disk
            if more := [name for name in self.columns if name not in columns]:
                add_columns(self.path, more)
            self.columns = [*columns, *more]
        return open(self.path, "ab", buffering=0)


def append(file: IO[bytes], data: bytes) -> None:
    """Write to the end of an unbuffered file, all or nothing. Raises OSError."""
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


def add_columns(path: Path, more: Sequence[str]) -> None:
    """Add missing columns to metrics.csv, empty in existing rows. Atomic."""
    header, *rows = path.read_bytes().splitlines()
    with replace_file(path) as temporary:
        lines = [b",".join([header, *(name.encode() for name in more)]), *(row + b"," * len(more) for row in rows)]
        temporary.write_bytes(b"".join(line + b"\r\n" for line in lines))


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))


def validation_values(datasets: dict[str, PackedDataset], sums: dict[str, tuple[float, int]]) -> dict[str, float]:
    """The validation columns. `datasets` and `sums` (summed loss, targets) by the set's name; "" for an unnamed one.

    The loss is the mean over all targets, of a set or of all sets. Bits per byte is the mean loss in bits times tokens
    per byte of the text, so a document's first token, which is never a target, is counted at the mean loss; of several
    sets it is the mean over their bytes.
    """
    loss_sum, n_targets = (sum(values) for values in zip(*sums.values(), strict=True))
    if n_targets == 0:
        return {}
    row: dict[str, float] = {"val_loss": loss_sum / n_targets}
    bits, n_bytes = [], []
    for name, (loss_of_set, targets) in sums.items():
        if targets:
            loss, manifest = loss_of_set / targets, datasets[name].manifest
            values = {"val_loss": loss, "val_perplexity": perplexity(loss)}
            if manifest.bytes:
                values["val_bits_per_byte"] = loss / math.log(2) * manifest.tokens / manifest.bytes
                bits.append(values["val_bits_per_byte"])
                n_bytes.append(manifest.bytes)
            row |= {f"{column}/{name}": value for column, value in values.items() if name}
    if len(sums) == 1 and bits:
        row["val_bits_per_byte"] = bits[0]
    elif len(bits) == len(sums):
        row["val_bits_per_byte"] = sum(b * n for b, n in zip(bits, n_bytes, strict=True)) / sum(n_bytes)
    return row


def router_values(router: RouterStatistics) -> Tensor:
    """Compute ROUTER_COLUMNS on the device from sums over a step (L layers, E experts)."""
    n_expert = router.assigned.shape[-1]
    load = n_expert * router.assigned / router.assigned.sum(-1, keepdim=True).clamp(min=1)  # (L, E)
    mean = router.probability / router.tokens.unsqueeze(-1).clamp(min=1)  # (L, E)
    entropy = torch.special.entr(mean).sum(-1).mean() / math.log(n_expert) if n_expert > 1 else load.new_ones(())
    return torch.stack([load.max(), load.min(), entropy, load_balance_loss(router)])
