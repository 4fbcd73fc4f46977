"""Parses the trainer's command line (configs and flags) into RunArgs, and formats its --help."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from lit_files.near_names import did_you_mean
from pretrain.args import RunArgs
from pretrain.cli.choices import describe_replaced, read_config, read_words, replaced, sizes_over_name
from pretrain.cli.command_line import ALL, explain, help_topic, list_topics
from pretrain.cli.fields import flags_of, is_section
from pretrain.launch import fit_to_launch, is_first_process

ABOUT = """\
Pretrain a decoder-only language model on packed datasets, on one or many devices.
Settings come from YAML files (--config) and from flags; flags win. The resolved
settings are saved in the run folder, for --resume latest.

examples:
  a trial on a CPU, in seconds, without data:
    python pretrain/fabric_train.py --config configs/debug.yaml
  train a model on your data; with --resume latest, resume it:
    python pretrain/fabric_train.py --config configs/llammlein_120M.yaml \\
        --data.train data/train --data.val data/val --out_dir runs/mine
"""
FIRST = (
    "data.train", "data.val", "out_dir", "model.name", "resume", "devices", "precision", "train.max_steps",
    "train.global_batch_samples", "train.micro_batch_samples", "train.block_size", "optim.lr",
    "save.every_steps", "preflight",
)  # fmt: skip
THE_RUN = "run"  # the topic of the settings that belong to no section
USAGE = "python pretrain/fabric_train.py [--config FILE] [--SETTING VALUE ...]"
CONFIG_HELP = "YAML file of settings; may be repeated"


class RunParser(ArgumentParser):
    """Prints one-line errors, and a --help of the settings that most runs need."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        if is_first_process():
            known = [flag.removeprefix("--") for action in self._actions for flag in action.option_strings]
            print(f"error: {explain(message, known)}\n{self.prog} --help lists the flags", file=sys.stderr)
        self.exit(2)

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        return run_help()


def first_clause(text: str) -> str:
    """The beginning of a help text, for the short --help."""
    return re.split(r"[.;:] |\.$|, for example| \((?:over|scripts)", text)[0].replace("%", "%%")


def run_help(topic: str = "") -> str:
    """The help: description, examples and the settings that most runs need; of a section; or of all sections.

    Raises ValueError for an unknown topic, with the nearest ones.
    """
    flags = {flag.name: flag for flag in flags_of(RunArgs)}
    hints = get_type_hints(RunArgs)
    sections = [f.name for f in dataclasses.fields(RunArgs) if is_section(hints[f.name])]

    def page(usage: str, about: str = "") -> argparse.ArgumentParser:
        formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=38)
        return argparse.ArgumentParser(usage=usage, description=about, formatter_class=formatter, add_help=False)

    titles = {THE_RUN: "Devices, precision, resuming, initialization."}
    titles |= {section: (hints[section].__doc__ or "").partition("\n")[0] for section in sections}
    if topic == "":
        start = page(USAGE, ABOUT)
        first = start.add_argument_group("the settings that most runs need")
        first.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
        for name in FIRST:
            value = flags[name].placeholder.rpartition("}|")[2]
            first.add_argument(f"--{name}", metavar=value, help=first_clause(flags[name].help))
        first.add_argument("--print_config", action="store_true", help="Print the settings as YAML")
        return f"{start.format_help()}\n{list_topics({name: first_clause(title) for name, title in titles.items()})}"
    if topic not in (*titles, ALL):
        raise ValueError(f"--help {topic}: choose one of {', '.join((*titles, ALL))}{did_you_mean(topic, titles)}")
    rest = page("")
    for section in titles if topic == ALL else (topic,):
        group = rest.add_argument_group(section, titles[section].replace("%", "%%"))
        for name, flag in flags.items():
            top = name.partition(".")[0]
            if (top if top in sections else THE_RUN) == section:
                text = flag.help_with_default.replace("%", "%%")
                group.add_argument(f"--{name}", metavar=flag.placeholder, help=text)
    return rest.format_help().partition("\n\n")[2]  # without the usage


@functools.cache
def build_parser() -> ArgumentParser:
    """Build the parser: the fields of RunArgs, and --config."""
    parser = RunParser(prog="fabric_train.py")
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(RunArgs)
    return parser


@contextlib.contextmanager
def named_faults(configs: list[str]) -> Iterator[None]:
    """Add the config names to parser errors about malformed settings."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        where = f"--config {', '.join(configs)}" if configs else "the command line"
        raise ValueError(f"{where} has settings that cannot be read: {error}") from error


def check_sections(config: str, settings: Mapping[str, Any], kind: type, prefix: str = "") -> None:
    """Raise ValueError if a section of a config, such as `model`, is a single value instead of settings."""
    for name, section in get_type_hints(kind).items():
        if name not in settings or not is_section(section):
            continue
        value = settings[name]
        if not isinstance(value, dict):
            example = f"{prefix}{name}.{dataclasses.fields(section)[0].name}"
            shown = "nothing" if value is None else f"{value!r:.60}"
            raise ValueError(f"--config {config}: {prefix}{name} must hold settings, such as {example}, not {shown}")
        check_sections(config, value, section, f"{prefix}{name}.")


def parse(argv: list[str] | None = None) -> RunArgs:
    """Parse the command line into RunArgs, with the launcher's number of processes. Exits with a message and status 2
    on an unknown flag or invalid value; raises ValueError for settings that conflict with each other or the launcher.
    """
    argv = sys.argv[1:] if argv is None else argv
    topic = help_topic(argv)
    if topic is not None:
        print(run_help(topic), end="")
        sys.exit(0)
    parser = build_parser()
    known = [flag for action in parser._actions for flag in action.option_strings]
    given = read_words(argv, known)
    for config in given.configs:
        check_sections(config, read_config(config), RunArgs)  # before the parser reads it
    with named_faults(given.configs):
        namespace: Namespace = parser.parse_args(given.words)
    layers = given.layers()
    gone = replaced(layers)
    if gone:
        defaults = parser.get_defaults()
        for one in gone:
            namespace[one.other] = defaults[one.other]
    lines = [f"--{flag} is given more than once; the last, {value}, is used" for flag, value in given.repeated.items()]
    lines += [*describe_replaced(gone), *sizes_over_name(layers, namespace["model.name"])]
    namespace.pop("config", None)
    with named_faults(given.configs):
        args = instantiate(namespace)
    if args.train.memory_limit_gib is not None and not args.train.is_automatic:
        lines.append(
            f"--train.memory_limit_gib {args.train.memory_limit_gib:g} has no effect without "
            "--train.micro_batch_samples auto or --train.activation_checkpointing auto"
        )
    args, more = fit_to_launch(args, layers[-1].values, {key for layer in layers[:-1] for key in layer.values})
    lines += more
    if is_first_process():
        for line in lines:
            print(f"note: {line}", file=sys.stderr)
    return args


def from_settings(settings: dict[str, Any], source: Path) -> RunArgs:
    """RunArgs from the settings that a run recorded in `source`; settings added since have their defaults.

    Raises ValueError naming `source` for settings that this version does not have.
    """
    try:
        namespace = build_parser().parse_object(copy.deepcopy(settings))
    except (SystemExit, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{source} has settings that this version cannot read") from error
    return instantiate(namespace)


def instantiate(namespace: Namespace) -> RunArgs:
    instance = build_parser().instantiate(namespace)
    return RunArgs(**{k: v for k, v in vars(instance).items() if k != "config"})
