"""The grammar's probabilities, compared with counts, an independent formula and the closed form."""

import json
import math
import re
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from lit_data.corpus.grammar_nll import conditional_nll, document_nll, prefix_nll
from lit_data.corpus.synthetic import (
    ADVERBS,
    CONNECTORS,
    END,
    INTRANSITIVE,
    LEVELS,
    PLACES,
    START,
    SUBJECTS,
    Level,
    Symbol,
    entropy_per_document,
    options_of,
    sample_documents,
    words_per_document,
    write_synthetic,
)

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_synthetic.py"
levels = pytest.mark.parametrize("level", LEVELS)


@cache
def reachable(level: Level) -> frozenset[Symbol]:
    seen, todo = {START}, [START]
    while todo:
        for option in options_of(todo.pop(), level):
            todo.extend(new := set(option.then) - seen)
            seen |= new
    return frozenset(seen)


@levels
def test_probabilities_of_every_symbol_sum_to_one(level: Level) -> None:
    for symbol in reachable(level):
        assert math.fsum(o.probability for o in options_of(symbol, level)) == pytest.approx(1, abs=1e-12), symbol
        assert len({o.text for o in options_of(symbol, level)}) == len(options_of(symbol, level)), symbol


@levels
def test_each_text_has_exactly_one_derivation(level: Level) -> None:
    """LL(1) over texts: a symbol's options and (if it may be empty) what can follow it all start differently.

    Two texts can be distinguished by reading if neither equals the other or is a prefix of it at a word's end.
    """
    symbols = reachable(level)
    nullable: set[Symbol] = set()
    first: dict[Symbol, set[str]] = {s: set() for s in symbols}
    follow: dict[Symbol, set[str]] = {s: set() for s in symbols}
    size = -1
    while size != (size := len(nullable) + sum(map(len, [*first.values(), *follow.values()]))):
        for symbol in symbols:
            for _, text, then in options_of(symbol, level):
                if text:
                    first[symbol].add(text)
                elif all(s in nullable for s in then):
                    nullable.add(symbol)
                if not text:
                    assert not then  # an empty option rewrites to nothing: FIRST of `then` need not be added
                after = set(follow[symbol])
                for s in reversed(then):
                    follow[s] |= after
                    after = first[s] | (after if s in nullable else set())
    assert size > 100
    for symbol in symbols:
        own = [o.text for o in options_of(symbol, level) if o.text]
        assert symbol == START or all(not text[0].isalpha() for text in own)
        candidates = sorted([*own, *(follow[symbol] if symbol in nullable else ())])
        assert len(set(candidates)) == len(candidates), symbol
        # In sorted order a prefix of a text precedes it, and all texts between them start with that prefix too.
        for i, short in enumerate(candidates):
            for long in candidates[i + 1 :]:
                if not long.startswith(short):
                    break
                assert short[-1].isalpha() and long[len(short)].isalpha(), (symbol, short, long)


@levels
def test_parsing_recomputes_the_nll_of_the_draw(level: Level) -> None:
    for document in sample_documents(level, 1, 20_000):
        assert document_nll(document.text, level) == pytest.approx(document.nll, rel=1e-12)


def test_simple_nll_equals_a_formula_over_a_regular_expression() -> None:
    word = {name: "|".join(words) for name, words in
            {"s": SUBJECTS, "v": INTRANSITIVE, "a": ADVERBS, "p": PLACES, "c": CONNECTORS}.items()}  # fmt: skip
    main = rf"The (?:{word['s']}) (?:{word['v']}) (?:{word['a']}) (?:{word['p']})"
    sentence = rf"{main}(, (?:{word['c']}) the (?:{word['s']}) (?:{word['v']}) (?:{word['a']}))?\. ?"
    assert [len(w) for w in (SUBJECTS, INTRANSITIVE, ADVERBS, PLACES, CONNECTORS)] == [10, 14, 10, 10, 10]
    lengths = set()
    for document in sample_documents("simple", 2, 20_000):
        assert re.fullmatch(f"(?:{sentence})+", document.text) and not document.text.endswith(" ")
        tails = re.findall(sentence, document.text)
        clauses = sum(bool(tail) for tail in tails)
        lengths.add(len(tails))
        expected = math.log(6) + len(tails) * math.log(14_000 * 2) + clauses * math.log(14_000)
        assert document.nll == pytest.approx(expected, rel=1e-12)
    assert lengths == {3, 4, 5, 6, 7, 8}


def test_simple_entropy_equals_the_known_value() -> None:
    """REFERENCE: 15.013 nats per sentence; 5.5 sentences on average, and ln 6 for their number."""
    per_sentence = (entropy_per_document("simple") - math.log(6)) / 5.5
    assert per_sentence == pytest.approx(1.5 * math.log(14_000) + math.log(2), abs=1e-12)
    assert round(per_sentence, 3) == 15.013
    assert words_per_document("simple") == pytest.approx(5.5 * (statistics.mean(len(p.split()) for p in PLACES) + 6.5))


@levels
def test_mean_nll_and_words_agree_with_the_closed_form(level: Level) -> None:
    documents = list(sample_documents(level, 3, 100_000))
    for values, expected in (
        ([d.nll for d in documents], entropy_per_document(level)),
        ([float(len(d.text.split())) for d in documents], words_per_document(level)),
    ):
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert error < 0.01 * expected
        assert abs(statistics.mean(values) - expected) < 3.5 * error


