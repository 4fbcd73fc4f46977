"""Command lines as users type them: bare switches, other trainers' names, flags over configs, repeated flags, ASCII."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from running import ROOT, flags, metrics, same_checkpoints, script, script_error, train, write_dataset

from lit_data.prepare.settings import Execution, Settings
from lit_data.tokenizers.training import TokenizerSettings, train_tokenizer
from lit_model.load import Checkpoint
from pretrain import fabric_train
from pretrain.args import ModelArgs, OptimArgs
from pretrain.cli.choices import RULES, SWITCHES
from pretrain.cli.command_line import OTHER_NAMES, ScriptParser, make_printable
from pretrain.cli.run_parser import build_parser, parse
from pretrain.distillation.write_cache import CacheRequest
from pretrain.init_from import model_config

BASE = ["--data.train=x", "--train.max_steps=3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    lengths = np.random.default_rng(7).integers(1, 90, size=90).tolist()
    write_dataset(folder / "train", lengths)
    write_dataset(folder / "val", lengths[:9], seed=1)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a command line that exits with status 2."""
    try:
        assert fabric_train.main(list(argv)) == 2
    except SystemExit as left:
        assert left.code == 2
    return capsys.readouterr().err


# Switches


def test_a_switch_may_be_bare_or_have_a_value() -> None:
    """--preflight, --preflight true, --preflight=False, --compile yes, and so for each true-or-false flag."""
    base = [*BASE, "--init_from=c", "--strategy=fsdp", "--precision=fp8"]
    switches = sorted(SWITCHES - {"--train.topology_invariant"})  # excludes some of the others; below

    def values(*words: str) -> set[Any]:
        args, found = parse([*base, *words]), set()
        for switch in switches:
            value: Any = args
            for name in switch.removeprefix("--").split("."):
                value = getattr(value, name)
            found.add(value)
        return found

    assert values(*switches) == values(*(f"{s}=True" for s in switches)) == {True}
    assert values(*(word for s in switches for word in (s, "yes"))) == {True}
    assert values(*(word for s in switches for word in (s, "false"))) == {False}
    assert values(*(f"{s}=no" for s in switches)) == {False}
    for words, expected in ((["--train.topology_invariant"], True), (["--train.topology_invariant", "no"], False)):
        assert parse([*BASE, *words]).train.topology_invariant is expected


def test_the_switches_are_all_that_the_parser_has() -> None:
    """The list of switches that may be bare equals the parser's."""
    kinds = {a.option_strings[0]: getattr(a, "_typehint", None) for a in build_parser()._actions if a.option_strings}
    assert {flag for flag, kind in kinds.items() if kind in (bool, bool | None)} == SWITCHES


