"""The model: tokens to logits, or tokens and targets to losses.

Dimensions: B batch, T tokens in a row, N = B T, C n_embd, D head size, P pieces of documents, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lit_model.attention import Attention, KVCache, LayerCache
from lit_model.config import ModelConfig
from lit_model.kernels import AttentionChoice, choose_attention
from lit_model.loss import IGNORE_INDEX, LossOutput, chunked_cross_entropy
from lit_model.mlp import SwiGLU
from lit_model.norm import RMSNorm
from lit_model.rope import RopeTable

__all__ = ["GPT", "IGNORE_INDEX", "Block", "LossOutput"]

Recompute = Literal["none", "full", "block", "op"]

# What `op` keeps: matrix multiplies and attention, by the names under which they are dispatched. Nearly all arithmetic
# is theirs; norms, rotations, activations and casts are cheap to repeat.
KEPT_OPERATORS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::_flash_attn_forward",
        "flash_attn_3::fwd",
        "llammlein::attention_loop",
        "llammlein::fa4",
    }
)


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    name = operator.name().split(".")[0]
    return CheckpointPolicy.MUST_SAVE if name in KEPT_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    `recompute` says what is made again in the backward instead of being kept: nothing, "full" everything but the input,
    or "op" everything but what KEPT_OPERATORS give. It happens inside of the block, so that it is compiled with it, and
    FSDP's hooks around the block are not repeated.
    """

    def __init__(self, config: ModelConfig, recompute: Literal["none", "full", "op"] = "none") -> None:
        super().__init__()
        self.recompute = recompute
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        # Kept results must not be overwritten; where they are views, PyTorch does not notice it.
        self.attn = Attention(config, rotate_in_place=recompute != "op")
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor | None,
        kernel: str,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); cos and sin float32 (B or 1, T, 1, D/2); `kernel` a name of lit_model.kernels."""
        if self.recompute == "none" or not (self.training and torch.is_grad_enabled()):
            return self._compute(x, cos, sin, cu_seqlens, kernel, cache)
        options: dict[str, Any] = {}
        if self.recompute == "op":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        y: Tensor = checkpoint(
            self._compute,
            *(x, cos, sin, cu_seqlens, kernel, cache),
            use_reentrant=False,
            # Without dropout there is no randomness to repeat, and saving its state would cost a sync per block.
            preserve_rng_state=self.dropout > 0,
            **options,
        )
        return y

    def _compute(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None, kernel: str, cache: LayerCache | None
    ) -> Tensor:
        x = x + self._drop(self.attn(self.norm_1(x), cos, sin, cu_seqlens, kernel, cache))
        return x + self._drop(self.mlp(self.norm_2(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def _of_block(i: int, recompute: Recompute, every: int) -> Literal["none", "full", "op"]:
    """What the i-th block does about `recompute`."""
    if recompute != "block":
        return recompute
    return "full" if (i + 1) % every == 0 else "none"


class GPT(nn.Module):
    """A decoder-only language model. Buildable under `torch.device("meta")`; it registers no buffers.

    Args:
        attention: "auto" or a name of lit_model.kernels.
        activation_checkpointing: what is recomputed in the backward, time for memory: each block ("full"), every
            n-th block ("block"), or each block but for its matrix multiplies and attention ("op").
        activation_checkpointing_every: the n of "block".
        z_loss: see lit_model.loss.

    The parameters hold PyTorch's defaults until `lit_model.init.initialise`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        attention: str = "auto",
        activation_checkpointing: Recompute = "none",
        activation_checkpointing_every: int = 2,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        self.z_loss = z_loss
        self.attention_choice: AttentionChoice | None = None  # of the latest forward, for the log
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "h": nn.ModuleList(
                    Block(config, _of_block(i, activation_checkpointing, activation_checkpointing_every))
                    for i in range(config.n_layer)
                ),
                "ln_f": RMSNorm(config.n_embd, config.norm_eps),
            }
        )
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self._rope = RopeTable(config)

    @property
    def head_weight(self) -> Tensor:
        """(V, C): the head's matrix, the embedding's when tied. Under FSDP2 whole only inside the forward."""
        weight = self.transformer["wte"].weight if self.lm_head is None else self.lm_head.weight
        assert isinstance(weight, Tensor)
        return weight

    def blocks(self) -> Iterator[Block]:
        """The blocks, first to last: what `compile` and `fully_shard` are applied to."""
        layers = self.transformer["h"]
        assert isinstance(layers, nn.ModuleList)
        return iter(layers)  # type: ignore[arg-type]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor | LossOutput:
        """tokens int64 (B, T) -> logits (B, T, vocab_size), or with targets int64 (B, T) the losses.

        `cu_seqlens` (int32 (P+1,), see lit_model.kernels) keeps document pieces apart: no attention between them, and
        positions restart. Without it each row is one causal sequence. With a `cache`, tokens continue those in it.
        Raises ValueError for more positions than block_size.
        """
        B, T = tokens.shape
        start = 0 if cache is None else cache.length
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens exceed the model's context (block_size {self.config.block_size})")
        if cache is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens and cache exclude each other: a cache holds one document a row")
        x = self.transformer["wte"](tokens)  # (B, T, C)
        if self.config.dropout:
            x = F.dropout(x, self.config.dropout, self.training)
        cos, sin = self._rope.rows(B, T, cu_seqlens, start, tokens.device)
        self.attention_choice = self._choose_attention(x, cu_seqlens is not None)
        kernel = self.attention_choice.name
        for i, block in enumerate(self.blocks()):
            x = block(x, cos, sin, cu_seqlens, kernel, None if cache is None else cache.layers[i])
        x = self.transformer["ln_f"](x)
        if targets is not None:
            return chunked_cross_entropy(x, self.head_weight, targets, self.config.vocab_size, z_loss=self.z_loss)
        return F.linear(x, self.head_weight)[..., : self.config.vocab_size]

    def _choose_attention(self, x: Tensor, documents: bool) -> AttentionChoice:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        training = self.training and torch.is_grad_enabled()
        return choose_attention(x.device, dtype, self.config.head_size, self.attention, training, documents=documents)
