"""Replay: recorded steps re-executed bit for bit, and alterations named at their step."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from running import flags, script, script_error, train_in_process

import pretrain.loop
from lit_data.packed.reader import PackedDataset
from lit_files.checkpoint_name import checkpoint_name
from lit_model.load import WITHOUT_TENSORS, Checkpoint
from pretrain.release.replay import measure

SMALL = {
    "data__val": None,
    "model__n_layer": 1,
    "train__max_steps": 6,
    "save__every_steps": 2,
    "train__global_batch_samples": 2,
}


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with a checkpoint after every second one."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    train_in_process(flags(data, folder, **SMALL))
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def replay(run: Path, first: int, end: int, *arguments: object) -> tuple[int, str]:
    done = script("replay.py", run / checkpoint_name(first), run / checkpoint_name(end), *arguments)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout


def error(*arguments: object) -> str:
    return script_error("replay.py", *arguments)


def alter_record(run: Path, step: int, alter: Callable[[dict[str, Any]], None]) -> None:
    """Change columns of the record, in the file that holds a step."""
    for path in (run / "datapoints").glob("*.parquet"):
        table = pq.read_table(path)
        columns = {name: table[name].to_numpy().copy() for name in table.column_names}
        if step in columns["step"]:
            alter(columns)
            arrays = [pa.array(columns[f.name], f.type) for f in table.schema]
            pq.write_table(pa.table(arrays, schema=table.schema), path)


def alter_meta(checkpoint: Path, alter: Callable[[dict[str, Any]], None]) -> None:
    """Change the facts of a checkpoint, whose checksums cover its tensors alone."""
    content = torch.load(checkpoint, weights_only=True)
    meta = json.loads(content["meta"])
    alter(meta)
    torch.save(content | {"meta": json.dumps(meta)}, checkpoint)


def test_replay_is_bit_equal(run: Path) -> None:
    status, text = replay(run, 2, 6)
    assert status == 0 and "state: parameters and optimizer state are equal" in text, text
    assert "replayed steps 2 to 5" in text and "spans equal the record" in text, text


@pytest.mark.slow
def test_revision_without_training_state(run: Path, tmp_path: Path) -> None:
    """Only the weights of such a TO are compared, and a FROM needs its state."""
    release = tmp_path / "release"
    assert script("publish.py", run, "--to", release, "--training_state", "none").returncode == 0
    done = script("replay.py", run / checkpoint_name(2), release / "step4")
    assert done.returncode == 0 and "exported weights are equal" in done.stdout, (done.stdout, done.stderr)
    assert "not checked: the optimizer's state" in done.stdout
    assert "published without its training state" in error(release / "step2", release / "step4")


def test_altered_token(run: Path, data: Path, tmp_path: Path) -> None:
    """One token of the data is another than in training."""
    table = pq.read_table(next((run / "datapoints").glob("*.parquet"))).to_pylist()
    span = next(row for row in table if row["step"] == 3 and row["length"] > 4)
    altered = tmp_path / "train"
    shutil.copytree(data / "train", altered)
    dataset = PackedDataset(altered)
    position = int(dataset.document_start(np.asarray([span["document"]]))[0]) + span["start"] + 2
    ((shard, at, _),) = dataset.shard_ranges(position, position + 1)
    tokens = np.memmap(altered / f"{dataset.manifest.shards[shard].name}.bin", dtype=dataset.dtype, mode="r+")
    tokens[at] = 2 if tokens[at] != 2 else 3
    tokens.flush()
    status, text = replay(run, 2, 4, "--data", altered)
    assert status == 1 and f"step 3 is the first that differs: row {span['row']}" in text, text
    assert "the tokens in the data are not those that went into the model" in text


def test_swapped_samples(copy: Path) -> None:
    """A record that exchanges a row of step 2 with one of step 3: their losses are those of other spans."""

    def swap(c: dict[str, Any]) -> None:
        rows = [(step, row) for step in (2, 3) for row in range(2)]
        spans = {(s, r): np.flatnonzero((c["step"] == s) & (c["row"] == r)) for s, r in rows}
        one, other = next(
            (spans[a], spans[b]) for a in rows for b in rows if a[0] < b[0] and len(spans[a]) == len(spans[b])
        )
        for name in ("sample", "document", "start", "length", "targets", "hash"):
            c[name][one], c[name][other] = c[name][other].copy(), c[name][one].copy()

    alter_record(copy, 2, swap)
    status, text = replay(copy, 2, 6)
    assert status == 1 and "step 2 is the first whose losses differ, in " in text, text
    assert "they had other tokens or targets than the record and the data" in text


def with_rate(monkeypatch: pytest.MonkeyPatch, data: Path, run: Path, step: int) -> None:
    """Train a run with 1 % more learning rate in one step."""
    rate = pretrain.loop.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(pretrain.loop, "learning_rate", lambda a, s, n: rate(a, s, n) * (1.01 if s == step else 1.0))
        train_in_process(flags(data, run, **SMALL))


def test_another_learning_rate(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run used another rate in step 3 than its settings give: all losses of step 4 depart."""
    with_rate(monkeypatch, data, tmp_path / "run", 3)
    status, text = replay(tmp_path / "run", 2, 6)
    assert status == 1 and "step 4 is the first whose losses differ, in" in text, text
    assert "the update of step 3 was another" in text