def test_preflight_accepts_true(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Formerly "unrecognized arguments: true"; now it checks the machine and changes nothing."""
    assert fabric_train.main([*flags(data, tmp_path / "run"), "--preflight", "true"]) == 0
    assert "preflight: " in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_a_switch_of_a_script_may_have_a_value(data: Path) -> None:
    """--json true of a script, before and after its positional arguments."""
    for words in (["--json", "true", data / "train"], [data / "train", "--json=yes"], ["--json", data / "train"]):
        assert json.loads(script("inspect_dataset.py", *words).stdout)["documents"] == 90
    assert script("inspect_dataset.py", data / "train", "--json", "false").stdout.startswith(str(data / "train"))


# Wrong flags


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--learning_rate", "--optim.lr"),
        ("--lr", "--optim.lr"),
        ("--learning-rate", "--optim.lr"),
        ("--batch_size", "--train.global_batch_samples"),
        ("--per_device_train_batch_size", "--train.micro_batch_samples"),
        ("--num_train_epochs", "--train.max_epochs"),
        ("--max_steps", "--train.max_steps"),
        ("--warmup_ratio", "--optim.warmup_fraction"),
        ("--train.learning_rate", "--optim.lr"),
        ("--out-dir", "--out_dir"),
        ("--output_dir", "--out_dir"),
        ("--optim.learning_rat", "--optim.lr"),
        ("--data.trian", "--data.train"),
        ("--no_compile", "--compile"),
        ("--save.evry_steps", "--save.every_steps"),
    ],
)
def test_a_wrong_flag_gets_the_right_suggestion(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags of lit-gpt, TinyLlama and transformers, and typos, get a suggestion instead of 150 lines of usage."""
    error = refused(capsys, *BASE, typed, "3")
    assert f"there is no flag {typed}" in error and re.search(rf"{re.escape(meant)}( or|\?)", error), error
    assert len(error.splitlines()) == 2


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("plan_run.py --config debug.yaml", "the following arguments are required: --gpu"),
        ("plan_run.py --gpuu h100 --config debug.yaml", "there is no flag --gpuu; did you mean --gpu or --gpus?"),
        (
            "plan_run.py --gpu cpu --optim.lrr 1",
            "there is no flag --optim.lrr; did you mean --optim.lr or --optim.lr_min?",
        ),
        ("babylm.py -- --optim.lr 1", "the following arguments are required: --train, --dev, --out_dir"),
        ("babylm.py --out_dri x -- --optim.lr 1", "there is no flag --out_dri; did you mean --out_dir?"),
        ("train_tokenizer.py --vocabsize 3", "there is no flag --vocabsize; did you mean --vocab_size?"),
        ("trace_data.py export", "the following arguments are required: RUN, FILE"),
    ],
)
def test_a_missing_flag_is_no_wrong_one(command: str, error: str) -> None:
    """Flags for the trainer, which a script passes on, are not called unknown because another is missing."""
    name, *words = command.split()
    done = script(name, *words)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {error}"), done.stderr


@pytest.mark.parametrize(
    ("command", "ending"),
    [
        ("report.py RUN --output", ".html"),
        ("compare.py RUN --html", ".html"),
        ("compare.py RUN --png", ".png"),
        ("inspect_dataset.py RUN --picture", ".png or .pdf or .svg"),
        ("trace_data.py exposures RUN --picture", ".png or .pdf or .svg"),
    ],
)
def test_a_page_or_picture_replaces_nothing_else(command: str, ending: str, tmp_path: Path) -> None:
    """A file of another kind, a folder, or a file in place of a folder is refused before any work."""
    name, *words = command.replace("RUN", str(tmp_path)).split()
    file, folder = tmp_path / "metrics.csv", tmp_path / f"folder{ending[:5].strip()}"
    file.write_text("step,loss\n")
    folder.mkdir()
    assert f"{words[-1]} {file} must end in {ending}" in script_error(name, *words, file)
    assert f"{words[-1]} {folder} is a folder" in script_error(name, *words, folder)
    below = file / "x" / folder.name
    assert f"{words[-1]} {below}: {file} is a file, not a folder" in script_error(name, *words, below)
    assert file.read_text() == "step,loss\n" and list(folder.iterdir()) == []


def test_a_file_in_place_of_a_folder_is_named(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("ein Text\n" * 99)
    for command in (
        ["train_tokenizer.py", "--input", file, "--vocab_size", 270, "--output", file / "x"],
        ["quickstart_corpus.py", "--output", file / "x" / "y"],
        ["inspect_dataset.py", file / "x"],
    ):
        error = script_error(*command)
        assert f"{file} is a file, not a folder" in error or f"{file / 'x'} is not" in error, error
    assert file.is_file()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("model: 5", "model must hold settings, such as model.name, not 5"),
        ("train:", "train must hold settings, such as train.max_steps, not nothing"),
        ("data: {synthetic: [1]}", "data.synthetic must hold settings, such as data.synthetic.tokens, not [1]"),
    ],
)
def test_a_value_in_place_of_a_section(text: str, error: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"--config {config}: {error}")):
        fabric_train.parse([*BASE, "--config", str(config)])


