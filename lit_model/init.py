"""Initialisation: every tensor is drawn whole, from a generator seeded by (seed, parameter name), then sliced.

So a weight is the same number on one device, under DDP and on any shard of FSDP2, in any order of construction.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lit_model.config import ModelConfig
from lit_model.dtensor import is_dtensor


def llammlein_std(config: ModelConfig, name: str) -> float:
    """Embeddings and linears sqrt(2 / (5 n_embd)); projections into the residual stream 1 / (sqrt(n_embd) n_layer).

    The scheme of TinyLlama and LLäMmlein, after GPT-NeoX ("small init" and "Wang init").
    """
    if _is_residual_projection(name):
        return 1.0 / math.sqrt(config.n_embd) / config.n_layer
    return math.sqrt(2.0 / (5.0 * config.n_embd))


def normal_std(config: ModelConfig, name: str) -> float:
    """`init_std` for every matrix, as transformers initialises a Llama."""
    return config.init_std


def gpt2_std(config: ModelConfig, name: str) -> float:
    """`init_std`; projections into the residual stream, two a layer, init_std / sqrt(2 n_layer).

    The scheme of GPT-2 (Radford et al. 2019, section 2.3). Learned positions are drawn like the rest, as transformers
    does it.
    """
    if _is_residual_projection(name):
        return config.init_std / math.sqrt(2 * config.n_layer)
    return config.init_std


SCHEMES: dict[str, Callable[[ModelConfig, str], float]] = {
    "llammlein": llammlein_std,
    "normal": normal_std,
    "gpt2": gpt2_std,
}


def allocate(model: nn.Module, device: torch.device) -> None:
    """Replace each parameter of a model on the meta device by uninitialised memory on `device`.

    As model.to_empty, whose empty_like imports sympy for tensors on the meta device; not for DTensors.
    """
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            data = torch.empty(p.shape, dtype=p.dtype, device=device)
            setattr(module, name, nn.Parameter(data, requires_grad=p.requires_grad))


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of `model` (a GPT, sharded or not, on its final device) by the scheme `config.init`.

    Matrices are normal (learned positions, routers and the stacked matrices of experts too), weights of norms such that
    with norm_offset they scale by 1, biases and the vocabulary's padding rows 0. Costs one whole float32 tensor of host
    memory at a time. Raises ValueError for a parameter still on the meta device.
    """
    std_of = SCHEMES[config.init]
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name} is on the meta device; call allocate before initialise, or to_empty if sharded"
            )
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0 - config.norm_offset)
        else:
            whole = draw(tuple(parameter.shape), std_of(config, name), seed, name)
            if name in ("transformer.wte.weight", "lm_head.weight"):
                whole[config.vocab_size :] = 0  # padding: never used, and dropped by a conversion; 0 makes that exact
            copy_slice(parameter, whole)


def draw(shape: tuple[int, ...], std: float, seed: int, name: str) -> Tensor:
    """N(0, std) float32 of `shape` on the CPU, a pure function of its arguments."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


@torch.no_grad()
def copy_slice(parameter: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor, which every rank holds, into a plain tensor or this rank's shard of a DTensor."""
    if not is_dtensor(parameter):
        parameter.copy_(whole)
        return
    from torch.distributed.tensor import distribute_tensor

    mine = parameter.to_local()
    # src_data_rank=None: every rank holds the whole already and takes its own slice, nothing is sent.
    whole = whole.to(mine.device)
    sliced = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    assert sliced.shape == mine.shape, f"slice {tuple(sliced.shape)} does not fit shard {tuple(mine.shape)}"
    mine.copy_(sliced)


def _is_residual_projection(name: str) -> bool:
    return name.endswith((".attn.proj.weight", ".mlp.proj.weight", ".mlp.shared.proj.weight", ".mlp.experts.down"))
