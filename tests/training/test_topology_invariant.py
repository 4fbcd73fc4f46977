"""--train.topology_invariant: the same bits on any number of devices, under DDP and FSDP, also when a run moves."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICES
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_examples import examples
from running import ROLLBACK, SPIKE, flags, metrics, shared_rank_server, train, train_in_process, train_killed
from torch import nn
from whole_record import read_record

from lit_data.loading.batches import StepData
from lit_files.checkpoint_name import list_checkpoints
from lit_model.load import Checkpoint
from pretrain.args import OptimArgs
from pretrain.build import set_up
from pretrain.cli.run_parser import parse
from pretrain.exact_sums import HEADROOM_BITS, ExactSums, grid_exponent, norm_by_rows, round_to_grid, sum_by_halves
from pretrain.loop import fit, forward_and_backward
from pretrain.optim import AdamW
from pretrain.run import Run
from pretrain.schedule import learning_rate

TOPOLOGIES: dict[str, dict[str, Any]] = {
    "single": {"devices": 1},
    "ddp-1": {"devices": 1, "strategy": "ddp"},
    "full-1": {"devices": 1, "strategy": "fsdp"},
    "ddp-2": {"devices": 2, "strategy": "ddp"},
    "full-2": {"devices": 2, "strategy": "fsdp"},
    "grad-2": {"devices": 2, "strategy": "fsdp", "sharding_strategy": "SHARD_GRAD_OP"},
    "hybrid-2": {"devices": 2, "strategy": "fsdp", "sharding_strategy": "HYBRID_SHARD"},
    "ddp-3": {"devices": 3, "strategy": "ddp"},
    "full-3": {"devices": 3, "strategy": "fsdp"},
    "ddp-4": {"devices": 4, "strategy": "ddp"},
    "full-4": {"devices": 4, "strategy": "fsdp"},
    "grad-4": {"devices": 4, "strategy": "fsdp", "sharding_strategy": "SHARD_GRAD_OP"},
    "hybrid-4": {"devices": 4, "strategy": "fsdp", "sharding_strategy": "HYBRID_SHARD"},
}
OTHERS = [name for name in TOPOLOGIES if name != "single"]
ROWS = 12  # of a step, in leaves of one row: 12 micro-batches on one device, 3 on four
COMMON: dict[str, Any] = {
    "train__topology_invariant": "true",
    "train__global_batch_samples": ROWS,
    "train__micro_batch_samples": 1,
    "train__clip_norm": 0.4,
    "model__n_embd": 24,  # so that shard boundaries are inside a SIMD vector
    "model__intermediate_size": 44,
    "model__dropout": 0.1,
    "model__tie_embeddings": "true",
}
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "untied-wsd": {"model__tie_embeddings": "false", "optim__schedule": "wsd", "optim__decay_steps": 5},
    "experts": {"model__n_expert": 4, "model__n_expert_per_token": 2, "train__router_z_loss": 1e-3},
    "recomputed-best-fit": {"train__activation_checkpointing": "full", "data__packing": "best_fit"},
    "two-rows-a-leaf": {"train__micro_batch_samples": 2, "train__global_batch_samples": 24},
    "offload": {},
}


def facts(run: Path) -> dict[str, str]:
    """SHA-256 of all tensors of the last checkpoint, of the losses and norms of all steps, of the recorded losses."""
    checkpoint, state = Checkpoint(list_checkpoints(run)[-1]), hashlib.sha256()
    for name in sorted(checkpoint.names()):
        state.update(name.encode() + checkpoint.tensor(name).contiguous().numpy().tobytes())
    columns = ("step", "tokens", "train_loss", "grad_norm", "val_loss", "total_loss", "skipped")
    logged = [[row.get(column) for column in columns] for row in metrics(run)]
    record = read_record(run).select(["step", "row", "document", "start", "targets", "hash", "loss", "applied"])
    return {
        "tensors": state.hexdigest(),
        "metrics": hashlib.sha256(json.dumps(logged).encode()).hexdigest(),
        "record": hashlib.sha256(json.dumps(record.to_pydict()).encode()).hexdigest(),
    }


def test_a_run_moves_between_topologies(data: Path, tmp_path: Path) -> None:
    """Two ranks begin it, one resumes it, two with sharded state end it."""
    once, moved = tmp_path / "once", tmp_path / "moved"
    settings = COMMON | {"train__max_steps": 6, "save__every_steps": 2, "eval__every_steps": 3}
    train_in_process(flags(data, once, **settings))
    assert any(float(row["grad_norm"]) > 0.4 for row in metrics(once)[1:]), "no step is clipped"
    train_killed(3, *flags(data, moved, **settings, **TOPOLOGIES["ddp-2"]))
    train_killed(2, *flags(data, moved, **settings, resume="latest"))
    train(*flags(data, moved, **settings, **TOPOLOGIES["full-2"], resume="latest"))
    assert facts(moved) == facts(once)


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """The facts of a run on one device, by its settings."""
    known: dict[str, dict[str, str]] = {}

    def of(**settings: Any) -> dict[str, str]:
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            run = tmp_path_factory.mktemp("reference") / "run"
            train(*flags(data, run, **settings))
            known[key] = facts(run)
        return known[key]

    return of


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("topology", OTHERS)
def test_200_steps_in_every_topology(
    data: Path, tmp_path: Path, reference: Callable[..., dict[str, str]], topology: str
) -> None:
    """With a last step that lacks rows, so that leaves have no target."""
    settings = COMMON | {
        "train__max_steps": None, "train__max_epochs": (ROWS * 199 + 5) / 140, "eval__every_steps": 50,
        "save__every_steps": 100,
    }  # fmt: skip
    run = tmp_path / "run"
    train(*flags(data, run, **settings, **TOPOLOGIES[topology]), timeout=1500)
    assert facts(run) == reference(**settings)
    assert read_record(run).column("step").to_numpy().max() == 199


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("topology", ["ddp-2", "full-2", "full-3", "hybrid-4"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run(
    data: Path, tmp_path: Path, reference: Callable[..., dict[str, str]], kind: str, topology: str
) -> None:
    settings = COMMON | {"train__max_steps": 12} | KINDS[kind]
    here = TOPOLOGIES[topology]
    if kind == "offload":
        if here["strategy"] != "fsdp":
            pytest.skip("only sharded state is offloaded")
        here = here | {"train__cpu_offload": "true"}
    train(*flags(data, tmp_path / "run", **settings, **here), timeout=600)
    assert facts(tmp_path / "run") == reference(**settings)


@pytest.mark.slow
def test_distillation(data: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    train(*flags(data, teacher, model__n_embd=48))
    settings = COMMON | {"objective": "distillation", "train__max_steps": 6}
    settings["distillation.teachers"] = json.dumps([{"path": str(list_checkpoints(teacher)[-1])}])
    found = []
    for topology in ("single", "ddp-2", "full-3"):
        run = tmp_path / topology
        train(*flags(data, run, **settings, **TOPOLOGIES[topology]))
        found.append(facts(run))
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_a_step_is_skipped_on_every_rank(data: Path, tmp_path: Path) -> None:
    """Gradients that are not finite on one rank only."""
    settings = COMMON | {"train__max_steps": 6}
    found = []
    for topology in ("single", "ddp-2", "full-3"):
        run, ranks = tmp_path / topology, TOPOLOGIES[topology]["devices"]
        spoiled = {"kind": "nan", "rank": ranks - 1, "steps": [2, 4]}
        arguments = flags(data, run, **settings, **TOPOLOGIES[topology])
        answer = shared_rank_server().run(ranks, run, arguments, plants=[spoiled])
        assert not any(answer.statuses), answer.output
        assert metrics(run)[-1]["skipped"] == "2"
        found.append(facts(run))
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_a_rollback(data: Path, tmp_path: Path) -> None:
    """After a loss spike, to a checkpoint whose grid is that of its step."""
    found = []
    for topology in ("single", "ddp-2", "full-3"):
        run = tmp_path / topology
        arguments = flags(data, run, **COMMON | ROLLBACK, **TOPOLOGIES[topology])
        answer = shared_rank_server().run(TOPOLOGIES[topology]["devices"], run, arguments, plants=[SPIKE])
        assert not any(answer.statuses) and "rolling back to" in answer.output, answer.output
        found.append(facts(run))
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chain", range(10))
def test_elastic_chains(data: Path, tmp_path: Path, reference: Callable[..., dict[str, str]], chain: int) -> None:
    """Killed at random steps, and resumed in random topologies."""
    settings = COMMON | {"train__max_steps": 24, "save__every_steps": 3}
    rng, run = random.Random(chain), tmp_path / "run"
    for link in range(4):
        here = flags(data, run, **settings, **TOPOLOGIES[rng.choice(list(TOPOLOGIES))], resume="auto")
        last = link == 3
        train(*here) if last else train_killed(rng.randrange(2, 6), *here)
    assert facts(run) == reference(**settings)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_other_leaves_and_threads_are_refused(data: Path, tmp_path: Path, micro_batch: int) -> None:
    run = tmp_path / "run"
    settings = COMMON | {"train__max_steps": 2, "save__every_steps": 1}
    train_in_process(flags(data, run, **settings))
    more = settings | {"train__max_steps": 3, "resume_allow": "train.max_steps", "resume": "latest"}
    if micro_batch == 2:
        with pytest.raises(ValueError, match=r"train\.micro_batch_samples: 1 there, 2 here"):
            set_up(parse(flags(data, run, **more | {"train__micro_batch_samples": 2})))
        return
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(ValueError, match=f"set OMP_NUM_THREADS={threads}"):
            set_up(parse(flags(data, run, **more)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "flag",
    [
        "precision=fp16",
        "precision=fp8",
        "optim.name=muon",
        "train.micro_batch_samples=auto",
        "train.reduce_dtype=bf16",
        "train.defer_gradient_sync=true",
        "distillation.shard_teachers=true",
    ],
)
def test_settings_that_depend_on_the_devices_are_refused(data: Path, tmp_path: Path, flag: str) -> None:
    with pytest.raises((ValueError, SystemExit), match=f"--{flag.replace('=', ' ')} exclude each other"):
        set_up(parse([*flags(data, tmp_path, train__topology_invariant="true"), "--strategy=fsdp", f"--{flag}"]))


@pytest.mark.parametrize("peak", [1e-20, 1e20])
def test_gradients_that_do_not_fit_the_grid_are_computed_again(
    peak: float, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step then has the bits of one whose grid fitted from the start."""
    settings = COMMON | {"train__max_steps": 1, "optim__warmup_steps": 1}

    def trained(name: str, peak: float) -> tuple[Path, ExactSums]:
        run = set_up(parse(flags(data, tmp_path / name, **settings)))
        assert run.sums is not None
        run.sums.peak = peak
        try:
            fit(run)
        finally:
            run.close()
        return tmp_path / name, run.sums

    repeated, sums = trained("repeated", peak)
    assert "step 1: its gradients did not fit" in capsys.readouterr().out
    fitting, others = trained("fitting", sums.peak)
    assert "did not fit" not in capsys.readouterr().out and others.peak == sums.peak
    assert facts(repeated) == facts(fitting)


