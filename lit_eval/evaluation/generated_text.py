"""Tasks on generated text and on the model's confidence: generation, memorization, babyllama, speed, confidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lit_data.corpus.readers import read_documents
from lit_data.packed.manifest import MANIFEST
from lit_data.packed.open_dataset import PackedDocuments
from lit_data.packed.reader import PackedDataset
from lit_eval.evaluation.jobs import Evaluation, Job, needs_tokenizer
from lit_eval.evaluation.settings import EvaluationSettings
from lit_eval.evaluation.text_data import check_tokenizer, named_data, validation_data
from lit_eval.generation.babyllama import BabyLlamaSettings, evaluate_babyllama
from lit_eval.generation.completions import open_prompts
from lit_eval.generation.confidence import evaluate_confidence
from lit_eval.generation.memorization import evaluate_memorization
from lit_eval.generation.metrics import evaluate_generation
from lit_eval.generation.prompts import read_prompts
from lit_eval.generation.settings import GenerationSettings
from lit_eval.generation.speed import evaluate_speed
from lit_eval.generation.text import fitting_tokens
from lit_eval.model.eval_model import EvalModel
from lit_eval.score.results import Result
from lit_eval.spacing import evenly_spaced
from lit_files.checksum import file_sha256

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, DOCUMENTS = 32, 8, 100, 200
TEXTS = ("data", "text_field", "split_documents")  # settings that change the documents
SHORTEST = 2 * PROMPT_TOKENS  # tokens of a document that gives a prompt


def generation(evaluation: Evaluation) -> Result:
    """See lit_eval/generation/metrics.py. Writes as many tokens as fit behind the prompts, at most NEW_TOKENS."""
    prompts = prompts_of(evaluation)
    return evaluate_generation(evaluation.model, prompts, writing(evaluation.model, prompts))


def memorization(evaluation: Evaluation) -> Result:
    """See lit_eval/generation/memorization.py. Looks in --train_data, or the data that the run's record names."""
    given = evaluation.settings.train_data
    prompts = prompts_of(evaluation)
    return evaluate_memorization(evaluation.model, prompts, writing(evaluation.model, prompts), data=given)


def babyllama(evaluation: Evaluation) -> Result:
    """See lit_eval/generation/babyllama.py."""
    given = evaluation.settings
    return evaluate_babyllama(evaluation.model, BabyLlamaSettings(given.custom_prompts, given.num_samples))


def speed(evaluation: Evaluation) -> Result:
    """See lit_eval/generation/speed.py."""
    return evaluate_speed(evaluation.model)


def confidence(evaluation: Evaluation) -> Result:
    """See lit_eval/generation/confidence.py. On documents of --data, or of the validation data."""
    settings = evaluation.settings
    texts = texts_of(evaluation, settings.num_samples or DOCUMENTS)
    if not texts:
        raise ValueError("--tasks confidence needs text: give --data")
    return evaluate_confidence(evaluation.model, texts, prefix=settings.prefix, batch_tokens=settings.batch_tokens)


def writing(model: EvalModel, prompts: Sequence[str]) -> GenerationSettings:
    return GenerationSettings(max_new_tokens=fitting_tokens(model, prompts, NEW_TOKENS))


def prompts_of(evaluation: Evaluation) -> list[str]:
    """The prompts of --custom_prompts; else the first words of documents of --data or the validation data; else the
    open prompts of lit_eval/generation/completions.py, German and English."""
    settings = evaluation.settings
    if settings.custom_prompts is not None:
        return list(evenly_spaced(read_prompts(settings.custom_prompts), settings.num_samples))
    wanted = settings.num_samples or PROMPTS
    tokenizer = evaluation.model.need_tokenizer()
    encoded = evaluation.model.encode(texts_of(evaluation, 2 * wanted))
    found = [tokenizer.decode(ids[:PROMPT_TOKENS]) for ids in encoded if len(ids) >= SHORTEST]
    return found[:wanted] or list(evenly_spaced(open_prompts(), wanted))


def texts_of(evaluation: Evaluation, n: int) -> list[str]:
    """Up to `n` documents of each entry of --data, or else of the validation data: evenly spaced in packed data, the
    first ones of text. Empty if there is no such data."""
    model, settings = evaluation.model, evaluation.settings
    try:
        entries = list(named_data(settings).values()) or list(validation_data(model.path).values())
    except ValueError:
        return []
    texts: list[str] = []
    for path in entries:
        if (path / MANIFEST).is_file():
            dataset = PackedDataset(path)
            check_tokenizer(model, dataset, str(path))
            documents = PackedDocuments(dataset)
            tokenizer = model.need_tokenizer()
            for number in evenly_spaced(range(dataset.n_documents), n):
                ids = documents[number].tokens.tolist()
                begin = 1 if dataset.manifest.bos_id is not None else 0
                texts.append(tokenizer.decode(ids[begin : len(ids) - (ids[-1:] == [dataset.eos_id])]))
        else:
            read = read_documents(
                [path], text_field=settings.text_field, split_documents=settings.split_documents or "file"
            )
            texts += [document.text for document in islice(read, n)]
    return texts


def _job(
    run: Callable[[Evaluation], Result], *settings: str, tokenizer: bool = True
) -> Callable[[str, Path, EvaluationSettings], Job]:
    def make(name: str, model: Path, given: EvaluationSettings) -> Job:
        source: dict[str, Any] = {}
        if given.custom_prompts is not None and "custom_prompts" in settings:
            read_prompts(given.custom_prompts)
            source = {"prompts": file_sha256(given.custom_prompts)}
        names = tuple(name for name in settings if name != "custom_prompts")
        return Job(name, run, source, names, lambda opened: needs_tokenizer(opened, name) if tokenizer else None)

    return make


GENERATION_JOBS = {
    "generation": _job(generation, "num_samples", "custom_prompts", *TEXTS),
    "memorization": _job(memorization, "num_samples", "custom_prompts", *TEXTS, "train_data"),
    "babyllama": _job(babyllama, "num_samples", "custom_prompts"),
    "speed": _job(speed, "device", tokenizer=False),
    "confidence": _job(confidence, "num_samples", "prefix", *TEXTS),
}
