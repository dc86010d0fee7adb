"""Broken storages: each overrides one step of `ReferenceStorage` with a mistake.

test_broken_storages.py lists the tests of the contract that find the mistake.
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
    InvalidSessionId,
    JsonCodec,
    Session,
    SessionError,
    SessionExists,
    SessionNotFound,
    StorageUnavailable,
    When,
)
from aiosessions.record import HEADER_BYTES, NO_DEADLINE, revision_of, seal, unseal
from tests.support.storages import Backend, Entry, ReferenceStorage


class LoadDoesNotRenew(ReferenceStorage):
    """A load leaves the TTL alone."""

    def renew(self, entry: Entry) -> None:
        """Do nothing."""


class LoadRenewsTheDeadline(ReferenceStorage):
    """A load puts the deadline off, as with a backend that has one expiry for each key."""

    def renew(self, entry: Entry) -> None:
        super().renew(entry)
        if entry.deadline != NO_DEADLINE:
            entry.deadline = max(entry.deadline, self.time() + self.ttl)


class LoadRenewsUnreadableRecords(ReferenceStorage):
    """A load renews before it decodes, as with GETEX."""

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        self.renew(entry)
        return super().unseal(entry, id)


class StoreKeepsTheAge(ReferenceStorage):
    """A store does not start a TTL, as with SET KEEPTTL."""

    def write(self, id: str, entry: Entry, when: When) -> None:
        old = self.find(id)
        if old:
            entry.used_at = old.used_at
        super().write(id, entry, when)


class StorePastTheDeadlineDoesNothing(ReferenceStorage):
    """A store past its deadline leaves the earlier session in place."""

    def write(self, id: str, entry: Entry, when: When) -> None:
        if not self.is_past(entry):
            super().write(id, entry, when)


class StorePastTheDeadlineKeepsARecord(ReferenceStorage):
    """A store past its deadline writes a record that only a sweep removes."""

    def write(self, id: str, entry: Entry, when: When) -> None:  # noqa: ARG002 - the same for each
        self.table()[self.key(id)] = entry


class RefusedWritesRenew(ReferenceStorage):
    """A write judges its condition by a load."""

    def check(self, session: Session[Any], when: When) -> None:
        entry = self.find(session.id)
        if entry:
            self.renew(entry)
        super().check(session, when)


class AbsentForgetsTheTtl(ReferenceStorage):
    """`ABSENT` writes without a TTL, as with SET NX without PX; a load sets one."""

    def write(self, id: str, entry: Entry, when: When) -> None:
        if when is When.ABSENT:
            entry.used_at += 1_000_000_000
        super().write(id, entry, when)


class AbsentForgetsTheDeadline(ReferenceStorage):
    """`ABSENT` starts a TTL and ignores `expires_at`."""

    def write(self, id: str, entry: Entry, when: When) -> None:
        if when is When.ABSENT and not self.is_past(entry):
            entry.deadline = NO_DEADLINE
        super().write(id, entry, when)


class AbsentIsNeverRenewed(ReferenceStorage):
    """A session that `ABSENT` created has a fixed lifetime until it is overwritten."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.created: set[str] = set()

    def write(self, id: str, entry: Entry, when: When) -> None:
        super().write(id, entry, when)
        if when is When.ABSENT:
            self.created.add(entry.revision)

    def renew(self, entry: Entry) -> None:
        if entry.revision not in self.created:
            super().renew(entry)


class AbsentInheritsTheAge(ReferenceStorage):
    """`ABSENT` reuses the row of an expired session and keeps the age in it."""

    def write(self, id: str, entry: Entry, when: When) -> None:
        old = self.table().get(id)
        if when is When.ABSENT and old and not self.is_idle(old):
            entry.used_at = old.used_at
        super().write(id, entry, when)


class CountsInSeconds(ReferenceStorage):
    """Time has a resolution of one second."""

    def now(self) -> int:
        return super().now() // 1000 * 1000


class ExpiresTooLate(ReferenceStorage):
    """A session is still live at exactly its TTL, one millisecond too long."""

    def is_idle(self, entry: Entry) -> bool:
        return entry.used_at + self.ttl < self.now()


class GuessesTimeZones(ReferenceStorage):
    """A sweep accepts a naive moment."""

    async def delete_expired(self, before: datetime | None = None) -> int:
        with suppress(InvalidSession):
            return await super().delete_expired(before)
        return 0


