"""A traceable version of a model for torch.onnx, with dynamic batch size and length.

The model's own modules compute everything except attention and experts, whose kernels depend on the data's shape.
Names and layouts of inputs and outputs are those that Optimum and onnxruntime-genai expect of a decoder.

Dimensions: B batch, T new tokens per row, P cached tokens per row, S = P + T, C n_embd, H query heads, G key/value
heads, D head size, E experts, k experts of a token, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_model.attention import Attention, RowLayout
from lit_model.loss import head_logits
from lit_model.model import GPT
from lit_model.moe import MoE


class _Past:
    """Cached keys and values (B, G, P, D) of one layer."""

    def __init__(self, k: Tensor | None, v: Tensor | None) -> None:
        self.k, self.v = k, v

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values, (B, G, T, D) each -> (B, G, S, D) each."""
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        return self.k, self.v


class _Layout(NamedTuple):
    """Inputs that all layers of one forward share."""

    rows: RowLayout
    masks: Mapping[str, Tensor]
    """Additive attention masks by the layer's kind of attention: float32 (B, 1, T, S)."""


class _PlainAttention(nn.Module):
    """`Attention` with a materialized score matrix and an additive mask; called like `Attention`, with other types."""

    def __init__(self, attention: Attention, kind: str) -> None:
        super().__init__()
        self.attention = attention
        self.kind = kind

    def forward(self, x: Tensor, layout: _Layout, kernel: str, past: _Past) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        own = self.attention
        G, D = own.n_query_groups, own.head_size
        q, k, v = own.project(x, layout.rows)  # (B, T, H, D), (B, T, G, D) twice
        k, v = past.append(k.transpose(1, 2), v.transpose(1, 2))  # (B, G, S, D) each
        q = q.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)  # (B, G, H/G, T, D)
        scores = q @ k.unsqueeze(2).transpose(3, 4) * (own.variant.scale or D**-0.5)  # (B, G, H/G, T, S)
        if own.variant.softcap is not None:
            scores = own.variant.softcap * torch.tanh(scores / own.variant.softcap)
        weights = (scores + layout.masks[self.kind].unsqueeze(1)).softmax(-1)
        y = (weights @ v.unsqueeze(2)).permute(0, 3, 1, 2, 4).flatten(2)  # (B, T, H D)
        out: Tensor = own.proj(y)
        return out


class _AllExperts(nn.Module):
    """`MoE` that runs every expert on every token: E / k times the FLOPs, but shapes that do not depend on the routing.

    An expert that was not selected gets zeros as input and, without a bias, returns zeros.
    """

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, None]:
        """(B, T, C) -> (B, T, C)."""
        moe = self.moe
        logits = moe.router(x)  # (B, T, E)
        chosen, experts = logits.topk(moe.n_expert_per_token, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, experts, chosen.sigmoid())  # (B, T, E)
        inputs = (x.unsqueeze(2) * gates.unsqueeze(-1)).flatten(0, 1).transpose(0, 1)  # (E, B T, C)
        gate, up = (inputs @ moe.experts.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        outputs = (moe.experts.activation(gate) * up) @ moe.experts.down.transpose(1, 2)  # (E, B T, C)
        y = outputs.sum(0).view(x.shape)
        return (y if moe.shared is None else moe.shared(x) + y), None


class OnnxGraph(nn.Module):
    """Maps tokens, and cached keys and values, to logits and the updated keys and values.

    Args:
        model: shares its weights with the graph and is not modified.
        cache: whether inputs and outputs include keys and values.
    """

    def __init__(self, model: GPT, *, cache: bool) -> None:
        super().__init__()
        self.model = without_padding(model)
        self.cache = cache
        config = self.config = self.model.config
        kinds = [config.layer_attention(i) for i in range(config.n_layer)]
        for block, kind in zip(self.model.blocks(), kinds, strict=True):
            block.attn = _PlainAttention(block.attn, kind)  # type: ignore[assignment]
            if isinstance(block.mlp, MoE):
                block.mlp = _AllExperts(block.mlp)  # type: ignore[assignment]
        if self.model._rope is not None:
            self.model._rope.table(torch.device("cpu"))  # built here, so that it becomes a constant of the graph

    @property
    def input_names(self) -> list[str]:
        """In the order of `forward`'s arguments."""
        return ["input_ids", "attention_mask", *(self._names("past_key_values") if self.cache else [])]

    @property
    def output_names(self) -> list[str]:
        """In the order of `forward`'s results."""
        return ["logits", *(self._names("present") if self.cache else [])]

    def _names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{i}.{part}" for i in range(self.config.n_layer) for part in ("key", "value")]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[Tensor] | None = None) -> list[Tensor]:
        """Return logits float32 (B, T, V), then with a cache the keys and values (B, G, S, D) of each layer.

        Args:
            input_ids: int64 (B, T).
            attention_mask: int64 (B, S): 0 for padding, which precedes a row's first token.
            past: keys and values (B, G, P, D) of each layer, in the order of `input_names`.
        """
        T = input_ids.shape[1]
        layers = [_Past(None, None) for _ in range(self.config.n_layer)]
        if past is not None:
            layers = [_Past(k, v) for k, v in zip(past[::2], past[1::2], strict=True)]
        of_keys = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (B, S) positions
        positions = of_keys[:, -T:]  # (B, T)
        x = self.model._embed(input_ids, positions)  # (B, T, C)
        layout = _Layout(self.model._layout(positions, 1, 1, None), self._masks(attention_mask, of_keys, T))
        for block, own in zip(self.model.blocks(), layers, strict=True):
            x, _ = block(x, layout, "", own)
        x = self.model.transformer["ln_f"](x)
        config, head = self.config, self.model.lm_head
        bias = None if head is None else head.bias
        logits = head_logits(
            x, self.model.head_weight, config.vocab_size, bias=bias, softcap=config.final_logit_softcapping
        )
        present = [part for own in layers for part in (own.k, own.v) if part is not None]
        return [logits, *present] if self.cache else [logits]

    def _masks(self, attention_mask: Tensor, of_keys: Tensor, T: int) -> dict[str, Tensor]:
        """See `_Layout.masks`."""
        S = attention_mask.shape[1]
        slots = torch.arange(S, device=attention_mask.device)
        ahead = slots[-T:, None] - slots[None, :]  # (T, S): distance from the query back to the key
        seen = (ahead >= 0) & (attention_mask[:, None, :] != 0)  # (B, T, S)
        visible = {"full": seen}
        if (window := self.config.sliding_window_size) is not None:
            visible["sliding"] = seen & (ahead < window)
        if (chunk := self.config.attention_chunk_size) is not None:
            chunks = of_keys // chunk  # (B, S)
            visible["chunked"] = seen & (chunks[:, -T:, None] == chunks[:, None, :])
        # Finite, so that padding queries, which see no key, do not give NaN.
        hidden = torch.finfo(torch.float32).min
        return {kind: torch.where(one, 0.0, hidden).unsqueeze(1) for kind, one in visible.items()}


def without_padding(model: GPT) -> GPT:
    """A copy without the padding rows of embedding and head. It shares the weights."""
    V = model.config.vocab_size
    config = dataclasses.replace(model.config, padded_vocab_size=V)
    with torch.device("meta"):
        copied = GPT(config)
    tensors = dict(model.state_dict())
    for name in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias"):
        if name in tensors:
            tensors[name] = tensors[name][:V]
    copied.load_state_dict(tensors, assign=True)
    return copied.eval()
