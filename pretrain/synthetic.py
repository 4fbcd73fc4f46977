"""Synthetic data: text, a tokenizer trained on it, and the packed splits."""

from __future__ import annotations

from pathlib import Path

from lit_data.corpus.synthetic import write_synthetic
from lit_data.packed.manifest import MANIFEST
from lit_data.prepare.run import prepare
from lit_data.prepare.settings import Execution, Settings
from lit_data.tokenizers.training import TokenizerSettings, train_tokenizer
from pretrain.args import SyntheticArgs


def make_synthetic_data(args: SyntheticArgs, folder: Path, seed: int) -> tuple[Path, Path]:
    """Make text, tokenizer and packed data in `folder`, as far as they are missing. Returns (train, val).

    Each part is published whole, so that after a kill it is found or made again.
    """
    text, tokenizer, packed = folder / "text", folder / "tokenizer", folder / "packed"
    if not text.exists():
        write_synthetic(text, tokens=args.tokens, level=args.level, seed=seed)
    if not tokenizer.exists():
        train_tokenizer(TokenizerSettings((str(text / "train.jsonl"),), args.vocab_size, tokenizer))
    if not (packed / "train" / MANIFEST).exists():
        train, val = (str(text / f"{side}.jsonl") for side in ("train", "val"))
        prepare(Settings((train,), str(tokenizer), val_input=(val,)), Execution(packed, workers=1))
    return packed / "train", packed / "val"
