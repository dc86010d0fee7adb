"""A storage that keeps every promise, in small steps. Broken storages override one of the steps.

It is also close to the smallest storage that passes the contract.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from aiosessions import (
    Clock,
    Codec,
    Session,
    SessionConflict,
    SessionExists,
    SessionNotFound,
    Storage,
    StorageClosed,
    StorageUnavailable,
    When,
)
from aiosessions.record import seal, unseal
from aiosessions.session import as_utc, check_id, epoch_milliseconds


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
