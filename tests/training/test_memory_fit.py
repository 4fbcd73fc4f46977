"""`auto` settings: what fits is chosen, agreed over ranks, kept on resume, and equal to giving the same values."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from running import flags, same_checkpoints, train, train_in_process

from lit_model.config import ModelConfig
from lit_model.cost import training_memory
from pretrain.args import RunArgs
from pretrain.build import set_up
from pretrain.cli.run_parser import parse
from pretrain.fabric_train import main
from pretrain.init_from import model_config
from pretrain.memory_fit import Candidate, candidates, fit_to_memory, largest_fitting, training_setting
from pretrain.memory_trial import peak_of_steps

AUTO = {"train__micro_batch_samples": "auto"}
RECOMPUTE = {"train__activation_checkpointing": "auto"}
SHORT = {"train__max_steps": 4, "save__every_steps": 2, "model__n_layer": 4}


def train_section(run: Path) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((run / "config.yaml").read_text())["train"]
    return found


def bytes_of(args: RunArgs, rows: int, blocks: int, world_size: int = 1) -> int:
    config = model_config(args, 96)
    fixed = Candidate(rows, blocks).apply(args)
    return training_memory(config, training_setting(fixed, config, "cpu", world_size)).total


def limit(data: Path, rows: int, blocks: int, world_size: int = 1, **changes: object) -> dict[str, object]:
    """A memory limit that just admits these settings."""
    args = parse(flags(data, Path("r"), **changes))
    return {"train__memory_limit_gib": (bytes_of(args, rows, blocks, world_size) + 1) / 2**30}


def test_the_largest_that_fits_is_found_by_few_trials() -> None:
    """Against the true answer, with estimates that are wrong by an offset and by a factor, and with running out."""
    draw = random.Random(0)
    for _ in range(500):
        n = draw.randint(1, 30)
        truth = sorted(draw.sample(range(1000), n))
        factor, offset = draw.choice([(1.0, 0), (1.0, 150), (0.7, 0), (1.3, -20)])
        estimates = [int(factor * t + offset) for t in truth]
        limit, room = draw.randint(0, 1000), draw.randint(0, 300)
        tried: list[int] = []

        def measure(i: int, tried: list[int] = tried, truth: list[int] = truth, most: int = limit + room) -> int | None:
            tried.append(i)
            return truth[i] if truth[i] <= most else None

        found, peak = largest_fitting(estimates, limit, measure)
        fitting = [i for i in range(n) if truth[i] <= limit]
        assert len(tried) == len(set(tried)) and (found is None) == (not fitting)
        if found is not None:
            assert peak == truth[found] <= limit
            if factor == 1.0:
                assert found == fitting[-1]
                assert len(tried) <= 3 + n.bit_length()
        assert largest_fitting(truth, limit, None)[0] == (fitting[-1] if fitting else None)


def test_candidates_need_more_and_more_memory(data: Path) -> None:
    args = parse(flags(data, Path("r"), **SHORT, **AUTO, **RECOMPUTE, train__global_batch_samples=12))
    config: ModelConfig = model_config(args, 96)
    found = candidates(args, config.n_layer, 32, 2, "cpu")
    assert [(c.rows, c.blocks) for c in found] == [(1, 3), (1, 2), (1, 1), (1, 0), (2, 0), (3, 0), (6, 0)]
    needs = [bytes_of(args, c.rows, c.blocks or 0, 2) for c in found]
    assert needs == sorted(needs) and len(set(needs)) == len(needs)
    long_rows = parse(flags(data, Path("r"), **AUTO, train__global_batch_samples=12, train__block_size=4000))
    assert [c.rows for c in candidates(long_rows, 2, 4000, 1, "cpu")] == [1, 2]
    assert [c.rows for c in candidates(long_rows, 2, 4000, 1, "cuda")] == [1, 2, 3, 4, 6, 12]


def test_ranks_agree_and_running_out_of_memory_is_no_end(data: Path) -> None:
    """As on CUDA, where steps are measured: another rank is out of memory at 8 rows and 4 need too much there."""
    args = parse(flags(data, Path("r"), **AUTO, train__global_batch_samples=16, train__memory_limit_gib=1.0))
    tried: list[int] = []

    def trial(tried_args: RunArgs) -> int:
        tried.append(tried_args.train.micro_batch)
        if tried[-1] == 8:
            raise torch.OutOfMemoryError
        return tried[-1] << 20

    def gather(value: object) -> list[object]:
        return [value, (1 << 31) if value == 4 << 20 else value]

    class Device:  # a CUDA device without one
        type = "cuda"

    config = model_config(args, 96)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.memory_fit.release_memory", lambda device: None)
        found, line = fit_to_memory(args, config, 32, Device(), gather, trial=trial)  # type: ignore[arg-type]
        assert found.train.micro_batch == 2 and tried[0] == 8 and set(tried) == {8, 4, 2}
        assert line == "micro-batch of 2 rows: 2.00 MiB of 1.00 GiB measured"
        short_of_memory = lambda v: [v, None if isinstance(v, int) and v < 1 << 25 else v]  # noqa: E731
        with pytest.raises(ValueError, match="not even a micro-batch of 1 row fits"):
            fit_to_memory(args, config, 32, Device(), short_of_memory, trial=trial)  # type: ignore[arg-type]


def test_automatic_settings_equal_given_ones_and_are_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    automatic = {**SHORT, **AUTO, **limit(data, 2, 0, **SHORT)}
    train_in_process(flags(data, tmp_path / "auto", **automatic))
    assert re.search(
        r"memory   micro-batch of 2 rows: [1-9][\d.]* MiB of [1-9][\d.]* MiB estimated", capsys.readouterr().out
    )
    assert train_section(tmp_path / "auto")["micro_batch_samples"] == 2
    train_in_process(flags(data, tmp_path / "given", **SHORT, train__micro_batch_samples=2))
    same_checkpoints(tmp_path / "auto" / "iter-00000004-ckpt.pth", tmp_path / "given" / "iter-00000004-ckpt.pth")
    train_in_process(
        flags(data, tmp_path / "auto", **automatic | {"train__memory_limit_gib": 1}, resume="iter-00000002-ckpt.pth")
    )
    assert train_section(tmp_path / "auto")["micro_batch_samples"] == 2
    same_checkpoints(tmp_path / "auto" / "iter-00000004-ckpt.pth", tmp_path / "given" / "iter-00000004-ckpt.pth")
    assert not list((tmp_path / "auto").glob(".memory*"))


@pytest.mark.slow
def test_two_sharding_ranks_choose_for_their_shards(data: Path, tmp_path: Path) -> None:
    of = {**SHORT, "devices": 2, "strategy": "fsdp"}
    train(*flags(data, tmp_path / "auto", **of, **AUTO, **limit(data, 2, 0, 2, **of)))
    train(*flags(data, tmp_path / "given", **of, train__micro_batch_samples=2))
    same_checkpoints(tmp_path / "auto" / "iter-00000004-ckpt.pth", tmp_path / "given" / "iter-00000004-ckpt.pth")


def test_as_few_blocks_as_fit_are_recomputed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    most = limit(data, 2, 3, **SHORT)
    train_in_process(flags(data, tmp_path / "auto", **SHORT, **RECOMPUTE, **most))
    found = train_section(tmp_path / "auto")
    assert (found["activation_checkpointing"], found["activation_checkpointing_blocks"]) == ("block", 3)
    train_in_process(flags(data, tmp_path / "plain", **SHORT))
    same_checkpoints(tmp_path / "auto" / "iter-00000004-ckpt.pth", tmp_path / "plain" / "iter-00000004-ckpt.pth")
    capsys.readouterr()
    main([*flags(data, tmp_path / "pre", **SHORT, **RECOMPUTE, **most), "--preflight"])
    assert "micro-batch of 2 rows, 3 blocks recomputed (auto), estimate" in " ".join(capsys.readouterr().out.split())
    for changes in (RECOMPUTE, {**RECOMPUTE, **AUTO}):
        with pytest.raises(ValueError, match="3 blocks recomputed fits: "):
            set_up(parse(flags(data, tmp_path / "no", **SHORT, **changes, train__memory_limit_gib=1e-4)))


def test_a_limit_without_automatic_settings_is_noted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parse(flags(data, Path("r"), **SHORT, train__memory_limit_gib=2))
    assert "note: --train.memory_limit_gib 2 has no effect without --train.micro_batch_samples auto" in (
        capsys.readouterr().err
    )
    parse(flags(data, Path("r"), **SHORT, **AUTO, train__memory_limit_gib=2))
    assert "memory_limit_gib" not in capsys.readouterr().err


def test_a_trial_takes_steps_of_the_real_run(data: Path, tmp_path: Path) -> None:
    args = parse(flags(data, tmp_path / "trial", **SHORT, train__activation_checkpointing="full"))
    assert peak_of_steps(args) > 1 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_is_measured(data: Path, tmp_path: Path) -> None:
    """Within a limit of 0.25 GiB: a micro-batch smaller than the batch, by measuring."""
    big = {"model__n_embd": 256, "train__global_batch_samples": 256, "train__max_steps": 3, "optim__warmup_steps": 1}
    of = flags(
        data, tmp_path / "run", **big, **AUTO, accelerator="cuda", precision="bf16", train__memory_limit_gib=0.25
    )
    done = train(*of)
    assert "GiB measured" in done.stdout
    rows = train_section(tmp_path / "run")["micro_batch_samples"]
    assert isinstance(rows, int) and 1 <= rows < 256