def test_suggested_flags_exist() -> None:
    """Suggestions only name existing flags."""
    known = {flag.removeprefix("--") for a in build_parser()._actions for flag in a.option_strings}
    for path in (ROOT / "scripts").glob("*.py"):
        known |= set(re.findall(r"\"--(\w+)\"", path.read_text(encoding="utf-8")))
    known |= {field.name for kind in (Settings, Execution, CacheRequest) for field in dataclasses.fields(kind)}
    for other, ours in OTHER_NAMES.items():
        assert set(ours) <= known | {"run"}, other


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learning_rate: 3", "there is no setting learning_rate; did you mean optim.lr?"),
        ("train: {max_step: 3}", "there is no setting train.max_step; did you mean train.max_steps?"),
        ("optim: {lr: fast}", "--optim.lr fast: expected float"),
        ("strategy: fsdp2", "--strategy fsdp2: choose one of auto, ddp, fsdp; did you mean fsdp?"),
        ("devices: two", "--devices two: expected int or auto"),
        ("train: {attention: sdap}", "fa2, varlen, sdpa, loop, dense; did you mean sdpa"),
        ("train: {max_steps: 1.5}", "--train.max_steps 1.5: expected int"),
        ("init_layers: x", "--init_layers x: expected list[int]"),
        ("model: {attention_pattern: [foo]}", "expected list[one of ['full', 'sliding', 'chunked']]"),
        ("model: {rope_scaling: 3}", "--model.rope_scaling 3: expected the settings of a RopeScaling"),
    ],
)
def test_a_wrong_key_of_a_config(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config with another trainer's key, or with a value that does not fit."""
    (tmp_path / "c.yaml").write_text(setting)
    assert message in refused(capsys, f"--config={tmp_path / 'c.yaml'}", "--data.train=x")


def test_a_wrong_flag_of_a_script(tmp_path: Path) -> None:
    """Scripts respond in the same way, including those with subcommands."""
    for line, answer in (
        ("generate.py --model=m --prompt=a --max_tokens=3", "no flag --max_tokens; did you mean --max_new_tokens?"),
        (
            "make_synthetic.py --output=a --tokens=3 --seed=0 --out_dir=b",
            "no flag --out_dir; did you mean --output?",
        ),
        ("trace_data.py step run 0 --max_charz=3", "no flag --max_charz; did you mean --max_chars?"),
    ):
        done = script(*line.split())
        assert (done.returncode, answer in done.stderr) == (2, True), done.stderr


# Flags twice


def test_a_repeated_flag_of_a_script_is_refused() -> None:
    """The last of two values must not be used silently."""
    done = script("make_synthetic.py", "--output=a", "--seed=1", "--tokens=5", "--seed=2")
    assert done.returncode == 2 and "--seed: given twice: 1 and 2" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "make_synthetic.py --output a --tokens 5",
        "prepare_data.py --input a --tokenizer b --output c",
        "inspect_dataset.py a",
        "generate.py --model a --prompt b",
        "compare.py a",
        "trace_data.py influence a --document b",
    ],
)
@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(words: str, seed: int) -> None:
    assert script_error(*words.split(), "--seed", seed) == f"error: --seed {seed} must be in [0, 2^63)\n"


def test_a_repeated_list_flag_of_a_script_is_one_list() -> None:
    """--input a --input b c reads all three."""
    parser = ScriptParser()
    parser.add_argument("--input", nargs="+")
    parser.add_argument("--metadata", nargs="*", default=[])
    for _ in range(2):  # a parser may be used again
        args = parser.parse_args(["--input", "a", "--metadata", "m", "--input", "b", "c"])
        assert (args.input, args.metadata) == (["a", "b", "c"], ["m"])


