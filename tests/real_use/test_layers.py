"""--log.layers true writes each layer's norms of gradients, activations and updates."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from running import flags, train

from lit_model.hf.families import config_to_hf, tensors_to_hf
from pretrain.build import set_up
from pretrain.fabric_train import parse
from pretrain.logs.layer_norms import LayerNorms
from pretrain.loop import train_step
from pretrain.schedule import learning_rate

CLIP = 0.5


def rows_of(run: Path) -> list[dict[str, float]]:
    with open(run / "layers.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_against_transformers_in_float64(data: Path, tmp_path: Path) -> None:
    """The norms of two accumulated, clipped steps equal those of transformers' model and AdamW in float64."""
    transformers = pytest.importorskip("transformers")
    settings = {"data__document_mask": "false", "train__micro_batch_samples": 4, "train__clip_norm": CLIP}
    run = set_up(parse(flags(data, tmp_path / "run", log__layers="true", **settings)))
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_to_hf(run.config)))
    theirs.load_state_dict(dict(tensors_to_hf(run.config, dict(run.raw_model.named_parameters()))), strict=False)
    theirs = theirs.double()
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    modules = {
        "wte": theirs.model.embed_tokens,
        **{str(i): layer for i, layer in enumerate(theirs.model.layers)},
        "ln_f": theirs.model.norm,
        "lm_head": theirs.lm_head,
    }
    outputs: dict[str, list[torch.Tensor]] = {}
    for name, module in modules.items():
        if name.isdigit():
            module.register_forward_hook(
                lambda _, __, out, name=name: outputs.setdefault(name, []).append(
                    (out[0] if isinstance(out, tuple) else out).detach()
                )
            )

    def norm(tensors: list[torch.Tensor]) -> float:
        return torch.cat([t.flatten() for t in tensors]).norm().item()

    norms = LayerNorms(run.raw_model, run.optimizer.parameters, run.device)
    for step, batch in enumerate(run.loader.steps(0, 2)):
        outputs.clear()
        for micro in batch.micro_batches:
            logits = theirs(micro.tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), micro.targets.flatten(), reduction="sum")
            (loss / batch.n_targets).backward()
        expected = {f"gradient_norm_{n}": norm([p.grad for p in m.parameters()]) for n, m in modules.items()}
        expected |= {f"activation_rms_{n}": torch.cat(o).square().mean().sqrt().item() for n, o in outputs.items()}
        assert torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP) > CLIP, "clipping is not active"
        before = {n: [p.detach().clone() for p in m.parameters()] for n, m in modules.items()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.args.optim, step, run.data.max_steps)
        optimizer.step()
        optimizer.zero_grad()
        for n, m in modules.items():
            expected[f"update_norm_{n}"] = norm([p - old for p, old in zip(m.parameters(), before[n], strict=True)])
        train_step(run, batch, norms)
        assert norms.read() == pytest.approx(expected, rel=2e-4)
        assert run.raw_model.observe is None
    run.close()


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("layers") / "single"
    train(*flags(data, run, log__layers="true", train__max_steps=4, log__every_steps=2))
    return run


SETTINGS: dict[str, dict[str, object]] = {
    "ddp": {"devices": 2, "train__micro_batch_samples": 2},
    "fsdp": {"devices": 2, "strategy": "fsdp", "train__micro_batch_samples": 2},
    "recomputed": {"train__activation_checkpointing": "full", "train__micro_batch_samples": 8},
    "compiled": {"compile": "true"},
}


@pytest.mark.parametrize("name", ["fsdp", *(pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS if n != "fsdp")])
def test_norms_do_not_depend_on_the_configuration(data: Path, single: Path, tmp_path: Path, name: str) -> None:
    """Two sharded or replicated ranks, recomputation, compiled blocks: the norms equal a single process's."""
    run = tmp_path / "run"
    train(*flags(data, run, log__layers="true", train__max_steps=4, log__every_steps=2, **SETTINGS[name]))
    ours, theirs = rows_of(run), rows_of(single)
    assert [row["step"] for row in theirs] == [2, 4]
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_layers_follow_a_resume(data: Path, single: Path, tmp_path: Path) -> None:
    """Off by default; a resumed run truncates and continues layers.csv as it does metrics.csv."""
    run = tmp_path / "run"
    same = {"train__max_steps": 4, "log__every_steps": 2}
    train(*flags(data, run, save__every_steps=2, **same))
    assert not (run / "layers.csv").exists()
    (run / "layers.csv").write_bytes((single / "layers.csv").read_bytes())
    train(*flags(data, run, log__layers="true", resume="iter-00000002-ckpt.pth", **same))
    assert rows_of(run) == rows_of(single)
