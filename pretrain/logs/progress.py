"""Shows training progress: a bar on a terminal, lines in a log.

Lines go to standard output: one per log step, at least 10 s apart, except for the first, the last and validations.
After a minute without one, a line reports the progress by the host's clock alone, without a device sync.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from lit_eval.formats import perplexity
from pretrain.free_memory import show_bytes
from pretrain.logs.messages import say

LINE_S = 10.0  # minimum time between two log-step lines
MOST_DIGITS = 1e6  # from here on a perplexity is shown in powers of ten
QUIET_S = 60.0  # maximum time without a line
WIDE = 100  # terminal columns needed for the bar itself


class ProgressDisplay:
    """Shows a run's progress on rank 0; a no-op on the others.

    Args:
        step_tokens: tokens per optimizer step.
        clock: returns seconds; replaced in tests.
    """

    def __init__(
        self,
        first_step: int,
        max_steps: int,
        step_tokens: int,
        *,
        show: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step, self.max_steps, self.step_tokens = first_step, max_steps, step_tokens
        self._clock = clock
        self._begun: tuple[int, float] | None = None  # excludes the first step, which compiles
        self._line = (first_step, clock())  # when the last line was printed
        self._said = False
        self._bar = Bar(first_step, max_steps) if show and Console(stderr=True).is_terminal else None
        self._lines = show and (self._bar is None or not sys.stdout.isatty())
        self._show = show

    def phase(self, name: str, done: int | None = None, of: int | None = None) -> None:
        """Show the current phase besides training: compiling, validating (`done` of `of` steps), saving."""
        text = name if done is None else f"{name} {done}/{of}"
        if self._bar is not None:
            self._bar.update(doing=text, completed=self.step)
        if self._lines and (name == "compiling" or self._quiet_s() >= QUIET_S):
            self.say(f"{self._position()}: {text}")

    def advance(self, step: int) -> None:
        """Count a step as done on the host; the device may still be computing it."""
        self.step = step
        if self._begun is None:
            self._begun = (step, self._clock())
        if self._bar is not None:
            self._bar.update(doing="training", completed=step, left=self._left())
        if self._lines and self._quiet_s() >= QUIET_S:
            since, then = self._line
            rate = (step - since) * self.step_tokens / max(self._clock() - then, 1e-9)
            self.say(", ".join(filter(None, [f"{self._position()}: {rate:,.0f} tokens/s", self._left()])))

    def row(self, row: dict[str, float]) -> None:
        """Show the numbers of a log step or a validation."""
        self.step = int(row["step"])
        if not self._show or not row.keys() & {"train_loss", "val_loss"}:
            return
        losses, rates = describe_losses(row), describe_rates(row)
        if self._bar is not None and "train_loss" in row:
            self._bar.update(note="  ".join([f"loss {row['train_loss']:.3f}", *rates]))
        if "val_loss" not in row:
            first, last = not self._said, self.step == self.max_steps
            if not self._lines or (self._quiet_s() < LINE_S and not first and not last):
                return
        self._said |= "train_loss" in row
        self.say(f"{self._position()}: {', '.join(filter(None, [*losses, *rates, self._left()]))}")

    def say(self, text: str) -> None:
        """Print a line to the log, or above the bar."""
        if self._show:
            self._line = (self.step, self._clock())
            say(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _position(self) -> str:
        return f"step {self.step}/{self.max_steps}"

    def _quiet_s(self) -> float:
        return self._clock() - self._line[1]

    def _left(self) -> str:
        """Remaining time at the mean speed since this start's first step; empty if unknown."""
        if self._begun is None or self.step <= self._begun[0] or self.step >= self.max_steps:
            return ""
        first, then = self._begun
        seconds = (self._clock() - then) / (self.step - first) * (self.max_steps - self.step)
        return f"{timedelta(seconds=round(seconds))} left"


def describe_losses(row: dict[str, float]) -> list[str]:
    parts = [f"loss {row['train_loss']:.4f}"] if "train_loss" in row else []
    for column, loss in row.items():
        measure, _, name = column.partition("/")
        if measure == "val_loss":
            bits = row.get(column.replace(measure, "val_bits_per_byte", 1))
            shown = f"perplexity {show_perplexity(perplexity(loss))}" + (
                f", {bits:.4f} bits per byte" if bits is not None else ""
            )
            parts.append(f"{name or 'validation loss'} {loss:.4f} ({shown})")
    return parts


def show_perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < MOST_DIGITS else f"{value:.2e}"


def describe_rates(row: dict[str, float]) -> list[str]:
    parts = [f"{row['tokens_per_s']:,.0f} tokens/s"] if "tokens_per_s" in row else []
    if "memory_gib" in row:
        gib = row["memory_gib"]
        parts.append(f"{gib:.1f} GiB" if gib >= 0.1 else show_bytes(gib * 2**30))
    return parts


def whole(text: str) -> ProgressColumn:
    """A column that keeps its width on a narrow terminal."""
    return TextColumn(text, table_column=Column(no_wrap=True))


class Note(ProgressColumn):
    """The latest numbers, truncated on a narrow terminal."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Bar:
    """A progress bar on standard error. Losing the terminal does not end the run."""

    def __init__(self, first_step: int, max_steps: int) -> None:
        console = Console(stderr=True)
        columns = [whole("[bold]{task.fields[doing]}"), whole("{task.completed}/{task.total}")]
        columns += [BarColumn(bar_width=None)] if console.width >= WIDE else []
        columns += [Note(), whole("{task.fields[left]}")]
        # If standard output is redirected to a log file, its lines must not end up on the terminal.
        self._progress = Progress(*columns, console=console, expand=True, redirect_stdout=sys.stdout.isatty())
        with contextlib.suppress(OSError):
            self._progress.start()
        self._task = self._progress.add_task(
            "", total=max_steps, completed=first_step, note="", left="", doing="training"
        )

    def update(self, **fields: object) -> None:
        self._progress.update(self._task, **fields)  # type: ignore[arg-type]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._progress.stop()
