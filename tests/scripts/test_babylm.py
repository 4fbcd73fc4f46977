"""scripts/babylm.py: the plan of commands, what is skipped after a kill, refusals, and all of it at a small size."""

from __future__ import annotations

import csv
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from running import ROOT, script, script_error
from small_models import synthetic_texts

from lit_eval.score.results import read_results
from lit_files.checkpoint_name import list_checkpoints
from lit_model.load import Checkpoint
from pretrain.cli.run_parser import parse
from pretrain.init_from import model_config
from pretrain.pipeline import babylm, steps, training
from pretrain.pipeline.steps import Pipeline, StepFailed, run_work, shown

NAMES_2024 = ("bnc_spoken", "childes", "gutenberg", "open_subtitles", "simple_wiki", "switchboard")  # and 2025, 2026
NAMES_2023 = ("aochildes", "bnc_spoken", "cbt", "children_stories", "gutenberg", "open_subtitles", "qed",
              "simple_wikipedia", "switchboard", "wikipedia")  # fmt: skip


def write_corpus(folder: Path, names: Sequence[str] = NAMES_2024, ending: str = "", texts: int = 2) -> list[str]:
    """Write folder/train and folder/dev. Returns the flags that name them and folder/out."""
    for number, side in enumerate(("train", "dev")):
        (folder / side).mkdir(parents=True)
        for at, name in enumerate(names):
            text = "\n".join(synthetic_texts(texts if side == "train" else 1, 100 * number + at))
            (folder / side / f"{name}.{side}{ending}").write_text(f"A1: {text}\n", encoding="utf-8")
    return [f"--{name}={folder / name}" for name in ("train", "dev")] + [f"--out_dir={folder / 'out'}"]


