"""Parameters, FLOPs and bytes of a model, from its config alone."""

from __future__ import annotations

from lit_model.config import ModelConfig


def count_parameters(config: ModelConfig) -> int:
    """All parameters, the padding of the vocabulary included; a tied matrix counts once."""
    embeddings = config.padded_vocab_size * config.n_embd * (1 if config.tie_embeddings else 2)
    norms = (2 * config.n_layer + 1) * config.n_embd
    biases = 0
    if config.attention_bias:
        biases += config.n_layer * (config.n_qkv + config.n_embd)
    if config.mlp_bias:
        biases += config.n_layer * (2 * config.intermediate_size + config.n_embd)
    return embeddings + norms + biases + config.n_layer * _matrices_per_block(config)


def count_multiplying_parameters(config: ModelConfig) -> int:
    """The matrices that each token is multiplied by: those of the blocks and the head (tied or not), not the lookup."""
    return config.n_layer * _matrices_per_block(config) + config.padded_vocab_size * config.n_embd


def flops_per_token(config: ModelConfig, block_size: int, *, causal: bool = False) -> float:
    """Training FLOPs (forward and backward) per token in rows of `block_size` tokens.

    6 N + 12 n_layer (n_head head_size) T, the convention of PaLM's appendix B and of most published MFU figures:
    attention counted in full. With `causal` the attention term is halved, as a causal kernel computes it. Nothing is
    added for recomputation, so the number measures useful work.
    """
    attention = 12 * config.n_layer * config.n_head * config.head_size * block_size
    return 6.0 * count_multiplying_parameters(config) + (attention / 2 if causal else attention)


def training_memory_bytes(
    config: ModelConfig,
    micro_batch_samples: int,
    block_size: int,
    *,
    compute_bytes: int = 2,
    shards: int = 1,
    activation_checkpointing: bool = False,
) -> int:
    """Estimate of the memory one device needs to train, in bytes.

    State: float32 weights, gradients and two AdamW moments (16 bytes a parameter), divided by `shards`. Activations:
    what one block keeps for its backward, times the number of blocks (one block plus the inputs of all with activation
    checkpointing). The loss keeps the gradients of the hidden states and, in float32, of the head; logits exist only
    chunk by chunk and are not counted. `compute_bytes` is the size of an activation element (2 for bf16, 4 for fp32).
    An estimate for choosing a micro-batch: allocator and kernel workspaces come on top.
    """
    tokens = micro_batch_samples * block_size
    heads = config.n_head * config.head_size
    kept_per_token = (
        4 * config.n_embd  # inputs of the two norms, and of the two projections behind them
        + config.n_qkv  # queries, keys, values
        + 2 * heads  # attention's output and its input to the projection
        + 4 * config.intermediate_size  # gate, up, silu(gate), product
    )
    if activation_checkpointing:
        activations = tokens * compute_bytes * (kept_per_token + config.n_layer * config.n_embd)
    else:
        activations = tokens * compute_bytes * kept_per_token * config.n_layer
    head = 4 * config.padded_vocab_size * config.n_embd + tokens * config.n_embd * compute_bytes
    return 16 * count_parameters(config) // shards + activations + head


def _matrices_per_block(config: ModelConfig) -> int:
    attention = config.n_embd * config.n_qkv + config.n_head * config.head_size * config.n_embd
    return attention + 3 * config.n_embd * config.intermediate_size
