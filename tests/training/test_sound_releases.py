"""No false alarm in sound releases of many runs: families, strategies, world sizes, packings, rollbacks, resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from family_runs import train_family
from running import flags, train, train_killed, train_rolled_back, write_dataset

from lit_data.record.trace import open_run
from lit_data.record.verify import verify as verify_record
from pretrain.release.folder import FolderRelease
from pretrain.release.publish import PublishArgs, TrainingState, publish
from pretrain.release.verify import open_folder, verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LAYER_NORM = {"norm_class_name": "LayerNorm", "mlp_gated": False, "n_query_groups": 4, "activation": "gelu_tanh"}
BIAS = {"attention_bias": True, "mlp_bias": True}
SLIDING = {"attention_pattern": ["sliding"], "sliding_window_size": 16}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "llama-tied": {"tie_embeddings": True},
    "qwen3": {"qk_norm": "head"},
    "mistral": SLIDING,
    "gpt2": {**LAYER_NORM, **BIAS, "position_embedding": "learned", "tie_embeddings": True},
    "gpt_neox": {**LAYER_NORM, **BIAS, "parallel_residual": True, "rotary_size": 4},
    "padded": {"padding_multiple": 64},
    "dropout": {**LAYER_NORM, **BIAS, "position_embedding": "learned", "dropout": 0.1},
    "experts": {"n_expert": 4, "n_expert_per_token": 2},
}
DDP = {"devices": 2, "strategy": "ddp"}
FSDP = {"devices": 2, "strategy": "fsdp"}
RUNS: dict[str, dict[str, object]] = {
    "two ranks, DDP": DDP,
    "two ranks, FSDP2": FSDP,
    "two ranks, FSDP2, sharded": {**FSDP, "save__state_dict_type": "sharded"},
    "four ranks, FSDP2, sharded": {**FSDP, "devices": 4, "save__state_dict_type": "sharded"},
    "two ranks, HYBRID_SHARD": {**FSDP, "sharding_strategy": "HYBRID_SHARD"},
    "asynchronous": {"save__asynchronous": "true"},
    "asynchronous, sharded": {**FSDP, "save__asynchronous": "true", "save__state_dict_type": "sharded"},
    "best_fit": {"data__packing": "best_fit"},
    "pad": {"data__packing": "pad"},
    "no document mask": {"data__document_mask": "false"},
    "Muon": {"optim__name": "muon"},
    "bf16": {"precision": "bf16"},
    "wsd": {"optim__schedule": "wsd", "optim__decay_steps": 4},
    "epochs": {"train__max_steps": None, "train__max_epochs": 1},
    "last step at a learning rate of 0": {"save__every_steps": 11},
    "few log rows": {"log__every_steps": 5, "save__every_steps": 3},
    "layers": {"log__layers": "true"},
}


def check(run: Path, state: TrainingState = "all", record: str = "run") -> None:
    """A run, published, has no fault; nor has its record, read against the data."""
    release = run.with_name(f"{run.name}-{state}")
    publish(run, FolderRelease(release), PublishArgs(training_state=state))
    assert [str(fault) for fault in verify(open_folder(release)).faults] == []
    for revision in release.iterdir():
        assert verify_record(open_run(revision / record)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, data: Path, tmp_path: Path) -> None:
    model = {f"model.{key}": json.dumps(value).strip('"') for key, value in FAMILIES[family].items()}
    train(*flags(data, tmp_path / "run", **{key.replace(".", "__"): value for key, value in model.items()}))
    check(tmp_path / "run")


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_families_with_a_tokenizer(family: str, tmp_path: Path) -> None:
    check(
        train_family(family, tmp_path / "run", "--train.max_steps=40", "--save.every_steps=20", "--eval.every_steps=20")
    )


@pytest.mark.parametrize("name", RUNS)
def test_settings(name: str, data: Path, tmp_path: Path) -> None:
    train(*flags(data, tmp_path / "run", **RUNS[name]))
    check(tmp_path / "run", "none" if "sharded" in name else "all")


def test_a_mixture_with_phases(tmp_path: Path) -> None:
    write_dataset(tmp_path / "web", [13, 40, 7, 90, 21] * 30, seed=1)
    write_dataset(tmp_path / "books", [200, 33, 5] * 20, seed=2)
    mixture = f"[{{path: {tmp_path}/web, weight: 0.75}}, {{path: {tmp_path}/books, weight: 0.25}}]"
    phases = "[{from_step: 6, weights: [0.25, 0.75]}]"
    settings = {"data__train": None, "data__val": None, "data__mixture": mixture, "data__phases": phases}
    train(*flags(tmp_path, tmp_path / "run", **settings, train__max_steps=10))
    check(tmp_path / "run", "last")


def test_word_budgets(tmp_path: Path) -> None:
    write_dataset(tmp_path / "train", [30] * 200, words=[20] * 200)
    settings = {"data__val": None, "save__every_steps": 100, "save__at_words": "100,0.2K,1500 1510"}
    train(*flags(tmp_path, tmp_path / "run", **settings, train__max_steps=14))
    check(tmp_path / "run")


def test_a_rollback(data: Path, tmp_path: Path) -> None:
    train_rolled_back(data, tmp_path / "run")
    check(tmp_path / "run")


def test_killed_and_resumed_by_another_number_of_ranks_with_another_batch(data: Path, tmp_path: Path) -> None:
    """Published between the starts, and completed after the last one."""
    run = tmp_path / "run"
    train_killed(7, *flags(data, run))
    check(run)
    train(*flags(data, run, resume="latest", train__max_steps=8, resume_allow="train.max_steps", **FSDP))
    changed = {"train__global_batch_samples": 16, "resume_allow": "train.global_batch_samples,train.max_steps"}
    train(*flags(data, run, resume="latest", train__max_steps=14, **DDP, **changed))
    check(run)


def test_unfinished_row_at_a_checkpoint(data: Path, tmp_path: Path) -> None:
    """Evaluation and checkpoint at the same steps, and a random number of tokens a document."""
    lengths = np.random.default_rng(3).integers(1, 500, size=60).tolist()
    write_dataset(tmp_path / "train", lengths)
    write_dataset(tmp_path / "val", lengths[:5])
    train(*flags(tmp_path, tmp_path / "run", eval__every_steps=2, save__every_steps=2))
    check(tmp_path / "run")
