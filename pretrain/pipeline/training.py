"""The training command of a pipeline, adapted to this machine."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence

import torch

from pretrain.args import RunArgs
from pretrain.cli.run_parser import parse


def parse_quietly(command: Sequence[str]) -> RunArgs:
    """The settings of a training command, whose notes it will print itself. Exits with a message on a mistake."""
    notes = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(notes):
            return parse(list(command[2:]))
    except SystemExit:
        print(notes.getvalue(), end="", file=sys.stderr)
        raise


def flags_of_this_machine(args: RunArgs) -> dict[str, str]:
    """Where there is no GPU: no compilation and float32."""
    if torch.cuda.is_available():
        return {}
    compiled = {"compile": "false"} if args.compile else {}
    return compiled | ({"precision": "fp32"} if args.precision != "fp32" else {})
