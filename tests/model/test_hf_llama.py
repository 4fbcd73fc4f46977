"""Our Llama against transformers' LlamaForCausalLM: logits, loss, gradients, folders, names."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_model.config import ModelConfig, RopeScaling
from lit_model.hf.io import read_folder, write_folder
from lit_model.hf.llama import config_from_hf, config_to_hf, expected_shapes, tensors_from_hf, tensors_to_hf
from lit_model.init import initialise
from lit_model.model import GPT, IGNORE_INDEX
from lit_model.registry import MODELS, get_config

transformers = pytest.importorskip("transformers")

# Both sides compute in float32 and round differently. Measured over 1000 drawn configs, logits of size 1-5 differ by at
# most 2e-6; what is asserted is 1e-5 (absolute, and relative above 1).
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@st.composite
def configs(draw):
    groups = draw(st.sampled_from([1, 2, 3]))
    n_head = groups * draw(st.sampled_from([1, 2, 4]))
    head_size = draw(st.sampled_from([2, 6, 8, 10, 16, 24]))
    # n_embd equal to n_head * head_size or not; below 12 a norm can divide by almost nothing and both sides lose digits
    widths = [n_head * x for x in (head_size, 3, 4, 10, 20) if n_head * x >= 12]
    scaling = None
    if draw(st.booleans()):
        scaling = RopeScaling(
            factor=draw(st.sampled_from([1.0, 4.0, 8.0])),
            low_freq_factor=1.0,
            high_freq_factor=draw(st.sampled_from([2.0, 4.0])),
            original_block_size=draw(st.sampled_from([16, 64, 8192])),
        )
    return ModelConfig(
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_query_groups=groups,
        n_embd=draw(st.sampled_from(widths)),
        head_size=head_size,
        intermediate_size=draw(st.sampled_from([16, 33, 48])),
        block_size=64,
        vocab_size=draw(st.integers(2, 200)),
        padding_multiple=64,  # what config_from_hf chooses
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope_base=draw(st.sampled_from([10000.0, 500000.0])),
        rope_scaling=scaling,
        tie_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        init=draw(st.sampled_from(["llammlein", "normal"])),
    )


def build(config, seed=0, **kwargs):
    """A model with every parameter random (norms and biases too, so that a lost one shows)."""
    model = GPT(config, **kwargs)
    initialise(model, config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def to_transformers(model, folder, **kwargs):
    config = model.config
    write_folder(folder, config_to_hf(config, bos_id=0, eos_id=1), tensors_to_hf(config, model.state_dict()), **kwargs)
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return hf.eval()


def from_folder(folder):
    config, tensors = read_folder(folder)
    model = GPT(config)
    model.load_state_dict({name: tensors[name] for name in tensors})
    return model


def draw_tokens(config, B=2, T=33, seed=0):
    return torch.randint(0, config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs(), seed=st.integers(0, 1000))
def test_logits_equal_transformers_and_tensors_survive_both_ways(config, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    model = build(config, seed).eval()
    tokens = draw_tokens(config, seed=seed)
    with torch.no_grad():
        logits = model(tokens)
        assert logits.shape == (2, 33, config.vocab_size)
        # Ours to theirs.
        hf = to_transformers(model, folder / "ours")
        assert type(hf).__name__ == "LlamaForCausalLM"
        torch.testing.assert_close(hf(tokens).logits, logits, **TOLERANCE)
        # Theirs, as transformers itself saves it, to ours.
        hf.save_pretrained(folder / "theirs")
        back = from_folder(folder / "theirs").eval()
        torch.testing.assert_close(back(tokens), logits, rtol=0, atol=0)
    # Bit for bit: both folders give back every tensor of ours, and ours holds every tensor of theirs.
    for name in ("ours", "theirs"):
        read_config, tensors = read_folder(folder / name)
        assert set(tensors) == set(model.state_dict())
        assert all(torch.equal(tensors[k], v) for k, v in model.state_dict().items())
        ours = {k: getattr(config, k) for k in config.to_dict() if k not in ("name", "init")}
        assert ours == {k: getattr(read_config, k) for k in ours}
    theirs = dict(hf.state_dict())
    exported = dict(tensors_to_hf(config, model.state_dict()))
    assert set(exported) == set(theirs) - ({"lm_head.weight"} if config.tie_embeddings else set())
    assert all(torch.equal(exported[k], theirs[k]) for k in exported)


def gradient_pair(config, dtype, folder, B=2, T=40):
    """Loss and gradients by our names, from our model and from transformers' on the same batch."""
    model = build(config).to(dtype)
    hf = to_transformers(build(config), folder).to(dtype).train()
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
    theirs = tensors_from_hf(config, grads)
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
    hf = transformers.LlamaConfig(**config_to_hf(config, bos_id=1, eos_id=2))
    again = config_from_hf({**hf.to_dict(), "architectures": None}, name=name)
    assert again == get_config(name, padding_multiple=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "missing .*high_freq_factor"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
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
        tensors_from_hf(config, {k: v for k, v in hf.items() if k != "model.norm.weight"})
    with pytest.raises(ValueError, match="unknown model.layers.0.self_attn.q_norm.weight"):
        tensors_from_hf(config, {**hf, "model.layers.0.self_attn.q_norm.weight": torch.ones(1)})
    lazy = tensors_from_hf(config, {**hf, "model.norm.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"model.norm.weight give shape \(3,\); the config asks for \(64,\)"):
        lazy["transformer.ln_f.weight"]
    with pytest.raises(ValueError, match="lacks transformer.ln_f.weight"):
        list(tensors_to_hf(config, {k: v for k, v in ours.items() if "ln_f" not in k}))
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        tensors_from_hf(
            get_config("debug", vocab_size=500, tie_embeddings=True), {**hf, "lm_head.weight": torch.zeros(500, 64)}
        )
    old = {**hf, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert torch.equal(tensors_from_hf(config, old)["lm_head.weight"], ours["lm_head.weight"])


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
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match="gone.safetensors"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        read_folder(tmp_path)


def test_expected_shapes_equal_the_module():
    for config in (*GRADIENT_CONFIGS.values(), get_config("debug", head_size=24, vocab_size=70)):
        assert expected_shapes(config) == {k: tuple(v.shape) for k, v in GPT(config).state_dict().items()}
