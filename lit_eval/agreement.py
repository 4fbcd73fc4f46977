"""Compares our per-span losses on a packed dataset with those of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lit_data.loading.batches import PADDING, read_rows
from lit_data.loading.rows import ConcatRows
from lit_data.packed.reader import PackedDataset
from lit_eval.model.in_transformers import open_in_transformers
from lit_files.progress import track
from lit_model.load import load_model
from lit_model.loss import LossOutput


@dataclass
class SpanLosses:
    """Summed losses (nats) of spans, in stream order, and their positions.

    Attributes:
        start: stream position of the first input token; `length` inputs, `targets` of them with a target.
    """

    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Nats per target over all spans."""
        return float(self.loss.sum() / self.targets.sum())


@torch.no_grad()
def our_span_losses(
    model_path: Path, dataset: PackedDataset, block_size: int, batch: int = 16, max_rows: int | None = None
) -> SpanLosses:
    """Run our model on the rows of a packed dataset, the first `max_rows` or all, with the document mask, as the
    trainer's validation does.
    """
    model, _ = load_model(model_path)
    windows_of = ConcatRows(dataset, block_size)
    n_rows = windows_of.n_windows if max_rows is None else min(max_rows, windows_of.n_windows)
    parts: list[tuple[Any, ...]] = []
    for first in track(range(0, n_rows, batch), "losses here", "batches"):
        windows = np.arange(first, min(first + batch, n_rows), dtype=np.int64)
        rows = read_rows(windows_of, windows, windows, document_mask=True)
        out = model(rows.tokens, rows.targets, cu_seqlens=rows.cu_seqlens)
        assert isinstance(out, LossOutput)
        spans = rows.spans
        offsets = rows.cu_seqlens[: len(spans.length)].long().numpy()
        sums = np.add.reduceat(out.token_losses.double().numpy().reshape(-1), offsets)
        keep = spans.document != PADDING
        start = dataset.document_start(spans.document[keep]) + spans.start[keep]
        parts.append((start, spans.length[keep], spans.targets[keep], sums[keep]))
    return SpanLosses(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def transformers_span_losses(folder: Path, dataset: PackedDataset, spans: SpanLosses) -> SpanLosses:
    """Run `AutoModelForCausalLM` in float32 on the same spans, one at a time.

    Raises ValueError if this version of transformers computes another model than the folder describes.
    """
    import transformers

    model = open_in_transformers(folder)
    cap, attention = getattr(model.config, "attn_logit_softcapping", None), model.config._attn_implementation
    if cap is not None and attention == "sdpa":
        raise ValueError(
            f"transformers {transformers.__version__} opens {folder} with SDPA, which leaves out its soft-cap of "
            'attention scores: install transformers 5.21 or newer, or open the model with attn_implementation="eager"'
        )
    losses = np.zeros_like(spans.loss)
    columns = list(zip(spans.start, spans.length, spans.targets, strict=True))
    for i, (start, length, targets) in enumerate(track(columns, "losses in transformers", "spans")):
        if targets == 0:
            continue
        stop = min(int(start + length) + 1, dataset.n_tokens)
        ids = torch.from_numpy(dataset.tokens(int(start), stop).astype(np.int64))
        logits = model(ids[:length].unsqueeze(0)).logits[0, : int(targets)].float()
        losses[i] = (
            torch.nn.functional.cross_entropy(logits, ids[1 : int(targets) + 1], reduction="none").double().sum()
        )
    return SpanLosses(spans.start, spans.length, spans.targets, losses)


def largest_difference(ours: SpanLosses, theirs: SpanLosses) -> float:
    """Largest relative difference between two summed losses of a span."""
    scored = theirs.targets > 0
    return float(np.max(np.abs(ours.loss - theirs.loss)[scored] / theirs.loss[scored]))
