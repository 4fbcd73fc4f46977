"""Tokens per second of our generation and transformers', on the same weights, prompts and settings, in one call.

    python benchmarks/generation.py [--model LLaMmlein_120M] [--device cpu] [--threads N] [--json FILE]

Both take turns, after a warm-up, and the fastest of each is compared; a greedy text must be the same on both sides.
Prompts are random ids: 32 of them, or 4 to 60 in the row "unequal" (padded on the left for transformers). Weights are
random too, so a nucleus (top_p) holds nearly the whole vocabulary, which is the slowest case.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.provenance import provenance
from lit_eval.model.in_transformers import open_in_transformers
from lit_model.generate import generate_batch
from lit_model.hf.families import config_to_hf, tensors_to_hf
from lit_model.hf.io import write_folder
from lit_model.init import initialise
from lit_model.model import GPT
from lit_model.registry import get_config
from lit_model.sampling import GREEDY, Sampling

Prompts = list[list[int]]
LENGTHS = {"1": [32], "8": [32] * 8, "8 unequal": [4, 12, 20, 28, 36, 44, 52, 60]}
SAMPLINGS = {"greedy": GREEDY, "top_p 0.95": Sampling(temperature=0.8, top_p=0.95)}


def their_settings(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


def transformers_generate(model: Any, prompts: Prompts, new_tokens: int, sampling: Sampling) -> Prompts:
    longest = max(map(len, prompts))
    device = model.device
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    settings = their_settings(sampling)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=0, **settings)
    new: Prompts = out[:, longest:].tolist()
    return new


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of each call of both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for call, mine in zip((ours, theirs), times, strict=True):
            begun = time.perf_counter()
            call()
            mine.append(time.perf_counter() - begun)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="LLaMmlein_120M", help="a model of the registry (LLaMmlein_120M)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--new_tokens", type=int, default=32, help="of each text (32)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side (5)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = get_config(args.model)
    model = GPT(config)
    initialise(model, config, 0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "hf"
        write_folder(folder, config_to_hf(config), tensors_to_hf(config, model.state_dict()))
        theirs = open_in_transformers(folder).to(args.device)
    model = model.to(args.device).eval()
    generator = torch.Generator().manual_seed(0)
    n = args.new_tokens
    found: dict[str, Any] = {}
    print(f"{args.model}, {args.device}, {torch.get_num_threads()} threads, float32: tokens per second")
    print("| batch | sampling | ours | transformers | ratio |\n|---|---|---|---|---|")
    for batch, lengths in LENGTHS.items():
        prompts = [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]
        for name, sampling in SAMPLINGS.items():

            def own(prompts: Prompts = prompts, sampling: Sampling = sampling) -> Prompts:
                return [out.ids for out in generate_batch(model, prompts, n, sampling)]

            def their(prompts: Prompts = prompts, sampling: Sampling = sampling) -> Prompts:
                return transformers_generate(theirs, prompts, n, sampling)

            first = own(), their()
            if sampling.temperature == 0 and first[0] != first[1]:
                print(f"error: batch {batch}: the greedy texts differ", file=sys.stderr)
                return 1
            times = alternate(own, their, args.repeats)
            ours_per_s, theirs_per_s = (n * len(prompts) / min(seconds) for seconds in times)
            ratio = ours_per_s / theirs_per_s
            print(f"| {batch} | {name} | {ours_per_s:.1f} | {theirs_per_s:.1f} | {ratio:.2f} |", flush=True)
            found[f"{batch}, {name}"] = {"ours": ours_per_s, "transformers": theirs_per_s, "ratio": ratio, "s": times}
    if args.json:
        threads = torch.get_num_threads()
        line = f"python benchmarks/generation.py --model {args.model} --device {args.device} --threads {threads}"
        facts = {**provenance(line, "torch", "transformers"), "model": args.model, "new_tokens": n, "results": found}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