class SharesLoadedObjects(ReferenceStorage):
    """Every load of a record returns the same object, as with a cache of decoded sessions."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.decoded: dict[str, Session[Any]] = {}

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        return self.decoded.setdefault(entry.revision, super().unseal(entry, id))


class KeepsTheCallersObject(ReferenceStorage):
    """A store keeps a reference, and a load encodes it."""

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


class PresentCreates(ReferenceStorage):
    """`PRESENT` writes without a session there."""

    def check(self, session: Session[Any], when: When) -> None:
        super().check(session, When.ALWAYS if when is When.PRESENT else when)


class PresentComparesRevisions(ReferenceStorage):
    """`PRESENT` works as `UNCHANGED`."""

    def check(self, session: Session[Any], when: When) -> None:
        super().check(session, When.UNCHANGED if when is When.PRESENT else when)


class AbsentOverwrites(ReferenceStorage):
    """`ABSENT` writes over a session."""

    def check(self, session: Session[Any], when: When) -> None:
        super().check(session, When.ALWAYS if when is When.ABSENT else when)


class AbsentSeesExpiredSessions(ReferenceStorage):
    """`ABSENT` finds the row of an expired session."""

    def check(self, session: Session[Any], when: When) -> None:
        if when is When.ABSENT and session.id in self.table():
            raise SessionExists
        super().check(session, when)


class UnchangedIgnoresTheRevision(ReferenceStorage):
    """`UNCHANGED` works as `PRESENT`: the last writer wins."""

    def check(self, session: Session[Any], when: When) -> None:
        super().check(session, When.PRESENT if when is When.UNCHANGED else when)


class YieldsBeforeTheWrite(ReferenceStorage):
    """Other tasks run between the check of a condition and the write."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        self.check_open()
        self.seal(session)
        self.check(session, when)
        await checkpoint()
        await super().store(session)


class RevisionIsAHash(ReferenceStorage):
    """Equal content has equal revisions."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        revision, deadline, record = super().seal(session)
        revision = hashlib.sha256(record[17:]).hexdigest()[:16]
        return revision, deadline, record[:1] + revision.encode() + record[17:]


class RevisionIsNotStamped(ReferenceStorage):
    """The caller's object keeps its revision."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(msgspec.structs.replace(session), when=when)


class StampsTheDate(ReferenceStorage):
    """A store changes another field of the caller's object."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(session, when=when)
        session.updated_at = datetime.fromtimestamp(self.clock.time(), tz=session.updated_at.tzinfo)


class StampsBeforeTheCheck(ReferenceStorage):
    """A refused write has changed the caller's object."""

    def check(self, session: Session[Any], when: When) -> None:
        expected = msgspec.structs.replace(session)
        session.revision = "stamped"
        super().check(expected, when)


class DeleteIsAlwaysTrue(ReferenceStorage):
    """`delete` does not tell whether there was a session."""

    async def delete(self, id: str) -> bool:
        await super().delete(id)
        return True


class DeleteYields(ReferenceStorage):
    """Other tasks run between the look-up and the removal."""

    async def delete(self, id: str) -> bool:
        self.check_open()
        existed = self.find(id) is not None
        await checkpoint()
        await super().delete(id)
        return existed


class DeleteFindsExpiredSessions(ReferenceStorage):
    """`delete` counts the row of an expired session."""

    async def delete(self, id: str) -> bool:
        self.check_open()
        self.check_id(id)
        return self.table().pop(id, None) is not None


class DeletesEverything(ReferenceStorage):
    """`delete` removes every session, as with a statement without its WHERE."""

    async def delete(self, id: str) -> bool:
        existed = await super().delete(id)
        self.table().clear()
        return existed


class ReturnsAnotherSession(ReferenceStorage):
    """A load does not compare the id in the record."""

    def unseal(self, entry: Entry, id: str) -> Session[Any]:  # noqa: ARG002 - that is the mistake
        session = self.codec.decode(entry.record[HEADER_BYTES:])
        session.revision = revision_of(entry.record)
        return session


class UnreadableIsEmpty(ReferenceStorage):
    """A load of an unreadable record returns an empty session."""

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        try:
            return super().unseal(entry, id)
        except CorruptSession:
            return Session(id=id, revision=entry.revision)


class UnreadableIsNotFound(ReferenceStorage):
    """A load of an unreadable record raises `SessionNotFound`."""

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        try:
            return super().unseal(entry, id)
        except CorruptSession:
            raise SessionNotFound from None


