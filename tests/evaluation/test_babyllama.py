"""BabyLlama's evaluation: its prompts, what counts as right, and the whole of it on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from running import script
from small_models import write_model_folder

from lit_data.tokenizers.tokenizer import Tokenizer
from lit_eval.generation.babyllama import (
    BabyLlamaSettings,
    consistency,
    distractors,
    evaluate_babyllama,
    first_word,
    is_answer,
    overlap,
    score_completions,
)
from lit_eval.generation.completions import Completion, completions, open_prompts, paraphrases
from lit_eval.generation.metrics import words_of
from lit_eval.generation.settings import GenerationSettings
from lit_eval.generation.speed import SpeedSettings
from lit_eval.model.eval_model import EvalModel, open_model
from lit_eval.score.results import read_results


def test_our_prompts() -> None:
    items = completions()
    assert len(items) == 144 and len(set(items)) == 144
    assert len({item.prompt for item in items}) >= 143  # "a, b, c," is German and English
    for item in items:
        assert item.answers and all(words_of(answer) == [answer] for answer in item.answers), item
        assert item.prompt == item.prompt.strip() and "|" not in item.prompt
        others = distractors(item, items)
        assert len(others) == 3 and not {o.casefold() for o in others} & {a.casefold() for a in item.answers}
    counts = {(i.language, i.category): 0 for i in items}
    for i in items:
        counts[i.language, i.category] += 1
    assert len(counts) == 12 and set(counts.values()) == {12}
    assert [len(group) for _, group in paraphrases()] == [3] * 10 and len(set(open_prompts())) == 30


def test_an_answer_is_the_first_word() -> None:
    assert is_answer(" Mat. And then", ["mat"]) and is_answer("klein,", ["groß", "klein"])
    assert not is_answer(" matter", ["mat"]) and not is_answer(" the mat", ["mat"]) and not is_answer("", ["mat"])
    assert first_word(" „Ja“") == "„" and first_word("  ") == ""


def test_consistency_by_hand() -> None:
    assert overlap("Der Hund läuft", "der Hund bellt laut") == 2 / 5 and overlap("", " ") == 0
    # Within: a b | a b c: 2/3, and d | d: 1. Between: a b | d, a b c | d, each twice: 0.
    assert consistency([["a b", "a b c"], ["d", "d"]]) == (pytest.approx((2 / 3 + 1) / 2), 0)
    same, unrelated = consistency([["x y", "x y"], ["x y", "x y"]])  # one text for everything
    assert same == unrelated == 1


def test_distractors_are_other_answers() -> None:
    items = [Completion(str(i), (a,), "c", "en") for i, a in enumerate(("red", "blue", "Red", "green", "blue", "pink"))]
    assert distractors(items[0], items) == ["blue", "green", "pink"]
    assert distractors(items[4], items) == ["pink", "red", "Red"]
    assert distractors(items[0], items[:1]) == []


SHORT_TEXTS = GenerationSettings(max_new_tokens=10)
SHORT = SpeedSettings(batch_sizes=(1, 2), repeats=1, warmup=0, new_tokens=4)


def test_the_whole(generation_model: EvalModel, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(
        "\n".join(json.dumps(item) for item in (
            {"prompt": "Gr", "answers": ["x", "üße"], "category": "greeting"},
            {"prompt": "aus", "answers": ["Würzburg"], "category": "place"},
            {"prompt": "und"},
        ))
    )  # fmt: skip
    result = evaluate_babyllama(generation_model, BabyLlamaSettings(tmp_path / "own.jsonl", None, SHORT_TEXTS, SHORT))
    assert result.n == 2 and len(result.details["samples"]) == 3
    right = [one["right"] for one in result.details["completions"]]
    assert [is_answer(c["text"], c["answers"]) for c in result.details["completions"]] == right
    p = sum(right) / 2
    assert result.metrics["completion_accuracy"] == p and result.items == [float(r) for r in right]
    assert result.metrics["completion_stderr"] == math.sqrt(p * (1 - p) / 2)
    assert set(result.groups) == {"category", "language", "batch_size"}
    assert "choice_accuracy" not in result.metrics and "consistency" not in result.metrics
    assert result.metrics["decode_tokens_per_s_2"] > 0
    (tmp_path / "own.txt").write_text("Gr\naus\n")
    plain = evaluate_babyllama(generation_model, BabyLlamaSettings(tmp_path / "own.txt", None, SHORT_TEXTS, None))
    assert plain.n == len(plain.items) == 2 and set(plain.metrics) == {"repetition_4", "distinct_3"}
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answers": "b"}')
    with pytest.raises(ValueError, match=r'bad.jsonl, line 1: "answers"'):
        evaluate_babyllama(generation_model, BabyLlamaSettings(tmp_path / "bad.jsonl"))


def test_as_tasks_of_evaluate(generation_run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Gr", "answers": ["üße"]}\n' * 3)
    line = (generation_run, "--custom_prompts", tmp_path / "p.jsonl", "--output", tmp_path / "r.json")
    line += ("--num_samples", 2)
    done = script("evaluate.py", *line, "--tasks", "babyllama", "speed")
    assert done.returncode == 0, done.stderr
    tasks = read_results(tmp_path / "r.json").tasks
    assert tasks["babyllama"].n == 2 and set(tasks["babyllama"].groups["batch_size"]) == {"1", "4", "8", "16"}
    assert set(tasks["speed"].groups["batch_size"]) == {"1", "2", "4", "8", "16"}
    samples = (tmp_path / "generation_samples.txt").read_text(encoding="utf-8")
    assert "=== babyllama, sample 2" in samples and "=== babyllama, sample 3" not in samples


def test_a_limit_covers_every_category(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    """`most` items, evenly spaced, each with the choices that it has among all of them; and as many texts."""
    categories = {(item.category, item.language) for item in completions()}
    n = len(categories)
    model = open_model(write_model_folder(tmp_path / "hf", tokenizers["bytes"], block_size=128), device="cpu")
    result = evaluate_babyllama(model, BabyLlamaSettings(None, n, SHORT_TEXTS, None))
    found = result.details["completions"]
    assert result.n == len(result.items) == len(found) == len(result.details["samples"]) == n
    assert {(one["category"], one["language"]) for one in found} == categories
    assert all(one["chosen"] is not None for one in found) and result.metrics["consistency"] >= 0


def test_choice_takes_the_likelier_word(generation_model: EvalModel) -> None:
    """Against the log-probabilities of each whole text, one at a time."""
    items = [
        Completion(p, (a,), "c", "de") for p, a in (("Gr", "aus"), ("Der", "Hund"), ("und", "nach"), ("la", "Haus"))
    ]
    _, chosen, _ = score_completions(generation_model, items, items)
    for item, choice in zip(items, chosen, strict=True):
        scores = []
        for word in (item.answers[0], *distractors(item, items)):
            context, whole = generation_model.encode([item.prompt, f"{item.prompt} {word}"])
            with torch.no_grad():
                log_p = generation_model.model(torch.tensor([whole]))[0].log_softmax(-1)
            total = sum(float(log_p[i - 1, whole[i]]) for i in range(len(context), len(whole)))
            scores.append(total / len(word.encode()))
        assert choice == (scores[0] == max(scores))
