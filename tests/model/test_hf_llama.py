"""Our Llama against transformers' LlamaForCausalLM: logits, loss, gradients, folders, names."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hf_checks import (
    TOLERANCE,
    build,
    draw_tokens,
    family_tests,
    from_folder,
    scalings,
    sizes,
    to_transformers,
    transformers,
)
from hypothesis import strategies as st

from lit_model.config import ModelConfig, RopeScaling
from lit_model.hf.families import FAMILIES, config_from_hf, config_to_hf, family_of, tensors_to_hf
from lit_model.hf.io import read_folder, write_folder
from lit_model.hf.table import tensors_from_hf
from lit_model.loss import IGNORE_INDEX
from lit_model.model import parameter_shapes
from lit_model.registry import MODELS, get_config


@st.composite
def configs(draw):
    return ModelConfig(
        **draw(sizes()),
        rope_base=draw(st.sampled_from([10000.0, 500000.0])),
        rope_scaling=draw(scalings),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


test_equals_transformers, test_packed_documents_equal_one_at_a_time = family_tests(configs(), "llama")


def gradient_pair(config, dtype, folder, B=2, T=40):
    """Loss and gradients by our names, from our model and from transformers' on the same batch."""
    model = build(config).to(dtype)
    hf = to_transformers(build(config), folder, attention="sdpa").to(dtype).train()
    tokens = draw_tokens(config, B, T + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 3:9] = IGNORE_INDEX
    loss = model(inputs, targets).loss_sum
    loss.backward()
    logits = hf(inputs).logits
    their_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    their_loss.backward()
    # lm_head repeats the embedding in a tied model; a zero stands in for padding rows.
    grads = {n: p.grad for n, p in hf.named_parameters()}
    theirs = tensors_from_hf(family_of(config), config, grads)
    return loss, their_loss, {n: (p.grad, theirs[n]) for n, p in model.named_parameters()}


GRADIENT_CONFIGS = {
    "grouped": get_config("debug", vocab_size=500),
    "tied, biases, scaled": get_config(
        "debug",
        tie_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32),
    ),
}


