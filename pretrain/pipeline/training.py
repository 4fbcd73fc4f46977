"""The training command of a pipeline: adapted to this machine, and how long it will take here."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence

import torch

from lit_model.config import ModelConfig
from lit_model.device import best_kind
from pretrain.args import RunArgs
from pretrain.cli.run_parser import parse
from pretrain.parallel import check_batch
from pretrain.pipeline.steps import ROOT
from pretrain.planning.devices import Range
from pretrain.planning.expectation import planned_device
from pretrain.planning.plan import expected_speed, length

TOKENS_PER_WORD = (1.3, 1.5, 2.0)  # low, likely and high, assumed before there is a tokenizer


def parse_quietly(command: Sequence[str]) -> RunArgs:
    """The settings of a training command, which runs in ROOT and will print its notes itself. Exits with a message on a
    mistake; raises ValueError if its devices cannot share its batch."""
    notes = io.StringIO()
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(notes):
            args = parse(list(command[2:]))
    except SystemExit:
        print(notes.getvalue(), end="", file=sys.stderr)
        raise
    if args.devices != "auto":
        check_batch(args.train, args.devices * args.num_nodes)
    return args


def flags_of_this_machine(args: RunArgs) -> dict[str, str]:
    """Where there is no GPU: no compilation and float32."""
    if torch.cuda.is_available():
        return {}
    compiled = {"compile": "false"} if args.compile else {}
    return compiled | ({"precision": "fp32"} if args.precision != "fp32" else {})


def seconds_here(args: RunArgs, config: ModelConfig, words: int, teachers: Sequence[ModelConfig]) -> Range | None:
    """Seconds of a training on this machine's devices; None if their speed is unknown.

    Args:
        words: of the training text.
        teachers: that compute in its steps.
    """
    device, n = torch.device(best_kind()), 1
    if device.type == "cuda":
        n = torch.cuda.device_count() if args.devices == "auto" else args.devices
    if (known := planned_device(device, n, args.precision)) is None:
        return None
    block_size = args.train.block_size or config.block_size
    few, likely, many = (length(args, block_size, int(ratio * words))[0] for ratio in TOKENS_PER_WORD)
    speed = expected_speed(args, config, *known, n, block_size, None, teachers)
    return Range(few / speed.high, likely / speed.likely, many / speed.low)
