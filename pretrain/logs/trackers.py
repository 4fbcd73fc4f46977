"""TensorBoard and Weights & Biases: mirror the rows of metrics.csv. A tracker failure never ends a run.

A run has a unique id, stored in RUN/run_id.json. When a run goes back to an older checkpoint, TensorBoard drops the
later steps. Weights & Biases generally can't: its rewind must be enabled per server and does not work offline. So
that W&B run is left as it is, and a new one starts with the rows that are still valid.
"""

from __future__ import annotations

import csv
import inspect
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_files.publish import write_json
from lit_files.run_files import LAYERS, METRICS
from pretrain.args import LogArgs
from pretrain.logs.messages import warn

ID_FILE = "run_id.json"
FORBIDDEN = "/\\#?%:"  # in W&B project names
LONGEST_NAME = 128


@dataclass
class RunId:
    """The identity of a run for trackers.

    Attributes:
        id: unique, created once.
        folder: absolute run folder at the time of writing; distinguishes a copy of the folder from the run itself.
        wandb: id of the W&B run that shows this run's rows; None before there is one.
        wandb_runs: number of W&B runs started so far.
    """

    id: str
    folder: str
    wandb: str | None = None
    wandb_runs: int = 0

    def save(self) -> None:
        write_json(Path(self.folder) / ID_FILE, vars(self))


def check_trackers(args: LogArgs, run: Path) -> None:
    """Raise ValueError if a tracker could not start here: missing package, missing key, or a name it rejects.

    Needs no network, and leaves no files behind.
    """
    for name in args.trackers:
        check_tracker(name, args, run)


def check_tracker(name: str, args: LogArgs, run: Path) -> None:
    """As `check_trackers`, for one of them."""
    if name == "wandb":
        check_wandb(args, args.run_name or run.resolve().name)
    else:
        import_library(name)


def import_library(tracker: str) -> Any:
    """wandb, or torch's SummaryWriter. Raises ValueError if it is not installed."""
    try:
        if tracker == "wandb":
            import wandb

            return wandb
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"--log.trackers {tracker} is not installed: run `pip install llammlein[{tracker}]`"
        ) from error


def check_wandb(args: LogArgs, name: str) -> None:
    for flag, value in (("--log.project", args.project), ("--log.run_name", name)):
        bad = sorted(set(value) & set(FORBIDDEN)) if flag == "--log.project" else []
        if bad or not value.strip() or len(value) > LONGEST_NAME:
            raise ValueError(
                f"{flag} {value!r}: Weights & Biases allows 1 to {LONGEST_NAME} characters"
                + (f", none of {' '.join(FORBIDDEN)}" if flag == "--log.project" else "")
            )
    wandb = import_library("wandb")
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in ("online", "offline", "disabled", "shared", "dryrun", "run"):
        raise ValueError(f"WANDB_MODE {mode!r} must be online, offline or disabled")
    if mode in ("online", "shared", "run") and not has_key(wandb):
        raise ValueError(
            "--log.trackers wandb: no Weights & Biases API key is configured; run `wandb login`, set WANDB_API_KEY, or "
            "set WANDB_MODE=offline"
        )


