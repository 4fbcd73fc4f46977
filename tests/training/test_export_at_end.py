"""--save.hf: the model for transformers at the end of a run, also after a kill before it was written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from running import flags

from lit_model.hf.io import read_folder
from lit_model.load import Checkpoint, load_tensors
from pretrain.convert.export import export_run
from pretrain.fabric_train import main


def test_a_run_ends_with_its_model_for_transformers(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    of = {"train__max_steps": 4, "save__hf": "true"}
    assert main(flags(data, run, **of, save__state_dict_type="sharded")) == 0
    assert f"Hugging Face model: {run / 'hf'}" in capsys.readouterr().out

    def check(step: int) -> None:
        _, ours = load_tensors(run / f"iter-{step:08d}-ckpt.pth")
        _, theirs = read_folder(run / "hf")
        assert all((theirs[name] == ours[name]).all() for name in ours)

    check(4)
    # Finished, but killed before the export: the call is repeated. Then there is nothing to do.
    shutil.rmtree(run / "hf")
    for exported in (True, False):
        assert main(flags(data, run, **of, save__state_dict_type="sharded", resume="auto")) == 0
        output = capsys.readouterr().out
        assert "is finished" in output and ("Hugging Face model" in output) is exported
    # What is not an export is kept.
    shutil.rmtree(run / "hf")
    (run / "hf").write_text("mine")
    assert export_run(run) == 1 and (run / "hf").read_text() == "mine"
    assert "it holds something else" in capsys.readouterr().err
    (run / "hf").unlink()
    # Further steps replace it.
    more = {
        **of,
        "train__max_steps": 6,
        "save__state_dict_type": "sharded",
        "resume": "latest",
        "resume_allow": "train.max_steps",
    }
    assert main(flags(data, run, **more)) == 0
    check(6)


def test_what_transformers_cannot_express_is_refused_before_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {"model__norm_class_name": "LayerNorm", "model__pre_norm": "false", "model__post_norm": "true"}
    assert main(flags(data, tmp_path / "run", **odd, save__hf="true")) == 2
    assert "--save.hf true: no family of transformers can express" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_failed_export_is_an_error_of_a_complete_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretrain.convert.export.write_folder", full)
    assert main(flags(data, tmp_path / "run", train__max_steps=2, save__hf="true")) == 1
    error = capsys.readouterr().err
    assert "the run is complete, but" in error and "convert_to_hf.py --checkpoint" in error
    assert Checkpoint(tmp_path / "run" / "iter-00000002-ckpt.pth").meta["step"] == 2
    assert not (tmp_path / "run" / "hf").exists()
