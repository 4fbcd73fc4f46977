"""Generation from text to text: prompts are encoded as the training data was, and tokens become text one by one.

A token is not a piece of text: several may make one character, and sentencepiece writes a word's space before it, which
decoding drops at the beginning of a text. So tokens are decoded behind those before them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_data.tokenizers.tokenizer import Tokenizer
from lit_eval.generation.settings import GenerationSettings
from lit_eval.model.eval_model import EvalModel
from lit_eval.model.text_encoding import encode_prompt
from lit_model.generate import check_prompts, generate_batch, stream

CONTEXT_TOKENS = 8  # tokens of the prompt that the first new ones are decoded behind
INCOMPLETE = "\ufffd"  # how decoding shows bytes that are no whole character (yet)

Prompt = str | Sequence[int]
"""Text, or token ids, which need no tokenizer."""


@dataclass
class Generated:
    """A text a model wrote.

    Attributes:
        prompt: None if ids were given.
        prompt_ids: as the model read it, with BOS if it has one.
        sample: its number among those of the prompt, from 0.
        ids: new tokens, an end-of-document token included.
        text: of the new tokens, without the end-of-document token and cut before a stop string; None: no tokenizer.
        finish: why it ended: end of the document, a stop string, or the limit of tokens.
    """

    prompt: str | None
    prompt_ids: list[int]
    sample: int
    ids: list[int]
    text: str | None
    finish: Literal["eos", "stop", "length"]


@dataclass
class Piece:
    """The text that one more token made certain; "" where none is. The last piece of a continuation has a `finish`."""

    text: str
    finish: Literal["eos", "stop", "length"] | None = None


class TextStream:
    """Turns tokens into text as they come. The pieces joined are the text of all tokens.

    Args:
        before: the tokens that precede them.
        stop: strings before which the text ends; text that may be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)[-CONTEXT_TOKENS:]
        self._shown = len(self._ids)  # tokens whose text was given out
        self._from = 0  # where decoding begins
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, id: int) -> str:
        """The text that is certain after one more token."""
        self._ids.append(id)
        new = self._new_text()
        return "" if new.endswith(INCOMPLETE) else self._release(new)

    def finish(self) -> str:
        """The rest: bytes that form no whole character, and text that was held back."""
        rest = self._release(self._new_text()) + self._held
        self._held = ""
        return rest

    def _new_text(self) -> str:
        """The text of the tokens not yet shown."""
        before = self._tokenizer.decode(self._ids[self._from : self._shown])
        whole = self._tokenizer.decode(self._ids[self._from :])
        # Ids given as a prompt may end inside a character, which the first new token then completes.
        while not whole.startswith(before):
            before = before[:-1]
        return whole[len(before) :]

    def _release(self, new: str) -> str:
        if new:
            self._from, self._shown = self._shown, len(self._ids)
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for string in self._stop if (place := text.find(string)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, string: str) -> int:
    """Characters at the end of a text that begin a string."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)


def encode_prompts(model: EvalModel, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """Ids of prompts, never empty: see `encode_prompt`. Raises ValueError for one that the model can't continue."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            encoded.append(encode_prompt(model.need_tokenizer(), prompt, model.encoding))
        else:
            encoded.append(list(prompt))
    check_prompts(model.model, encoded, max_new_tokens)
    return encoded


def fitting_tokens(model: EvalModel, prompts: Sequence[Prompt], wanted: int) -> int:
    """At most `wanted` new tokens, fewer if the context has no room for them behind the longest prompt. Raises
    ValueError for a prompt that fills it."""
    longest = max(map(len, encode_prompts(model, prompts, 1)))
    return min(wanted, model.config.block_size - longest)


def generate_texts(model: EvalModel, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Generated]:
    """Continue each prompt `num_samples` times: all samples of the first prompt, then those of the second, ...

    Raises ValueError for a prompt that is too long for the model, or text without a tokenizer.
    """
    encoded = encode_prompts(model, prompts, settings.max_new_tokens)
    rows = [(number, sample) for number in range(len(prompts)) for sample in range(settings.num_samples)]
    ids = [encoded[number] for number, _ in rows]
    tokenizer = model.tokenizer if not settings.stop else model.need_tokenizer()
    streams: dict[int, TextStream] = {}

    def stop(row: int, new: list[int]) -> bool:
        assert tokenizer is not None
        text = streams.setdefault(row, TextStream(tokenizer, ids[row], settings.stop))
        text.add(new[-1])
        return text.stopped

    with model.autocast():
        out = generate_batch(
            model.model,
            ids,
            settings.max_new_tokens,
            settings.sampling,
            seeds=[settings.seed + sample for _, sample in rows],
            eos_id=tokenizer.eos_id if tokenizer is not None else None,
            excluded_ids=model.excluded_ids,
            stop=stop if settings.stop else None,
            batch_size=settings.batch_size,
        )
    written = []
    for (number, sample), before, (new, finish) in zip(rows, ids, out, strict=True):
        prompt = prompts[number]
        text = None
        if tokenizer is not None:
            text = text_of(tokenizer, before, new[:-1] if finish == "eos" else new, settings.stop)
        written.append(Generated(prompt if isinstance(prompt, str) else None, before, sample, new, text, finish))
    return written


def text_of(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """The text of tokens that follow others, cut before the first stop string."""
    text = TextStream(tokenizer, before, stop)
    return "".join(map(text.add, ids)) + text.finish()


def stream_text(model: EvalModel, prompt: Prompt, settings: GenerationSettings) -> Generator[str]:
    """Yield the text of one continuation as it is written. Raises as `generate_texts` does, before the first piece."""
    (ids,) = encode_prompts(model, [prompt], settings.max_new_tokens)
    model.need_tokenizer()
    return (piece.text for piece in stream_pieces(model, ids, settings) if piece.text)


def stream_pieces(model: EvalModel, ids: list[int], settings: GenerationSettings) -> Generator[Piece]:
    """Yield a piece for each token of the continuation of `ids`. Close the generator to stop early.

    Joined, their texts are what `generate_texts` gives for the prompt alone.
    """
    tokenizer = model.need_tokenizer()
    text = TextStream(tokenizer, ids, settings.stop)
    tokens = stream(
        model.model,
        [ids],
        settings.max_new_tokens,
        settings.sampling,
        seeds=[settings.seed],
        eos_id=tokenizer.eos_id,
        excluded_ids=model.excluded_ids,
    )
    try:
        with model.autocast():
            for token in tokens:
                finish, new = token.finish, ""
                if finish != "eos":
                    new = text.add(token.id)
                    finish = "stop" if text.stopped else finish
                if finish is not None:
                    yield Piece(new + text.finish(), finish)
                    break
                yield Piece(new)
    finally:
        tokens.close()  # type: ignore[attr-defined]
