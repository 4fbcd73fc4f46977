"""Shared by all command lines: a --help that fits a screen, short errors that suggest the intended flag or value,
switches with or without a value, repeated flags as errors, and output that any terminal encoding can print. Standard
library only.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import difflib
import io
import itertools
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, get_args, get_origin

from lit_files.near_names import did_you_mean
from lit_files.signals import after_imports, repeat_ignored_signals
from pretrain.cli.fields import REQUIRED, Flag, flags_of, placeholder, without_none

# Flag names of lit-gpt, TinyLlama, litgpt and transformers -> ours. Only flags the command line has are suggested.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("optim.lr",),
    "max_lr": ("optim.lr",),
    "min_lr": ("optim.lr_min",),
    "min_learning_rate": ("optim.lr_min",),
    "decay_lr": ("optim.schedule",),
    "lr_scheduler_type": ("optim.schedule",),
    "lr_scheduler": ("optim.schedule",),
    "lr_schedule": ("optim.schedule",),
    "warmup": ("optim.warmup_steps", "optim.warmup_fraction"),
    "warmup_iters": ("optim.warmup_steps",),
    "lr_warmup_steps": ("optim.warmup_steps",),
    "num_warmup_steps": ("optim.warmup_steps",),
    "warmup_ratio": ("optim.warmup_fraction",),
    "lr_warmup_fraction": ("optim.warmup_fraction",),
    "adam_beta1": ("optim.beta1",),
    "adam_beta2": ("optim.beta2",),
    "adam_epsilon": ("optim.eps",),
    "batch_size": ("train.global_batch_samples", "train.micro_batch_samples", "batch"),
    "train_batch_size": ("train.global_batch_samples", "train.micro_batch_samples"),
    "global_batch_size": ("train.global_batch_samples",),
    "micro_batch_size": ("train.micro_batch_samples",),
    "per_device_train_batch_size": ("train.micro_batch_samples",),
    "per_device_eval_batch_size": ("eval.micro_batch_samples",),
    "device_batch_size": ("train.micro_batch_samples",),
    "gradient_accumulation_steps": ("train.global_batch_samples", "train.micro_batch_samples"),
    "gradient_accumulation_iters": ("train.global_batch_samples", "train.micro_batch_samples"),
    "accumulation_steps": ("train.global_batch_samples", "train.micro_batch_samples"),
    "epochs": ("train.max_epochs",),
    "num_epochs": ("train.max_epochs",),
    "num_train_epochs": ("train.max_epochs",),
    "steps": ("train.max_steps",),
    "max_step": ("train.max_steps",),
    "max_iters": ("train.max_steps", "eval.max_samples"),
    "num_steps": ("train.max_steps",),
    "total_steps": ("train.max_steps",),
    "max_train_steps": ("train.max_steps",),
    "max_tokens": ("train.max_tokens", "max_new_tokens"),
    "max_length": ("max_new_tokens", "train.block_size"),
    "max_seq_length": ("train.block_size",),
    "seq_length": ("train.block_size",),
    "seq_len": ("train.block_size",),
    "sequence_length": ("train.block_size",),
    "context_length": ("train.block_size",),
    "max_norm": ("train.clip_norm",),
    "max_grad_norm": ("train.clip_norm",),
    "grad_clip": ("train.clip_norm",),
    "gradient_clip_val": ("train.clip_norm",),
    "gradient_checkpointing": ("train.activation_checkpointing",),
    "bf16": ("precision",),
    "fp16": ("precision",),
    "fp8": ("precision",),
    "mixed_precision": ("precision",),
    "torch_compile": ("compile",),
    "fsdp": ("strategy",),
    "gpus": ("devices",),
    "num_gpus": ("devices",),
    "num_devices": ("devices",),
    "nproc_per_node": ("devices",),
    "nodes": ("num_nodes",),
    "nnodes": ("num_nodes",),
    "output_dir": ("out_dir", "output"),
    "output_path": ("out_dir", "output"),
    "output": ("out_dir",),
    "out": ("out_dir", "output"),
    "out_dir": ("output",),
    "save_dir": ("out_dir", "output"),
    "destination_path": ("output",),
    "source_path": ("input",),
    "data": ("data.train", "input"),
    "data_dir": ("data.train", "data", "input"),
    "data_path": ("data.train", "data", "input"),
    "dataset": ("data.train", "data", "input"),
    "train_data": ("data.train",),
    "train_data_dir": ("data.train",),
    "train_file": ("data.train",),
    "val_data": ("data.val",),
    "val_data_dir": ("data.val",),
    "validation_file": ("data.val",),
    "model": ("model.name", "checkpoint", "run"),
    "model_name": ("model.name", "model"),
    "model_name_or_path": ("init_from", "model.name", "model"),
    "checkpoint": ("init_from", "resume", "model"),
    "checkpoint_dir": ("init_from", "checkpoint", "model"),
    "ckpt": ("checkpoint", "model"),
    "checkpoint_path": ("checkpoint", "model"),
    "initial_checkpoint_dir": ("init_from",),
    "resume_from_checkpoint": ("resume",),
    "tokenizer_path": ("tokenizer",),
    "tokenizer_name": ("tokenizer",),
    "tokenizer_dir": ("tokenizer",),
    "save_steps": ("save.every_steps",),
    "save_interval": ("save.every_steps",),
    "save_step_interval": ("save.every_steps",),
    "save_total_limit": ("save.keep_last",),
    "eval_steps": ("eval.every_steps",),
    "eval_interval": ("eval.every_steps",),
    "eval_step_interval": ("eval.every_steps",),
    "eval_iters": ("eval.max_samples",),
    "logging_steps": ("log.every_steps",),
    "log_interval": ("log.every_steps",),
    "log_step_interval": ("log.every_steps",),
    "report_to": ("log.trackers",),
    "logger_name": ("log.trackers",),
    "wandb_project": ("log.project",),
    "hidden_size": ("model.n_embd",),
    "num_hidden_layers": ("model.n_layer",),
    "num_layers": ("model.n_layer",),
    "num_attention_heads": ("model.n_head",),
    "num_key_value_heads": ("model.n_query_groups",),
    "head_dim": ("model.head_size",),
    "tie_word_embeddings": ("model.tie_embeddings",),
    "rope_theta": ("model.rope_base",),
    "teacher": ("distillation.teachers", "teachers"),
    "num_workers": ("workers",),
    "num_proc": ("workers",),
    "text": ("prompt",),
    "num_tokens": ("max_new_tokens",),
}
SWITCH_WORDS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
FLAG = re.compile(r"--?[A-Za-z]")
PICTURES = (".png", ".pdf", ".svg")
HELP_LINES = 50  # a longer --help is divided into topics
ALL = "all"  # the topic that is all of it
# The last line after Ctrl-C.
RESUMES = "interrupted: repeat the command to resume"
NOTHING_WRITTEN = "interrupted: nothing was written"


def near_flags(flag: str, known: Collection[str]) -> list[str]:
    """Known flags (without dashes) that an unknown one may have been meant to be, best match first."""
    name = flag.lstrip("-").partition("=")[0].lower().replace("-", "_")
    last = name.rpartition(".")[2]
    groups: tuple[Iterable[str], ...] = (
        (k for k in known if k.lower().replace("-", "_") == name),
        (k for k in (*OTHER_NAMES.get(name, ()), *OTHER_NAMES.get(last, ())) if k in known),
        (k for k in known if k.rpartition(".")[2] == last),
        (k for k in (name.removeprefix("no_"), name.removeprefix("no")) if k != name and k in known),
        difflib.get_close_matches(name, known, n=2, cutoff=0.75),
        (k for near in difflib.get_close_matches(last, OTHER_NAMES, n=1, cutoff=0.85)
         for k in OTHER_NAMES[near] if k in known),
        (k for near in difflib.get_close_matches(last, {k.rpartition(".")[2] for k in known}, n=1, cutoff=0.75)
         for k in known if k.rpartition(".")[2] == near),
    )  # fmt: skip
    return next((found[:3] for group in groups if (found := list(dict.fromkeys(group)))), [])


def explain(message: str, known: Collection[str]) -> str:
    """Add suggestions to a parser's message about unknown flags or keys."""
    if match := re.match(r"unrecognized arguments: (.*)", message, flags=re.DOTALL):
        unknown = [word for word in match[1].split() if FLAG.match(word)]
        if not unknown:
            return f"{match[1]!r} belongs to no flag"
        return "; ".join(
            f"there is no flag {word.partition('=')[0]}{_meant(word, known, dashes='--')}" for word in unknown
        )
    if match := re.search(r"(?:Group '([\w.]+)' does not accept o|O)ption '([\w.-]+)'", message):
        key = ".".join(filter(None, match.groups()))
        return f"there is no setting {key}{_meant(key, known, dashes='')}"
    if match := re.match(r'Parser key "([\w.]+)":\s+Expected an? (.*)\. Got value: (.*)', message, flags=re.DOTALL):
        return _expected(f"--{match[1]}", match[3], match[2])
    union = r'Parser key "([\w.]+)":.*  Subtypes: \[(.*?)\]\n.*  Given value: (.*)'
    if match := re.match(union, message, flags=re.DOTALL):
        kinds = re.sub(r"<class 'NoneType'>(, )?", "", match[2]).removesuffix(", ")
        return _expected(f"--{match[1]}", match[3], kinds)
    if match := re.match(
        r"argument ([\w-]+)[^:]*: invalid choice: (.*) \(choose from (.*)\)$", message, flags=re.DOTALL
    ):
        choices = [choice.strip("'") for choice in match[3].split(", ")]
        value = match[2].strip("'")
        return f"{match[1]} {value}: choose one of {', '.join(choices)}{did_you_mean(value, choices)}"
    if match := re.match(r"argument ([\w-]+)[^:]*: invalid (\w+) value: '(.*)'$", message, flags=re.DOTALL):
        return f"{match[1]} {match[3]}: expected {match[2]}"
    return message