@pytest.mark.parametrize("device", DEVICES)
def test_leaves_in_another_order(data: Path, tmp_path: Path, device: str) -> None:
    """On a GPU with a model of 120M parameters, in bf16."""
    settings = COMMON | {"model__dropout": 0, "data__datapoints": "false"}
    if device == "cuda":
        settings |= {"accelerator": "cuda", "precision": "bf16", "model__n_layer": 12, "model__n_head": 12}
        settings |= {"model__n_query_groups": 12, "model__n_embd": 768, "model__intermediate_size": 3072}
    run = set_up(parse(flags(data, tmp_path / "run", **settings)))
    try:
        step, found = run.loader.read_step(0), []
        factor = torch.tensor(1 / step.n_targets, device=run.device)
        for batches in (step.micro_batches, step.micro_batches[::-1]):
            assert run.sums is not None
            run.sums.peak = 1.0
            losses = forward_and_backward(run, StepData(0, batches), factor, None, None)
            assert run.sums.finish()
            grads = [p.grad for p in run.optimizer.parameters.values()]
            found.append([losses.loss_sum, norm_by_rows(run.optimizer.parameters.values()), *grads])
        for one, other in zip(*found, strict=True):
            assert one is not None and other is not None and torch.equal(one, other)
    finally:
        run.close()


