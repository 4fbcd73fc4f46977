"""Runs a peer's model in a standard training loop, driven by lines on standard input; started by `train_step.py`.

Needs only torch, numpy and the peer, so that it runs in the peer's own environment: python peer_step.py NAME PLAN ROWS.
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

PACKAGES = ("torch", "lightning-fabric", "transformers", "litgpt", "torchtitan", "torchao", "flash-attn-4", "triton")


def serve(name: str, build: Callable[[], Callable[[], Any]]) -> None:
    """Build a step, then answer the lines of standard input with one line of JSON each.

    `N` runs N steps: their seconds, the last loss and the peak memory. `matmul` measures the rate of a large matrix
    multiply. Running out of memory is an answer too, and the last one.
    """
    try:
        step = build()
        print(json.dumps({"ready": name, "versions": versions()}), flush=True)
        for line in sys.stdin:
            answer = {"flops_per_s": matmul_rate()} if line.strip() == "matmul" else run_steps(step, int(line))
            print(json.dumps(answer), flush=True)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print(json.dumps({"failed": "out of memory"}), flush=True)


def run_steps(step: Callable[[], Any], n: int) -> dict[str, float]:
    synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    loss: Any = None
    for _ in range(n):
        loss = step()
    synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": float(loss), "memory_gib": peak_memory_gib()}


def matmul_rate() -> float:
    """FLOP/s of a square matrix multiply: 8192 in bf16 on CUDA, 2048 in fp32 on a CPU."""
    cuda = torch.cuda.is_available()
    n, device, dtype = (8192, "cuda", torch.bfloat16) if cuda else (2048, "cpu", torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    calls = 20 if cuda else 1
    torch.mm(a, b)
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        torch.mm(a, b)
    synchronize()
    return 2 * n**3 * calls / (time.perf_counter() - start)


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
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# --- the peers' models: a function of tokens int64 [B, T] -> logits [B, T, V], and the modules to compile -------------

Built = tuple[torch.nn.Module, Callable[..., Any], list[torch.nn.Module]]


def transformers_llama(c: dict[str, Any]) -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(
        LlamaConfig(
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
    )
    return model, lambda tokens: model(tokens).logits, [model]


def litgpt(c: dict[str, Any]) -> Built:
    from litgpt import GPT, Config

    model: Any = GPT(
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
    return model, model, [model]


def torchtitan(c: dict[str, Any]) -> Built:
    """Its Llama 3, compiled block by block as its trainer does, on whole rows: attention by SDPA.

    Its trainer always keeps documents apart, with FlexAttention or varlen, which have no backward on a CPU. Rotation
    frequencies follow its default theta; they change no time.
    """
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.llama3 import Llama3Model, Llama3TransformerBlock

    C, V = c["n_embd"], c["padded_vocab_size"]
    drawn, ones = {"weight": lambda w: torch.nn.init.normal_(w, std=0.02)}, {"weight": torch.nn.init.ones_}
    rope = ComplexRoPE.Config(dim=C // c["n_head"], max_seq_len=c["block_size"])

    def norm() -> Any:
        return RMSNorm.Config(normalized_shape=C, eps=c["norm_eps"], param_init=ones)

    def block() -> Any:
        attention = make_gqa_config(
            dim=C,
            n_heads=c["n_head"],
            n_kv_heads=c["n_query_groups"],
            wqkv_param_init=drawn,
            wo_param_init=drawn,
            inner_attention=ScaledDotProductAttention.Config(),
            fuse_qkv=True,
            rope=rope,
        )
        mlp = make_ffn_config(dim=C, hidden_dim=c["intermediate_size"], w1_param_init=drawn, w2w3_param_init=drawn)
        return Llama3TransformerBlock.Config(
            attention=attention, feed_forward=mlp, attention_norm=norm(), ffn_norm=norm()
        )

    config = Llama3Model.Config(
        dim=C,
        vocab_size=V,
        tok_embeddings=Embedding.Config(num_embeddings=V, embedding_dim=C, param_init=drawn),
        norm=norm(),
        lm_head=Linear.Config(in_features=C, out_features=V, param_init=drawn),
        layers=[block() for _ in range(c["n_layer"])],
    )
    model: Any = Llama3Model(config)
    model.init_states()
    return model, model, list(model.layers.values())


PEERS = {"transformers": transformers_llama, "litgpt": litgpt, "torchtitan": torchtitan}


def peer(name: str, plan: dict[str, Any], rows: int, tokens_a_row: int) -> Callable[[], Any]:
    """A peer's model in the usual loop: autocast, full logits, cross-entropy, clip_grad_norm_, fused AdamW."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model, forward, compiled = PEERS[name](plan["config"] | {"block_size": tokens_a_row})
    if plan["compile"]:
        for module in compiled:
            module.compile()
    dtype = torch.float32 if plan["precision"] == "fp32" else torch.bfloat16
    if device == "cuda" and dtype != torch.float32:
        torch.set_float32_matmul_precision("high")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    stream = np.load(plan["folder"] + "/tokens.npy", mmap_mode="r")
    B, T = rows, tokens_a_row
    state = {"at": 0}

    def step() -> Any:
        at = state["at"]
        if at + B * T + 1 > len(stream):
            at = 0
        batch = torch.from_numpy(
            np.stack([stream[at + i * T : at + (i + 1) * T + 1] for i in range(B)]).astype(np.int64)
        )
        state["at"] = at + B * T
        batch = batch.to(device, non_blocking=True)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = forward(batch[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def main() -> int:
    name, plan = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    rows, tokens_a_row = map(int, sys.argv[3:5])
    serve(name, lambda: peer(name, plan, rows, tokens_a_row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
