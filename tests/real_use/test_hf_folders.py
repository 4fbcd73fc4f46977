"""Hugging Face folders as they occur in practice, read by transformers' rules."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import flags, script, train, write_dataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_model.load import load_model

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
NEOX = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
TINY: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 8},
    "qwen3": LLAMA,
    "olmo2": LLAMA,
    "gemma2": {**LLAMA, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "llama4_text": {**LLAMA, "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neox": NEOX,
}
# Configs that another family could express as well.
AMBIGUOUS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral without a window": ("mistral", {**LLAMA, "sliding_window": None}),
    "Llama 4 of plain layers": (
        "llama4_text",
        {
            **LLAMA,
            "intermediate_size_mlp": 48,
            "moe_layers": [],
            "no_rope_layers": [1, 1],
            "layer_types": ["full_attention"] * 2,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
        },
    ),
    "Qwen 3 with biases and windows": (
        "qwen3",
        {**LLAMA, "attention_bias": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "GPT-NeoX in series, all of a head rotated": (
        "gpt_neox",
        {**NEOX, "use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "silu"},
    ),
}


def make(folder: Path, kind: str = "llama", seed: int = 0, shard: str = "1GB", **fields: Any) -> Path:
    """A small random model, as transformers saves it."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **{**TINY[kind], "pad_token_id": None, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def change(
    folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], file: str = "model.safetensors"
) -> None:
    save_file(edit(load_file(folder / file)), folder / file, {"format": "pt"})


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def logits(folder: Path) -> Tensor:
    """Logits of the folder's model as loaded by transformers."""
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model(torch.arange(20).view(1, -1)).logits


def ours(path: Path) -> Tensor:
    with torch.no_grad():
        return load_model(path)[0](torch.arange(20).view(1, -1))


def same_logits(folder: Path) -> None:
    torch.testing.assert_close(ours(folder), logits(folder), rtol=1e-5, atol=1e-5)


def refused(folder: Path, *words: str) -> None:
    """The conversion ends with one line that contains these words, and leaves no files."""
    output = folder.parent / "start.pth"
    done = script("convert_from_hf.py", "--input", folder, "--output", output)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not list(folder.parent.glob("*.pth*")) and not list(folder.parent.glob(".*"))


def test_one_file_next_to_a_stale_index(tmp_path: Path) -> None:
    """A single file saved over an older sharded model takes precedence."""
    folder = make(tmp_path / "hf", seed=1, shard="10KB")
    assert (folder / "model.safetensors.index.json").is_file()
    stale = ours(folder)
    shutil.copy(make(tmp_path / "new", seed=2) / "model.safetensors", folder)
    assert not torch.allclose(ours(folder), stale)
    same_logits(folder)


