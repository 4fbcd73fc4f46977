"""The keys of other trainers' configs, and our settings with the same effect.

Meanings were read from their sources: train.py and distill-ensemble-pretraining-baby-llama.py (BabyLlama),
pretrain/tinyllama.py (TinyLlama), litgpt/pretrain.py and litgpt/args.py (litgpt); for BabyLM2025 from its README.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_model.config import ModelConfig
from lit_model.legacy import config_by_name, config_from_litgpt
from lit_model.registry import MODELS, get_config

# --- Values ----------------------------------------------------------------------------------------------------------


def number(value: Any) -> float:
    """A number; YAML 1.1 reads 3e-4 as text."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return float(value)


def whole(value: Any) -> int:
    """A whole number, also written as 1e6."""
    if number(value) != int(number(value)):
        raise ValueError("must be a whole number")
    return int(number(value))


def switch(value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise ValueError("must be true or false")
    return str(value).lower() == "true"


def path_text(value: Any) -> str:
    """A path, without a leading `./`."""
    return str(Path(str(value)))


@dataclass(frozen=True)
class Key:
    """One of their keys: copied to our setting `ours` (`note`: how its meaning differs), or left out for `reason`; with
    neither it is combined with other keys by the format's function."""

    ours: str = ""
    kind: Callable[[Any], Any] = str
    note: str = ""
    reason: str = ""


COMBINED = Key()


def left_out(reason: str) -> Key:
    return Key(reason=reason)


class Source:
    """The settings of their file: `raw` as nested dictionaries, `values` by dotted key. None and "None" are absent."""

    def __init__(self, raw: dict[str, Any], values: dict[str, Any]) -> None:
        self.raw = raw
        self.values = {key: value for key, value in values.items() if value not in (None, "None", "")}

    def get(self, key: str, kind: Callable[[Any], Any], default: Any = None) -> Any:
        """The value, checked. Raises ValueError naming the key."""
        if key not in self.values:
            return default
        try:
            return kind(self.values[key])
        except (ValueError, TypeError, OverflowError) as error:
            reason = str(error) if str(error).startswith("must") else "must be a number"
            raise ValueError(f"{key} {self.values[key]!r} {reason}") from error

    def need(self, key: str, kind: Callable[[Any], Any]) -> Any:
        if key not in self.values:
            raise ValueError(f"{key} is missing")
        return self.get(key, kind)

    def choice(self, key: str, choices: Mapping[str, Any], default: str | None = None) -> Any:
        value = self.get(key, str, default)
        if value not in choices:
            raise ValueError(f"{key} {value} is unknown; choose one of {', '.join(choices)}")
        return choices[value]


@dataclass
class Converted:
    """Our settings by dotted name, comments on them, their keys left out, and the commands that prepare the data."""

    settings: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def set(self, ours: str, value: Any, note: str = "") -> None:
        """Give a setting, unless it has been given already."""
        if ours not in self.settings and value is not None:
            self.settings[ours] = value
            self.notes[ours] = [note] if note else []

    def leave_out(self, key: str, value: Any, reason: str) -> None:
        self.left_out.append(f"{key} {value}: {reason}")

    def prepare(self, script: str, **flags: Any) -> None:
        given = " ".join(f"--{flag} {shlex.quote(str(value))}" for flag, value in flags.items() if value is not None)
        self.commands.append(f"python scripts/{script}.py {given}")

    def set_model(self, config: ModelConfig, block_size: int) -> None:
        """The name of a registered model if it has these sizes, else every field that is not a Llama's default."""
        kept = ("vocab_size", "padding_multiple", "padded_vocab_size", "name", "family", "block_size")
        free = ("dropout", "attention_dropout", "init")
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in kept}
        for name, registered in sorted(MODELS.items(), key=lambda item: item[0] != config.name):
            same = all(getattr(registered, key) == value for key, value in fields.items() if key not in free)
            if same and registered.block_size >= block_size:
                note = "its sizes are those of the registered model"
                if config.position_embedding == "learned" and registered.block_size != block_size:
                    note += f", which has {registered.block_size} learned positions, as the original repository"
                self.set("model.name", name, note)
                for key in free:
                    if fields[key] != getattr(registered, key):
                        self.set(f"model.{key}", fields[key])
                return
        sizes = {key: fields[key] for key in ("n_layer", "n_head", "n_embd", "intermediate_size")}
        plain = ModelConfig(**sizes)
        for key, value in fields.items():
            if value != getattr(plain, key) or key in sizes:
                nested = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
                self.set(f"model.{key}", list(nested) if isinstance(nested, tuple) else nested)


