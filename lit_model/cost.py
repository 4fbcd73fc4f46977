"""Parameters, FLOPs and bytes of a model, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from lit_model.config import ModelConfig
from lit_model.loss import CPU_CHUNK_BYTES, CPU_CHUNK_TOKENS, GPU_CHUNK_BYTES


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


@dataclass(frozen=True)
class TrainingSetting:
    """How a model is trained, as far as memory goes."""

    micro_batch_samples: int
    """Rows that one device puts through the model at once."""
    block_size: int
    """Tokens in a row."""
    compute_bytes: int = 4
    """Of an element in the matrix multiplies: 4 for fp32, 2 for bf16 and fp16."""
    sharding: str = "none"
    """none (one device), ddp, FULL_SHARD, SHARD_GRAD_OP or HYBRID_SHARD."""
    shards: int = 1
    """Devices that share one copy of the training state: all with FULL_SHARD and SHARD_GRAD_OP, those of a group with
    HYBRID_SHARD."""
    recompute: str = "none"
    """Activation checkpointing: none, full, block (every `recompute_every`-th block) or op."""
    recompute_every: int = 2
    accumulates: bool = False
    """Whether a step has several micro-batches: gradients are then alive while activations are."""
    defer_gradient_sync: bool = False
    """Sharded: gradients stay whole until the last micro-batch."""
    cpu_offload: bool = False
    """Sharded: parameters, gradients and optimizer state lie in host memory."""
    prefetch_blocks: int = 0
    """Sharded: blocks gathered ahead; 0: one."""
    reduce_bytes: int = 4
    """Sharded: of an element of the gradients while they are reduced."""
    on_cpu: bool = False
    """The loss takes smaller chunks of logits there."""

    @property
    def sharded(self) -> bool:
        return self.sharding not in ("none", "ddp")

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are cast for each forward; sharded ones are gathered in low precision instead."""
        return self.compute_bytes < 4 and not self.sharded


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of training on one device. The parts are not all alive at once, so that `total` may be less than their sum.

    With CPU offload the state (parameters, gradients, optimizer) lies on the host and is not in `total`.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    """Copies of the weights in the precision of the arithmetic: those that autocast makes, or that FSDP gathers."""
    activations: int
    """What the forward keeps for the backward, up to the head."""
    loss: int
    """Gradients of the hidden states and of the head, which the loss makes in the forward."""
    workspace: int
    """The larger of a chunk of logits and, in the backward, a block's gradients and what it makes again."""
    total: int
    """The most at once."""