def _expected(flag: str, value: str, annotation: str) -> str:
    """The message about a value of another type, with near names if the type names its values."""
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", annotation):
        choices = [choice.strip("'") for choice in literal[1].split(", ")]
        return f"{flag} {value}: choose one of {', '.join(choices)}{did_you_mean(value, choices)}"
    kinds = re.sub(r", one of \['(\w+)'\]", r" or \1", _type_name(annotation))
    return f"{flag} {value}: expected {kinds}"


def _type_name(annotation: str) -> str:
    """A type as the parser's messages write it, in the words of the help: a dataclass is a group of settings."""
    plain = re.sub(r"<class '(\w+)'>", r"\1", annotation)
    return re.sub(r"<class '[\w.]+\.(\w+)'>", r"the settings of a \1", plain).replace("typing.Literal", "one of ")


def _meant(word: str, known: Collection[str], dashes: str) -> str:
    near = near_flags(word, known)
    return f"; did you mean {' or '.join(dashes + name for name in near)}?" if near else ""


def spell_switches(argv: Sequence[str], switches: Collection[str]) -> list[str]:
    """`--switch`, `--switch yes` and `--switch=True` -> `--switch=true`; likewise false."""
    out: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if word == "--":
            return [*out, word, *words]
        if flag not in switches:
            out.append(word)
        elif equals:
            out.append(f"{flag}={SWITCH_WORDS.get(value.lower(), value)}")
        elif words and words[0].lower() in (*SWITCH_WORDS, "null"):
            value = words.pop(0)
            out.append(f"{flag}={SWITCH_WORDS.get(value.lower(), value)}")
        else:
            out.append(f"{flag}=true")
    return out


