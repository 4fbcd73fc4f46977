"""Errors of ranks: a user's mistake ends all of them with one message; an error of one rank is printed by it, with its
host, and ends the others within seconds.

From the moment the ranks are connected until they leave, a thread on each polls a key of their store twice a second. A
rank that fails sets it. So no rank waits in a collective for one that will not come, whatever the backend: NCCL would
wait for its timeout.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lit_files.checkpoint_name import list_checkpoints
from lit_files.lock import FileLock
from pretrain.endings import Interrupted, Mistake, status_of
from pretrain.fabric import Fabric
from pretrain.failure.first_failure import Failure, lost_connection, report_failure, utc_now
from pretrain.failure.watchdog import EXIT_HUNG, Watchdog, in_background

T = TypeVar("T")

MEET = timedelta(seconds=60)
FAILED = "llammlein/failed"
POLL_S = 0.5
TOGETHER_S = 4.0
"""For ranks that reach the same error: the slowest after the fastest."""
NOTICE_S = 5.0
"""For the others to notice an error before the failing rank exits: it may host the store, or be their launcher."""


def on_rank_zero(fabric: Fabric, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and give every rank its result, or its ValueError or OSError as a Mistake.

    Any other exception is rank 0's own; the others are ended by `Peers`.
    """
    outcome: tuple[bool, Any] = (False, "")
    cause: BaseException | None = None
    if fabric.global_rank == 0:
        try:
            outcome = (True, work())
        except (ValueError, OSError) as error:
            outcome, cause = (False, str(error) or type(error).__name__), error
    done, value = fabric.broadcast(outcome)
    if not done:
        raise Mistake(value) from cause
    return value  # type: ignore[no-any-return]


