"""Text -> packed datasets: OUTPUT/train, OUTPUT/val, OUTPUT/tokenizer and OUTPUT/report.json.

What is written depends on the text, the tokenizer and the settings, never on workers, parts or interruptions. It is
worked out in a folder beside OUTPUT, `.OUTPUT.preparing`, and renamed when whole; a preparation that was killed goes on
from there when it is called again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_data.corpus.cleaners import open_cleaner
from lit_data.corpus.files import large_plain_text
from lit_data.corpus.readers import OnError, ReadErrors
from lit_data.packed.dataset import MANIFEST, remove_rows
from lit_data.prepare.settings import PLAN, Plan, Settings, differences, open_work, read_plan, strings
from lit_data.prepare.stages import COUNTED, Options, Preparation, in_validation
from lit_data.prepare.worker import Report, open_filters
from lit_data.tokenizers.files import save_tokenizer
from lit_files.cores import usable_cores
from lit_files.lock import LOCK_NAMES, FileLock, lock_folder
from lit_files.publish import sync_file, write_json

__all__ = ["PrepareReport", "in_validation", "prepare", "run_stage"]

Stage = Literal["hash", "join", "encode", "merge"]

ASSEMBLED = "assembled.json"  # written when the output is whole in the working folder and only to be renamed


@dataclass
class Counts:
    """What went into one dataset. `tokens` counts BOS and EOS of each document, `bytes` the UTF-8 bytes of the text,
    `words` what white space separates in it."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    words: int = 0


@dataclass
class PrepareReport:
    """What a preparation did.

    Attributes:
        sides: counts of `train` and, if there is one, `val`.
        treatment: what each stage removed and why, and documents without a token, which are left out.
        errors: documents that could not be read (with on_error="skip"), and files of other kinds.
        seconds: of this call.
        resumed: whether an earlier call had done a part of it.
        bloom_rate: share of new paragraphs that looked old to the Bloom filter at the end.
    """

    output: Path
    sides: dict[str, Counts]
    treatment: Report = field(default_factory=Report)
    errors: ReadErrors = field(default_factory=ReadErrors)
    workers: int = 1
    seconds: float = 0.0
    dry_run: bool = False
    resumed: bool = False
    bloom_rate: float | None = None

    @property
    def empty_documents(self) -> int:
        return self.treatment.empty

    @property
    def total(self) -> Counts:
        sides = self.sides.values()
        return Counts(*(sum(getattr(s, kind) for s in sides) for kind in COUNTED))

    def summary(self) -> str:
        """Several lines of text for a person."""
        lines = ["dry run: nothing was written; it would hold" if self.dry_run else f"wrote {self.output}"]
        for name, side in self.sides.items():
            per_token = f", {side.bytes / side.tokens:.3f} bytes per token" if side.tokens else ""
            lines.append(
                f"  {name + ':':6} {side.documents:,} documents, {side.tokens:,} tokens, {side.bytes:,} bytes of text"
                f"{per_token}, {side.words:,} words"
            )
        rate = self.total.bytes / 1e6 / self.seconds if self.seconds else 0.0
        speed = " (the rest was done before)" if self.resumed else f", {rate:.2f} MB/s"
        lines.append(f"  {self.seconds:.1f} s with {self.workers} workers{speed}")
        lines.append(f"  skipped: {self.errors.count:,} unreadable documents, {self.empty_documents:,} empty ones")
        lines.extend(f"    {message}" for message in self.errors.first)
        if self.errors.count > len(self.errors.first):
            lines.append(f"    and {self.errors.count - len(self.errors.first):,} more")
        if self.errors.ignored_files:
            names = ", ".join(self.errors.ignored_first)
            more = ", ..." if self.errors.ignored_files > len(self.errors.ignored_first) else ""
            lines.append(f"  files of other kinds, not read: {self.errors.ignored_files:,} ({names}{more})")
        for stage in self.treatment.stages.values():
            lines.extend(f"  {line}" for line in stage.summary().splitlines())
        if self.bloom_rate is not None:
            lines.append(
                f"  Bloom filter: at the end it took about {self.bloom_rate:.2e} of new paragraphs for old ones"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """What OUTPUT/report.json keeps."""
        errors = {"count": self.errors.count, "first": self.errors.first, "ignored_files": self.errors.ignored_files}
        return {"sides": {k: vars(c) for k, c in self.sides.items()}, "errors": errors, **self.treatment.to_dict()}


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    val_inputs: Sequence[str | Path] | None = None,
    workers: int | None = None,
    on_error: OnError = "stop",
    overwrite: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    work: str | Path | None = None,
    commit_seconds: float = 30.0,
    **settings: Any,
) -> PrepareReport:
    """Encode text and write OUTPUT/train, OUTPUT/val (if asked for), OUTPUT/tokenizer and a report, all or nothing.

    Args:
        inputs, tokenizer_path, val_inputs, settings: see `lit_data.prepare.settings.Settings`.
        output: must not exist, unless `overwrite` and it is a prepared folder.
        workers: processes; the default is the cores this process may use. 1 does all in this process.
        fresh: discard what an interrupted call with other settings left.
        dry_run: do everything but write; the report says what would be there.
        work: the working folder; default `.OUTPUT.preparing` beside `output`. It must lie on the same file system.
        commit_seconds: time between the moments from which a killed call goes on.

    Raises:
        FileNotFoundError: an input or the tokenizer does not exist.
        ValueError: any other mistake; the message names the thing.
    """
    began = time.monotonic()
    output = Path(os.path.abspath(output))
    workers = workers if workers is not None else usable_cores()
    plan = _plan(inputs, tokenizer_path, val_inputs, settings)
    plan.errors.print_warnings()
    options = Options(workers, on_error, commit_seconds, dry_run)
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="llammlein-dry-run-") as temporary:
            return _report(_finished(Preparation(plan, Path(temporary), options)), output, began, resumed=False)
    folder = Path(work) if work is not None else work_folder(output)
    lock = _lock(folder) if folder.exists() else None
    if lock is None or not _was_published(folder, plan, output):
        _check_output(output, overwrite)
    lock = lock or _lock(folder)
    try:
        if _was_published(folder, plan, output):
            _remove_work(folder)
            return _read_report(output, began)
        resumed = open_work(folder, plan, fresh)
        if resumed and fresh:
            _empty(folder)
            resumed = open_work(folder, plan, fresh)
        preparation = Preparation(plan, folder, options)
        keep = False
        try:
            preparation.run()
            report = _report(preparation, output, began, resumed)
            _publish(_assemble(preparation, report), output)
            _remove_work(folder)
        except BaseException as error:
            keep = preparation.committed() and not isinstance(error, _EmptyError)
            if keep:
                error.add_note(f"what was done is kept in {folder}: the same command goes on with it")
            raise
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.close()
    return report


