"""Storages for tests of their users: a reference, and one that can be intercepted."""

import builtins
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import msgspec
import pytest

from aiosessions import (
    Clock,
    Codec,
    IndexedStorage,
    JsonCodec,
    LocalStorage,
    Session,
    SessionConflict,
    SessionExists,
    SessionInfo,
    SessionManager,
    SessionNotFound,
    Storage,
    StorageClosed,
    StorageUnavailable,
    When,
)
from aiosessions.record import seal, unseal
from aiosessions.session import as_utc, check_id, epoch_milliseconds, revised
from aiosessions.testing import FakeClock


@dataclass
class Entry:
    """A session in the backend. Times are in milliseconds."""

    record: bytes
    revision: str
    deadline: int
    used_at: int


@dataclass
class Backend:
    """A database that several storages share, and that can be down."""

    entries: dict[str, Entry] = field(default_factory=dict)
    is_down: bool = False

    def table(self) -> dict[str, Entry]:
        """Return every stored entry."""
        if self.is_down:
            raise ConnectionRefusedError("connection refused")
        return self.entries


class ReferenceStorage(Storage[Any]):
    """A correct storage over a backend that several storages share."""

    def __init__(self, backend: Backend, ttl: float, codec: Codec[Any], clock: Clock) -> None:
        self.backend = backend
        self.ttl = round(ttl * 1000)
        self.codec = codec
        self.clock = clock
        self.is_closed = False

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        """Check the session and the condition, then write, without yielding."""
        self.check_open()
        revision, deadline, record = self.seal(session)
        self.check(session, when)
        self.write(session.id, Entry(record, revision, deadline, self.now()), when)
        session.revision = revision

    async def load(self, id: str) -> Session[Any]:
        """Find, decode, renew."""
        self.check_open()
        self.check_id(id)
        entry = self.find(id)
        if entry is None:
            raise SessionNotFound
        session = self.unseal(entry, id)
        self.renew(entry)
        return session

    async def delete(self, id: str) -> bool:
        """Remove a session, expired or not, and return whether it was live."""
        self.check_open()
        self.check_id(id)
        existed = self.find(id) is not None
        self.table().pop(self.key(id), None)
        return existed

    async def delete_expired(self, before: datetime | None = None) -> int:
        """Remove the expired sessions, or those unused since `before`."""
        self.check_open()
        swept = [key for key, entry in self.table().items() if self.is_swept(entry, before)]
        for key in swept:
            del self.table()[key]
        return len(swept)

    async def aclose(self) -> None:
        """Close."""
        self.is_closed = True

    def check_open(self) -> None:
        """Raise if the storage is closed."""
        if self.is_closed:
            raise StorageClosed

    def check_id(self, id: str) -> None:
        """Raise if the string cannot be an id."""
        check_id(id)

    def table(self) -> dict[str, Entry]:
        """Return every stored entry, if the backend answers."""
        try:
            return self.backend.table()
        except ConnectionRefusedError as error:
            raise StorageUnavailable from error

    def key(self, id: str) -> str:
        """Return the key of a session in the table."""
        return id

    def now(self) -> int:
        """Return the milliseconds of the monotonic clock."""
        return round(self.clock.monotonic() * 1000)

    def time(self) -> int:
        """Return the milliseconds since the epoch."""
        return round(self.clock.time() * 1000)

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        """Return a fresh revision, the deadline and the record of a session."""
        return seal(session, self.codec)

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        """Return the session of an entry, if it has this id."""
        return unseal(entry.record, id, self.codec, now=lambda: 0)

    def find(self, id: str) -> Entry | None:
        """Return the entry of a live session."""
        entry = self.table().get(self.key(id))
        return None if entry is None or self.is_expired(entry) else entry

    def is_expired(self, entry: Entry) -> bool:
        """Return whether a session is idle or past its deadline."""
        return self.is_idle(entry) or self.is_past(entry)

    def is_idle(self, entry: Entry) -> bool:
        """Return whether a session has been unused for its TTL."""
        return entry.used_at + self.ttl <= self.now()

    def is_past(self, entry: Entry) -> bool:
        """Return whether a session has reached its deadline."""
        return entry.deadline <= self.time()

    def is_swept(self, entry: Entry, before: datetime | None) -> bool:
        """Return whether a sweep removes an entry."""
        if before is None:
            return self.is_expired(entry)
        age = self.time() - epoch_milliseconds(as_utc(before, "before"))
        return entry.used_at < self.now() - age

    def check(self, session: Session[Any], when: When) -> None:
        """Raise if the condition of a write does not hold."""
        entry = self.find(session.id)
        if when is When.ABSENT and entry:
            raise SessionExists
        if when in (When.PRESENT, When.UNCHANGED) and not entry:
            raise SessionNotFound
        if when is When.UNCHANGED and entry and entry.revision != session.revision:
            raise SessionConflict

    def write(self, id: str, entry: Entry, when: When) -> None:  # noqa: ARG002 - for broken ones
        """Put an entry into the table, or remove the one there if this one is past its deadline."""
        if self.is_past(entry):
            self.table().pop(self.key(id), None)
        else:
            self.table()[self.key(id)] = entry

    def renew(self, entry: Entry) -> None:
        """Start a full TTL."""
        entry.used_at = self.now()


T = TypeVar("T")
Intercept = Callable[[int, str], Awaitable[None]]