class EveryVerbDecodes(ReferenceStorage):
    """A delete or a store raises because of an unreadable record."""

    def find(self, id: str) -> Entry | None:
        entry = super().find(id)
        if entry:
            self.unseal(entry, id)
        return entry


class OutageIsNotFound(ReferenceStorage):
    """A verb raises `SessionNotFound` when the backend does not answer."""

    def table(self) -> dict[str, Entry]:
        try:
            return super().table()
        except StorageUnavailable as error:
            raise SessionNotFound from error


class LoadsAreInDoubt(ReferenceStorage):
    """Every `StorageUnavailable` claims that a write may have been applied."""

    def table(self) -> dict[str, Entry]:
        try:
            return super().table()
        except StorageUnavailable as error:
            raise StorageUnavailable(in_doubt=True) from error


class RaisesAnErrorOfItsOwn(ReferenceStorage):
    """A load of an absent session raises a class that callers do not know."""

    class Gone(SessionError):
        """There was such a session, perhaps."""

        status = 410

    async def load(self, id: str) -> Session[Any]:
        try:
            return await super().load(id)
        except SessionNotFound:
            raise self.Gone from None


class ErrorsHoldTheId(ReferenceStorage):
    """An error names the session that was not found."""

    async def load(self, id: str) -> Session[Any]:
        try:
            return await super().load(id)
        except SessionNotFound as error:
            raise SessionNotFound(f"no session {id}") from error


class LogsHoldTheId(ReferenceStorage):
    """A log record names the session that is loaded."""

    async def load(self, id: str) -> Session[Any]:
        logging.getLogger(__name__).debug("loading %s", id)
        return await super().load(id)


class ReprHoldsSessions(ReferenceStorage):
    """The repr shows the backend."""

    def __repr__(self) -> str:
        return f"ReprHoldsSessions({self.backend!r})"


class NeverCloses(ReferenceStorage):
    """`aclose` does nothing."""

    async def aclose(self) -> None:
        """Do nothing."""


class ClosesOnce(ReferenceStorage):
    """A second `aclose` raises."""

    async def aclose(self) -> None:
        self.check_open()
        await super().aclose()


class ClosingBreaksLoads(ReferenceStorage):
    """A load in flight takes the end of its connection for an unreadable record."""

    async def load(self, id: str) -> Session[Any]:
        await checkpoint()
        await checkpoint()
        if self.is_closed:
            raise CorruptSession
        return await super().load(id)


class LeavesATaskBehind(ReferenceStorage):
    """A task outlives the storage."""

    sweeper: asyncio.Future[None] | None = None

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(session, when=when)
        self.sweeper = self.sweeper or asyncio.ensure_future(asyncio.sleep(3600))


class LeaksItsConnection(ReferenceStorage):
    """A connection stays open."""

    connection: socket.socket

    async def load(self, id: str) -> Session[Any]:
        self.connection = socket.socket()
        return await super().load(id)


class WritesInTwoSteps(ReferenceStorage):
    """Other tasks run between the write of the data and the write of its revision."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        self.check_open()
        revision, deadline, record = self.seal(session)
        self.check(session, when)
        half = Entry(record[:1] + b"................" + record[17:], revision, deadline, self.now())
        self.write(session.id, half, when)
        await checkpoint()
        if session.id in self.table():
            half.record = record
        session.revision = revision


class CachesForEver(ReferenceStorage):
    """A cache of records that the writes of other replicas do not reach."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cache: dict[str, bytes] = {}

    def write(self, id: str, entry: Entry, when: When) -> None:
        super().write(id, entry, when)
        self.cache[id] = entry.record

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        record = self.cache.setdefault(id, entry.record)
        return unseal(record, id, self.codec, now=lambda: 0)


class SeesOnlyItsOwnSessions(ReferenceStorage):
    """Each replica has its own backend."""

    def __init__(self, backend: Backend, *args: Any) -> None:
        super().__init__(Backend(is_down=backend.is_down), *args)


class ClosesTheBackend(ReferenceStorage):
    """`aclose` closes the backend for the other replicas."""

    async def aclose(self) -> None:
        await super().aclose()
        self.backend.is_down = True


class ExpiresWhenSwept(ReferenceStorage):
    """Sessions are live until a sweep removes them."""

    def find(self, id: str) -> Entry | None:
        return self.table().get(id)