def has_key(wandb: Any) -> bool:
    """Whether wandb would log in without a terminal prompt."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False))
    return wandb.api.api_key is not None  # before wandb.login had a parameter to suppress its prompt


def open_id(run: Path, name: str) -> RunId:
    """Read the id of the run in this folder, or create one.

    A copy of a run folder counts as a separate run. A run from before ids existed keeps its W&B name, which was its id.
    """
    here = run.resolve()
    known = read_id(here)
    if known is None:
        used = name if (here / "wandb").is_dir() else None
        known = RunId(secrets.token_hex(8), str(here), used, int(used is not None))
    elif known.folder != str(here):
        original = read_id(Path(known.folder))
        copied = original is not None and original.id == known.id
        known = RunId(secrets.token_hex(8), str(here)) if copied else RunId(**{**vars(known), "folder": str(here)})
    else:
        return known
    known.save()
    return known


def read_id(run: Path) -> RunId | None:
    """The stored id; None if it is missing or unreadable."""
    try:
        facts = json.loads((run / ID_FILE).read_text(encoding="utf-8"))
        known = RunId(**facts)
    except (OSError, ValueError, TypeError):
        return None
    strings = isinstance(known.id, str) and isinstance(known.folder, str) and isinstance(known.wandb, str | None)
    return known if strings and isinstance(known.wandb_runs, int) else None


class Trackers:
    """The trackers of a run, on rank 0.

    Args:
        config: the settings to show with the run.
        step: optimizer steps completed; later steps already logged are dropped, see `abandon`.
        strict: raise ValueError for a tracker that cannot start. Otherwise warn, and train without it.
    """

    def __init__(self, run: Path, args: LogArgs, config: dict[str, Any], step: int, *, strict: bool) -> None:
        self._open: list[TensorBoard | WandB] = []
        self._failed: set[str] = set()
        for name in args.trackers:
            try:
                check_tracker(name, args, run)
                begin: type[TensorBoard | WandB] = TensorBoard if name == "tensorboard" else WandB
                self._open.append(begin(run, args, config, step))
            except Exception as error:  # a library may raise anything
                is_mistake = isinstance(error, ValueError)
                message = one_line(error) if is_mistake else f"--log.trackers {name}: {cause(error)}"
                if strict:
                    self.close()
                    hint = "; WANDB_MODE=offline needs no network" if name == "wandb" and not is_mistake else ""
                    raise ValueError(message + hint) from error
                warn(f"{message}; training continues without it")

    def log(self, row: dict[str, float]) -> None:
        """Show a row of metrics.csv."""
        values, step = {k: v for k, v in row.items() if k != "step"}, int(row["step"])
        self._each(lambda tracker: tracker.log(values, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open = []

    def _each(self, call: Callable[[TensorBoard | WandB], None]) -> None:
        """Call each tracker; the first failure of each is a warning."""
        for tracker in self._open:
            try:
                call(tracker)
            except Exception as error:
                if tracker.name not in self._failed:
                    consequence = "training continues, and later rows are sent"
                    warn(f"{tracker.name} failed to log a row ({cause(error)}); {consequence}")
                self._failed.add(tracker.name)


def abandon(run: Path, args: LogArgs) -> None:
    """Detach the W&B run before rows are cut from metrics.csv, since it shows steps that no longer count."""
    if not (run / ID_FILE).exists() and not (run / "wandb").is_dir():
        return
    try:
        known = open_id(run, args.run_name or run.resolve().name)
        if known.wandb is not None:
            known.wandb = None
            known.save()
    except OSError as error:
        warn(f"{run / ID_FILE} cannot be written ({error.strerror}): wandb may still show the abandoned steps")


class TensorBoard:
    """Event files in RUN/tensorboard."""

    name = "tensorboard"

    def __init__(self, run: Path, args: LogArgs, config: dict[str, Any], step: int) -> None:
        self._folder = run / "tensorboard"
        first = not any(self._folder.glob("events.*"))
        self._writer = import_library("tensorboard")(str(self._folder), purge_step=None if first else step + (step > 0))
        if first:
            for row in rows_until(run, step):
                self.log(*row)

    def log(self, values: dict[str, float], step: int) -> None:
        if self._writer is None:
            self._writer = import_library("tensorboard")(str(self._folder))
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except Exception:
            self._writer = None  # once its thread has failed, a writer never recovers
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A Weights & Biases run. WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY etc. are read from the environment."""

    name = "wandb"

    def __init__(self, run: Path, args: LogArgs, config: dict[str, Any], step: int) -> None:
        name = args.run_name or run.resolve().name
        known = open_id(run, name)
        first, number = known.wandb is None, known.wandb_runs + 1
        if known.wandb is None:
            known.wandb = known.id if number == 1 else f"{known.id}-{number}"
            known.wandb_runs = number
            name = name if number == 1 else f"{name} ({number})"
        self._run = import_library("wandb").init(
            project=args.project,
            name=name,
            id=known.wandb,
            dir=str(run),
            config={**config, "run_id": known.id},
            resume="allow",
        )
        if first:
            for row in rows_until(run, step):
                self.log(*row)
            known.save()

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def rows_until(run: Path, step: int) -> list[tuple[dict[str, float], int]]:
    """Rows logged up to a step, as (values, step), to backfill a new tracker."""
    rows: dict[int, dict[str, float]] = {}
    for name, prefix in ((METRICS, ""), (LAYERS, "layers/")):
        path = run / name
        if step == 0 or not path.exists():
            continue
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                n = int(row.pop("step"))
                if n <= step:
                    rows.setdefault(n, {}).update({f"{prefix}{k}": float(v) for k, v in row.items() if v})
    return [(rows[n], n) for n in sorted(rows)]


def cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
