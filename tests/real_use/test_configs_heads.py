"""The comment at the top of every config contains a command that works."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from running import ROOT, write_dataset

from lit_files.checkpoint_name import list_checkpoints
from pretrain import fabric_train
from pretrain.args import RunArgs
from pretrain.data import open_datasets
from pretrain.launch import find_launch

CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))
# Trained for two steps by their own command, teachers before their student. The others are too large for a test.
SMALL = [
    Path("configs") / f"{name}.yaml"
    for name in (
        "debug", "synthetic", "quickstart", "distillation_small/teacher_llama", "distillation_small/teacher_gpt2",
        "distillation_small/student",
    )
]  # fmt: skip


def command_of(path: Path) -> list[str]:
    """The command in the config's leading comment, as words."""
    head = re.match(r"(?:#.*\n)+", (ROOT / path).read_text(encoding="utf-8"))
    assert head is not None, path
    lines = [line.removeprefix("#") for line in head[0].splitlines()]
    start = next(i for i, line in enumerate(lines[:5]) if re.match(r"   (python|sbatch) ", line))
    text = ""
    for line in lines[start:]:
        text += line.rstrip("\\")
        if not line.endswith("\\"):
            break
    return shlex.split(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three million tokens, enough for every warm-up."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "train", [50_000] * 60)
    write_dataset(folder / "val", [600] * 9, seed=1)
    return folder


@pytest.fixture
def checkout(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change to a folder with configs/ and data/, as the commands expect it, without launcher variables."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.use_deterministic_algorithms(False)  # debug.yaml sets it


def read(words: list[str], monkeypatch: pytest.MonkeyPatch) -> RunArgs:
    """The settings of a command; for sbatch, with the processes that srun would start."""
    if words[0] == "python":
        assert words[1] == "pretrain/fabric_train.py"
        return fabric_train.parse(words[2:])
    size = dict(word.removeprefix("--").split("=") for word in words[1 : words.index("cluster/train.sbatch")])
    nodes, tasks = int(size["nodes"]), int(size["ntasks-per-node"])
    assert size["gpus-per-node"] == size["ntasks-per-node"]
    step = {"ID": 0, "NUM_TASKS": nodes * tasks, "NUM_NODES": nodes, "TASKS_PER_NODE": f"{tasks}(x{nodes})"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_STEP_{name}", str(value))
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert find_launch() is not None
    return fabric_train.parse(words[words.index("cluster/train.sbatch") + 1 :])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_of_a_config_is_valid(
    path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names this config and overrides nothing in it, and its data, model and sizes match."""
    words = command_of(path)
    assert words[words.index("--config") + 1] == str(path)
    args = read(words, monkeypatch)
    assert "replaces" not in capsys.readouterr().err  # what srun starts is what the config says, if it says it
    devices = args.devices if isinstance(args.devices, int) else 1
    assert args.train.global_batch_samples % (args.num_nodes * devices * args.train.micro_batch_samples) == 0
    if args.data.synthetic.tokens:
        return
    teacherless = dataclasses.replace(args, objective="cross_entropy", distillation=type(args.distillation)())
    datasets, config = open_datasets(teacherless, None)
    assert datasets.val and datasets.block_size <= config.block_size


def test_the_teachers_of_a_config_have_configs(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    """distillation.yaml expects runs/llama-360M, which formerly no config created."""
    by_hand = [words for path in CONFIGS if (words := command_of(path))[0] == "python"]
    runs = [read(words, monkeypatch) for words in by_hand]
    teachers = {str(teacher.path) for args in runs for teacher in args.distillation.teachers}
    assert len(teachers) == 4 and teachers <= {str(args.out_dir) for args in runs}


@pytest.mark.parametrize("paths", [SMALL[2:3], pytest.param(SMALL, marks=pytest.mark.slow)], ids=["quickstart", "all"])
def test_small_configs_train_by_their_command(paths: list[Path], checkout: Path) -> None:
    """The unchanged command, for two steps; the student finds its teachers where their commands wrote them."""
    for path in paths:
        words = command_of(path)[2:]
        if "--out_dir" not in words and "out_dir:" not in path.read_text():
            words += ["--out_dir", f"runs/{path.stem}"]
        if "--data.train" not in words:
            words += ["--data.synthetic.tokens=8000"]
        words += ["--train.max_steps=2", "--optim.warmup_steps=1", "--eval.max_samples=4", "--accelerator=cpu"]
        args = fabric_train.parse(words)
        assert fabric_train.main(words) == 0, path
        assert args.out_dir is not None and len(list_checkpoints(args.out_dir)) == 1, path
