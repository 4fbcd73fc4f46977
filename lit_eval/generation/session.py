"""Prints generated texts to a terminal, and a session in which the user types prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from lit_eval.generation.settings import GenerationSettings
from lit_eval.generation.text import Generated, generate_texts, stream_text
from lit_eval.model.eval_model import EvalModel


def record(one: Generated) -> dict[str, Any]:
    """The JSON object that --json prints for a text."""
    return {
        "prompt": one.prompt,
        "prompt_ids": one.prompt_ids,
        "sample": one.sample,
        "ids": one.ids,
        "text": one.text,
        "finish": one.finish,
        "stopped_on_eos": one.finish == "eos",
    }


def show(texts: Sequence[Generated], as_json: bool) -> None:
    for number, one in enumerate(texts):
        if as_json:
            print(json.dumps(record(one), ensure_ascii=False))
            continue
        if number:
            print()
        if one.text is None:
            print(",".join(map(str, one.prompt_ids + one.ids)))
        else:
            print((one.prompt or "") + one.text)


def run_session(model: EvalModel, settings: GenerationSettings, as_json: bool) -> None:
    """Read prompts from a terminal, one per line, until Ctrl-D. Each text uses the next seed."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() then has line editing and a history
    print("Type a prompt. Ctrl-C ends a continuation, Ctrl-D the session.", file=sys.stderr)
    seed = settings.seed
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        own = replace(settings, seed=seed)
        seed += settings.num_samples
        try:
            if as_json:
                show(generate_texts(model, [prompt], own), as_json)
            else:
                write_streaming(model, prompt, own)
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


def write_streaming(model: EvalModel, prompt: str, settings: GenerationSettings) -> None:
    for sample in range(settings.num_samples):
        own = replace(settings, seed=settings.seed + sample)
        with closing(stream_text(model, prompt, own)) as pieces:
            print(prompt, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
        print()
