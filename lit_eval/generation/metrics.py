"""How varied generated texts are, how much they repeat themselves, how long they are, and whether they end.

Words are runs of letters and digits, and single other characters that are no space.
"""

from __future__ import annotations

import math
import re
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lit_eval.generation.settings import GenerationSettings
from lit_eval.generation.text import Generated, Prompt, generate_texts
from lit_eval.model.eval_model import EvalModel
from lit_eval.score.results import Result

WORD = re.compile(r"\w+|[^\w\s]")
LOOP_TOKENS = 12  # a text ends in a loop if at least its last 12 tokens are one sequence, three times or more
BLEU_ORDER = 4  # longest n-gram
EPSILON = 0.1  # numerator of a precision of BLEU without a match, as nltk's SmoothingFunction.method1
Words = Sequence[str]


def words_of(text: str) -> list[str]:
    """The words of a text; see the module."""
    return WORD.findall(text)


def ngrams(words: Words, n: int) -> Counter[tuple[str, ...]]:
    """How often each sequence of n words occurs."""
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(texts: Sequence[Words], n: int) -> float:
    """Different n-grams of all texts together / all n-grams (Li et al. 2016); 0 if there are none.

    It falls with the amount of text: compare models on as many texts of one length.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for words in texts:
        counts.update(ngrams(words, n))
    return len(counts) / counts.total() if counts else 0.0


def repetition(words: Words, n: int) -> float:
    """Share of a text's n-grams that occurred in it before (seq-rep-n, Welleck et al. 2020); 0 if it has none."""
    counts = ngrams(words, n)
    return 1 - len(counts) / counts.total() if counts else 0.0


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether a text ends by repeating one sequence of tokens; see LOOP_TOKENS."""
    for period in range(1, len(ids) // 3 + 1):
        length = period * max(3, -(-LOOP_TOKENS // period))
        if length <= len(ids) and all(ids[-i] == ids[-i - period] for i in range(1, length - period + 1)):
            return True
    return False


def self_bleu(texts: Sequence[Words]) -> list[float]:
    """BLEU of each text against all others as references (Zhu et al. 2018), in 0..1: high where texts are alike.

    Sentence BLEU after Papineni et al. 2002: the geometric mean of the clipped precisions of 1 to BLEU_ORDER words,
    times the brevity penalty for the closest length of a reference (the shorter of two). A precision without a match
    counts as EPSILON matches; without a common word the score is 0. Needs time linear in the texts: of each n-gram only
    the two largest counts are kept.

    Raises ValueError for fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError("self-BLEU needs at least two texts")
    logs = [0.0] * len(texts)
    common = [True] * len(texts)
    for n in range(1, BLEU_ORDER + 1):
        counted = [ngrams(words, n) for words in texts]
        largest: dict[tuple[str, ...], tuple[int, int, int]] = {}  # count, its text, the largest of another text
        for number, counts in enumerate(counted):
            for gram, count in counts.items():
                first, owner, second = largest.get(gram, (0, -1, 0))
                largest[gram] = (count, number, first) if count > first else (first, owner, max(second, count))
        for number, counts in enumerate(counted):
            matches = 0
            for gram, count in counts.items():
                first, owner, second = largest[gram]
                matches += min(count, second if owner == number else first)
            logs[number] += math.log((matches or EPSILON) / max(counts.total(), 1)) / BLEU_ORDER
            if n == 1 and not matches:
                common[number] = False
    lengths = sorted(map(len, texts))
    scores = []
    for words, log, shares in zip(texts, logs, common, strict=True):
        c, r = len(words), _closest_other(lengths, len(words))
        penalty = 1.0 if c > r else math.exp(1 - r / c) if c else 0.0
        scores.append(penalty * math.exp(log) if shares else 0.0)
    return scores


def _closest_other(lengths: list[int], own: int) -> int:
    """The length nearest to a text's own among those of the others, the shorter of two; `lengths` is sorted."""
    place = bisect_left(lengths, own)
    near = lengths[max(0, place - 1) : place] + lengths[place + 1 : place + 2]
    return min(near, key=lambda length: (abs(length - own), length))


def measure(texts: Sequence[Generated]) -> dict[str, float]:
    """All metrics of texts with decoded text; those that need two texts are absent for one."""
    words = [words_of(one.text or "") for one in texts]
    tokens = [len(one.ids) - (one.finish == "eos") for one in texts]
    metrics = {f"repetition_{n}": statistics.fmean(repetition(w, n) for w in words) for n in (4, 3, 2)}
    metrics["looping"] = statistics.fmean(ends_in_loop(one.ids) for one in texts)
    metrics |= {f"distinct_{n}": distinct(words, n) for n in (1, 2, 3, 4)}
    if len(texts) > 1:
        metrics["self_bleu"] = statistics.fmean(self_bleu(words))
    metrics |= {"tokens_mean": statistics.fmean(tokens), "tokens_median": float(statistics.median(tokens))}
    metrics["words_mean"] = statistics.fmean(map(len, words))
    metrics["ended"] = statistics.fmean(one.finish == "eos" for one in texts)
    return metrics


def evaluate_generation(model: EvalModel, prompts: Sequence[Prompt], settings: GenerationSettings) -> Result:
    """Continue prompts and measure the texts.

    Returns:
        metrics: see `measure`. `ended` is the share of texts that the model ended itself, within `max_new_tokens`.
        items: repetition_4 of each text.
        details: `samples`, a dict with the fields of `Generated` for each text.

    Raises ValueError for no prompts, a prompt that is too long, or a model without tokenizer.
    """
    if not prompts:
        raise ValueError("generation needs at least one prompt")
    model.need_tokenizer()
    texts = generate_texts(model, prompts, settings)
    return Result(
        kind="generation",
        n=len(texts),
        metrics=measure(texts),
        items=[repetition(words_of(one.text or ""), 4) for one in texts],
        source={"n_items": len(prompts)},
        settings=plain_settings(settings),
        details={"samples": [asdict(one) for one in texts]},
    )


def plain_settings(settings: GenerationSettings) -> dict[str, Any]:
    """The settings that change the texts, as JSON holds them."""
    fields = asdict(settings)
    del fields["batch_size"]
    return {**fields.pop("sampling"), **fields, "stop": list(settings.stop)}
