"""Every command line in the README, the guides, cluster/, the configs and the scripts' docstrings is accepted by the
parser of its script, and every setting named in the guides exists."""

from __future__ import annotations

import argparse
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
from docs_commands import commands_of
from running import ROOT

from pretrain.args import RunArgs
from pretrain.cli.fields import flags_of
from pretrain.cli.run_parser import build_parser, parse, run_help


def sources() -> list[Path]:
    guides = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "pretrain" / "fabric_train.py"]
    files = (p for folder in ("cluster", "configs", "scripts") for p in (ROOT / folder).rglob("*") if p.is_file())
    return [*guides, *(p for p in files if p.suffix in (".py", ".sh", ".sbatch", ".yaml"))]


COMMANDS = sorted({command: path for path in sources() for command in commands_of(path)}.items())


class Parsed(Exception):
    """Raised once the parser has accepted the command line."""


@pytest.mark.parametrize(
    ("script", "words"),
    [pytest.param(*command, id=f"{path.relative_to(ROOT)}: {' '.join(command[1])}") for command, path in COMMANDS],
)
def test_parses(
    script: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = tuple("configs/debug.yaml" if word == "runs/mine/config.yaml" else word for word in words)
    if script == "scripts/convert_to_hf.sh":
        script, words = "scripts/convert_to_hf.py", ("--checkpoint", words[0], "--output", *words[1:])
    if script == "pretrain/fabric_train.py":
        if words[:1] != ("--help",):
            try:
                parse(list(words))
            except ValueError as error:  # some commands omit the data
                assert "give" in str(error) and "--data.train" in str(error) and "--data.train" not in words
                parse([*words, "--data.train", "data/train"])
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *arguments: object) -> None:
        raise Parsed(parse_args(self, *arguments))  # type: ignore[arg-type]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the script's handler would remain installed
    with pytest.raises((Parsed, SystemExit)) as left:
        runpy.run_path(script, run_name="__main__")
    if script == "scripts/plan_run.py":  # takes the trainer's flags: runs to its end or to a run that is not there
        assert isinstance(left.value, SystemExit)
        assert left.value.code == 0 or ("--predict_loss" in words and "no run at runs/" in capsys.readouterr().err)
    else:
        assert isinstance(left.value, Parsed)


def test_all_commands_are_found() -> None:
    """The search works: it finds a command for each config and for each script described in the guides."""
    words = {word for (_, words), _ in COMMANDS for word in words}
    assert words >= {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    unnamed = {"convert_to_hf", "doctor", "make_synthetic", "install", "run_checks", "run_tests"}
    scripts = {f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py") if path.stem not in unnamed}
    assert {script for (script, _), _ in COMMANDS} >= scripts | {"pretrain/fabric_train.py", "scripts/convert_to_hf.sh"}


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_settings_exist(path: Path) -> None:
    known = {flag for action in build_parser()._actions for flag in action.option_strings}
    named = re.findall(r"(?<![\w-])--[a-z_]+\.[a-z_.]*[a-z_][0-9]*(?:_[a-z_]+)?", path.read_text(encoding="utf-8"))
    sets = "--data.val."  # followed by a name that the user chooses
    assert {name for name in named if name not in known and not name.startswith(sets)} <= {"--any.field"}


def test_help_is_a_screen_and_a_topic_for_each_section(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--help: usage, examples, the main settings and the topics. --help all: a line for every setting."""
    monkeypatch.setenv("COLUMNS", "80")

    def shown(*words: str) -> str:
        with pytest.raises(SystemExit) as left:
            parse([*words])
        assert not left.value.code
        return capsys.readouterr().out

    start = shown("--help")
    assert start.startswith("usage: ") and start.index("examples:") < start.index("--data.train PATH")
    assert len(start.splitlines()) <= 50 and max(map(len, start.splitlines())) <= 90
    topics = re.findall(r"^  --help (\w+)", start, flags=re.MULTILINE)
    assert topics[0] == "run" and topics[-1] == "all" and len(topics) == 13
    listed = [re.findall(r"^  --([\w.]+)", shown("--help", topic), flags=re.MULTILINE) for topic in topics]
    assert [name for names in listed[:-1] for name in names] == listed[-1]
    with pytest.raises(ValueError, match="--help optm: choose one of .*; did you mean optim?"):
        run_help("optm")
    listed = listed[-1]
    assert sorted(listed) == sorted(flag.name for flag in flags_of(RunArgs))
    known = {flag.removeprefix("--") for action in build_parser()._actions for flag in action.option_strings}
    sections = {name.rpartition(".")[0] for name in listed}  # --train FILE.yaml
    others = {"-h", "help", "config", "print_config", "print_shtab"}
    known = {flag.removesuffix("+") for flag in known if not flag.endswith(".help")}
    assert known - sections - others == set(listed)
    assert all(flag.help for flag in flags_of(RunArgs))
