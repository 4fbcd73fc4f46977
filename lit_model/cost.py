"""Parameters, FLOPs and bytes of a model, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from lit_model.config import ModelConfig
from lit_model.kernels import cpu
from lit_model.loss import CPU_CHUNK_BYTES, CPU_CHUNK_TOKENS, GPU_CHUNK_BYTES
from lit_model.matrices import hidden_matrices
from lit_model.model import is_recomputed, parameter_shapes

BLOCKS = "transformer.h."
"""Prefix of the names of the blocks' parameters."""


def count_parameters(config: ModelConfig) -> int:
    """All parameters, the padding of the vocabulary included; a tied matrix counts once."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def count_active_parameters(config: ModelConfig) -> int:
    """Parameters that one token uses: all outside experts, and n_expert_per_token experts per layer with experts."""
    return sum(_active(config, name, shape) for name, shape in parameter_shapes(config).items())


def count_multiplying_parameters(config: ModelConfig) -> int:
    """Parameters of the matrices that a token is multiplied by: active ones of the blocks, and the head (tied or not).

    Lookups (embedding and learned positions), norms and biases are not counted.
    """
    return sum(_active(config, name, shape) for name, shape in _matrices(config).items())


def flops_per_token(config: ModelConfig, block_size: int, *, causal: bool = False) -> float:
    """Training FLOPs (forward and backward) per token in rows of `block_size` tokens.

    6 N + 12 (n_head head_size) S, S summed over the layers, the convention of PaLM's appendix B and of most published
    MFU figures. N are the parameters in matrix multiplies, of experts those that a token is routed to. S are the tokens
    that a token may attend to: T of a row, min(T, window) in a sliding layer, min(T, chunk) in a chunked one. With
    `causal` S is their average number, as a causal kernel computes it: T / 2, chunk / 2, or W - W^2 / (2 T) for a
    window W <= T. Nothing is added for recomputation, so the number measures useful work.
    """
    seen = sum(_tokens_seen(config, layer, block_size, causal) for layer in range(config.n_layer))
    return 6.0 * count_multiplying_parameters(config) + 12 * config.n_head * config.head_size * seen


def _tokens_seen(config: ModelConfig, layer: int, block_size: int, causal: bool) -> float:
    kind = config.layer_attention(layer)
    limit = {"full": None, "sliding": config.sliding_window_size, "chunked": config.attention_chunk_size}[kind]
    most = block_size if limit is None else min(block_size, limit)
    if not causal:
        return most
    return most - most**2 / (2 * block_size) if kind == "sliding" else most / 2


def _active(config: ModelConfig, name: str, shape: tuple[int, ...]) -> int:
    """How many parameters of this tensor one token uses."""
    if ".mlp.experts." in name:  # (E, ...)
        return config.n_expert_per_token * prod(shape[1:])
    return prod(shape)


def _matrices(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The matrices that tokens are multiplied by, including all experts."""
    lookups = ["transformer.wpe.weight"] + ([] if config.tie_embeddings else ["transformer.wte.weight"])
    shapes = parameter_shapes(config)
    return {name: shape for name, shape in shapes.items() if len(shape) >= 2 and name not in lookups}


