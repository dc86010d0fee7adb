"""The copies of a near cache: which one a load may return, and when one ends.

The copies know neither event loops nor codecs nor storages: `NearCache` adds those.

Invariants:

- The age of a copy counts from the moment at which its load or write began. `get` returns none that
  is `max_staleness` old, or past its deadline.
- A load or write leaves no copy if another change of its session was noted since it began.
- While announcements are interrupted, each copy is younger than the interruption. After that, each
  copy is younger than the resumption. Copies for outages are the exception (`serve_stale_for`).
- A listener hears of a change after the copies do. A write that fails is not a change.
- A forked process hears nothing, so the copies of its parent are dropped.
"""

import logging
import os
from collections.abc import Callable
from itertools import islice
from typing import Any
from weakref import WeakSet

import msgspec

from ._listeners import Listeners
from ._table import Table
from .session import Session
from .storage import Clock, StorageListener, whole_milliseconds

DELETED = ""  # in place of a revision
# Expired copies to remove for each one that comes, so that none stays for long.
_SWEPT = 2
_log = logging.getLogger("aiosessions")


class CacheStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of a `NearCache`: the state now, and counts since it was made.

    Attributes:
        sessions: The copies in memory, including expired ones that were not removed yet.
        bytes: The size of their payloads.
        announced: Whether the storage announces every change at present. If not, only
            `max_staleness` bounds the age of a copy.
        hits: Loads that returned a copy without asking the storage.
        misses: Loads that asked the storage.
        coalesced: Loads that waited for a load of another caller.
        stale_served: Misses and coalesced loads that returned a copy in an outage, with
            `serve_stale_for`.
        stale_dropped: Copies that were dropped because a write over them met a newer state.
        evictions: Copies that were removed to make room.
        invalidations: Announcements, those of this cache's own changes included. In a cluster, each
            master announces each delete.
    """

    sessions: int
    bytes: int
    announced: bool
    hits: int
    misses: int
    coalesced: int
    stale_served: int
    stale_dropped: int
    evictions: int
    invalidations: int


class Copy:
    """A session as it was at one moment.

    Args:
        payload: The encoded session, with its digest in place of its id.
        session: The session.
        deadline: Its deadline, in milliseconds since the epoch.

    Attributes:
        read_at: The moment at which its load or write began.
        period: The number of interruptions before.
    """

    __slots__ = "deadline", "digest", "id", "payload", "period", "principal", "read_at", "revision"

    def __init__(self, payload: bytes, session: Session[Any], deadline: float) -> None:
        self.payload = payload
        self.id, self.digest = session.id, session.digest
        self.revision, self.principal = session.revision, session.principal
        self.deadline = deadline
        self.read_at = self.period = 0

    def __len__(self) -> int:
        return len(self.payload)


class Pending:
    """A load or a write that has not ended.

    Attributes:
        began: The moment at which it began, in milliseconds.
        noted: The revisions of its session that were noted since.
    """

    def __init__(self, began: int) -> None:
        self.began = began
        self.noted: set[str] = set()


class Copies(StorageListener):
    """The copies of one cache, which hear of changes from its storage and from the cache.

    Args:
        max_staleness: The age at which a copy is stale, in milliseconds.
        stale_for: The time for which a stale copy may serve in an outage, in milliseconds.
        clock: The source of time.
        max_entries: The most copies to keep.
        max_bytes: The most bytes that all payloads together may have.

    Attributes:
        hits, misses, coalesced: See `CacheStatistics`.
    """

    def __init__(
        self,
        *,
        max_staleness: int,
        stale_for: int,
        clock: Clock,
        max_entries: int,
        max_bytes: int,
    ) -> None:
        self._max_staleness = max_staleness
        self._stale_for = stale_for
        self._clock = clock
        self._digests: dict[str, str] = {}  # by id, of the copies
        self._copies = Table[Copy](  # by digest, in groups by principal
            ttl=max_staleness + stale_for,
            clock=clock,
            max_entries=max_entries,
            max_bytes=max_bytes,
            on_drop=lambda copy: self._digests.pop(copy.id, None),
        )
        self._period = 0  # counts the interruptions
        self._pending: dict[str, list[Pending]] = {}  # by digest
        self._listeners = Listeners()
        self._announced = self._warned = False
        self._stale_served = self._stale_dropped = self._invalidations = 0
        self.hits = self.misses = self.coalesced = 0
        _in_this_process.add(self)

    def statistics(self) -> CacheStatistics:
        """Count copies, hits and misses."""
        return CacheStatistics(
            sessions=len(self._copies),
            bytes=self._copies.bytes,
            announced=self._announced,
            hits=self.hits,
            misses=self.misses,
            coalesced=self.coalesced,
            stale_served=self._stale_served,
            stale_dropped=self._stale_dropped,
            evictions=self._copies.evictions,
            invalidations=self._invalidations,
        )

    def get(self, id: str) -> Copy | None:
        """The copy that a load may return."""
        digest = self._digests.get(id)
        if digest is None:
            return None
        found = self._copies.promote(digest)
        if self._stale_for and found is not None and not self._is_fresh(found):
            return None
        return found

    def get_stale(self, id: str) -> Copy | None:
        """The copy that a load may return in an outage."""
        found = self._copies.get(self._digests.get(id, ""))
        self._stale_served += found is not None
        return found

    def now(self) -> int:
        """The moment, in milliseconds."""
        return whole_milliseconds(self._clock.monotonic())

    def is_over(self, copy: Copy) -> bool:
        """Whether a copy is past its deadline."""
        return copy.deadline <= whole_milliseconds(self._clock.time())

    def begin(self, digest: str) -> Pending:
        """Begin a load or a write of a session."""
        pending = Pending(self.now())
        self._pending.setdefault(digest, []).append(pending)
        return pending

    def end(self, digest: str, pending: Pending) -> None:
        """End a load or a write."""
        others = self._pending[digest]
        others.remove(pending)
        if not others:
            del self._pending[digest]

    def keep(self, copy: Copy, pending: Pending) -> None:
        """Keep the result of a load or a write, if nothing else was noted since it began."""
        if DELETED not in pending.noted and pending.noted <= {copy.revision}:
            copy.read_at, copy.period = pending.began, self._period
            self._digests[copy.id] = copy.digest
            age = self.now() - pending.began
            self._copies.put(copy.digest, copy, copy.deadline, copy.principal, age)
            if self._copies.get(copy.digest) is not copy:  # it is over, or too large
                self._digests.pop(copy.id, None)
            for _ in islice(self._copies.sweep(), _SWEPT):
                pass

    def drop(self, digest: str) -> None:
        """Drop one copy."""
        self._copies.remove(digest)

    # Changes.

    def note(self, digest: str, revision: str) -> None:
        """Drop the copy of a session that this cache has changed, unless it has this revision."""
        self._drop(digest, revision)
        if not self._announced:  # else the storage tells
            self._listeners.changed(digest, revision)

    def doubt(self, digest: str, *, refused: str = DELETED) -> None:
        """Drop the copy of a session that may have changed.

        Args:
            digest: The digest of its id.
            refused: The revision over which a write was refused.
        """
        found = self._copies.get(digest)
        if refused != DELETED and found is not None and found.revision == refused:
            self._stale_dropped += 1
        self._drop(digest, DELETED)

    def forget(self, principal: str, keep: str | None) -> list[str]:
        """Drop the copies of a principal's sessions, as the storage does not say which ones went.

        Args:
            principal: The owner.
            keep: The id of the session that stays.

        Returns:
            The digests of the copies.
        """
        self._distrust()
        for _ in self._copies.sweep():  # else a wall clock that is set back could revive them
            pass
        kept = self._digests.get(keep or "")
        digests = [each for each in self._copies.group(principal) if each != kept]
        for digest in digests:
            self.drop(digest)
        return digests

    def distrust_owners(self) -> None:
        """Drop every copy after a revocation, unless the storage announces new owners."""
        if not self._announced:
            self.clear()

    def clear(self) -> None:
        """Drop every copy, because any session may have changed."""
        self._distrust()
        self._copies.clear()

    def listen(self, listener: StorageListener) -> Callable[[], None]:
        """See `AnnouncingStorage.listen`. The copies hear of a change first."""
        return self._listeners.add(listener, complete=self._announced)

    def changed(self, digest: str, revision: str) -> None:
        """See `StorageListener.changed`."""
        self._invalidations += 1
        self._drop(digest, revision)
        self._listeners.changed(digest, revision)

    def interrupted(self) -> None:
        """See `StorageListener.interrupted`. Keeps copies only for an outage."""
        self._distrust()
        self._period += 1
        if not self._stale_for:
            self._copies.clear()
        if not self._warned:
            _log.warning(
                "changes of sessions are not announced at present; a copy may be %s s out of date",
                self._max_staleness / 1000,
            )
        self._announced, self._warned = False, True
        self._listeners.interrupted()

    def resumed(self) -> None:
        """See `StorageListener.resumed`."""
        self.clear()
        if self._warned:
            _log.warning("changes of sessions are announced again")
        self._announced, self._warned = True, False
        self._listeners.resumed()

    def _drop(self, digest: str, revision: str) -> None:
        for pending in self._pending.get(digest, ()):
            pending.noted.add(revision)
        found = self._copies.get(digest)
        if found is None or revision == DELETED or found.revision != revision:
            self.drop(digest)

    def _is_fresh(self, copy: Copy) -> bool:
        return copy.period == self._period and self.now() - copy.read_at < self._max_staleness

    def _distrust(self) -> None:
        """Let no load or write that has begun leave a copy."""
        for each in self._pending.values():
            for pending in each:
                pending.noted.add(DELETED)


_in_this_process: WeakSet[Copies] = WeakSet()


def _forked() -> None:
    for copies in tuple(_in_this_process):
        copies.clear()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_forked)
