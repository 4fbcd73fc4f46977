"""Configs of other trainers: each becomes a config of ours with the same model, batch, rates and length, which trains;
and what cannot be converted is refused by name."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import ROOT, script, script_error, write_dataset

from lit_files.checkpoint_name import list_checkpoints
from lit_model.cost import count_parameters
from lit_model.registry import MODELS
from pretrain import fabric_train
from pretrain.args import RunArgs, flat
from pretrain.cli.run_parser import parse
from pretrain.convert.foreign_config import convert_config, nested, read_settings, recognize
from pretrain.convert.foreign_formats import FORMATS
from pretrain.init_from import model_config

# Of BabyLlama's repository: type, width, MLP, layers, heads, tied; lr, batch, accumulation, epochs, warm-up; size.
BABYLLAMA: dict[str, tuple[Any, ...]] = {
    "llama-10M": ("Llama", 192, 768, 6, 6, False, "3e-4", 32, 4, 2, 100, "9,685,440"),
    "llama-16M": ("Llama", 256, 1024, 8, 8, None, "3e-4", 128, 1, 4, 300, "16,584,960"),
    "llama-95M": ("Llama", 768, 2048, 10, 12, False, "3e-4", 128, 8, 4, 300, "95,371,008"),
    "llama-97M": ("Llama", 768, 2048, 12, 12, True, "7e-4", 128, 2, 6, 300, "97,241,856"),
    "llama-360M": ("Llama", 1024, 3072, 24, 8, None, "3e-4", 128, 8, 4, 300, "359,973,888"),
    "gpt-97M": ("GPT2", 768, "None", 12, 12, None, "7e-4", 128, 2, 6, 300, "97.5M"),
    "gpt-705M": ("GPT2", 1536, 3072, 24, 16, None, "2.5e-4", 128, 16, 4, 300, "704.9M"),
    "gpt-j-97M": ("GPTJ", 768, "None", 12, 12, True, "7e-4", 128, 2, 6, 300, "97.3M"),
}


def babyllama(name: str) -> dict[str, Any]:
    kind, width, inner, layers, heads, tied, lr, rows, accumulation, epochs, warmup, _ = BABYLLAMA[name]
    model = {"type": kind, "name": name, "hidden_size": width, "intermediate_size": inner, "n_layer": layers}
    model |= {"n_head": heads} | ({} if tied is None else {"tie_word_embeddings": tied})
    if name in ("gpt-97M", "gpt-j-97M"):
        model |= {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    return {
        "data": {"tokenizer_path": "./models/gpt-clean-16000.json", "train_path": "./data/babylm_10M_clean",
                 "eval_path": "./data/babylm_dev_clean", "seq_length": 128, "eval_samples": 8192},
        "model": model,
        "training": {"lr": lr, "batch_size": rows, "num_epochs": epochs, "gradient_accumulation_steps": accumulation,
                     "warmup_steps": warmup, "fp16": True},
        "logging": {"wandb": False, "project": "babylm-dev", "output_dir": "./models/"},
    }  # fmt: skip


DISTILLATION = {
    "distillation": {"lr": "2.5e-4", "batch_size": 32, "seq_length": 128, "temperature": 2.0, "alpha": 0.5},
    "student": {"name": "Baby-Llama-58M", "hidden_size": 512, "intermediate_size": 1024, "n_layer": 16, "n_head": 8},
    "teachers": ["./models/Llama-360M", "./models/gpt-705M"],
    "logging": {"wandb": True, "project": "babylm", "output_dir": "./models/"},
}
LITGPT = {
    "model_name": "tiny-llama-1.1b", "model_config": None, "out_dir": "out/pretrain/tiny-llama",
    "precision": "bf16-mixed", "initial_checkpoint_dir": None, "resume": False, "data": "TinyLlama",
    "train": {"save_interval": 1000, "log_interval": 1, "global_batch_size": 512, "micro_batch_size": 4,
              "lr_warmup_steps": 2000, "epochs": None, "max_tokens": 3_000_000_000_000, "max_steps": None,
              "max_seq_length": 2048, "tie_embeddings": None, "max_norm": 1.0, "min_lr": 4.0e-5},
    "eval": {"interval": 1000, "max_new_tokens": None, "max_iters": 100, "initial_validation": False},
    "optimizer": {"class_path": "torch.optim.AdamW",
                  "init_args": {"lr": 4e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]}},
    "devices": "auto", "num_nodes": 1, "tokenizer_dir": "checkpoints/llama", "logger_name": "csv", "seed": 42,
}  # fmt: skip
TINYLLAMA = """\
from pathlib import Path
import lightning as L
model_name = "tiny_LLaMA_1b"
name = "tinyllama_1b"
out_dir = Path("out") / name
num_of_devices = 16
global_batch_size = 1024
learning_rate = 4e-4
micro_batch_size = 8
max_step = 715256 * 2
warmup_steps = 2000
eval_iters = 100
weight_decay = 1e-1
min_lr = 4e-5
batch_size = global_batch_size // num_of_devices
gradient_accumulation_steps = batch_size // micro_batch_size
assert gradient_accumulation_steps > 0
warmup_iters = warmup_steps * gradient_accumulation_steps
train_data_config = [("train_slim", 0.693584), ("train_star", 0.306416)]
hparams = {k: v for k, v in locals().items() if isinstance(v, (int, float, str))}
logger = step_csv_logger("out", name)
raise SystemExit("this file is read, not run")
"""


@pytest.fixture
def convert(tmp_path: Path) -> Any:
    """Converts settings (or the text of a script), and parses the output as the trainer does."""

    def run(settings: dict[str, Any] | str, source: str | None = None) -> tuple[RunArgs, str]:
        path = tmp_path / ("theirs.py" if isinstance(settings, str) else "theirs.yaml")
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
        output = tmp_path / "ours.yaml"
        output.unlink(missing_ok=True)
        done = convert_config(path, output, source)
        assert output.read_text() == done.text
        args = parse(["--config", str(output)])
        return args, done.text

    return run


@functools.cache
def shipped(name: str) -> RunArgs:
    return parse(["--config", str(ROOT / "configs" / f"{name}.yaml"), "--data.train", "packed"])


def same_training(args: RunArgs, other: RunArgs) -> None:
    """Length, batch, accumulation, context, rates, decay and schedule are equal."""
    keys = ("max_steps", "max_tokens", "max_epochs", "global_batch_samples", "micro_batch_samples", "block_size")
    assert [getattr(args.train, key) for key in keys] == [getattr(other.train, key) for key in keys]
    assert args.train.clip_norm == other.train.clip_norm
    assert args.optim == other.optim
    assert args.precision == other.precision


def spelled(count: int, like: str) -> str:
    return f"{count / 1e6:.1f}M" if like.endswith("M") else f"{count:,}"


@pytest.mark.parametrize("name", BABYLLAMA)
def test_babyllama(name: str, convert: Any) -> None:
    args, text = convert(babyllama(name))
    kind, *_, lr, rows, accumulation, epochs, warmup, size = BABYLLAMA[name]
    train, optim = args.train, args.optim
    assert (train.global_batch_samples, train.micro_batch_samples) == (rows, rows // accumulation)
    assert (train.max_epochs, train.block_size, train.clip_norm) == (epochs, 128, 1)
    assert (optim.lr, optim.lr_min, optim.warmup_steps, optim.schedule) == (float(lr), 0, warmup, "cosine")
    assert (optim.weight_decay, optim.beta1, optim.beta2, args.precision) == (0, 0.9, 0.999, "bf16")
    config, ours = model_config(args, 16000), MODELS[name]
    dropout = {key: getattr(config, key) for key in ("init", "dropout", "attention_dropout")}
    assert config == dataclasses.replace(ours, **dropout)
    assert dropout["init"] == {"Llama": "normal", "GPT2": "gpt2", "GPTJ": "normal"}[kind]
    rate = 0.1 if name == "gpt-705M" else 0.0  # transformers' default, where the file has none
    assert (config.dropout, config.attention_dropout) == (rate, rate)
    assert spelled(count_parameters(config), size) == size
    assert (args.out_dir, args.eval.max_samples) == (Path("models") / name, 8192)
    assert args.data.train == Path("data/babylm_10M_clean_packed/train")
    assert "--input data/babylm_10M_clean --val_input data/babylm_dev_clean --tokenizer models/gpt-clean" in text
    # Each key that means something else has a comment above its setting, each one left out a reason.
    for setting in ("global_batch_samples", "precision", "max_samples", "train: data"):
        assert re.search(rf"\n *# .+\n *{setting}", text), setting
    assert "#   data.tokenizer_path" in text
    assert ("#   model.intermediate_size 3072" in text) == (name == "gpt-705M")


def test_a_distillation_config(convert: Any) -> None:
    args, text = convert(DISTILLATION)
    other = shipped("distillation")
    same_training(args, other)
    assert args.distillation == dataclasses.replace(other.distillation, teachers=args.distillation.teachers)
    assert [str(teacher.path) for teacher in args.distillation.teachers] == ["models/Llama-360M", "models/gpt-705M"]
    assert count_parameters(model_config(args, 16000)) == 58_343_936
    assert args.log.trackers == ["wandb"] and text.count("missing in the file") == 2


@pytest.mark.parametrize("model", ["gemma2", "llama4", "olmo2"])
def test_babylm2025(model: str, convert: Any) -> None:
    given = {"data_folder": "train_10M", "model": model, "vocab_size": 48000, "seq_length": 128, "batch_size": 16}
    args, text = convert(given | {"epoch": 3, "hidden_size": 768, "num_hidden_layers": 12})
    other = shipped(f"babylm2025/{model}")
    same_training(args, other)
    assert model_config(args, 48000) == model_config(other, 48000) and args.save == other.save
    assert args.train.activation_checkpointing == "full" and "--vocab_size 48000" in text
    small, _ = convert(
        {"model": model, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}, "babylm2025"
    )
    config = model_config(small, 48000)
    assert (config.n_embd, config.n_layer, config.n_head) == (512, 4, 8)


def test_tinyllama_and_litgpt(convert: Any) -> None:
    """TinyLlama's script is read without running it; litgpt's recipe of the same model differs in its batch."""
    args, text = convert(TINYLLAMA)
    other = shipped("tinyllama_1.1B")
    same_training(args, dataclasses.replace(other, train=dataclasses.replace(other.train, block_size=None)))
    assert model_config(args, 32000) == model_config(other, 32000)
    assert (args.out_dir, args.eval.max_samples) == (Path("out/tinyllama_1b"), 800)
    assert "#   train_data_config" in text and "import_tokens.py --input data/redpajama_sample" in text
    args, text = convert(LITGPT)
    assert args.optim == other.optim and args.train.max_tokens == 3 * 10**12
    assert (args.train.global_batch_samples, args.train.micro_batch_samples) == (512, 4)
    assert model_config(args, 32000) == model_config(other, 32000)
    sizes = {
        "name": "stories15M",
        "block_size": 256,
        "padded_vocab_size": 32000,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 288,
    }
    llama = {"rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "mlp_class_name": "LLaMAMLP"}
    train = {"max_seq_length": 256, "tie_embeddings": True, "max_tokens": 1000}
    model = sizes | llama | {"norm_class_name": "RMSNorm", "intermediate_size": 768, "hf_config": {}}
    args, _ = convert({"model_name": "stories15M", "model_config": model, "train": train, "optimizer": "AdamW"})
    assert count_parameters(model_config(args, 32000)) == 15_191_712  # of Karpathy's stories15M
    assert (args.optim.lr, args.optim.weight_decay, args.optim.beta2, args.optim.lr_min) == (1e-3, 0.01, 0.999, 4e-5)


REFUSED = {
    "unknown_key": (
        {"training": {"learning_rate": 1}},
        "has no key training.learning_rate; the nearest is training.lr",
    ),
    "unknown_section": ({"optim": {"lr": 1}}, "has no key optim.lr; the nearest is"),
    "type": ({"model": {"type": "Bert"}}, "model.type Bert is unknown; choose one of Llama, GPT2, GPTJ"),
    "number": ({"training": {"lr": "fast"}}, "training.lr 'fast' must be a number"),
    "negative": ({"training": {"num_epochs": -1}}, "--train.max_epochs -1.0 must be positive"),
    "heads": ({"model": {"n_head": 5}}, "n_head 5 does not divide n_embd 192"),
    "zero_heads": ({"model": {"n_head": 0}}, "n_head is 0; it must be a positive whole number"),
    "accumulation": ({"training": {"gradient_accumulation_steps": 5}}, "must divide training.batch_size 32"),
    "missing": ({"model": {"n_layer": None}}, "model.n_layer is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    settings = babyllama("llama-10M")
    for section, values in change.items():
        settings[section] = settings.get(section, {}) | values
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        convert_config(path, tmp_path / "ours.yaml")
    assert str(path) in str(error.value) and not (tmp_path / "ours.yaml").exists()


def test_the_script_refuses(tmp_path: Path) -> None:
    path, output = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    for text, message in {
        "[1, 2": "is not valid YAML",
        "- 1": "holds no settings",
        "what: 1": "do not show which trainer it is for; give --from babyllama|babylm2025|tinyllama|litgpt",
    }.items():
        path.write_text(text)
        assert message in script_error("convert_config.py", path, "--output", output)
    for own in sorted((ROOT / "configs").rglob("*.yaml")):
        with pytest.raises(ValueError, match="is a config of this project already: .*--config"):
            recognize(own, flat(read_settings(own)))
    path.write_text(
        json.dumps({"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "head_dim": 2, "use_cache": True})
    )
    assert f"{path} was not recognized: " in script_error("convert_config.py", path, "--output", output)
    chosen = script_error("convert_config.py", path, "--output", output, "--from", "litgpt")
    assert chosen.endswith("litgpt has no key model_type; the nearest is model_name\n")
    path.write_text("zzzz: 1")
    assert script_error("convert_config.py", path, "--output", output, "--from", "litgpt").endswith("no key zzzz\n")
    path.write_text(yaml.safe_dump(babyllama("llama-10M")))
    assert "BabyLM2025 has no key data.eval_path" in script_error(
        "convert_config.py", path, "--output", output, "--from", "babylm2025"
    )
    output.touch()
    assert f"--output {output} exists already" in script_error("convert_config.py", path, "--output", output)
    assert "no_such" in script_error("convert_config.py", tmp_path / "no_such.yaml", "--output", tmp_path / "b.yaml")
    wrong = script("convert_config.py", path, "--output", tmp_path / "b.yaml", "--from", "nanogpt").stderr
    assert all(name in wrong for name in FORMATS)


def test_a_converted_config_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The printed command, unchanged: BabyLlama's GPT-2 with its dropout, at a small size, for two steps."""
    settings = babyllama("gpt-705M")
    settings["model"] |= {"hidden_size": 32, "n_layer": 2, "n_head": 2}
    settings["training"] |= {"batch_size": 4, "gradient_accumulation_steps": 2, "warmup_steps": 1}
    settings["data"] |= {"seq_length": 64, "eval_samples": 4}
    monkeypatch.chdir(tmp_path)
    Path("theirs.yaml").write_text(yaml.safe_dump(settings))
    write_dataset(tmp_path / "data/babylm_10M_clean_packed/train", [127] * 2)
    write_dataset(tmp_path / "data/babylm_10M_clean_packed/val", [127] * 2, seed=1)
    done = script("convert_config.py", "theirs.yaml", "--output", "ours.yaml")
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1].split()
    assert command == ["python", "pretrain/fabric_train.py", "--config", "ours.yaml"]
    assert fabric_train.main(command[2:]) == 0
    assert [int(path.name[5:13]) for path in list_checkpoints(tmp_path / "models/gpt-705M")] == [4]


def test_nested_is_the_inverse_of_flat() -> None:
    settings = {"seed": 1, "train.max_steps": 3, "train.clip_norm": 1.0}
    assert flat(nested(settings)) == settings