@dataclass(frozen=True)
class Format:
    """The configs of one trainer: its keys (`a.*`: a and any key below it) and the function that sets what they decide
    together, and what the trainer fixes."""

    title: str
    keys: Mapping[str, Key]
    combine: Callable[[Source, Converted], None]

    def rule(self, key: str) -> Key | None:
        if key in self.keys:
            return self.keys[key]
        parents = (key[:i] + ".*" for i in range(len(key) + 1) if key[i : i + 1] in (".", ""))
        return next((self.keys[parent] for parent in parents if parent in self.keys), None)

    def knows(self, key: str) -> bool:
        return self.rule(key) is not None

    def convert(self, source: Source) -> Converted:
        """Our settings for all keys of a file, which must be known."""
        out = Converted()
        for key in source.values:
            rule = self.rule(key)
            assert rule is not None, key
            if rule.reason:
                out.leave_out(key, source.values[key], rule.reason)
            elif rule.ours:
                out.set(rule.ours, source.get(key, rule.kind), rule.note)
        self.combine(source, out)
        return out


# --- BabyLlama -------------------------------------------------------------------------------------------------------

_IGNORED = "train.py ignores it and uses"
_AT_EPOCHS = f"{_IGNORED} the end of each epoch"
_BABYLLAMA: dict[str, Key] = {
    "data.tokenizer_path": left_out("for prepare_data.py; the packed data names its tokenizer"),
    "data.train_path": COMBINED,
    "data.eval_path": COMBINED,
    "data.seq_length": Key("train.block_size", whole),
    "data.eval_samples": Key("eval.max_samples", whole, "the first rows of the validation data; theirs are random"),
    **dict.fromkeys((f"model.{key}" for key in ("type", "name", "hidden_size", "intermediate_size", "n_layer", "n_head",
                     "tie_word_embeddings", "resid_pdrop", "embd_pdrop", "attn_pdrop")), COMBINED),
    "training.lr": Key("optim.lr", number),
    **dict.fromkeys(("training.batch_size", "training.gradient_accumulation_steps"), COMBINED),
    "training.num_epochs": Key("train.max_epochs", number),
    "training.warmup_steps": Key("optim.warmup_steps", whole),
    "training.fp16": COMBINED,
    "training.bf16": COMBINED,
    "training.torch_compile": Key("compile", switch),
    "training.save_steps": Key("save.every_steps", whole, _AT_EPOCHS),
    "training.eval_steps": Key("eval.every_steps", whole, _AT_EPOCHS),
    "training.logging_steps": Key("log.every_steps", whole, f"{_IGNORED} 20"),
    "training.dataloader_num_workers": left_out("one thread reads ahead: --data.prefetch_steps"),
    "optimization.weight_decay": Key("optim.weight_decay", number, f"{_IGNORED} 0"),
    "optimization.adam_beta1": Key("optim.beta1", number),
    "optimization.adam_beta2": Key("optim.beta2", number, f"{_IGNORED} 0.999"),
    "optimization.adam_epsilon": Key("optim.eps", number),
    "optimization.max_grad_norm": Key("train.clip_norm", number),
    "logging.wandb": COMBINED,
    "logging.project": Key("log.project"),
    "logging.run_name": Key("log.run_name"),
    "logging.output_dir": COMBINED,
    **{f"distillation.{key}": rule for key, rule in {
        "lr": Key("optim.lr", number),
        "batch_size": COMBINED,
        "seq_length": Key("train.block_size", whole),
        "temperature": Key("distillation.temperature", number),
        "alpha": Key("distillation.alpha", number),
        "num_epochs": Key("train.max_epochs", number),
        "warmup_steps": Key("optim.warmup_steps", whole),
    }.items()},
    **dict.fromkeys((f"student.{key}" for key in ("name", "hidden_size", "intermediate_size", "n_layer", "n_head")),
                    COMBINED),
    "teachers": COMBINED,
}  # fmt: skip


