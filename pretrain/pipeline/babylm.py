"""The BabyLM challenge as a pipeline: its text files -> tokenizer, data, model, scores, report and submission."""

from __future__ import annotations

import contextlib
import glob
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_data.corpus.cleaners import BABYLM_FILES, open_cleaner
from lit_data.corpus.files import COMPRESSED, TextFile, check_output_is_outside, list_files
from lit_data.corpus.readers import read_documents
from lit_eval.evaluation.named_tasks import check_given
from lit_eval.evaluation.settings import EvaluationSettings
from lit_files.lock import lock_folder
from lit_files.near_names import did_you_mean
from lit_files.run_files import EVALUATION, REPORT, STOPPED
from lit_model.config import ModelConfig
from lit_model.cost import count_parameters
from lit_model.load import load_tensors
from lit_model.registry import get_config
from pretrain.args import RunArgs
from pretrain.cli.choices import check_config
from pretrain.init_from import model_config
from pretrain.logs.messages import warn
from pretrain.pipeline.babylm_settings import NO_CLEANER, BabylmSettings, Track
from pretrain.pipeline.steps import (
    OWN_FLAGS,
    ROOT,
    STATE,
    Pipeline,
    Step,
    absent,
    begin,
    check_flags,
    from_root,
    names_of,
    python,
    run_work,
    shown,
)
from pretrain.pipeline.training import flags_of_this_machine, parse_quietly, seconds_here
from pretrain.planning.describe import durations

LIMITS: dict[Track, int] = {"strict-small": 10_000_000, "strict": 100_000_000}  # words of training text
AT_WORDS: dict[Track, str] = {"strict-small": "babylm", "strict": "babylm_strict"}  # of --save.at_words
TOLERANCE = 1.05  # a text of 10.2M words is meant for strict-small
CONFIGS = ("babyllama/*.yaml", "babylm2025/*.yaml", "distillation.yaml", "distillation_small/*.yaml")
RESERVED = {"tokenizer", "data", "results", "release"}  # folders of --out_dir
# Of a config without a known model or a vocabulary. In a narrow model a large one would take most of the parameters.
DEFAULT_VOCABULARY, OF_NARROW_MODELS, NARROW = 16_000, 2048, 256
LONG_S = 86_400.0  # a training on a CPU that is expected to take longer is worth a warning