@dataclass(frozen=True)
class TrainingSetting:
    """The training settings that determine memory use."""

    micro_batch_samples: int
    """Rows per device in one forward."""
    block_size: int
    """Tokens in a row."""
    compute_bytes: int = 4
    """Bytes per element in matrix multiplies: 4 for fp32, 2 for bf16 and fp16."""
    float8: bool = False
    """The blocks' linear layers multiply in float8; compute_bytes is 2."""
    compiled: bool = False
    """Blocks are compiled, so that the backward computes cheap results again instead of keeping them."""
    repeats_heads: bool = False
    """The attention kernel has no grouped heads: it is given each key and value once for each of its queries."""
    sharding: str = "none"
    """none (one device), ddp, FULL_SHARD, SHARD_GRAD_OP or HYBRID_SHARD."""
    shards: int = 1
    """Devices that share one copy of the training state: all with FULL_SHARD and SHARD_GRAD_OP, those of a group with
    HYBRID_SHARD."""
    recompute: str = "none"
    """Activation checkpointing: none, full, block (every `recompute_every`-th block) or op."""
    recompute_every: int = 2
    """`block`: every n-th block is recomputed."""
    recompute_blocks: int | None = None
    """`block`: the number of leading blocks to recompute, instead of every n-th."""
    accumulates: bool = False
    """Whether a step has several micro-batches, so that gradients and activations coexist."""
    defer_gradient_sync: bool = False
    """Sharded: gradients stay whole until the last micro-batch."""
    cpu_offload: bool = False
    """Sharded: parameters, gradients and optimizer state are in host memory."""
    prefetch_blocks: int = 0
    """Sharded: blocks gathered ahead; 0: one."""
    reduce_bytes: int = 4
    """Sharded: bytes per gradient element during the reduction."""
    on_cpu: bool = False
    """On a CPU the loss uses smaller chunks of logits."""
    muon: bool = False
    """Muon keeps one moment of the blocks' matrices, AdamW two."""
    exact_sums: bool = False
    """Gradients are summed in float64, and weights gathered in float32."""
    frozen: int = 0
    """Bytes of other models' weights on the device, such as teachers."""

    @property
    def sharded(self) -> bool:
        return self.sharding not in ("none", "ddp")

    @property
    def autocast(self) -> bool:
        """Whether fp32 weights are cast for each forward; sharded ones are gathered in low precision instead, unless
        sums are exact."""
        return self.compute_bytes < 4 and (not self.sharded or self.exact_sums)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of training on one device. The parts do not all peak at once, so `total` may be less than their sum.

    With CPU offload the state (parameters, gradients, optimizer) is in host memory and not in `total`.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    """Copies of the weights in compute precision, made by autocast or gathered by FSDP."""
    activations: int
    """Tensors that the forward keeps for the backward, up to the head."""
    loss: int
    """Gradients of the hidden states and of the head, which the loss computes in the forward."""
    workspace: int
    """The larger of a chunk of logits and, in the backward, a block's gradients and recomputed activations."""
    frozen: int
    """Weights of other models."""
    total: int
    """Peak memory."""


