"""Settings of a trial: a few steps of a run, in a separate folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pretrain.args import EvalArgs, RunArgs

STEPS = 2  # of a trial: the first compiles and fills caches, the last is measured


def as_new_run(args: RunArgs, folder: Path, checkpoint: Path | None) -> RunArgs:
    """The same settings for a new run in `folder`, where the real one resumes `checkpoint` (None: begins)."""
    if checkpoint is not None and args.init_from is not None:  # the model that the run began with may be gone
        args = replace(args, init_from=checkpoint, init_layers=None, init_optimizer=False)
    return replace(args, out_dir=folder, resume=None)


def without_side_outputs(args: RunArgs) -> RunArgs:
    """The same settings without shard cache, record, trackers, evaluation tasks and word budgets."""
    data, log = replace(args.data, cache_dir=None, datapoints=False), replace(args.log, trackers=[])
    evaluation, save = EvalArgs(micro_batch_samples=args.eval.micro_batch_samples), replace(args.save, at_words=[])
    return replace(args, data=data, log=log, eval=evaluation, save=save, preflight=False)