def _babyllama(source: Source, out: Converted) -> None:
    distills = any(key == "teachers" or key.startswith(("student.", "distillation.")) for key in source.values)
    part = "student" if distills else "model"
    _packed(source.get("data.train_path", path_text), source.get("data.eval_path", path_text), source, out)
    name = source.get(f"{part}.name", str, "model")
    out.set("out_dir", path_text(Path(source.get("logging.output_dir", str, "models")) / name))
    block_size = source.need("distillation.seq_length" if distills else "data.seq_length", whole)
    _babyllama_model(source, out, part, block_size)
    if distills:
        _distillation(source, out)
    else:
        _babyllama_batch(source, out)
    half = source.get("training.fp16", switch, not source.get("training.bf16", switch, False))
    if half or source.get("training.bf16", switch, False):
        out.set("precision", "bf16", "theirs: fp16; bf16 needs no loss scale (fp16 works too, on CUDA)" if half else "")
    if source.get("logging.wandb", switch, False):
        out.set("log.trackers", ["wandb"])
    out.set("log.every_steps", 20, "fixed in their train.py")
    out.set("optim.schedule", "cosine", "fixed in their train.py: warm-up, then a cosine to 0")
    out.set("optim.lr_min", 0.0)
    unset = "theirs is transformers' default"
    out.set("optim.weight_decay", 0.1 if distills else 0.0, "fixed in their script" if distills else unset)
    out.set("optim.beta1", 0.9)
    out.set("optim.beta2", 0.999, unset)
    out.set("train.clip_norm", 1.0, unset)


def _packed(train: str | None, evaluation: str | None, source: Source, out: Converted) -> None:
    """Text folders -> packed datasets, and the command that makes them."""
    if train is None:
        out.set("data.train", "data/train", "the file names no data")
        out.set("data.val", "data/val")
        return
    packed = f"{train}_packed"
    tokenizer = source.get("data.tokenizer_path", path_text, "tokenizer")
    split = {"val_input": evaluation} if evaluation else {"val_fraction": 0.01}
    out.prepare("prepare_data", input=train, **split, tokenizer=tokenizer, output=packed)
    out.set("data.train", f"{packed}/train", f"packed tokens of {train}, made by the command above")
    out.set("data.val", f"{packed}/val", f"packed tokens of {evaluation or train}")


def _babyllama_model(source: Source, out: Converted, part: str, block_size: int) -> None:
    width, heads = source.need(f"{part}.hidden_size", whole), source.need(f"{part}.n_head", whole)
    sizes: dict[str, Any] = {"n_layer": source.need(f"{part}.n_layer", whole), "n_head": heads, "n_embd": width}
    likes = {"Llama": "llama-10M", "GPT2": "gpt-97M", "GPTJ": "gpt-j-97M"}
    like = source.choice(f"{part}.type", likes, "Llama")
    inner = source.get(f"{part}.intermediate_size", whole)
    if like == "llama-10M":
        tied = source.get(f"{part}.tie_word_embeddings", switch, False)
        sizes |= {"intermediate_size": source.need(f"{part}.intermediate_size", whole), "init": "normal"}
    else:
        tied = source.get(f"{part}.tie_word_embeddings", switch, True) or like == "gpt-97M"
        sizes["intermediate_size"] = 4 * width
        if inner not in (None, 4 * width):
            out.leave_out(
                f"{part}.intermediate_size", inner, f"theirs is always 4 x hidden_size for this type, {4 * width}"
            )
    if like == "gpt-j-97M" and heads > 0 and width // heads < 64:
        raise ValueError(f"{part}.type GPTJ rotates 64 dimensions, but a head has {width // heads}")
    config = get_config(like, **sizes, tie_embeddings=tied, block_size=max(block_size, 1))
    if like != "llama-10M":
        residual, attention = _dropout(source, out)
        config = dataclasses.replace(config, dropout=residual, attention_dropout=attention)
    out.set_model(config, block_size)
    if config.attention_dropout:
        note = "theirs; it rules out most attention kernels (docs/attention.md): consider 0"
        out.notes["model.attention_dropout"] = [note]


