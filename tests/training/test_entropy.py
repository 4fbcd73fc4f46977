"""A model trained on synthetic text reaches the generator's own entropy, and does not go below it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from running import ROOT, train

from lit_data.corpus.synthetic import conditional_nll
from lit_data.packed import PackedDataset
from lit_data.tokenizer import open_tokenizer
from lit_eval.agreement import our_span_losses


@pytest.mark.slow
def test_validation_loss_reaches_the_generators_entropy(tmp_path: Path) -> None:
    """Within 1% of the text's own negative log-likelihood, and not below it by more than three standard errors.

    Documents are scored one a row and never cut (rows as long as the longest), so that the model sees what the
    generator knows; a document's first token is no target, so the generator's likelihood is that of the rest, given it.
    """
    run = tmp_path / "run"
    train("--config", str(ROOT / "configs" / "synthetic.yaml"), "--out_dir", str(run), timeout=3000)
    dataset = PackedDataset(run / "data" / "packed" / "val")
    tokenizer = open_tokenizer(run / "tokenizer")
    lines = (run / "data" / "text" / "val.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == dataset.n_documents
    floor = np.array([conditional_nll(t, tokenizer.decode(tokenizer.encode(t)[:1]), "simple") for t in texts])
    spans = our_span_losses(run, dataset, 256)
    documents = dataset.document_of(spans.start)
    model = np.bincount(documents, weights=spans.loss, minlength=len(texts))
    # A document that is cut by a row's end loses its context there: only whole ones are compared.
    whole = np.bincount(documents, minlength=len(texts)) == 1
    assert whole.sum() > 500
    excess = (model - floor)[whole]
    ratio = model[whole].sum() / floor[whole].sum()
    standard_error = excess.std(ddof=1) / np.sqrt(len(excess))
    print(f"model / generator = {ratio:.5f}; mean excess {excess.mean():.4f} +- {standard_error:.4f} nats a document")
    assert ratio < 1.01
    assert excess.mean() > -3 * standard_error
