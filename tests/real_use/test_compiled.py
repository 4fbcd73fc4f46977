"""All kinds of blocks are really compiled: in training and validation, with teachers, with both attention kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import flags, train, write_dataset

from lit_model.distillation import TeacherHead
from lit_model.init import initialise
from lit_model.kernels.choose import attention
from lit_model.kernels.variant import AttentionVariant
from lit_model.loss import LossOutput
from lit_model.model import GPT
from lit_model.moe import Experts
from lit_model.registry import get_config
from pretrain.compiling import COMPILATIONS_PER_KIND, CompiledBlocks, compile_blocks

SLIDING = {"n_layer": 4, "attention_pattern": ("sliding", "full"), "sliding_window_size": 8}
GEMMA_2 = {**SLIDING, "attention_logit_softcapping": 20.0, "final_logit_softcapping": 10.0, "post_norm": True}
LLAMA_4 = {
    "n_layer": 4,
    "attention_pattern": ("chunked", "full"),
    "attention_chunk_size": 16,
    "n_expert": 4,
    "n_expert_per_token": 1,
    "moe_layers": (True, True, False, False),
}
LLAMA_4_OF_TWO_KINDS = {**LLAMA_4, "n_layer": 2, "moe_layers": (True, False)}


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """Each test starts with torch's default limits, an empty cache and counters at 0."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield
    torch._dynamo.reset()


def build(recompute: Any = "none", **changes: Any) -> GPT:
    model = GPT(get_config("debug", **changes), activation_checkpointing=recompute)
    initialise(model, model.config, seed=3)
    return model


def tokens_of(model: GPT, rows: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (rows, 32), generator=torch.Generator().manual_seed(0))


def bounds(rows: int, size: int) -> torch.Tensor:
    """`rows` rows of 32 tokens, the first cut at 5; padded to `size` boundaries."""
    starts = [0, 5, *range(32, 32 * rows + 1, 32)]
    return torch.tensor(starts + [32 * rows] * (size - len(starts)), dtype=torch.int32)


def step(model: GPT, size: int) -> LossOutput:
    tokens = tokens_of(model, 2)
    out: LossOutput = model.train()(tokens, tokens, cu_seqlens=bounds(2, size))
    out.loss_sum.backward()
    return out


def validate(model: GPT, size: int) -> None:
    tokens = tokens_of(model, 3)
    with torch.no_grad():
        model.eval()(tokens, tokens, cu_seqlens=bounds(3, size))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("recompute", "changes", "backend"),
    [
        ("block", GEMMA_2, "eager"),
        pytest.param("full", LLAMA_4_OF_TWO_KINDS, "eager", marks=pytest.mark.slow),
        pytest.param("full", LLAMA_4, "eager", marks=pytest.mark.slow),
        pytest.param("block", GEMMA_2, "aot_eager", marks=pytest.mark.slow),
        pytest.param("op", LLAMA_4, "aot_eager", marks=pytest.mark.slow),
        pytest.param("op", SLIDING, "aot_eager", marks=pytest.mark.slow),
        pytest.param("full", LLAMA_4, "inductor", marks=pytest.mark.slow),
    ],
    ids=["gemma2", "llama4", "llama4-four-kinds", "gemma2-traced", "llama4-op", "sliding-op", "llama4-inductor"],
)
def test_every_block_of_every_kind_is_compiled(recompute: Any, changes: dict[str, Any], backend: str) -> None:
    """Sliding and full layers, experts, chunks, recomputation: all blocks run compiled, for all sizes."""
    eager, model = build(recompute, **changes), build(recompute, **changes)
    compile_blocks(model, backend=backend)
    n = changes["n_layer"]
    for size in (8, 16):
        for run in (step, validate):
            counted = CompiledBlocks({"model": [model]})
            run(model, size)
            assert counted.describe() == f"compiled: {n} of {n} blocks of the model"
        for either in (eager, model):
            either.zero_grad()
            step(either, size)
        for (name, want), got in zip(eager.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-4, msg=name)
    kinds = {block.kind() for block in model.blocks()}
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert len(kinds) <= compilations <= COMPILATIONS_PER_KIND * len(kinds)


def test_a_student_and_three_teachers_are_compiled() -> None:
    """Four models share one code object and its limit; formerly only 2 of the student's 4 blocks were compiled."""
    student, sizes = build(n_layer=4), [(2, 128), (3, 64), (1, 96)]
    teachers = [build(n_layer=n, n_embd=width).requires_grad_(False).eval() for n, width in sizes]
    for model in (student, *teachers):
        compile_blocks(model, backend="eager")
    for size in (8, 16):
        counted = CompiledBlocks({"student": [student], "teachers": teachers})
        for teacher in teachers:
            with torch.inference_mode():
                teacher(tokens_of(teacher, 2), cu_seqlens=bounds(2, size), head=TeacherHead(1.0))
        step(student, size)
        validate(student, size)
        assert counted.counts() == {"student": (4, 4), "teachers": (6, 6)}


