"""Training continues from a legacy checkpoint as from one of ours: weights, moments, update count, schedule."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from legacy_files import NAMINGS, litgpt_fields, optimizer_to_legacy, save_legacy, to_legacy
from running import MODEL, flags, metrics, train

from lit_model.config import ModelConfig
from lit_model.load import Checkpoint
from lit_model.model import parameter_shapes
from pretrain import fabric_train
from pretrain.args import OptimArgs
from pretrain.convert.legacy import import_legacy
from pretrain.schedule import learning_rate

# The same rows in each step, so that a run started halfway sees the same data as one from the beginning.
NO_SIZES: dict[str, object] = dict.fromkeys(MODEL)
SETTINGS: dict[str, object] = {"data__mock": True, "optim__lr_min": 1e-3, "eval__every_steps": 12, "data__val": None}
FIRST, LAST = "iter-00000008-ckpt.pth", "iter-00000012-ckpt.pth"


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps, saved after 4, 8 and 12; undisturbed."""
    folder = tmp_path_factory.mktemp("legacy") / "run"
    train(*flags(data, folder, **SETTINGS))
    return folder


def legacy_of(checkpoint: Checkpoint, folder: Path, naming: str, **changes: Any) -> Path:
    """One of our checkpoints in the old trainers' format, with a config next to it."""
    config, moments = checkpoint.model_config, moments_of(checkpoint)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(litgpt_fields(config)))
    step = int(checkpoint.tensor("optimizer.all/step_count").item())
    optimizer = optimizer_to_legacy(moments, step, config, naming, **changes)
    hparams = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_steps": 2, "max_step": 12, "global_batch_size": 8}
    path = folder / "iter-000032-ckpt.pth"
    state = to_legacy(checkpoint.model_tensors(), config, naming)
    save_legacy(path, state, optimizer=optimizer, step=step, hparams=hparams)
    return path


def moments_of(checkpoint: Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {key: checkpoint.tensor(f"optimizer.{name}/{key}") for key in ("exp_avg", "exp_avg_sq")}
        for name in checkpoint.model_tensors()
    }


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("by_name", [False, True], ids=["numbered", "named"])
def test_state_survives_a_round_trip(run: Path, tmp_path: Path, naming: str, by_name: bool) -> None:
    original = Checkpoint(run / FIRST)
    import_legacy(legacy_of(original, tmp_path, naming, by_name=by_name), tmp_path / "ours.pth")
    imported = Checkpoint(tmp_path / "ours.pth")
    assert set(imported.names()) == set(original.names()) and imported.meta["step"] == 8
    for name in original.names():
        assert torch.equal(imported.tensor(name), original.tensor(name)), name


def test_training_goes_on(run: Path, data: Path, tmp_path: Path) -> None:
    """The command printed by the import gives the parameters, moments and rates of the uninterrupted run."""
    source = legacy_of(Checkpoint(run / FIRST), tmp_path, "tinyllama")
    imported = import_legacy(source, tmp_path / "ours.pth")
    assert imported.settings["train.max_steps"] == 4 and imported.optimizer
    printed_settings = {f.replace(".", "__"): v for f, v in imported.settings.items()}
    more = {"init_from": tmp_path / "ours.pth", "init_optimizer": "true", "optim__steps_before": imported.step}
    train(*flags(data, tmp_path / "on", **{**SETTINGS, **printed_settings, **more, **NO_SIZES}))
    there, here = Checkpoint(run / LAST), Checkpoint(tmp_path / "on" / "iter-00000004-ckpt.pth")
    assert set(there.names()) == set(here.names())
    for name in there.names():
        assert torch.equal(there.tensor(name), here.tensor(name)), name
    whole = {int(row["step"]): row for row in metrics(run)}
    for row in metrics(tmp_path / "on"):
        if int(row["step"]) == 0:
            continue
        before = whole[int(row["step"]) + imported.step]
        assert all(row[column] == before[column] for column in ("lr", "train_loss", "grad_norm"))
    assert here.meta["step"] == 4


def small(**changes: Any) -> tuple[ModelConfig, dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """A config, with random weights and moments under our names."""
    sizes = {"n_embd": 32, "intermediate_size": 48, "block_size": 16, "vocab_size": 100, "padded_vocab_size": 128}
    config = ModelConfig("small", 2, 4, 2, **{**sizes, **changes})
    generator = torch.Generator().manual_seed(2)
    weights = {n: torch.randn(shape, generator=generator) for n, shape in parameter_shapes(config).items()}
    moments = {
        n: {key: torch.randn(w.shape, generator=generator).square() for key in ("exp_avg", "exp_avg_sq")}
        for n, w in weights.items()
    }
    return config, weights, moments


@pytest.mark.parametrize("by_name", [False, True], ids=["numbered", "named"])
def test_tied_matrix_has_the_state_of_the_head(tmp_path: Path, by_name: bool) -> None:
    """litgpt creates the head first, so the shared matrix has its state under the head's name or number."""
    config, weights, moments = small(tie_embeddings=True)
    head, embedding = "lm_head.weight", "transformer.wte.weight"
    state = {head: weights[embedding], **to_legacy(weights, config, "litgpt")}
    optimizer = optimizer_to_legacy(moments, 3, config, "litgpt", by_name=by_name)
    if by_name:
        optimizer["state"] = {n.replace(embedding, head): entry for n, entry in optimizer["state"].items()}
    save_legacy(tmp_path / "lit_model.pth", state, optimizer=optimizer, step=3)
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(litgpt_fields(config)))
    assert import_legacy(tmp_path, tmp_path / "ours.pth").config == config
    imported = Checkpoint(tmp_path / "ours.pth")
    assert {n for n in imported.names() if n.startswith("optimizer.")} == {
        "optimizer.all/step_count",
        *(f"optimizer.{name}/{key}" for name, entry in moments.items() for key in entry),
    }
    for name, entry in moments.items():
        assert torch.equal(imported.tensor(f"model.{name}"), weights[name])
        assert all(torch.equal(imported.tensor(f"optimizer.{name}/{key}"), t) for key, t in entry.items())


