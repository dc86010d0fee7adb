"""Sessions in the memory of this process: nothing to install, lost when the process ends.

Invariants:

- A verb yields to the event loop once, before it looks at anything. From there it decides and acts
  in one step. A verb that is cancelled has done nothing, and a verb that has written returns.
- Two verbs differ. A sweep also yields between batches of removals; if it is cancelled there, the
  next sweep removes the rest. `aclose` closes first and yields then.
- A load renews the TTL after it has read the record, so an unreadable record expires.
- The table holds records, as a server does. A caller never shares an object with the storage.
"""

import time
from datetime import datetime, timedelta
from typing import Generic

import msgspec
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint

from ._table import Table
from .codec import Codec, JsonCodec
from .errors import SessionConflict, SessionExists, SessionNotFound, StorageClosed
from .record import CHANGED, EXISTS, NOT_FOUND, revision_of, seal, unseal
from .session import D, Session, check_id, epoch_milliseconds
from .storage import (
    Clock,
    Storage,
    When,
    check_codec,
    check_count,
    check_moment,
    check_when,
    milliseconds,
)

# At the default size a batch takes a fraction of a millisecond; docs/benchmarks.md has the longest.
_SWEEP_BATCH = 50


class LocalStatistics(msgspec.Struct, frozen=True):
    """Numbers of a `LocalStorage` at one moment.

    Attributes:
        sessions: The sessions in memory, including expired ones that were not swept yet.
        bytes: The size of their records.
        evictions: The live sessions that were removed to make room, since the storage was made.
    """

    sessions: int
    bytes: int
    evictions: int


class LocalStorage(Storage[D], Generic[D]):
    """Sessions in the memory of one process, through the same codec as in a database.

    Code that works with this storage works with a remote one: callers get copies, types and sizes
    are checked, and sessions expire at the same moments. Memory is bounded by `max_sessions` times
    the codec's `max_bytes`.

    Runs under asyncio and trio, and every verb is a checkpoint. Not for use from several threads.

    Args:
        ttl: The time after which an unused session expires: seconds or a timedelta, to the
            millisecond.
        max_sessions: The most sessions to keep. A full storage removes sessions past their
            deadline first, then the least recently used.
        codec: The codec that encodes the sessions.
        clock: The source of time.

    Raises:
        ValueError: `ttl` or `max_sessions` is not positive.
        TypeError: An argument has the wrong type.
    """

    def __init__(
        self,
        *,
        ttl: float | timedelta,
        max_sessions: int = 100_000,
        codec: Codec[D] = JsonCodec(),  # noqa: B008 - it has no state
        clock: Clock = time,
    ) -> None:
        check_count(max_sessions, "max_sessions")
        check_codec(codec)
        self._ttl = milliseconds(ttl, "ttl")
        self._codec = codec
        self._table = Table(ttl=self._ttl, clock=clock, max_entries=max_sessions)
        self._closed = False

    def __repr__(self) -> str:
        return f"LocalStorage(ttl={self.ttl}, sessions={len(self._table)})"

    @property
    def codec(self) -> Codec[D]:
        """The codec that encodes the sessions."""
        return self._codec

    @property
    def ttl(self) -> float:
        """The time after which an unused session expires, in seconds."""
        return self._ttl / 1000

    def statistics(self) -> LocalStatistics:
        """Return the number and the size of the sessions in memory, and of the evicted ones."""
        return LocalStatistics(len(self._table), self._table.bytes, self._table.evictions)

    async def store(self, session: Session[D], *, when: When = When.ALWAYS) -> None:
        """See `Storage.store`."""
        await self._begin()
        check_when(when)
        revision, deadline, record = seal(session, self._codec)
        if when is not When.ALWAYS:
            self._check_condition(session, when)
        self._table.put(session.id, record, deadline)
        session.revision = revision

    async def load(self, id: str) -> Session[D]:
        """See `Storage.load`."""
        await self._begin()
        check_id(id)
        record = self._table.get(id)
        if record is None:
            raise SessionNotFound(NOT_FOUND)
        # The table has compared the deadline already.
        session = unseal(record, id, self._codec, now=lambda: 0)
        self._table.touch(id)
        return session

    async def delete(self, id: str) -> bool:
        """See `Storage.delete`."""
        await self._begin()
        check_id(id)
        return self._table.remove(id)

    async def delete_expired(self, before: datetime | None = None) -> int:
        """See `Storage.delete_expired`.

        The cost is in proportion to the removed sessions, not to the stored ones. Other tasks run
        between one batch of removals and the next.
        """
        await self._begin()
        moment = None if before is None else epoch_milliseconds(check_moment(before, "before"))
        removed = 0
        for _ in self._table.sweep(moment):
            removed += 1
            if removed % _SWEEP_BATCH == 0:
                await checkpoint()
        return removed

    async def aclose(self) -> None:
        """Remove every session. See `Storage.aclose`.

        A cancelled scope does not cancel this verb, so leaving an `async with` masks no error.
        """
        self._closed = True
        self._table.clear()
        await cancel_shielded_checkpoint()

    async def _begin(self) -> None:
        # A pair of `checkpoint_if_cancelled` here and `cancel_shielded_checkpoint` after the write
        # costs more, and a native cancellation of asyncio would interrupt the second one.
        await checkpoint()
        if self._closed:
            raise StorageClosed("the storage is closed")

    def _check_condition(self, session: Session[D], when: When) -> None:
        record = self._table.get(session.id)
        if when is When.ABSENT:
            if record is not None:
                raise SessionExists(EXISTS)
        elif record is None:
            raise SessionNotFound(NOT_FOUND)
        elif when is When.UNCHANGED and revision_of(record) != session.revision:
            raise SessionConflict(CHANGED)
