"""Continues a single prompt, as tests compare it with other implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_model.generate import Sampling, generate_batch
from lit_model.model import GPT


def generate(
    model: GPT, prompt: Tensor, max_new_tokens: int, *, seed: int = 0, eos_id=None, excluded_ids=(), **sampling
) -> Tensor:
    """Continue `prompt` (int64 (T,)) by up to `max_new_tokens` tokens -> int64 (T + n,). `sampling`: see Sampling."""
    ids = prompt.tolist()
    (out,) = generate_batch(
        model, [ids], max_new_tokens, Sampling(**sampling), seeds=[seed], eos_id=eos_id, excluded_ids=excluded_ids
    )
    return torch.tensor(ids + out.ids, dtype=torch.int64)