def test_padding_gets_no_moments(tmp_path: Path) -> None:
    """100 rows there, 128 here: the added rows are zero, in weights and moments."""
    config, weights, moments = small()
    rows = ("lm_head.weight", "transformer.wte.weight")
    cut = {n: w[:100].clone() if n in rows else w for n, w in weights.items()}
    cut_moments = {
        n: {key: t[:100].clone() if n in rows else t for key, t in entry.items()} for n, entry in moments.items()
    }
    optimizer = optimizer_to_legacy(cut_moments, 3, config, "tinyllama")
    save_legacy(tmp_path / "a.pth", to_legacy(cut, config, "tinyllama"), optimizer=optimizer, step=3)
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(litgpt_fields(config)))
    assert import_legacy(tmp_path / "a.pth", tmp_path / "ours.pth").config == config
    imported = Checkpoint(tmp_path / "ours.pth")
    for name in rows:
        for key in (f"model.{name}", f"optimizer.{name}/exp_avg", f"optimizer.{name}/exp_avg_sq"):
            assert imported.tensor(key).shape == (128, 32) and not imported.tensor(key)[100:].any()
        assert torch.equal(imported.tensor(f"optimizer.{name}/exp_avg")[:100], moments[name]["exp_avg"][:100])


def test_optimizers_that_do_not_fit(tmp_path: Path) -> None:
    config, weights, moments = small()
    state = to_legacy(weights, config, "tinyllama")
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(litgpt_fields(config)))

    def fresh(by_name: bool = False) -> dict[str, Any]:
        return optimizer_to_legacy(moments, 3, config, "tinyllama", by_name=by_name)

    def two_groups(o: dict[str, Any]) -> None:
        numbers = o["param_groups"][0]["params"]
        o["param_groups"] = [{"params": numbers[:4]}, {"params": numbers[4:]}]

    def swapped(o: dict[str, Any]) -> None:
        o["state"][0], o["state"][2] = o["state"][2], o["state"][0]

    def one_less(o: dict[str, Any]) -> None:
        o["param_groups"][0]["params"].pop()

    faults: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (two_groups, "2 groups of numbered parameters"),
        (swapped, "has shape"),
        (one_less, "numbers 16 parameters, the model has 17"),
        (lambda o: o["state"].pop(5), "no state of transformer.h.0.norm_2.weight"),
        (lambda o: o["state"].clear(), "has made no step"),
        (lambda o: o["state"][3].update(max_exp_avg_sq=torch.ones(1)), "max_exp_avg_sq of transformer.h.0.attn.qkv"),
        (lambda o: o["state"][3].update(step=torch.tensor(4.0)), "[3.0, 4.0] times"),
        (lambda o: o["state"].update({0: {"momentum_buffer": torch.ones(1)}}), "momentum_buffer of lm_head.weight"),
        (lambda o: o["param_groups"][0].update(amsgrad=True), "amsgrad"),
        (lambda o: o["param_groups"][0].update(decoupled_weight_decay=False), "is Adam"),
        (lambda o: o.pop("state"), "no state and param_groups"),
    ]
    for number, (spoil, message) in enumerate(faults):
        optimizer = fresh()
        spoil(optimizer)
        save_legacy(path := tmp_path / f"{number}.pth", state, optimizer=optimizer, step=3)
        with pytest.raises(ValueError, match=re.escape(message)):
            import_legacy(path, tmp_path / "ours.pth")
        assert import_legacy(path, tmp_path / f"{number}-ours.pth", weights_only=True).optimizer is False
    reordered = dict(reversed(state.items()))
    save_legacy(tmp_path / "reordered.pth", reordered, optimizer=fresh(), step=3)
    with pytest.raises(ValueError, match="in another order than its trainers'"):
        import_legacy(tmp_path / "reordered.pth", tmp_path / "ours.pth")
    save_legacy(tmp_path / "named.pth", reordered, optimizer=fresh(by_name=True), step=3)
    import_legacy(tmp_path / "named.pth", tmp_path / "ours.pth")  # named state needs no order


def test_errors_when_continuing(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported = tmp_path / "imported" / FIRST
    import_legacy(legacy_of(Checkpoint(run / FIRST), tmp_path, "lit-gpt"), imported, weights_only=True)
    cases: list[tuple[dict[str, object], str]] = [
        (
            {"init_from": imported, "init_optimizer": "true", **NO_SIZES},
            "holds no optimizer.transformer.wte.weight/exp_avg",
        ),
        ({"init_optimizer": "true"}, "needs --init_from"),
        ({"resume": imported}, f"start a new run from its weights with --init_from {imported}"),
        ({"optim__steps_before": -1}, "--optim.steps_before -1"),
    ]
    for changes, message in cases:
        assert fabric_train.main(flags(data, tmp_path / "run", **{**SETTINGS, **changes})) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error


def test_the_schedule_continues() -> None:
    for schedule in ("cosine", "linear", "constant"):
        whole = OptimArgs(lr=1.0, lr_min=0.1, warmup_steps=10, schedule=schedule)  # type: ignore[arg-type]
        for before in (4, 50):
            rest = dataclasses.replace(whole, steps_before=before)
            rates = [learning_rate(rest, step, 100 - before) for step in range(100 - before)]
            assert rates == [learning_rate(whole, step, 100) for step in range(before, 100)]
