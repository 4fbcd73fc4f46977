"""A model trained on synthetic text reaches the generator's own entropy, and does not go below it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from running import ROOT, command

from lit_data.corpus.grammar_nll import conditional_nll
from lit_data.packed.reader import PackedDataset
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_model.load import load_model


def whole_documents(dataset: PackedDataset) -> Iterator[torch.Tensor]:
    """The documents' tokens, int64 [T], EOS included."""
    for number in range(dataset.n_documents):
        start, stop = dataset.document_start(np.asarray([number, number + 1])).tolist()
        yield torch.from_numpy(dataset.tokens(start, stop).astype(np.int64))


@pytest.mark.slow
def test_validation_loss_reaches_the_generators_entropy(tmp_path: Path) -> None:
    """Within 1% of the text's own negative log-likelihood, and at most three standard errors below it.

    Whole documents are scored one at a time, so that the model sees all context that the generator uses. A document's
    first token is not a target, so the generator's likelihood is conditioned on it. The end of the document is a
    target.
    """
    run = tmp_path / "run"
    command("--config", str(ROOT / "configs" / "synthetic.yaml"), "--out_dir", str(run), timeout=3000)
    dataset = PackedDataset(run / "data" / "packed" / "val")
    tokenizer = open_tokenizer(run / "tokenizer")
    lines = (run / "data" / "text" / "val.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == dataset.n_documents
    floor = np.array([conditional_nll(t, tokenizer.decode(tokenizer.encode(t)[:1]), "simple") for t in texts])
    model, _ = load_model(run)
    with torch.no_grad():
        losses = np.array([model(ids[None, :-1], ids[None, 1:]).loss_sum.item() for ids in whole_documents(dataset)])
    excess = losses - floor
    ratio = losses.sum() / floor.sum()
    standard_error = excess.std(ddof=1) / np.sqrt(len(excess))
    print(f"model / generator = {ratio:.5f}; mean excess {excess.mean():.4f} +- {standard_error:.4f} nats a document")
    assert ratio < 1.01
    assert excess.mean() > -3 * standard_error
