"""What a run shows of itself while it trains."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar:
    """A rich progress bar with the time left; nothing where standard error is no terminal."""

    def __init__(self, first_step: int, max_steps: int, show: bool) -> None:
        console = Console(stderr=True)
        self._progress: Progress | None = None
        if show and console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._progress.start()
            self._task = self._progress.add_task("train", total=max_steps, completed=first_step, note="")

    def advance(self) -> None:
        if self._progress is not None:
            self._progress.advance(self._task)

    def note(self, row: dict[str, float]) -> None:
        """Show the newest numbers beside the bar."""
        if self._progress is not None and "train_loss" in row:
            note = f"loss {row['train_loss']:.3f}  {row.get('tokens_per_s', 0):,.0f} tokens/s"
            self._progress.update(self._task, note=note)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