def leaf_gradients(run: Run, step: int) -> list[dict[str, torch.Tensor]]:
    """The gradients of each micro-batch of a step, divided by the step's targets, as autograd computes them."""
    data, found = run.loader.read_step(step), []
    for batch in data.micro_batches:
        out = run.raw_model(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)
        names, parameters = zip(*run.optimizer.parameters.items(), strict=True)
        gradients = torch.autograd.grad(out.loss_sum / data.n_targets, parameters)
        found.append(dict(zip(names, gradients, strict=True)))
    return found


def test_gradients_are_as_near_the_float64_sum_as_float32_sums(data: Path, tmp_path: Path) -> None:
    """Of each parameter, and of the elements far below its largest."""
    settings = COMMON | {"model__dropout": 0, "train__max_steps": 3, "train__micro_batch_samples": 1}
    run = set_up(parse(flags(data, tmp_path / "run", **settings)))
    try:
        sums = run.sums
        assert sums is not None
        for step in range(3):
            exact: dict[str, torch.Tensor] = {}
            plain: dict[str, torch.Tensor] = {}
            leaves = leaf_gradients(run, step)
            sums.begin(len(leaves))
            for leaf in leaves:
                sums.begin_leaf()
                for name, gradient in leaf.items():
                    exact[name] = exact.get(name, 0) + gradient.double()
                    plain[name] = plain.get(name, 0) + gradient
                    run.optimizer.parameters[name].backward(gradient)
            assert sums.finish()
            for name, p in run.optimizer.parameters.items():
                assert p.grad is not None
                errors = [(g.double() - exact[name]).abs() for g in (p.grad, plain[name])]
                assert errors[0].norm() <= errors[1].norm(), name
                small = exact[name].abs() < exact[name].abs().max() / 1000
                assert errors[0][small].norm() <= errors[1][small].norm() + 1e-12 * exact[name].norm(), name
    finally:
        run.close()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_300_steps_stay_as_near_a_float64_run_as_plain_ones(data: Path, tmp_path: Path) -> None:
    """A float64 run of the same steps is the reference; both float32 runs drift away from it by rounding."""
    settings = COMMON | {
        "model__dropout": 0, "train__max_steps": 300, "eval__every_steps": 300, "save__every_steps": 300,
        "optim__lr": 1e-3,
    }  # fmt: skip
    ends = {}
    for mode in ("true", "false"):
        run = tmp_path / mode
        train_in_process(flags(data, run, **settings | {"train__topology_invariant": mode}))
        ends[mode] = Checkpoint(list_checkpoints(run)[-1]).model_tensors()
    run = set_up(parse(flags(data, tmp_path / "reference", **settings | {"train__topology_invariant": "false"})))
    try:
        model = run.raw_model.double()
        optimizer = AdamW(model.named_parameters(), run.args.optim)
        for step in run.loader.steps(0, 300):
            for batch in step.micro_batches:
                out = model(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)
                (out.loss_sum / step.n_targets).backward()
            norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in optimizer.parameters.values()]))
            lr = learning_rate(run.args.optim, step.step, 300)
            optimizer.step(lr, coefficient=(run.args.train.clip_norm / (norm + 1e-6)).clamp(max=1))
            optimizer.zero_grad()
        reference = {name: p.detach() for name, p in optimizer.parameters.items()}
        distances = [
            math.sqrt(sum((end[n].double() - p).square().sum().item() for n, p in reference.items()))
            for end in ends.values()
        ]
        print(f"distance to float64: exact sums {distances[0]:.3g}, plain {distances[1]:.3g}")
        assert 0 < distances[0] < 2 * distances[1]  # each rounds its forward and backward passes in its own way
    finally:
        run.close()