def norm_in_own_dtype(self, x):
    """transformers' RMSNorm without its cast to float32, which would hide differences below 1e-7."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("name", GRADIENT_CONFIGS)
def test_loss_and_every_gradient_equal_transformers(name, tmp_path, monkeypatch):
    config = GRADIENT_CONFIGS[name]
    with monkeypatch.context() as patch:
        patch.setattr(transformers.models.llama.modeling_llama.LlamaRMSNorm, "forward", norm_in_own_dtype)
        loss, their_loss, exact = gradient_pair(config, torch.float64, tmp_path / "64")
    torch.testing.assert_close(loss, their_loss, rtol=1e-12, atol=0)
    for parameter, (got, want) in exact.items():
        assert (got - want).norm() <= 1e-12 * want.norm(), parameter
    # float32: no further from the float64 gradient than transformers' own, times two.
    loss, their_loss, single = gradient_pair(config, torch.float32, tmp_path / "32")
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=0)
    for parameter, (got, want) in single.items():
        reference = exact[parameter][0]
        bound = 2 * (want - reference).norm() + 1e-6 * reference.norm()
        assert (got - reference).norm() <= bound, parameter


def test_streams_into_shards_with_an_index(tmp_path):
    config = get_config("debug", vocab_size=500)
    model = build(config)
    hf = to_transformers(model, tmp_path / "hf", shard_bytes=100_000, generation_config={"eos_token_id": 1})
    files = sorted(p.name for p in (tmp_path / "hf").iterdir())
    shards = [f for f in files if f.startswith("model-")]
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= set(files)
    tokens = draw_tokens(config)
    torch.testing.assert_close(hf(tokens).logits, model(tokens), **TOLERANCE)
    back = from_folder(tmp_path / "hf")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items())


def test_write_is_whole_or_not_at_all(tmp_path):
    config = get_config("debug")
    model = build(config)

    def broken():
        yield from list(tensors_to_hf(config, model.state_dict()))[:3]
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(tmp_path / "out", config_to_hf(config), broken())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("x")
    with pytest.raises(ValueError, match="is not an empty folder"):
        write_folder(tmp_path / "full", config_to_hf(config), tensors_to_hf(config, model.state_dict()))


def test_config_of_both_generations_is_read():
    config = GRADIENT_CONFIGS["tied, biases, scaled"]
    new = config_to_hf(config, eos_id=2)
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "dtype", "head_dim")}
    newer = {k: v for k, v in new.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    a, b, c = (config_from_hf(x) for x in (new, old, newer))
    assert a == b == c and a.rope_scaling == config.rope_scaling
    older = {**old, "rope_scaling": {**old["rope_scaling"], "type": "llama3"}}
    del older["rope_scaling"]["rope_type"]
    assert config_from_hf(older) == a
    minimal = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    )
    defaults = config_from_hf({k: new[k] for k in minimal})
    theirs = transformers.LlamaConfig(**{k: new[k] for k in minimal[1:]})
    assert defaults.norm_eps == theirs.rms_norm_eps and defaults.block_size == theirs.max_position_embeddings
    assert defaults.n_query_groups == theirs.num_key_value_heads and defaults.rope_base == 10000.0


@pytest.mark.parametrize("name", MODELS)
def test_registry_configs_survive_transformers_own_config(name):
    config = get_config(name)
    hf = transformers.AutoConfig.for_model(**config_to_hf(config, bos_id=1, eos_id=2))
    again = config_from_hf({**hf.to_dict(), "architectures": None}, name=name)
    training = ("init", "dropout")  # which a Llama has no words for
    assert again == get_config(name, padding_multiple=64, **{field: getattr(again, field) for field in training})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; supported are llama, "),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, "export its text model"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "missing .*high_freq_factor"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_dropout": None}, "attention_dropout is None"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rope_theta": 5e5}, "rope_parameters says rope_theta 10000.0, and the older keys 500000.0"),
        (
            {"embedding_multiplier": 12.0, "logit_scale": 2.0},
            r"embedding_multiplier \(12.0\), logit_scale \(2.0\): remove",
        ),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_unsupported_config_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**config_to_hf(get_config("debug")), **change})


def test_missing_unknown_and_misshapen_tensors_are_named():
    config = get_config("debug", vocab_size=500)
    ours = dict(build(config).state_dict())
    hf = dict(tensors_to_hf(config, ours))
    with pytest.raises(ValueError, match="lacks model.norm.weight"):
        tensors_from_hf(family_of(config), config, {k: v for k, v in hf.items() if k != "model.norm.weight"})
    with pytest.raises(ValueError, match="unknown model.layers.0.self_attn.q_norm.weight"):
        tensors_from_hf(family_of(config), config, {**hf, "model.layers.0.self_attn.q_norm.weight": torch.ones(1)})
    lazy = tensors_from_hf(family_of(config), config, {**hf, "model.norm.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"model.norm.weight give shape \(3,\); the config implies \(64,\)"):
        lazy["transformer.ln_f.weight"]
    with pytest.raises(ValueError, match="lacks transformer.ln_f.weight"):
        list(tensors_to_hf(config, {k: v for k, v in ours.items() if "ln_f" not in k}))
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        tied = get_config("debug", vocab_size=500, tie_embeddings=True)
        tensors_from_hf(family_of(tied), tied, {**hf, "lm_head.weight": torch.zeros(500, 64)})
    old = {**hf, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert torch.equal(tensors_from_hf(family_of(config), config, old)["lm_head.weight"], ours["lm_head.weight"])


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        read_folder(tmp_path)
    config = get_config("debug")
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    with pytest.raises(ValueError, match="has neither model.safetensors"):
        read_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match="gone.safetensors"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        read_folder(tmp_path)


def test_hub_keys_that_change_nothing_are_passed_over():
    config = config_from_hf(config_to_hf(get_config("debug")))
    # As SmolLM2's config.json has them.
    js = {"dtype": "q4", "use_external_data_format": True}
    extra = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": js, "unheard_of": None}
    assert config_from_hf({**config_to_hf(get_config("debug")), **extra, "pad_token_id": 3}) == config


def test_a_config_without_a_family_says_what_each_lacks():
    config = ModelConfig(norm_class_name="LayerNorm", qk_norm="projection")
    with pytest.raises(ValueError, match="no family of transformers") as raised:
        config_to_hf(config)
    for family in FAMILIES:
        assert f"{family.model_type}: {family.obstacle(config)}" in str(raised.value)


def legacy(model, folder, change=lambda tensors: tensors, **kwargs):
    """A folder with pytorch_model.bin, as transformers wrote it before safetensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config)))
    tensors = change({name: t.clone() for name, t in tensors_to_hf(model.config, model.state_dict())})
    torch.save(tensors, folder / "pytorch_model.bin", **kwargs)
    return tensors