def _dropout(source: Source, out: Converted) -> tuple[float, float]:
    """Rates of the residual branches (ours: of the embedding too) and of attention. Absent: transformers' default."""
    residual, embedding, attention = (
        source.get(f"model.{key}", number, 0.1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    )
    if embedding != residual:
        out.leave_out("model.embd_pdrop", embedding, f"ours has one rate, --model.dropout {residual}, from resid_pdrop")
    return residual, attention


def _babyllama_batch(source: Source, out: Converted) -> None:
    rows, accumulation = (
        source.need("training.batch_size", whole),
        source.need("training.gradient_accumulation_steps", whole),
    )
    if accumulation < 1 or rows % accumulation:
        raise ValueError(f"training.gradient_accumulation_steps {accumulation} must divide training.batch_size {rows}")
    whole_step = "rows of a whole step, over all GPUs. Their comments call batch_size per device, but train.py divides"
    out.set("train.global_batch_samples", rows, whole_step)
    out.notes["train.global_batch_samples"].append(
        "it by gradient_accumulation_steps; on N GPUs their step has N times as many rows"
    )
    out.set("train.micro_batch_samples", rows // accumulation, f"batch_size {rows} / accumulation {accumulation}")


def _distillation(source: Source, out: Converted) -> None:
    teachers = source.need("teachers", lambda value: value)
    if not isinstance(teachers, list) or not teachers:
        raise ValueError(f"teachers {teachers!r} must be a list of folders")
    rows = source.need("distillation.batch_size", whole)
    out.set("objective", "distillation")
    out.set("distillation.teachers", [{"path": path_text(teacher)} for teacher in teachers],
            "run folders or Hugging Face folders, all with the tokenizer of the data")  # fmt: skip
    out.set("distillation.reduction", "babyllama", "their KL sums over a row's tokens; per_token is the usual mean")
    out.set("distillation.temperature", 2.0, "default of the BabyLlama paper")
    out.set("distillation.alpha", 0.5, "default of the BabyLlama paper")
    out.set("train.max_epochs", 6, "missing in the file, although their script needs it; the paper's value")
    out.set("optim.warmup_steps", 200, "missing in the file, although their script needs it; the paper's value")
    out.set("train.global_batch_samples", rows)
    out.set("train.micro_batch_samples", rows)


# --- BabyLM2025 ------------------------------------------------------------------------------------------------------

_BABYLM2025 = {
    "data_folder": COMBINED,
    "model": COMBINED,
    "vocab_size": left_out("the vocabulary is the data's; train_tokenizer.py has --vocab_size"),
    "seq_length": COMBINED,
    "batch_size": COMBINED,
    "epoch": Key("train.max_epochs", number),
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), COMBINED),
}


def _babylm2025(source: Source, out: Converted) -> None:
    name = source.choice("model", {key: f"babylm-{key}" for key in ("gemma2", "llama4", "olmo2")}, "llama4")
    folder = source.get("data_folder", path_text, "train_10M")
    text = f"data/{folder}"
    vocabulary = source.get("vocab_size", whole, 48000)
    out.prepare("train_tokenizer", input=text, vocab_size=vocabulary, output="data/tokenizer")
    out.prepare("prepare_data", input=text, val_input="data/dev", cleaner="babylm", tokenizer="data/tokenizer",
                output=f"{text}_packed")  # fmt: skip
    out.set("data.train", f"{text}_packed/train", f"packed tokens of {text}, made by the commands above")
    out.set("data.val", f"{text}_packed/val")
    sizes = {
        ours: source.get(theirs, whole)
        for theirs, ours in {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
        }.items()
        if theirs in source.values
    }
    like = MODELS[name]
    if like.head_size * like.n_head != like.n_embd:  # Gemma 2's heads do not follow from its width
        sizes["head_size"] = like.head_size
    block_size = source.get("seq_length", whole, 128)
    out.set_model(get_config(name, **sizes, block_size=max(block_size, like.block_size)), block_size)
    out.set("out_dir", f"models/{source.get('model', str, 'llama4')}_{folder}")
    out.set("train.block_size", block_size)
    rows = source.get("batch_size", whole, 16)
    out.set("train.global_batch_samples", rows, "rows of a whole step, over all GPUs")
    out.set("train.micro_batch_samples", rows)
    out.set("train.max_epochs", 3.0, "the default of --epoch")
    fixed = "fixed in the original"
    out.set("train.activation_checkpointing", "full", f"{fixed}, to save memory; none is faster")
    out.set("precision", "bf16", "theirs: fp16; bf16 needs no loss scale (fp16 works too, on CUDA)")
    for key, value in {"lr": 5e-4, "warmup_steps": 500, "schedule": "linear", "weight_decay": 0.01}.items():
        out.set(f"optim.{key}", value, fixed if key == "lr" else "")
    out.set("optim.beta2", 0.999, "theirs is transformers' default")
    out.set("save.every_steps", 500)
    out.set("save.keep_last", 3)


# --- TinyLlama and LLäMmlein -----------------------------------------------------------------------------------------

