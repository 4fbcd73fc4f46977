"""The run folder: which one it is, its lock, and what a start or a resume writes there."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import yaml

from lit_data.record.merge import Compactor
from lit_data.record.parts import DatapointRecorder
from lit_data.record.trace import describe_order, write_order
from lit_data.tokenizers.files import copy_tokenizer
from lit_files.lock import FileLock, lock_folder
from lit_files.publish import write_text
from lit_model.load import (
    checkpoint_step,
    list_checkpoints,
)
from pretrain.args import RunArgs, plain
from pretrain.checkpoint.files import (
    find_checkpoint,
    remove,
    remove_if_possible,
    rewind,
)
from pretrain.fabric import Fabric
from pretrain.logs.messages import warn
from pretrain.logs.metrics import COLUMNS, DISTILLATION_COLUMNS, ROUTER_COLUMNS, newest_step
from pretrain.logs.metrics import FILE as METRICS
from pretrain.logs.trackers import Trackers, abandon, check_trackers
from pretrain.ranks import on_rank_zero
from pretrain.run import Run

STOPPED = "stopped.json"  # in the run folder: what a signal has ended


def named_folder(args: RunArgs) -> Path | None:
    """The run folder as the command names it: --out_dir, or else the folder of a checkpoint that --resume names."""
    if args.out_dir is None and args.resume is not None:
        path = Path(args.resume)
        if path.exists() and checkpoint_step(path) is not None:
            return path.parent
    return args.out_dir


def open_folder(fabric: Fabric, args: RunArgs) -> tuple[Path, Path | None, FileLock | None, Trackers | None]:
    """The run folder, the checkpoint to resume (None: a fresh start), rank 0's lock, and of a new run its trackers."""
    lock: list[FileLock] = []
    trackers: list[Trackers] = []

    def work() -> tuple[Path, Path | None]:
        name = args.model.name or "run"
        folder = named_folder(args) or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        holds_run = (folder / "config.yaml").exists() or bool(list_checkpoints(folder))
        if args.resume is None and holds_run:
            raise ValueError(
                f"--out_dir {folder} holds a run already; resume it with --resume latest, or choose another folder"
            )
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out_dir {folder} is a file")
        checkpoint = find_checkpoint(args.resume, folder) if args.resume is not None else None
        if not holds_run:
            check_trackers(args.log, folder)
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        kept = {path.name for path in folder.iterdir()} if folder.exists() else set()
        try:
            lock.append(lock_folder(folder, "wait for it, or choose another --out_dir"))
        except OSError as error:
            raise ValueError(
                f"--out_dir {folder} cannot be used: {error.strerror or error} ({error.filename or folder})"
            ) from error
        if not holds_run and args.log.trackers:
            try:
                trackers.append(Trackers(folder, args.log, plain(args), 0, strict=True))
            except ValueError:
                lock[0].close()
                for path in folder.iterdir():
                    if path.name not in kept:
                        remove(path)
                for path in new:
                    path.rmdir()
                raise
        return folder, checkpoint

    folder, checkpoint = on_rank_zero(fabric, work)
    return folder, checkpoint, lock[0] if lock else None, trackers[0] if trackers else None


def begin_recording(run: Run) -> None:
    """Bring the run folder to the state of `run.step`, and open the record there."""
    on_rank_zero(run.fabric, lambda: prepare_folder(run))
    if run.args.data.datapoints and not run.args.data.mock:
        micro_batch_samples = run.args.train.micro_batch_samples
        run.recorder = DatapointRecorder(
            run.folder / "datapoints", run.fabric.global_rank, run.world_size, micro_batch_samples, run.step
        )
        if run.fabric.global_rank == 0:
            run.compactor = Compactor(run.folder)
            run.saver.published = run.compactor.start


def prepare_folder(run: Run) -> None:
    """Rank 0: bring the run folder to the state of `run.step`, and write what describes the run."""
    goes_back = (newest_step(run.folder / METRICS) or 0) > run.step
    if goes_back:
        abandon(run.folder, run.args.log)
    rewind(run.folder, run.step, metrics_columns(run), again=run.unfinished is not None)
    if run.args.log.trackers and (run.trackers is None or goes_back):
        if run.trackers is not None:
            run.trackers.close()
        run.trackers = Trackers(run.folder, run.args.log, plain(run.args), run.step, strict=False)
    remove_if_possible(run.folder / STOPPED)
    text = yaml.safe_dump(plain(dataclasses.replace(run.args, resume=None)), sort_keys=False, allow_unicode=True)
    try:
        write_text(run.folder / "config.yaml", text)
    except OSError as error:  # a checkpoint holds it as well
        warn(f"{run.folder / 'config.yaml'} could not be written: {error}")
    if run.args.data.datapoints and not run.args.data.mock:
        facts = describe_order(
            run.data.rows,
            run.data.mixture,
            run.segments,
            document_mask=run.args.data.document_mask,
            end_sample=run.data.end_sample,
            plan_dir=run.args.data.plan_dir,
            skips=run.skips,
        )
        layout = (run.step, run.world_size, run.args.train.micro_batch_samples)
        write_order(run.folder / "datapoints", facts, layout)
    source = run.data.train[0].tokenizer_folder
    if source is not None and not (run.folder / "tokenizer").exists():
        try:
            copy_tokenizer(source, run.folder / "tokenizer")
        except (OSError, ValueError) as error:
            if run.step == 0:
                raise
            warn(f"the tokenizer could not be copied to {run.folder}: {error}")


def metrics_columns(run: Run) -> list[str]:
    """The columns of the run's metrics.csv. A mixture has an epoch for each dataset, by its number."""
    n_datasets = len(run.data.rows)
    epochs = () if n_datasets == 1 else [f"epoch_{d}" for d in range(n_datasets)]
    routers = ROUTER_COLUMNS if run.config.n_expert else ()
    distillation = DISTILLATION_COLUMNS if run.args.objective == "distillation" else ()
    return [*COLUMNS, *epochs, *routers, *distillation]
