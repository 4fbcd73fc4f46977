"""Initialisation: the requested standard deviations, and the same bits on one device and under FSDP2."""

import math

import pytest
import torch
from gloo_ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lit_model.init import initialise
from lit_model.model import GPT
from lit_model.registry import get_config

# Sizes that neither two nor four processes can share evenly (rows of 70, 90, 99; 500 padded to 512).
SIZES = {"n_layer": 3, "n_embd": 70, "n_head": 7, "n_query_groups": 1, "intermediate_size": 99, "vocab_size": 500}


def build(config, seed=0):
    model = GPT(config)
    initialise(model, config, seed)
    return model


def test_llammlein_standard_deviations():
    config = get_config("debug", n_layer=4, n_embd=256, n_head=4, intermediate_size=512, vocab_size=2000)
    for name, p in build(config).named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
            continue
        residual = name.endswith(("attn.proj.weight", "mlp.proj.weight"))
        want = 1 / math.sqrt(256) / 4 if residual else math.sqrt(2 / (5 * 256))
        check_normal(p[: config.vocab_size], want, name)


def test_normal_standard_deviations_and_zero_biases():
    config = get_config("debug", init="normal", init_std=0.03, attention_bias=True, mlp_bias=True)
    for name, p in build(config).named_parameters():
        if p.dim() == 2:
            check_normal(p[: config.vocab_size], 0.03, name)
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name


def check_normal(p, std, name):
    n = p.numel()
    assert abs(p.std().item() / std - 1) <= 5 / math.sqrt(2 * n), name  # the standard error of a standard deviation
    assert abs(p.mean().item()) <= 5 * std / math.sqrt(n), name
    assert 2.5 * std < p.abs().max() < 7 * std, name


# Together they cover every kind of parameter.
PLAIN = {
    "norm_class_name": "LayerNorm",
    "position_embedding": "learned",
    "mlp_gated": False,
    "attention_bias": True,
    "mlp_bias": True,
    "lm_head_bias": True,
    "parallel_residual": True,
    "shared_attention_norm": True,
}
EXPERTS = {
    "n_expert": 16,
    "moe_intermediate_size": 48,
    "qk_norm": "head",
    "post_norm": True,
    "moe_layers": [True, False],
}
RESIDUAL = ("attn.proj.weight", "mlp.proj.weight", "mlp.shared.proj.weight", "mlp.experts.down")


@pytest.mark.parametrize("scheme", ["llammlein", "normal", "gpt2"])
@pytest.mark.parametrize("changes", [PLAIN, EXPERTS, {**EXPERTS, "norm_offset": 1.0}])
def test_every_kind_of_parameter(changes, scheme):
    config = get_config("debug", n_layer=4, init=scheme, init_std=0.03, **changes)
    residual = {"llammlein": 1 / 8 / 4, "normal": 0.03, "gpt2": 0.03 / math.sqrt(8)}[scheme]
    other = math.sqrt(2 / (5 * 64)) if scheme == "llammlein" else 0.03
    drawn = set()
    for name, p in build(config).named_parameters():
        kind = name.split(".", 3)[-1] if ".h." in name else name
        if p.dim() > 1:
            check_normal(p[: config.vocab_size] if p.dim() == 2 else p, residual if kind in RESIDUAL else other, name)
            drawn.add(kind)
        elif name.endswith(".bias"):
            assert (p == 0).all(), name
        else:  # a norm, which scales by weight + offset
            assert (p + config.norm_offset == 1).all(), name
    attention = {"transformer.wte.weight", "lm_head.weight", "attn.qkv.weight", "attn.proj.weight"}
    if changes is PLAIN:
        assert drawn == attention | {"transformer.wpe.weight", "mlp.fc.weight", "mlp.proj.weight"}
    else:
        gated = {f"mlp.{part}{name}.weight" for part in ("", "shared.") for name in ("fc_1", "fc_2", "proj")}
        assert drawn == attention | gated | {"mlp.router.weight", "mlp.experts.gate_up", "mlp.experts.down"}


def test_experts_differ():
    state = build(get_config("debug", **EXPERTS)).state_dict()
    for name in ("gate_up", "down"):
        experts = state[f"transformer.h.0.mlp.experts.{name}"]
        assert not any(torch.equal(experts[0], other) for other in experts[1:])


def test_a_tensor_depends_on_seed_and_name_only():
    small, large = build(get_config("debug", n_layer=1)), build(get_config("debug", n_layer=1, intermediate_size=300))
    key = "transformer.h.0.attn.qkv.weight"
    assert torch.equal(small.state_dict()[key], large.state_dict()[key])
    assert not torch.equal(build(get_config("debug"), 1).state_dict()[key], small.state_dict()[key])
    state = build(get_config("debug")).state_dict()
    assert not torch.equal(state["transformer.h.0.mlp.fc_1.weight"], state["transformer.h.0.mlp.fc_2.weight"])
    torch.manual_seed(7)  # the global generator has no effect
    assert all(torch.equal(v, state[k]) for k, v in build(get_config("debug")).state_dict().items())


def test_padding_rows_are_zero():
    state = build(get_config("debug", **SIZES)).state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert (state[name][500:] == 0).all() and (state[name][:500] != 0).all()


def shard(config, mesh, **kwargs):
    """What a run does: build on meta, shard blocks and root, materialise, initialise."""
    with torch.device("meta"):
        model = GPT(config, **kwargs)
    # cast_forward_inputs would cast cos and sin to bfloat16 at each block's input.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cpu")
    initialise(model, config, 0)
    return model


def worker(rank, world):
    for tied in (False, True):
        check_sharded(rank, world, get_config("debug", **SIZES, tie_embeddings=tied))


def check_sharded(rank, world, config):
    meshes = [init_device_mesh("cpu", (world,))]
    if world == 4:
        meshes.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    whole = build(config).state_dict()
    for mesh in meshes:
        sharded = shard(config, mesh, activation_checkpointing="full")
        state = sharded.state_dict()
        assert set(state) == set(whole)
        assert all(torch.equal(state[k].full_tensor(), whole[k]) for k in whole)
    # One step in bfloat16: every parameter gets a float32 gradient, recomputation and sharding together.
    tokens = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(rank))
    cu = torch.tensor([0, 3, 16, 32, 32], dtype=torch.int32)
    sharded(tokens, tokens, cu_seqlens=cu).loss_sum.backward()
    plain = build(config)
    with torch.autocast("cpu", torch.bfloat16):
        for r in range(world):
            other = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(r))
            (plain(other, other, cu_seqlens=cu).loss_sum / world).backward()
    for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        grad = p.grad.full_tensor()
        assert grad.dtype == torch.float32
        assert (grad - q.grad).norm() <= 0.05 * q.grad.norm(), name


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_equal_under_fsdp2_from_meta(world, tmp_path):
    """Sharded over two processes; and over four, also as a mesh of two replicas of two shards."""
    run_ranks(worker, world, tmp_path / "store")