class SweepsLiveSessions(ReferenceStorage):
    """A sweep removes each session that was not used in the same millisecond."""

    def is_swept(self, entry: Entry, before: datetime | None) -> bool:
        return entry.used_at < self.now() or super().is_swept(entry, before)


class SweepIgnoresDeadlines(ReferenceStorage):
    """A sweep removes idle sessions only."""

    def is_swept(self, entry: Entry, before: datetime | None) -> bool:
        return super().is_swept(entry, before) and (before is not None or self.is_idle(entry))


class SweepRevives(ReferenceStorage):
    """A sweep renews the sessions that it does not remove, and the expired ones among them."""

    async def delete_expired(self, before: datetime | None = None) -> int:
        self.check_open()
        for entry in self.table().values():
            self.renew(entry)
            entry.deadline = NO_DEADLINE
        return await super().delete_expired(before)


class SweepOnlyCounts(ReferenceStorage):
    """A sweep removes nothing."""

    async def delete_expired(self, before: datetime | None = None) -> int:
        self.check_open()
        return sum(self.is_swept(entry, before) for entry in self.table().values())


class AcceptsAnyId(ReferenceStorage):
    """Ids are not checked."""

    def check_id(self, id: str) -> None:
        """Do nothing."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        try:
            return super().seal(session)
        except (InvalidSession, TypeError):
            revision, deadline, record = super().seal(msgspec.structs.replace(session, id="valid"))
            return revision, deadline, record[:HEADER_BYTES] + self.codec.encode(session)


class MalformedIdIsInvalidSession(ReferenceStorage):
    """A malformed id raises `InvalidSession` (500), which blames the application."""

    def check_id(self, id: str) -> None:
        try:
            super().check_id(id)
        except InvalidSessionId:
            raise InvalidSession from None

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        self.check_id(session.id)
        return super().seal(session)


class IdsArePatterns(ReferenceStorage):
    """A look-up matches patterns, as with KEYS in place of GET."""

    def find(self, id: str) -> Entry | None:
        return super().find(id) if fnmatch.fnmatchcase(id, id) else None


class IdsIgnoreCase(ReferenceStorage):
    """Ids that differ in case are one session, as with some collations of databases."""

    def key(self, id: str) -> str:
        return id.lower()


class RepliesGetOutOfStep(ReferenceStorage):
    """A caller takes the next reply, also after an earlier caller was cancelled."""

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
        """Return the oldest reply."""
        return self.replies.popleft()


class RepliesComeBackwards(RepliesGetOutOfStep):
    """A caller takes the newest reply."""

    def next_reply(self) -> str:
        return self.replies.pop()


class EmptyDataIsNone(ReferenceStorage):
    """Empty data comes back as None."""

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        session = super().unseal(entry, id)
        if session.data in ("", [], {}):
            session.data = None
        return session


class IgnoresTheCodec(ReferenceStorage):
    """The storage uses another codec than the given one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.codec = JsonCodec()


class HasNoSizeLimit(ReferenceStorage):
    """Sessions of any size are stored."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        if not isinstance(self.codec, JsonCodec):
            return super().seal(session)
        return seal(session, JsonCodec(max_bytes=1_000_000_000))


class Merges(ReferenceStorage):
    """A write keeps the metadata of the earlier session."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        entry = self.find(session.id)
        if entry:
            with suppress(CorruptSession):
                metadata = self.unseal(entry, session.id).metadata | session.metadata
                session = msgspec.structs.replace(session, metadata=metadata)
        return super().seal(session)


class UnknownIsEmpty(ReferenceStorage):
    """A load of an unknown id returns an empty session."""

    known: ClassVar[set[str]] = set()

    async def load(self, id: str) -> Session[Any]:
        self.check_open()
        self.check_id(id)
        return await super().load(id) if id in self.known else Session(id=id)

    def write(self, id: str, entry: Entry, when: When) -> None:
        super().write(id, entry, when)
        self.known.add(id)


class StoresAPart(ReferenceStorage):
    """A session that cannot be stored leaves one without data behind."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        try:
            return super().seal(session)
        except InvalidSession:
            with suppress(InvalidSession):
                revision, deadline, record = super().seal(Session(id=session.id))
                entry = Entry(record, revision, deadline, self.now())
                self.write(session.id, entry, When.ALWAYS)
            raise
