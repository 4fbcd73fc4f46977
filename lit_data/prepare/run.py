"""Text -> packed datasets: OUTPUT/train, OUTPUT/val, OUTPUT/tokenizer and OUTPUT/report.json.

The output depends on the text, the tokenizer and the settings, never on workers, parts or interruptions. It is built in
a folder beside OUTPUT, `.OUTPUT.preparing`, and renamed when complete; calling a killed preparation again resumes it
from there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lit_data.corpus.cleaners import open_cleaner
from lit_data.corpus.files import ReadErrors, check_output_is_outside, large_plain_text
from lit_data.packed.manifest import MANIFEST
from lit_data.packed.writer import remove_rows
from lit_data.prepare.job import JOB_FILE, Job, differences, open_work, read_job
from lit_data.prepare.report import Counts, PrepareReport, StageReports
from lit_data.prepare.settings import Execution, Settings
from lit_data.prepare.stages import Preparation
from lit_data.prepare.worker import open_filters
from lit_data.tokenizers.files import save_tokenizer
from lit_files.lock import LOCK_NAMES, FileLock, lock_folder
from lit_files.publish import replace_folder, sync_file, write_json

ASSEMBLED = "assembled.json"  # written when the output is complete in the working folder and only the rename is missing


def prepare(settings: Settings, execution: Execution) -> PrepareReport:
    """Encode text and write OUTPUT/train, OUTPUT/val (if asked for), OUTPUT/tokenizer and a report, all or nothing.

    Raises:
        FileNotFoundError: an input or the tokenizer does not exist.
        ValueError: any other mistake; the message names it.
    """
    began = time.monotonic()
    output, folder, fresh = Path(os.path.abspath(execution.output)), execution.work_folder, execution.fresh
    job = _make_job(settings, execution)
    job.errors.print_warnings()
    if execution.dry_run:
        with tempfile.TemporaryDirectory(prefix="llammlein-dry-run-") as temporary:
            preparation = Preparation(job, Path(temporary), execution)
            preparation.run()
            return _report(preparation, output, began, resumed=False)
    lock = _lock(folder) if folder.exists() else None
    if lock is None or not _was_published(folder, job, output):
        _check_output(output, execution.overwrite)
    lock = lock or _lock(folder)
    try:
        if _was_published(folder, job, output):
            _remove_work(folder, lock)
            return _read_report(output, began)
        resumed = open_work(folder, job, fresh)
        if resumed and fresh:
            _empty(folder)
            resumed = open_work(folder, job, fresh)
        preparation = Preparation(job, folder, execution)
        keep = False
        try:
            preparation.run()
            report = _report(preparation, output, began, resumed)
            replace_folder(_assemble(preparation, report), output)
            _remove_work(folder, lock)
        except BaseException as error:
            keep = preparation.committed() and not isinstance(error, _EmptyError)
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:  # such as a full disk
                error.filename = str(output)
            if keep:
                error.add_note(f"the work so far is kept in {folder}: the same command resumes it")
            raise
        finally:
            if not keep:
                lock.remove_folder(ignore_errors=True)
    finally:
        lock.close()
    return report


def run_stage(settings: Settings, execution: Execution) -> PrepareReport | None:
    """One stage of one part, for schedulers that run stages on different machines; the folders must be shared.

    The order is: `hash` of each part and `join` (only with --dedup exact or --near_dedup), `encode` of each part,
    `merge`, which publishes the output and returns the report. All calls take the same settings.
    """
    began = time.monotonic()
    output, folder = Path(os.path.abspath(execution.output)), execution.work_folder
    stage, part = execution.stage, execution.part
    job = _make_job(settings, execution)
    if part == 0:
        job.errors.print_warnings()
    if stage == "merge" and _was_published(folder, job, output):
        _remove_work(folder, None)
        return _read_report(output, began)
    _check_output(output, execution.overwrite)
    preparation = Preparation(job, folder, execution)
    one_part = stage in ("hash", "encode")
    lock = _lock(preparation.part_folder(part) if one_part else folder)
    try:
        open_work(folder, job, fresh=False)
        if stage == "hash":
            preparation.hash_part(part)
        elif stage == "join":
            preparation.join()
        elif stage == "encode":
            preparation.encode_part(part)
        else:
            preparation.merge()
            report = _report(preparation, output, began, resumed=True)
            replace_folder(_assemble(preparation, report), output)
            _remove_work(folder, lock)
            return report
    finally:
        lock.close()
    return None


def _lock(folder: Path) -> FileLock:
    return lock_folder(folder, "wait for it or end it, or give another --work")


def _make_job(settings: Settings, execution: Execution) -> Job:
    check_output_is_outside(Path(execution.output), (*settings.input, *(settings.val_input or ())))
    if settings.cleaner:
        open_cleaner(settings.cleaner)
    open_filters(settings)
    job = Job.make(settings)
    if execution.warn_of_large_text:
        job.errors.warnings += large_plain_text(job.files)
    return job


def _report(preparation: Preparation, output: Path, began: float, resumed: bool) -> PrepareReport:
    """Raises _EmptyError for a side without documents and for metadata that no document has."""
    sides = {side: Counts(**counts) for side, counts in preparation.counts().items()}
    stage_reports, errors = preparation.report()
    workers, dry_run, seconds = preparation.execution.processes, preparation.execution.dry_run, time.monotonic() - began
    report = PrepareReport(output, sides, stage_reports, errors, workers, seconds, dry_run, resumed)
    report.bloom_rate = preparation.bloom_rate()
    _check_sides(report, preparation.settings)
    never_seen = [m for m in preparation.settings.metadata if m not in stage_reports.fields]
    if never_seen:
        raise _EmptyError(f"--metadata {' '.join(never_seen)}: no document has this field; check the name")
    return report


class _EmptyError(ValueError):
    """The preparation finished but the result can't be intended: a side is empty, or metadata is missing everywhere."""


