"""A storage that keeps every promise, in small steps, for others to get one of them wrong.

It is also about the least that a storage of somebody else's can be.
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
    """A session in the backend."""

    record: bytes
    revision: str
    deadline: int
    used_at: int


@dataclass
class Backend:
    """What storages share: a database that can be down."""

    entries: dict[str, Entry] = field(default_factory=dict)
    is_down: bool = False

    def table(self) -> dict[str, Entry]:
        """All that is stored."""
        if self.is_down:
            message = "connection refused"
            raise ConnectionRefusedError(message)
        return self.entries


class HonestStorage(Storage[Any]):
    """A storage without faults, over a backend that several storages share."""

    def __init__(self, backend: Backend, ttl: float, codec: Codec[Any], clock: Clock) -> None:
        self.backend = backend
        self.ttl = round(ttl * 1000)
        self.codec = codec
        self.clock = clock
        self.is_closed = False

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        """Check everything, then write, with nothing in between."""
        self.check_open()
        revision, deadline, record = self.seal(session)
        self.check(session, when)
        self.write(session.id, Entry(record, revision, deadline, self.now()))
        session.revision = revision

    async def load(self, id: str) -> Session[Any]:
        """Find, renew, decode."""
        self.check_open()
        self.check_id(id)
        entry = self.find(id)
        if entry is None:
            raise SessionNotFound
        self.renew(entry)
        return self.unseal(entry, id)

    async def delete(self, id: str) -> bool:
        """Remove, dead or alive; say whether it was alive."""
        self.check_open()
        self.check_id(id)
        existed = self.find(id) is not None
        self.table().pop(self.key(id), None)
        return existed

    async def delete_expired(self, before: datetime | None = None) -> int:
        """Remove what is dead, or was not used since."""
        self.check_open()
        swept = [key for key, entry in self.table().items() if self.is_swept(entry, before)]
        for key in swept:
            del self.table()[key]
        return len(swept)

    async def aclose(self) -> None:
        """Close."""
        self.is_closed = True

    def check_open(self) -> None:
        """Refuse to work when closed."""
        if self.is_closed:
            raise StorageClosed

    def check_id(self, id: str) -> None:
        """Refuse to look for what cannot be an id."""
        check_id(id)

    def table(self) -> dict[str, Entry]:
        """All that is stored, if the backend answers."""
        try:
            return self.backend.table()
        except ConnectionRefusedError as error:
            raise StorageUnavailable from error

    def key(self, id: str) -> str:
        """What a session is found by in the table."""
        return id

    def now(self) -> int:
        """Milliseconds on the clock that never steps."""
        return round(self.clock.monotonic() * 1000)

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        """A fresh revision, the deadline and the record of a session that can be stored."""
        return seal(session, self.codec)

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        """The session, if it is the one that was asked for."""
        return unseal(entry.record, id, self.codec, now=lambda: 0)

    def find(self, id: str) -> Entry | None:
        """The entry of a session that can be loaded."""
        entry = self.table().get(self.key(id))
        return None if entry is None or self.is_dead(entry) else entry

    def is_dead(self, entry: Entry) -> bool:
        """Whether a session has ended, one way or the other."""
        return self.is_idle(entry) or self.is_past(entry)

    def is_idle(self, entry: Entry) -> bool:
        """Whether it was not used for a TTL."""
        return entry.used_at + self.ttl <= self.now()

    def is_past(self, entry: Entry) -> bool:
        """Whether it has reached its deadline."""
        return entry.deadline <= round(self.clock.time() * 1000)

    def is_swept(self, entry: Entry, before: datetime | None) -> bool:
        """Whether a sweep removes it."""
        if before is None:
            return self.is_dead(entry)
        age = round(self.clock.time() * 1000) - epoch_milliseconds(as_utc(before, "before"))
        return entry.used_at < self.now() - age

    def check(self, session: Session[Any], when: When) -> None:
        """Refuse to write where the condition does not hold."""
        entry = self.find(session.id)
        if when is When.ABSENT and entry:
            raise SessionExists
        if when in (When.PRESENT, When.UNCHANGED) and not entry:
            raise SessionNotFound
        if when is When.UNCHANGED and entry and entry.revision != session.revision:
            raise SessionConflict

    def write(self, id: str, entry: Entry) -> None:
        """Put an entry into the table."""
        self.table()[self.key(id)] = entry

    def renew(self, entry: Entry) -> None:
        """Start a TTL."""
        entry.used_at = self.now()
