"""Renders conversations with a model's chat template, as transformers' `apply_chat_template` does, into token ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_data.tokenizers.hf_export import chat_templates, declared_bos
from lit_data.tokenizers.tokenizer import Tokenizer


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the tokens to train on; here it renders its content."""

    tags = {"generation"}  # noqa: RUF012 (as in the base class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        content = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: variables that are set inside are local to it.
        return nodes.CallBlock(self.call_method("_render"), [], [], content).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter. Jinja's own escapes characters of HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class ChatTemplate:
    """The chat template of a tokenizer. Raises ValueError if there is none, or if it cannot be used."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        source = chat_templates(tokenizer).get("default")
        if source is None:
            raise ValueError("the model's tokenizer has no chat template; use /v1/completions")
        try:
            tokenizer.check_parses()
        except ValueError as error:
            raise ValueError(f"chat is not possible: {error}") from None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
        }
        self._tokenizer = tokenizer
        ids = {"bos": declared_bos(tokenizer, False), "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        # A missing token stays undefined, which prints nothing; None would print "None".
        self._special = {f"{role}_token": tokenizer.id_to_token(id) for role, id in ids.items() if id is not None}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template has a syntax error: {error}") from None

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to the start of the assistant's answer. Raises ValueError if the template
        rejects the messages or fails on them."""
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._special
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template rejects these messages: {error}") from None
        return self._tokenizer.parse_plain(text)