_DERIVED = left_out("computed from the others")
_ALL_MATRICES = "on matrices only; theirs decays the norms' weights too"
_TINYLLAMA = {
    "model_name": COMBINED,
    "name": COMBINED,
    "out_dir": COMBINED,
    "num_of_devices": left_out("--devices; its default takes all GPUs"),
    "global_batch_size": Key("train.global_batch_samples", whole, "rows of a whole step, over all GPUs; theirs is "
                             "divided by num_of_devices, so that on N nodes a step has N times as many"),
    "learning_rate": Key("optim.lr", number),
    "micro_batch_size": Key("train.micro_batch_samples", whole),
    "max_step": Key("train.max_steps", whole),
    "warmup_steps": Key("optim.warmup_steps", whole),
    "log_step_interval": Key("log.every_steps", whole),
    "eval_iters": COMBINED,
    "save_step_interval": Key("save.every_steps", whole),
    "eval_step_interval": Key("eval.every_steps", whole),
    "weight_decay": Key("optim.weight_decay", number, _ALL_MATRICES),
    "beta1": Key("optim.beta1", number),
    "beta2": Key("optim.beta2", number),
    "grad_clip": Key("train.clip_norm", number),
    "decay_lr": COMBINED,
    "min_lr": Key("optim.lr_min", number),
    "sharding_strategy": COMBINED,
    "state_dict_type": Key("save.state_dict_type"),
    "train_data_dir": COMBINED,
    "val_data_dir": COMBINED,
    "tokenizer_path": left_out("for import_tokens.py; the packed data names its tokenizer"),
    "train_data_config": left_out("import each prefix as a dataset, and give the weights to data.mixture"),
    "val_data_config": left_out("import each prefix as a dataset, and name them in data.val"),
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "warmup_iters", "max_iters", "lr_decay_iters",
                     "log_iter_interval"), _DERIVED),
}  # fmt: skip
# Where the file lacks a key: the constants of pretrain/tinyllama.py.
_TINYLLAMA_DEFAULTS: dict[str, Any] = {
    "train.global_batch_samples": 512, "optim.lr": 4e-4, "train.micro_batch_samples": 8, "train.max_steps": 1430512,
    "optim.warmup_steps": 2000, "log.every_steps": 10, "save.every_steps": 5000, "eval.every_steps": 5000,
    "optim.weight_decay": 0.1, "optim.beta1": 0.9, "optim.beta2": 0.95, "train.clip_norm": 1.0, "optim.lr_min": 4e-5,
}  # fmt: skip


def _tinyllama(source: Source, out: Converted) -> None:
    config = config_by_name(source.get("model_name", str, "tiny_LLaMA_1b"), 0)
    out.set_model(config, config.block_size)
    out.set("out_dir", source.get("out_dir", path_text, f"out/{source.get('name', str, 'tinyllama_1b')}"))
    for key, value in _TINYLLAMA_DEFAULTS.items():
        out.set(key, value)
    if not source.get("decay_lr", switch, True):
        out.set("optim.schedule", "constant")
    _imported(source.get("train_data_dir", path_text, "data/redpajama_sample"), source, out)
    if source.get("val_data_dir", path_text):
        out.commands.append(
            _import_command(source.get("val_data_dir", path_text), source.get("tokenizer_path", path_text, "tokenizer"))
        )
        out.set("data.val", f"{source.get('val_data_dir', path_text)}_packed")
    _eval_rows(source.get("eval_iters", whole, 100), out)
    if sharding := source.get("sharding_strategy", str):
        out.set("strategy", "fsdp")
        out.set("sharding_strategy", sharding)
    out.set("precision", "bf16", "weights stay in fp32")


def _imported(folder: str, source: Source, out: Converted) -> None:
    out.commands.append(_import_command(folder, source.get("tokenizer_path", path_text, "tokenizer")))
    out.set("data.train", f"{folder}_packed", f"the tokens of {folder}, imported by the command above")


def _import_command(folder: str, tokenizer: str) -> str:
    out = Converted()
    out.prepare("import_tokens", input=folder, tokenizer=tokenizer, output=f"{folder}_packed")
    return out.commands[0]


def _eval_rows(batches: int, out: Converted) -> None:
    rows = batches * int(out.settings["train.micro_batch_samples"])
    out.set("eval.max_samples", rows, f"{batches} micro-batches, over all GPUs; theirs are {batches} on each GPU")


