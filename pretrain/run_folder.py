"""The run folder: choosing it, its lock, and the files that a start or a resume writes there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_data.record.merge import Compactor
from lit_data.record.order_file import describe_order, write_order
from lit_data.record.writer import DatapointRecorder
from lit_data.tokenizers.files import copy_tokenizer
from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_files.lock import FileLock, lock_folder
from lit_files.publish import write_text
from lit_files.run_files import DATAPOINTS, EVALUATIONS, METRICS, SETTINGS, STOPPED
from lit_model.config import ModelConfig
from pretrain.args import RunArgs
from pretrain.checkpoint.load import find_checkpoint
from pretrain.checkpoint.retention import remove, remove_if_possible, rewind
from pretrain.data import Data
from pretrain.evaluation_plan import Evaluation, cut_evaluations
from pretrain.fabric import Fabric
from pretrain.failure.peers import on_rank_zero
from pretrain.logs.messages import warn
from pretrain.logs.metrics import COLUMNS, DISTILLATION_COLUMNS, ROUTER_COLUMNS, VALIDATION_COLUMNS, logged_steps
from pretrain.logs.trackers import Trackers, abandon, check_trackers
from pretrain.run import Progress


def named_folder(args: RunArgs) -> Path | None:
    """The run folder that the command names: --out_dir, or the folder of the checkpoint that --resume names."""
    if args.out_dir is None and args.resume is not None:
        path = Path(args.resume)
        if path.exists() and checkpoint_step(path) is not None:
            return path.parent
    return args.out_dir


def choose_folder(args: RunArgs) -> tuple[Path, Path | None, bool]:
    """The run folder, the checkpoint to resume (None: a new run), and whether the folder holds a run already.

    Raises ValueError or FileNotFoundError where the run can neither start nor resume.
    """
    name = args.model.name or "run"
    folder = named_folder(args) or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    holds_run = (folder / SETTINGS).exists() or bool(list_checkpoints(folder))
    if args.resume is None and holds_run:
        raise ValueError(
            f"--out_dir {folder} holds a run already; resume it with --resume latest, or choose another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out_dir {folder} is a file")
    return folder, find_checkpoint(args.resume, folder) if args.resume is not None else None, holds_run


def open_folder(
    fabric: Fabric, args: RunArgs, settings: dict[str, Any]
) -> tuple[Path, Path | None, FileLock | None, Trackers | None]:
    """Lock the run folder. Returns it, the checkpoint to resume (None: a new run), and on rank 0 the lock and, for a
    new run, its trackers. Raises Mistake."""
    lock: list[FileLock] = []
    trackers: list[Trackers] = []

    def work() -> tuple[Path, Path | None]:
        folder, checkpoint, holds_run = choose_folder(args)
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
                trackers.append(Trackers(folder, args.log, settings, 0, strict=True))
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


def metrics_columns(args: RunArgs, config: ModelConfig, data: Data, evaluation: Evaluation | None) -> list[str]:
    """The columns of metrics.csv. A mixture has an epoch for each dataset, by its number; named validation sets have
    columns of their own, and so have evaluated tasks."""
    epochs = () if len(data.rows) == 1 else [f"epoch_{d}" for d in range(len(data.rows))]
    routers = ROUTER_COLUMNS if config.n_expert else ()
    distillation = DISTILLATION_COLUMNS if args.objective == "distillation" else ()
    validation = [f"{measure}/{name}" for name in data.val if name for measure in VALIDATION_COLUMNS]
    return [
        *COLUMNS,
        *epochs,
        *routers,
        *distillation,
        *validation,
        *(evaluation.columns if evaluation is not None else ()),
    ]


def begin_recording(
    args: RunArgs,
    settings: dict[str, Any],
    fabric: Fabric,
    folder: Path,
    data: Data,
    progress: Progress,
    columns: Sequence[str],
    trackers: Trackers | None,
) -> tuple[DatapointRecorder | None, Compactor | None, Trackers | None]:
    """Cut the run folder back to `progress.step`, write the files that describe the run, and open the writers of the
    record and, on rank 0, the trackers.

    Args:
        columns: of metrics.csv.
        trackers: those of a new run, which are open already.
    """
    recorded = args.data.datapoints and not args.data.mock
    micro_batch_samples = args.train.micro_batch

    def prepare_folder() -> None:
        if max(logged_steps(folder / METRICS), default=0) > progress.step:
            abandon(folder, args.log)
        rewind(folder, progress.step, columns, again=progress.unfinished is not None)
        cut_evaluations(folder / EVALUATIONS, progress.step, again=progress.unfinished is not None)
        remove_if_possible(folder / STOPPED)
        text = yaml.safe_dump(settings | {"resume": None}, sort_keys=False, allow_unicode=True)
        try:
            write_text(folder / SETTINGS, text)
        except OSError as error:  # every checkpoint holds it too
            warn(f"{folder / 'config.yaml'} could not be written: {error}")
        if recorded:
            facts = describe_order(
                data.rows,
                data.mixture,
                progress.segments,
                document_mask=args.data.document_mask,
                end_sample=data.end_sample,
                plan_dir=args.data.plan_dir,
                skips=progress.skips,
            )
            write_order(folder / DATAPOINTS, facts, (progress.step, fabric.world_size, micro_batch_samples))
        source = data.train[0].tokenizer_folder
        if source is not None and not (folder / "tokenizer").exists():
            try:
                copy_tokenizer(source, folder / "tokenizer")
            except (OSError, ValueError) as error:
                if progress.step == 0:
                    raise
                warn(f"the tokenizer could not be copied to {folder}: {error}")

    on_rank_zero(fabric, prepare_folder)
    rank = fabric.global_rank
    if args.log.trackers and trackers is None and rank == 0:
        trackers = Trackers(folder, args.log, settings, progress.step, strict=False)
    if not recorded:
        return None, None, trackers
    recorder = DatapointRecorder(folder / DATAPOINTS, rank, fabric.world_size, micro_batch_samples, progress.step)
    return recorder, Compactor(folder) if rank == 0 else None, trackers
