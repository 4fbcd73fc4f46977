"""BabyLlama's own evaluation (completion accuracy, consistency, repetition, speed), with its flaws repaired.

What its benchmark.py does, and what is done here instead (docs/generation.md has the whole table):

- Ten English prompts, so that one is ten points, and wrong answers count as right. Here 144, German and English, in six
  categories, with a standard error.
- An answer counts anywhere in five tokens, also inside another word. Here the greedy text must begin with it; and,
  for models too small for that, the answer must be the most probable of four words of its kind.
- Consistency is the overlap of sampled continuations, also of prompts with different answers, and largest for a model
  that always writes the same. Here of paraphrases, greedy, minus the overlap between unrelated prompts.
- Repetition is the share of words that occur twice, which any long text has. Here: of four words in a row.
- Speed is one total of reading and writing. Here both apart (lit_eval/generation/speed.py).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path

from lit_eval.generation.completions import Completion, completions, open_prompts, paraphrases
from lit_eval.generation.metrics import distinct, repetition, words_of
from lit_eval.generation.prompts import read_prompts
from lit_eval.generation.settings import GenerationSettings
from lit_eval.generation.speed import SpeedSettings, evaluate_speed
from lit_eval.generation.text import fitting_tokens, generate_texts
from lit_eval.model.eval_model import EvalModel
from lit_eval.score.results import Group, Result
from lit_eval.spacing import evenly_spaced
from lit_model.sampling import GREEDY, Sampling

ANSWER_TOKENS = 8  # enough for a word of rare characters
CONTINUATION_TOKENS = 20
CHOICES = 4
SPEED = SpeedSettings(batch_sizes=(1, 4, 8, 16))


@dataclass(frozen=True)
class BabyLlamaSettings:
    """Settings of the evaluation.

    Attributes:
        custom_prompts: prompts to use instead of ours: a .txt with a prompt a line (continued only, without
            completions and consistency), or a .jsonl with `prompt`, and `answers` and `category` where completions are
            to be scored.
        most: score at most this many completions and texts, evenly spaced; None: all. Consistency needs all its groups.
        text: sampling of the texts whose repetition is measured; BabyLlama's own settings by default.
        speed: the timed generations; None: no timing.
    """

    custom_prompts: Path | None = None
    most: int | None = None
    text: GenerationSettings = field(
        default_factory=lambda: GenerationSettings(Sampling(temperature=0.8, top_p=0.95), max_new_tokens=50)
    )
    speed: SpeedSettings | None = SPEED


def first_word(text: str) -> str:
    """The first word of a continuation in lower case; empty if it has none."""
    words = words_of(text)
    return words[0].casefold() if words else ""


def is_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a continuation begins with one of the answers, as a whole word."""
    return first_word(text) in {answer.casefold() for answer in answers}


def distractors(item: Completion, items: Sequence[Completion]) -> list[str]:
    """Up to CHOICES - 1 wrong answers: the expected ones of the next items of the same category and language."""
    own = {answer.casefold() for answer in item.answers}
    alike = [one for one in items if (one.category, one.language) == (item.category, item.language)]
    place = alike.index(item)
    found: dict[str, None] = {}
    for one in [*alike[place + 1 :], *alike[:place]]:
        if one.answers[0].casefold() not in own:
            found.setdefault(one.answers[0])
    return list(found)[: CHOICES - 1]


def overlap(one: str, other: str) -> float:
    """Words in both texts / words in either (Jaccard), in lower case; 0 if neither has any."""
    a, b = ({word.casefold() for word in words_of(text)} for text in (one, other))
    return len(a & b) / len(a | b) if a or b else 0.0


