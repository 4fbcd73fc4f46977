"""Runs a peer's model in a standard training loop, driven by lines on standard input; started by `train_step.py`.

Needs only torch, numpy and the peer, so that it runs in the peer's own environment: python peer_step.py NAME PLAN.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch


def serve(name: str, step: Callable[[], Any]) -> None:
    """Answer each line `N` on standard input with the seconds of N steps, the last loss and the peak memory."""
    print(json.dumps({"ready": name, "versions": versions()}), flush=True)
    for line in sys.stdin:
        n = int(line)
        synchronize()
        start = time.perf_counter()
        loss: Any = None
        for _ in range(n):
            loss = step()
        synchronize()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": float(loss), "memory_gib": peak_memory_gib()}), flush=True)


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_gib() -> float:
    """Allocated on CUDA, resident on a CPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def versions() -> dict[str, str]:
    """Of what decides the speed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "lightning-fabric", "transformers", "litgpt"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peer(name: str, plan: dict[str, Any]) -> Any:
    """A peer's model under the usual loop: autocast, full logits, cross-entropy, clip_grad_norm_, fused AdamW."""
    c = plan["config"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if name == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=c["padded_vocab_size"],
            hidden_size=c["n_embd"],
            intermediate_size=c["intermediate_size"],
            num_hidden_layers=c["n_layer"],
            num_attention_heads=c["n_head"],
            num_key_value_heads=c["n_query_groups"],
            max_position_embeddings=c["block_size"],
            rms_norm_eps=c["norm_eps"],
            tie_word_embeddings=c["tie_embeddings"],
            use_cache=False,
        )
        model: Any = LlamaForCausalLM(config)
        forward = lambda tokens: model(tokens).logits  # noqa: E731
    else:
        from litgpt import GPT, Config

        model = GPT(
            Config(
                block_size=c["block_size"],
                vocab_size=c["vocab_size"],
                padded_vocab_size=c["padded_vocab_size"],
                n_layer=c["n_layer"],
                n_head=c["n_head"],
                n_query_groups=c["n_query_groups"],
                n_embd=c["n_embd"],
                intermediate_size=c["intermediate_size"],
                rotary_percentage=1.0,
                parallel_residual=False,
                bias=False,
                norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP",
                norm_eps=c["norm_eps"],
            )
        )
        forward = lambda tokens: model(tokens)  # noqa: E731
    model.to(device)
    if plan["compile"]:
        model.compile()
    if device == "cuda" and plan["precision"] != "fp32":
        torch.set_float32_matmul_precision("high")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    dtype = torch.bfloat16 if plan["precision"] == "bf16" else torch.float32
    stream = np.load(plan["folder"] + "/tokens.npy", mmap_mode="r")
    B, T = plan["batch"], plan["block_size"]
    state = {"at": 0}

    def step() -> Any:
        at = state["at"]
        if at + B * T + 1 > len(stream):
            at = 0
        rows = torch.from_numpy(
            np.stack([stream[at + i * T : at + (i + 1) * T + 1] for i in range(B)]).astype(np.int64)
        )
        state["at"] = at + B * T
        rows = rows.to(device, non_blocking=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = forward(rows[:, :-1])  # type: ignore[no-untyped-call]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def main() -> int:
    name, plan = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    if plan["threads"]:
        torch.set_num_threads(plan["threads"])
    serve(name, peer(name, plan))
    return 0


if __name__ == "__main__":
    sys.exit(main())