def test_old_files_are_read_in_transformers_order(tmp_path: Path) -> None:
    """pytorch_model.bin takes precedence over its index, and safetensors over both."""
    folder = make(tmp_path / "hf", seed=1)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for file, held in (("a.bin", names[::2]), ("b.bin", names[1::2])):
        torch.save({name: tensors[name] + 1 for name in held}, folder / file)
    index = {name: file for file, held in (("a.bin", names[::2]), ("b.bin", names[1::2])) for name in held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    shards = ours(folder)
    same_logits(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    single = ours(folder)
    assert not torch.allclose(single, shards)
    same_logits(folder)
    make(tmp_path / "other", seed=2, shard="10KB")
    for path in (tmp_path / "other").glob("model*"):
        shutil.copy(path, folder)
    assert not torch.allclose(ours(folder), single)
    same_logits(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gptj"])
def test_a_tied_model_saved_with_only_the_head(tmp_path: Path, kind: str) -> None:
    """Either matrix of a tied model suffices."""
    folder = make(tmp_path / "hf", kind, tie_word_embeddings=True)
    embedding = {"llama": "model.embed_tokens", "gpt_neox": "gpt_neox.embed_in"}.get(kind, "transformer.wte")
    head = "embed_out" if kind == "gpt_neox" else "lm_head"
    before = ours(folder)
    change(folder, lambda tensors: {n.replace(embedding, head): t for n, t in tensors.items()})
    assert torch.equal(ours(folder), before)
    same_logits(folder)
    change(folder, lambda tensors: {**tensors, f"{embedding}.weight": tensors[f"{head}.weight"] + 1})
    refused(folder, "tie_word_embeddings is true", f"{head}.weight differs from {embedding}.weight")


def test_an_untied_model_without_its_head_is_refused(tmp_path: Path) -> None:
    """transformers would initialise the head randomly."""
    folder = make(tmp_path / "hf")
    change(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    refused(folder, str(folder / "model.safetensors"), "lacks lm_head.weight")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod."])
def test_names_changed_by_wrappers(tmp_path: Path, prefix: str) -> None:
    """Names with a prefix from torch.compile or DDP mean the same parameters."""
    folder = make(tmp_path / "hf")
    before = ours(folder)
    change(folder, lambda tensors: {prefix + n: t for n, t in tensors.items()})
    assert torch.equal(ours(folder), before)
    change(folder, lambda tensors: {**tensors, "lm_head.weight": tensors[f"{prefix}lm_head.weight"] + 1})
    refused(folder, "both", f"{prefix}lm_head.weight", "one parameter")


def test_errors_use_the_names_in_the_file(tmp_path: Path) -> None:
    """An unknown tensor is reported under its name in the file."""
    folder = make(tmp_path / "hf")
    change(folder, lambda tensors: {f"_orig_mod.{n}": t for n, t in tensors.items()} | {"_orig_mod.x.y": torch.ones(1)})
    refused(folder, "has unknown _orig_mod.x.y")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_base_models_prefix_is_optional(tmp_path: Path, kind: str) -> None:
    """As in transformers, each name may have the base model's prefix or not."""
    folder = make(tmp_path / "hf", kind)
    before = ours(folder)
    prefix = {"llama": "model.", "gpt2": "transformer."}[kind]
    change(folder, lambda tensors: {n.removeprefix(prefix) if ".1." in n else n: t for n, t in tensors.items()})
    assert torch.equal(ours(folder), before)
    same_logits(folder)
    change(folder, lambda tensors: {n.removeprefix(prefix): t for n, t in tensors.items()})
    assert torch.equal(ours(folder), before)
    same_logits(folder)


def test_config_keys_that_change_nothing(tmp_path: Path) -> None:
    """Other programs' keys in config.json, and code that transformers does not run, are ignored."""
    folder = make(tmp_path / "hf")
    before = ours(folder)
    change_json(
        folder / "config.json",
        auto_map={"AutoModelForCausalLM": "modeling_custom.CustomForCausalLM"},
        unsloth_version="2025.1.1",
        unsloth_fixed=True,
        torch_dtype="bfloat16",
        transformers_version="4.30.0",
        peft_version="0.1",
        eos_token="</s>",
        is_decoder=True,
        neftune_noise_alpha=5,
        attn_implementation="sdpa",
        quantization_config=None,
    )
    assert torch.equal(ours(folder), before)
    same_logits(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"compression_config": {"format": "int-quantized"}},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"is_causal": False},
        {"transformers_weights": "other.safetensors"},
        {"pruned_heads": {"0": [1]}},
        {"architectures": ["CustomForCausalLM"]},
        {"logit_scale": 2.0},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_config_keys_that_change_the_computation(tmp_path: Path, fields: dict[str, Any]) -> None:
    """A key that implies other weights or another computation is refused by name."""
    folder = make(tmp_path / "hf")
    change_json(folder / "config.json", **fields)
    refused(folder, str(folder / "config.json"), next(iter(fields)))


def test_unusual_weight_files_are_refused(tmp_path: Path) -> None:
    """Integer weights, an adapter, and a checkpoint split by rank are refused with the file's name."""
    folder = make(tmp_path / "hf")
    shutil.copytree(folder, tmp_path / "int")
    change(
        tmp_path / "int",
        lambda tensors: {n: (t * 100).to(torch.int8) if "q_proj" in n else t for n, t in tensors.items()},
    )
    refused(tmp_path / "int", "model.safetensors", "q_proj.weight as I8", "quantized")
    shutil.copytree(folder, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", "adapter_config.json", "merge")
    shutil.copytree(folder, tmp_path / "ranks")
    shutil.copy(folder / "model.safetensors", tmp_path / "ranks" / "shard-00000-model-00001-of-00002.safetensors")
    refused(tmp_path / "ranks", "shard-00000-model-00001-of-00002.safetensors", "save_pretrained")


def test_shards_and_an_index_that_disagree(tmp_path: Path) -> None:
    """All tensors of the index's files are read, as in transformers; missing and duplicate ones are named."""
    folder = make(tmp_path / "hf", shard="10KB")
    before = ours(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = index["weight_map"]
    shards = sorted(set(weights.values()))
    shutil.copy(folder / shards[0], folder / "model-00099-of-00099.safetensors")  # a leftover of an earlier save
    unlisted = next(n for n in weights if list(weights.values()).count(weights[n]) > 1)
    some = {n: file for n, file in weights.items() if n != unlisted}
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": some}))
    assert torch.equal(ours(folder), before)
    same_logits(folder)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    missing = copy("missing")
    (missing / shards[1]).unlink()
    refused(missing, "model.safetensors.index.json", shards[1], "not in the folder")
    twice = copy("twice")
    change(
        twice, lambda tensors: {**tensors, unlisted: torch.zeros(1)}, next(s for s in shards if s != weights[unlisted])
    )
    refused(twice, "both hold", unlisted)
    emptied = copy("emptied")
    change(
        emptied, lambda tensors: {n: t for n, t in tensors.items() if n not in some} or {"x": torch.ones(1)}, shards[2]
    )
    refused(emptied, shards[2], "lacks the tensor")


@pytest.mark.parametrize("name", [*TINY, *AMBIGUOUS])
def test_an_imported_family_is_exported_as_the_same_family(tmp_path: Path, name: str) -> None:
    """After import and export, model_type, architectures and logits are unchanged."""
    kind, fields = AMBIGUOUS.get(name, (name, {}))
    folder = make(tmp_path / "hf", kind, **fields)
    assert script("convert_from_hf.py", "--input", folder, "--output", tmp_path / "start.pth").returncode == 0
    done = script("convert_to_hf.py", "--checkpoint", tmp_path / "start.pth", "--output", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back"))
    assert [after[key] for key in ("model_type", "architectures")] == [kind, before["architectures"]]
    torch.testing.assert_close(logits(tmp_path / "back"), logits(folder), rtol=1e-5, atol=1e-5)


def test_a_mistral_without_a_window_remains_a_mistral_after_training(tmp_path: Path) -> None:
    """Also after training, and with selected layers; a model that was never imported is exported as a Llama."""
    kind, fields = AMBIGUOUS["Mistral without a window"]
    folder = make(tmp_path / "hf", kind, **fields)
    write_dataset(tmp_path / "data" / "train", [40] * 30)
    sizes = {f"model__{key}": None for key in ("n_layer", "n_head", "n_query_groups", "n_embd", "intermediate_size")}
    changes = {**sizes, "data__val": None, "train__max_steps": 2, "init_layers": "[1]"}
    train(*flags(tmp_path / "data", tmp_path / "run", init_from=folder, **changes))
    done = script("convert_to_hf.py", "--checkpoint", tmp_path / "run", "--output", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert config["num_hidden_layers"] == 1 and config["sliding_window"] is None
    torch.testing.assert_close(ours(tmp_path / "run"), logits(tmp_path / "back"), rtol=1e-5, atol=1e-5)