def test_a_repeated_flag_of_the_trainer_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrapper scripts put their defaults first; the last value is used, with a message."""
    assert parse([*BASE, "--seed=1", "--seed", "2"]).seed == 2
    assert "--seed is given more than once; the last, 2, is used" in capsys.readouterr().err


# A setting replaces those that exclude it


def write(path: Path, **settings: object) -> str:
    path.write_text(yaml.safe_dump(settings))
    return f"--config={path}"


def test_a_length_flag_replaces_the_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--train.max_steps replaces max_epochs, and each of the three any other, without setting null."""
    for theirs in ("max_steps", "max_tokens", "max_epochs"):
        config = write(tmp_path / "c.yaml", train={theirs: 7}, data={"train": "x"})
        for ours in ("max_steps", "max_tokens", "max_epochs"):
            args = parse([config, f"--train.{ours}=5"])
            lengths = {name: getattr(args.train, name) for name in ("max_steps", "max_tokens", "max_epochs")}
            assert {k: v for k, v in lengths.items() if v is not None} == {ours: 5}
            told = f"--train.{ours} 5 replaces train.{theirs} 7 of {tmp_path / 'c.yaml'}"
            assert (told in capsys.readouterr().err) == (ours != theirs)


def test_data_flags_replace_the_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--data.train replaces the synthetic text of debug.yaml, or a mixture with its phases, and vice versa."""
    args = parse([f"--config={ROOT / 'configs/debug.yaml'}", "--data.train=x"])
    assert (args.data.train, args.data.synthetic.tokens) == (Path("x"), 0)
    assert "--data.train x replaces data.synthetic.tokens 30000" in capsys.readouterr().err
    mixture = [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 1.0}]
    phases = [{"from_step": 3, "weights": [1.0, 2.0]}]
    config = write(tmp_path / "c.yaml", data={"mixture": mixture, "phases": phases}, train={"max_steps": 3})
    args = parse([config, "--data.train=x"])
    assert (args.data.train, args.data.mixture, args.data.phases) == (Path("x"), [], [])
    config = write(tmp_path / "c.yaml", data={"train": "x", "val": "y"}, train={"max_steps": 3})
    args = parse([config, f"--data.mixture={json.dumps(mixture)}"])
    assert (args.data.train, len(args.data.mixture), args.data.val) == (None, 2, Path("y"))
    args = parse([config, "--data.synthetic.tokens=50"])
    assert (args.data.train, args.data.val, args.data.synthetic.tokens) == (None, None, 50)


def test_a_name_flag_replaces_the_configs_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """--model.name replaces the sizes of a config by the registered model's, not a mixture of both."""
    args = parse([f"--config={ROOT / 'configs/quickstart.yaml'}", "--data.train=x", "--model.name=llama-10M"])
    assert args.model == ModelArgs(name="llama-10M")
    assert "--model.name llama-10M replaces model.n_layer 4, " in capsys.readouterr().err


