"""Samples text from a grammar with known probabilities, so that the best possible loss is known.

A training run whose final loss is clearly above the text's negative log-likelihood (NLL) has a bug; one below it sees
something it should not.

Three levels. A document is one paragraph of 3 to 8 sentences (each number equally likely):
- simple: every sentence is subject verb adverb place, each word equally likely; with probability 1/2 a second clause
  follows.
- medium: determiners, adjectives and objects; nouns and verbs agree in number; words follow Zipf's law (p ~ 1 / rank).
- complex: also relative and reported clauses, nested up to two deep, and pronouns that agree with the last sentence's
  subject.

Form of the grammar: a derivation rewrites the leftmost symbol, and the options of a symbol start with distinct texts
(or are empty). Reading left to right, the next word always determines the option taken, so a text has exactly one
derivation and the NLL of the text is that of the derivation. `tests/data/test_synthetic.py` proves this property for
every level (FIRST and FOLLOW sets).
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from lit_files.progress import track
from lit_files.publish import build_folder

Level = Literal["simple", "medium", "complex"]
LEVELS: tuple[Level, ...] = get_args(Level)
MIN_SENTENCES, MAX_SENTENCES = 3, 8

END = "\0"
"""Marks the end of the document in the grammar; never part of a document's text."""

Symbol = tuple[str | int, ...]
START: Symbol = ("document",)


class Option(NamedTuple):
    """One way to rewrite a symbol: a text (starting with a space or punctuation, except START's), then symbols."""

    probability: float
    text: str
    then: tuple[Symbol, ...] = ()


@dataclass(frozen=True)
class SyntheticDocument:
    """A sampled document; `nll` is -log p(text) in nats, including the decision to end the document."""

    id: str
    text: str
    nll: float


SUBJECTS = ["baker", "captain", "doctor", "farmer", "gardener", "hunter", "painter", "sailor", "teacher", "widow"]
INTRANSITIVE = [
    "works", "waits", "sings", "dances", "laughs", "listens", "travels", "rests", "dreams", "whistles", "shivers",
    "prays", "stumbles", "argues",
]  # fmt: skip
ADVERBS = ["quietly", "slowly", "gladly", "bravely", "nervously", "patiently", "clumsily", "proudly", "often", "alone"]
PLACES = [
    "in the harbour", "near the old mill", "behind the barn", "on the bridge", "under the oak", "at the market",
    "beside the river", "outside the church", "by the fire", "above the valley",
]  # fmt: skip
CONNECTORS = ["because", "while", "although", "until", "whenever", "since", "so", "but", "before", "after"]

NOUNS: list[tuple[str, str, str]] = [
    ("king", "kings", "he"), ("girl", "girls", "she"), ("dog", "dogs", "it"), ("woman", "women", "she"),
    ("man", "men", "he"), ("horse", "horses", "it"), ("child", "children", "it"), ("mother", "mothers", "she"),
    ("boy", "boys", "he"), ("mouse", "mice", "it"), ("queen", "queens", "she"), ("brother", "brothers", "he"),
    ("wolf", "wolves", "it"), ("sister", "sisters", "she"), ("giant", "giants", "he"), ("goose", "geese", "it"),
    ("princess", "princesses", "she"), ("thief", "thieves", "he"), ("fox", "foxes", "it"), ("witch", "witches", "she"),
]  # fmt: skip
"""Singular, plural, pronoun of the singular; the most frequent noun first. Nouns and adjectives all take "a"."""
ADJECTIVES = [
    "little", "big", "tired", "clever", "hungry", "young", "lonely", "brave", "strange", "polite", "rich", "poor",
]  # fmt: skip
TRANSITIVE = [
    "sees", "likes", "follows", "finds", "helps", "fears", "greets", "remembers", "chases", "teaches", "admires",
    "forgives",
]  # fmt: skip
REPORTING = ["says", "thinks", "hopes", "knows"]
PLURALS = {"teaches": "teach"}

