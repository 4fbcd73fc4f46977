"""Small runs of a Llama, a GPT-2 and a Gemma 2 on synthetic text, for tests of evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from running import ROOT, train

SIZE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "intermediate_size": 192}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"name": "debug"},
    "gpt2": {"name": "gpt-97M"},
    "gemma2": {"name": "babylm-gemma2", "n_query_groups": 2, "head_size": 16, "sliding_window_size": 24},
}


def train_family(family: str, out_dir: Path, *arguments: str) -> Path:
    """Train as configs/debug.yaml does, on text that the run makes, a model with the fields of a family."""
    model = SIZE | FAMILIES[family]
    flags = [f"--model.{key}={json.dumps(value) if key != 'name' else value}" for key, value in model.items()]
    train("--config", str(ROOT / "configs" / "debug.yaml"), *flags, *arguments, "--out_dir", str(out_dir))
    return out_dir


def texts_of(run: Path, split: str = "val") -> list[str]:
    """The text of the documents that such a run made."""
    lines = (run / "data" / "text" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
