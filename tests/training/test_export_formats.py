"""Exports to ONNX and quantized formats: what is written equals the model or is close to it; mistakes are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hf_checks import build
from small_models import EVERY_FAMILY, SIZES

from lit_model.config import ModelConfig
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.io import write_folder
from lit_model.onnx_graph import OnnxGraph
from pretrain.convert import onnx_export
from pretrain.convert.onnx_export import Decoder, export_to_onnx


def folder_of(config: ModelConfig, path: Path) -> Path:
    write_folder(path, config_to_hf(config), tensors_to_hf(config, build(config).state_dict()))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_onnx_of_every_family(family: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    config = ModelConfig(**SIZES, **EVERY_FAMILY[family], vocab_size=100)
    folder = folder_of(config, tmp_path / "hf")
    for cache in (True, False):
        report = export_to_onnx(folder, tmp_path / f"onnx_{cache}", cache=cache)
        print(family, cache, report)
        assert report.difference <= 1e-5 and report.shapes == ((1, 7), (3, 33), (2, 48))
        assert {p.name for p in (tmp_path / f"onnx_{cache}").iterdir()} == {"config.json", "model.onnx"}
        session = runtime.InferenceSession(tmp_path / f"onnx_{cache}/model.onnx", providers=["CPUExecutionProvider"])
        decoder = Decoder(OnnxGraph(build(config), cache=cache), session, 1)
        with pytest.raises(Exception, match="bounds"):  # of onnxruntime's own type
            decoder(np.zeros((1, config.block_size + 1), np.int64))


@pytest.mark.slow
def test_weights_beyond_the_limit_get_their_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 0)
    folder = folder_of(ModelConfig(**SIZES, vocab_size=100, tie_embeddings=True), tmp_path / "hf")
    report = export_to_onnx(folder, tmp_path / "onnx")
    assert {p.name for p in (tmp_path / "onnx").iterdir()} == {"config.json", "model.onnx", "model.onnx.data"}
    assert (tmp_path / "onnx/model.onnx.data").stat().st_size < 1.2 * report.model_bytes  # the tied matrix comes once


@pytest.mark.slow
def test_a_file_with_other_logits_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    folder = folder_of(ModelConfig(**SIZES, vocab_size=100), tmp_path / "hf")
    monkeypatch.setattr(OnnxGraph, "_masks", lambda self, mask, of_keys, T: {"full": torch.zeros(1, 1, 1, 1)})
    with pytest.raises(ValueError, match="was not written: in onnxruntime a logit differs by"):
        export_to_onnx(folder, tmp_path / "onnx", cache=False)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