def help_topic(words: Sequence[str]) -> str | None:
    """The word after --help, "" without one; None if the command line does not ask for help."""
    for i, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag in ("-h", "--help"):
            return value or next((word for word in words[i + 1 : i + 2] if not word.startswith("-")), "")
        if word == "--":
            break
    return None


def list_topics(topics: Mapping[str, str]) -> str:
    """The lines at the end of a --help that was cut: topic -> its title."""
    width = max(map(len, (*topics, ALL)))
    lines = (f"  --help {name:{width}}  {title}" for name, title in {**topics, ALL: "all flags"}.items())
    return "\n".join(["more flags:", *lines, ""])


class Once(argparse.Action):
    """Stores a value. A repeated flag is an error, or extends the list if the flag takes several values. A --seed
    out of range is an error."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, ScriptParser)
        if self.dest == "seed" and not 0 <= values < 2**63:  # in every script as in the trainer
            raise ValueError(f"--seed {values} must be in [0, 2^63)")
        if option_string is not None and self.dest in parser.given:
            if self.nargs not in ("+", "*"):
                raise argparse.ArgumentError(self, f"given twice: {parser.given[self.dest]} and {values}")
            values = [*getattr(namespace, self.dest), *values]
        parser.given[self.dest] = values
        setattr(namespace, self.dest, values)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Names a flag's value by its type, as the trainer's --help does."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return placeholder(str if action.type is None else action.type)

    def _get_default_metavar_for_positional(self, action: argparse.Action) -> str:
        return action.dest.upper()


class ScriptParser(argparse.ArgumentParser):
    """Argument parser of the scripts: accepts `--switch true` for `--switch`, rejects repeated flags, and keeps help,
    usage and errors short. A --help of more than HELP_LINES shows the flags of groups with a title by `--help TOPIC`,
    where the topic is the first word of the title.

    Args:
        other_flags: whether the script also takes flags that this parser does not have, by `parse_known_args`.
    """

    def __init__(self, *arguments: Any, other_flags: bool = False, **settings: Any) -> None:
        settings.setdefault("formatter_class", _Formatter)
        super().__init__(*arguments, **settings)
        self._untitled = list(self._action_groups)
        self.given: dict[str, Any] = {}
        self._words: list[str] = []
        self._other_flags = other_flags
        for name in (None, "store"):
            self.register("action", name, Once)

    def add_fields(
        self, fields: type, groups: Mapping[str, str] | None = None, leave_out: Collection[str] = ()
    ) -> None:
        """Add the fields of a dataclass as flags.

        Args:
            groups: field -> title of the --help group that starts with it.
        """
        target: argparse._ActionsContainer = self
        for flag in flags_of(fields):
            if groups is not None and flag.name in groups:
                title = groups[flag.name]
                same = (group for group in self._action_groups if group.title == title)
                target = next(same, None) or self.add_argument_group(title)
            if flag.name not in leave_out:
                target.add_argument(f"--{flag.name}", **argparse_settings(flag))

    def topics(self) -> dict[str, argparse._ArgumentGroup]:
        groups = (group for group in self._action_groups if group not in self._untitled and group._group_actions)
        return {re.split(r"\W", group.title or "")[0]: group for group in groups}

    def format_help(self, topic: str = "") -> str:
        self.usage = self.usage or self.short_usage()
        text, topics = super().format_help(), self.topics()
        if topic == ALL or not topics or (topic == "" and text.count("\n") <= HELP_LINES):
            return text
        if topic == "":
            shown, more = self._untitled, {name: group.title or "" for name, group in topics.items()}
        elif topic in topics:
            shown, more = [topics[topic]], {}
        else:
            self.error(f"--help {topic}: choose one of {', '.join((*topics, ALL))}{did_you_mean(topic, topics)}")
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description if topic == "" else None)
        for group in shown:
            formatter.start_section(group.title)
            formatter.add_arguments(group._group_actions)
            formatter.end_section()
        return formatter.format_help() + (f"\n{list_topics(more)}" if more else "")

    def short_usage(self) -> str:
        """Usage with only the required arguments."""
        groups = [group._group_actions for group in self._mutually_exclusive_groups if group.required]
        words = ["%(prog)s"]
        for action in self._actions:
            one_of = next((group for group in groups if action in group), [action])
            if one_of[0] is action and (action.required or len(one_of) > 1):
                words.append(" | ".join(map(self._usage_of, one_of)))
        optional = sum(not action.required for action in self._actions) > 1  # more than --help
        return " ".join([*words, *(["[options]"] if optional else [])])

    def _usage_of(self, action: argparse.Action) -> str:
        formatter = self._get_formatter()
        if not action.option_strings:
            return formatter._format_args(action, formatter._get_default_metavar_for_positional(action))
        value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value}"

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        make_printable()
        self.given = {}
        switches = {flag for action in self._actions if action.const is True for flag in action.option_strings}
        words = []
        for word in spell_switches(sys.argv[1:] if args is None else args, switches):
            flag, _, value = word.partition("=")
            if flag not in switches or value not in ("true", "false"):
                words.append(word)
            elif value == "true":
                words.append(flag)
        self._words = words
        topic = help_topic(words)
        if topic and self.topics():
            print(self.format_help(topic), end="")
            self.exit()
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        parsers: list[argparse.ArgumentParser] = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        flags = (flag for parser in parsers for action in parser._actions for flag in action.option_strings)
        known = list(dict.fromkeys(flag.lstrip("-") for flag in flags))
        if message.startswith("the following arguments are required"):
            # An unknown flag may be the required one, misspelled.
            own = itertools.takewhile(lambda word: word != "--", self._words)
            words = (word.partition("=")[0] for word in own if word.startswith("--"))
            unknown = [word for word in words if not any(flag.startswith(word[2:]) for flag in known)]
            if self._other_flags:
                unknown = [word for word in unknown if near_flags(word, known)]
            what, _, missing = message.partition(": ")
            names = [name if name.startswith("-") else name.upper() for name in missing.split(", ")]  # as --help has it
            message = f"unrecognized arguments: {' '.join(unknown)}" if unknown else f"{what}: {', '.join(names)}"
        self.exit(2, f"error: {explain(message, known)}\n{self.prog} --help lists the flags\n")


def argparse_settings(flag: Flag) -> dict[str, Any]:
    """Arguments of `add_argument` for a field; a flag that is not given is absent from the namespace."""
    (kind,) = without_none(flag.kind)
    settings: dict[str, Any] = {"help": flag.help_with_default.replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        return settings | {"action": "store_true", "help": flag.help.replace("%", "%%")}
    settings["required"] = flag.default is REQUIRED
    if get_origin(kind) in (tuple, list):
        settings["nargs"] = "*" if flag.default == () else "+"
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        return settings | {"choices": get_args(kind)}
    return settings | {"type": json.loads if get_origin(kind) is dict else kind, "metavar": placeholder(kind)}


def given_fields(fields: type, args: argparse.Namespace) -> dict[str, Any]:
    """The dataclass fields given on a command line, after `ScriptParser.add_fields`."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(fields) if hasattr(args, f.name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


