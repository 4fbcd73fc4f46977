"""Full <-> sharded: the same tensors and metadata, new checksums, and training resumes bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import flags, script, script_error, train

from lit_model.hf.families import config_to_hf
from lit_model.load import Checkpoint, load_tensors
from pretrain.checkpoint.commit import nested
from pretrain.resume import read_meta

FIRST, LAST = "iter-00000004-ckpt.pth", "iter-00000008-ckpt.pth"
SETTINGS = {"save__every_steps": 4, "train__max_steps": 8, "eval__every_steps": 8}


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run saved sharded after 4 and 8 steps; the first checkpoint converted to a file, and that back to a folder."""
    folder = tmp_path_factory.mktemp("convert") / "run"
    train(*flags(data, folder, save__state_dict_type="sharded", **SETTINGS))
    for source, output, to in ((folder / FIRST, "full", "full"), (folder.parent / "full" / FIRST, "again", "sharded")):
        done = script("convert_checkpoint.py", source, folder.parent / output / FIRST, "--to", to)
        assert done.returncode == 0, done.stderr
    return folder


def facts(checkpoint: Checkpoint) -> dict[str, object]:
    return {key: value for key, value in checkpoint.meta.items() if key != "checksums"}


@pytest.mark.parametrize("kind", ["full", "again"])
def test_tensors_and_metadata_are_equal(run: Path, kind: str) -> None:
    original, converted = Checkpoint(run / FIRST), Checkpoint(run.parent / kind / FIRST)
    assert converted.sharded == (kind == "again")
    assert facts(converted) == facts(original) and converted.verify() == []
    assert set(converted.names()) == set(original.names())
    assert any(name.startswith("optimizer.") for name in converted.names())
    for name in original.names():
        there, here = original.tensor(name), converted.tensor(name)
        assert there.dtype == here.dtype and torch.equal(there, here), name
    assert [p.name for p in (run.parent / kind).iterdir()] == [FIRST], "leftovers next to the output"


def test_the_file_equals_torch_saves(run: Path, tmp_path: Path) -> None:
    """Readable without memory-mapping, and not a byte longer than torch.save's own."""
    path = run.parent / "full" / FIRST
    content = torch.load(path, weights_only=True)
    for name in (opened := Checkpoint(path)).names():
        if name.startswith("model."):
            assert torch.equal(content["model"][name.removeprefix("model.")], opened.tensor(name))
    tensors = {name: opened.tensor(name).clone() for name in opened.names()}
    with open(tmp_path / FIRST, "wb") as f:
        torch.save({**nested(tensors), "meta": content["meta"]}, f)
    assert path.stat().st_size == (tmp_path / FIRST).stat().st_size


@pytest.mark.parametrize("kind", ["full", "again"])
def test_training_resumes_from_it(run: Path, data: Path, kind: str, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for name in (FIRST, LAST):
        shutil.rmtree(tmp_path / "run" / name)
    source = run.parent / kind / FIRST
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / "run" / FIRST)
    train(*flags(data, tmp_path / "run", save__state_dict_type="sharded", resume="latest", **SETTINGS))
    there, here = Checkpoint(run / LAST), Checkpoint(tmp_path / "run" / LAST)
    assert all(torch.equal(there.tensor(name), here.tensor(name)) for name in there.names())


