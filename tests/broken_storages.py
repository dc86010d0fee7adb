"""Storages that are broken on purpose: each gets one step of `HonestStorage` wrong.

test_broken_storages.py says what the contract has to find in each of them.
"""

import asyncio
import fnmatch
import hashlib
import logging
import socket
from collections import deque
from contextlib import suppress
from datetime import datetime
from typing import Any, ClassVar

import msgspec
from anyio.lowlevel import checkpoint

from aiosessions import (
    CorruptSession,
    InvalidSession,
    JsonCodec,
    Session,
    SessionExists,
    SessionNotFound,
    StorageUnavailable,
    When,
)
from aiosessions.record import HEADER_BYTES, NO_DEADLINE, revision_of, seal, unseal
from tests.honest_storage import Entry, HonestStorage


class LoadDoesNotRenew(HonestStorage):
    """Sliding expiry that does not slide."""

    def renew(self, entry: Entry) -> None:
        """Forgotten."""


class LoadRenewsPastTheDeadline(HonestStorage):
    """As with a backend that knows one expiry only, and no deadline in the record."""

    def renew(self, entry: Entry) -> None:
        super().renew(entry)
        if entry.deadline != NO_DEADLINE:
            entry.deadline = max(entry.deadline, round(self.clock.time() * 1000) + self.ttl)


class StoreKeepsTheAge(HonestStorage):
    """As with a SET that keeps the TTL."""

    def write(self, id: str, entry: Entry) -> None:
        old = self.find(id)
        if old:
            entry.used_at = old.used_at
        super().write(id, entry)


class RefusedWritesRenew(HonestStorage):
    """Checks a condition with the very GETEX that loads."""

    def check(self, session: Session[Any], when: When) -> None:
        entry = self.find(session.id)
        if entry:
            self.renew(entry)
        super().check(session, when)


class CountsInSeconds(HonestStorage):
    """Loses what is below a second."""

    def now(self) -> int:
        return super().now() // 1000 * 1000


class EndsTooLate(HonestStorage):
    """Off by one millisecond: still there at exactly its TTL."""

    def is_idle(self, entry: Entry) -> bool:
        return entry.used_at + self.ttl < self.now()


class GuessesTimeZones(HonestStorage):
    """Takes a naive moment for one in UTC."""

    async def delete_expired(self, before: datetime | None = None) -> int:
        with suppress(InvalidSession):
            return await super().delete_expired(before)
        return 0


class HandsOutOneObject(HonestStorage):
    """Caches decoded sessions, and hands them out."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.decoded: dict[str, Session[Any]] = {}

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        return self.decoded.setdefault(entry.revision, super().unseal(entry, id))


class KeepsTheCallersObject(HonestStorage):
    """Stores a reference; the bytes are made when it is loaded."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.references: dict[str, Session[Any]] = {}

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(session, when=when)
        self.references[session.revision] = session

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        session = self.references.get(entry.revision)
        if session is not None and isinstance(self.codec, JsonCodec):
            _, _, record = self.seal(session)
            entry.record = entry.record[:HEADER_BYTES] + record[HEADER_BYTES:]
        return super().unseal(entry, id)


class PresentResurrects(HonestStorage):
    """An update that inserts."""

    def check(self, session: Session[Any], when: When) -> None:
        super().check(session, When.ALWAYS if when is When.PRESENT else when)


class AbsentOverwrites(HonestStorage):
    """An insert that updates."""

    def check(self, session: Session[Any], when: When) -> None:
        super().check(session, When.ALWAYS if when is When.ABSENT else when)


class AbsentCollidesWithTheDead(HonestStorage):
    """An insert that trips over a row nobody can load."""

    def check(self, session: Session[Any], when: When) -> None:
        if when is When.ABSENT and session.id in self.table():
            raise SessionExists
        super().check(session, when)


class UnchangedIgnoresTheRevision(HonestStorage):
    """The last writer wins, in silence."""

    def check(self, session: Session[Any], when: When) -> None:
        super().check(session, When.PRESENT if when is When.UNCHANGED else when)


class ChecksThenWrites(HonestStorage):
    """Lets others run between the check and the write."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        self.check_open()
        self.seal(session)
        self.check(session, when)
        await checkpoint()
        await super().store(session)


class RevisionIsAHash(HonestStorage):
    """Equal content has equal revisions."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        revision, deadline, record = super().seal(session)
        revision = hashlib.sha256(record[17:]).hexdigest()[:16]
        return revision, deadline, record[:1] + revision.encode() + record[17:]


