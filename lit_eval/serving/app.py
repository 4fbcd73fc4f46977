"""The HTTP server: a FastAPI application that validates requests, queues them, and answers in OpenAI's format."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_eval.generation.settings import GenerationSettings
from lit_eval.generation.text import encode_prompts
from lit_eval.model.eval_model import EvalModel
from lit_eval.serving.chat import ChatTemplate
from lit_eval.serving.protocol import ChatRequest, CompletionRequest, Reply, error_body
from lit_eval.serving.settings import LOOPBACK, ServerSettings
from lit_eval.serving.worker import Busy, Job, Unavailable, Worker

LOG = logging.getLogger(__name__)
SERVER_FAILED = "internal server error; the server's log has the cause"
SHUTDOWN_MARGIN_S = 5
"""Beyond a request's timeout; then connections of clients that stopped reading are closed."""
HERE = Path(__file__).parent
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Refused(Exception):
    """Rejects a request with an HTTP error. `retry_s`: seconds until the client may retry."""

    def __init__(self, status: int, message: str, param: str | None = None, retry_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.retry_s = status, param, retry_s

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        return error_body(str(self), "server_error" if self.status >= 500 else kind, self.param)

    def response(self) -> Response:
        headers = {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 408:
            headers["Connection"] = "close"
        return JSONResponse(self.body(), self.status, headers)


@contextmanager
def worker_errors_as_refusals() -> Iterator[None]:
    """Turn the worker's Busy and Unavailable into HTTP errors."""
    try:
        yield
    except Busy as busy:
        raise Refused(429, f"{busy}; try again later", retry_s=5) from None
    except Unavailable as error:
        raise Refused(503, str(error), retry_s=30) from None


class Guard:
    """Middleware for /v1: checks the API key and content type, and reads the body within its size and time limits."""

    def __init__(self, app: ASGIApp, key: str | None, settings: ServerSettings) -> None:
        self.app, self.key, self.limit, self.timeout_s = app, key, settings.max_body_bytes, settings.timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            self.check(request)
            body = await self.body_in_time(request, receive) if request.method == "POST" else b""
        except Refused as refused:
            await refused.response()(scope, receive, send)
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def check(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if self.key is not None and not (
            scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), self.key.encode())
        ):
            raise Refused(401, "send the API key in the header Authorization: Bearer KEY")
        # A page of another site can post a form or plain text without a CORS preflight, but not JSON.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":
            raise Refused(415, "send JSON, with the header Content-Type: application/json")

    async def body_in_time(self, request: Request, receive: Receive) -> bytes:
        """See `body`."""
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self.body(request, receive)
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {self.timeout_s:g} s (--timeout_s)") from None

    async def body(self, request: Request, receive: Receive) -> bytes:
        """Read the body, never more of it than the limit. Raises Refused."""
        too_large = Refused(413, f"the body is larger than {self.limit} bytes (--max_body_bytes)")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.limit:
            raise too_large
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise Refused(400, "the body is incomplete")
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.limit:
                raise too_large
        return b"".join(parts)


class Server:
    """Turns requests into jobs for the worker, and their pieces into responses."""

    def __init__(self, model: EvalModel, name: str, settings: ServerSettings) -> None:
        self.model, self.name, self.settings = model, name, settings
        self.worker = Worker(model, settings.max_waiting, settings.timeout_s)
        self.created = int(time.time())
        self.chat: ChatTemplate | ValueError
        try:
            self.chat = ChatTemplate(model.need_tokenizer())
        except ValueError as error:
            self.chat = error

    def admit(self, body: CompletionRequest | ChatRequest) -> None:
        """Raise Refused for another model's name and for a full queue. Called first: tokenizing a prompt costs time."""
        if body.model not in (None, self.name):
            raise Refused(404, f"model {body.model!r} not found; this server has {self.name!r}", "model")
        with worker_errors_as_refusals():
            self.worker.check_room()

    def new_tokens(self, ids: list[int], wanted: int | None, param: str) -> int:
        """The maximum number of new tokens. Raises Refused if the prompt or the requested number is too large."""
        room = self.model.config.block_size - len(ids)
        if room < 1:
            block = self.model.config.block_size
            raise Refused(400, f"the prompt has {len(ids)} tokens; the model's context is {block}", "prompt")
        if wanted is None:
            return min(room, self.settings.max_new_tokens)
        if wanted > self.settings.max_new_tokens:
            raise Refused(400, f"{param} {wanted}: this server allows at most {self.settings.max_new_tokens}", param)
        if wanted > room:
            raise Refused(
                400, f"{param} {wanted}: the prompt's {len(ids)} tokens leave room for {room} in the context", param
            )
        return wanted

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        self.admit(body)
        try:
            (ids,) = await asyncio.to_thread(encode_prompts, self.model, [body.only_prompt()], 0)
        except ValueError as error:
            raise Refused(400, str(error), "prompt") from None
        n = self.new_tokens(ids, body.max_tokens, "max_tokens")
        return await self.respond(body, ids, body.settings(n), request)

    async def converse(self, body: ChatRequest, request: Request) -> Response:
        if isinstance(self.chat, ValueError):
            raise Refused(404, str(self.chat))
        self.admit(body)
        try:
            ids = await asyncio.to_thread(self.chat.encode, [message.to_dict() for message in body.messages])
        except ValueError as error:
            raise Refused(400, str(error), "messages") from None
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise Refused(400, "give max_tokens or max_completion_tokens, not both", "max_tokens")
        wanted = body.max_tokens or body.max_completion_tokens
        n = self.new_tokens(ids, wanted, "max_tokens" if body.max_tokens else "max_completion_tokens")
        return await self.respond(body, ids, body.settings(n), request)

    async def respond(
        self, body: CompletionRequest | ChatRequest, ids: list[int], settings: GenerationSettings, request: Request
    ) -> Response:
        with worker_errors_as_refusals():
            job = self.worker.submit(ids, settings)
        reply = Reply(isinstance(body, ChatRequest), self.name, len(ids))
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.get("include_usage"))
            return StreamingResponse(self.events(job, reply, with_usage), media_type="text/event-stream")
        texts, finish = [], ""
        with worker_errors_as_refusals():
            async with aclosing(self.worker.answer(job, request.is_disconnected)) as pieces:
                async for piece in pieces:
                    reply.tokens += 1
                    texts.append(piece.text)
                    finish = piece.finish or ""
        if not finish:
            return Response(status_code=499)  # the client disconnected; nobody reads this
        return JSONResponse(reply.whole("".join(texts), finish))

    async def events(self, job: Job, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
        """Server-sent events. An error is an event too, since the status was already sent."""
        try:
            async with aclosing(self.worker.answer(job)) as pieces:
                first = True
                async for piece in pieces:
                    reply.tokens += 1
                    if piece.text or piece.finish or first:
                        yield event(reply.chunk(piece.text, piece.finish, first))
                    first = False
        except Unavailable as error:
            yield event(error_body(str(error), "server_error"))
            return
        except Exception:
            LOG.exception("a streamed request failed")
            yield event(error_body(SERVER_FAILED, "server_error"))
            return
        if with_usage:
            yield event(reply.last_chunk())
        yield "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def build_app(model: EvalModel, name: str, settings: ServerSettings, key: str | None) -> FastAPI:
    """Build the application. Its worker thread ends with the application's lifespan."""
    server = Server(model, name, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.worker.close)  # it waits for the thread, which needs this loop to send errors

    app = FastAPI(lifespan=lifespan, openapi_url=None, title="llammlein")
    app.add_middleware(Guard, key=key, settings=settings)
    if settings.host in LOOPBACK:  # against DNS rebinding
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return error.response()

    async def malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = str(first["loc"][1]) if first["type"] != "json_invalid" and len(first["loc"]) > 1 else None
        return JSONResponse(error_body(f"{where or 'the body'}: {first['msg']}", param=where), 400)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse(error_body(str(error.detail)), error.status_code)

    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(SERVER_FAILED, "server_error"), 500)

    app.add_exception_handler(Exception, failed)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http_error)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await server.complete(body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await server.converse(body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": server.created, "owned_by": "llammlein"}
        return {"object": "list", "data": [entry]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        running, waiting = server.worker.load()
        return {"status": "ok", "running": running, "waiting": waiting}

    def static(file: str, kind: str) -> Any:
        content = (HERE / file).read_bytes()
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

        async def send() -> Response:
            return Response(content, media_type=f"{kind}; charset=utf-8", headers=headers)

        return send

    for path, (file, kind) in PAGE.items():
        app.get(path)(static(file, kind))
    return app


def http_server(app: FastAPI, settings: ServerSettings) -> uvicorn.Server:
    """The server for an application. On SIGTERM and Ctrl-C it finishes running requests, within their timeout."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=math.ceil(settings.timeout_s) + SHUTDOWN_MARGIN_S,
        )
    )