# The sum.

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


@examples(100)
@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_sums_on_the_grid_have_no_order(leaves: list[list[float]], rng: random.Random) -> None:
    """Any permutation, and any tree of additions, gives the same bits; near the sum of the leaves themselves."""
    exact = torch.tensor(leaves, dtype=torch.float32)
    peak = exact.abs().max().item() or 1.0
    exponent = grid_exponent(peak / 2**HEADROOM_BITS, len(leaves))
    terms = [round_to_grid(leaf, exponent).double() for leaf in exact]
    assert all(torch.equal(t, t.float().double()) for t in terms), "a multiple of the grid needs more than float32"
    in_order = torch.stack(terms).sum(0)
    while len(terms) > 1:
        a = terms.pop(rng.randrange(len(terms)))
        b = terms.pop(rng.randrange(len(terms)))
        terms.append(a + b)
    assert torch.equal(terms[0], in_order)
    error = (in_order - exact.double().sum(0)).abs().max().item()
    assert error <= len(leaves) * 2.0**exponent


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_leaf_that_is_not_finite_makes_the_sum_so(value: float, place: int) -> None:
    parameter = nn.Parameter(torch.ones(3))
    sums = ExactSums(nn.Module(), [parameter], torch.device("cpu"))
    sums.begin(3)
    for leaf in range(3):
        sums.begin_leaf()
        (parameter * (value if leaf == place else 1e30)).sum().backward()  # 1e30 alone would be repeated
    assert sums.finish() and sums.peak == 1.0
    assert not torch.isfinite(norm_by_rows([parameter]))