class InterceptedStorage(Storage[Any]):
    """Passes each verb on to `inner`, and calls a function before and after it.

    The function gets the number of the point and its name: 0 is before the first verb, 1 after it,
    2 before the second one. An exception that the function raises leaves the verb. After a verb,
    that is a lost reply: it also replaces an error of the verb.

    Attributes:
        calls: The verbs so far, such as "load" and "store absent".
        codec: The codec of `inner`, as storages of this package publish it.
    """

    def __init__(self, inner: LocalStorage[Any]) -> None:
        self.inner = inner
        self.codec: Codec[Any] | None = inner.codec
        self.calls: list[str] = []
        self._intercept: Intercept | None = None
        self._points = 0

    def intercept(self, function: Intercept | None = None) -> None:
        """Call another function from now on, and start both counts again."""
        self.calls.clear()
        self._points = 0
        self._intercept = function

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        """Pass a store on. A lost reply leaves the session unchanged, as with a real server."""
        stored = revised(session)
        await self._call(
            f"store {when.value}", functools.partial(self.inner.store, stored, when=when)
        )
        session.revision = stored.revision

    async def load(self, id: str) -> Session[Any]:
        """Pass a load on."""
        return await self._call("load", functools.partial(self.inner.load, id))

    async def delete(self, id: str) -> bool:
        """Pass a delete on."""
        return await self._call("delete", functools.partial(self.inner.delete, id))

    async def delete_expired(self, before: datetime | None = None) -> int:
        """Pass a sweep on."""
        return await self._call(
            "delete_expired", functools.partial(self.inner.delete_expired, before)
        )

    async def aclose(self) -> None:
        """Close without interception."""
        self.calls.append("aclose")
        await self.inner.aclose()

    async def _call(self, name: str, verb: Callable[[], Awaitable[T]]) -> T:
        self.calls.append(name)
        await self._point(f"before {name}")
        try:
            return await verb()
        finally:
            await self._point(f"after {name}")

    async def _point(self, name: str) -> None:
        number = self._points
        self._points += 1
        if self._intercept is not None:
            await self._intercept(number, name)


class InterceptedIndexedStorage(InterceptedStorage, IndexedStorage[Any]):
    """As `InterceptedStorage`, with the index of `inner`."""

    async def list(self, principal: str) -> builtins.list[SessionInfo[Any]]:
        """Pass a list on."""
        return await self._call("list", functools.partial(self.inner.list, principal))

    async def count(self, principal: str) -> int:
        """Pass a count on."""
        return await self._call("count", functools.partial(self.inner.count, principal))

    async def revoke(self, principal: str, digest: str) -> bool:
        """Pass a revocation on."""
        return await self._call("revoke", functools.partial(self.inner.revoke, principal, digest))

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        """Pass a sign-out on."""
        verb = functools.partial(self.inner.revoke_all, principal, keep=keep)
        return await self._call("revoke_all", verb)

    async def trim(self, principal: str, most: int, *, keep: str) -> int:
        """Pass the enforcement of a limit on."""
        verb = functools.partial(self.inner.trim, principal, most, keep=keep)
        return await self._call("trim", verb)


# The points of a rotation: load, store absent, store unchanged; and store unchanged once more
# without grace.
every_point = pytest.mark.parametrize("point", range(9))
every_grace = pytest.mark.parametrize("grace", [10, 0])
LAST_POINT = {10: 5, 0: 7}


class Replicas:
    """Two replicas of a service: managers over one storage, on a clock that stands still.

    Attributes:
        clock: The clock of all.
        storage: The intercepted storage.
        sessions: The manager of the first replica, over `storage`.
        rival: The manager of the second replica. Its calls are not intercepted.
    """

    storage_type: type[InterceptedStorage] = InterceptedStorage

    def __init__(
        self, *, ttl: float = 600, codec: Codec[Any] | None = None, **options: Any
    ) -> None:
        self.clock = FakeClock()
        inner = LocalStorage[Any](ttl=ttl, clock=self.clock, codec=codec or JsonCodec())
        self.storage = self.storage_type(inner)
        self.sessions = SessionManager[Any](self.storage, clock=self.clock, **options)
        self.rival = SessionManager[Any](inner, clock=self.clock, **options)

    async def lives(self, id: str) -> bool:
        """Whether there is a session under this id."""
        try:
            await self.rival.get(id)
        except SessionNotFound:
            return False
        return True

    async def writable(self, id: str) -> bool:
        """Whether there is a session under this id that accepts writes."""
        try:
            await self.rival.mutate(id, lambda _: None)
        except (SessionNotFound, SessionConflict):
            return False
        return True

    async def count(self) -> int:
        """The number of sessions in the storage, under any id."""
        await self.storage.inner.delete_expired()
        return self.storage.inner.statistics().sessions


class IndexedReplicas(Replicas):
    """Replicas whose storage finds the sessions of a principal."""

    storage_type = InterceptedIndexedStorage


def fields(session: Session[Any]) -> dict[str, Any]:
    """A copy of the fields of a session, to compare it with a later state."""
    return msgspec.structs.asdict(session) | {"metadata": dict(session.metadata)}


def unavailable_at(*points: int, in_doubt: bool = False) -> Intercept:
    """The storage cannot be reached at these points, or at every point if none is given."""

    async def intercept(point: int, _: str) -> None:
        if not points or point in points:
            raise StorageUnavailable("the server did not answer in time", in_doubt=in_doubt)

    return intercept
