"""Exports to ONNX and quantized formats: what is written equals the model or is close to it; mistakes are refused.

The slow tests need the extras `onnx` and `quantize`, and skip themselves without.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_checks import build
from safetensors.torch import load_file
from small_models import EVERY_FAMILY, SIZES, synthetic_texts, train_small_tokenizer, write_model_folder

from lit_model.config import ModelConfig
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.io import write_folder
from lit_model.onnx_graph import OnnxGraph
from pretrain.convert import onnx_export, quantization
from pretrain.convert.onnx_export import Decoder, export_to_onnx
from pretrain.convert.quantization import check_method, quantize
from pretrain.convert.side_by_side import copy_config_and_tokenizer, weights_bytes


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
        with pytest.raises(Exception, match="out of data bounds|invalid index"):  # of onnxruntime's own type
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder, and a text."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_small_tokenizer(path / "tokenizer")
    (path / "text.txt").write_text("\n".join(synthetic_texts(5)))
    return write_model_folder(path / "hf", tokenizer), path / "text.txt"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["int8", "int4", "int8_dynamic", "q8_0", "q4_k_m"])
def test_quantized_models_open_again(method: str, model: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf" if method == "q8_0" else "llama_cpp" if method == "q4_k_m" else "torchao")
    folder, text = model
    output = tmp_path / ("out.gguf" if method.startswith("q") else "out")
    options: dict[str, Any] = {"pre_tokenizer": "gpt-2"} if method.startswith("q") else {}
    report = quantize(folder, output, method, [text], **options)
    print(report)
    assert report.bytes_after < 0.9 * report.bytes_before and report.bits_before != report.bits_after
    assert abs(report.bits_after / report.bits_before - 1) < (0.1 if "4" in method else 0.02)
    assert [p.name for p in tmp_path.iterdir()] == [output.name]
    if output.is_dir():
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in output.iterdir()}


def test_weights_are_counted_and_not_copied(model: tuple[Path, Path], tmp_path: Path) -> None:
    """Files that transformers does not read are neither counted nor copied."""
    source, output = tmp_path / "source", tmp_path / "output"
    shutil.copytree(model[0], source)
    (source / "README.md").write_text("card")
    tensors = load_file(source / "model.safetensors")
    for name in ("pytorch_model.bin", "train.py", "notes.json"):
        (source / name).write_text("x" * 10_000)
    assert weights_bytes(source) == sum(tensor.nbytes for tensor in tensors.values())
    output.mkdir()
    copy_config_and_tokenizer(source, output)
    assert {path.name for path in output.iterdir()} == {path.name for path in model[0].iterdir()} - {
        "model.safetensors"
    } | {"README.md"}


def test_mistakes_are_refused_before_the_text_is_scored(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    monkeypatch.setattr(quantization, "perplexity", None)
    folder, text = model
    narrow = folder_of(ModelConfig(**{**SIZES, "intermediate_size": 80}, vocab_size=100), tmp_path / "narrow")
    output = tmp_path / "out.gguf"

    def refused(message: str, source: Path = folder, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            quantize(source, output, "q8_0", [text], **options)

    refused("is a Hugging Face folder and brings its own", tokenizer=folder, pre_tokenizer="gpt-2")
    refused("splits words like none of the known pre-tokenizers of llama.cpp")
    refused("ffn_down.weight has rows of 80 numbers, not a multiple of 32", source=narrow)
    assert not output.exists()


def test_a_gguf_file_that_appeared_meanwhile_is_kept(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    folder, text = model
    output = tmp_path / "out.gguf"

    class Other:
        """A stand-in for the model; while it is scored, another program writes the output."""

        def __init__(self, *_: Any, **options: Any) -> None:
            if "gguf_file" in options:
                output.write_text("another program's")

    monkeypatch.setattr(quantization, "_open", Other)
    monkeypatch.setattr(quantization._Text, "bits_per_byte", lambda *_: 1.0)
    monkeypatch.setattr(quantization, "_llama_cpp_forward", lambda *_: None)
    with pytest.raises(ValueError, match="was created by another program in the meantime"):
        quantize(folder, output, "q8_0", [text], pre_tokenizer="gpt-2")
    assert output.read_text() == "another program's" and [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_mistakes_are_refused(model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is written, with the flag or the package by name."""
    folder, text = model
    output = tmp_path / "out"

    def refused(message: str, method: str = "int8", to: Path = output, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            quantize(folder, to, method, [text], **options)

    refused("--method int3 is unknown; choose one of int8, int4", "int3")
    refused("exists already", to=folder)
    refused("--max_documents 0", max_documents=0)
    refused("--pre_tokenizer gpt-2 is for q8_0 and q4_k_m; --method is int8", pre_tokenizer="gpt-2")
    for name, method, install in (
        ("torchao", "int8", "torchao: pip install 'llammlein[quantize]'"),
        ("llama_cpp", "q4_k_m", "llama-cpp-python: pip install llama-cpp-python"),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        refused(rf"--method {method} needs the package {re.escape(install)}", method)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=re.escape("ONNX needs the package onnx: pip install 'llammlein[onnx]'")):
        export_to_onnx(folder, output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "method", "message"),
    [
        ("gpt2", "int8", "a gpt2 in transformers has none"),
        ("llama4_text", "int8", "does not quantize experts in transformers"),
        ("olmo2", "q8_0", "this model is of family olmo2"),
    ],
)
def test_models_that_a_method_does_not_fit(family: str, method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_method(ModelConfig(**SIZES, **EVERY_FAMILY[family], vocab_size=100), method)


def test_int4_needs_rows_of_whole_groups() -> None:
    with pytest.raises(ValueError, match="--method int4: intermediate_size is 80, not a multiple of 32"):
        check_method(ModelConfig(**{**SIZES, "intermediate_size": 80}, vocab_size=100), "int4")
