"""The run folders near a path that is none, for error messages: quickstart.py, for example, puts its run in DIR/run."""

from __future__ import annotations

from pathlib import Path

from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_files.run_files import SETTINGS


def did_you_mean_run(path: Path) -> str:
    """`; did you mean PATH/run?` with up to three run folders in `path`, or the run of a checkpoint; "" without any."""
    if checkpoint_step(path) is not None:
        near = [path.parent]
    elif path.is_dir():
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
        near = [folder for folder in folders if (folder / SETTINGS).is_file() or list_checkpoints(folder)]
    else:
        near = []
    return f"; did you mean {' or '.join(map(str, near[:3]))}?" if near else ""