# The modules of the dependencies in pyproject.toml.
INSTALLED = {"torch", "lightning_fabric", "numpy", "sentencepiece", "tokenizers", "zstandard", "pyarrow", "safetensors"}
INSTALLED |= {"jsonargparse", "yaml", "rich"}


def end_on_ctrl_c() -> None:
    """Make Ctrl-C exit this script with one line and status 130 from now on, after the import in which it arrives; and
    a Python without the project's packages with one line that says so.
    """
    repeat_ignored_signals()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, after_imports(signal.default_int_handler))
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, ModuleNotFoundError) and error.name in INSTALLED:
            print(
                f"error: {sys.executable} has no package {error.name}: use .venv/bin/python, which `make install` "
                "creates (docs/install.md)",
                file=sys.stderr,
            )
            sys.exit(1)
        usual(kind, error, trace)

    sys.excepthook = hook


def run_script(main: Callable[[], int | None], interrupted: str) -> NoReturn:
    """Run a script's `main` and exit with the status it returns (None: 0).

    Exits with 2 and one error line on a mistake (ValueError, OSError), with 130 and the line `interrupted` on Ctrl-C,
    and with 143 on SIGTERM, after partial output was removed. A reader that closes the pipe, such as `head`, is no
    error.
    """
    signal.signal(signal.SIGTERM, after_imports(lambda *_: sys.exit(143)))
    status = 0
    try:
        status = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if raised_by_import(error):
            raise
        traceback.clear_frames(error.__traceback__)  # ends a progress bar before the message is printed
        status = 2
        print("\n".join([f"error: {_without_number(error)}", *getattr(error, "__notes__", [])]), file=sys.stderr)
    except KeyboardInterrupt as error:
        traceback.clear_frames(error.__traceback__)
        status = 130
        print("\n".join([f"\n{interrupted}", *getattr(error, "__notes__", [])]), file=sys.stderr)
    sys.exit(status)


