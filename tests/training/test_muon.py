"""Muon, compared with torch.optim.Muon, with a closed form in float64, and sharded with one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from devices import DEVICES
from parallel_configurations import settings_of, shared_trainer
from running import MODEL, flags, train
from torch import Tensor

from lit_model.config import ModelConfig
from lit_model.cost import TrainingSetting, training_memory
from lit_model.load import Checkpoint
from lit_model.model import GPT
from pretrain.args import OptimArgs
from pretrain.guards import skip_if_not_finite
from pretrain.muon import COEFFICIENTS, ITERATIONS, Muon, newton_schulz
from pretrain.optim import AdamW, Optimizer, clip_coefficient, gradient_norm

# Queries of 2 x 24 rows, keys of 24; experts; every other kind of matrix.
CONFIG = ModelConfig(
    n_layer=3, n_head=2, n_query_groups=1, n_embd=16, head_size=24, intermediate_size=10, n_expert=3,
    vocab_size=30, padding_multiple=1, moe_layers=(False, True, True), position_embedding="learned", block_size=8,
)  # fmt: skip
ARGS = OptimArgs(name="muon", lr=0.02, weight_decay=0.3)


def give_gradients(model: GPT, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


def logical(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices in a parameter of CONFIG, as views."""
    if name.endswith("qkv.weight"):
        return list(tensor.split([48, 24, 24]))
    if "experts" in name:
        return [m for expert in tensor for m in (expert.split(10) if name.endswith("gate_up") else [expert])]
    return [tensor]


