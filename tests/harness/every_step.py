"""Every step from text to a generated text, at a tiny size: for test_smoke.py and test_platforms.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from small_models import synthetic_texts

ROOT = Path(__file__).resolve().parents[2]


def every_step(run: Callable[..., str], folder: Path, more: bool = True) -> None:
    """Tokenizer, preparation, training of 3 steps, conversion, generation; `more`: preparation again, resume, record,
    evaluation.

    Args:
        run: runs a script with arguments in `folder`; raises if it fails; returns its output.
    """
    text, tokenizer, data = folder / "text.jsonl", folder / "tokenizer", folder / "data"
    trained, hf = folder / "run", folder / "hf"
    texts = synthetic_texts(300, 1)
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")

    def script(name: str, *arguments: object) -> str:
        return run(ROOT / "scripts" / name, *arguments)

    script("train_tokenizer.py", "--input", text, "--vocab_size", 400, "--output", tokenizer)
    prepare = ["--input", text, "--tokenizer", tokenizer, "--output", data, "--val_fraction", 0.1, "--workers", 1]
    script("prepare_data.py", *prepare)
    train = [
        ROOT / "pretrain" / "fabric_train.py", "--out_dir", trained, "--data.train", data / "train",
        "--data.val", data / "val", "--model.name", "debug", "--train.block_size", 64,
        "--train.global_batch_samples", 4, "--train.micro_batch_samples", 2, "--optim.warmup_steps", 1,
        "--save.every_steps", 2, "--save.keep_last", 1, "--log.every_steps", 1, "--accelerator", "cpu", "--devices", 1,
        "--resume", "auto",
    ]  # fmt: skip
    assert "step 3" in run(*train, "--train.max_steps", 3)
    if more:
        script("prepare_data.py", *prepare, "--overwrite")
        run(*train, "--train.max_steps", 5, "--resume_allow", "train.max_steps")
        assert sorted(p.name for p in trained.glob("iter-*")) == ["iter-00000005-ckpt.pth"]
        script("trace_data.py", "verify", trained)
        script("evaluate.py", trained, "--tasks", "perplexity")
    script("convert_to_hf.py", "--checkpoint", trained, "--output", hf)
    output = script("generate.py", "--model", hf, "--prompt", texts[0][:20], "--max_new_tokens", 5, "--json")
    assert json.loads(output.splitlines()[-1])["ids"]