@levels
def test_prefix_probabilities_add_up_over_the_next_character(level: Level) -> None:
    """p(prefix) = sum over c of p(prefix c) + p(the text is the prefix): covers every partial word, and the end."""
    alphabet = sorted({c for d in sample_documents(level, 4, 20_000) for c in d.text})

    def probability(prefix: str) -> float:
        try:
            return math.exp(-prefix_nll(prefix, level))
        except ValueError:
            return 0.0

    assert probability("") == 1
    text = min((d.text for d in sample_documents(level, 5, 500)), key=len)
    for cut in range(len(text) + 1):
        prefix = text[:cut]
        try:
            whole = math.exp(-document_nll(prefix, level))
        except ValueError:
            whole = 0.0
        parts = math.fsum(probability(prefix + c) for c in alphabet)
        assert parts + whole == pytest.approx(probability(prefix), rel=1e-9), prefix


@levels
def test_prefix_probability_equals_the_share_of_drawn_texts(level: Level) -> None:
    texts = [d.text for d in sample_documents(level, 6, 100_000)]
    for prefix in ("T", "The", "The w", "The king s", "The queen", "A ", "A l", "So", "Every big"):
        share = statistics.mean(text.startswith(prefix) for text in texts)
        try:
            p = math.exp(-prefix_nll(prefix, level))
        except ValueError:
            p = 0.0
        assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / len(texts)) + 1e-12, prefix


@levels
def test_conditional_nll(level: Level) -> None:
    document = next(sample_documents(level, 7, 1))
    text = document.text
    assert conditional_nll(text, "", level) == pytest.approx(document.nll)
    first = text.split()[0]
    p_first = math.fsum(o.probability for o in options_of(START, level) if o.text.split()[0] == first)
    assert conditional_nll(text, first, level) == pytest.approx(document.nll + math.log(p_first))
    assert conditional_nll(text, first[:1], level) == pytest.approx(conditional_nll(text, first, level))
    sentences = text.count(".")  # after the whole text only the decision to end remains
    assert conditional_nll(text, text, level) == pytest.approx(math.log(8 - sentences + 1))
    with pytest.raises(ValueError, match="does not begin with the prefix"):
        conditional_nll(text, "Once", level)


@levels
def test_texts_outside_the_grammar_are_refused(level: Level) -> None:
    text = next(sample_documents(level, 8, 1)).text
    sentences = text.split(". ")
    for bad in ("", text + " ", text[:-1], text + END, "The " + text, text + " The unicorn", sentences[0] + "."):
        with pytest.raises(ValueError, match=f"not a {level} document"):
            document_nll(bad, level)
    for bad in ("Thx", text + END, text + "x", "The unicorn "):
        with pytest.raises(ValueError, match=f"no {level} document"):
            prefix_nll(bad, level)


def test_number_agrees_and_clauses_nest() -> None:
    with pytest.raises(ValueError, match="does not allow ' see the"):
        document_nll("A king see the dogs.", "medium")
    text = "The dog that the kings that see a girl like sings. It waits. The mice wait."
    assert document_nll(text, "complex") > 0
    for old, new in (("like", "likes"), ("It", "She"), ("a girl", "a girl that sees a dog"), ("that see", "that sees")):
        with pytest.raises(ValueError, match="not a complex document"):
            document_nll(text.replace(old, new), "complex")


def test_draws_depend_on_seed_stream_and_level_only() -> None:
    few, more = (list(sample_documents("complex", 9, n)) for n in (200, 600))
    assert more[: len(few)] == few and sum(len(d.text.split()) for d in few) >= 200
    assert [d.text for d in few] != [d.text for d in sample_documents("complex", 10, 200)]
    assert [d.text for d in few] != [d.text for d in sample_documents("complex", 9, 200, stream="val")]
    # Draws must never change: a stored NLL must match the text drawn by a later version.
    text = next(sample_documents("simple", 0, 1)).text
    assert text.startswith("The widow rests alone under the oak. The sailor dreams clumsily by the fire.")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="level 'hard' is unknown; choose one of simple"):
        sample_documents("hard", 0, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_words 0"):
        sample_documents("simple", 0, 0)


def test_write_synthetic(tmp_path: Path) -> None:
    output = tmp_path / "new" / "text"
    train, val = write_synthetic(output, tokens=5000, level="medium", seed=1)
    assert (train, val) == (output / "train.jsonl", output / "val.jsonl")
    rows = {p: [json.loads(line) for line in p.read_text().splitlines()] for p in (train, val)}
    words = {p: sum(len(row["text"].split()) for row in rows[p]) for p in rows}
    assert 4500 <= words[train] < 4700 and 500 <= words[val] < 700
    for row in rows[train] + rows[val]:
        assert set(row) == {"id", "text", "nll"}
        assert row["nll"] == document_nll(row["text"], "medium")
    ids = [row["id"] for row in rows[train] + rows[val]]
    assert len(set(ids)) == len(ids)
    assert rows[train][0]["text"] != rows[val][0]["text"]

    with pytest.raises(ValueError, match="exists already"):
        write_synthetic(output, tokens=5000, level="medium", seed=1)
    for arguments in ({"tokens": 1}, {"val_fraction": 1.0}, {"level": "hard"}):
        with pytest.raises(ValueError):
            write_synthetic(tmp_path / "bad", **{"tokens": 100, "level": "simple", "seed": 0, **arguments})  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["new", "text", "train.jsonl", "val.jsonl"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.rename", fail)
    with pytest.raises(OSError, match="disk full"):
        write_synthetic(tmp_path / "out", tokens=100, level="simple", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_script(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "out"), "--tokens", "2000", "--seed", "3"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "entropy of level simple: 84.365 nats per document" in first.stdout and "val.jsonl: " in first.stdout
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2
    assert (
        second.stderr.startswith("error: ") and "exists already" in second.stderr and "Traceback" not in second.stderr
    )
