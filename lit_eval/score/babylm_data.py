"""The zero-shot tasks of the BabyLM challenge, read from a local copy of its `evaluation_data`.

Folders, fields and scored parts are those of github.com/babylm/evaluation-pipeline-2025: `eval_zero_shot.sh`,
`eval_zero_shot_fast.sh`, and `evaluation_pipeline/sentence_zero_shot/read_files.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_eval.score.reading_times import Word, read_words
from lit_eval.score.task_files import records_of, string_field, string_fields
from lit_files.checksum import file_sha256

Set = Literal["full", "fast"]
READING_FILE = "reading_data.csv"
ENTITY_SPLITS = ("regular", "ambiref", "move_contents")
COMPS_SUBSETS = {
    "comps_base": "base",
    "comps_wugs": "wugs",
    "comps_wugs_dist-before": "wugs_dist_before",
    "comps_wugs_dist-in-between": "wugs_dist_in_between",
}


class Text(NamedTuple):
    """A candidate."""

    whole: str
    scored: int
    """Characters at its end that are scored."""
    prediction: str
    """The prediction to submit if the model chooses it."""


@dataclass(frozen=True)
class Example:
    """One item. The first candidate is the right one, or the one that `ratio` refers to.

    Attributes:
        uid: the part of the dataset that predictions are listed by.
        groups: the item's group by grouping.
        ratio: share of people who choose the first candidate (WUG).
    """

    candidates: tuple[Text, ...]
    uid: str
    groups: dict[str, str]
    ratio: float | None = None


@dataclass(frozen=True)
class Dataset:
    """A dataset of the challenge.

    Attributes:
        name: in the submission.
        title: to show.
        task: `--task` of the pipeline, which names a folder of predictions; empty for reading times.
        folders: in each set.
    """

    name: str
    title: str
    task: str
    folders: dict[Set, str]


def _dataset(name: str, title: str, task: str, full: str, fast: str | None) -> Dataset:
    return Dataset(name, title, task, {"full": full} if fast is None else {"full": full, "fast": fast})


DATASETS = (
    _dataset("blimp", "BLiMP", "blimp", "blimp_filtered", "blimp_fast"),
    _dataset("blimp_supplement", "the BLiMP supplement", "blimp", "supplement_filtered", "supplement_fast"),
    _dataset("ewok", "EWoK", "ewok", "ewok_filtered", "ewok_fast"),
    _dataset("entity_tracking", "entity tracking", "entity_tracking", "entity_tracking", "entity_tracking_fast"),
    _dataset("wug_adj", "WUG adjectives", "wug_adj", "wug_adj_nominalization", "wug_adj_nominalization"),
    _dataset("wug_past", "WUG past tense", "wug_past", "wug_past_tense", "wug_past_tense"),
    _dataset("comps", "COMPS", "comps", "comps", None),
    _dataset("reading", "reading times", "", "reading", "reading"),
)


@dataclass(frozen=True)
class BabylmTask:
    """A dataset as read.

    Attributes:
        path: its folder.
        items: examples; for reading times the words, in the file's order.
        sha256: of the content.
    """

    dataset: Dataset
    set: Set
    path: Path
    items: Sequence[Example] | Sequence[Word]
    sha256: str

    @property
    def name(self) -> str:
        """In a file of results: `babylm/blimp`, `babylm_fast/blimp`."""
        return f"{'babylm' if self.set == 'full' else 'babylm_fast'}/{self.dataset.name}"


def read_babylm(folder: Path) -> tuple[list[BabylmTask], list[str]]:
    """Read the challenge's datasets that are present, and list the missing ones, each with its folder in `folder`.

    Args:
        folder: `full_eval`, `fast_eval`, or the folder above with one or both.

    Every line is checked. Raises ValueError naming file, line and fault, or a folder that holds neither set;
    FileNotFoundError.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give a copy of BabyLM's evaluation_data/full_eval")
    tasks: list[BabylmTask] = []
    missing: list[str] = []
    for which, place in _sets_in(folder):
        for dataset in DATASETS:
            if which not in dataset.folders:
                continue
            path = place / dataset.folders[which]
            if _present(dataset, path):
                tasks.append(_read_dataset(dataset, which, path))
            else:
                missing.append(f"{dataset.title} ({path.relative_to(folder).as_posix()})")
    return tasks, missing


def _sets_in(folder: Path) -> list[tuple[Set, Path]]:
    """The sets that a folder holds, and where."""
    below: list[tuple[Set, Path]] = [("full", folder / "full_eval"), ("fast", folder / "fast_eval")]
    if found := [(which, path) for which, path in below if path.is_dir()]:
        return found
    names: dict[Set, set[str]] = {
        which: {d.folders[which] for d in DATASETS if which in d.folders and _present(d, folder / d.folders[which])}
        for which in ("full", "fast")
    }
    if not names["full"] | names["fast"]:
        expected = ", ".join(dict.fromkeys(name for d in DATASETS for name in d.folders.values()))
        raise ValueError(f"{folder} holds none of BabyLM's datasets: expected full_eval or fast_eval, or {expected}")
    only_fast = names["fast"] - names["full"]
    if only_fast and names["full"] - names["fast"]:
        raise ValueError(f"{folder} mixes datasets of full_eval and fast_eval ({', '.join(sorted(only_fast))})")
    return [
        ("fast" if only_fast or (names["full"] == names["fast"] and folder.name == "fast_eval") else "full", folder)
    ]