def test_size_flags_change_the_named_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes change the model named in a config, with a message; all else is as in the registry."""
    config = f"--config={ROOT / 'configs/babylm2025/gemma2.yaml'}"
    args = parse([config, "--data.train=x", "--model.n_layer=2", "--model.n_embd=384"])
    model, whole = (model_config(a, 100) for a in (args, parse([config, "--data.train=x"])))
    assert (model.n_layer, model.n_embd, model.norm_offset) == (2, 384, whole.norm_offset)
    assert "--model.n_layer 2, --model.n_embd 384 replace model.n_layer 12, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "typed", "left"),
    [
        ({"model": {"name": "debug"}}, ["--init_from=c"], {"model.name": None}),
        ({"model": {"n_layer": 3, "dropout": 0.1}}, ["--init_from=c"], {"model.n_layer": None, "model.dropout": 0.1}),
        ({"optim": {"warmup_steps": 9}}, ["--optim.warmup_fraction=0.5"], {"optim.warmup_steps": 0}),
        ({"optim": {"warmup_fraction": 0.5}}, ["--optim.warmup_steps=0"], {"optim.warmup_fraction": None}),
        ({"strategy": "fsdp", "train": {"cpu_offload": True}}, ["--strategy=ddp"], {"train.cpu_offload": False}),
        (
            {"objective": "distillation", "distillation": {"teachers": [{"path": "t"}], "teacher_device": "cpu"}},
            ["--distillation.cache=c"],
            {"distillation.teachers": [], "distillation.teacher_device": None},
        ),
        (
            {"objective": "distillation", "distillation": {"teachers": [{"path": "t"}]}},
            ["--objective=cross_entropy"],
            {"distillation.teachers": []},
        ),
    ],
)  # fmt: skip
def test_other_choices(config: dict[str, Any], typed: list[str], left: dict[str, object], tmp_path: Path) -> None:
    """For every pair of settings that exclude each other, the one on the command line is used."""
    train_part = {"max_steps": 20, **config.pop("train", {})}
    args = parse([write(tmp_path / "c.yaml", **config, train=train_part, data={"train": "x"}), *typed])
    for name, value in left.items():
        found: Any = args
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value, name


def test_a_second_config_overrides_the_first_and_flags_both(tmp_path: Path) -> None:
    """Several configs, with a flag in front of them: the position of flags does not matter."""
    one = write(tmp_path / "one.yaml", train={"max_epochs": 7}, seed=1, data={"train": "x"}, devices=1)
    two = write(tmp_path / "two.yaml", train={"max_steps": 5}, seed=2)
    args = parse(["--devices=3", one, two])
    assert (args.train.max_epochs, args.train.max_steps, args.seed, args.devices) == (None, 5, 2, 3)
    args = parse([two, one])
    assert (args.train.max_epochs, args.train.max_steps, args.seed) == (7, None, 1)


@pytest.mark.parametrize(
    "rivals",
    [
        ["--train.max_steps=3", "--train.max_epochs=2"],
        ["--data.train=x", "--data.synthetic.tokens=9"],
        ["--optim.warmup_steps=3", "--optim.warmup_fraction=0.1"],
    ],
)
def test_two_conflicting_flags_are_an_error(rivals: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """If both are on the command line the intention is unclear, even if a config has one of them."""
    error = refused(capsys, f"--config={ROOT / 'configs/debug.yaml'}", *rivals)
    for rival in rivals:
        assert rival.partition("=")[0] in error


def test_mutually_exclusive_settings_exist() -> None:
    """Each name in the table is a field."""
    defaults = build_parser().get_defaults()
    for key, _, rivals in RULES:
        for name in (key, *rivals):
            assert name in defaults, name


# The resolved config


def test_the_config_of_a_run_repeats_it(data: Path, tmp_path: Path) -> None:
    """RUN/config.yaml alone, with another folder, gives the same weights, whatever flags replaced. It stores the
    warm-up, a quarter of 12 steps, in steps; a resume may give it in that form.
    """
    config = write(tmp_path / "c.yaml", train={"max_epochs": 1}, optim={"warmup_steps": 5}, model={"name": "debug"})
    one, two, name = tmp_path / "one", tmp_path / "two", "iter-00000012-ckpt.pth"
    quick = {"train__micro_batch_samples": 8, "eval__every_steps": 12}
    typed = flags(data, one, **quick, optim__warmup_steps=None, optim__warmup_fraction=0.25)
    train(config, *typed)
    optim = yaml.safe_load((one / "config.yaml").read_text())["optim"]
    assert (optim["warmup_steps"], optim["warmup_fraction"]) == (3, None)
    rates = [float(row["lr"]) for row in metrics(one) if row["lr"]]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    train(f"--config={one / 'config.yaml'}", f"--out_dir={two}")
    same_checkpoints(one / name, two / name)
    assert Checkpoint(two / name).model_config == Checkpoint(one / name).model_config
    done = train(config, *flags(data, one, **quick, optim__warmup_steps=3), "--resume=latest")
    assert "is finished" in done.stdout
    assert OptimArgs(warmup_fraction=0.1, steps_before=50).resolved(150).warmup_steps == 20


# Generation


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, next to a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "text.txt").write_text("Grüße aus Würzburg, \N{GRINNING FACE}! " * 30, encoding="utf-8")
    tokenizer = train_tokenizer(TokenizerSettings((str(folder / "text.txt"),), 270, folder / "tokenizer"))
    settings = {"model__vocab_size": tokenizer.vocab_size, "train__max_steps": 2, "data__val": None}
    train(*flags(data, folder / "run", **settings))
    return folder


def generate(model: Path, *arguments: str) -> list[str]:
    return ["--model", str(model / "run"), "--tokenizer", str(model / "tokenizer"), "--max_new_tokens=8", *arguments]


def test_several_prompts_give_several_texts(model: Path) -> None:
    """Each --prompt is continued, in order, in the same way as alone."""
    alone = [script("generate.py", *generate(model, f"--prompt={p}")).stdout for p in ("Grüße", "aus")]
    both = script("generate.py", *generate(model, "--prompt=Grüße", "--prompt=aus"))
    assert both.returncode == 0 and both.stdout == "\n".join(alone)
    lines = script("generate.py", *generate(model, "--prompt=Grüße", "--prompt=aus", "--json")).stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["Grüße", "aus"]
    ids = script("generate.py", *generate(model, "--prompt_ids=5,6", "--prompt_ids=7", "--json")).stdout.splitlines()
    assert [json.loads(line)["prompt_ids"] for line in ids] == [[5, 6], [7]]
    # A prompt that is too long is refused before generating anything.
    long = script("generate.py", *generate(model, "--prompt=aus", f"--prompt={'x' * 500}"))
    assert (long.returncode, long.stdout) == (2, "")


def test_any_text_can_be_printed_in_ascii(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LANG=C, PYTHONIOENCODING=ascii: unsupported characters are escaped as in JSON, also in errors."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    make_printable()
    text = "Grüße \N{GRINNING FACE} \udcff"
    print(json.dumps({"text": text}, ensure_ascii=False), flush=True)
    assert json.loads(out.buffer.getvalue()) == {"text": text}  # type: ignore[attr-defined]
    assert b"\\u00fc" in out.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("scripts/generate.py", ["--model={run}", "--tokenizer={tokenizer}", "--prompt=Grüße", "--max_new_tokens=3"]),
        ("scripts/inspect_dataset.py", ["{umlaut}", "--json"]),
        ("pretrain/fabric_train.py", ["--config", "{umlaut}/c.yaml", "--learning_räte", "3"]),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_scripts_in_an_ascii_terminal(name: str, arguments: list[str], model: Path, data: Path, tmp_path: Path) -> None:
    """Real processes in the C locale, one of them also without Python's UTF-8 mode: no traceback."""
    (tmp_path / "größe").symlink_to(data / "train")
    places = {"run": model / "run", "tokenizer": model / "tokenizer", "umlaut": tmp_path / "größe"}
    environment = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    if "generate" in name:
        environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = [sys.executable, str(ROOT / name), *(a.format(**places) for a in arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment}, timeout=200)
    assert "Traceback" not in done.stderr and "UnicodeEncodeError" not in done.stderr, done.stderr
    assert done.returncode == (2 if "fabric" in name else 0), done.stderr
    assert re.search(r"\\u00f6|\\u00fc|\\u00e4", done.stdout + done.stderr)


@pytest.mark.parametrize(
    "line",
    ["pretrain/fabric_train.py --config configs/debug.yaml", "scripts/plan_run.py --gpu cpu", "scripts/report.py x"],
)
def test_a_python_without_the_packages_is_told_which_to_use(line: str) -> None:
    """-S: without the installed packages."""
    done = subprocess.run([sys.executable, "-S", *line.split()], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "has no package" in done.stderr and "use .venv/bin/python, which `make install` creates" in done.stderr


def test_every_script_uses_the_shared_parser() -> None:
    """Except install.py, which uses argparse so that an old Python can run it."""
    for path in sorted((ROOT / "scripts").glob("*.py")):
        uses = "argparse.ArgumentParser(" in path.read_text(encoding="utf-8")
        assert uses == (path.name == "install.py"), path
