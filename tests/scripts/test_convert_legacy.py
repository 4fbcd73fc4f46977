"""Checkpoints of TinyLlama, LLäMmlein, lit-gpt and litgpt: the same model in every naming scheme, and refusals.

Three references: the weights that the file was made from; the arithmetic of those trainers, written out below with
their parameters; and litgpt's own model, if it is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from legacy_files import MLP_NAMES, NAMINGS, SETTINGS, litgpt_fields, save_legacy, to_legacy
from running import script
from torch import Tensor

from lit_model.config import ModelConfig
from lit_model.hf.table import plain_name
from lit_model.init import initialise
from lit_model.legacy import config_by_name, config_from_litgpt
from lit_model.load import Checkpoint, load_model
from lit_model.model import GPT
from lit_model.registry import MODELS

CONFIG = ModelConfig("small", 2, 6, 2, 48, 64, block_size=32, vocab_size=120, padding_multiple=64)


@pytest.fixture(scope="module")
def model() -> GPT:
    return made(CONFIG)


def made(config: ModelConfig) -> GPT:
    model = GPT(config)
    initialise(model, config, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms of 1 and biases of 0 would hide a mistake
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.eval()


def tokens(config: ModelConfig) -> Tensor:
    return torch.randint(0, config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))


def convert(*arguments: object, by: str = "convert_legacy.py") -> subprocess.CompletedProcess[str]:
    return script(by, *arguments)


def config_file(folder: Path, config: ModelConfig = CONFIG, **changes: object) -> Path:
    file = folder / "model_config.yaml"
    file.write_text(yaml.safe_dump({**litgpt_fields(config), **changes}))
    return file


def their_logits(state: dict[str, Tensor], config: ModelConfig, naming: str, tokens: Tensor) -> Tensor:
    """The forward of TinyLlama's model (float64): rows grouped as q..q k v, half-split RoPE, w3(silu(w1 x) * w2 x)."""
    fused, gate, up, down = MLP_NAMES[naming]
    H, G, D = config.n_head, config.n_query_groups, config.head_size
    weights = {name: tensor.double() for name, tensor in state.items()}
    B, T = tokens.shape
    angles = torch.outer(torch.arange(T), config.rope_base ** (-torch.arange(0, D, 2) / D)).double()
    cos, sin = (f(angles).repeat(1, 2)[None, :, None] for f in (torch.cos, torch.sin))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weights[name]

    def linear(x: Tensor, name: str) -> Tensor:
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def rotated(x: Tensor) -> Tensor:
        return x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), dim=-1) * sin

    x = weights["transformer.wte.weight"][tokens]
    for i in range(config.n_layer):
        block = f"transformer.h.{i}."
        qkv = linear(norm(x, f"{block}norm_1.weight"), f"{block}attn.{fused}")
        if fused == "attn":
            q, k, v = qkv.view(B, T, G, H // G + 2, D).split((H // G, 1, 1), dim=-2)
        else:
            q, k, v = qkv.split((H * D, G * D, G * D), dim=-1)
        q, k, v = (t.reshape(B, T, -1, D) for t in (q, k, v))
        q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(H // G, dim=2) for t in (k, v))
        scores = torch.einsum("bshd,bthd->bhst", q, k) / D**0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        y = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v).reshape(B, T, H * D)
        x = x + linear(y, f"{block}attn.proj")
        h = norm(x, f"{block}norm_2.weight")
        h = torch.nn.functional.silu(linear(h, f"{block}mlp.{gate}")) * linear(h, f"{block}mlp.{up}")
        x = x + linear(h, f"{block}mlp.{down}")
    return norm(x, "transformer.ln_f.weight") @ weights.get("lm_head.weight", weights["transformer.wte.weight"]).T


@pytest.mark.parametrize("naming", NAMINGS)
def test_logits_are_equal_in_every_naming_scheme(model: GPT, naming: str, tmp_path: Path) -> None:
    state = to_legacy(model.state_dict(), CONFIG, naming)
    save_legacy(tmp_path / "iter-000100-ckpt.pth", state)
    done = convert(tmp_path / "iter-000100-ckpt.pth", tmp_path / "ours.pth", "--model", config_file(tmp_path))
    assert done.returncode == 0, done.stderr
    imported, config = load_model(tmp_path / "ours.pth")
    assert config == CONFIG
    ids = tokens(CONFIG)
    with torch.no_grad():
        expected, logits = model(ids), imported(ids)
        theirs = their_logits(state, CONFIG, naming, ids)[..., : CONFIG.vocab_size]
    assert torch.equal(logits, expected)
    # float32 rounding for logits of size 1: the same bound as between two float32 kernels
    assert (logits.double() - theirs).abs().max() < 2e-6


@pytest.mark.parametrize("naming", ["lit-gpt", "litgpt"])
def test_biases_and_tied_embeddings(naming: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, attention_bias=True, mlp_bias=True, tie_embeddings=True)
    model = made(config)
    state = to_legacy(model.state_dict(), config, naming)
    state = {"lm_head.weight": state["transformer.wte.weight"], **state}  # litgpt saves both names of the one matrix
    save_legacy(tmp_path / "lit_model.pth", state)
    config_file(tmp_path, config)
    assert convert(tmp_path, tmp_path / "ours.pth").returncode == 0
    imported, read = load_model(tmp_path / "ours.pth")
    assert read == config
    ids = tokens(config)
    with torch.no_grad():
        assert torch.equal(imported(ids), model(ids))
        theirs = their_logits(state, config, naming, ids)[..., : config.vocab_size]
        assert (imported(ids).double() - theirs).abs().max() < 2e-6


@pytest.mark.parametrize("naming", ["lit-gpt", "litgpt"])
def test_logits_are_litgpts(naming: str, tmp_path: Path) -> None:
    """litgpt's own model, with Llama 3.1's scaled frequencies in one case."""
    litgpt = pytest.importorskip("litgpt", reason="litgpt is not installed here")
    config = CONFIG
    if naming == "litgpt":
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_block_size": 16}
        config = ModelConfig.from_dict({**CONFIG.to_dict(), "rope_scaling": scaling})
    theirs = litgpt.GPT(litgpt.Config(**litgpt_fields(config)))
    state = to_legacy(made(config).state_dict(), config, naming)
    theirs.load_state_dict(dict(state))
    save_legacy(tmp_path / "lit_model.pth", state if naming == "lit-gpt" else theirs.state_dict())
    config_file(tmp_path, config, **dataclasses.asdict(theirs.config))
    done = convert(tmp_path, tmp_path / "ours.pth")
    assert done.returncode == 0, done.stderr
    imported, read = load_model(tmp_path / "ours.pth")
    assert read == config
    ids = tokens(config)
    with torch.no_grad():
        difference = (imported(ids) - theirs(ids)[..., : config.vocab_size]).abs().max()
    assert difference < 2e-6, difference


def test_wrappers_and_forms_of_files(model: GPT, tmp_path: Path) -> None:
    state = to_legacy(model.state_dict(), CONFIG, "tinyllama")
    config = config_file(tmp_path)
    forms: dict[str, Callable[[], object]] = {
        "bare": lambda: state,
        "compiled": lambda: {"model": {f"_orig_mod.{n}": t for n, t in state.items()}, "iter_num": 7, "step_count": 3},
        "ddp": lambda: {"model": {f"module._orig_mod.{n}": t for n, t in state.items()}},
        "fabric": lambda: {"model": {f"_forward_module.{n}": t for n, t in state.items()}},
        "fsdp": lambda: {
            "model": {
                n.replace("h.1.", "h.1._fsdp_wrapped_module._checkpoint_wrapped_module."): t for n, t in state.items()
            }
        },
        "views": lambda: {n: torch.cat((t, t))[: len(t)] for n, t in state.items()},
    }
    for name, form in forms.items():
        torch.save(form(), tmp_path / f"{name}.pth")
        done = convert(tmp_path / f"{name}.pth", tmp_path / f"{name}-ours.pth", "--model", config)
        assert done.returncode == 0, (name, done.stderr)
        checkpoint = Checkpoint(tmp_path / f"{name}-ours.pth")
        assert checkpoint.verify() == [] and checkpoint.meta["step"] == (3 if name == "compiled" else 0)
        assert all(torch.equal(checkpoint.tensor(f"model.{n}"), t) for n, t in model.state_dict().items()), name
        assert "without an optimizer" in done.stdout
    sizes = {name: (tmp_path / f"{name}-ours.pth").stat().st_size for name in forms}
    assert sizes["views"] == sizes["bare"], "whole storages were written instead of the tensors' slices"
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert convert(tmp_path / "old.pth", tmp_path / "old-ours.pth", "--model", config).returncode == 0
    assert plain_name("module.lm_head.weight") == "lm_head.weight"


def test_config_by_name_and_vocabulary(tmp_path: Path) -> None:
    assert config_by_name("tiny_LLaMA_1b", 32000) == MODELS["TinyLlama_1.1B"]
    assert config_by_name("tiny_LLaMA_1b", 32064) == MODELS["LLaMmlein_1B"]
    debug = MODELS["debug"]
    with torch.no_grad():
        state = to_legacy(made(debug).state_dict(), debug, "llammlein")
    # 500 rows: fewer than the registry's, and not a multiple of 64
    for name in ("lm_head.weight", "transformer.wte.weight"):
        state[name] = state[name][:500].clone()
    save_legacy(tmp_path / "a.pth", state, hparams={"model_name": "debug", **SETTINGS})
    done = convert(tmp_path / "a.pth", tmp_path / "ours.pth")
    assert done.returncode == 2 and "--vocab_size" in done.stderr, done.stderr
    done = convert(tmp_path / "a.pth", tmp_path / "ours.pth", "--vocab_size", 490)
    assert done.returncode == 0, done.stderr
    imported, config = load_model(tmp_path / "ours.pth")
    assert (config.vocab_size, config.padded_vocab_size) == (490, 512)
    head = imported.state_dict()["lm_head.weight"]
    assert torch.equal(head[:500], state["lm_head.weight"]) and not head[500:].any()


class Payload:
    """Creates the marker file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.mkdir, (self.marker,)


def test_mistakes_are_named(model: GPT, tmp_path: Path) -> None:
    state = to_legacy(model.state_dict(), CONFIG, "tinyllama")
    marker = tmp_path / "marker"
    config = config_file(tmp_path)
    (sharded := tmp_path / "sharded").mkdir()
    (sharded / ".metadata").write_bytes(b"")
    (empty := tmp_path / "empty").mkdir()

    def saved(name: str, content: object) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    def without(*names: str) -> dict[str, Tensor]:
        return {n: t for n, t in state.items() if n not in names}

    w1, w3 = "transformer.h.1.mlp.swiglu.w1.weight", "transformer.h.1.mlp.swiglu.w3.weight"
    other = ["--model", config]
    cases: list[tuple[Path, list[Any], str]] = [
        (tmp_path / "no.pth", other, "no checkpoint at"),
        (sharded, other, "fabric consolidate"),
        (empty, other, "has no lit_model.pth"),
        (saved("payload.pth", {"model": state, "hparams": Payload(marker)}), other, "contains objects of"),
        (saved("ns.pth", {"model": state, "hparams": argparse.Namespace()}), other, "argparse.Namespace"),
        (saved("posix.pth", {"model": state, "hparams": {"out": tmp_path}}), other, "pathlib"),
        (saved("list.pth", [1, 2]), other, "contains a list"),
        (saved("text.pth", {"model": {"a": "b"}}), other, "a is not a tensor"),
        (
            saved("ours.pth", {"model": state, "optimizer": {}, "meta": "{}"}),
            other,
            "already a checkpoint of this project",
        ),
        (saved("lacks.pth", without(w1)), other, "mlp.fc_1.weight"),
        (saved("more.pth", {**state, "transformer.h.0.attn.lora_A": torch.ones(1)}), other, "attn.lora_A"),
        (saved("layer.pth", {**state, "transformer.h.2.norm_1.weight": torch.ones(48)}), other, "h.2.norm_1.weight"),
        (saved("twice.pth", {**state, w1.replace("swiglu.", ""): state[w1]}), other, "are both"),
        (saved("shape.pth", {**state, w3: state[w3].T.contiguous()}), other, f"{w3} has shape (64, 48)"),
        (saved("noname.pth", {"model": state, "hparams": {"a": 1}}), ["--model", "nowhere.yaml"], "nowhere.yaml"),
        (saved("named.pth", {"model": state}), ["--model", "LLaMmlein_1b"], "LLaMmlein_1B"),
    ]
    text = tmp_path / "text.txt.pth"
    text.write_text("no pickle")
    cases.append((text, other, "damaged"))
    file = tmp_path / "noname.pth"
    cut = tmp_path / "cut.pth"
    cut.write_bytes(file.read_bytes()[:-2000])
    cases.append((cut, other, "damaged"))
    for field, value in [
        ("norm_class_name", "LayerNorm"),
        ("mlp_class_name", "GemmaMLP"),
        ("rotary_percentage", 0.25),
        ("parallel_residual", True),
        ("rope_adjustments", {"factor": 2.0}),
        ("n_expert", 4),
        ("norm_qk", True),
        ("attn_bias", True),
        ("rope_condense_ratio", 4),
        ("condense_ratio", 1),
        ("surprise", 1),
    ]:
        (folder := tmp_path / field).mkdir()
        cases.append((file, ["--model", config_file(folder, **{field: value})], field))
    before = {p.name for p in tmp_path.iterdir()}
    for source, more, message in cases:
        done = convert(source, tmp_path / "out.pth", *more)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (source, done.stderr)
        assert done.stderr.startswith("error: ") and message in done.stderr, (source, done.stderr)
    config.unlink()
    done = convert(file, tmp_path / "out.pth")
    assert done.returncode == 2 and "give --model" in done.stderr, done.stderr
    done = convert(file, file)
    assert done.returncode == 2 and "exists already" in done.stderr, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == before - {config.name}, "leftovers"
    assert not marker.exists()
    with pytest.raises(ValueError, match="litgpt's default"):
        config_from_litgpt({k: v for k, v in litgpt_fields(CONFIG).items() if k != "rotary_percentage"})


def test_a_step_that_contradicts_the_name_is_refused(model: GPT, tmp_path: Path) -> None:
    save_legacy(tmp_path / "a.pth", to_legacy(model.state_dict(), CONFIG, "tinyllama"), step=5)
    config = config_file(tmp_path)
    done = convert(tmp_path / "a.pth", tmp_path / "iter-00000004-ckpt.pth", "--model", config)
    assert done.returncode == 2 and "names step 4" in done.stderr
    assert convert(tmp_path / "a.pth", tmp_path / "iter-00000005-ckpt.pth", "--model", config).returncode == 0


def test_lit_config_and_export(model: GPT, tmp_path: Path) -> None:
    """With lit-gpt's lit_config.json; and the result can be exported to a Hugging Face folder."""
    renamed = {
        "norm_class_name": "_norm_class",
        "mlp_class_name": "_mlp_class",
        "rope_condense_ratio": "condense_ratio",
    }
    fields = {renamed.get(key, key): value for key, value in litgpt_fields(CONFIG).items()}
    (tmp_path / "lit_config.json").write_text(json.dumps({**fields, "org": "Lightning-AI"}))
    save_legacy(tmp_path / "lit_model.pth", to_legacy(model.state_dict(), CONFIG, "lit-gpt"))
    assert convert(tmp_path, tmp_path / "ours.pth").returncode == 0
    done = convert("--checkpoint", tmp_path / "ours.pth", "--output", tmp_path / "hf", by="convert_to_hf.py")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "hf")[0](tokens(CONFIG)), model(tokens(CONFIG)))