def _present(dataset: Dataset, path: Path) -> bool:
    return (path / READING_FILE).is_file() if dataset.name == "reading" else any(path.glob("*.jsonl"))


def _read_dataset(dataset: Dataset, which: Set, path: Path) -> BabylmTask:
    if dataset.name == "reading":
        file = path / READING_FILE
        return BabylmTask(dataset, which, path, read_words(file), file_sha256(file))
    digest = hashlib.sha256()
    items = list(_examples(dataset, path, digest))
    if not items:
        raise ValueError(f"{path} holds no item: its .jsonl files are empty")
    return BabylmTask(dataset, which, path, items, digest.hexdigest())


def _examples(dataset: Dataset, path: Path, digest: Any) -> Iterator[Example]:
    for file in sorted(path.glob("*.jsonl")):
        for number, record in records_of(file, digest):
            try:
                yield _READ[dataset.name](record, file.stem)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error


def _blimp(record: dict[str, Any], stem: str) -> Example:
    good, bad = (_whole(string_field(record, name)) for name in ("sentence_good", "sentence_bad"))
    if "field" not in record:
        return Example((good, bad), stem, {"paradigm": stem})
    groups = {
        "phenomenon": string_field(record, "linguistics_term"),
        "paradigm": string_field(record, "UID"),
        "field": string_field(record, "field").replace("syntax_semantics", "syntax/semantics"),
    }
    return Example((good, bad), groups["paradigm"], groups)


def _ewok(record: dict[str, Any], stem: str) -> Example:
    """The pipeline compares both targets behind the first context, and doesn't use the second context."""
    context, domain = string_field(record, "Context1"), string_field(record, "Domain")
    targets = [" " + string_field(record, name) for name in ("Target1", "Target2")]
    groups = {"category": domain}
    for by, name in (
        ("context_type", "ContextType"),
        ("context_contrast", "ContextDiff"),
        ("target_contrast", "TargetDiff"),
    ):
        if record.get(name) is not None:
            groups[by] = string_field(record, name, empty=True)
    return Example(tuple(Text(context + target, len(target), target) for target in targets), domain, groups)


def _entity_tracking(record: dict[str, Any], stem: str) -> Example:
    if not stem.startswith(ENTITY_SPLITS):
        raise ValueError(f"entity tracking has the files {', '.join(f'{name}.jsonl' for name in ENTITY_SPLITS)}")
    context, options = string_field(record, "input_prefix"), string_fields(record, "options")
    operations = record.get("numops")
    if not isinstance(operations, int) or isinstance(operations, bool):
        raise ValueError(f"'numops' is {operations!r}; it must be a whole number")
    uid = f"{stem}_{operations}_ops"
    return Example(tuple(Text(context + option, len(option), option) for option in options), uid, {"category": uid})


def _wug(name: str) -> Callable[[dict[str, Any], str], Example]:
    def read(record: dict[str, Any], stem: str) -> Example:
        sentences = string_field(record, "sentences").split("\t")
        if len(sentences) != 2 or not all(sentence.strip() for sentence in sentences):
            raise ValueError("'sentences' must hold two sentences with a tab between them")
        ratio = record.get("ratio")
        try:
            share = float(ratio)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            share = math.nan
        if isinstance(ratio, bool) or not math.isfinite(share):
            raise ValueError(f"'ratio' is {ratio!r}; it must be a number")
        return Example(tuple(_whole(sentence) for sentence in sentences), name, {}, share)

    return read


def _comps(record: dict[str, Any], stem: str) -> Example:
    if stem not in COMPS_SUBSETS:
        raise ValueError(f"COMPS has the files {', '.join(f'{name}.jsonl' for name in COMPS_SUBSETS)}")
    phrase = string_field(record, "property_phrase")
    wholes = [f"{string_field(record, name)} {phrase}" for name in ("prefix_acceptable", "prefix_unacceptable")]
    uid = COMPS_SUBSETS[stem]
    return Example(tuple(Text(whole, len(phrase), whole) for whole in wholes), uid, {"category": uid})


def _whole(sentence: str) -> Text:
    return Text(sentence, len(sentence), sentence)


_READ: dict[str, Callable[[dict[str, Any], str], Example]] = {
    "blimp": _blimp,
    "blimp_supplement": _blimp,
    "ewok": _ewok,
    "entity_tracking": _entity_tracking,
    "wug_adj": _wug("wug_adj"),
    "wug_past": _wug("wug_past"),
    "comps": _comps,
}