Number = Literal["singular", "plural"]
NUMBERS: tuple[Number, ...] = get_args(Number)
NUMBER_WEIGHTS: dict[str, float] = {"singular": 0.65, "plural": 0.35}
# The first letters differ: with any tokenizer, a document's first token determines its first word.
DETERMINERS: list[tuple[float, str, str]] = [
    (0.5, "the", "either"), (0.25, "a", "singular"), (0.1, "some", "plural"), (0.1, "every", "singular"),
    (0.05, "many", "plural"),
]  # fmt: skip


@dataclass(frozen=True)
class _Richness:
    """Differences of complex and medium: probabilities of the optional parts."""

    depth: int
    relative: float
    pronoun: float
    adjective: float = 0.3


RICHNESS = {"medium": _Richness(depth=0, relative=0.0, pronoun=0.0), "complex": _Richness(2, 0.25, 0.35)}


def _zipf(words: Sequence[str]) -> list[tuple[float, str]]:
    total = math.fsum(1 / rank for rank in range(1, len(words) + 1))
    return [(1 / rank / total, word) for rank, word in enumerate(words, start=1)]


def _after_sentence(k: int, openings: list[Option]) -> list[Option]:
    """The document ends after sentence k, or another sentence opens: the number of sentences is uniform."""
    end = 0.0 if k < MIN_SENTENCES else 1 / (MAX_SENTENCES - k + 1)
    return [Option(end, END)] + [Option(o.probability * (1 - end), " " + o.text, o.then) for o in openings]


def _simple(symbol: Symbol) -> list[Option]:
    """Options of a symbol of the simple grammar; k counts the sentences started."""

    def uniform(words: Sequence[str], *then: Symbol, before: str = " ") -> list[Option]:
        return [Option(1 / len(words), before + word, then) for word in words]

    def opening(k: int) -> list[Option]:
        return uniform(SUBJECTS, ("verb",), ("adverb",), ("place",), ("close", k), before="The ")

    match symbol:
        case ("document",):
            return opening(1)
        case ("subject",):
            return uniform(SUBJECTS, before=" the ")
        case ("verb",):
            return uniform(INTRANSITIVE)
        case ("adverb",):
            return uniform(ADVERBS)
        case ("place",):
            return uniform(PLACES)
        case ("connector",):
            return uniform(CONNECTORS)
        case ("close", int(k)):
            clause = (("connector",), ("subject",), ("verb",), ("adverb",), ("stop",), ("next", k))
            return [Option(0.5, ".", (("next", k),)), Option(0.5, ",", clause)]
        case ("stop",):
            return [Option(1.0, ".")]
        case ("next", int(k)):
            return _after_sentence(k, opening(k + 1))
    raise KeyError(symbol)


def _verb(verb: str, number: str | int) -> str:
    """The verb's form: "sees" in the singular, "see" in the plural."""
    return verb if number == "singular" else PLURALS.get(verb, verb.removesuffix("s"))