@pytest.mark.parametrize("archive", [True, False])
def test_reads_legacy_files(archive, tmp_path):
    model = build(get_config("debug", vocab_size=500))
    tensors = legacy(model, tmp_path / "a", _use_new_zipfile_serialization=archive)
    back = from_folder(tmp_path / "a").state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    # In two files, with an index.
    names = sorted(tensors)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: tensors[name] for name in held}, tmp_path / "a" / file)
    (tmp_path / "a/pytorch_model.bin").unlink()
    index = tmp_path / "a/pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in parts.items() for name in held}}))
    back = from_folder(tmp_path / "a").state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    torch.save({}, tmp_path / "a/pytorch_model-1.bin")
    with pytest.raises(ValueError, match=f"pytorch_model-1.bin lacks the tensor {names[0]}"):
        read_folder(tmp_path / "a")


def test_legacy_files_that_hold_more_than_tensors_are_refused(tmp_path):
    model = build(get_config("debug"))
    legacy(model, tmp_path / "code", lambda tensors: {**tensors, "x": print})
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged, or it holds more than tensors"):
        read_folder(tmp_path / "code")
    legacy(model, tmp_path / "other", lambda tensors: {**tensors, "step": 3})
    with pytest.raises(ValueError, match="pytorch_model.bin holds more than tensors"):
        read_folder(tmp_path / "other")


def test_a_file_of_the_model_below_the_head_lacks_the_prefix():
    config = get_config("debug", tie_embeddings=True)
    model = build(config)
    hf = {name.removeprefix("model."): tensor for name, tensor in tensors_to_hf(config, model.state_dict())}
    for extra in ({}, {"lm_head.weight": hf["embed_tokens.weight"]}):
        tensors = tensors_from_hf(family_of(config), config, {**hf, **extra})
        assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


def rope(theta, **scaling):
    return {"rope_theta": theta, "rope_scaling": {"rope_type": "llama3", **scaling} if scaling else None}


def published(kind, layers, heads, groups, width, inner, vocabulary, context, tied, **others):
    """A config.json as models on the hub have it, with transformers 4's bookkeeping."""
    return {
        "architectures": [
            {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3", "olmo2": "Olmo2"}[kind] + "ForCausalLM"
        ],
        "model_type": kind,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": width,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        **others,
    }


LLAMA_31 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
PUBLISHED = {  # parameters by the safetensors on the hub
    "SmolLM2-135M": (
        134_515_008,
        published(
            *("llama", 30, 9, 3, 576, 1536, 49152, 8192, True),
            **rope(100000),
            is_llama_config=True,
            rope_interleaved=False,
            pretraining_tp=1,
            attention_bias=False,
        ),
    ),
    "Llama-2-7B": (6_738_415_616, published("llama", 32, 32, 32, 4096, 11008, 32000, 4096, False, pretraining_tp=1)),
    "Llama-3.2-1B": (
        1_235_814_400,
        published("llama", 16, 32, 8, 2048, 8192, 128256, 131072, True, **rope(5e5, **LLAMA_31), head_dim=64),
    ),
    "Mistral-7B": (
        7_241_732_096,
        published("mistral", 32, 32, 8, 4096, 14336, 32000, 32768, False, rope_theta=10000.0, sliding_window=4096),
    ),
    "Qwen3-0.6B": (
        596_049_920,
        published(
            *("qwen3", 28, 16, 8, 1024, 3072, 151936, 40960, True),
            **rope(1000000),
            head_dim=128,
            sliding_window=None,
            use_sliding_window=False,
            max_window_layers=28,
        ),
    ),
    "OLMo-2-1B": (
        1_484_916_736,
        published("olmo2", 16, 16, 16, 2048, 8192, 100352, 4096, False, **rope(500000), attention_bias=False),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_number_of_parameters(name):
    count, hf = PUBLISHED[name]
    config = config_from_hf(hf)
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == count
    assert config_from_hf(config_to_hf(config)) == config
    assert family_of(config).model_type == hf["model_type"]
