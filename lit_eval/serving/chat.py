"""Renders conversations by a model's chat template, as transformers does, into token ids."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from lit_data.tokenizers.hf_export import chat_templates
from lit_data.tokenizers.tokenizer import Tokenizer


class ChatTemplate:
    """The template beside a tokenizer. Raises ValueError if there is none, or if it cannot be used here."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        source = chat_templates(tokenizer).get("default")
        if source is None:
            raise ValueError("the model's tokenizer has no chat template; use /v1/completions")
        try:
            tokenizer.check_parses()
        except ValueError as error:
            raise ValueError(f"chat is not possible: {error}") from None
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
        }
        self._tokenizer, self._error = tokenizer, TemplateError
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template is damaged: {error}") from None

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation, up to where the assistant answers. Raises ValueError for one it does not take."""
        special: dict[str, Any] = {}
        for name in ("bos", "eos", "pad"):
            id = getattr(self._tokenizer, f"{name}_id")
            special[f"{name}_token"] = None if id is None else self._tokenizer.id_to_token(id)
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True, tools=None, **special)
        except self._error as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        return self._tokenizer.parse_plain(text)
