"""Task files are read with every line checked, encoded as lm-evaluation-harness does, and scored by closed forms."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_eval.model.likelihood import Scorer
from lit_eval.model.text_encoder import TextEncoder
from lit_eval.score.task_files import Task, read_task
from lit_eval.score.tasks import find_task, run_task
from lit_model.loss import IGNORE_INDEX

BLOCK = 20
PAIR = {"sentence_good": "ab", "sentence_bad": "ad"}
CHOICE = {"context": "x", "choices": ["b", "dd"], "label": 0}
CLOZE = {"text": "x ___ y", "options": ["b", "d"], "label": 1}
LAST = {"text": "one two"}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def encode(texts: Sequence[str]) -> list[list[int]]:
    """A token a character, but `th` is one, as is a space with the letter behind it."""
    ids = []
    for text in texts:
        row, at = [], 0
        while at < len(text):
            size = 2 if text[at : at + 2] == "th" or (text[at] == " " and text[at + 1 : at + 2].strip()) else 1
            row.append(2 + hash_of(text[at : at + size]))
            at += size
        ids.append(row)
    return ids


def hash_of(token: str) -> int:
    return sum(ord(c) * (3 if i else 1) for i, c in enumerate(token)) % 400


def rising(tokens: Tensor, targets: Tensor) -> Tensor:
    """log p of a token is -(id % 7) - 1/8, whatever precedes it; it is greedy where the id is even."""
    kept = targets != IGNORE_INDEX
    return torch.stack((-(targets % 7).float() - 0.125, (targets % 2 == 0).float())) * kept


def probability(text: str) -> float:
    return sum(-(i % 7) - 0.125 for i in encode([text])[0])


SCORER = Scorer(rising, BLOCK)
ENCODER = TextEncoder(encode, bos_id=None, prefix_id=1)


def test_a_pair_is_encoded_together_and_split_behind_its_context() -> None:
    def spans(context: str, continuation: str, **options: Any) -> Any:
        settings = {"bos_id": None, "prefix_id": 1, **options}
        return TextEncoder(encode, **settings).spans([(context, continuation)])[0]

    assert spans("x", " b") == (encode(["x"])[0], encode([" b"])[0])
    assert spans("x ", "b") == spans("x", " b")  # trailing spaces belong to the continuation
    assert spans("t", "hb") == (encode(["t"])[0], encode(["b"])[0])  # `th` is one token: the context's is not its part
    assert spans("t", "h") is None
    assert spans("", "ab") == ([1], encode(["ab"])[0]) == spans("", "ab", bos_id=0)
    assert spans("  ", "ab") == ([1], encode(["  ab"])[0])
    assert spans("", "ab", prefix_id=None) == (encode(["a"])[0], encode(["b"])[0])
    assert spans("", "ab", prefix_id=encode(["a"])[0][0]) == (encode(["a"])[0], encode(["b"])[0])  # as the harness
    assert spans("x", " b", bos_id=0) == ([0, *encode(["x"])[0]], encode([" b"])[0])
    assert spans("", "") is spans("x", "") is None


def run(tmp_path: Path, *records: Any) -> Any:
    return run_task(read_task(write(tmp_path / "task.jsonl", *records)), SCORER, ENCODER)


def test_pairs(tmp_path: Path) -> None:
    """Wins, ties and groups, against log-probabilities summed by hand."""
    sentences = [("ab", "ad"), ("ad", "ab"), ("ab", "ba"), ("th c", "th")]
    records = [
        {"sentence_good": good, "sentence_bad": bad, "linguistics_term": "p" if i < 3 else "q", "UID": f"u{i % 2}"}
        for i, (good, bad) in enumerate(sentences)
    ]
    result = run(tmp_path, *({**r, "delimiter": ""} for r in records))
    margins = [probability(good) - probability(bad) for good, bad in sentences]
    assert margins[0] == -margins[1] != 0 and margins[2] == 0
    wins = [float(m > 0) for m in margins]
    assert result.items == wins and result.n == 4 and result.kind == "pairs"
    by_paradigm = [(wins[0] + wins[2]) / 2, (wins[1] + wins[3]) / 2]
    assert result.metrics == {
        "accuracy": sum(wins) / 4, "ties": 0.25, "margin_nats": pytest.approx(sum(margins) / 4), "chance": 0.5,
        "accuracy_macro": sum(by_paradigm) / 2,
    }  # fmt: skip
    assert [g.metrics["accuracy"] for g in result.groups["paradigm"].values()] == by_paradigm
    assert {name: g.n for name, g in result.groups["phenomenon"].items()} == {"p": 3, "q": 1}
    spaced = run(tmp_path, *records)  # the harness' space before each sentence
    wanted = [probability(f" {good}") - probability(f" {bad}") for good, bad in sentences]
    assert spaced.metrics["margin_nats"] == pytest.approx(sum(wanted) / 4)


def test_choice_by_each_length(tmp_path: Path) -> None:
    items = [
        {"context": "x", "choices": ["ü", "bbbb", "th"], "label": 1, "subject": "s"},
        {"question": "is th", "choices": ["thth", "thb", "c"], "answer": "thb"},
        {"context": "", "choices": ["d", "bb"], "answer": "B"},
    ]
    result = run(tmp_path, *items)
    lengths: dict[str, Any] = {
        "accuracy": lambda text: 1,
        "accuracy_norm": len,
        "accuracy_bytes": lambda text: len(text.encode()),
        "accuracy_tokens": lambda text: len(encode([" " + text])[0]),
    }
    for name, length in lengths.items():
        best = [max(i["choices"], key=lambda c, length=length: probability(" " + c) / length(c)) for i in items]  # type: ignore[call-overload]
        assert result.metrics[name] == sum(b == i["choices"][1] for b, i in zip(best, items, strict=True)) / 3, name
    assert result.metrics["chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert result.groups["category"]["s"].n == 1 and len(result.items) == 3


def test_cloze_is_scored_from_the_blank_on(tmp_path: Path) -> None:
    result = run(tmp_path, {"text": "x ____ th.", "options": ["b", "de"], "answer": "de"}, CLOZE)
    wanted = [probability(" de th.") > probability(" b th."), probability(" d y") > probability(" b y")]
    assert result.items == [float(w) for w in wanted] and result.metrics["chance"] == 0.5


def test_last_word(tmp_path: Path) -> None:
    texts = ["one two thb", "x b", "a  c"]
    result = run(tmp_path, *({"text": text} for text in texts))
    words = [" thb", " b", "  c"]  # both spaces are the word's
    greedy = [all(i % 2 == 0 for i in encode([word])[0]) for word in words]
    assert result.items == [float(g) for g in greedy]
    assert result.metrics["perplexity"] == pytest.approx(math.exp(-sum(map(probability, words)) / 3))


def test_items_that_cannot_be_scored_are_counted(tmp_path: Path) -> None:
    long = {"text": "x " + "b" * (BLOCK + 2)}
    result = run(tmp_path, LAST, {"text": "x " * 50 + "b"}, long, {"text": "on thh"})
    assert result.n == 3 and len(result.items) == 3  # a long context is cut on the left
    assert result.source["n_items"] == 4 and result.source["n_skipped"] == 1
    assert result.source["skipped"] == {f"a text to score of more than the model's context of {BLOCK} tokens": 1}
    with pytest.raises(ValueError, match=r"task.jsonl: none of the 1 items can be scored: 1 with a text to score of m"):
        run(tmp_path, long)


FAULTS = {
    '{"sentence_good": "a"}': "line 2: the field 'sentence_bad' is missing",
    '{"sentence_good": "a", "sentence_bad": 3}': "'sentence_bad' is 3; it must be a string",
    '{"sentence_good": "a", "sentence_bad": "a"}': "are the same",
    '{"sentence_good": "a", "sentence_bad": ""}': "'sentence_bad' is empty",
    '{"sentence_good": "a", "sentence_bad": "\\ud800"}': "surrogate",
    '{"text": "a b"}': "line 2: an item of kind last_word, and those before it are pairs",
    '{"good": "a"}': "no known kind of item has the fields 'good'",
    "[1]": "line 2: expected a JSON object",
    "{": "line 2: not JSON",
}
CHOICE_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"label": 2}, "'label' is 2; it must be one of the 2 choices: its text, its number from 0 to 1, or its letter"),
    ({"label": True}, "'label' is true"),
    ({"label": "C"}, "'label' is \"C\""),
    ({"label": -1}, "'label' is -1"),
    ({"choices": ["b"]}, "'choices' is [\"b\"]; it must be a list of at least two strings"),
    ({"choices": ["b", 3]}, "'choices[1]' is 3; it must be a string"),
    ({"context": 3}, "'context' is 3; it must be a string"),
    ({"question": "q"}, "both 'context' and 'question'"),
]


@pytest.mark.parametrize(("line", "message"), FAULTS.items())
def test_every_line_is_checked(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_task(write(tmp_path / "task.jsonl", PAIR, line))
    assert message in str(error.value) and "task.jsonl, line 2: " in str(error.value)


@pytest.mark.parametrize(("changes", "message"), CHOICE_FAULTS, ids=lambda value: str(value)[:20])
def test_fields_of_choices_are_checked(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_task(write(tmp_path / "task.jsonl", {**CHOICE, **changes}))
    assert message in str(error.value)


def test_other_faults_of_files(tmp_path: Path) -> None:
    def fails(path: Path, message: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            find_task(path)

    fails(write(tmp_path / "empty.jsonl", "\n\n"), "empty.jsonl is empty")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "für dich"}\n'.encode("latin-1"))
    fails(tmp_path / "latin.jsonl", "latin.jsonl, line 1: not UTF-8 .* at byte 11")
    fails(write(tmp_path / "blank.jsonl", {**CLOZE, "text": "no blank"}), "'text' needs one blank ___")
    fails(write(tmp_path / "word.jsonl", {"text": "ends "}), "at least two words")
    fails(tmp_path / "missing.jsonl", "there is no task file or folder")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR).encode())[:-9])
    fails(tmp_path / "cut.jsonl.gz", "cut.jsonl.gz is damaged")
    (tmp_path / "none").mkdir()
    fails(tmp_path / "none", "holds no task file")
    with pytest.raises(ValueError, match=r"there is no task or file 'perplexty'; did you mean perplexity\?"):
        find_task("perplexty", ["perplexity", "speed"])


def test_a_folder_is_one_task_grouped_by_file(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    (folder / "deep").mkdir(parents=True)
    write(folder / "b.jsonl", PAIR, PAIR)
    (folder / "deep/a.jsonl.gz").write_bytes(gzip.compress(("\ufeff" + json.dumps(PAIR)).encode()))
    (folder / "README.md").write_text("not a task")
    task = find_task(folder)
    assert (task.name, task.kind, len(task.items)) == ("pairs", "pairs", 3)
    assert {name: g.n for name, g in run_task(task, SCORER, ENCODER).groups["file"].items()} == {"a": 1, "b": 2}
    before = task.sha256
    write(folder / "b.jsonl", PAIR, {**PAIR, "sentence_bad": "ax"})
    assert read_task(folder).sha256 != before
    write(folder / "c.jsonl", LAST)
    with pytest.raises(ValueError, match=r"several kinds, pairs in .*b\.jsonl and last_word in .*c\.jsonl"):
        read_task(folder)


def test_a_task_is_what_its_file_says(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "x.jsonl", CHOICE))
    assert isinstance(task, Task) and task.items[0].candidates == (("x", " b"), ("x", " dd"))