def _without_number(error: ValueError | OSError) -> str:
    """The error's message without errno; about a file in place of a folder, with the file's name."""
    if isinstance(error, (FileExistsError, NotADirectoryError)) and isinstance(error.filename, str):
        path = Path(error.filename)
        if (file := next((p for p in (path, *path.parents) if p.is_file()), None)) is not None:
            return f"{file} is a file, not a folder"
    return str(error).removeprefix(f"[Errno {error.errno}] ") if isinstance(error, OSError) else str(error)


def raised_by_import(error: BaseException) -> bool:
    """Whether an error came up in an import: a fault of the installation, not of the arguments."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename.startswith("<frozen importlib") for frame, _ in frames)


def check_file(flag: str, file: Path | None, *endings: str) -> None:
    """Raise ValueError unless the file has one of the endings, so that it replaces no file of another kind, and can be
    created in its folder."""
    if file is None:
        return
    if file.suffix.lower() not in endings:
        raise ValueError(f"{flag} {file} must end in {' or '.join(endings)}")
    if file.is_dir():
        raise ValueError(f"{flag} {file} is a folder: name a file in it")
    if (parent := next((p for p in file.parents if p.exists() and not p.is_dir()), None)) is not None:
        raise ValueError(f"{flag} {file}: {parent} is a file, not a folder")


def make_printable() -> None:
    """Let standard output and error print any text: unencodable characters become \\uXXXX, as in JSON."""
    codecs.register_error("json_escapes", _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="json_escapes")


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)), error.end