class RevisionStaysInTheStorage(HonestStorage):
    """Not stamped on the caller's object."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(msgspec.structs.replace(session), when=when)


class StampsTheDate(HonestStorage):
    """Changes more than the revision of the caller's object."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(session, when=when)
        session.updated_at = datetime.fromtimestamp(self.clock.time(), tz=session.updated_at.tzinfo)


class StampsBeforeItChecks(HonestStorage):
    """The caller's object is changed, and then there is an error."""

    def check(self, session: Session[Any], when: When) -> None:
        expected = msgspec.structs.replace(session)
        session.revision = "stamped"
        super().check(expected, when)


class DeleteIsAlwaysTrue(HonestStorage):
    """Does not say whether there was one."""

    async def delete(self, id: str) -> bool:
        await super().delete(id)
        return True


class DeleteLooksFirst(HonestStorage):
    """Lets others run between looking and deleting."""

    async def delete(self, id: str) -> bool:
        self.check_open()
        existed = self.find(id) is not None
        await checkpoint()
        await super().delete(id)
        return existed


class TrustsWhatItFinds(HonestStorage):
    """Returns another session's record."""

    def unseal(self, entry: Entry, id: str) -> Session[Any]:  # noqa: ARG002 - that is the fault
        session = self.codec.decode(entry.record[HEADER_BYTES:])
        session.revision = revision_of(entry.record)
        return session


class ForgivesCorruption(HonestStorage):
    """An unreadable session is an empty one."""

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        try:
            return super().unseal(entry, id)
        except CorruptSession:
            return Session(id=id, revision=entry.revision)


class ForgetsCorruption(HonestStorage):
    """An unreadable session is not found."""

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        try:
            return super().unseal(entry, id)
        except CorruptSession:
            raise SessionNotFound from None


class OutageIsNotFound(HonestStorage):
    """Takes "I cannot look" for "there is none"."""

    def table(self) -> dict[str, Entry]:
        try:
            return super().table()
        except StorageUnavailable as error:
            raise SessionNotFound from error


class TellsTheId(HonestStorage):
    """Says which session it did not find."""

    async def load(self, id: str) -> Session[Any]:
        try:
            return await super().load(id)
        except SessionNotFound as error:
            message = f"no session {id}"
            raise SessionNotFound(message) from error


class LogsTheId(HonestStorage):
    """Says which session it looks for."""

    async def load(self, id: str) -> Session[Any]:
        logging.getLogger(__name__).debug("loading %s", id)
        return await super().load(id)


class ShowsEverything(HonestStorage):
    """A repr for debugging."""

    def __repr__(self) -> str:
        return f"ShowsEverything({self.backend!r})"


class NeverCloses(HonestStorage):
    """There is nothing to close, it thinks."""

    async def aclose(self) -> None:
        """Forgotten."""


class ClosesOnce(HonestStorage):
    """Closing a closed storage is an error."""

    async def aclose(self) -> None:
        self.check_open()
        await super().aclose()


class LeavesATaskBehind(HonestStorage):
    """Sweeps in the background, for ever."""

    sweeper: asyncio.Future[None] | None = None

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(session, when=when)
        self.sweeper = self.sweeper or asyncio.ensure_future(asyncio.sleep(3600))


class LeaksItsConnection(HonestStorage):
    """Connects, and does not disconnect."""

    connection: socket.socket

    async def load(self, id: str) -> Session[Any]:
        self.connection = socket.socket()
        return await super().load(id)


class WritesInTwoSteps(HonestStorage):
    """The data, then the revision that belongs to it."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        self.check_open()
        revision, deadline, record = self.seal(session)
        self.check(session, when)
        half = Entry(record[:1] + b"................" + record[17:], revision, deadline, self.now())
        self.write(session.id, half)
        await checkpoint()
        if session.id in self.table():
            half.record = record
        session.revision = revision


class RemembersWhatItLoaded(HonestStorage):
    """A cache that other replicas' writes do not reach."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cache: dict[str, bytes] = {}

    def write(self, id: str, entry: Entry) -> None:
        super().write(id, entry)
        self.cache[id] = entry.record

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        record = self.cache.setdefault(id, entry.record)
        return unseal(record, id, self.codec, now=lambda: 0)


class BorrowsAndCloses(HonestStorage):
    """Takes the backend down with itself."""

    async def aclose(self) -> None:
        await super().aclose()
        self.backend.is_down = True


class EndsWhenSwept(HonestStorage):
    """Sessions live until a sweep finds them."""

    def find(self, id: str) -> Entry | None:
        return self.table().get(id)