def training_memory(config: ModelConfig, setting: TrainingSetting) -> TrainingMemory:
    """Estimate of the memory that one device needs to train. Allocator, kernels and libraries come on top.

    State: fp32 weights, gradients and the optimizer's moments (Rajbhandari et al. 2020, section 3.1, without the 16-bit
    copies), exact: FSDP2 cuts the first dimension of each tensor, rounded up. Activations: counted from what each
    operator of lit_model keeps, in the manner of Korthikanti et al. 2022, section 4, with a flash kernel's attention;
    of compiled blocks what torch.compile's partition of forward and backward keeps.
    The total is the larger of two moments: the loss, when all activations are alive, and the end of the backward, when
    all gradients are. In between one grows as the other shrinks; where layers differ, the last counts as the largest.
    Kernels are taken to be fused, as on CUDA: a CPU's RMSNorm of bf16 keeps more, and attention with capped scores on a
    CPU keeps the scores.
    """
    s, tokens = setting, setting.micro_batch_samples * setting.block_size
    C, V = config.n_embd, config.padded_vocab_size
    shapes = parameter_shapes(config)
    n_parameters = count_parameters(config)
    root, block = root_parameters(config), largest_block(config)
    shard_bytes = {name: 4 * -(-shape[0] // s.shards) * prod(shape[1:]) for name, shape in shapes.items()}
    parameters = sum(shard_bytes.values())
    optimizer = 2 * parameters - (sum(shard_bytes[name] for name in hidden_matrices(config)) if s.muon else 0)
    gradients = 4 * n_parameters if s.defer_gradient_sync and s.accumulates else parameters
    float64_sums = 2 * parameters if s.exact_sums else 0

    gathered, gathered_bytes = 0, 4 if s.exact_sums else s.compute_bytes
    casts = 0  # of weights, which the backward frees one by one; those to float8 are made again
    if s.autocast:
        matrices = _matrices(config).items()
        casts = s.compute_bytes * sum(prod(x) for name, x in matrices if not (s.float8 and name.startswith(BLOCKS)))
    if s.sharding == "SHARD_GRAD_OP":
        gathered += gathered_bytes * n_parameters
    elif s.sharded:  # the block in work, those gathered ahead, and the buffer of the gathering
        gathered += gathered_bytes * (root + (2 + max(1, s.prefetch_blocks)) * block)

    residual_bytes = 4 if s.autocast else s.compute_bytes
    layers = range(config.n_layer)
    kept, again = _kept_per_token(config, s, residual_bytes)
    activations = tokens * kept
    loss = tokens * C * residual_bytes + 4 * V * C
    chunk_bytes = CPU_CHUNK_BYTES if s.on_cpu else GPU_CHUNK_BYTES
    chunk_tokens = min(tokens, max(1, chunk_bytes // (4 * V)), CPU_CHUNK_TOKENS if s.on_cpu else tokens)
    chunk = chunk_tokens * V * (4 if s.compute_bytes == 4 else 4 + s.compute_bytes)
    if config.final_logit_softcapping is not None:
        chunk += chunk_tokens * V * 4
    block_gradients = tokens * s.compute_bytes * (max(_mlp_elements(config, i).gradients for i in layers) + 2 * C)
    workspace = max(chunk, tokens * again + block_gradients)

    before = gradients if s.accumulates or s.sharding == "ddp" else 0  # ddp holds its buckets all the time
    if s.exact_sums:
        buckets = parameters if s.sharding == "ddp" else 0  # allocated by DDP, and not used
        before, gradients = float64_sums + buckets, gradients + float64_sums + buckets
    reducing = (s.compute_bytes + s.reduce_bytes) * max(2 * block, root) if s.sharded else 0
    at_loss = casts + before + activations + loss + workspace
    last = max(_kept_in_block(config, i, s, residual_bytes) for i in layers)
    at_end = gradients + tokens * last + block_gradients + reducing
    if s.cpu_offload:
        at_loss, at_end = at_loss - (before - float64_sums), at_end - (gradients - float64_sums)
    total = s.frozen + gathered + max(at_loss, at_end) + (0 if s.cpu_offload else parameters + optimizer)
    gathered += casts
    return TrainingMemory(parameters, gradients, optimizer, gathered, activations, loss, workspace, s.frozen, total)


def root_parameters(config: ModelConfig) -> int:
    """Parameters outside the blocks: embeddings, last norm and head."""
    return sum(prod(shape) for name, shape in parameter_shapes(config).items() if not name.startswith(BLOCKS))


def largest_block(config: ModelConfig) -> int:
    """Parameters of the largest block."""
    sizes = [0] * config.n_layer
    for name, shape in parameter_shapes(config).items():
        if name.startswith(BLOCKS):
            sizes[int(name[len(BLOCKS) :].split(".")[0])] += prod(shape)
    return max(sizes)


class _MlpElements(NamedTuple):
    """Elements per token in the MLP of a layer, without its input and output."""

    kept: int
    """Kept for the backward by all operators."""
    activated: int
    """Of these, outputs of an activation that is multiplied by something, which a compiled block computes again."""
    operand: int
    """Of these, the input of the last linear layer, if there is one."""
    multiplied: int
    """Of these, outputs of matrix multiplies."""
    gradients: int
    """Gradients alive at once in the backward."""


def _mlp_elements(config: ModelConfig, layer: int) -> _MlpElements:
    C, k = config.n_embd, config.n_expert_per_token
    if config.layer_has_experts(layer):  # beside the hidden widths, inputs and outputs of the experts
        inner = (k + config.shared_expert) * config.moe_intermediate_size
        return _MlpElements(4 * inner + k * C, inner, 0, 2 * inner + k * C, 3 * inner + k * C)
    inner = config.intermediate_size
    if config.mlp_gated:  # gate, up, act(gate), product
        return _MlpElements(4 * inner, inner, inner, 2 * inner, 3 * inner)
    return _MlpElements(2 * inner, 0, inner, inner, 2 * inner)


def _router_bytes(config: ModelConfig, layer: int, compute_bytes: int) -> int:
    """Bytes per token of the router's float32 input (if it is a copy), logits, probabilities and slot indices."""
    if not config.layer_has_experts(layer):
        return 0
    copy = 4 * config.n_embd if compute_bytes < 4 else 0
    return copy + 8 * config.n_expert + 24 * config.n_expert_per_token


def _float32_copies(config: ModelConfig, setting: TrainingSetting) -> int:
    """Bytes per token of attention's float32 copies, on CPUs that compute bf16 attention in float32."""
    if setting.compute_bytes == 4 or not setting.on_cpu or cpu.HAS_BF16:
        return 0
    return 2 * config.n_qkv + 4 * config.n_head * config.head_size


def _kept_in_block(config: ModelConfig, layer: int, setting: TrainingSetting, residual_bytes: int) -> int:
    """Bytes per token that one block keeps for its backward."""
    compute_bytes, compiled = setting.compute_bytes, setting.compiled
    C, out, mlp = config.n_embd, config.n_head * config.head_size, _mlp_elements(config, layer)
    inputs = 1 if config.shared_attention_norm else 2  # of attention and MLP
    norms = (inputs if config.pre_norm else 0) + (2 if config.post_norm else 0)
    residual = norms * (4 if config.norm_class_name == "RMSNorm" else 8)  # their scales, and means
    # Queries, keys and values; attention's output; the MLP's results, without the operand of its last product.
    elements = config.n_qkv + out + mlp.kept - mlp.operand - (mlp.activated if compiled else 0)
    if config.pre_norm:  # their inputs
        again = compiled and not config.parallel_residual  # the second one, from the first and attention's addition
        residual += (1 if config.parallel_residual or again else 2) * C * residual_bytes
        elements += C if again and not config.post_norm else 0
    if config.post_norm:  # their inputs
        elements += 2 * C
    if config.qk_norm != "none":  # queries and keys before and after
        elements += (config.n_head + config.n_query_groups) * config.head_size
    if setting.repeats_heads and config.n_query_groups < config.n_head:  # compiled, instead of those not repeated
        elements += 2 * (config.n_head - (config.n_query_groups if compiled else 0)) * config.head_size
    operands = (inputs * C + mlp.operand) * compute_bytes  # of the linear layers; attention's output is kept anyway
    if setting.float8 and not config.layer_has_experts(layer):
        operands = out + (0 if compiled and config.pre_norm else inputs * C) + (0 if compiled else mlp.operand)
    dropped = 2 * C * (1 if compiled else compute_bytes) if config.dropout else 0
    router = _router_bytes(config, layer, compute_bytes)
    rest = 4 * config.n_head + dropped + router + _float32_copies(config, setting)  # 4: the softmax's normalisers
    return residual + elements * compute_bytes + operands + rest


def _kept_per_token(config: ModelConfig, setting: TrainingSetting, residual_bytes: int) -> tuple[int, int]:
    """Bytes per token: (kept by the forward in all blocks; largest addition by recomputation)."""
    C, out = config.n_embd, config.n_head * config.head_size
    kept = again = freed = 0  # freed: already, by the backward of later layers
    for layer in reversed(range(config.n_layer)):
        whole = less = _kept_in_block(config, layer, setting, residual_bytes)
        if setting.recompute == "op":  # its input, and the outputs of the matrix multiplies and of the attention
            elements = config.n_qkv + out + 2 * C + _mlp_elements(config, layer).multiplied
            less = C * residual_bytes + elements * setting.compute_bytes + 4 * config.n_head
        elif setting.recompute == "full" or (
            setting.recompute == "block" and is_recomputed(layer, setting.recompute_every, setting.recompute_blocks)
        ):
            less = C * residual_bytes  # its input
        kept += less
        again = max(again, whole - less - freed)
        freed += less
    # Beside the blocks: input and output of the last norm, cos and sin, tokens and targets.
    return kept + 2 * C * residual_bytes + 4 * config.rotary_size + 16, again