# --- litgpt ----------------------------------------------------------------------------------------------------------

_LITGPT = {
    "model_name": COMBINED,
    "model_config.*": COMBINED,
    "model.*": COMBINED,
    "out_dir": Key("out_dir", path_text),
    "precision": COMBINED,
    "initial_checkpoint_dir": COMBINED,
    "resume": left_out("a flag of the command: --resume latest, or auto"),
    "data": left_out("pack the text with prepare_data.py and name it in data.train"),
    "data.*": left_out("pack the text with prepare_data.py and name it in data.train"),
    "train.save_interval": Key("save.every_steps", whole),
    "train.log_interval": Key("log.every_steps", whole),
    "train.global_batch_size": Key("train.global_batch_samples", whole),
    "train.micro_batch_size": Key("train.micro_batch_samples", whole),
    "train.lr_warmup_steps": Key("optim.warmup_steps", whole),
    "train.lr_warmup_fraction": Key("optim.warmup_fraction", number, "of the run; theirs is of an epoch"),
    **dict.fromkeys(("train.epochs", "train.max_tokens", "train.max_steps"), COMBINED),
    "train.max_time": Key("stop.after_minutes", lambda seconds: number(seconds) / 60, "theirs is in seconds"),
    "train.max_seq_length": Key("train.block_size", whole),
    "train.tie_embeddings": Key("model.tie_embeddings", switch),
    "train.max_norm": Key("train.clip_norm", number),
    "train.min_lr": Key("optim.lr_min", number),
    "train.learning_rate": Key("optim.lr", number),
    "train.weight_decay": Key("optim.weight_decay", number, _ALL_MATRICES),
    "train.beta1": Key("optim.beta1", number),
    "train.beta2": Key("optim.beta2", number),
    "eval.interval": Key("eval.every_steps", whole),
    "eval.max_iters": COMBINED,
    "eval.max_new_tokens": left_out("--eval.prompts and --eval.sample_tokens write samples during training"),
    "eval.evaluate_example": left_out("--eval.prompts names a file of prompts"),
    "eval.initial_validation": left_out("every run validates at step 0"),
    "eval.final_validation": left_out("every run validates at its last step"),
    "optimizer": COMBINED,
    "optimizer.class_path": COMBINED,
    "optimizer.init_args.lr": Key("optim.lr", number),
    "optimizer.init_args.weight_decay": Key("optim.weight_decay", number, _ALL_MATRICES),
    "optimizer.init_args.betas": COMBINED,
    "optimizer.init_args.eps": Key("optim.eps", number),
    "optimizer.init_args.fused": left_out("chosen by the device"),
    "devices": COMBINED,
    "num_nodes": Key("num_nodes", whole),
    "tokenizer_dir": left_out("for prepare_data.py; the packed data names its tokenizer"),
    "logger_name": COMBINED,
    "log.project": Key("log.project"),
    "log.run": Key("log.run_name"),
    "log.*": left_out("it has no counterpart"),
    "seed": Key("seed", whole, "the order of the data and the initialization differ from theirs all the same"),
}  # fmt: skip
# Where the file lacks a key: the defaults of `litgpt pretrain`; of the optimizer, those of torch.optim.AdamW.
_LITGPT_DEFAULTS: dict[str, Any] = {
    "out_dir": "out/pretrain", "train.global_batch_samples": 512, "train.micro_batch_samples": 4,
    "save.every_steps": 1000, "log.every_steps": 1, "train.clip_norm": 1.0, "optim.lr_min": 4e-5,
    "eval.every_steps": 1000, "optim.lr": 1e-3, "optim.weight_decay": 0.01, "optim.beta1": 0.9, "optim.beta2": 0.999,
}  # fmt: skip
_LITGPT_PRECISION = {
    "bf16-mixed": ("bf16", ""),
    "bf16-true": ("bf16", "weights and optimizer state stay in fp32; theirs are bf16 too"),
    "32-true": ("fp32", ""),
    "16-mixed": ("fp16", ""),
}