def test_a_fall_of_the_gradients_is_noticed() -> None:
    """A grid that fitted 1e25 would round 1e-3 away."""
    parameter = nn.Parameter(torch.ones(3))
    sums = ExactSums(nn.Module(), [parameter], torch.device("cpu"))
    for scale in (1e-3, 1e25, 1e-3):
        for attempt in range(2):
            sums.begin(1)
            sums.begin_leaf()
            (parameter * scale).sum().backward()
            if sums.finish():
                break
            assert attempt == 0
        sums.keep_peak()
        assert parameter.grad is not None and torch.equal(parameter.grad, torch.full((3,), scale))
        assert sums.peak == pytest.approx(scale)


def test_subnormal_gradients_and_zeros() -> None:
    """Gradients below the smallest grid become 0, with the sign that every order gives."""
    parameter = nn.Parameter(torch.ones(4))
    sums = ExactSums(nn.Module(), [parameter], torch.device("cpu"))
    sums.peak = 2.0**-120
    sums.begin(2)
    for _ in range(2):
        sums.begin_leaf()
        (parameter * torch.tensor([-1e-45, -0.0, 2.0**-126, 2.0**-125])).sum().backward()
    assert sums.finish()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.0, 0.0, 2.0**-125, 2.0**-124]
    assert not torch.signbit(parameter.grad).any()


@pytest.mark.parametrize("shape", [(1,), (7,), (5, 33), (3, 4, 9), (2, 1)])
def test_norm_by_rows(shape: tuple[int, ...]) -> None:
    parameters = [nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(2, 3))]
    for i, p in enumerate(parameters):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten().double() for p in parameters]))  # type: ignore[union-attr]
    assert norm_by_rows(parameters).item() == pytest.approx(expected.item(), rel=1e-7)


def test_sums_by_halves_are_exact_for_integers() -> None:
    for m in range(1, 40):
        x = torch.randint(-1000, 1000, (3, m), generator=torch.Generator().manual_seed(m)).double()
        assert torch.equal(sum_by_halves(x.clone()), x.sum(1))


def test_updates_of_parts_equal_those_of_the_whole() -> None:
    """Wherever a vector is cut. The fused kernel by itself rounds the elements left over differently."""
    whole = {"p": nn.Parameter(torch.randn(100, generator=torch.Generator().manual_seed(0)))}
    cuts = (0, 1, 4, 20, 51, 100)
    parts = {str(a): nn.Parameter(whole["p"][a:b].detach().clone()) for a, b in itertools.pairwise(cuts)}
    optimizers = [AdamW(p.items(), OptimArgs(lr=1e-2), whole_vectors=True) for p in (whole, parts)]
    for step in range(5):
        grad = torch.randn(100, generator=torch.Generator().manual_seed(step + 1))
        whole["p"].grad = grad.clone()
        for (a, b), p in zip(itertools.pairwise(cuts), parts.values(), strict=True):
            p.grad = grad[a:b].clone()
        for optimizer in optimizers:
            optimizer.step(1e-2)
    assert torch.equal(torch.cat([p.data for p in parts.values()]), whole["p"].data)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(torch.cat([optimizers[1].state[n][key] for n in parts]), optimizers[0].state["p"][key])