def run_stage(
    stage: Stage,
    part: int,
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    val_inputs: Sequence[str | Path] | None = None,
    workers: int | None = None,
    on_error: OnError = "stop",
    overwrite: bool = False,
    work: str | Path | None = None,
    commit_seconds: float = 30.0,
    **settings: Any,
) -> PrepareReport | None:
    """One stage of one part, for schedulers that call each on a machine of its own; the folders must be shared.

    The order is: `hash` of each part and `join` (only with --dedup exact or --near_dedup), `encode` of each part,
    `merge`, which publishes the output and returns the report. All calls take the same settings.
    """
    began = time.monotonic()
    output = Path(os.path.abspath(output))
    plan = _plan(inputs, tokenizer_path, val_inputs, settings)
    if part == 0:
        plan.errors.print_warnings()
    folder = Path(work) if work is not None else work_folder(output)
    if stage == "merge" and _was_published(folder, plan, output):
        _remove_work(folder)
        return _read_report(output, began)
    _check_output(output, overwrite)
    workers = workers if workers is not None else usable_cores()
    preparation = Preparation(plan, folder, Options(workers, on_error, commit_seconds))
    one_part = stage in ("hash", "encode")
    lock = _lock(preparation.part_folder(part) if one_part else folder)
    try:
        open_work(folder, plan, fresh=False)
        if stage == "hash":
            preparation.hash_part(part)
        elif stage == "join":
            preparation.join()
        elif stage == "encode":
            preparation.encode_part(part)
        else:
            preparation.merge()
            report = _report(preparation, output, began, resumed=True)
            _publish(_assemble(preparation, report), output)
            _remove_work(folder)
            return report
    finally:
        lock.close()
    return None


def _lock(folder: Path) -> FileLock:
    return lock_folder(folder, "wait for it or end it, or give another --work")


def work_folder(output: Path) -> Path:
    """Where an output is worked out by default."""
    return output.with_name(f".{output.name}.preparing")


def _plan(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    val_inputs: Sequence[str | Path] | None,
    settings: dict[str, Any],
) -> Plan:
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    made = Settings(strings(inputs) or (), str(tokenizer_path), val_input=strings(val_inputs), **given)
    if made.cleaner:
        open_cleaner(made.cleaner)
    open_filters(made)
    plan = Plan.make(made)
    if "split_documents" not in settings:
        plan.errors.warnings += large_plain_text(plan.files)
    return plan


def _finished(preparation: Preparation) -> Preparation:
    preparation.run()
    return preparation


