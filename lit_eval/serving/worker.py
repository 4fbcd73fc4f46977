"""Answers requests one after another on a thread of its own; the others wait in a bounded queue.

One at a time, since an answer is then exactly that of scripts/generate.py: in a batch, products are rounded otherwise.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field

from lit_eval.generation.settings import GenerationSettings
from lit_eval.generation.text import Piece, stream_pieces
from lit_eval.model.eval_model import EvalModel

LOOK_S = 0.5  # between two looks whether a client that waits is still there


class Busy(Exception):
    """The queue is full."""


class GivenUp(Exception):
    """A request was not answered in time, or the server is shutting down."""


@dataclass(eq=False)
class Job:
    """A request that was accepted. Its event loop reads `pieces`; the worker's thread writes them."""

    ids: list[int]
    settings: GenerationSettings
    deadline: float
    """time.monotonic() at which it is given up."""
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    dropped: bool = False

    def send(self, item: Piece | Exception) -> None:
        """Called in the worker's thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)


class Worker:
    """Owns the model. `submit` and `drop` are called by the event loop."""

    def __init__(self, model: EvalModel, max_waiting: int, timeout_s: float) -> None:
        self.model, self.max_waiting, self.timeout_s = model, max_waiting, timeout_s
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="llammlein-generation", daemon=True)
        self._thread.start()

    def submit(self, ids: list[int], settings: GenerationSettings) -> Job:
        """Queue a request. Raises Busy, and GivenUp once the worker is closed."""
        with self._changed:
            if self._closed:
                raise GivenUp("the server is shutting down")
            if len(self._waiting) >= self.max_waiting + (self._running is None):
                raise Busy(f"{self.max_waiting} requests are waiting")
            job = Job(ids, settings, time.monotonic() + self.timeout_s, asyncio.get_running_loop())
            self._waiting.append(job)
            self._changed.notify()
        return job

    def drop(self, job: Job) -> None:
        """Free a request's place; the one being answered ends with its current token. Harmless for a finished one."""
        with self._changed:
            job.dropped = True
            if job in self._waiting:
                self._waiting.remove(job)

    async def answer(self, job: Job, gone: Callable[[], Awaitable[bool]] | None = None) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of a request as they come; none once `gone` says that nobody reads them. Raises GivenUp."""
        try:
            while True:
                left = job.deadline - time.monotonic()
                item: Piece | Exception | None = None
                try:
                    item = await asyncio.wait_for(job.pieces.get(), max(0.0, min(left, LOOK_S)))
                except TimeoutError:
                    if left <= 0:
                        raise GivenUp(f"not answered within {self.timeout_s:g} s") from None
                if isinstance(item, Exception):
                    raise item
                if gone is not None and await gone():
                    return
                if item is not None:
                    yield item
                    if item.finish is not None:
                        return
        finally:
            self.drop(job)

    def load(self) -> tuple[int, int]:
        """(requests being answered, requests waiting)."""
        with self._changed:
            return int(self._running is not None), len(self._waiting)

    def close(self) -> None:
        """Give up what waits or is being answered, and end the thread."""
        with self._changed:
            self._closed = True
            given_up = [*self._waiting, *([self._running] if self._running is not None else [])]
            for job in given_up:
                job.dropped = True
            self._waiting.clear()
            self._changed.notify()
        for job in given_up:
            job.send(GivenUp("the server is shutting down"))
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
            try:
                with closing(stream_pieces(self.model, job.ids, job.settings)) as pieces:
                    for piece in pieces:
                        if job.dropped:
                            break
                        job.send(piece)
            except Exception as error:  # of this request alone: the next one may well be answered
                job.send(error)
