"""Requests and responses of OpenAI's API. Unsupported parameters are refused by name."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lit_eval.generation.settings import GenerationSettings
from lit_files.reading import check_unicode
from lit_model.sampling import Sampling

COMPLETION_TOKENS = 16  # OpenAI's default

Text = Annotated[str, AfterValidator(check_unicode)]
StopText = Annotated[Text, Field(min_length=1, max_length=1000)]
One = Annotated[int, Field(ge=1, le=1)] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None
FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


class Common(BaseModel):
    """Fields of both kinds of requests. Those of the last group are accepted only at their neutral value."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    user: str | None = None

    n: One = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None

    def settings(self, max_new_tokens: int) -> GenerationSettings:
        """The request's generation settings. A request without a seed gets a random one."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = Sampling(self.repetition_penalty, self.temperature, self.top_k, self.top_p, self.min_p)
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return GenerationSettings(sampling, max_new_tokens, seed=seed, stop=stop)


class CompletionRequest(Common):
    """Body of /v1/completions."""

    prompt: Text | list[int] | Annotated[list[Text], Field(min_length=1, max_length=1)]
    """Text, token ids, or a list of one text."""
    max_tokens: Annotated[int, Field(ge=1)] = COMPLETION_TOKENS

    echo: Literal[False] | None = None
    best_of: One = None

    def only_prompt(self) -> str | list[int]:
        """The prompt as text or token ids."""
        if isinstance(self.prompt, str):
            return self.prompt
        texts = [part for part in self.prompt if isinstance(part, str)]
        return texts[0] if texts else [part for part in self.prompt if isinstance(part, int)]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    def to_dict(self) -> dict[str, str]:
        """The message in the form that chat templates expect."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Common):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """The body of an error response in OpenAI's format."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


class Reply:
    """Formats one response, whole or in chunks.

    Args:
        chat: whether it is for /v1/chat/completions.
        prompt_tokens: length of the prompt, for the usage statistics.
    """

    def __init__(self, chat: bool, model: str, prompt_tokens: int) -> None:
        self.chat, self.prompt_tokens, self.tokens = chat, prompt_tokens, 0
        kind = "chat.completion" if chat else "text_completion"
        name = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.frame = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}

    def whole(self, text: str, finish: str) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": FINISH[finish]}
        return {**self.frame, "choices": [choice], "usage": self.usage()}

    def chunk(self, text: str, finish: str | None, first: bool) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": FINISH[finish] if finish else None}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.frame, "object": kind, "choices": [choice]}

    def last_chunk(self) -> dict[str, Any]:
        """The chunk with the usage statistics, for requests with stream_options.include_usage."""
        return {**self.chunk("", None, False), "choices": [], "usage": self.usage()}
