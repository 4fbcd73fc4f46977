"""Runs on several datasets, with phases, other packings, block shuffle and a cache, through the command line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from running import flags, metrics, train, write_dataset

from lit_data.record.reader import read_steps
from lit_data.record.trace import open_run
from lit_data.record.verify import verify
from lit_model.load import load_tensors
from pretrain import fabric_train


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "web", [13, 40, 7, 90, 21] * 30, seed=1)
    write_dataset(folder / "books", [200, 33, 5] * 20, seed=2)
    write_dataset(folder / "val", [30] * 6, seed=3)
    return folder


def mixed(data: Path, out: Path, **changes: object) -> list[str]:
    mixture = f"[{{path: {data}/web, weight: 0.75}}, {{path: {data}/books, weight: 0.25}}]"
    settings = {"data__train": None, "data__mixture": mixture, "data__val": None, **changes}
    return flags(data, out, **settings)


PHASES = "[{from_step: 6, weights: [0.25, 0.75]}]"


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concat", "best_fit", "pad"])
def test_a_mixture_with_a_phase_is_recorded_exactly_and_resumes(data, tmp_path, packing):
    """With a cache and block shuffle; then without the cache, stopped and resumed."""
    common = {
        "data__phases": PHASES, "data__packing": packing, "data__shuffle_block_rows": 8,
        "data__shuffle_group_blocks": 4, "data__plan_dir": tmp_path / "plans", "train__global_batch_samples": 128,
        "train__micro_batch_samples": 64,
    }  # fmt: skip
    cache = {"data__cache_dir": tmp_path / "cache", "data__cache_gb": 0.2}
    train(*mixed(data, tmp_path / "run", train__max_steps=12, **common, **cache))
    run = open_run(tmp_path / "run")
    assert verify(run) == []

    # The rows of each dataset in a step follow the weights, before and after the phase starts.
    rows = read_steps(run.folder, set(range(12)))
    columns = [rows[name].to_pylist() for name in ("step", "row", "dataset")]
    seen = Counter((step >= 6, dataset) for step, _, dataset in set(zip(*columns, strict=True)))
    assert seen[False, 0] + seen[False, 1] == 6 * 128 and 0.7 < seen[False, 0] / (6 * 128) < 0.8
    assert 0.2 < seen[True, 0] / (6 * 128) < 0.3
    last = metrics(tmp_path / "run")[-1]
    assert float(last["epoch_0"]) > 0 and float(last["epoch_1"]) > float(last["epoch_0"])

    # Back to step 4 and resumed from there: the same weights at the end.
    train(*mixed(data, tmp_path / "again", train__max_steps=12, **common), "--save.every_steps=4")
    for step in (8, 12):
        (tmp_path / "again" / f"iter-{step:08d}-ckpt.pth").unlink()
    resume = mixed(data, tmp_path / "again", train__max_steps=12, **common)
    train(*resume, "--resume=latest")
    a, b = (load_tensors(tmp_path / name / "iter-00000012-ckpt.pth")[1] for name in ("run", "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert verify(open_run(tmp_path / "again")) == []


def test_weights_of_past_steps_cannot_change(data, tmp_path):
    train(*mixed(data, tmp_path / "run", train__max_steps=4, optim__schedule="constant"))
    longer = {"train__max_steps": 8, "optim__schedule": "constant"}
    more = ["--resume=latest", "--resume_allow=[train.max_steps,data.phases,data.mixture]"]
    late, early = (f"[{{from_step: {step}, weights: [0.5, 0.5]}}]" for step in (4, 2))
    refused = train(*mixed(data, tmp_path / "run", **longer, data__phases=early), *more, check=False)
    assert refused.returncode == 2 and "give other weights than the 4 steps that are done had" in refused.stderr
    refused = train(*mixed(data, tmp_path / "run", **longer, data__phases=late), "--resume=latest", check=False)
    assert refused.returncode == 2 and "data.phases" in refused.stderr
    train(*mixed(data, tmp_path / "run", **longer, data__phases=late), *more)
    assert verify(open_run(tmp_path / "run")) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train": "{data}/web"}, "give one of --data.train"),
        ({"train__max_steps": None, "train__max_epochs": 1}, "--train.max_epochs 1"),
        ({"data__phases": "[{from_step: 3, weights: [1]}]"}, "has 1 weights, --data.mixture has 2 datasets"),
        ({"data__phases": "[{from_step: 3, weights: [1, -1]}]"}, "--data.phases from step 3: weights"),
        ({"data__cache_dir": "{data}/web/manifest.json"}, "--data.cache_dir"),
        ({"data__packing": "best_fit", "data__plan_dir": "{data}/web/manifest.json"}, "--data.plan_dir"),
    ],
    ids=["both", "epochs", "too few", "negative", "cache", "plans"],
)
def test_mistakes_are_named(data, tmp_path, capsys, changes, message):
    given = {k: v.format(data=data) if isinstance(v, str) and "{data}" in v else v for k, v in changes.items()}
    assert fabric_train.main(mixed(data, tmp_path / "run", **given)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_the_mock_loader_trains_and_records_nothing(data, tmp_path):
    done = train(*flags(data, tmp_path / "run", data__train=data / "web", data__mock="true"))
    assert not (tmp_path / "run" / "datapoints" / "order.json").exists()
    losses = [float(r["train_loss"]) for r in metrics(tmp_path / "run") if r.get("train_loss")]
    assert losses[-1] < losses[0] and done.returncode == 0


def test_fewer_rows_than_a_step_are_reported_and_recorded(tmp_path):
    """Rows then occur several times in one step, in the order of the epochs."""
    data = tmp_path / "data"
    write_dataset(data / "train", [30, 50, 9], seed=1)
    changes = {"data__val": None, "train__block_size": 32, "train__max_steps": 3}
    done = train(*flags(data, tmp_path / "run", **changes))
    assert "warning: the data has 3 rows of 32 tokens, fewer than the 8 of a step" in done.stdout + done.stderr
    run = open_run(tmp_path / "run")
    assert verify(run) == []
    assert set(Counter(read_steps(run.folder, {0})["row"].to_pylist())) == set(range(8))