def consistency(groups: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Mean overlap of texts within groups, and between texts of different groups.

    Args:
        groups: continuations of prompts that mean the same.
    """
    within = [overlap(a, b) for group in groups for a, b in combinations(group, 2)]
    between = [overlap(a, b) for one, other in combinations(groups, 2) for a in one for b in other]
    return statistics.fmean(within), statistics.fmean(between)


def read_completions(path: Path) -> list[Completion]:
    """The lines of a .jsonl of prompts that have `answers` (a list of words); `category` and `language` are optional.

    The file is one that `read_prompts` takes. Raises ValueError naming the line for answers that are none.
    """
    if path.suffix != ".jsonl":
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        fields = json.loads(line) if line.strip() else {}
        if "answers" not in fields:
            continue
        answers = fields["answers"]
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a for a in answers):
            raise ValueError(f'{path}, line {number}: "answers" must be a list of words')
        category, language = (str(fields.get(key, "custom")) for key in ("category", "language"))
        found.append(Completion(fields["prompt"], tuple(answers), category, language))
    return found


def score_completions(
    model: EvalModel, items: Sequence[Completion], known: Sequence[Completion]
) -> tuple[list[bool], list[bool | None], list[str]]:
    """`known`: all completions, whose answers are the wrong choices of one another.

    For each item: whether the greedy text begins with an answer; whether the expected answer is the most probable of
    CHOICES by log-probability per byte (None: there are no other answers to choose from); the greedy text."""
    greedy = GenerationSettings(GREEDY, ANSWER_TOKENS)
    texts = [one.text or "" for one in generate_texts(model, [item.prompt for item in items], greedy)]
    candidates = [[item.answers[0], *distractors(item, known)] for item in items]
    pairs = [(item.prompt, f" {word}") for item, words in zip(items, candidates, strict=True) for word in words]
    spans = model.encoder().spans(pairs)
    scored = iter(model.scorer().score([span for span in spans if span is not None]))
    each = iter([-math.inf if span is None else next(scored).total for span in spans])
    chosen: list[bool | None] = []
    for words in candidates:
        scores = [next(each) / len(word.encode()) for word in words]
        chosen.append(scores[0] > max(scores[1:]) if len(words) > 1 else None)
    return [is_answer(text, item.answers) for text, item in zip(texts, items, strict=True)], chosen, texts


def evaluate_babyllama(model: EvalModel, settings: BabyLlamaSettings | None = None) -> Result:
    """Run BabyLlama's evaluation.

    Returns:
        n: completions (texts, if custom prompts have no answers).
        metrics: `completion_accuracy` and its standard error `completion_stderr`; `choice_accuracy`, of which 0.25 is
            chance; `consistency`, `consistency_unrelated` and their difference `consistency_gain`; `repetition_4` and
            `distinct_3` of texts; `decode_tokens_per_s_N` for each batch size.
        groups: `category` and `language`: accuracies. `batch_size`: see `evaluate_speed`.
        items: 1 for each right completion, else 0.
        details: `completions` with their texts, `samples`.

    Raises ValueError for a fault in the file of prompts, or a model without tokenizer.
    """
    settings = settings or BabyLlamaSettings()
    custom = settings.custom_prompts
    prompts = evenly_spaced(open_prompts() if custom is None else read_prompts(custom), settings.most)
    known = completions() if custom is None else read_completions(custom)
    items = evenly_spaced(known, settings.most)
    result = Result("babyllama", 0, {})
    if items:
        _add_completions(result, model, items, known)
    if custom is None:
        _add_consistency(result, model)
    room = fitting_tokens(model, prompts, settings.text.max_new_tokens)
    texts = generate_texts(model, prompts, replace(settings.text, max_new_tokens=room))
    words = [words_of(one.text or "") for one in texts]
    repeated = [repetition(w, 4) for w in words]
    result.metrics |= {"repetition_4": statistics.fmean(repeated), "distinct_3": distinct(words, 3)}
    result.details["samples"] = [asdict(one) for one in texts]
    if not items:
        result.n, result.items = len(texts), repeated
    if settings.speed is not None:
        speed = evaluate_speed(model, settings.speed)
        result.groups |= speed.groups
        for batch, group in speed.groups["batch_size"].items():
            result.metrics[f"decode_tokens_per_s_{batch}"] = group.metrics["decode_tokens_per_s"]
    result.source = {"n_items": result.n, **({"file": str(custom)} if custom is not None else {})}
    return result


def _add_completions(
    result: Result, model: EvalModel, items: Sequence[Completion], known: Sequence[Completion]
) -> None:
    right, chosen, texts = score_completions(model, items, known)

    def group(numbers: Sequence[int]) -> Group:
        metrics = {"completion_accuracy": statistics.fmean(right[i] for i in numbers)}
        if choices := [bool(chosen[i]) for i in numbers if chosen[i] is not None]:
            metrics["choice_accuracy"] = statistics.fmean(choices)
        return Group(len(numbers), metrics)

    every = group(range(len(items)))
    p = every.metrics["completion_accuracy"]
    result.n, result.items = len(items), [float(one) for one in right]
    result.metrics |= {**every.metrics, "completion_stderr": math.sqrt(p * (1 - p) / len(items))}
    for key in ("category", "language"):
        values = dict.fromkeys(getattr(item, key) for item in items)
        result.groups[key] = {
            value: group([i for i, item in enumerate(items) if getattr(item, key) == value]) for value in values
        }
    result.details["completions"] = [
        {**item._asdict(), "answers": list(item.answers), "text": text, "right": correct, "chosen": choice}
        for item, text, correct, choice in zip(items, texts, right, chosen, strict=True)
    ]


def _add_consistency(result: Result, model: EvalModel) -> None:
    greedy = GenerationSettings(GREEDY, CONTINUATION_TOKENS)
    within, between = [], []
    by_language: dict[str, list[tuple[str, ...]]] = {}
    for language, prompts in paraphrases():
        by_language.setdefault(language, []).append(prompts)
    for groups in by_language.values():
        texts = iter(generate_texts(model, [prompt for group in groups for prompt in group], greedy))
        same, other = consistency([[next(texts).text or "" for _ in group] for group in groups])
        within.append(same)
        between.append(other)
    same, other = statistics.fmean(within), statistics.fmean(between)
    result.metrics |= {"consistency": same, "consistency_unrelated": other, "consistency_gain": same - other}
