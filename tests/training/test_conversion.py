"""Checkpoint -> Hugging Face -> checkpoint by the commands of a user, and further training from the result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import running
import torch
import transformers
from running import MODEL, ROOT, flags, metrics, train

from lit_data.packed.reader import PackedDataset
from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_eval.agreement import largest_difference, our_span_losses, transformers_span_losses
from lit_model.config import ModelConfig
from lit_model.load import load_model, load_tensors
from lit_model.model import GPT
from pretrain.cli.run_parser import parse
from pretrain.init_from import model_config

os.environ["HF_HUB_OFFLINE"] = "1"


def script(name: str, *arguments: object) -> str:
    """Run a script in this process; returns its output."""
    done = running.script(name, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded run whose vocabulary needs padding."""
    folder = tmp_path_factory.mktemp("conversion") / "run"
    changes = {"model__padding_multiple": 64, "save__state_dict_type": "sharded", "train__max_steps": 8}
    changes["eval__max_samples"] = 3
    train(*flags(data, folder, **changes))
    return folder


@pytest.fixture(scope="module")
def hf(run: Path) -> Path:
    """The run's export, made by the user's command."""
    output = run.parent / "hf"
    line = [ROOT / "scripts" / "convert_to_hf.sh", run / "iter-00000008-ckpt.pth", output]
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def test_transformers_agrees_span_by_span(run: Path, hf: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = PackedDataset(data / "val")
    ours = our_span_losses(run, dataset, 32, max_rows=3)
    transformers.utils.logging.enable_progress_bar()  # its default; other tests change it
    capsys.readouterr()
    theirs = transformers_span_losses(hf, dataset, ours)
    assert "Loading" not in capsys.readouterr().err
    assert largest_difference(ours, theirs) < 1e-4 and len(ours.loss) < len(our_span_losses(run, dataset, 32).loss)
    assert ours.mean == pytest.approx(float(metrics(run)[-1]["val_loss"]), rel=1e-6)
    assert json.loads((hf / "config.json").read_text())["vocab_size"] == 96
    assert "Data fingerprint" in (hf / "README.md").read_text()
    assert str(run.parent) not in (hf / "README.md").read_text(), "the model card names a folder of this machine"
    printed = script("verify_hf.py", "--run", run, "--hf", hf)
    assert "largest relative difference" in printed and f"{len(ours.loss)} spans" in printed
    assert float(re.findall(r"last validation: .* difference (\S+)", printed)[0]) < 1e-6


def test_a_round_trip_is_exact_and_can_be_trained_further(run: Path, hf: Path, data: Path, tmp_path: Path) -> None:
    script("convert_from_hf.py", "--input", hf, "--output", tmp_path / "start.pth")
    config, back = load_tensors(tmp_path / "start.pth")
    _, original = load_tensors(run)
    assert set(back) == set(original)
    for name in original:
        assert torch.equal(back[name][: config.vocab_size], original[name][: config.vocab_size]), name
    sizes = {key: None for key in ("n_layer", "n_head", "n_query_groups", "n_embd", "intermediate_size")}
    again = flags(data, tmp_path / "on", init_from=tmp_path / "start.pth", train__max_steps=4, eval__max_samples=3)
    again = [f for f in again if not any(f.startswith(f"--model.{key}") for key in sizes)]
    train(*again)
    first = float(metrics(tmp_path / "on")[0]["val_loss"])
    assert first == pytest.approx(float(metrics(run)[-1]["val_loss"]), rel=1e-6)
    (tmp_path / "start.pth").unlink()
    train(*again, "--resume=latest")


def test_a_longer_context_agrees_with_transformers(run: Path, hf: Path, data: Path, tmp_path: Path) -> None:
    """Continued at twice the block, with other rotary frequencies: recorded, resumed, exported."""
    scaling = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_block_size": 32}
    rope = {"model__rope_base": 50000, "model__rope_scaling": json.dumps(scaling)}
    longer = {**dict.fromkeys(MODEL), "init_from": hf, "train__block_size": 64, **rope}
    settings = {**longer, "train__max_steps": 2, "save__every_steps": 1, "eval__every_steps": 1}
    train(*flags(data, tmp_path / "on", **settings))
    train(*flags(data, tmp_path / "on", **settings, resume="iter-00000001-ckpt.pth"))
    config, _ = load_tensors(tmp_path / "on")
    assert (config.block_size, config.rope_base) == (64, 50000) and asdict(config)["rope_scaling"] == scaling
    script("convert_to_hf.py", "--checkpoint", tmp_path / "on", "--output", tmp_path / "hf")
    exported = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert exported["max_position_embeddings"] == 64 and exported["rope_scaling"]["factor"] == 2
    dataset = PackedDataset(data / "val")
    ours = our_span_losses(tmp_path / "on", dataset, 64)
    assert np.diff(dataset.document_start(np.arange(dataset.n_documents))).max() > 40
    assert largest_difference(ours, transformers_span_losses(tmp_path / "hf", dataset, ours)) < 1e-4
    assert ours.mean == pytest.approx(float(metrics(tmp_path / "on")[-1]["val_loss"]), rel=1e-6)
    learned = ModelConfig(position_embedding="learned", block_size=32, vocab_size=96)
    content = {"model": GPT(learned).state_dict(), "optimizer": {}}
    torch.save({**content, "meta": json.dumps({"model_config": learned.to_dict()})}, tmp_path / "learned.pth")
    other = {**dict.fromkeys(rope), "init_from": tmp_path / "learned.pth"}
    for changes, message in (
        ({"model__qk_norm": "head"}, f"contradicts --init_from {hf}, which has none; --model.dropout"),
        ({"model__rope_base": 1.0}, "rope_base 1.0 is not above 1"),
        (other, "--train.block_size 64 exceeds the 32 learned positions of --init_from"),
        ({**other, "model__rope_base": 500.0}, "--model.rope_base 500.0 contradicts --init_from"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            model_config(parse(flags(data, tmp_path / "no", **{**longer, **changes})), 96)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "hf"])
def test_generate_opens_everything(run: Path, hf: Path, kind: str) -> None:
    path = {"run": run, "checkpoint": run / "iter-00000008-ckpt.pth", "hf": hf}[kind]
    arguments = ["--model", path, "--prompt_ids", "5,6", "--max_new_tokens", 5, "--temperature", 0, "--json"]
    answer = json.loads(script("generate.py", *arguments))
    model, _ = load_model(run)
    expected = [5, 6]
    for _ in range(5):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert answer["ids"] == expected[2:]


def test_mistakes_are_named(run: Path, hf: Path, tmp_path: Path) -> None:
    cases = [
        (("convert_to_hf.py", "--checkpoint", tmp_path / "no", "--output", tmp_path / "x"), "no model at"),
        (("convert_to_hf.py", "--checkpoint", run, "--output", hf), "exists"),
        (("convert_to_hf.py", "--checkpoint", hf, "--output", tmp_path / "x"), "already"),
        (("convert_from_hf.py", "--input", run, "--output", tmp_path / "x"), "config.json"),
        (("generate.py", "--model", run, "--prompt", "a"), "no tokenizer"),
        (("generate.py", "--model", run, "--prompt_ids", "5,a"), "whole numbers"),
        (("generate.py", "--model", run, "--prompt_ids", "5,500"), "500"),
        (("trace_data.py", "step", run, "99"), "steps 0 to 7"),
        (("trace_data.py", "document", run, "nobody"), "no document"),
        (("trace_data.py", "verify", tmp_path), "is not a run folder"),
    ]
    for arguments, message in cases:
        assert message in running.script_error(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_tokenizer_is_warned_of(run: Path, tmp_path: Path) -> None:
    done = running.script("convert_to_hf.py", "--checkpoint", run, "--output", tmp_path / "x")
    assert done.returncode == 0 and done.stderr.startswith(f"warning: {run} has no tokenizer beside it")
    assert "--tokenizer" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_debug_config_generates_its_own_data(tmp_path: Path) -> None:
    """Two runs of configs/debug.yaml give the same weights; the export has the tokenizer used in preparation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("a", "b"):  # half of its text and steps
        shorter = ("--data.synthetic.tokens=15000", "--train.max_steps=30")
        train("--config", str(ROOT / "configs" / "debug.yaml"), *shorter, "--out_dir", str(tmp_path / name))
    one, two = load_tensors(tmp_path / "a")[1], load_tensors(tmp_path / "b")[1]
    assert all(torch.equal(one[n], two[n]) for n in one)
    rows = metrics(tmp_path / "a")
    assert float(rows[-1]["val_loss"]) < 0.6 * float(rows[0]["val_loss"])
    script("convert_to_hf.py", "--checkpoint", tmp_path / "a", "--output", tmp_path / "hf")
    ours, theirs = open_tokenizer(tmp_path / "a" / "tokenizer"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("The cat sat. It slept!", "  two  spaces\n\nand lines", "Größe, naïve, 日本"):
        assert theirs(text)["input_ids"] == list(ours.encode(text)), text
    assert ours.eos_id in theirs(f"a {ours.eos_token} in the text")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.eos_token_id == ours.eos_id
    assert "no fault" in script("trace_data.py", "verify", tmp_path / "a")
    assert "row    0" in script("trace_data.py", "step", tmp_path / "a", 3)
