"""Calls a method in worker processes; results keep the order of the items, with few items in flight."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

CALLS_PER_WORKER = 3  # in flight; bounds the memory


class Pool:
    """A process pool; each worker builds its own object with `make`.

    With one worker the object is in this process. Use as a context manager.

    Args:
        workers: number of processes.
        make: picklable; called once in each process.
    """

    def __init__(self, workers: int, make: Callable[[], Any]) -> None:
        self.workers = workers
        self._object = make() if workers == 1 else None
        self._executor: ProcessPoolExecutor | None = None
        if workers > 1:
            # spawn: a forked process would inherit threads that tokenizers and Arrow have started here.
            spawn = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(make,))

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def map(self, method: str, items: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield object.method(item) for each item. Items are consumed lazily, at most CALLS_PER_WORKER per worker
        ahead.
        """
        if self._executor is None:
            for item in items:
                yield getattr(self._object, method)(item)
            return
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                waiting.append(self._executor.submit(_call, method, item))
                if len(waiting) >= self.workers * CALLS_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"a worker process ended unexpectedly, perhaps out of memory; lower --workers (now {self.workers})"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


_object: Any = None  # this worker's object; built once, not sent with every call


def _start_worker(make: Callable[[], Any]) -> None:
    global _object
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallelism comes from the processes
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent cleans up
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _object = make()


def _end_with_parent() -> None:
    """Exit when the parent is gone: a parent killed by SIGKILL can't stop its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(method: str, item: Any) -> Any:
    return getattr(_object, method)(item)