@pytest.mark.slow
def test_another_learning_rate_in_the_last_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No loss shows it, only the state."""
    with_rate(monkeypatch, data, tmp_path / "run", 3)
    status, text = replay(tmp_path / "run", 2, 4)
    assert status == 1 and "step 3 is the first that differs: its update is not that of the run" in text, text


def test_part_of_the_data(run: Path, data: Path, tmp_path: Path) -> None:
    """Steps up to the first that needs a missing shard are checked."""
    part = tmp_path / "train"
    shutil.copytree(data / "train", part)
    names = [shard.name for shard in PackedDataset(part).manifest.shards]
    (part / f"{names[2]}.bin").unlink()  # step 5 is the first to use it
    (part / f"{names[2]}.docs.parquet").unlink()
    status, text = replay(run, 2, 6, "--data", part)
    assert status == 0 and "replayed steps 2 to 4," in text and "spans equal the record" in text, text
    assert f"not checked: steps 5 to 5 and the state after them, as step 5 used {part / names[2]}.bin" in text, text
    (part / f"{names[1]}.bin").unlink()
    here = ("--data", part)
    assert "no step can be checked: step 2 used" in error(run / checkpoint_name(2), run / checkpoint_name(6), *here)
    (part / f"{names[1]}.idx").unlink()
    assert "needs manifest.json and the .idx files" in error(run / checkpoint_name(2), run / checkpoint_name(4), *here)


def test_another_environment(copy: Path) -> None:
    """In another environment the difference is compared with a noise floor, which explains that of another kernel."""
    elsewhere(copy)
    alter_meta(copy / checkpoint_name(6), lambda meta: meta["config"]["train"].update(attention="dense"))
    status, text = replay(copy, 2, 6)
    assert status == 0 and "cpu another" in text and "rounding explains it" in text, text
    assert "not checked: the values of the optimizer's state" in text, text


def test_rounding_does_not_explain_every_difference() -> None:
    """NaN weights, and tensors with other names or shapes, are beyond any noise floor."""
    start = {"a": torch.zeros(4), "b": torch.zeros(2)}
    end = {"a": torch.full((4,), 0.1), "b": torch.full((2,), 0.1), "a/exp_avg": torch.ones(4)}
    noise = measure(end, end | {"a": end["a"] + 1e-6}, start)
    assert measure(end, dict(end), start).equal and not measure(end, dict(end), start).beyond(noise)
    assert not measure(end, end | {"a": end["a"] + 4e-6}, start).beyond(noise)
    other = (
        {"a": end["a"] + 1e-3},
        {"a": torch.full((4,), math.nan)},
        {"a": torch.zeros(3)},
        {"a": end["a"].double()},
        {"c": torch.zeros(2)},
    )
    for change in other:
        for found in (measure(end, end | change, start), measure(end | change, end, start)):
            assert found.beyond(noise) and not found.equal, change
    missing = measure({"a": end["a"]}, end, start)
    assert missing.facts == ["only one state has a/exp_avg", "only one state has b"] and missing.beyond(noise)
    still = measure(start, {**start, "a": start["a"] + 1e-7}, start)  # a learning rate of 0
    assert measure(end, start | {"a/exp_avg": torch.ones(4)}, start).beyond(still)


@pytest.mark.slow
def test_alteration_in_another_environment(copy: Path) -> None:
    """Another setting of the optimizer makes a difference beyond the noise floor."""
    elsewhere(copy)
    for step in (2, 6):
        alter_meta(copy / checkpoint_name(step), lambda meta: meta["config"]["optim"].update(beta1=0.91))
    status, text = replay(copy, 2, 6)
    assert status == 1 and "the update of step 2 was another" in text, text


def elsewhere(run: Path) -> None:
    """Let a run have been trained on another CPU."""
    environment = run / "environment.jsonl"
    environment.write_text(environment.read_text().replace('"cpu": "', '"cpu": "another '))


def test_mistakes(run: Path, copy: Path, tmp_path: Path) -> None:
    two, four = (run / checkpoint_name(step) for step in (2, 4))
    assert "give a later TO" in error(four, two)
    assert "no such checkpoint" in error(tmp_path / "nothing", four)
    assert "is a run folder: name one of its checkpoints" in error(run, four)
    (tmp_path / "empty").mkdir()
    assert "is neither a checkpoint" in error(two, tmp_path / "empty")
    assert "--data names 2" in error(two, four, "--data", tmp_path, tmp_path)
    assert "is not a packed dataset" in error(two, four, "--data", tmp_path)
    assert "not a multiple of devices x micro-batch" in error(two, four, "--devices", 3)
    alter_meta(copy / checkpoint_name(4), lambda meta: meta.update(changes=[{"step": 2}]))
    assert "meta.changes is damaged: [0]: the field 'differences' is missing" in error(two, copy / checkpoint_name(4))
    alter_meta(copy / checkpoint_name(2), lambda meta: meta["config"].update(seed=5))
    assert "is not a checkpoint of the run of TO: seed 5 there" in error(copy / checkpoint_name(2), four)
    shutil.rmtree(copy / "datapoints")
    assert "has no datapoint record" in error(two, copy / checkpoint_name(4))


def test_influence(run: Path, tmp_path: Path) -> None:
    """Ignoring nothing changes nothing; ignoring a document changes later losses, not those of its first exposure."""
    record = [row for path in (run / "datapoints").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    seen = {row["document"]: row for row in record if row["step"] == 3 and row["targets"] > 8}
    first = {row["document"] for row in record if row["step"] < 3}
    document = next(number for number in seen if number not in first)
    chosen = ("--document", f"#{document}", "--random", 1, "--work", tmp_path / "work")
    done = script("trace_data.py", "influence", run, *chosen, "--json")
    nothing, own, random = (json.loads(line) for line in done.stdout.splitlines())
    assert (nothing["mean_absolute"], nothing["largest"], nothing["own"]) == (0, 0, []) and nothing["spans"] > 0
    assert own["mean_absolute"] > 0 and own["own"][0]["step"] == 3 and own["targets"] >= seen[document]["targets"]
    assert own["own"][0]["loss"] == own["own"][0]["without"]
    assert random["mean_absolute"] > 0 and random["targets"] > 0
    executed = list((tmp_path / "work").glob(f"*/{checkpoint_name(6)}"))
    assert len(executed) == 3 and all(Checkpoint(path).meta[WITHOUT_TENSORS] for path in executed)
    unseen = next(n for n in range(90) if n not in {row["document"] for row in record})
    assert "was not seen in the 6 steps" in trace_error(run, f"#{unseen}")


@pytest.mark.slow
def test_influence_needs_a_checkpoint_before_the_document(copy: Path) -> None:
    (copy / checkpoint_name(2)).unlink()
    record = [row for path in (copy / "datapoints").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    earlier = {row["document"] for row in record if row["step"] < 2}
    document = next(row["document"] for row in record if row["step"] == 2 and row["document"] not in earlier)
    assert "the checkpoints before it were deleted" in trace_error(copy, f"#{document}")
    document = next(row["document"] for row in record if row["step"] == 0)  # executed from the beginning
    done = script("trace_data.py", "influence", copy, "--document", f"#{document}", "--random", 0, "--steps", 3)
    assert "replayed from the beginning to step 2" in done.stdout, (done.stdout, done.stderr)
    assert "ignoring nothing, 0 targets: mean +0.00e+00, mean absolute 0.00e+00" in done.stdout


def trace_error(run: Path, document: str) -> str:
    return script_error("trace_data.py", "influence", run, "--document", document)
