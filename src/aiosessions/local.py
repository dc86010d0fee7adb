"""Sessions in the memory of this process: nothing to install, lost when the process ends.

Invariants:

- A verb yields to the event loop once, before it looks at anything. From there it decides and acts
  in one step. A verb that is cancelled has done nothing, and a verb that has written returns.
- Two verbs differ. A sweep also yields between batches of removals; if it is cancelled there, the
  next sweep removes the rest. `aclose` closes first and yields then.
- A load renews the TTL after it has read the record, so an unreadable record expires.
- The table holds records, as a server does. A caller never shares an object with the storage.
"""

import builtins
import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Generic

import msgspec
from anyio.lowlevel import cancel_shielded_checkpoint, checkpoint

from ._listeners import Listeners
from ._table import Table
from .codec import Codec, JsonCodec
from .errors import CorruptSession, SessionConflict, SessionExists, SessionNotFound, StorageClosed
from .record import CHANGED, EXISTS, NOT_FOUND, is_rotated, read, read_info, revision_of, seal
from .session import D, Session, SessionInfo, epoch_milliseconds, session_digest
from .storage import (
    Clock,
    IndexedStorage,
    StorageListener,
    When,
    check_codec,
    check_count,
    check_digest,
    check_moment,
    check_principal,
    check_when,
    milliseconds,
)

_log = logging.getLogger("aiosessions")
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


class LocalStorage(IndexedStorage[D], Generic[D]):
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
        self._table = Table[bytes](ttl=self._ttl, clock=clock, max_entries=max_sessions)
        self._listeners = Listeners()
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
        """Return the number and size of the sessions in memory, and the number of evictions."""
        return LocalStatistics(len(self._table), self._table.bytes, self._table.evictions)

    async def store(self, session: Session[D], *, when: When = When.ALWAYS) -> None:
        """See `Storage.store`."""
        await self._begin()
        check_when(when)
        revision, deadline, record = seal(session, self._codec)
        digest = session.digest
        if when is not When.ALWAYS:
            self._check_condition(digest, session.revision, when)
        self._table.put(digest, record, deadline, session.principal)
        session.revision = revision
        self._listeners.changed(digest, revision)

    async def load(self, id: str) -> Session[D]:
        """See `Storage.load`."""
        await self._begin()
        digest = session_digest(id)
        record = self._table.get(digest)
        if record is None:
            raise SessionNotFound(NOT_FOUND)
        # The table has compared the deadline already.
        try:
            session = read(record, digest, self._codec, now=lambda: 0)
        except CorruptSession:
            record = None  # error trackers record the locals of this frame
            raise
        self._table.touch(digest)
        session.id = id
        return session

    async def delete(self, id: str) -> bool:
        """See `Storage.delete`."""
        await self._begin()
        return self._remove(session_digest(id))

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

    def listen(self, listener: StorageListener) -> Callable[[], None]:
        """See `AnnouncingStorage.listen`. A session that is evicted is not announced."""
        return self._listeners.add(listener, complete=True)

    async def list(self, principal: str) -> list[SessionInfo[D]]:
        """See `IndexedStorage.list`."""
        infos: list[SessionInfo[D]] = []
        for digest in reversed(await self._sessions_of(principal)):
            record = self._table.get(digest)
            if record is None:  # it has expired just now
                continue
            try:
                infos.append(read_info(record, digest, self._codec))
            except CorruptSession as error:
                _log.warning("session %s is not listed: %s", digest[:8], error)
        return sorted(infos, key=lambda info: info.updated_at, reverse=True)

    async def count(self, principal: str) -> int:
        """See `IndexedStorage.count`."""
        return len(await self._sessions_of(principal))

    async def revoke(self, principal: str, digest: str) -> bool:
        """See `IndexedStorage.revoke`."""
        check_digest(digest)
        return digest in await self._sessions_of(principal, rotated=True) and self._revoke(digest)

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        """See `IndexedStorage.revoke_all`."""
        kept = None if keep is None else session_digest(keep)
        digests = await self._sessions_of(principal, rotated=True)
        return sum(self._revoke(digest) for digest in digests if digest != kept)

    async def trim(self, principal: str, most: int, *, keep: str) -> int:
        """See `IndexedStorage.trim`."""
        check_count(most, "most")
        kept = session_digest(keep)
        digests = await self._sessions_of(principal)
        excess = [digest for digest in digests if digest != kept][: max(0, len(digests) - most)]
        return sum(map(self._revoke, excess))

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

    async def _sessions_of(self, principal: str, *, rotated: bool = False) -> builtins.list[str]:
        """The digests of a principal's live sessions, the longest unused first.

        Args:
            principal: The owner.
            rotated: Whether to include ids that were rotated away.
        """
        await self._begin()
        check_principal(principal)
        digests = self._table.group(principal)
        return digests if rotated else [each for each in digests if not self._is_rotated(each)]

    def _is_rotated(self, digest: str) -> bool:
        return is_rotated(self._table.get(digest) or b"")

    def _revoke(self, digest: str) -> bool:
        """Remove a live session, and return whether it was one of its own."""
        rotated = self._is_rotated(digest)
        return self._remove(digest) and not rotated

    def _remove(self, digest: str) -> bool:
        removed = self._table.remove(digest)
        self._listeners.changed(digest, "")
        return removed

    def _check_condition(self, digest: str, revision: str, when: When) -> None:
        record = self._table.get(digest)
        if when is When.ABSENT:
            if record is not None:
                raise SessionExists(EXISTS)
        elif record is None:
            raise SessionNotFound(NOT_FOUND)
        elif when is When.UNCHANGED and revision_of(record) != revision:
            raise SessionConflict(CHANGED)