class Peers:
    """The ranks of a run once they are connected; for a single process, itself.

    Args:
        watched: an error of one rank ends all. Otherwise errors are raised unchanged.

    Attributes:
        folder: the run folder once it is known, for the name of the newest checkpoint.
        lock: the folder's, on rank 0, which an error in set-up releases.
        watchdog: once there is one.
    """

    def __init__(self, watched: bool = True) -> None:
        self.several = watched and dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if self.several else (0, 1)
        self.host = socket.gethostname()
        self.folder: Path | None = None
        self.lock: FileLock | None = None
        self.watchdog: Watchdog | None = None
        self._ending = threading.Lock()  # its holder ends this process; it is never released
        self._closed = threading.Event()
        if self.several:
            self._client: dist.Store = _get_default_store().clone()  # type: ignore[attr-defined]  # missing in stubs
            threading.Thread(target=self._watch, name="llammlein-peers", daemon=True).start()

    @property
    def newest_checkpoint(self) -> str:
        """Its name, for a message."""
        try:
            return list_checkpoints(self.folder)[-1].name if self.folder is not None else "none"
        except (OSError, IndexError):
            return "none"

    def all_reach(self, error: BaseException, step: int = 0) -> bool:
        """Whether every rank reaches this same error at this step within TOGETHER_S. All get the same answer.

        A run calls this once, as it ends.
        """
        if not self.several:
            return True
        if lost_connection(error):
            return False
        text = f"step {step}: {type(error).__name__}: {error}"
        keys = [f"llammlein/reached/{rank}" for rank in range(self.world_size)]
        store, until = _get_default_store(), time.monotonic() + TOGETHER_S
        try:
            store.set(keys[self.rank], text)
            while not (here := store.check(keys)) and time.monotonic() < until:
                time.sleep(0.02)
            same = here and len(set(store.multi_get(keys))) == 1
            together = store.compare_set("llammlein/together", "", "yes" if same else "no") == b"yes"
            store.set(f"llammlein/heard/{self.rank}", "")
            if together and self.rank == 0:  # the store may end with this process
                store.wait([f"llammlein/heard/{rank}" for rank in range(self.world_size)], timedelta(seconds=NOTICE_S))
            return together
        except RuntimeError:  # the store is gone with its host, or a rank that agreed has not answered
            return False

    def end_set_up(self, error: BaseException) -> NoReturn:
        """Handle an error in set-up, once the ranks are connected. Raises an error that every rank shares; any other
        ends this process and, within seconds, the others."""
        if (newest := self.newest_checkpoint) != "none":
            error.add_note(f"the newest checkpoint is {newest}")
        if isinstance(error, Mistake):
            self.all_reach(error)  # rank 0 stays until all have it
        if isinstance(error, Mistake) or not self.several:
            self.close()
            if self.watchdog is not None:  # the process may continue: a trial that ran out of memory is an answer
                self.watchdog.close()
                self.watchdog.log.close()
            raise error
        if isinstance(error, (ValueError, OSError, Interrupted, KeyboardInterrupt)) and self.all_reach(error):
            self.close()
            if isinstance(error, (ValueError, OSError)):
                mistake = Mistake(str(error))
                mistake.__notes__ = getattr(error, "__notes__", [])
                raise mistake from error
            raise error
        self.give_up(error)

    def give_up(self, error: BaseException, step: int = 0) -> NoReturn:
        """End this rank by its own exception. The others may be anywhere, so nothing is saved; this rank only waits
        until they have noticed."""
        self._ending.acquire()
        kind = type(error).__name__
        first = Failure("", self.rank, self.host, step, kind, str(error), utc_now(), self.rank)
        if self.watchdog is not None:
            first = report_failure(error, step, self.watchdog)
        elif self.several:
            print(f"error: rank {self.rank} failed ({first})", file=sys.stderr)
        quiet = isinstance(error, (Interrupted, KeyboardInterrupt)) or (
            self.watchdog is None and isinstance(error, (ValueError, OSError))
        )
        if first.rank == self.rank and not quiet:
            traceback.print_exception(error)
        print(f"the newest checkpoint is {self.newest_checkpoint}", file=sys.stderr, flush=True)
        # A rank that was lost silently (its host is gone) is worth a retry; a program's error is not.
        status = status_of(error) if first.error != "Silent" else EXIT_HUNG
        if self.several:
            notice = threading.Thread(target=self._tell, args=(first, status), daemon=True)
            notice.start()  # a store whose host has stopped never answers
            notice.join(NOTICE_S)
        sys.stdout.flush()
        self._leave(status)

    def _tell(self, first: Failure, status: int) -> None:
        """Notify the others, and wait until they have noticed."""
        try:
            store = _get_default_store()
            store.compare_set(FAILED, "", json.dumps({"status": status, **vars(first)}))
            others = [f"{FAILED}/{rank}" for rank in range(self.world_size) if rank not in (self.rank, first.rank)]
            while not store.check(others):
                time.sleep(0.05)
        except RuntimeError:
            return

    def _watch(self) -> None:
        """The thread: end this process once another rank has failed."""
        while not self._closed.wait(POLL_S):
            try:
                if not self._client.check([FAILED]):
                    continue
                facts = json.loads(self._client.get(FAILED))
                self._client.set(f"{FAILED}/{self.rank}", "")
            except RuntimeError:
                self._end_without_store()
                return
            status, first = facts.pop("status"), Failure(**facts)
            self._end_by_other(f"rank {self.rank} stopped because rank {first.rank} failed first ({first})", status)
            return

    def _end_without_store(self) -> None:
        """The store's host process has ended. Once there is a watchdog, it handles this."""
        if self.watchdog is None and not self._closed.wait(NOTICE_S):
            text = f"rank {self.rank} on {self.host} lost the connection to rank 0"
            self._end_by_other(text, EXIT_HUNG)

    def _end_by_other(self, text: str, status: int) -> None:
        if not self._ending.acquire(blocking=False):
            time.sleep(2 * NOTICE_S)  # this rank is ending by its own error: give it time, but not forever
            os._exit(status)
        if self.watchdog is not None:
            log = self.watchdog.log
            in_background(lambda: log.event(text)).join(1.0)
        print(f"error: {text}\nthe newest checkpoint is {self.newest_checkpoint}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        self._leave(status)

    def meet(self) -> None:
        """Wait until every rank has finished; one that fails instead ends the others.

        The store may end with rank 0, so after this no rank uses it. Rank 0 releases the others: if it started them,
        Fabric would end it by SIGKILL for a rank with an exit status other than 0.
        """
        if self.several:
            store, others = _get_default_store(), range(1, self.world_size)
            with contextlib.suppress(dist.DistError):  # stop waiting for a rank that is gone
                if self.rank == 0:
                    store.wait([f"llammlein/here/{other}" for other in others], MEET)
                    store.set("llammlein/go", "")
                    store.wait([f"llammlein/gone/{other}" for other in others], MEET)
                else:
                    store.set(f"llammlein/here/{self.rank}", "")
                    store.wait(["llammlein/go"], MEET)
                    self.close()
                    store.set(f"llammlein/gone/{self.rank}", "")
                    time.sleep(0.1)
        self.close()

    def _leave(self, status: int) -> NoReturn:
        """End the process; rank 0 last, since torch prints stacks on ranks whose store is gone."""
        if self.several and self.rank == 0:
            time.sleep(2 * POLL_S)
        os._exit(status)

    def close(self) -> None:
        """Stop watching the other ranks."""
        self._closed.set()