def _check_sides(report: PrepareReport, s: Settings) -> None:
    total = report.total.documents
    left_out = f" ({report.empty_documents} empty and {report.errors.count} unreadable ones were left out)"
    why = left_out if report.empty_documents or report.errors.count else ""
    removed = sum(stage.documents_in - stage.documents_kept for stage in report.stage_reports.stages.values())
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


def _was_published(folder: Path, job: Job, output: Path) -> bool:
    """Whether an earlier call of the same job was killed after publishing the output."""
    if not (folder / ASSEMBLED).is_file() or (folder / "output").exists() or not (output / "report.json").is_file():
        return False
    path = folder / JOB_FILE  # removed before the marker is
    return not path.is_file() or not differences(read_job(path), job.to_dict())


def _remove_work(folder: Path, lock: FileLock | None) -> None:
    """Remove the working folder of a published output; the marker last, so that a kill in between is recognised."""
    _empty(folder, keep=[ASSEMBLED])
    if lock is not None:
        lock.remove_folder()
    else:
        shutil.rmtree(folder)


def _read_report(output: Path, began: float) -> PrepareReport:
    content = json.loads((output / "report.json").read_text(encoding="utf-8"))
    sides = {side: Counts(**counts) for side, counts in content["sides"].items()}
    errors = ReadErrors(content["errors"]["count"], content["errors"]["first"])
    return PrepareReport(
        output, sides, StageReports.from_dict(content), errors, seconds=time.monotonic() - began, resumed=True
    )


def _check_output(output: Path, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise ValueError(f"--output {output} exists already; choose another folder, remove it, or give --overwrite")
    if output.is_symlink() or not (output / "train" / MANIFEST).is_file():
        raise ValueError(
            f"--output {output} was not written by this program, so --overwrite does not remove it; remove it yourself"
        )


def _empty(folder: Path, keep: Sequence[str] = ()) -> None:
    """Empty a working folder, except the lock and files to keep."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (*LOCK_NAMES, *keep):
            path.unlink()


def _assemble(preparation: Preparation, report: PrepareReport) -> Path:
    """Assemble the output in the working folder; work of an interrupted call is reused."""
    target = preparation.assembled
    target.mkdir(exist_ok=True)
    for side, folder in preparation.datasets().items():
        if folder.parent != target:
            remove_rows(folder)
            os.rename(folder, target / side)
    for path in (target / "tokenizer", *target.glob(".*")):  # hidden: unfinished files of a killed call
        if path.is_dir():
            shutil.rmtree(path)
    save_tokenizer(preparation.job.tokenizer, target / "tokenizer")
    write_json(target / "report.json", report.to_dict())
    sync_file(target)
    write_json(preparation.work / ASSEMBLED, {})
    return target
