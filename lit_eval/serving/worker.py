"""Runs requests one at a time in a background thread; further requests wait in a bounded queue.

One at a time, so that an answer is exactly that of scripts/generate.py: batched matrix products round differently.
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

SHUTTING_DOWN = "the server is shutting down"
POLL_S = 0.5  # interval at which a waiting request checks that its client is still connected


class Busy(Exception):
    """The queue is full."""


class Unavailable(Exception):
    """A request timed out, or the server is shutting down."""


@dataclass(eq=False)
class Job:
    """An accepted request. The worker thread puts pieces into `pieces`; the request's event loop takes them out."""

    ids: list[int]
    settings: GenerationSettings
    deadline: float
    """time.monotonic() at which the request times out."""
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    dropped: bool = False

    def send(self, item: Piece | Exception) -> None:
        """Called from the worker thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)


class Worker:
    """Owns the model and the thread that runs it. `submit` and `drop` are called from the event loop."""

    def __init__(self, model: EvalModel, max_waiting: int, timeout_s: float) -> None:
        self.model, self.max_waiting, self.timeout_s = model, max_waiting, timeout_s
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()  # over an RLock: submit calls check_room while it holds it
        self._thread = threading.Thread(target=self._run, name="llammlein-generation", daemon=True)
        self._thread.start()

    def check_room(self) -> None:
        """Raise Busy if the queue is full, and Unavailable once the worker is closed."""
        with self._changed:
            if self._closed:
                raise Unavailable(SHUTTING_DOWN)
            if len(self._waiting) >= self.max_waiting + (self._running is None):
                raise Busy(f"the queue is full ({self.max_waiting} requests)")

    def submit(self, ids: list[int], settings: GenerationSettings) -> Job:
        """Queue a request. Raises as `check_room`."""
        with self._changed:
            self.check_room()
            job = Job(ids, settings, time.monotonic() + self.timeout_s, asyncio.get_running_loop())
            self._waiting.append(job)
            self._changed.notify()
        return job

    def drop(self, job: Job) -> None:
        """Remove a request from the queue, or stop it after the current token if it is running. No effect on a finished
        one."""
        with self._changed:
            job.dropped = True
            if job in self._waiting:
                self._waiting.remove(job)

    async def answer(self, job: Job, gone: Callable[[], Awaitable[bool]] | None = None) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of a request as they are generated; stop once `gone` returns True (the client disconnected).

        Raises Unavailable, and any exception of the generation.
        """
        try:
            while True:
                left = job.deadline - time.monotonic()
                item: Piece | Exception | None = None
                try:
                    item = await asyncio.wait_for(job.pieces.get(), max(0.0, min(left, POLL_S)))
                except TimeoutError:
                    if left <= 0:
                        raise Unavailable(f"timed out after {self.timeout_s:g} s (--timeout_s)") from None
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
        """(running requests, waiting requests)."""
        with self._changed:
            return int(self._running is not None), len(self._waiting)

    def close(self) -> None:
        """Fail waiting and running requests with Unavailable, and join the thread: blocks for a token's time."""
        with self._changed:
            self._closed = True
            unfinished = [*self._waiting, *([self._running] if self._running is not None else [])]
            for job in unfinished:
                job.dropped = True
            self._waiting.clear()
            self._changed.notify()
        for job in unfinished:
            job.send(Unavailable(SHUTTING_DOWN))
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
            except Exception as error:  # fails this request only; the next one may well succeed
                job.send(error)