class SweepsTheLiving(HonestStorage):
    """A sweep takes everything that is not in use this very moment."""

    def is_swept(self, entry: Entry, before: datetime | None) -> bool:
        return entry.used_at < self.now() or super().is_swept(entry, before)


class SweepMissesDeadlines(HonestStorage):
    """A sweep looks at the TTL only."""

    def is_swept(self, entry: Entry, before: datetime | None) -> bool:
        return super().is_swept(entry, before) and (before is not None or self.is_idle(entry))


class SweepOnlyCounts(HonestStorage):
    """A sweep removes nothing."""

    async def delete_expired(self, before: datetime | None = None) -> int:
        self.check_open()
        return sum(self.is_swept(entry, before) for entry in self.table().values())


class TakesAnyId(HonestStorage):
    """Stores and looks for whatever it is given."""

    def check_id(self, id: str) -> None:
        """Forgotten."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        try:
            return super().seal(session)
        except InvalidSession:
            revision, deadline, record = super().seal(msgspec.structs.replace(session, id="valid"))
            return revision, deadline, record[:HEADER_BYTES] + self.codec.encode(session)


class TakesIdsForPatterns(HonestStorage):
    """As with KEYS instead of GET."""

    def find(self, id: str) -> Entry | None:
        return super().find(id) if fnmatch.fnmatchcase(id, id) else None


class FoldsCase(HonestStorage):
    """As with a database whose collation ignores case."""

    def key(self, id: str) -> str:
        return id.lower()


class DeleteFindsTheDead(HonestStorage):
    """Counts a row that nobody can load."""

    async def delete(self, id: str) -> bool:
        self.check_open()
        self.check_id(id)
        return self.table().pop(id, None) is not None


class DeletesEverything(HonestStorage):
    """As with a statement that lost its WHERE."""

    async def delete(self, id: str) -> bool:
        existed = await super().delete(id)
        self.table().clear()
        return existed


class ReadsBeforeItWrites(HonestStorage):
    """Stumbles over what cannot be read, though nobody asked."""

    def find(self, id: str) -> Entry | None:
        entry = super().find(id)
        if entry:
            self.unseal(entry, id)
        return entry


class RepliesGetOutOfStep(HonestStorage):
    """Whoever waits takes the next reply, also when a caller before has gone away."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.replies: deque[str] = deque()

    async def load(self, id: str) -> Session[Any]:
        self.check_open()
        self.check_id(id)
        self.replies.append(id)
        await checkpoint()
        return await super().load(self.next_reply())

    def next_reply(self) -> str:
        """The oldest one."""
        return self.replies.popleft()


class RepliesComeBackwards(RepliesGetOutOfStep):
    """Whoever waits takes the newest reply."""

    def next_reply(self) -> str:
        return self.replies.pop()


class TakesEmptyForNone(HonestStorage):
    """There is nothing in it, so there is none, it thinks."""

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        session = super().unseal(entry, id)
        if session.data in ("", [], {}):
            session.data = None
        return session


class IgnoresTheCodec(HonestStorage):
    """Uses one of its own."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.codec = JsonCodec()


class HasNoLimits(HonestStorage):
    """Takes data of any size."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        if not isinstance(self.codec, JsonCodec):
            return super().seal(session)
        return seal(session, JsonCodec(max_bytes=1_000_000_000))


class Merges(HonestStorage):
    """A write adds to what is there."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        entry = self.find(session.id)
        if entry:
            with suppress(CorruptSession):
                metadata = self.unseal(entry, session.id).metadata | session.metadata
                session = msgspec.structs.replace(session, metadata=metadata)
        return super().seal(session)


class PresentComparesRevisions(HonestStorage):
    """Takes an update for a compare-and-set."""

    def check(self, session: Session[Any], when: When) -> None:
        super().check(session, When.UNCHANGED if when is When.PRESENT else when)


class MakesUpTheUnknown(HonestStorage):
    """An id that was never seen is a new, empty session."""

    known: ClassVar[set[str]] = set()

    async def load(self, id: str) -> Session[Any]:
        self.check_open()
        self.check_id(id)
        return await super().load(id) if id in self.known else Session(id=id)

    def write(self, id: str, entry: Entry) -> None:
        super().write(id, entry)
        self.known.add(id)


class StoresWhatItCan(HonestStorage):
    """What cannot be stored leaves a session without data behind."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        try:
            return super().seal(session)
        except InvalidSession:
            with suppress(InvalidSession):
                revision, deadline, record = super().seal(Session(id=session.id))
                self.write(session.id, Entry(record, revision, deadline, self.now()))
            raise
