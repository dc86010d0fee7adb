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
import math
import os
from collections.abc import Callable
from functools import partial
from itertools import islice
from weakref import WeakSet

import msgspec

from ._table import Table
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
        digest: Its digest.
        revision: Its revision.
        principal: Its owner.
        deadline: Its deadline, in milliseconds since the epoch.
    """

    __slots__ = "deadline", "digest", "payload", "principal", "revision"

    def __init__(
        self,
        payload: bytes,
        digest: str,
        revision: str,
        principal: str | None,
        deadline: float = math.inf,
    ) -> None:
        self.payload = payload
        self.digest = digest
        self.revision = revision
        self.principal = principal
        self.deadline = deadline

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
        def table(ttl: int) -> Table[Copy]:
            return Table(ttl=ttl, clock=clock, max_entries=max_entries, max_bytes=max_bytes)

        self._max_staleness = max_staleness
        self._clock = clock
        self._fresh = table(max_staleness)
        self._stale = table(max_staleness + stale_for) if stale_for else self._fresh
        self._pending: dict[str, list[Pending]] = {}  # by digest
        self._listeners: list[StorageListener] = []
        self._announced = self._warned = False
        self._stale_served = self._stale_dropped = self._invalidations = 0
        self.hits = self.misses = self.coalesced = 0
        _in_this_process.add(self)

    def statistics(self) -> CacheStatistics:
        """Count copies, hits and misses."""
        return CacheStatistics(
            sessions=len(self._stale),
            bytes=self._stale.bytes,
            announced=self._announced,
            hits=self.hits,
            misses=self.misses,
            coalesced=self.coalesced,
            stale_served=self._stale_served,
            stale_dropped=self._stale_dropped,
            evictions=self._stale.evictions,
            invalidations=self._invalidations,
        )

    def get(self, id: str) -> Copy | None:
        """The copy that a load may return."""
        return self._fresh.promote(id)

    def get_stale(self, id: str) -> Copy | None:
        """The copy that a load may return in an outage."""
        found = self._stale.get(id)
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

    def keep(self, id: str, copy: Copy, pending: Pending) -> None:
        """Keep the result of a load or a write, if nothing else was noted since it began."""
        if DELETED not in pending.noted and pending.noted <= {copy.revision}:
            age = self.now() - pending.began
            for table in self._tables():
                table.put(id, copy, copy.deadline, copy.digest, age)
                for _ in islice(table.sweep(), _SWEPT):
                    pass

    def drop(self, id: str) -> None:
        """Drop one copy."""
        for table in self._tables():
            table.remove(id)

    # Changes.

    def note(self, digest: str, revision: str) -> None:
        """Drop the copy of a session that this cache has changed, unless it has this revision."""
        self._drop(digest, revision)
        if not self._announced:  # else the storage tells
            self._tell(digest, revision)

    def doubt(self, digest: str, *, met_newer_state: bool = False) -> None:
        """Drop the copy of a session that may have changed.

        Args:
            digest: The digest of its id.
            met_newer_state: Whether a write over the copy was refused.
        """
        if met_newer_state:
            self._stale_dropped += len(self._fresh.group(digest))
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
        copies = [(id, copy) for id, copy in self._stale.items() if copy.principal == principal]
        for id, _ in copies:
            if id != keep:
                self.drop(id)
        return [copy.digest for id, copy in copies if id != keep]

    def clear(self) -> None:
        """Drop every copy, because any session may have changed."""
        self._distrust()
        for table in self._tables():
            table.clear()

    def listen(self, listener: StorageListener) -> Callable[[], None]:
        """See `AnnouncingStorage.listen`. The copies hear of a change first."""
        self._listeners.append(listener)
        (listener.resumed if self._announced else listener.interrupted)()
        return partial(self._listeners.remove, listener)

    def changed(self, digest: str, revision: str) -> None:
        """See `StorageListener.changed`."""
        self._invalidations += 1
        self._drop(digest, revision)
        self._tell(digest, revision)

    def interrupted(self) -> None:
        """See `StorageListener.interrupted`. Keeps copies only for an outage."""
        self._distrust()
        self._fresh.clear()
        if not self._warned:
            _log.warning(
                "changes of sessions are not announced at present; a copy may be %s s out of date",
                self._max_staleness / 1000,
            )
        self._announced, self._warned = False, True
        for listener in tuple(self._listeners):
            listener.interrupted()

    def resumed(self) -> None:
        """See `StorageListener.resumed`."""
        self.clear()
        if self._warned:
            _log.warning("changes of sessions are announced again")
        self._announced, self._warned = True, False
        for listener in tuple(self._listeners):
            listener.resumed()

    def _drop(self, digest: str, revision: str) -> None:
        for pending in self._pending.get(digest, ()):
            pending.noted.add(revision)
        for table in self._tables():
            for id, copy in table.members(digest):
                if revision == DELETED or copy.revision != revision:
                    table.remove(id)

    def _tell(self, digest: str, revision: str) -> None:
        for listener in tuple(self._listeners):
            listener.changed(digest, revision)

    def _distrust(self) -> None:
        """Let no load or write that has begun leave a copy."""
        for each in self._pending.values():
            for pending in each:
                pending.noted.add(DELETED)

    def _tables(self) -> tuple[Table[Copy], ...]:
        return (self._fresh,) if self._stale is self._fresh else (self._fresh, self._stale)


_in_this_process: WeakSet[Copies] = WeakSet()


def _forked() -> None:
    for copies in tuple(_in_this_process):
        copies.clear()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_forked)
