"""The weight matrices inside the blocks, which an optimizer for matrices (Muon) updates, and how they are stored."""

from __future__ import annotations

from lit_model.config import ModelConfig
from lit_model.model import parameter_shapes


def hidden_matrices(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Parameter name -> rows of each logical matrix in it: linears of the blocks, including stacked experts (E, m, n).

    A fused parameter stacks several along its rows: queries, keys and values; gate and up of an expert. Embeddings,
    head, learned positions, routers, norms and biases are left out.
    """
    queries, keys = config.n_head * config.head_size, config.n_query_groups * config.head_size
    width = config.moe_intermediate_size
    matrices: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items():
        if not name.startswith("transformer.h.") or len(shape) < 2 or name.endswith(".router.weight"):
            continue
        if name.endswith(".attn.qkv.weight"):
            matrices[name] = (queries, keys, keys)
        elif name.endswith(".experts.gate_up"):
            matrices[name] = (width, width)
        else:
            matrices[name] = (shape[-2],)
        assert sum(matrices[name]) == shape[-2], name
    return matrices
