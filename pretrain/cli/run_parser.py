"""Parses the trainer's command line (configs and flags) into RunArgs, and formats its --help."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from pretrain.args import RunArgs
from pretrain.cli.choices import describe_replaced, read_config, read_words, replaced, sizes_over_name
from pretrain.cli.command_line import explain
from pretrain.cli.fields import flags_of, is_section
from pretrain.launch import fit_to_launch, is_first_process

ABOUT = """\
Pretrain a decoder-only language model on packed datasets, on one or many devices.
Settings come from YAML files (--config) and from flags; flags win. The resolved
settings are saved in the run folder. A run may be killed at any moment and
resumed with --resume latest.

examples:
  a trial on a CPU, in seconds, without data:
    python pretrain/fabric_train.py --config configs/debug.yaml
  train a registered model on your data (scripts/prepare_data.py makes it):
    python pretrain/fabric_train.py --config configs/llammlein_120M.yaml \\
        --data.train data/train --data.val data/val --out_dir runs/mine
  resume it: the same command and --resume latest
    python pretrain/fabric_train.py --config configs/llammlein_120M.yaml \\
        --data.train data/train --data.val data/val --out_dir runs/mine \\
        --resume latest
  check devices, network, disk, data, memory and one step before a long run:
    python pretrain/fabric_train.py --config configs/llammlein_120M.yaml \\
        --data.train data/train --data.val data/val --devices 4 --preflight
  continue the training of a Hugging Face model on other data:
    python pretrain/fabric_train.py --init_from hf/ --data.train data/train \\
        --train.max_epochs 1 --optim.lr 1e-4 --out_dir runs/continued
"""
FIRST = (
    "data.train", "data.val", "out_dir", "model.name", "init_from", "resume", "devices", "precision", "train.max_steps",
    "train.max_tokens", "train.global_batch_samples", "train.micro_batch_samples", "train.block_size", "optim.lr",
    "save.every_steps", "preflight",
)  # fmt: skip
USAGE = "python pretrain/fabric_train.py [--config FILE] [--SETTING VALUE ...]"
BY_SECTION = "All settings, by section. In YAML a section is a key, its settings are indented."
CONFIG_HELP = "YAML file of settings; may be repeated, later files override earlier ones."


class RunParser(ArgumentParser):
    """Prints one-line errors, and a --help that starts with the settings most runs need."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        if is_first_process():
            known = [flag.removeprefix("--") for action in self._actions for flag in action.option_strings]
            print(f"error: {explain(message, known)}\n{self.prog} --help lists the flags", file=sys.stderr)
        self.exit(2)

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        return run_help()


def run_help() -> str:
    """Help text: description, examples and the settings most runs need, then all settings by section."""
    flags = {flag.name: flag for flag in flags_of(RunArgs)}
    hints = get_type_hints(RunArgs)
    sections = [f.name for f in dataclasses.fields(RunArgs) if is_section(hints[f.name])]

    def page(usage: str, about: str = "") -> argparse.ArgumentParser:
        formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
        return argparse.ArgumentParser(usage=usage, description=about, formatter_class=formatter, add_help=False)

    def show(group: argparse._ArgumentGroup, names: Iterable[str]) -> None:
        for name in names:
            text = flags[name].help_with_default.replace("%", "%%")
            group.add_argument(f"--{name}", metavar=flags[name].placeholder, help=text)

    start, rest = page(USAGE, ABOUT), page("")
    first = start.add_argument_group("the settings that most runs need")
    first.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    show(first, FIRST)
    first.add_argument("--print_config", action="store_true", help="Print the resolved settings as YAML and exit.")
    show(rest.add_argument_group("the run"), (name for name in flags if name.partition(".")[0] not in sections))
    for section in sections:
        title = (hints[section].__doc__ or "").partition("\n")[0].replace("%", "%%")
        group = rest.add_argument_group(section, title)
        show(group, (name for name in flags if name.startswith(f"{section}.")))
    by_section = rest.format_help().partition("\n\n")[2]  # without the usage
    return f"{start.format_help()}\n{BY_SECTION}\n\n{by_section}"


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


def parse(argv: list[str] | None = None) -> RunArgs:
    """Parse the command line into RunArgs, with the launcher's number of processes. Exits with a message and status 2
    on an unknown flag or invalid value; raises ValueError for settings that conflict with each other or the launcher.
    """
    parser = build_parser()
    known = [flag for action in parser._actions for flag in action.option_strings]
    given = read_words(sys.argv[1:] if argv is None else argv, known)
    for config in given.configs:
        if Path(config).exists():
            read_config(config)  # before the parser reads it
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