@pytest.mark.parametrize("device", DEVICES)
def test_equals_torch_on_each_logical_matrix(device: str) -> None:
    torch.manual_seed(0)
    ours, theirs = GPT(CONFIG).to(device), GPT(CONFIG).to(device)
    theirs.load_state_dict(ours.state_dict())
    optimizer = Muon(ours.named_parameters(), ARGS, CONFIG)
    optimizer.dtype = torch.bfloat16  # torch's, on every device
    outside = {n: p for n, p in theirs.named_parameters() if n not in optimizer.matrices}
    assert {n.split(".", 3)[-1] if ".h." in n else n for n in outside} == {
        "transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "lm_head.weight",
        "norm_1.weight", "norm_2.weight", "mlp.router.weight",
    }  # fmt: skip
    adamw = AdamW(outside.items(), ARGS)
    pieces = {
        (n, i): torch.nn.Parameter(matrix)
        for n in optimizer.matrices
        for i, matrix in enumerate(logical(n, theirs.get_parameter(n).detach()))
    }
    muon = torch.optim.Muon(pieces.values(), lr=0.02, weight_decay=0.3, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for (name, i), p in pieces.items():
            p.grad = logical(name, theirs.get_parameter(name).grad)[i]
        optimizer.step(0.02)
        adamw.step(0.02)
        muon.step()
    assert optimizer.step_count == 5
    for name, p in ours.named_parameters():
        # Keys and values have fewer rows, and so a smaller factor, which is applied in bf16. On CUDA one product of all
        # matrices of a shape is rounded to bf16 in another order than theirs.
        atol = 1e-3 if device == "cuda" else 5e-4 if name.endswith("qkv.weight") else 2e-6
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (3, 5, 5)])
def test_newton_schulz_maps_singular_values(shape: tuple[int, ...]) -> None:
    """In float32 beside the closed form in float64: the polynomial of the normalized singular values."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(x).double(), u @ torch.diag_embed(s) @ v, rtol=0, atol=1e-4)
    assert newton_schulz(torch.zeros(shape)).count_nonzero() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_skipped_step_changes_nothing(device: str) -> None:
    model = GPT(CONFIG).to(device)
    optimizer = Muon(model.named_parameters(), ARGS, CONFIG)
    give_gradients(model, 0)
    optimizer.step(0.02)
    before = [t.clone() for t in everything(optimizer)]
    give_gradients(model, 1)
    model.transformer["h"][0].attn.qkv.weight.grad[3, 4] = float("inf")
    norm = gradient_norm(optimizer.parameters.values())
    optimizer.step(0.02, skip_if_not_finite(norm), clip_coefficient(norm, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(optimizer), strict=True))


def everything(optimizer: Optimizer) -> list[Tensor]:
    states = [t for state in optimizer.state.values() for t in state.values()]
    return [*optimizer.parameters.values(), *states, optimizer.step_count]


def test_sharded_equals_one_process() -> None:
    """On a line and a square of 4 ranks, with rows that do not divide evenly: some ranks hold no row or no expert.

    Each matrix is orthogonalized once: on one of the line's 4 ranks, on one of the 2 of each column of the square.
    """
    answer = shared_trainer().ask("muon", 4, muon=CONFIG.to_dict())
    n_matrices = sum(len(logical(n, p)) for n, p in GPT(CONFIG).named_parameters() if n in answer["whole"])
    for layout, replicas in (("line", 1), ("square", 2)):
        counts = answer[f"orthogonalized on a {layout}"]
        assert sum(counts) == 3 * replicas * n_matrices and min(counts) > 0
        for name, expected in answer["whole"].items():
            torch.testing.assert_close(answer[layout][name], expected, rtol=0, atol=2e-5, msg=name)


@pytest.mark.slow
def test_a_sharded_run_resumes_in_one_process_and_another_optimizer_is_refused(data: Path, tmp_path: Path) -> None:
    """A sharded checkpoint of 4 ranks in one process, and its steps' parameters equal one process's."""
    schedule = {
        "optim__name": "muon",
        "train__max_steps": 6,
        "save__every_steps": 3,
        "save__state_dict_type": "sharded",
    }
    for name in ("single", "full4"):
        shared_trainer().run(name, flags(data, tmp_path / name, **schedule, **settings_of(name)))
    saved = tmp_path / "full4" / "iter-00000003-ckpt.pth"
    shutil.copytree(saved, tmp_path / "resumed" / saved.name)
    shared_trainer().run(
        "single", flags(data, tmp_path / "resumed", **schedule, **settings_of("single"), resume="latest"), loaded=saved
    )
    last = [Checkpoint(tmp_path / name / "iter-00000006-ckpt.pth") for name in ("single", "full4", "resumed")]
    for key in last[0].names():
        one = last[0].tensor(key)
        for other in last[1:]:
            torch.testing.assert_close(other.tensor(key), one, rtol=1e-3, atol=1e-3 * one.abs().max().item(), msg=key)

    run, new = tmp_path / "single", {**dict.fromkeys(key.replace(".", "__") for key in MODEL), "init_optimizer": "true"}
    again = flags(data, run, train__max_steps=7, resume="latest", resume_allow="train.max_steps,save")
    for arguments, message in (
        (again, "optim.name: 'muon' there, 'adamw' here"),
        ([*again, "--resume_allow=train.max_steps,optim"], "another model or optimizer"),
        (flags(data, tmp_path / "new", init_from=run, **new), "which --optim.name adamw keeps"),
    ):
        done = train(*arguments, check=False)
        assert done.returncode == 2 and message in done.stdout, done.stdout
    moments = [n for n in last[0].names() if n.startswith("optimizer.transformer.h.0.attn.qkv")]
    assert moments == ["optimizer.transformer.h.0.attn.qkv.weight/momentum_buffer"]
    train(*flags(data, tmp_path / "new", init_from=run, **new, optim__name="muon", train__max_steps=2))


def test_memory_counts_one_moment() -> None:
    model = GPT(CONFIG)
    optimizer = Muon(model.named_parameters(), ARGS, CONFIG)
    memory = training_memory(CONFIG, TrainingSetting(1, 8, muon=True))
    assert memory.optimizer == sum(t.nbytes for state in optimizer.state.values() for t in state.values())
