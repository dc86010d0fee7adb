"""Storages with one mistake each, and the tests of the contract that find it.

Each overrides one step of `ReferenceStorage`. broken_writes.py has the mistakes of conditional
writes, expiry and sweeps; broken_connections.py has those of closing, replicas and replies;
broken_indexes.py and broken_revocations.py have those of the sessions of a principal.
"""
# ruff: noqa: D102 - each class explains its methods

import fnmatch
import hashlib
import logging
from datetime import datetime
from typing import Any, ClassVar

import msgspec

from aiosessions import (
    InvalidSession,
    InvalidSessionId,
    JsonCodec,
    Session,
    SessionNotFound,
    StorageUnavailable,
    When,
    session_digest,
)
from tests.support.storages import Entry, ReferenceStorage


class Broken(ReferenceStorage):
    """The base of all broken storages.

    Attributes:
        found_by: The tests that find the mistake, without "test_".
    """

    found_by: ClassVar[list[str]]

    def __init_subclass__(cls, *, found_by: str) -> None:
        super().__init_subclass__()
        cls.found_by = found_by.split()


class SharesLoadedObjects(Broken, found_by="each_load_returns_a_copy"):
    """Every load of a record returns the same object, as with a cache of decoded sessions."""

    decoded: ClassVar[dict[str, Session[Any]]] = {}

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        return self.decoded.setdefault(entry.revision, super().unseal(entry, id))


class KeepsTheCallersObject(Broken, found_by="store_keeps_a_copy"):
    """A load copies the object that was stored."""

    stored: ClassVar[dict[str, Session[Any]]] = {}

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(session, when=when)
        self.stored[session.revision] = session

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        session = self.stored.get(entry.revision)
        return msgspec.structs.replace(session) if session else super().unseal(entry, id)


class EmptyDataIsNone(Broken, found_by="data_comes_back_unchanged"):
    """Empty data comes back as None."""

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        session = super().unseal(entry, id)
        return session if session.data else msgspec.structs.replace(session, data=None)


class IgnoresTheCodec(
    Broken,
    found_by="""
        typed_data_comes_back_typed
        errors_of_a_codec_reach_the_caller
        default_codec_limits_the_size
    """,
):
    """The storage uses another codec than the given one, without a limit."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.codec = JsonCodec(max_bytes=1_000_000_000)


class RevisionIsAHash(
    Broken, found_by="revisions_never_repeat unchanged_compares_revisions_not_content"
):
    """Equal content has equal revisions."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        revision, deadline, record = super().seal(session)
        revision = hashlib.sha256(record[17:]).hexdigest()[:16]
        return revision, deadline, record[:1] + revision.encode() + record[17:]


class RevisionIsNotStamped(
    Broken,
    found_by="""
        store_stamps_a_fresh_revision
        load_keeps_the_revision
        present_session_can_be_overwritten
        deadline_can_be_put_off
    """,
):
    """The caller's object keeps its revision."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(msgspec.structs.replace(session), when=when)


class StampsTheDate(
    Broken,
    found_by="""
        store_changes_only_the_revision
        defaults_come_back
        every_field_comes_back
        dates_come_back_in_utc
    """,
):
    """A store changes another field of the caller's object."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(session, when=when)
        session.updated_at = datetime.fromtimestamp(self.clock.time(), tz=session.updated_at.tzinfo)


class AcceptsAnyId(
    Broken,
    found_by="malformed_id_cannot_be_looked_up id_that_is_not_a_string_is_a_type_error",
):
    """Look-ups do not check ids."""

    def check_id(self, id: str) -> None:
        """Do nothing."""


class MalformedIdIsInvalidSession(Broken, found_by="malformed_id_cannot_be_stored"):
    """A store blames the application for a malformed id."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        try:
            return super().seal(session)
        except InvalidSessionId:
            raise InvalidSession from None


class IdsArePatterns(Broken, found_by="every_valid_id_works"):
    """A look-up matches patterns, as with KEYS in place of GET."""

    def find(self, id: str) -> Entry | None:
        return super().find(id) if fnmatch.fnmatchcase(id, id) else None


class IdsIgnoreCase(Broken, found_by="ids_match_exactly"):
    """Ids that differ in case are one session, as with some collations of databases."""

    def key(self, id: str) -> str:
        return id.lower()


class UnknownIsEmpty(Broken, found_by="load_of_an_unknown_id_is_not_found"):
    """A load of an absent session returns an empty one."""

    async def load(self, id: str) -> Session[Any]:
        try:
            return await super().load(id)
        except SessionNotFound:
            return Session(id=id)


class StoresAPart(
    Broken, found_by="unstorable_session_is_not_stored unstorable_session_overwrites_nothing"
):
    """A session that cannot be stored leaves one without data behind."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        revision, deadline, record = super().seal(Session(id=session.id))
        self.table()[session.id] = Entry(record, revision, deadline, self.now())
        return super().seal(session)


class ReturnsAnotherSession(Broken, found_by="unreadable_record_is_corrupt"):
    """A load does not compare the id in the record."""

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        session = self.codec.decode(entry.record[entry.record.index(b"{") :])
        return super().unseal(entry, session.id) if session.id == session_digest(id) else session


class EveryVerbDecodes(
    Broken, found_by="unreadable_record_can_be_overwritten unreadable_record_can_be_deleted"
):
    """A delete or a store raises because of an unreadable record."""

    def find(self, id: str) -> Entry | None:
        entry = super().find(id)
        if entry:
            self.unseal(entry, id)
        return entry


class OutageIsNotFound(
    Broken,
    found_by="""
        outage_is_not_an_absent_session
        store_fails_in_an_outage
        outage_errors_hold_no_secrets
        storage_closes_in_an_outage
    """,
):
    """A verb raises `SessionNotFound` when the backend does not answer."""

    def table(self) -> dict[str, Entry]:
        try:
            return super().table()
        except StorageUnavailable as error:
            raise SessionNotFound from error


class LoadsAreInDoubt(Broken, found_by="only_writes_are_in_doubt"):
    """Every `StorageUnavailable` claims that a write may have been applied."""

    def table(self) -> dict[str, Entry]:
        try:
            return super().table()
        except StorageUnavailable as error:
            raise StorageUnavailable(in_doubt=True) from error


class LeaksKeyErrors(Broken, found_by="errors_have_a_status errors_hold_no_secrets"):
    """An absent session leads to an error of the backend, which names the session."""

    async def load(self, id: str) -> Session[Any]:
        try:
            return await super().load(id)
        except SessionNotFound:
            raise KeyError(id) from None


class LogsHoldTheId(Broken, found_by="logs_hold_no_secrets"):
    """A log record names the session that is loaded."""

    async def load(self, id: str) -> Session[Any]:
        logging.getLogger(__name__).debug("loading %a", id)
        return await super().load(id)


class ReprHoldsSessions(Broken, found_by="repr_holds_no_sessions"):
    """The repr shows the backend."""

    def __repr__(self) -> str:
        return f"ReprHoldsSessions({self.backend!r})"