class FakeCommands:
    """Stands in for `call`: notes each command and writes its output; `fail_at` raises at the n-th instead."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fail_at: int | None = None

    def __call__(self, command: Sequence[str], capture: bool = False) -> str:
        if len(self.ran) == self.fail_at:
            raise StepFailed("killed")
        self.ran.append(Path(command[1]).stem)
        if "--output" in command:
            Path(command[command.index("--output") + 1]).mkdir(parents=True, exist_ok=True)
        return ""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCommands:
    commands = FakeCommands()
    monkeypatch.setattr(steps, "call", commands)
    return commands


ALL = ["train_tokenizer", "prepare_data", "fabric_train", "evaluate", "report", "publish", "publish"]


@pytest.mark.parametrize("names, ending", [(NAMES_2024, ""), (NAMES_2024, ".txt"), (NAMES_2023, ".gz")])
def test_plan_of_commands(tmp_path: Path, names: Sequence[str], ending: str, fake: FakeCommands) -> None:
    """--dry_run prints every command and writes nothing, for the file names of 2024 and 2025, 2026, and 2023."""
    given = write_corpus(tmp_path, names, ending="" if ending == ".gz" else ending)
    if ending == ".gz":
        subprocess.run(["gzip", *map(str, tmp_path.glob("*/*.*"))], check=True)
    done = script("babylm.py", *given, "--dry_run", "--track", "strict", "--", "--train.max_epochs", "10")
    assert done.returncode == 0, done.stderr
    commands = [line[2:] for line in done.stdout.splitlines() if line.startswith("$ ")]
    out, text = tmp_path / "out", f"'{tmp_path}/train/*.train{ending}'"
    assert [Path(command.split()[1]).stem for command in commands] == ALL
    assert f"--input {text} --cleaner babylm" in commands[0] and "--vocab_size 16000" in commands[0]
    assert f"--input {text} --val_input '{tmp_path}/dev/*.dev{ending}' --cleaner babylm" in commands[1]
    training = commands[2]
    assert "--config configs/babyllama/llama-58M.yaml" in training and "--resume auto" in training
    assert "--save.at_words babylm_strict" in training and training.endswith("--train.max_epochs 10")
    assert f"publish.py {out}/llama-58M --to {out}/release" in commands[-2]
    assert fake.ran == [] and not out.exists()


def test_called_in_another_folder(tmp_path: Path, fake: FakeCommands) -> None:
    """Paths are relative to the folder of the call, and the commands, which run in the checkout, are the same."""
    given = [*write_corpus(tmp_path), "--dry_run", "--model", "student", "--teachers", "teacher_llama"]
    there = [flag.replace(f"{tmp_path}/", "") for flag in given]
    here, other = script("babylm.py", *given), script("babylm.py", *there, cwd=tmp_path)
    assert here.returncode == other.returncode == 0, other.stderr
    commands = [[line for line in done.stdout.splitlines() if line.startswith("$ ")] for done in (here, other)]
    assert commands[0] == commands[1] and len(commands[0]) == len(ALL) + 1


def test_a_flag_given_after_the_dashes_replaces_ours(tmp_path: Path, fake: FakeCommands) -> None:
    """The command names each flag once, so that training notes no repetition; and planning prints no note."""
    given = write_corpus(tmp_path)
    theirs = {"save.at_words": "2K", "save.keep_last": "5", "train.max_steps": "30", "model.vocab_size": "400"}
    words = [word for flag, value in theirs.items() for word in (f"--{flag}", value)]
    more = ["--max_steps", "20", "--vocab_size", "300", "--dry_run", "--", *words, "--train.memory_limit_gib", "4"]
    done = script("babylm.py", *given, *more)
    assert done.returncode == 0 and "note:" not in done.stderr, done.stderr
    (training,) = [line for line in done.stdout.splitlines() if line.startswith("$ ") and "fabric_train.py" in line]
    names = re.findall(r"--(\S+)", training)
    assert len(names) == len(set(names)) and f"{' '.join(words)} --train.memory_limit_gib 4" in training
    assert "--vocab_size 400" in done.stdout.split("fabric_train.py")[0]


def test_teachers_come_first(tmp_path: Path, fake: FakeCommands) -> None:
    """Each is trained on the same data with the model's vocabulary; flags of distillation are the model's alone."""
    given = write_corpus(tmp_path)
    more = ["--model", "distillation", "--teachers", "llama-16M", "gpt-97M", "--vocab_size", "300", "--dry_run"]
    done = script("babylm.py", *given, *more, "--", "--distillation.alpha", "0.3", "--devices", "1")
    assert done.returncode == 0, done.stderr
    trainings = [line[2:] for line in done.stdout.splitlines() if line.startswith("$ ") and "fabric_train.py" in line]
    assert [re.findall(r"--out_dir (\S+)", line) for line in trainings] == [
        [f"{tmp_path}/out/{name}"] for name in ("llama-16M", "gpt-97M", "distillation")
    ]
    assert all("--model.vocab_size 300" in line and line.endswith("--devices 1") for line in trainings)
    paths = [f'{{"path": "{tmp_path}/out/{name}"}}' for name in ("llama-16M", "gpt-97M")]
    assert f"--distillation.teachers '[{', '.join(paths)}]'" in trainings[-1]
    assert ["--distillation.alpha 0.3" in line for line in trainings] == [False, False, True]
    assert ["--save.at_words" in line for line in trainings] == [False, False, True]


def test_small_teachers_have_their_vocabulary(tmp_path: Path, fake: FakeCommands) -> None:
    """By the names that the refusal without --teachers gives."""
    given = [*write_corpus(tmp_path), "--model", "student", "--teachers", "teacher_llama", "teacher_gpt2", "--dry_run"]
    done = script("babylm.py", *given)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "=== tokenizer of 2,048 ids" in done.stdout


def test_devices_that_cannot_share_a_step(tmp_path: Path) -> None:
    """Refused before the tokenizer is trained; those that can, share it."""
    given = [*write_corpus(tmp_path), "--vocab_size", "300", "--dry_run", "--"]
    done = script("babylm.py", *given, "--devices", "5")
    assert done.returncode == 2 and "--train.global_batch_samples 32 is not a multiple" in done.stderr
    done = script("babylm.py", *given, "--devices", "4", "--train.max_epochs", "10")
    assert done.returncode == 0, done.stderr


def test_the_time_of_each_training_is_estimated(tmp_path: Path, fake: FakeCommands) -> None:
    """A student's with its teachers', which are not there yet; days on a CPU are a warning."""
    given = [*write_corpus(tmp_path), "--dry_run", "--max_steps"]
    teachers = ["teacher_llama", "teacher_gpt2"]
    done = script("babylm.py", *given, "100", "--model", "student", "--teachers", *teachers)
    assert done.returncode == 0 and not done.stderr, done.stderr
    note = r"^=== (\w+).*\nexpected to take \d.+ \(.+ to .+\) on this machine\n\$ "
    assert re.findall(note, done.stdout, re.M) == ["teacher", "teacher", "training"]
    student, large = (
        training.parse_quietly(["", "", f"--config=configs/{name}.yaml", "--train.max_steps=9", "--data.train=data"])
        for name in ("distillation_small/student", "babyllama/llama-360M")
    )
    config, teacher = model_config(student, 2048), model_config(large, 2048)
    alone, taught = (training.seconds_here(student, config, 1000, models) for models in ([], [teacher]))
    assert alone is not None and taught is not None and taught.likely > 2 * alone.likely
    long = script("babylm.py", *given, "1000000", "--model", "llama-360M")
    assert long.returncode == 0
    assert re.search(r"warning: llama-360M has 360 million parameters and is expected to train for \d+ y ", long.stderr)


def test_done_steps_are_skipped(tmp_path: Path, fake: FakeCommands, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure before any command, repeating the call runs each remaining command, and none of a done step."""
    given = write_corpus(tmp_path)
    counted = 0
    count = babylm.Text.count_words

    def counting(text: babylm.Text) -> int:
        nonlocal counted
        counted += 1
        return count(text)

    monkeypatch.setattr(babylm.Text, "count_words", counting)
    parsed = functools.cache(lambda words: parse(list(words)))  # the slowest part of a call
    monkeypatch.setattr(training, "parse", lambda words: parsed(tuple(words)))
    given += ["--model", "llama-10M", "--max_steps", "20"]
    # (commands until the failure, those that ran before it); a step of two commands is repeated whole.
    for fail_at, expected in ((0, ALL[:0]), (2, ALL[:2]), (3, ALL[2:5]), (1, ["publish"]), (None, ["publish"] * 2)):
        fake.ran, fake.fail_at = [], fail_at
        done = script("babylm.py", *given)
        assert fake.ran == expected and done.returncode == int(fail_at is not None), done.stderr
        assert fail_at is None or "Repeat the command to resume" in done.stderr
    fake.ran = []
    done = script("babylm.py", *given)
    assert done.returncode == 0 and fake.ran == [] and "is finished" in done.stdout and counted == 2
    # Another task is evaluated, and the report and the submission follow.
    done = script("babylm.py", *given, "--tasks", "german_pairs")
    assert done.returncode == 0 and fake.ran == ["evaluate", "evaluate", "report", "publish", "publish"]
    # Other settings and other text belong to another folder.
    error = script_error("babylm.py", *given[:3], "--model", "llama-16M", "--max_steps", "20")
    assert "--model llama-16M" in error and "was started with --model llama-10M" in error
    (tmp_path / "train" / "childes.train").write_text("other")
    error = script_error("babylm.py", *given)
    assert "--train" in error and "have changed since" in error