def _rich(symbol: Symbol, rich: _Richness) -> list[Option]:
    """Options of a symbol of the medium and complex grammars.

    `d` is the number of clauses around the symbol, `k` the number of sentences started, `who` the pronoun of the
    sentence's subject. A noun's role determines what follows it: "main" a predicate and the end of sentence k, "clause"
    a predicate, "object" nothing, and "relative" a transitive verb alone ("the dog that the king sees"); each after an
    optional relative clause.
    """

    def determiners(role: str, d: int, k: int = 0, *, capital: bool = False) -> list[Option]:
        return [
            Option(p, word.capitalize() if capital else " " + word, (("adjective",), ("noun", number, role, d, k)))
            for p, word, number in DETERMINERS
        ]

    match symbol:
        case ("document",):
            return determiners("main", 0, 1, capital=True)
        case ("noun phrase", str(role), int(d)):
            return determiners(role, d)
        case ("adjective",):
            words = [Option(rich.adjective * p, " " + word) for p, word in _zipf(ADJECTIVES)]
            return [Option(1 - rich.adjective, ""), *words]
        case ("noun", "either", str(role), int(d), int(k)):
            halves = [(NUMBER_WEIGHTS[n], _rich(("noun", n, role, d, k), rich)) for n in NUMBERS]
            return [o._replace(probability=weight * o.probability) for weight, half in halves for o in half]
        case ("noun", str(number), str(role), int(d), int(k)):
            options = []
            for (p, singular), (_, plural, pronoun) in zip(_zipf([noun[0] for noun in NOUNS]), NOUNS, strict=True):
                who = pronoun if number == "singular" else "they"
                roles: dict[str, tuple[Symbol, ...]] = {
                    "main": (("predicate", number, d), ("adverb",), ("place",), ("close", k, who)),
                    "clause": (("predicate", number, d),),
                    "relative": (("transitive", number),),
                    "object": (),
                }
                word = singular if number == "singular" else plural
                options.append(Option(p, " " + word, (("relative clause", number, d), *roles[role])))
            return options
        case ("relative clause", str(number), int(d)):
            if d == rich.depth:
                return [Option(1.0, "")]
            return [Option(1 - rich.relative, ""), Option(rich.relative, " that", (("relative body", number, d + 1),))]
        case ("relative body", str(number), int(d)):
            subject_gap = [
                Option(0.6 * p, " " + _verb(v, number), (("noun phrase", "object", d),)) for p, v in _zipf(TRANSITIVE)
            ]
            return subject_gap + [o._replace(probability=0.4 * o.probability) for o in determiners("relative", d)]
        case ("transitive", str(number)):
            return [Option(p, " " + _verb(v, number)) for p, v in _zipf(TRANSITIVE)]
        case ("predicate", str(number), int(d)):
            kinds: list[tuple[float, Sequence[str], str, tuple[Symbol, ...]]] = [
                (0.6, TRANSITIVE, "", (("noun phrase", "object", d),)),
                (0.3, INTRANSITIVE, "", ()),
            ]
            if d < rich.depth:
                kinds.append((0.1, REPORTING, " that", (("noun phrase", "clause", d + 1),)))
            total = math.fsum(weight for weight, *_ in kinds)
            return [
                Option(weight / total * p, f" {_verb(verb, number)}{more}", then)
                for weight, verbs, more, then in kinds
                for p, verb in _zipf(verbs)
            ]
        case ("adverb",):
            return [Option(0.6, ""), *(Option(0.4 * p, " " + word) for p, word in _zipf(ADVERBS))]
        case ("place",):
            return [Option(0.5, ""), *(Option(0.5 * p, " " + words) for p, words in _zipf(PLACES))]
        case ("close", int(k), str(who)):
            clause: tuple[Symbol, ...] = (("noun phrase", "clause", rich.depth), ("stop",), ("next", k, who))
            more = [Option(0.25 * p, f", {word}", clause) for p, word in _zipf(CONNECTORS)]
            return [Option(0.75, ".", (("next", k, who),)), *more]
        case ("stop",):
            return [Option(1.0, ".")]
        case ("next", int(k), str(who)):
            named = determiners("main", 0, k + 1, capital=True)
            openings = [o._replace(probability=(1 - rich.pronoun) * o.probability) for o in named]
            number = "plural" if who == "they" else "singular"
            then = (("predicate", number, 0), ("adverb",), ("place",), ("close", k + 1, who))
            return _after_sentence(k, [Option(rich.pronoun, who.capitalize(), then), *openings])
    raise KeyError(symbol)


@cache
def options_of(symbol: Symbol, level: Level) -> tuple[Option, ...]:
    """The options of a symbol with nonzero probability; they sum to one. ValueError for an unknown level."""
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is unknown; choose one of {', '.join(LEVELS)}")
    options = _simple(symbol) if level == "simple" else _rich(symbol, RICHNESS[level])
    return tuple(option for option in options if option.probability > 0)


@cache
def _expected(symbol: Symbol, level: Level) -> tuple[float, float]:
    """Entropy (nats) and expected words of a symbol's expansion.

    H(A) = sum over options o of p_o (-ln p_o + sum of H over the symbols of o). Depth and k only grow, so this
    terminates.
    """
    nats, words = [], []
    for p, text, then in options_of(symbol, level):
        below = [_expected(s, level) for s in then]
        nats.append(p * (math.fsum(h for h, _ in below) - math.log(p)))
        words.append(p * (math.fsum(w for _, w in below) + len(re.findall(r"\w+", text))))
    return math.fsum(nats), math.fsum(words)


