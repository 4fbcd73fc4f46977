"""A user's mistakes: a message that names the problem and the remedy, exit status 2, no files left behind."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from pathlib import Path

import pytest
from running import flags, script_error, train, write_dataset

from pretrain.cli.run_parser import parse

CASES: dict[str, tuple[dict[str, object], str]] = {
    "missing data": ({"data__train": "nowhere"}, "nowhere is not a packed dataset"),
    "no length": ({"train__max_steps": None}, "exactly one of --train.max_steps"),
    "two lengths": ({"train__max_tokens": 5000}, "exactly one of --train.max_steps"),
    "batch arithmetic": ({"train__global_batch_samples": 9}, "the nearest are 8 or 10"),
    "unknown model": ({"model__name": "LLaMmlein_120", "model__n_layer": None}, "LLaMmlein_120M"),
    "incomplete model": ({"model__n_layer": None}, "--model.n_layer"),
    "vocabulary": ({"model__vocab_size": 50}, "vocabulary of 50"),
    "row longer than the corpus": ({"train__block_size": 100000}, "less than one row of 100000"),
    "fp16 on a CPU": ({"precision": "fp16"}, "fp16 is not supported on a CPU"),
    "no checkpoint": ({"resume": "latest"}, "holds no checkpoint"),
    "heads": ({"model__n_query_groups": 3}, "n_query_groups 3 does not divide"),
    "warm-up": ({"optim__warmup_steps": 500}, "exceeds the run's 12 steps"),
    "cuda": ({"accelerator": "cuda"}, "no CUDA device"),
    "missing weights": ({"init_from": "nowhere"}, "no model at nowhere"),
}


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(*flags(data, run, train__max_steps=4))
    return run


@pytest.mark.parametrize("case", CASES)
def test_mistake_is_named(data: Path, tmp_path: Path, case: str) -> None:
    changes, message = CASES[case]
    done = train(*flags(data, tmp_path / "run", **changes), check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert left == [], "a refused run left files behind"


@pytest.mark.parametrize(
    "typed", ["configs/llamlein_1B.yaml", "llammlein_1B", "Llammlein_1b.yaml", "confgs/llammlein_1B.yaml"]
)
def test_a_config_with_a_similar_name(typed: str) -> None:
    """The trainer, the plan and the quickstart name the file that was meant."""
    meant = r"there is no such file; did you mean (\S* or )*(\S*/)?configs/llammlein_1B.yaml"
    with pytest.raises(ValueError, match=meant):
        parse(["--config", typed])
    assert re.search(meant, script_error("plan_run.py", "--gpu", "cpu", "--config", typed))
    assert re.search(meant, script_error("quickstart.py", "--input", "x", "--output", "y", "--config", typed))


def test_unknown_key_in_config(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("train:\n  max_steps: 3\n  micro_batch: 4\n")
    done = train("--config", str(config), check=False)
    assert done.returncode == 2 and "micro_batch" in done.stderr and "Traceback" not in done.stderr


def test_run_folder_in_use_is_refused_without_resume(data: Path, finished: Path) -> None:
    done = train(*flags(data, finished), check=False)
    assert done.returncode == 2 and "holds a run already" in done.stderr and "--resume latest" in done.stderr


def test_truncated_shard_is_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    shard = sorted((tmp_path / "data" / "train").glob("*.bin"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    done = train(*flags(tmp_path / "data", tmp_path / "run"), check=False)
    assert done.returncode == 2 and shard.name in done.stderr and "truncated" in done.stderr
    assert not (tmp_path / "run").exists()


def test_validation_of_another_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "val", [30, 40])
    manifest = tmp_path / "val" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["tokenizer"]["fingerprint"] = "another"
    manifest.write_text(json.dumps(content))
    done = train(*flags(data, tmp_path / "run", data__val=tmp_path / "val"), check=False)
    assert done.returncode == 2 and "another tokenizer" in done.stderr


def test_checkpoint_of_another_model_is_refused(data: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    done = train(*flags(data, tmp_path / "run", resume="latest", train__max_steps=4, model__n_embd=64), check=False)
    assert done.returncode == 2 and "model.n_embd" in done.stderr
    (tmp_path / "run" / "iter-00000004-ckpt.pth").write_bytes(b"not a checkpoint")
    done = train(*flags(data, tmp_path / "run", resume="latest", train__max_steps=4), check=False)
    assert done.returncode == 2 and "damaged" in done.stderr


def test_run_folder_of_another_job_is_refused(data: Path, finished: Path) -> None:
    with open(finished / ".lock", "a+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        done = train(*flags(data, finished, train__max_steps=4, resume="latest"), check=False)
    assert done.returncode == 2 and "in use by another job" in done.stderr
