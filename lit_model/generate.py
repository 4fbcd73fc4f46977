"""Sampling with a key/value cache.

Dimensions: T prompt tokens, n new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_model.attention import KVCache
from lit_model.model import GPT

__all__ = ["KVCache", "generate", "sample"]


@torch.inference_mode()
def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
    excluded_ids: Sequence[int] = (),
) -> Tensor:
    """Continue `prompt` (int64 (T,)) by up to `max_new_tokens` tokens -> int64 (T + n,) on the prompt's device.

    Temperature 0 takes the most probable token (ties: the smallest id); otherwise tokens are drawn from the softmax of
    logits / temperature, cut to the top `top_k` tokens and to the smallest set that holds `top_p` of the mass, in this
    order. `excluded_ids`, above all ids without a token, are never sampled. Ends after `eos_id`, which is included.
    The same seed gives the same tokens. Raises ValueError for a setting out of range, an empty prompt, ids outside the
    vocabulary, or more tokens than block_size.
    """
    _check(model, prompt, max_new_tokens, temperature, top_k, top_p)
    excluded = torch.tensor(excluded_ids, dtype=torch.int64)
    device = model.head_weight.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.head_weight.dtype
    total = prompt.numel() + max_new_tokens
    cache = KVCache(model.config, batch=1, max_tokens=total, device=device, dtype=dtype)
    generator = torch.Generator("cpu").manual_seed(seed)
    training = model.training
    model.eval()
    try:
        tokens = prompt.tolist()
        step = prompt.to(device).view(1, -1)  # (1, T)
        for _ in range(max_new_tokens):
            logits = model(step, cache=cache)
            # Sync: the token decides whether to stop; and drawn on the host, a seed means the same on any device.
            choice = logits[0, -1].float().cpu().index_fill(0, excluded, -torch.inf)  # (V,)
            token = sample(choice, temperature, top_k, top_p, generator)
            tokens.append(token)
            if token == eos_id:
                break
            step = torch.tensor([[token]], device=device)
    finally:
        model.train(training)
    return torch.tensor(tokens, dtype=torch.int64, device=prompt.device)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One token id from float32 logits (V,), see `generate`."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k is not None and top_k < logits.numel():
        kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter_(0, kept.indices, kept.values)
    probabilities = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, ids = probabilities.sort(descending=True, stable=True)
        # A token stays if the mass before it is below top_p (nucleus sampling, Holtzman et al., 2020): one always does.
        ordered[(ordered.cumsum(0) - ordered) >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(0, ids, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _check(
    model: GPT, prompt: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if prompt.dim() != 1 or prompt.numel() == 0:
        raise ValueError(f"the prompt has shape {tuple(prompt.shape)}; give one row of at least one token id")
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(
            f"prompt id {low if low < 0 else high} is outside the model's vocabulary of {model.config.vocab_size}"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be in (0, 1]")
    if prompt.numel() + max_new_tokens > model.config.block_size:
        raise ValueError(
            f"{prompt.numel()} prompt tokens and max_new_tokens {max_new_tokens} exceed the model's context "
            f"(block_size {model.config.block_size}); shorten one of them"
        )