def entropy_per_document(level: Level) -> float:
    """Entropy of a document in nats, including its end: the exact expected value of `SyntheticDocument.nll`."""
    return _expected(START, level)[0]


def words_per_document(level: Level) -> float:
    """Expected words in a document."""
    return _expected(START, level)[1]


def _draw(level: Level, rng: random.Random) -> tuple[str, float]:
    """Sample one document: (text, nll). Uses only `rng.random()`: its sequence is the same in every Python version."""
    stack, pieces, nats = [START], [], []
    while stack:
        options = options_of(stack.pop(), level)
        u, chosen = rng.random(), options[-1]
        for option in options:
            u -= option.probability
            if u < 0:
                chosen = option
                break
        pieces.append(chosen.text)
        nats.append(-math.log(chosen.probability))
        stack.extend(reversed(chosen.then))
    return "".join(pieces).removesuffix(END), math.fsum(nats)


def sample_documents(level: Level, seed: int, n_words: int, *, stream: str = "train") -> Iterator[SyntheticDocument]:
    """Sample documents until they have at least `n_words` words (at least one document; the last is complete).

    The documents depend on level, seed and stream only: asking for more words gives the same documents and then more.
    ValueError for an unknown level or `n_words` below 1.
    """
    options_of(START, level)
    if n_words < 1:
        raise ValueError(f"n_words {n_words}: ask for at least one word")
    return _sample(level, seed, n_words, stream)


def _sample(level: Level, seed: int, n_words: int, stream: str) -> Iterator[SyntheticDocument]:
    rng = random.Random(f"{level}/{seed}/{stream}")  # a string is hashed by SHA-512: streams do not overlap in practice
    words, number = 0, 0
    while words < n_words:
        text, nll = _draw(level, rng)
        yield SyntheticDocument(f"{level}-{seed}-{stream}-{number:07d}", text, nll)
        words += len(text.split())
        number += 1


def write_synthetic(
    output: Path, *, tokens: int, level: Level, seed: int, val_fraction: float = 0.1
) -> tuple[Path, Path]:
    """Write OUTPUT/train.jsonl and OUTPUT/val.jsonl, lines {"id", "text", "nll"}; returns the two paths.

    `tokens` counts words, so it is approximate: a subword tokenizer also counts punctuation and may split words, and
    each file ends with a complete document. The splits are sampled independently: a text may occur in both by chance,
    but ids never do. The folder is built under a temporary name and renamed when complete. ValueError for an existing
    output or an invalid argument.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists already; choose another --output or remove it")
    if not 0 < val_fraction < 1:
        raise ValueError(f"--val_fraction {val_fraction}: give a fraction between 0 and 1")
    if tokens < 2:
        raise ValueError(f"--tokens {tokens}: ask for at least 2, one for each split")
    val_words = min(max(round(tokens * val_fraction), 1), tokens - 1)
    splits = {"train": tokens - val_words, "val": val_words}
    streams = {name: sample_documents(level, seed, n_words, stream=name) for name, n_words in splits.items()}
    with build_folder(output) as temporary:
        for name, documents in streams.items():
            with open(temporary / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
                for doc in track(documents, name, "words", splits[name], size=lambda doc: len(doc.text.split())):
                    file.write(json.dumps({"id": doc.id, "text": doc.text, "nll": doc.nll}) + "\n")
    return output / "train.jsonl", output / "val.jsonl"


def describe_texts(path: Path) -> str:
    """Counts and mean NLL of one of the files, in one line."""
    documents = words = size = 0
    nll = 0.0
    with open(path, encoding="utf-8") as file:
        for document in map(json.loads, file):
            documents += 1
            words += len(document["text"].split())
            size += len(document["text"].encode())
            nll += document["nll"]
    return (
        f"{path}: {documents} documents, {words} words, {size} bytes of text, "
        f"NLL {nll / documents:.3f} nats per document, {nll / words:.4f} per word"
    )


def describe_level(level: Level) -> str:
    """The entropy of a level, in one line."""
    nats, words = entropy_per_document(level), words_per_document(level)
    return f"entropy of level {level}: {nats:.3f} nats per document, {nats / words:.4f} per word"
