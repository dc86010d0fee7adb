"""Copies of sessions in this process, in front of a storage: a hit makes no remote call.

Invariants:

- A hot session is read again at least once per `max_staleness`, which is at most half a TTL. So
  hits never let the shared record expire.
- Writes go to the storage first. A write that fails, or is cancelled, may have been applied, so it
  drops the copy.
- A write has the state of the caller's object at its start, in the storage and in the copy.
- Callers get independent copies: the cache keeps encoded payloads.
"""

import builtins
import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any, Generic, Self

import anyio

from ._copies import DELETED, CacheStatistics, Copies, Copy, Pending
from ._loads import Loads
from .codec import Codec
from .errors import (
    SessionConflict,
    SessionError,
    SessionNotFound,
    StorageClosed,
    StorageUnavailable,
)
from .record import NO_DEADLINE, encode
from .session import D, Session, SessionInfo, session_digest
from .storage import (
    AnnouncingStorage,
    Clock,
    IndexedStorage,
    Storage,
    StorageListener,
    When,
    check_codec,
    check_count,
    check_digest,
    check_storage,
    milliseconds,
)

__all__ = ["CacheStatistics", "NearCache"]
_MAX_BYTES = 64 * 1024 * 1024


class NearCache(Storage[D], Generic[D]):
    """A storage that answers repeated loads from the memory of this process.

    Other replicas may change a session at any time. Over a storage that announces changes, such as
    `RedisStorage`, a copy ends when the announcement arrives. Without announcements, and while they
    are interrupted, a load may return a session as it was up to `max_staleness` ago. A save of such
    a copy is a `SessionConflict`, and the next load is fresh. A hit renews no TTL, so after its
    last use a session lives for at least a TTL less `max_staleness`.

    Owns the storage: `aclose` closes both. Runs wherever the storage does. A hit does not yield to
    the event loop. Over an `IndexedStorage`, the cache is one, too.

    Args:
        storage: The storage. It has the attributes `codec` and `ttl`.
        max_staleness: The longest age of a copy that a load returns; at most half the TTL of the
            storage. As for all durations: seconds or a timedelta.
        max_sessions: The most sessions to keep. The least recently used goes first.
        max_bytes: The most bytes that all encoded sessions together may have.
        serve_stale_for: How long after `max_staleness` a load may still return a copy if the
            storage raises `StorageUnavailable`; never past `expires_at`. None: not at all.
        clock: The source of time.

    Raises:
        ValueError: A duration or limit is not positive, or `max_staleness` exceeds half the TTL.
        TypeError: An argument has the wrong type, or the storage has no `codec` or `ttl`, or is a
            `NearCache`.
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """Make an `IndexedNearCache` over an `IndexedStorage`."""
        # `Self`: with `NearCache[D]`, pyright takes D to be Any, as no argument here tells it.
        storage = arguments[0] if arguments else options.get("storage")
        indexed = cls is NearCache and isinstance(storage, IndexedStorage)
        kind: Any = IndexedNearCache if indexed else cls
        made: Self = object.__new__(kind)
        return made

    def __init__(
        self,
        storage: Storage[D],
        *,
        max_staleness: float | timedelta,
        max_sessions: int = 10_000,
        max_bytes: int = _MAX_BYTES,
        serve_stale_for: float | timedelta | None = None,
        clock: Clock = time,
    ) -> None:
        check_storage(storage)
        check_count(max_sessions, "max_sessions")
        check_count(max_bytes, "max_bytes")
        self._storage = storage
        self._codec, self._ttl = _attributes(storage)
        self._max_staleness = milliseconds(max_staleness, "max_staleness")
        if 2 * self._max_staleness > self._ttl:
            raise ValueError(
                f"max_staleness is at most half the TTL of the storage, {self.ttl} s, not "
                f"{self.max_staleness} s: a hit renews no TTL, so a session in use could expire"
            )
        stale_for = 0
        if serve_stale_for is not None:
            stale_for = milliseconds(serve_stale_for, "serve_stale_for")
        self._serves_stale = stale_for > 0
        self._copies = Copies(
            max_staleness=self._max_staleness,
            stale_for=stale_for,
            clock=clock,
            max_entries=max_sessions,
            max_bytes=max_bytes,
        )
        self._decode = self._codec.decode
        self._loads = Loads(storage.load, self._copy_of, self._copies, self._max_staleness)
        self._closed = False
        self._stop_listening: Callable[[], None] | None = None
        if isinstance(storage, AnnouncingStorage):
            self._stop_listening = storage.listen(self._copies)

    def __repr__(self) -> str:
        return f"NearCache({self._storage!r}, max_staleness={self.max_staleness})"

    @property
    def storage(self) -> Storage[D]:
        """The storage."""
        return self._storage

    @property
    def codec(self) -> Codec[D]:
        """The codec of the storage."""
        return self._codec

    @property
    def ttl(self) -> float:
        """The TTL of the storage, in seconds."""
        return self._ttl / 1000

    @property
    def max_staleness(self) -> float:
        """The longest age of a copy that a load returns, in seconds."""
        return self._max_staleness / 1000

    def statistics(self) -> CacheStatistics:
        """Count copies, hits and misses."""
        return self._copies.statistics()

    def listen(self, listener: StorageListener) -> Callable[[], None]:
        """See `AnnouncingStorage.listen`. A listener hears of a change after the cache does.

        While the storage does not announce changes, it hears only of those through this cache.
        """
        return self._copies.listen(listener)

    async def store(self, session: Session[D], *, when: When = When.ALWAYS) -> None:
        """See `Storage.store`."""
        self._check_open()
        if not isinstance(session, Session):
            raise TypeError(f"a session is a Session, not {type(session).__name__}")
        id, digest, copy, written = session.id, session.digest, None, session
        with suppress(SessionError):  # the storage raises the same
            copy = self._copy_of(session)
            written = self._decoded(copy, id) or session
        with self._writing(digest, session.revision) as write:
            await self._storage.store(written, when=when)
            session.revision = written.revision
            self._copies.note(digest, session.revision)
            if copy is not None and written is not session:
                copy.revision = session.revision
                self._copies.keep(copy, write)

    async def load(self, id: str) -> Session[D]:
        """See `Storage.load`.

        Raises:
            StorageUnavailable: The storage cannot be reached, and there is no copy that is young
                enough.
        """
        try:
            found = self._copies.get(id)
        except TypeError:  # no string, which `_miss` refuses
            found = None
        if found is not None:
            session = self._decoded(found, id)
            if session is not None:
                self._copies.hits += 1
                return session
        return await self._miss(id)

    async def delete(self, id: str) -> bool:
        """See `Storage.delete`."""
        self._check_open()
        digest = session_digest(id)
        with self._writing(digest):
            existed = await self._storage.delete(id)
            self._copies.note(digest, DELETED)
        return existed

    async def delete_expired(self, before: datetime | None = None) -> int:
        """See `Storage.delete_expired`."""
        self._check_open()
        try:
            return await self._storage.delete_expired(before)
        finally:
            if before is not None:  # else they are older than any fresh copy
                self._copies.clear()

    async def aclose(self) -> None:
        """See `Storage.aclose`. Closes the storage, too."""
        self._closed = True
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        self._copies.clear()
        tasks = self._loads.cancel()
        try:
            with anyio.CancelScope(shield=True):
                for task in tasks:
                    await task.wait()
        finally:  # `asyncio.Task.cancel` passes the shield
            await self._storage.aclose()

    async def _miss(self, id: str) -> Session[D]:
        """Load a session from the storage, or wait for a load that has begun already."""
        self._check_open()
        load = self._loads.join(id, session_digest(id))
        await load.task.wait()
        self._check_open()
        found = load.copy
        if found is None and self._serves_stale and isinstance(load.error, StorageUnavailable):
            found = self._copies.get_stale(id)
        if found is not None:
            if self._copies.is_over(found):  # by this clock; the storage has the right one
                return await self._storage.load(id)
            session = self._decoded(found, id)
            if session is not None:
                return session
        if load.session is not None:
            return copy.deepcopy(load.session)
        raise load.error_of_caller()

    def _copy_of(self, session: Session[D]) -> Copy:
        payload, deadline = encode(session, self._codec)
        end = math.inf if deadline == NO_DEADLINE else deadline
        return Copy(payload, session, end)

    def _decoded(self, found: Copy, id: str) -> Session[D] | None:
        """A session from a copy; None if the codec cannot read its own payload."""
        try:
            session = self._decode(found.payload)
        except Exception:  # noqa: BLE001 - codecs of applications raise anything
            return None
        if session.id != found.digest:
            return None
        session.id = id
        session.revision = found.revision
        return session

    @contextmanager
    def _writing(self, digest: str, revision: str = DELETED) -> Iterator[Pending]:
        """Begin a write over a revision, or a delete, and drop the copy if it fails."""
        write = self._copies.begin(digest)
        try:
            yield write
        except BaseException as error:
            refused = isinstance(error, SessionConflict | SessionNotFound)
            self._copies.doubt(digest, refused=revision if refused else DELETED)
            raise
        finally:
            self._copies.end(digest, write)

    def _check_open(self) -> None:
        if self._closed:
            raise StorageClosed("the storage is closed")


class IndexedNearCache(NearCache[D], IndexedStorage[D], Generic[D]):
    """A `NearCache` over a storage that finds the sessions of a principal."""

    _storage: IndexedStorage[D]

    async def list(self, principal: str) -> builtins.list[SessionInfo[D]]:
        """See `IndexedStorage.list`. Asks the storage each time."""
        self._check_open()
        return await self._storage.list(principal)

    async def count(self, principal: str) -> int:
        """See `IndexedStorage.count`. Asks the storage each time."""
        self._check_open()
        return await self._storage.count(principal)

    async def revoke(self, principal: str, digest: str) -> bool:
        """See `IndexedStorage.revoke`."""
        self._check_open()
        check_digest(digest)
        with self._writing(digest):
            existed = await self._storage.revoke(principal, digest)
            if existed:
                self._copies.note(digest, DELETED)
            else:  # the copy may belong to the principal
                self._copies.doubt(digest)
        return existed

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        """See `IndexedStorage.revoke_all`."""
        self._check_open()
        try:
            revoked = await self._storage.revoke_all(principal, keep=keep)
        except BaseException:
            self._copies.forget(principal, keep)
            raise
        for digest in self._copies.forget(principal, keep):
            self._copies.note(digest, DELETED)
        self._copies.distrust_owners()
        return revoked

    async def trim(self, principal: str, most: int, *, keep: str) -> int:
        """See `IndexedStorage.trim`."""
        self._check_open()
        trimmed = 1
        try:
            trimmed = await self._storage.trim(principal, most, keep=keep)
        finally:
            if trimmed:  # hardly ever
                self._copies.forget(principal, keep)
        return trimmed


def _attributes(storage: Storage[D]) -> tuple[Codec[D], int]:
    """The codec of a storage, and its TTL in milliseconds.

    Raises:
        TypeError: It has no such attributes, or is a cache.
    """
    if isinstance(storage, NearCache):
        raise TypeError("a NearCache over another one would add up their staleness; use one")
    codec, ttl = getattr(storage, "codec", None), getattr(storage, "ttl", None)
    if codec is None or ttl is None:
        name = type(storage).__name__
        message = f"a storage under a NearCache has the attributes codec and ttl; {name} has not"
        raise TypeError(message)
    check_codec(codec)
    return codec, milliseconds(ttl, "ttl")