@dataclass(frozen=True)
class Text:
    """The challenge's text for training or validation.

    Attributes:
        flag: its folder's.
        patterns: of the files.
    """

    flag: str
    folder: Path
    patterns: tuple[str, ...]
    files: tuple[TextFile, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Name of each file -> bytes."""
        return {file.path.name: file.path.stat().st_size for file in self.files}

    def count_words(self) -> int:
        """Words separated by whitespace. Raises ValueError naming an unreadable file, or a folder without text."""
        total = 0
        for document in read_documents(self.files):
            words = len(document.text.split())
            print(f"{document.source}: {words:,} words", flush=True)
            total += words
        if not total:
            raise ValueError(f"--{self.flag} {self.folder}: its files hold no text")
        return total


def find_text(flag: str, folder: Path) -> Text:
    """The files *.FLAG and *.FLAG.txt (2026) of a folder, also compressed.

    Raises ValueError or FileNotFoundError naming the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--{flag} {folder}: there is no such folder")
    suffixes = [f".{flag}{kind}{end}" for kind in ("", ".txt") for end in ("", *COMPRESSED)]
    found = [suffix for suffix in suffixes if any(folder.glob(f"*{suffix}"))]
    if not found:
        inside = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        below = [path.name for path in folder.iterdir() if any(path.glob(f"*.{flag}*"))]
        hint = (
            f"its folder {below[0]} does" if below else f"it holds {', '.join(inside[:3])}" if inside else "it is empty"
        )
        raise ValueError(f"--{flag} {folder} holds no *.{flag} file; {hint}")
    patterns = tuple(f"{glob.escape(str(from_root(folder)))}/*{suffix}" for suffix in found)
    files = list_files([f"{glob.escape(str(folder))}/*{suffix}" for suffix in found])
    return Text(flag, folder, patterns, tuple(files))


def check_cleaner(name: str, files: Sequence[TextFile]) -> None:
    """Raises ValueError for an unknown cleaner, or a file that the cleaner does not know."""
    if name == NO_CLEANER:
        return
    open_cleaner(name)
    unknown = [f.path for f in files if f.path.name.partition(".")[0] not in BABYLM_FILES]
    if name.startswith("babylm") and unknown:
        raise ValueError(
            f"--cleaner {name} has no rule for {unknown[0]}: it knows the challenge's files "
            f"({', '.join(BABYLM_FILES)}). Rename the file, or leave all text unchanged with --cleaner {NO_CLEANER}"
        )


def find_config(model: str, flag: str = "model") -> Path:
    """The config of a model, relative to ROOT if it is there. Raises ValueError with the flag and the nearest names."""
    if model.endswith((".yaml", ".yml")):
        check_config(model, flag)
        return from_root(Path(model))
    known = {path.stem: path for pattern in CONFIGS for path in sorted((ROOT / "configs").glob(pattern))}
    if model not in known:
        hint = did_you_mean(model, known) or f"; choose one of {', '.join(known)}"
        raise ValueError(f"--{flag} {model}: there is no such config{hint}")
    return from_root(known[model])


def choose_track(track: Track | None, words: int) -> Track:
    """The track, by the number of words if it is not given; prints a warning if the text exceeds its limit."""
    chosen: Track = track or ("strict-small" if words <= TOLERANCE * LIMITS["strict-small"] else "strict")
    print(f"track {chosen}: {words:,} of {LIMITS[chosen]:,} words of training text", flush=True)
    if words > LIMITS[chosen]:
        print(
            f"warning: the training text has {words - LIMITS[chosen]:,} words more than the track {chosen} allows "
            f"({LIMITS[chosen]:,}); a model trained on it is outside of the rules",
            file=sys.stderr,
        )
    return chosen


@dataclass(frozen=True)
class Training:
    """A training of the pipeline.

    Attributes:
        title: of its step.
        run: its folder.
        vocabulary: ids of the model.
        args, model: of the command.
        teachers: that its own settings name.
    """

    title: str
    command: tuple[str, ...]
    run: Path
    vocabulary: int
    args: RunArgs
    model: ModelConfig
    teachers: tuple[Path, ...]

    def step(self, words: int, teachers: Sequence[ModelConfig]) -> Step:
        """Its step, with the time that it is expected to take; see `seconds_here`."""
        seconds = seconds_here(self.args, self.model, words, teachers)
        if seconds is not None and seconds.likely > LONG_S and not torch.cuda.is_available():
            warn(
                f"{self.run.name} has {count_parameters(self.model) / 1e6:,.0f} million parameters and is expected to "
                f"train for {durations(seconds)} on this CPU; try a smaller model, or --max_steps"
            )
        note = f"expected to take {durations(seconds)} on this machine" if seconds is not None else ""
        return Step(self.title, (self.command,), stopped=self.run / STOPPED, note=note)


def plan_training(
    settings: BabylmSettings,
    flags: Sequence[str],
    title: str,
    config: Path,
    run: Path,
    own: Mapping[str, str],
    vocab_size: int | None,
) -> Training:
    """A call of fabric_train.py.

    Args:
        flags: the user's, which come last.
        own: more flags of the pipeline, with their values; one that the user gives too is left out.
        vocab_size: of the model; None: that of its config.
    """  # fmt: skip
    data, given = from_root(settings.out_dir) / "data", names_of(flags)
    command = python(
        "pretrain/fabric_train.py", "--config", config, "--data.train", data / "train", "--data.val", data / "val",
        "--out_dir", run, *absent(own, given), "--resume", "auto",
    )  # fmt: skip
    args = parse_quietly((*command, *flags))
    more: dict[str, str] = {}
    if vocab_size is not None:
        more["model.vocab_size"] = str(vocab_size)
    if settings.max_steps is not None:
        more["train.max_steps"] = str(settings.max_steps)
        if args.optim.warmup_steps > settings.max_steps // 10:
            more["optim.warmup_steps"] = str(settings.max_steps // 10)
    more |= flags_of_this_machine(args)
    if vocab_size is not None and "model.vocab_size" not in given:
        vocabulary = vocab_size
    elif args.model.vocab_size is not None:
        vocabulary = args.model.vocab_size
    elif args.model.name:
        vocabulary = get_config(args.model.name).vocab_size
    else:
        vocabulary = OF_NARROW_MODELS if (args.model.n_embd or NARROW) < NARROW else DEFAULT_VOCABULARY
    title = f"{title} -> {run} (you may interrupt it, the next call resumes)"
    learns = args.objective == "distillation" and args.distillation.cache is None
    teachers = tuple(teacher.path for teacher in args.distillation.teachers) if learns else ()
    command = (*command, *absent(more, given), *flags)
    args = parse_quietly(command)
    with contextlib.chdir(ROOT):
        model = model_config(args, vocabulary)
    return Training(title, command, run, vocabulary, args, model, teachers)


def of_the_student(flags: Sequence[str]) -> set[int]:
    """The places in `flags` of --objective and --distillation.*, with their values."""
    places, inside = set(), False
    for place, word in enumerate(flags):
        if word.startswith("--"):
            inside = word.partition("=")[0] == "--objective" or word.startswith("--distillation.")
        if inside:
            places.add(place)
    return places


def plan_trainings(
    settings: BabylmSettings, flags: Sequence[str], track: Track, words: int
) -> tuple[list[Step], Training]:
    """(the steps of the teachers, on the same data and with the same vocabulary, and of the model; the model's).

    Raises ValueError for mistakes in the settings; exits on one in the training flags.
    """
    s, out, config = settings, from_root(settings.out_dir), find_config(settings.model)
    of_teachers = {"distillation.teachers", "distillation.cache"} if s.teachers else set()
    check_flags(flags, "babylm.py", OWN_FLAGS | of_teachers)
    configs = [find_config(teacher, "teachers") for teacher in s.teachers]
    names = [path.stem for path in (config, *configs)]
    if taken := sorted(RESERVED & set(names)):
        raise ValueError(f"a config named {taken[0]}: --out_dir has another folder of this name; rename the file")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--teachers: there are two models named {twice[0]}; name each config once")
    values = {"save.at_words": AT_WORDS[track], "save.keep_last": "2"}
    if s.teachers:
        paths = json.dumps([{"path": str(out / path.stem)} for path in configs])
        values |= {"objective": "distillation", "distillation.teachers": paths}
    model = plan_training(s, flags, "training", config, out / config.stem, values, s.vocab_size)
    missing = [path for path in model.teachers if not (ROOT / path).exists()]
    if missing and not s.teachers:
        raise ValueError(
            f"--model {s.model} learns from teachers, and {missing[0]} is not there: add "
            f"--teachers {' '.join(path.name for path in missing)} to train them first"
        )
    theirs = [flag for place, flag in enumerate(flags) if place not in of_the_student(flags)]
    last = {"save.keep_last": "1"}
    teachers = [
        plan_training(s, theirs, f"teacher {path.stem}", path, out / path.stem, last, model.vocabulary)
        for path in configs
    ]
    learns_from = [teacher.model for teacher in teachers] or [load_tensors(ROOT / p)[0] for p in model.teachers]
    return [*(teacher.step(words, []) for teacher in teachers), model.step(words, learns_from)], model


def plan(
    settings: BabylmSettings, flags: Sequence[str], texts: tuple[Text, Text], track: Track, words: int
) -> list[Step]:
    """All steps, in order; `words` are those of the training text.

    Raises ValueError for mistakes in the settings; exits on one in the training flags.
    """
    s, (train, dev) = settings, texts
    out = from_root(s.out_dir)
    tokenizer, data = out / "tokenizer", out / "data"
    results, release, report = out / "results", out / "release", out / REPORT
    cleaner = [] if s.cleaner == NO_CLEANER else ["--cleaner", s.cleaner]
    trainings, model = plan_trainings(s, flags, track, words)
    run, vocabulary = model.run, model.vocabulary
    newest, every = evaluated_tasks(s)
    evaluations = [python("scripts/evaluate.py", run, "--tasks", "perplexity", *newest)]
    if every:
        evaluations.append(python("scripts/evaluate.py", "--all_checkpoints", run, "--tasks", *every))
    if s.evaluation_data is not None:
        evaluations = [(*command, "--babylm_results", str(results)) for command in evaluations]
    return [
        Step(
            f"tokenizer of {vocabulary:,} ids -> {tokenizer}",
            (
                python(
                    "scripts/train_tokenizer.py", "--input", *train.patterns, *cleaner, "--split_documents", "file",
                    "--vocab_size", str(vocabulary), "--output", tokenizer,
                ),
            ),
            output=tokenizer,
        ),
        Step(
            f"cleaned and tokenized text -> {data}",
            (
                python(
                    "scripts/prepare_data.py", "--input", *train.patterns, "--val_input", *dev.patterns, *cleaner,
                    "--split_documents", "file", "--tokenizer", tokenizer, "--output", data,
                ),
            ),
            output=data,
        ),
        *trainings,
        Step(f"evaluation on {', '.join(['perplexity', *newest])} -> {run / EVALUATION}", tuple(evaluations)),
        Step(f"report -> {report}", (python("scripts/report.py", run, "--output", report),)),
        Step(
            f"submission: a revision for each checkpoint -> {release}",
            (
                python("scripts/publish.py", run, "--to", release, "--training_state", "none"),
                python("scripts/publish.py", "--verify", release),
            ),
        ),
    ]  # fmt: skip


def evaluated_tasks(settings: BabylmSettings) -> tuple[list[str], list[str]]:
    """Tasks of the newest checkpoint, and of all of them. Raises as `check_given`, before anything is computed."""
    newest, every = [*map(absolute_task, settings.tasks)], [*map(absolute_task, settings.tasks)]
    if settings.evaluation_data is not None:
        folder = from_root(settings.evaluation_data)
        newest.append(f"babylm:{folder}")
        if (ROOT / folder / "fast_eval").is_dir():
            every.append(f"babylm:{folder / 'fast_eval'}")
    with contextlib.chdir(ROOT):
        check_given(EvaluationSettings(tasks=tuple(newest)))
    return newest, every


def absolute_task(task: str) -> str:
    """A task as a command in ROOT names it: files and folders of tasks by their path from there."""
    name, colon, rest = task.rpartition(":")
    return f"{name}{colon}{from_root(Path(rest))}" if Path(rest).exists() else task


def open_pipeline(settings: BabylmSettings, texts: tuple[Text, Text]) -> Pipeline:
    """The pipeline of --out_dir, with the words of the texts in its facts.

    Raises ValueError for a folder of something else, other settings than those of its first call, other text, and for
    unreadable text.
    """
    s = settings
    inside = [path for path in s.out_dir.iterdir() if path.name[0] != "."] if s.out_dir.is_dir() else []
    if inside and not (s.out_dir / STATE).exists():
        raise ValueError(f"--out_dir {s.out_dir} holds other files: choose a new or empty folder")
    check_output_is_outside(s.out_dir, (str(s.train), str(s.dev)), "--out_dir")
    kept: dict[str, Any] = {
        "train": str(s.train.resolve()), "dev": str(s.dev.resolve()), "model": s.model, "track": s.track,
        "max_steps": s.max_steps, "vocab_size": s.vocab_size, "cleaner": s.cleaner,
    }  # fmt: skip
    if s.teachers:
        kept["teachers"] = list(s.teachers)
    pipeline = Pipeline(s.out_dir, kept)
    for text in texts:
        known = pipeline.facts.setdefault(text.flag, {})
        if known and known["bytes"] != text.sizes:
            raise ValueError(
                f"--{text.flag} {text.folder}: its files have changed since {s.out_dir} was started; choose another "
                "--out_dir"
            )
        if not known:
            known.update(bytes=text.sizes, words=text.count_words())
    return pipeline


def babylm(settings: BabylmSettings, flags: Sequence[str] = ()) -> int:
    """Run the steps that are not done yet. Returns the exit status.

    Args:
        flags: more flags of fabric_train.py.

    Raises ValueError or FileNotFoundError for a mistake, before anything is written.
    """
    s = settings
    find_config(s.model)
    texts = find_text("train", s.train), find_text("dev", s.dev)
    check_cleaner(s.cleaner, [*texts[0].files, *texts[1].files])
    pipeline = open_pipeline(s, texts)
    words = pipeline.facts["train"]["words"]
    steps = plan(s, flags, texts, choose_track(s.track, words), words)
    if s.dry_run:
        for step in steps:
            begin(step.title, pipeline.is_done(step), step.note)
            print(*(f"$ {shown(command)}" for command in step.commands), sep="\n")
        return 0
    if all(map(pipeline.is_done, steps)):
        print(f"{s.out_dir} is finished: every step is done")
        print_contents(s)
        return 0

    def work() -> None:
        lock = lock_folder(s.out_dir, "wait for it, or choose another --out_dir")
        try:
            pipeline.save()
            pipeline.run(steps)
        finally:
            lock.close()
        print_contents(s)

    return run_work(work)


def print_contents(settings: BabylmSettings) -> None:
    """List the contents of --out_dir."""
    out = settings.out_dir
    contents = {
        out / REPORT: "curves, scores, data seen, settings: open it in a browser",
        out / find_config(settings.model).stem: "checkpoints, metrics.csv, datapoints/, evaluation/",
        out / "release": "a folder for each revision: main, chck_1M, ..., for AutoModelForCausalLM.from_pretrained",
    }
    for path in map(find_config, settings.teachers):
        contents[out / path.stem] = "a teacher"
    if settings.evaluation_data is not None:
        contents[out / "results"] = "predictions, laid out as the results folder of the challenge's pipeline"
    width = max(len(str(path)) for path in contents)
    print("", *(f"{path!s:{width}}  {text}" for path, text in contents.items()), sep="\n")