def test_mistakes_are_named(run: Path, tmp_path: Path) -> None:
    full, hf = run.parent / "full" / FIRST, tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(config_to_hf(Checkpoint(full).model_config)))
    cases = [
        ((run / FIRST, full, "--to", "full"), "exists already"),
        ((run / FIRST, tmp_path / "x", "--to", "sharded"), "is already sharded"),
        ((full, tmp_path / "x", "--to", "full"), "is already full"),
        ((run / FIRST, tmp_path / LAST, "--to", "full"), "names step 8"),
        ((tmp_path / "no", tmp_path / "x", "--to", "full"), "no model at"),
        ((hf, tmp_path / "x", "--to", "full"), "convert_from_hf.py"),
    ]
    for arguments, message in cases:
        assert message in script_error("convert_checkpoint.py", *arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_inspect(run: Path, tmp_path: Path) -> None:
    done = script("inspect_checkpoint.py", run / FIRST, "--json")
    assert done.returncode == 0, done.stderr
    told, checkpoint = json.loads(done.stdout), Checkpoint(run / FIRST)
    model = sum(t.numel() for t in checkpoint.model_tensors().values())
    assert (told["kind"], told["step"], told["world_size"]) == ("sharded", 4, 1)
    assert (told["parameters"], told["model_bytes"], told["tokens"]) == (model, 4 * model, checkpoint.meta["tokens"])
    assert told["optimizer_bytes"] >= 8 * model and told["torch"] == torch.__version__
    assert told["file_bytes"] == sum(f.stat().st_size for f in (run / FIRST).iterdir())
    text = script("inspect_checkpoint.py", run.parent / "full" / FIRST).stdout
    assert "(full)" in text and "step 4" in text and f"{model:,} parameters" in text


@pytest.mark.parametrize("kind", ["full", "again"])
def test_inspect_verifies(run: Path, tmp_path: Path, kind: str) -> None:
    source, copy = run.parent / kind / FIRST, tmp_path / FIRST
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, copy)
    done = script("inspect_checkpoint.py", copy, "--verify")
    assert done.returncode == 0 and done.stdout.endswith("no fault\n"), done.stdout + done.stderr
    file = copy / "__0_0.distcp" if copy.is_dir() else copy
    content = file.read_bytes()
    weight = content.index(Checkpoint(copy).tensor("model.lm_head.weight").clone().numpy().tobytes())
    file.write_bytes(content[:weight] + bytes([content[weight] ^ 1]) + content[weight + 1 :])
    done = script("inspect_checkpoint.py", copy, "--verify")
    assert done.returncode == 1 and "changed after it was written" in done.stdout, done.stdout + done.stderr
    file.write_bytes(content[:-1000])
    done = script("inspect_checkpoint.py", copy, "--verify", "--json")
    assert done.returncode == 1 and str(file) in json.loads(done.stdout)["faults"][0], done.stdout + done.stderr
    done = script("inspect_checkpoint.py", tmp_path / "no", "--verify")
    assert done.returncode == 2 and "no model at" in done.stderr


def test_average(run: Path, tmp_path: Path) -> None:
    """Of a sharded and a full checkpoint; other programs open it, and nothing resumes from it."""
    output, first = tmp_path / "average.pth", run.parent / "full" / FIRST
    assert script("average_checkpoints.py", first, run / LAST, "--output", output).returncode == 0
    done = script("average_checkpoints.py", run, "--last", 2, "--output", tmp_path / "again.pth")
    assert done.stdout == f"{FIRST}, {LAST} -> {tmp_path / 'again.pth'}\n", done.stderr
    averages = [Checkpoint(output), Checkpoint(tmp_path / "again.pth")]
    one, two = Checkpoint(run / FIRST), Checkpoint(run / LAST)
    assert averages[0].names() == [name for name in one.names() if name.startswith("model.")]
    for average, of in zip(averages, (first, run / FIRST), strict=True):
        assert average.verify() == [] and average.meta["averaged"] == [str(of), str(run / LAST)]
        for name in average.names():
            mean = ((one.tensor(name).double() + two.tensor(name).double()) / 2).float()
            assert torch.equal(average.tensor(name), mean), name
    assert script("generate.py", "--model", output, "--prompt_ids", "5,6", "--max_new_tokens", 2).returncode == 0
    done = script("convert_to_hf.py", "--checkpoint", output, "--output", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    for name, tensor in load_tensors(tmp_path / "hf")[1].items():
        assert torch.equal(tensor, averages[0].tensor(f"model.{name}"))
    with pytest.raises(ValueError, match=r"was imported: begin a run with --init_from"):
        read_meta(output)


def test_averages_that_make_no_sense_are_refused(run: Path, tmp_path: Path) -> None:
    meta = {"model_config": Checkpoint(run / LAST).model_config.to_dict() | {"rope_base": 500000.0}}
    torch.save({"model": {}, "optimizer": {}, "meta": json.dumps(meta)}, tmp_path / "other.pth")
    for arguments, message in (
        ((run / LAST, tmp_path / "other.pth"), "are different models: rope_base is 10000.0 and 500000.0"),
        ((run / LAST,), "at least two checkpoints"),
        ((run / LAST, run / LAST), "is given twice"),
        ((run, run / LAST), f"{run} is a run folder: name its checkpoints, such as {run / LAST}, or give one run with"),
        ((run,), "is a run folder"),
        ((run, "--last", 3), "holds 2 checkpoints"),
        ((run, "--last", 0), "at least two checkpoints"),
        ((run, "--last", -1), "at least two checkpoints"),
        ((run, run, "--last", 2), "takes one run folder"),
    ):
        assert message in script_error("average_checkpoints.py", *arguments, "--output", tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
