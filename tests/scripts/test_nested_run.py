"""A pipeline's folder in place of its run: every script that reads a run names the run in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import script_error

from lit_files.nested_run import did_you_mean_run


@pytest.mark.parametrize(
    "words",
    [
        "publish.py FOLDER",
        "report.py FOLDER",
        "compare.py FOLDER",
        "evaluate.py FOLDER",
        "evaluate.py --all_checkpoints FOLDER",
        "generate.py --model FOLDER --prompt x",
        "trace_data.py step FOLDER 1",
        "convert_to_hf.py --checkpoint FOLDER --output FOLDER/out",
        "convert_to_hf.py --word_budgets --checkpoint FOLDER --output FOLDER/out",
        "average_checkpoints.py --last 2 FOLDER --output FOLDER/out",
        "verify_hf.py --run FOLDER --hf FOLDER",
        "inspect_checkpoint.py FOLDER",
    ],
)
def test_the_run_inside_is_named(words: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 1\n")
    name, *arguments = words.replace("FOLDER", str(tmp_path)).split()
    assert f"; did you mean {run}?" in script_error(name, *arguments)


def test_near_runs(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "iter-00000001-ckpt.pth").touch()
    assert did_you_mean_run(tmp_path) == f"; did you mean {tmp_path / 'a'} or {tmp_path / 'b'} or {tmp_path / 'c'}?"
    assert did_you_mean_run(tmp_path / "a" / "iter-00000001-ckpt.pth") == f"; did you mean {tmp_path / 'a'}?"
    assert did_you_mean_run(tmp_path / "a") == did_you_mean_run(tmp_path / "none") == ""
