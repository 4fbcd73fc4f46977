"""Makes a perplexity job of each entry of --data, or of the validation data of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_data.corpus.readers import list_files
from lit_data.corpus.separators import check_separator
from lit_data.packed.manifest import MANIFEST
from lit_data.packed.reader import PackedDataset
from lit_eval.evaluation.jobs import Evaluation, Job, needs_tokenizer
from lit_eval.evaluation.settings import EvaluationSettings
from lit_eval.model.eval_model import EvalModel
from lit_eval.model.model_tokenizer import compare, describe_difference, of_data, of_model
from lit_eval.score.perplexity import Text, perplexity, texts_of_dataset, texts_of_files
from lit_eval.score.results import Result
from lit_files.checksum import file_sha256
from lit_model.load import Checkpoint, is_hf_folder

PERPLEXITY = "perplexity"


def jobs_of_data(settings: EvaluationSettings) -> list[Job]:
    """A job for each entry of --data. Raises ValueError or FileNotFoundError."""
    return [
        _job(f"{PERPLEXITY}/{name}", path, settings, f"--data {path}") for name, path in named_data(settings).items()
    ]


def named_data(settings: EvaluationSettings) -> dict[str, Path]:
    """The entries of --data by name. Raises ValueError for a name given twice."""
    found: dict[str, Path] = {}
    for entry in settings.data:
        name, path = _named(entry)
        if name in found:
            raise ValueError(f"--data has two entries named {name}: give NAME=PATH")
        found[name] = path
    return found


def validation_jobs(model: Path, settings: EvaluationSettings) -> list[Job]:
    """A job for each validation set that a run's checkpoint names. Raises ValueError if there is none."""
    return [
        _job(f"{PERPLEXITY}/{name}" if name else PERPLEXITY, path, settings, f"the validation data of {model}, {path},")
        for name, path in validation_data(model).items()
    ]


def validation_data(model: Path) -> dict[str, Path]:
    """The validation sets that a run's checkpoint names; a single one has the name "". Raises ValueError if there is
    none, or it is missing."""
    give = "give --data, or --tasks"
    if is_hf_folder(model):
        raise ValueError(f"{model} is a Hugging Face folder, which names no validation data: {give}")
    config = Checkpoint(model).meta.get("config")
    data: Any = config.get("data") if isinstance(config, dict) else None
    named = data.get("val") if isinstance(data, dict) else None
    if not named:
        raise ValueError(f"{model} names no validation data: {give}")
    found = {}
    for name, text in (named if isinstance(named, dict) else {"": named}).items():
        path = Path(str(text))
        moved = model.parent.joinpath(*path.parts[-3:])  # made by a run whose folder was moved
        place = next((p for p in (path, moved) if (p / MANIFEST).is_file()), None)
        if place is None:
            raise ValueError(f"the validation data of {model}, {path}, is missing: {give}")
        found[str(name)] = place
    return found


def _named(entry: str) -> tuple[str, Path]:
    """The name and path of an entry. A path with = is taken as it is if it exists."""
    name, equals, rest = entry.partition("=")
    path = Path(entry)
    if equals and not path.exists():
        if not name or not rest:
            raise ValueError(f"--data {entry}: give PATH or NAME=PATH")
        return name, Path(rest)
    stem = path.resolve().name
    if stem in ("val", "train", "packed") and path.is_dir():  # DATA/val
        stem = f"{path.resolve().parent.name}/{stem}"
    return stem if path.is_dir() else stem.split(".")[0] or stem, path


def _job(title: str, path: Path, settings: EvaluationSettings, where: str) -> Job:
    if (path / MANIFEST).is_file():
        dataset = PackedDataset(path)
        if not dataset.n_documents:
            raise ValueError(f"{where} holds no document")
        source = {"file": str(path.resolve()), "fingerprint": dataset.fingerprint, "n_documents": dataset.n_documents}
        return Job(
            title,
            lambda evaluation: _score(evaluation, where, texts_of_dataset(dataset, settings.num_samples), dataset),
            source,
            prepare=lambda model: check_tokenizer(model, dataset, where),
        )
    files = list_files([path])  # raises for a missing path, or one without text
    if all(file.hub is None and not file.path.stat().st_size for file in files):
        raise ValueError(f"{where} is empty")
    split = settings.split_documents
    warnings = tuple(check_separator(files, [], split)) if split is not None else ()
    source = {"file": str(path.resolve()), "sha256": sha256_of([f.path for f in files if f.hub is None])}

    def run(evaluation: Evaluation) -> Result:
        texts = texts_of_files(
            [path],
            evaluation.model.encode,
            text_field=settings.text_field,
            split_documents=settings.split_documents or "file",
            source_field=settings.source_field,
            limit=settings.num_samples,
        )
        return _score(evaluation, where, texts, None)

    names = ("num_samples", "prefix", "text_field", "split_documents", "source_field")
    return Job(title, run, source, names, lambda model: needs_tokenizer(model, where), warnings)


def _score(evaluation: Evaluation, where: str, texts: Iterable[Text], dataset: PackedDataset | None) -> Result:
    model, prefix = evaluation.model, evaluation.settings.prefix
    if model.tokenizer is None and dataset is not None and prefix != "none":  # all that is needed of it is in the data
        bos = dataset.manifest.bos_id
        if bos is None and prefix == "bos":
            raise ValueError(f"--prefix bos: {where} has no beginning-of-sequence token")
        prefix_id: int | None = dataset.eos_id if bos is None or prefix == "eos" else bos
    else:
        prefix_id = model.prefix_id(prefix) if prefix != "none" else None
    try:
        return perplexity(evaluation.scorer, texts, prefix_id)
    except ValueError as error:
        if "no token to score" in str(error):
            raise ValueError(f"{where}: {error}") from error
        raise


def check_tokenizer(model: EvalModel, dataset: PackedDataset, where: str) -> None:
    """Check that data was tokenized for a model. Raises ValueError; if it is unknown, the model gets a warning."""
    if dataset.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{where} was tokenized with {dataset.vocab_size} ids, and {model.path} has a vocabulary of "
            f"{model.config.vocab_size}: give the text itself, or data of the model's tokenizer"
        )
    own, theirs = of_model(model.path), of_data(dataset)
    verdict = compare(own, theirs)
    if verdict == "different":
        raise ValueError(
            f"{where} was tokenized for another model than {model.path}: "
            f"{describe_difference(own, theirs, str(dataset.path))}; give the text itself"
        )
    if verdict == "unknown":
        warning = f"the tokenizer of {where} or of {model.path} is unknown: make sure that both are the same"
        if warning not in model.warnings:
            model.warnings.append(warning)


def sha256_of(files: Iterable[Path]) -> str:
    """SHA-256 over the checksums of files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()
