"""Splits the trainer's command line and resolves mutually exclusive settings.

Flags override configs, regardless of their position, and a later --config overrides an earlier one. A later choice
drops earlier settings that conflict with it. Two conflicting settings from one source, for example two flags, are kept,
and rejected by the classes of pretrain/args.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_files.near_names import did_you_mean_file
from lit_files.reading import read_text
from lit_model.registry import MODELS
from pretrain.args import LIVE_TEACHERS_ONLY, SHARDED_ONLY, ModelArgs, RunArgs, flat
from pretrain.cli.command_line import spell_switches
from pretrain.cli.fields import flags_of, without_none

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SWITCHES = {f"--{flag.name}" for flag in flags_of(RunArgs) if without_none(flag.kind) == (bool,)}
MAX_CONFIG_VALUES = 100_000  # in a config

LIVE_TEACHERS = tuple(f"distillation.{name}" for name in ("teachers", *LIVE_TEACHERS_ONLY))
SHARDED = (*(f"train.{name}" for name in SHARDED_ONLY), "distillation.shard_teachers")
SIZES = tuple(
    f"model.{field.name}"
    for field in dataclasses.fields(ModelArgs)
    if field.name not in ("name", "vocab_size", "padding_multiple", "dropout", "attention_dropout")
)


def is_set(value: Any) -> bool:
    return value not in (None, False, 0, [], "")


# (setting, whether a value of it is a choice, the settings that choice replaces)
RULES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("train.max_steps", is_set, ("train.max_tokens", "train.max_epochs")),
    ("train.max_tokens", is_set, ("train.max_steps", "train.max_epochs")),
    ("train.max_epochs", is_set, ("train.max_steps", "train.max_tokens")),
    ("data.train", is_set, ("data.mixture", "data.phases", "data.synthetic.tokens")),
    ("data.mixture", is_set, ("data.train", "data.synthetic.tokens")),
    ("data.synthetic.tokens", is_set, ("data.train", "data.val", "data.mixture", "data.phases")),
    ("optim.warmup_steps", lambda v: v is not None, ("optim.warmup_fraction",)),
    ("optim.warmup_fraction", lambda v: v is not None, ("optim.warmup_steps",)),
    ("optim.decay_steps", is_set, ("optim.decay_fraction",)),
    ("optim.decay_fraction", is_set, ("optim.decay_steps",)),
    ("optim.schedule", lambda v: v != "wsd", ("optim.decay_steps", "optim.decay_fraction", "optim.decay_shape")),
    ("optim.name", lambda v: v != "muon", ("optim.momentum",)),
    ("model.name", is_set, ("init_from", "init_optimizer", "init_layers", *SIZES)),
    ("init_from", is_set, ("model.name", "model.vocab_size", "model.padding_multiple", *SIZES)),
    ("init_optimizer", is_set, ("init_layers",)),
    ("init_layers", is_set, ("init_optimizer",)),
    ("objective", lambda v: v == "cross_entropy", ("distillation.cache", *LIVE_TEACHERS)),
    ("distillation.teachers", is_set, ("distillation.cache",)),
    ("distillation.cache", is_set, LIVE_TEACHERS),
    ("distillation.divergence", lambda v: v != "topk_kl", ("distillation.top_k",)),
    ("distillation.teacher_device", is_set, ("distillation.shard_teachers",)),
    ("distillation.shard_teachers", is_set, ("distillation.teacher_device",)),
    ("strategy", lambda v: v != "fsdp", SHARDED),
    ("sharding_strategy", lambda v: v == "NO_SHARD", SHARDED),
)


@dataclass(frozen=True, eq=False)
class Layer:
    """Settings from one source, by dotted name: a config, or (`config` None) the flags."""

    config: str | None
    values: Mapping[str, Any]

    def show(self, key: str) -> str:
        return f"--{key}" if self.config is None else f"{key} of {self.config}"


@dataclass(frozen=True)
class Replaced:
    """A setting in `old` that was replaced by the choice of `key` in `new`."""

    new: Layer
    key: str
    old: Layer
    other: str


def replaced(layers: Sequence[Layer]) -> list[Replaced]:
    """The settings of earlier layers that choices in later ones replace."""
    live: dict[str, Layer] = {}
    gone: dict[str, Replaced] = {}
    for layer in layers:
        for key in layer.values:
            live[key] = layer
            gone.pop(key, None)
        for key, chooses, rivals in RULES:
            if key in layer.values and chooses(layer.values[key]):
                for other in rivals:
                    if other in live and live[other] is not layer and is_set(live[other].values[other]):
                        gone[other] = Replaced(layer, key, live.pop(other), other)
    return list(gone.values())


def describe_replaced(gone: Sequence[Replaced]) -> list[str]:
    """One message per choice that replaced something."""
    choices: dict[tuple[Layer, str], list[Replaced]] = {}
    for one in gone:
        choices.setdefault((one.new, one.key), []).append(one)
    return [
        f"{new.show(key)} {new.values[key]} replaces "
        + ", ".join(f"{one.other} {one.old.values[one.other]}" for one in some)
        + f" of {some[0].old.config}"
        for (new, key), some in choices.items()
    ]


@dataclass(frozen=True)
class Words:
    """A split command line: `words` for the parser, configs first; the config paths; the flags and their values."""

    words: list[str]
    configs: list[str]
    typed: dict[str, Any]
    repeated: dict[str, Any]
    """Flags given more than once, and the value used."""

    def layers(self) -> list[Layer]:
        """The settings by source, from the first config to the flags. Call it after the parser has read them."""
        configs = [Layer(path, flat(read_config(path))) for path in self.configs]
        return [*configs, Layer(None, self.typed)]


def check_config(path: str | Path, flag: str = "config") -> None:
    """Raise ValueError that names the flag and similar files unless the config exists."""
    if not Path(path).exists():
        shown = CONFIGS.relative_to(Path.cwd()) if CONFIGS.is_relative_to(Path.cwd()) else CONFIGS
        raise ValueError(f"--{flag} {path}: there is no such file{did_you_mean_file(Path(path), shown)}")


def read_config(path: str) -> dict[str, Any]:
    """Read the settings in a YAML file. Raises ValueError naming a file that is missing or not valid YAML settings.

    A pipe, as in `--config <(...)`, can only be read once, by the parser, so it yields no settings here.
    """
    if Path(path).is_fifo() and Path(path).is_relative_to("/dev/fd"):
        return {}
    check_config(path)
    text = read_text(path)
    try:
        settings = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--config {path} is not a valid YAML file of settings: {error}") from error
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"--config {path} must be a mapping of settings (key: value), not a {type(settings).__name__}")
    return {str(key): value for key, value in (settings or {}).items()}


def parse_yaml(text: str) -> Any:
    """Parse YAML. Raises ValueError with the reason if it is invalid or has more than MAX_CONFIG_VALUES values, those
    that aliases repeat included."""
    try:
        value = yaml.safe_load(text)
        n_values = expanded(value)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if n_values > MAX_CONFIG_VALUES:
        raise ValueError(f"it has more than {MAX_CONFIG_VALUES} values")
    return value


def expanded(value: Any, known: dict[int, int] | None = None) -> int:
    """Number of values in a document with its aliases expanded."""
    known = {} if known is None else known
    if not isinstance(value, dict | list):
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a setting contains a null byte")
        return 1
    if id(value) not in known:
        known[id(value)] = MAX_CONFIG_VALUES + 1  # until it is known: a list may contain itself
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(expanded(item, known) for item in items)
    return known[id(value)]


def read_words(argv: Sequence[str], known: Collection[str]) -> Words:
    """Split the command line. Words that the parser, whose flags are `known`, will reject are left unchanged."""
    configs: list[str] = []
    rest: list[str] = []
    typed: dict[str, Any] = {}
    repeated: dict[str, Any] = {}
    words = spell_switches([in_full(word, known) for word in argv], SWITCHES)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            rest.append(word)
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                rest.append(word)
                continue
            value = words.pop(0)
        if flag == "--config":
            configs.append(value)
            continue
        rest += [word] if equals else [word, value]
        name = flag.removeprefix("--")
        if name in typed and not name.endswith("+"):
            repeated[name] = value
        typed[name] = value
    values = {name.removesuffix("+"): load(value) for name, value in typed.items()}
    return Words([*(f"--config={path}" for path in configs), *rest], configs, flat(values), repeated)


def in_full(word: str, known: Collection[str]) -> str:
    """Expand an abbreviated flag if it is unambiguous."""
    flag, equals, value = word.partition("=")
    if not flag.startswith("--") or flag in known or flag == "--":
        return word
    begin = [name for name in known if name.startswith(flag)]
    return f"{begin[0]}{equals}{value}" if len(begin) == 1 else word


def load(value: str) -> Any:
    """Parse a flag's value as YAML."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def sizes_over_name(layers: Sequence[Layer], name: str | None) -> list[str]:
    """A message if flags change sizes of a registered model chosen by a config."""
    typed = layers[-1].values
    changed = [key for key in SIZES if key in typed and is_set(typed[key])]
    if name not in MODELS or not changed or "model.name" in typed:
        return []
    was = [f"{key} {getattr(MODELS[name], key.removeprefix('model.'))}" for key in changed]
    now = [f"--{key} {typed[key]}" for key in changed]
    return [f"{', '.join(now)} replace{'s' * (len(now) == 1)} {', '.join(was)} of the model {name}"]