def test_nothing_is_compiled_after_the_first_step_and_validation() -> None:
    """Steps differ in their number of documents, and in nothing else that blocks are compiled for."""
    model = build(**{"n_layer": 2})
    compile_blocks(model, backend="eager")
    step(model, 16)
    validate(model, 16)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for size in (20, 24, 40, 16, 28):
        step(model, size)
        validate(model, size)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_hitting_the_limit_is_one_warning_with_its_cause(capsys: pytest.CaptureFixture[str]) -> None:
    """A limit that is too small causes one warning, and the count shows how many blocks run eagerly."""
    model = build(n_layer=4, **{k: v for k, v in SLIDING.items() if k != "n_layer"})
    compile_blocks(model, backend="eager")
    counted = CompiledBlocks({"model": [model]})
    with torch._dynamo.config.patch(recompile_limit=1):
        step(model, 8)
        validate(model, 8)
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and printed[0].startswith("warning: torch.compile stops compiling 'forward'"), printed
    assert "recompile_limit of 1 is reached" in printed[0] and "Last reason for a recompilation: " in printed[0]
    assert counted.describe().startswith("warning: compiled: 0 of 4 blocks of the model; the others run eagerly")


def test_an_untraceable_block_is_counted_and_its_cause_named() -> None:
    """Attention dropout draws its own random numbers, which breaks a recomputed block's graph: this is reported."""
    model = build("full", n_layer=2, attention_dropout=0.1)
    compile_blocks(model, backend="eager")
    counted = CompiledBlocks({"model": [model]})
    step(model, 8)
    assert counted.counts() == {"model": (0, 2)}
    assert "torch.compiler.disable" in counted.describe()


def test_rows_within_the_window_compile_with_dropout() -> None:
    """Gemma 2 with rows shorter than its window failed on torch 2.11 with "tuple index out of range" at a graph
    break.
    """
    changes = {**GEMMA_2, "n_layer": 2, "sliding_window_size": 64}
    for dropout in (0.0, 0.1):
        model = build(**changes, attention_dropout=dropout)
        assert model.config.block_size > 64
        compile_blocks(model, backend="eager")
        assert step(model, 8).loss_sum.isfinite()


@pytest.mark.parametrize(
    ("options", "documents"),
    [
        ({"window": 5}, True),
        ({"softcap": 2.0, "scale": 0.3}, True),
        ({"softcap": 1.0, "window": 140}, False),
        pytest.param({"window": 5}, False, marks=pytest.mark.slow),
        pytest.param({"softcap": 2.0, "scale": 0.3}, False, marks=pytest.mark.slow),
        pytest.param({"softcap": 1.0, "window": 140}, True, marks=pytest.mark.slow),
    ],
)
def test_attention_compiled_equals_eager(options: dict[str, Any], documents: bool) -> None:
    """The operator called by compiled blocks has its own backward; in float64 both agree."""
    B, T, H, G, D = 2, 150, 4, 2, 8
    generator = torch.Generator().manual_seed(1)
    cu = torch.tensor([0, 7, 150, 151, 300, 300, 300], dtype=torch.int32) if documents else None
    results = []
    drawn = [torch.randn(B, T, n, D, dtype=torch.float64, generator=generator) for n in (H, G, G, H)]
    for compiled in (False, True):
        q, k, v = (x.clone().requires_grad_() for x in drawn[:3])

        def attend(q: Any, k: Any, v: Any) -> torch.Tensor:
            return attention(q, k, v, cu, "loop", AttentionVariant(**options))

        call = torch.compile(attend, backend="eager", fullgraph=True) if compiled else attend
        y = call(q, k, v)
        results.append((y.detach(), *torch.autograd.grad(y, (q, k, v), drawn[3])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_experts_compiled_equal_eager() -> None:
    """The same for experts, one of which gets no token."""
    config = get_config("debug", n_expert=4, n_expert_per_token=1)
    experts = Experts(config).double()
    x = torch.randn(20, config.n_embd, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ends = torch.tensor([3, 3, 12, 20], dtype=torch.int32)
    results = []
    for call in (experts.forward, torch.compile(experts.forward, backend="eager", fullgraph=True)):
        inputs = (x.clone().requires_grad_(), experts.gate_up, experts.down)
        y = call(inputs[0], ends)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.slow
def test_a_run_reports_how_many_blocks_are_compiled(tmp_path: Path) -> None:
    """After the first step a run prints the count; with the real compiler, as a user runs it."""
    write_dataset(tmp_path / "train", [50] * 40)
    write_dataset(tmp_path / "val", [50] * 5, seed=1)
    changes: dict[str, object] = {"train__max_steps": 2, "compile": "true", "train__activation_checkpointing": "block"}
    changes |= {"model__attention_pattern": "[sliding,full]", "model__sliding_window_size": 8, "model__n_layer": 4}
    done = train(*flags(tmp_path, tmp_path / "run", **changes), timeout=900)
    assert "compiled: 4 of 4 blocks of the model\n" in done.stdout and "warning: compiled" not in done.stdout
