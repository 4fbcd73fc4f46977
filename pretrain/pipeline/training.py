"""The training command of a pipeline, adapted to this machine."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import torch

from pretrain.args import RunArgs
from pretrain.cli.run_parser import parse


def parse_quietly(command: Sequence[str]) -> RunArgs:
    """The settings of a training command, whose notes it will print itself. Exits with a message on a mistake."""
    with contextlib.redirect_stdout(io.StringIO()):
        return parse(list(command[2:]))


def names_of(flags: Sequence[str]) -> set[str]:
    """The names of some flags of fabric_train.py, without values and dashes."""
    return {flag.partition("=")[0].removeprefix("--") for flag in flags if flag.startswith("--")}


def flags_of_this_machine(args: RunArgs, given: set[str]) -> list[str]:
    """Where there is no GPU: no compilation and float32, unless the user has `given` these flags."""
    if torch.cuda.is_available():
        return []
    compiled = ["--compile", "false"] if args.compile and "compile" not in given else []
    precise = ["--precision", "fp32"] if args.precision != "fp32" and "precision" not in given else []
    return compiled + precise
