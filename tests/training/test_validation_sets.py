"""Several named validation sets: each as if it were the only one, beside the loss of all of them together."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from running import ROOT, flags, metrics, same_checkpoints, shared_rank_server, train, write_dataset

from lit_data.packed.reader import PackedDataset
from lit_model.load import Checkpoint
from pretrain.args import DataArgs, plain
from pretrain.cli.run_parser import parse
from pretrain.data import val_sets
from pretrain.logs.metrics import columns_of, header_line
from pretrain.logs.progress import describe_losses

MEASURES = ("val_loss", "val_perplexity", "val_bits_per_byte")


@pytest.fixture(scope="module")
def sets(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two sets of different size; the first is less than a step of two ranks."""
    drama = write_dataset(tmp_path_factory.mktemp("sets") / "drama", [40, 25], seed=5)
    return {"drama-2.a": drama, "law": data / "val"}


def short(data: Path, run: Path, val: object, **changes: object) -> list[str]:
    given = json.dumps({k: str(v) for k, v in val.items()}) if isinstance(val, dict) else val
    return flags(data, run, **{"data__val": given, "train__max_steps": 6, "eval__every_steps": 3, **changes})


@pytest.fixture(scope="module")
def named(data: Path, sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("named") / "run"
    done = train(*short(data, run, sets))
    last = metrics(run)[-1]
    assert f"law {float(last['val_loss/law']):.4f} (perplexity " in done.stdout
    return run


def test_each_named_set_has_the_numbers_it_has_alone(
    data: Path, sets: dict[str, Path], named: Path, tmp_path: Path
) -> None:
    for name, path in sets.items():
        train(*short(data, tmp_path / name, path))
        for ours, alone in zip(metrics(named), metrics(tmp_path / name), strict=True):
            assert ours["train_loss"] == alone["train_loss"]
            assert ours[f"val_loss/{name}"] == alone["val_loss"]
            assert ours[f"val_bits_per_byte/{name}"] == alone["val_bits_per_byte"]
            assert "val_loss/law" not in alone
        same_checkpoints(named / "iter-00000006-ckpt.pth", tmp_path / name / "iter-00000006-ckpt.pth")
    assert Checkpoint(named / "iter-00000006-ckpt.pth").meta["data"]["val"] == {
        name: Checkpoint(tmp_path / name / "iter-00000006-ckpt.pth").meta["data"]["val"] for name in sets
    }


def test_the_overall_loss_is_the_mean_over_all_targets(sets: dict[str, Path], named: Path) -> None:
    opened = {name: PackedDataset(path) for name, path in sets.items()}
    targets = {name: d.n_tokens - d.n_documents for name, d in opened.items()}  # a first token is no target
    for row in metrics(named):
        if not row["val_loss"]:
            assert not any(row[f"{measure}/{name}"] for measure in MEASURES for name in sets)
            continue
        loss = {name: float(row[f"val_loss/{name}"]) for name in sets}
        overall = sum(loss[name] * targets[name] for name in sets) / sum(targets.values())
        assert float(row["val_loss"]) == pytest.approx(overall, rel=1e-12)
        bits = sum(loss[name] * opened[name].n_tokens for name in sets) / math.log(2)
        n_bytes = sum(d.manifest.bytes for d in opened.values())
        assert float(row["val_bits_per_byte"]) == pytest.approx(bits / n_bytes, rel=1e-12)
        for name in sets:
            assert float(row[f"val_perplexity/{name}"]) == math.exp(loss[name])


def test_ranks_stop_together_in_the_second_set_and_the_resume_repeats_the_validation(
    data: Path, sets: dict[str, Path], named: Path, tmp_path: Path
) -> None:
    run, ranks = tmp_path / "run", shared_rank_server()
    two = short(data, run, sets, devices=2, strategy="ddp")
    strike = {"kind": "signal", "rank": 1, "name": "SIGUSR1", "when": "set", "number": 4}
    done = ranks.run(2, run, two, plants=[strike])
    assert done.statuses == [0, 0] and "step 3: SIGUSR1; the resume will repeat the validation" in done.output
    assert not any(row["step"] == "3" for row in metrics(run))
    assert ranks.run(2, run, [*two, "--resume=latest"]).statuses == [0, 0]
    for ours, one in zip(metrics(run), metrics(named), strict=True):
        for column in ("val_loss", *(f"{measure}/{name}" for measure in MEASURES for name in sets)):
            assert bool(ours[column]) == bool(one[column])
            if one[column]:
                assert float(ours[column]) == pytest.approx(float(one[column]), rel=1e-4)


def test_a_run_with_one_set_is_resumed_with_named_ones(data: Path, sets: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(*short(data, run, data / "val"))
    before = (run / "metrics.csv").read_bytes().splitlines()
    more = {"train__max_steps": 9, "resume": "latest", "resume_allow": "train.max_steps"}
    train(*short(data, run, sets, **more))
    after = (run / "metrics.csv").read_bytes().splitlines()
    assert after[0].startswith(before[0]) and b"val_loss/law" in after[0]
    assert all(new.startswith(old) for old, new in zip(before, after, strict=False))
    last = metrics(run)[-1]
    assert last["step"] == "9" and last["val_loss/law"] and last["val_loss/drama-2.a"]
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["val"] == {k: str(v) for k, v in sets.items()}


def test_best_fit_and_fewer_rows(data: Path, sets: dict[str, Path], tmp_path: Path) -> None:
    changes = {"data__packing": "best_fit", "eval__max_samples": 2, "train__max_steps": 2}
    train(*short(data, tmp_path / "run", sets, data__plan_dir=tmp_path / "plans", **changes))
    train(*short(data, tmp_path / "one", sets["law"], data__plan_dir=tmp_path / "plans", **changes))
    for ours, alone in zip(metrics(tmp_path / "run"), metrics(tmp_path / "one"), strict=True):
        assert ours["val_loss/law"] == alone["val_loss"]
        assert not alone["val_loss"] or ours["val_loss"] != alone["val_loss"]


def test_forms_of_the_setting(tmp_path: Path) -> None:
    base = ["--data.train=x", "--train.max_steps=3"]
    law = {"law": Path("a/b"), "drama": Path("c")}
    assert parse([*base, "--data.val={law: a/b, drama: c}"]).data.val == law
    assert parse([*base, "--data.val.law=a/b", "--data.val.drama", "c"]).data.val == law
    assert val_sets(parse([*base, "--data.val=a/b"]).data.val) == {"": Path("a/b")}
    assert val_sets(parse(base).data.val) == {}
    config = tmp_path / "c.yaml"
    config.write_text("data:\n  val:\n    law: a/b\n    drama: c\n")
    args = parse([*base, f"--config={config}"])
    assert args.data.val == law and plain(args)["data"]["val"] == {"law": "a/b", "drama": "c"}
    assert parse([*base, f"--config={config}", "--data.val={only: d}"]).data.val == {"only": Path("d")}
    assert parse([f"--config={ROOT / 'configs/debug.yaml'}", f"--config={config}", *base]).data.val == law
    other = parse([f"--config={config}", f"--config={ROOT / 'configs/debug.yaml'}"])
    assert other.data.val is None and other.data.synthetic.tokens


@pytest.mark.parametrize(
    ("val", "told"),
    [
        ({"ein Name": Path("a")}, "'ein Name' becomes a column"),
        ({"a,b": Path("a")}, "'a,b' becomes a column"),
        ({"": Path("a")}, "'' becomes a column"),
        ({}, "names no dataset"),
        (Path("[a, b]"), "neither a folder nor"),
        (Path("{law: [1, 2]}"), "neither a folder nor"),
    ],
)
def test_wrong_sets_are_refused(val: object, told: str) -> None:
    with pytest.raises(ValueError, match="--data.val") as error:
        DataArgs(train=Path("x"), val=val)  # type: ignore[arg-type]
    assert told in str(error.value)


def test_a_missing_set_is_named(data: Path, tmp_path: Path) -> None:
    done = train(*short(data, tmp_path / "run", {"law": data / "val", "drama": data / "gone"}), check=False)
    assert done.returncode == 2 and f"{data / 'gone'} is not a packed dataset" in done.stderr
    assert not (tmp_path / "run").exists()


def test_columns_and_lines() -> None:
    columns = ["step", "val_loss", "val_loss/law", "val_bits_per_byte/drama-2.a"]
    assert columns_of(header_line(columns).strip()) == columns
    row = {"step": 3, "train_loss": 2.0, "val_loss": 1.0, "val_loss/law": 0.5, "val_bits_per_byte/law": 0.25}
    assert describe_losses(row) == [
        "loss 2.0000",
        "validation loss 1.0000 (perplexity 2.72)",
        "law 0.5000 (perplexity 1.65, 0.2500 bits per byte)",
    ]