def training_memory(config: ModelConfig, setting: TrainingSetting) -> TrainingMemory:
    """Estimate of the memory that one device needs to train. Allocator, kernels and libraries come on top.

    State: fp32 weights, gradients and AdamW's two moments (Rajbhandari et al. 2020, section 3.1, without the 16-bit
    copies), exact: FSDP2 cuts the first dimension of each tensor, rounded up. Activations: counted from what each
    operator of lit_model keeps, in the manner of Korthikanti et al. 2022, section 4, with a flash kernel's attention.
    The total is the larger of two moments: the loss, when all activations are alive, and the end of the backward, when
    all gradients are. In between one grows as the other shrinks. Kernels are taken to be fused, as on CUDA: a CPU's
    RMSNorm of bf16 (FSDP) keeps more.
    """
    s, tokens = setting, setting.micro_batch_samples * setting.block_size
    C, V = config.n_embd, config.padded_vocab_size
    n_parameters = count_parameters(config)
    block = (n_parameters - _root_parameters(config)) // config.n_layer
    parameters = 4 * sum(-(-shape[0] // s.shards) * prod(shape[1:]) for shape in parameter_shapes(config))
    optimizer = 2 * parameters
    gradients = 4 * n_parameters if s.defer_gradient_sync and s.accumulates else parameters

    if s.autocast:
        gathered = s.compute_bytes * count_multiplying_parameters(config)
    elif s.sharding == "SHARD_GRAD_OP":
        gathered = s.compute_bytes * n_parameters
    elif s.sharded:  # the block in work, those gathered ahead, and the buffer of the gathering
        gathered = s.compute_bytes * (_root_parameters(config) + (2 + max(1, s.prefetch_blocks)) * block)
    else:
        gathered = 0

    residual_bytes = 4 if s.autocast else s.compute_bytes
    kept, again = _kept_per_token(config, s, residual_bytes)
    activations = tokens * kept
    loss = tokens * C * residual_bytes + 4 * V * C
    chunk_bytes = CPU_CHUNK_BYTES if s.on_cpu else GPU_CHUNK_BYTES
    chunk_tokens = min(tokens, max(1, chunk_bytes // (4 * V)), CPU_CHUNK_TOKENS if s.on_cpu else tokens)
    chunk = chunk_tokens * V * (4 if s.compute_bytes == 4 else 4 + s.compute_bytes)
    block_gradients = tokens * s.compute_bytes * (3 * config.intermediate_size + 2 * C)
    workspace = max(chunk, tokens * again + block_gradients)

    before = gradients if s.accumulates or s.sharding == "ddp" else 0  # ddp holds its buckets all the time
    reducing = (s.compute_bytes + s.reduce_bytes) * max(2 * block, _root_parameters(config)) if s.sharded else 0
    at_loss = before + activations + loss + workspace
    at_end = gradients + tokens * _kept_in_block(config, s.compute_bytes, residual_bytes) + block_gradients + reducing
    if s.cpu_offload:
        at_loss, at_end = at_loss - before, at_end - gradients
    total = gathered + max(at_loss, at_end) + (0 if s.cpu_offload else parameters + optimizer)
    return TrainingMemory(parameters, gradients, optimizer, gathered, activations, loss, workspace, total)


def parameter_shapes(config: ModelConfig) -> Iterator[tuple[int, ...]]:
    """The shape of every parameter, in no particular order; a tied matrix comes once."""
    C, F, out = config.n_embd, config.intermediate_size, config.n_head * config.head_size
    for _ in range(1 if config.tie_embeddings else 2):
        yield config.padded_vocab_size, C
    yield (C,)
    for _ in range(config.n_layer):
        yield from [(C,), (C,), (config.n_qkv, C), (C, out), (F, C), (F, C), (C, F)]
        if config.attention_bias:
            yield from [(config.n_qkv,), (C,)]
        if config.mlp_bias:
            yield from [(F,), (F,), (C,)]


def _root_parameters(config: ModelConfig) -> int:
    """Those outside of the blocks: embedding, last norm and head."""
    matrices = 1 if config.tie_embeddings else 2
    return matrices * config.padded_vocab_size * config.n_embd + config.n_embd


def _kept_in_block(config: ModelConfig, compute_bytes: int, residual_bytes: int) -> int:
    """Bytes a token that one block keeps for its backward."""
    C, out = config.n_embd, config.n_head * config.head_size
    residual = 2 * (C * residual_bytes + 4)  # inputs of the two norms, and their scale
    # Outputs of the norms; queries, keys and values; attention's output; gate, up, silu(gate) and product.
    elements = 2 * C + config.n_qkv + out + 4 * config.intermediate_size
    dropped = 2 * C * compute_bytes if config.dropout else 0
    return residual + elements * compute_bytes + 4 * config.n_head + dropped  # 4: the softmax's normalisers


def _kept_per_token(config: ModelConfig, setting: TrainingSetting, residual_bytes: int) -> tuple[int, int]:
    """Bytes a token: (what the forward keeps, all blocks; what the backward makes again of one block)."""
    n, C, out = config.n_layer, config.n_embd, config.n_head * config.head_size
    whole = _kept_in_block(config, setting.compute_bytes, residual_bytes)
    less, again = whole, 0  # of a block that is recomputed, and how many are
    if setting.recompute == "op":  # its input, and the outputs of the five matrix multiplies and of the attention
        elements = config.n_qkv + out + 2 * C + 2 * config.intermediate_size
        less, again = C * residual_bytes + elements * setting.compute_bytes + 4 * config.n_head, n
    elif setting.recompute != "none":  # its input
        less, again = C * residual_bytes, n if setting.recompute == "full" else n // setting.recompute_every
    # Beside the blocks: input and output of the last norm, cos and sin, tokens and targets.
    rest = 2 * C * residual_bytes + 4 * config.head_size + 16
    return (n - again) * whole + again * less + rest, whole - less if again else 0
