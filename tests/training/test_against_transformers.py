"""Training steps compared with a transformers Llama on the same batches: equal losses, with clipping active."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import flags

from lit_model.hf.families import config_to_hf, tensors_to_hf
from pretrain.build import set_up
from pretrain.fabric_train import parse
from pretrain.loop import train_step
from pretrain.schedule import learning_rate


@pytest.mark.parametrize(
    ("steps", "learnt"), [(100, 3.9), pytest.param(300, 3.5, marks=pytest.mark.slow)], ids=["100", "300"]
)
def test_losses_equal_transformers(data: Path, tmp_path: Path, steps: int, learnt: float) -> None:
    transformers = pytest.importorskip("transformers")
    arguments = flags(
        data,
        tmp_path / "run",
        data__document_mask="false",
        train__max_steps=steps,
        train__micro_batch_samples=4,  # accumulation 2
        train__clip_norm=0.5,
        optim__lr=1e-3,
    )
    run = set_up(parse(arguments))
    hf_config = transformers.LlamaConfig(**config_to_hf(run.config))
    theirs = transformers.LlamaForCausalLM(hf_config)
    theirs.load_state_dict(dict(tensors_to_hf(run.config, dict(run.raw_model.named_parameters()))), strict=False)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, fused=True)

    worst, clipped = 0.0, 0
    for step, batch in enumerate(run.loader.steps(0, steps)):
        n_targets = batch.n_targets
        theirs_loss = 0.0
        for micro in batch.micro_batches:
            logits = theirs(micro.tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), micro.targets.flatten(), reduction="sum")
            (loss / n_targets).backward()
            theirs_loss += loss.item() / n_targets
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.args.optim, step, steps)
        optimizer.step()
        optimizer.zero_grad()

        result = train_step(run, batch)
        ours_loss = (result.loss_sum / result.n_targets).item()
        worst = max(worst, abs(ours_loss / theirs_loss - 1))
        clipped += norm.item() > 0.5
        torch.testing.assert_close(result.grad_norm, norm, rtol=1e-4, atol=0)
    assert clipped > steps // 3, "too few steps clip: the test would prove nothing"
    assert ours_loss < learnt, "the loss did not fall"
    assert worst < 2e-6, f"losses drifted apart by {worst:.2e}"