def damage(name: str, content: bytes) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return []

    return write


def empty(side: str) -> Callable[[Path], list[str]]:
    def remove(folder: Path) -> list[str]:
        for file in (folder / side).iterdir():
            file.unlink()
        return []

    return remove


def only_text(folder: Path) -> list[str]:
    for file in (folder / "train").iterdir():
        file.rename(file.with_suffix(".txt"))
    return []


def other_output(folder: Path) -> list[str]:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    return []


def blank(folder: Path) -> list[str]:
    for file in (folder / "dev").iterdir():
        file.write_text(" \n")
    return []


REFUSED: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "empty folder": (empty("train"), ("--train", "holds no *.train file; it is empty")),
    "no .train file": (only_text, ("holds no *.train file; it holds bnc_spoken.txt",)),
    "the folder above": (lambda f: [f"--dev={f}"], ("holds no *.dev file; its folder dev does",)),
    "no folder": (lambda f: [f"--dev={f / 'none'}"], ("--dev", "there is no such folder")),
    "blank files": (blank, ("--dev", "hold no text")),
    "encoding": (damage("train/cbt.train", b"caf\xe9 "), ("cbt.train", "UTF-8")),
    "unknown name": (damage("train/mine.train", b"text"), ("--cleaner babylm", "mine.train", "--cleaner none")),
    "model": (lambda f: ["--model", "llama-59M"], ("--model llama-59M", "did you mean llama-9")),
    "another folder's files": (other_output, ("--out_dir", "holds other files")),
    "flag of ours": (lambda f: ["--", "--out_dir", "x"], ("--out_dir after --",)),
    "reserved name": (
        lambda f: [(f / "data.yaml").write_text("model: {name: llama-10M}\n"), "--model", str(f / "data.yaml")][1:],
        ("a config named data", "rename the file"),
    ),
    "teachers again": (
        lambda f: ["--teachers", "gpt-97M", "--", "--distillation.teachers=[]"],
        ("--distillation.teachers after --",),
    ),
    "teacher": (lambda f: ["--teachers", "gpt-96M"], ("--teachers gpt-96M", "did you mean gpt-97M")),
    "small teachers by name": (
        lambda f: ["--model", "student"],
        ("learns from teachers", "add --teachers teacher_llama teacher_gpt2"),
    ),
    "its own teacher": (lambda f: ["--teachers", "llama-58M"], ("--teachers", "two models named llama-58M")),
    "no teachers": (
        lambda f: ["--model", "distillation"],
        ("learns from teachers", "runs/llama-360M is not there: add --teachers llama-360M gpt-705M"),
    ),
    "steps": (lambda f: ["--max_steps", "0"], ("--max_steps 0",)),
    "task": (lambda f: ["--tasks", "german_pears"], ("german_pears", "german_pairs")),
    "evaluation data": (lambda f: [f"--evaluation_data={f}"], ("none of BabyLM's datasets",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_come_before_any_work(tmp_path: Path, case: str, fake: FakeCommands) -> None:
    prepare, parts = REFUSED[case]
    given = write_corpus(tmp_path)
    more = prepare(tmp_path)
    if more and more[0].startswith("--dev="):
        del given[1]
    done = script("babylm.py", *given, *more)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert fake.ran == [] and not (tmp_path / "out" / "pipeline.json").exists()


def test_text_over_the_limit_of_a_track_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(babylm, "LIMITS", {"strict-small": 100, "strict": 200})
    given = write_corpus(tmp_path)
    words = sum(len(file.read_text().split()) for file in (tmp_path / "train").iterdir())
    assert words > 200
    for track, limit in (("strict-small", 100), (None, 200)):
        done = script("babylm.py", *given, "--dry_run", *(["--track", track] if track is not None else []))
        assert done.returncode == 0 and f"warning: the training text has {words - limit:,} words more" in done.stderr


def test_commands_as_they_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Commands run in ROOT and are printed; a failed one, or one that a signal stopped, ends the pipeline."""
    seen, ok = tmp_path / "seen", (sys.executable, "-S", "-c", "import os; print(os.getcwd())")
    pipeline = Pipeline(tmp_path, {"a": 1})
    titles = [
        steps.Step("first", (ok,)),
        steps.Step("second", ((sys.executable, "-S", "-c", "import sys; sys.exit(3)"),)),
    ]
    assert run_work(lambda: pipeline.run(titles)) == 1
    printed = capfd.readouterr()
    assert f"=== first\n$ {shown(ok)}\n{ROOT}\n" in printed.out and "exit code 3: python" in printed.err
    assert json.loads((tmp_path / "pipeline.json").read_text())["done"] == ["first"]
    seen.touch()
    stopped = [steps.Step("training", (ok,), stopped=seen)]
    assert run_work(lambda: Pipeline(tmp_path, {"a": 1}).run(stopped)) == 1 and "stopped" in capfd.readouterr().err
    with pytest.raises(SystemExit):  # SIGTERM
        run_work(lambda: sys.exit(143))
    assert capfd.readouterr().err == "stopped; repeat the command to resume here\n"
    with pytest.raises(ValueError, match="no --a: .* was started with --a 1"):
        Pipeline(tmp_path, {"a": None})


@pytest.mark.slow
def test_from_text_to_a_submission(tmp_path: Path) -> None:
    """End to end at a small size with a teacher: killed in training, resumed; budgets, scores, predictions, report and
    revisions.
    """
    given = write_corpus(tmp_path, texts=300)
    named = {"UID": "toy", "field": "a", "linguistics_term": "b"}
    texts = zip(synthetic_texts(8, 1), synthetic_texts(8, 2), strict=True)
    lines = [json.dumps({"sentence_good": a, "sentence_bad": b, **named}) for a, b in texts]
    for name in ("full_eval/blimp_filtered", "fast_eval/blimp_fast"):
        (tmp_path / "evaluation_data" / name).mkdir(parents=True)
        (tmp_path / "evaluation_data" / name / "toy.jsonl").write_text("\n".join(lines))
    model = ["--model.n_layer=1", "--model.n_embd=32", "--model.n_head=2", "--model.n_query_groups=2"]
    line = [
        sys.executable, str(ROOT / "scripts" / "babylm.py"), *given, "--model", "llama-10M", "--teachers", "llama-16M",
        "--vocab_size", "400", "--max_steps", "40", f"--evaluation_data={tmp_path / 'evaluation_data'}", "--",
        *model, "--model.intermediate_size=32", "--save.at_words", "2K,10K", "--save.every_steps", "10",
        "--accelerator", "cpu",
    ]  # fmt: skip
    run, out = tmp_path / "out" / "llama-10M", tmp_path / "out"
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (run.is_dir() and list_checkpoints(run)):
        assert process.poll() is None
        time.sleep(0.2)
    process.terminate()
    assert process.wait() == 143
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done before") >= 3
    assert "teachers llama-16M" in " ".join(done.stdout.split())
    with open(run / "metrics.csv", newline="") as file:
        assert all(float(row["divergence"]) > 0 for row in csv.DictReader(file) if row["train_loss"])
    budgets = {words for path in list_checkpoints(run) for words in Checkpoint(path).meta.get("word_budgets") or []}
    assert budgets == {2000, 10_000}
    assert {path.name for path in (out / "release").iterdir()} >= {"main", "chck_0.002M", "chck_0.01M"}
    assert (out / "results" / "llama-10M" / "main" / "zero_shot" / "causal").is_dir()
    assert (out / "results" / "llama-10M" / "chck_0.01M").is_dir() and (out / "report.html").is_file()
    (results,) = [read_results(path) for path in (run / "evaluation").glob("iter-00000040-ckpt.json")]
    assert results is not None
    again = subprocess.run(line, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "is finished" in again.stdout and "$ " not in again.stdout
