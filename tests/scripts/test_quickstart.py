"""scripts/quickstart.py: the plan of its commands, on its own text and on the user's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from running import ROOT, script, script_error
from small_models import synthetic_texts

from lit_data.packed.reader import PackedDataset
from pretrain.pipeline import steps
from pretrain.pipeline.steps import StepFailed, shown


def commands_of(monkeypatch: pytest.MonkeyPatch, *arguments: object, finish: int = 0) -> list[str]:
    """The commands that a call runs until the one after `finish` of them, which fails, as a user would type them."""
    ran: list[str] = []

    def call(command: Sequence[str], capture: bool = False) -> str:
        ran.append(shown(command))
        if len(ran) > finish:
            raise StepFailed("stop")
        return ""

    monkeypatch.setattr(steps, "call", call)
    done = script("quickstart.py", *arguments)
    assert done.returncode == 1 and "--fresh" in done.stderr, done.stderr
    return ran


def write_texts(folder: Path, count: int = 12) -> Path:
    folder.mkdir()
    for number, text in enumerate(synthetic_texts(count, 1)):
        (folder / f"{number}.txt").write_text(text)
    return folder


def test_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, out = write_texts(tmp_path / "text"), tmp_path / "out"
    given = ["--input", text, "--output", out, "--vocab_size", 500, "--val_fraction", 0.2]
    _, prepared = commands_of(monkeypatch, "--input", text, "--output", tmp_path / "few", finish=1)
    assert "--val_fraction 0.3 " in prepared  # of 12 files 2 % would be none
    state = tmp_path / "few" / "pipeline.json"
    state.write_text(state.read_text().replace("0.3", "0.02"))  # as with more files, or by an earlier version
    _, prepared = commands_of(monkeypatch, "--input", text, "--output", tmp_path / "few", finish=1)
    assert "--val_fraction 0.02 " in prepared
    (command,) = commands_of(monkeypatch, *given)
    assert command == f"python scripts/train_tokenizer.py --input {text} --vocab_size 500 --output {out}/tokenizer"
    (out / "tokenizer").mkdir()
    (out / "tokenizer" / "tokenizer.json").touch()
    prepared, training = commands_of(monkeypatch, *given, finish=1)
    assert f"--input {text} --val_fraction 0.2 --tokenizer {out}/tokenizer" in prepared
    assert "--config configs/quickstart.yaml" in training and f"--data.val {out}/data/packed/val" in training
    (out / "data" / "packed" / "val").mkdir(parents=True)
    (out / "data" / "packed" / "val" / "manifest.json").touch()
    assert len(commands_of(monkeypatch, *given, finish=1)) == 2  # training is noted as done
    assert commands_of(monkeypatch, *given)[0].startswith("python scripts/convert_to_hf.py")
    error = script_error("quickstart.py", *given, "--steps", 50)  # another schedule: the trainer would refuse it
    assert "--steps 50" in error and "was started with no --steps" in error
    other = write_texts(tmp_path / "other")
    error = script_error("quickstart.py", "--input", other, *given[2:])
    assert f"--input {other}:" in error and "was started with" in error
    assert "train_tokenizer.py" in commands_of(monkeypatch, "--input", other, *given[2:], "--fresh")[0]


def test_the_recipe_of_tinystories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text("One day.\n\nThe end.\n<|endoftext|>\nA dog ran.\n")
    given = ["--input", tmp_path / "train.txt", "--val_input", tmp_path / "valid.txt", "--vocab_size", 10000]
    given += ["--split_documents", "<|endoftext|>", "--config", ROOT / "configs" / "nano-llama.yaml"]
    out = tmp_path / "out"
    tokenizer = out / "tokenizer" / "tokenizer.json"
    (made,) = commands_of(monkeypatch, *given, "--output", out)
    assert "--split_documents '<|endoftext|>' --vocab_size 10000" in made
    tokenizer.parent.mkdir()
    tokenizer.touch()
    prepared, training = commands_of(monkeypatch, *given, "--output", out, finish=1)
    assert f"--val_input {tmp_path / 'valid.txt'} --split_documents '<|endoftext|>'" in prepared
    assert "--config configs/nano-llama.yaml" in training


def test_the_training_fits_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU neither compiled nor in bf16, unless the user says so: flags after -- replace ours."""
    text, out = write_texts(tmp_path / "text"), tmp_path / "out"
    given = ["--input", text, "--output", out, "--config", "configs/nano-llama.yaml", "--steps", 20]
    commands_of(monkeypatch, *given)
    for name in ("tokenizer/tokenizer.json", "data/packed/val/manifest.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    for cuda, flags, end in (
        (False, [], "--optim.warmup_steps 2 --compile false --precision fp32"),
        (False, ["--precision", "bf16"], "--optim.warmup_steps 2 --compile false --precision bf16"),
        (True, ["--train.micro_batch_samples=8"], "--optim.warmup_steps 2 --train.micro_batch_samples=8"),
        (True, ["--train.max_steps=30"], "--resume auto --optim.warmup_steps 2 --train.max_steps=30"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        (training_call,) = commands_of(monkeypatch, *given, "--", *flags)
        assert training_call.endswith(end)


def test_refusals(tmp_path: Path) -> None:
    assert "--out_dir after -- is a flag that quickstart.py sets itself" in script_error(
        "quickstart.py", "--", "--out_dir=x"
    )
    text = write_texts(tmp_path / "text", 3)
    out = ["--output", tmp_path / "out"]
    assert "too few to hold some out" in script_error("quickstart.py", "--input", text, *out)
    assert "--input" in script_error("quickstart.py", "--vocab_size", 500)
    assert "needs --output" in script_error("quickstart.py", "--input", text)
    assert "does not exist" in script_error("quickstart.py", "--input", tmp_path / "none", *out)
    both = ["--val_input", text, "--val_fraction", 0.1]
    assert "not both" in script_error("quickstart.py", "--input", text, *both, *out)
    typing_error = script_error("quickstart.py", "--input", text, "--split_documents", "blankline", *out)
    assert "did you mean blank_line or line?" in typing_error
    assert "there is no such file" in script_error("quickstart.py", "--input", text, "--config", "none.yaml", *out)
    assert "--steps 0" in script_error("quickstart.py", "--steps", 0)
    (tmp_path / "empty").mkdir()
    assert "holds no text" in script_error("quickstart.py", "--input", tmp_path / "empty", *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
def test_folders_of_the_user_are_kept(fresh: tuple[str, ...], tmp_path: Path) -> None:
    """--fresh deletes only what an earlier call wrote, never the input, and other folders are not mistaken for that."""
    for folder in ("mine", "other"):
        (tmp_path / folder).mkdir()
    mine, other = write_texts(tmp_path / "mine" / "data"), write_texts(tmp_path / "other" / "texts")
    before = sorted(tmp_path.rglob("*"))

    def refused(text: Path, output: str) -> str:
        return script_error("quickstart.py", "--input", text, "--output", tmp_path / output, *fresh)

    assert "overlaps the folders that this command writes" in refused(mine, "mine")
    assert "overlaps the folders" in refused(tmp_path, "new")
    assert f"{mine} exists and was not written by this command" in refused(other, "mine")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "mine" / "pipeline.json").write_text("{}")  # of an earlier call
    assert "overlaps the folders" in refused(mine, "mine") and mine.is_dir()


@pytest.mark.slow
def test_stories_from_end_to_end(tmp_path: Path) -> None:
    """A small TinyStories with a config of one's own: two epochs, their table of perplexities in the report."""
    texts = synthetic_texts(300, 1)
    for name, part in (("train.txt", texts[:280]), ("valid.txt", texts[280:])):
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(part))
    config = {
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "intermediate_size": 64},
        "train": {"max_epochs": 2, "global_batch_samples": 8, "micro_batch_samples": 8, "block_size": 64},
        "optim": {"warmup_steps": 2},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(config))
    line = [sys.executable, str(ROOT / "scripts" / "quickstart.py"), "--input", "train.txt", "--val_input", "valid.txt"]
    line += ["--split_documents", "<|endoftext|>", "--config", "mine.yaml", "--vocab_size", "400", "--output", "out"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert PackedDataset(tmp_path / "out" / "data" / "packed" / "train").n_documents == 280
    assert "Loss and perplexity by epoch" in (tmp_path / "out" / "run" / "report.html").read_text()


@pytest.mark.slow
def test_own_text_from_end_to_end(tmp_path: Path) -> None:
    texts = synthetic_texts(400, 1)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    line = [sys.executable, str(ROOT / "scripts" / "quickstart.py"), "--input", str(tmp_path / "text.jsonl")]
    line += ["--output", str(tmp_path / "out"), "--vocab_size", "400", "--steps", "10"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("--- ") == 4 and "bits a byte" in done.stdout
    assert (tmp_path / "out" / "hf" / "config.json").is_file() and (tmp_path / "out" / "run" / "report.html").is_file()
