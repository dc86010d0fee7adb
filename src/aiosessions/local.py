"""Sessions in this process: nothing to install, gone when the process is.

Invariants:

- The verbs decide and act without yielding to the event loop, so each is atomic; only a long sweep
  lets others run, between one batch and the next.
- `_sessions` is in the order of last use. As all have the same TTL, that is also the order in which
  they go idle: the front expires first, and is the least recently used.
- `_deadlines` is a heap of (deadline, id). An entry whose session is gone, or has another deadline
  by now, is stale: it is dropped when it surfaces, and the heap is rebuilt before stale entries
  outnumber the sessions.
- What is kept are records, as in a database: no caller ever shares an object with the storage.
"""

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Generic

import anyio.lowlevel

from .codec import Codec, JsonCodec
from .errors import SessionConflict, SessionExists, SessionNotFound, StorageClosed
from .record import CHANGED, EXISTS, NO_DEADLINE, NOT_FOUND, seal, unseal
from .session import D, Session, as_utc, check_id, epoch_milliseconds
from .storage import Clock, Storage, When, check_when, milliseconds

# A batch keeps the event loop for a tenth of a millisecond; see docs/benchmarks.md for the longest.
_SWEEP_BATCH = 100


@dataclass(slots=True)
class _Entry:
    record: bytes
    revision: str
    idle_at: int  # monotonic milliseconds
    deadline: int  # milliseconds since the epoch


class LocalStorage(Storage[D], Generic[D]):
    """Sessions in the memory of one process, through the same codec as in a database.

    What works here works remotely: callers get copies, types and sizes are checked, and expiry is
    the same. Memory is bounded by `max_sessions` times the codec's `max_bytes`.

    Runs under asyncio and trio. Not for use from several threads.

    Args:
        ttl: How long a session lives without being loaded or stored: seconds or a timedelta, to the
            millisecond.
        max_sessions: How many to keep. Beyond it expired ones go first, then the least recently
            used.
        codec: How sessions are encoded.
        clock: Where the time comes from.

    Raises:
        ValueError: `ttl` or `max_sessions` is not positive.
    """

    def __init__(
        self,
        *,
        ttl: float | timedelta,
        max_sessions: int = 100_000,
        codec: Codec[D] = JsonCodec(),  # noqa: B008 - it has no state
        clock: Clock = time,
    ) -> None:
        if max_sessions < 1:
            message = f"max_sessions must be at least 1, not {max_sessions}"
            raise ValueError(message)
        self._ttl = milliseconds(ttl, "ttl")
        self._max_sessions = max_sessions
        self._codec = codec
        self._clock = clock
        self._sessions: OrderedDict[str, _Entry] = OrderedDict()
        self._deadlines: list[tuple[int, str]] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"LocalStorage(ttl={self._ttl / 1000}, sessions={len(self._sessions)})"

    async def store(self, session: Session[D], *, when: When = When.ALWAYS) -> None:
        """See `Storage.store`."""
        self._check_open()
        check_when(when)
        revision, deadline, record = seal(session, self._codec)
        if when is not When.ALWAYS:
            self._check_condition(session, when)
        self._put(session.id, _Entry(record, revision, self._monotonic() + self._ttl, deadline))
        session.revision = revision

    async def load(self, id: str) -> Session[D]:
        """See `Storage.load`."""
        self._check_open()
        check_id(id)
        entry = self._find(id)
        if entry is None:
            raise SessionNotFound(NOT_FOUND)
        entry.idle_at = self._monotonic() + self._ttl
        self._sessions.move_to_end(id)
        return unseal(entry.record, id, self._codec, self._time)

    async def delete(self, id: str) -> bool:
        """See `Storage.delete`."""
        self._check_open()
        check_id(id)
        existed = self._find(id) is not None
        if id in self._sessions:
            self._forget(id)
        return existed

    async def delete_expired(self, before: datetime | None = None) -> int:
        """See `Storage.delete_expired`. Costs what is removed, not what is stored.

        Other tasks run between one batch of removals and the next.
        """
        self._check_open()
        if before is None:
            removed = await self._in_batches(self._drop_past_deadline)
            idle_at = self._monotonic()
        else:
            removed = 0
            age = self._time() - epoch_milliseconds(as_utc(before, "before"))
            # Last used before `before`: the age counts back on the clock that never steps.
            idle_at = self._monotonic() - age + self._ttl - 1
        return removed + await self._in_batches(lambda: self._drop_idle(idle_at))

    async def aclose(self) -> None:
        """Forget every session. See `Storage.aclose`."""
        self._closed = True
        self._sessions.clear()
        self._deadlines.clear()

    def _check_open(self) -> None:
        if self._closed:
            message = "the storage is closed"
            raise StorageClosed(message)

    def _monotonic(self) -> int:
        return round(self._clock.monotonic() * 1000)

    def _time(self) -> int:
        return round(self._clock.time() * 1000)

    def _find(self, id: str) -> _Entry | None:
        """The entry of a session that can be loaded now."""
        entry = self._sessions.get(id)
        if entry is None or entry.idle_at <= self._monotonic() or entry.deadline <= self._time():
            return None
        return entry

    def _check_condition(self, session: Session[D], when: When) -> None:
        entry = self._find(session.id)
        if when is When.ABSENT:
            if entry is not None:
                raise SessionExists(EXISTS)
        elif entry is None:
            raise SessionNotFound(NOT_FOUND)
        elif when is When.UNCHANGED and entry.revision != session.revision:
            raise SessionConflict(CHANGED)

    def _put(self, id: str, entry: _Entry) -> None:
        old = self._sessions.get(id)
        if old is None and len(self._sessions) >= self._max_sessions:
            _ = self._drop_past_deadline() or self._sessions.popitem(last=False)
        self._sessions[id] = entry
        self._sessions.move_to_end(id)
        if entry.deadline != NO_DEADLINE and (old is None or old.deadline != entry.deadline):
            heapq.heappush(self._deadlines, (entry.deadline, id))
            self._tidy()

    def _forget(self, id: str) -> None:
        del self._sessions[id]
        self._tidy()

    def _tidy(self) -> None:
        """Rebuild the heap before stale entries outnumber the sessions: its ids are credentials."""
        if len(self._deadlines) > 2 * len(self._sessions):
            self._deadlines = [
                (entry.deadline, id)
                for id, entry in self._sessions.items()
                if entry.deadline != NO_DEADLINE
            ]
            heapq.heapify(self._deadlines)

    def _drop_past_deadline(self) -> bool:
        """Drop one session that is past its `expires_at`, if there is one."""
        now = self._time()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, id = heapq.heappop(self._deadlines)
            entry = self._sessions.get(id)
            if entry is not None and entry.deadline == deadline:
                self._forget(id)
                return True
        return False

    def _drop_idle(self, idle_at: int) -> bool:
        """Drop the least recently used session if it goes idle by `idle_at`."""
        oldest = next(iter(self._sessions.items()), None)
        if oldest is None or oldest[1].idle_at > idle_at:
            return False
        self._forget(oldest[0])
        return True

    async def _in_batches(self, drop: Callable[[], bool]) -> int:
        """Call `drop` until it finds nothing more, and let other tasks run now and then."""
        removed = 0
        while drop():
            removed += 1
            if removed % _SWEEP_BATCH == 0:
                await anyio.lowlevel.checkpoint()
        return removed