def _litgpt(source: Source, out: Converted) -> None:
    if "optimizer.init_args.betas" in source.values:
        betas = source.values["optimizer.init_args.betas"]
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise ValueError(f"optimizer.init_args.betas {betas!r} must be two numbers")
        out.set("optim.beta1", number(betas[0]))
        out.set("optim.beta2", number(betas[1]))
    optimizer = source.get("optimizer.class_path", str, source.get("optimizer", str, "AdamW"))
    if optimizer.rpartition(".")[2] != "AdamW":
        raise ValueError(f"optimizer {optimizer} is not among ours; use AdamW, and --optim.name muon here")
    if "optim.warmup_fraction" not in out.settings:
        out.set("optim.warmup_steps", 2000, "the default of litgpt pretrain")
    for key, value in _LITGPT_DEFAULTS.items():
        out.set(key, value)
    out.notes["optim.weight_decay"] = [_ALL_MATRICES]
    _litgpt_length(source, out)
    _litgpt_model(source, out)
    precision, note = source.choice("precision", _LITGPT_PRECISION, "bf16-true")
    out.set("precision", precision, note)
    devices = source.get("devices", str, "auto")
    out.set("devices", devices if devices == "auto" else source.get("devices", whole))
    if devices not in ("auto", "1") or source.get("num_nodes", whole, 1) > 1:
        out.set("strategy", "fsdp", "as in litgpt; ddp is faster where the model fits (docs/parallelism.md)")
        out.set("sharding_strategy", "HYBRID_SHARD")
    trackers = {"csv": [], "tensorboard": ["tensorboard"], "wandb": ["wandb"]}
    out.set("log.trackers", source.choice("logger_name", trackers, "tensorboard"))
    out.set("compile", True, "litgpt always compiles")
    out.set("data.train", "data/packed/train", "the packed data, made by the command above")
    out.set("data.val", "data/packed/val")
    out.prepare("prepare_data", input="text/", val_fraction=0.01, output="data/packed",
                tokenizer=source.get("tokenizer_dir", path_text, "tokenizer"))  # fmt: skip
    _eval_rows(source.get("eval.max_iters", whole, 100), out)


def _litgpt_length(source: Source, out: Converted) -> None:
    """Exactly one run length; litgpt pretrain itself only reads max_tokens."""
    lengths = {
        "train.max_steps": "train.max_steps",
        "train.epochs": "train.max_epochs",
        "train.max_tokens": "train.max_tokens",
    }
    given = [key for key in lengths if key in source.values]
    if not given:
        out.set("train.max_tokens", 3 * 10**12, "the default of litgpt pretrain")
        return
    out.set(lengths[given[0]], source.get(given[0], whole))
    for key in given[1:]:
        out.leave_out(key, source.values[key], f"a run has one length, here {given[0]}")


def _litgpt_model(source: Source, out: Converted) -> None:
    if folder := source.get("initial_checkpoint_dir", path_text):
        out.commands.append(f"python scripts/convert_legacy.py {shlex.quote(folder)} {shlex.quote(folder + '.pth')}")
        out.set(
            "init_from", f"{folder}.pth", "its weights, converted by the command above; it decides the model's sizes"
        )
        return
    section = next((key for key in ("model_config", "model") if isinstance(source.raw.get(key), dict)), None)
    name = source.get("model_name", str)
    if section is not None:
        fields = {"norm_class_name": "RMSNorm", **{k: v for k, v in source.raw[section].items() if v is not None}}
        fields.setdefault("vocab_size", fields.get("padded_vocab_size"))
        try:
            config = config_from_litgpt({k: v for k, v in fields.items() if v is not None})
        except ValueError as error:
            raise ValueError(f"{section}: {error}") from error
    elif name in ("tiny-llama-1.1b", "tiny-llama-1.1b-chat"):
        config = MODELS["TinyLlama_1.1B"]
    elif name in MODELS:
        config = MODELS[name]
    else:
        raise ValueError(
            f"model_name {name} is not a model of ours; give its sizes as model_config, as in the "
            "model_config.yaml that litgpt saves beside a checkpoint"
        )
    tied = out.settings.pop("model.tie_embeddings", None)
    config = config if tied is None else dataclasses.replace(config, tie_embeddings=tied)
    block_size = source.get("train.max_seq_length", whole, config.block_size)
    out.set_model(config, block_size)
    out.set("train.block_size", block_size)


FORMATS: dict[str, Format] = {
    "babyllama": Format("BabyLlama", _BABYLLAMA, _babyllama),
    "babylm2025": Format("BabyLM2025", _BABYLM2025, _babylm2025),
    "tinyllama": Format("TinyLlama or LLäMmlein", _TINYLLAMA, _tinyllama),
    "litgpt": Format("litgpt", _LITGPT, _litgpt),
}