def _report(preparation: Preparation, output: Path, began: float, resumed: bool) -> PrepareReport:
    """Raises _EmptyError for a side without documents and for metadata that no document has."""
    sides = {side: Counts(**counts) for side, counts in preparation.counts().items()}
    treatment, errors = preparation.report()
    options = preparation.options
    seconds = time.monotonic() - began
    report = PrepareReport(output, sides, treatment, errors, options.workers, seconds, options.dry_run, resumed)
    report.bloom_rate = preparation.bloom_rate()
    _check_sides(report, preparation.settings)
    never_seen = [m for m in preparation.settings.metadata if m not in treatment.fields]
    if never_seen:
        raise _EmptyError(f"--metadata {' '.join(never_seen)}: no document has such a field")
    return report


class _EmptyError(ValueError):
    """All was done, and the result is not what was meant: there is nothing to go on with."""


def _check_sides(report: PrepareReport, s: Settings) -> None:
    total = report.total.documents
    left_out = f" ({report.empty_documents} empty and {report.errors.count} unreadable ones were left out)"
    why = left_out if report.empty_documents or report.errors.count else ""
    removed = sum(stage.documents_in - stage.documents_kept for stage in report.treatment.stages.values())
    why += f" ({removed} were removed by cleaner, filters and deduplication)" if removed else ""
    if total == 0:
        raise _EmptyError(f"--input {' '.join(s.input)} holds no documents{why}: the dataset would be empty")
    for side, counts in report.sides.items():
        if counts.documents:
            continue
        if s.val_input is not None:
            flag, paths = ("--val_input", s.val_input) if side == "val" else ("--input", s.input)
            raise _EmptyError(f"{flag} {' '.join(paths)} holds no documents{why}: {side} would be empty")
        raise _EmptyError(
            f"--val_fraction {s.val_fraction} leaves no document for {side} out of {total}{why}: give "
            f"{'a larger' if side == 'val' else 'a smaller'} fraction, another --seed, more documents, or --val_input"
        )


def _was_published(folder: Path, plan: Plan, output: Path) -> bool:
    """Whether an earlier call of the same was killed after it had published the output."""
    if not (folder / ASSEMBLED).is_file() or (folder / "output").exists() or not (output / "report.json").is_file():
        return False
    path = folder / PLAN  # removed before the marker is
    return not path.is_file() or not differences(read_plan(path), plan.to_dict())


def _remove_work(folder: Path) -> None:
    """Remove the working folder of a published output; the marker goes last, so that a kill is understood."""
    _empty(folder, keep=[ASSEMBLED])
    shutil.rmtree(folder)


def _read_report(output: Path, began: float) -> PrepareReport:
    content = json.loads((output / "report.json").read_text(encoding="utf-8"))
    sides = {side: Counts(**counts) for side, counts in content["sides"].items()}
    errors = ReadErrors(content["errors"]["count"], content["errors"]["first"])
    return PrepareReport(
        output, sides, Report.from_dict(content), errors, seconds=time.monotonic() - began, resumed=True
    )


def _check_output(output: Path, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ValueError(f"--output {output} exists already; choose another folder, remove it, or give --overwrite")
    if output.is_symlink() or not (output / "train" / MANIFEST).is_file():
        raise ValueError(f"--output {output} is no folder that this program wrote; --overwrite does not remove it")


def _empty(folder: Path, keep: Sequence[str] = ()) -> None:
    """Remove what is in a working folder, the lock and files to keep aside."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (*LOCK_NAMES, *keep):
            path.unlink()


def _assemble(preparation: Preparation, report: PrepareReport) -> Path:
    """Put the output together in the working folder; what an interrupted call had done stays."""
    target = preparation.assembled
    target.mkdir(exist_ok=True)
    for side, folder in preparation.datasets().items():
        if folder.parent != target:
            remove_rows(folder)
            os.rename(folder, target / side)
    for path in (target / "tokenizer", *target.glob(".*")):  # hidden: what a killed call was writing
        if path.is_dir():
            shutil.rmtree(path)
    save_tokenizer(preparation.plan.tokenizer, target / "tokenizer")
    write_json(target / "report.json", report.to_dict())
    sync_file(target)
    write_json(preparation.work / ASSEMBLED, {})
    return target


def _publish(target: Path, output: Path) -> None:
    """Rename the finished folder to its name; one that is there is moved aside first and removed last."""
    aside = output.with_name(f".{output.name}.replaced")
    if output.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(output, aside)
    try:
        os.rename(target, output)
    except BaseException:
        if aside.exists():
            with contextlib.suppress(OSError):
                os.rename(aside, output)
        raise
    sync_file(output.parent)
    shutil.rmtree(aside, ignore_errors=True)
