"""Storages with one mistake each, in conditional writes, expiry or sweeps."""
# ruff: noqa: D102 - each class explains its methods

from contextlib import suppress
from datetime import datetime
from typing import Any

import msgspec
from anyio.lowlevel import checkpoint

from aiosessions import CorruptSession, InvalidSession, Session, SessionExists, When
from aiosessions.record import NO_DEADLINE
from tests.contract.broken_storages import Broken
from tests.support.storages import Entry


class PresentCreates(
    Broken, found_by="absent_session_cannot_be_overwritten no_save_outlives_a_delete"
):
    """`PRESENT` writes without a session there."""

    def check(self, session: Session[Any], when: When) -> None:
        super().check(session, When.ALWAYS if when is When.PRESENT else when)


class PresentComparesRevisions(Broken, found_by="unconditional_writes_ignore_the_revision"):
    """`PRESENT` works as `UNCHANGED`."""

    def check(self, session: Session[Any], when: When) -> None:
        super().check(session, When.UNCHANGED if when is When.PRESENT else when)


class AbsentOverwrites(
    Broken, found_by="absent_refuses_a_present_session unreadable_record_is_not_absent"
):
    """`ABSENT` writes over a session."""

    def check(self, session: Session[Any], when: When) -> None:
        super().check(session, When.ALWAYS if when is When.ABSENT else when)


class AbsentSeesExpiredSessions(
    Broken, found_by="absent_session_can_be_created recreated_session_has_a_full_ttl"
):
    """`ABSENT` finds the row of an expired session."""

    def check(self, session: Session[Any], when: When) -> None:
        if when is When.ABSENT and session.id in self.table():
            raise SessionExists
        super().check(session, when)


class UnchangedIgnoresTheRevision(
    Broken,
    found_by="""
        unchanged_refuses_a_rewritten_session
        unchanged_refuses_a_recreated_session
        unchanged_refuses_an_unstored_object
    """,
):
    """`UNCHANGED` works as `PRESENT`: the last writer wins."""

    def check(self, session: Session[Any], when: When) -> None:
        super().check(session, When.PRESENT if when is When.UNCHANGED else when)


class StampsBeforeTheCheck(Broken, found_by="absent_refuses_a_present_session"):
    """A refused write has changed the caller's object."""

    def check(self, session: Session[Any], when: When) -> None:
        expected = msgspec.structs.replace(session)
        session.revision = "stamped"
        super().check(expected, when)


class YieldsBeforeTheWrite(
    Broken,
    found_by="""
        one_of_many_unchanged_writes_wins
        one_of_many_creators_wins
        concurrent_increments_all_count
    """,
):
    """Other tasks run between the check of a condition and the write."""

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        self.check_open()
        self.seal(session)
        self.check(session, when)
        await checkpoint()
        await super().store(session)


class WritesInTwoSteps(
    Broken, found_by="loads_see_whole_writes cancelled_store_writes_all_or_nothing"
):
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


class Merges(Broken, found_by="overwriting_replaces_every_field"):
    """A write keeps the metadata of the earlier session."""

    def seal(self, session: Session[Any]) -> tuple[str, int, bytes]:
        entry = self.find(session.id)
        with suppress(CorruptSession):
            if entry:
                metadata = self.unseal(entry, session.id).metadata | session.metadata
                session = msgspec.structs.replace(session, metadata=metadata)
        return super().seal(session)


class DeleteIsAlwaysTrue(Broken, found_by="delete_returns_whether_it_removed_a_session"):
    """`delete` does not tell whether there was a session."""

    async def delete(self, id: str) -> bool:
        await super().delete(id)
        return True


class DeleteYields(Broken, found_by="one_of_many_deletes_finds_the_session"):
    """Other tasks run between the look-up and the removal."""

    async def delete(self, id: str) -> bool:
        self.check_open()
        existed = self.find(id) is not None
        await checkpoint()
        await super().delete(id)
        return existed


class DeleteFindsExpiredSessions(Broken, found_by="delete_of_an_absent_session_returns_false"):
    """`delete` counts the row of an expired session."""

    async def delete(self, id: str) -> bool:
        self.check_open()
        self.check_id(id)
        return self.table().pop(id, None) is not None


class DeletesEverything(Broken, found_by="writes_leave_other_sessions_alone"):
    """`delete` removes every session, as with a statement without its WHERE."""

    async def delete(self, id: str) -> bool:
        existed = await super().delete(id)
        self.table().clear()
        return existed


class LoadDoesNotRenew(
    Broken,
    found_by="""
        load_starts_a_full_ttl
        load_renews_only_the_loaded_session
        use_on_one_replica_counts_on_all
        sweep_before_a_moment_keeps_sessions_used_since
        sweep_before_a_moment_removes_unused_sessions
    """,
):
    """A load leaves the TTL alone."""

    def renew(self, entry: Entry) -> None:
        """Do nothing."""


class LoadRenewsTheDeadline(Broken, found_by="load_keeps_the_deadline"):
    """A load puts the deadline off, as with a backend that has one expiry for each key."""

    def renew(self, entry: Entry) -> None:
        super().renew(entry)
        if entry.deadline != NO_DEADLINE:
            entry.deadline = max(entry.deadline, self.time() + self.ttl)


class LoadRenewsUnreadableRecords(Broken, found_by="load_does_not_prolong_unreadable_records"):
    """A load renews before it decodes, as with GETEX."""

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        self.renew(entry)
        return super().unseal(entry, id)


class StoreKeepsTheAge(Broken, found_by="store_starts_a_full_ttl"):
    """A store does not start a TTL, as with SET KEEPTTL."""

    def write(self, id: str, entry: Entry, when: When) -> None:
        old = self.find(id)
        if old:
            entry.used_at = old.used_at
        super().write(id, entry, when)


class StorePastTheDeadlineDoesNothing(
    Broken,
    found_by="store_past_the_deadline_removes store_past_the_deadline_leaves_nothing_to_sweep",
):
    """A store past its deadline leaves the earlier session in place."""

    def write(self, id: str, entry: Entry, when: When) -> None:
        if not self.is_past(entry):
            super().write(id, entry, when)


class RefusedWritesRenew(Broken, found_by="refused_write_does_not_renew"):
    """A write judges its condition by a load."""

    def check(self, session: Session[Any], when: When) -> None:
        entry = self.find(session.id)
        if entry:
            self.renew(entry)
        super().check(session, when)


class ExpiresTooLate(Broken, found_by="load_starts_a_full_ttl far_deadline_leaves_the_ttl_alone"):
    """A session is still live at exactly its TTL, one millisecond too long."""

    def is_idle(self, entry: Entry) -> bool:
        return entry.used_at + self.ttl < self.now()


class ExpiresWhenSwept(
    Broken,
    found_by="""
        expired_session_stays_expired
        session_expires_at_its_deadline
        store_keeps_the_deadline
        deadline_can_be_brought_forward
    """,
):
    """Sessions are live until a sweep removes them."""

    def find(self, id: str) -> Entry | None:
        return self.table().get(id)


class SweepsLiveSessions(
    Broken,
    found_by="sweep_leaves_live_sessions_alone sweep_does_nothing sweep_counts_removed_sessions",
):
    """A sweep removes each session that was not used in the same millisecond."""

    def is_swept(self, entry: Entry, before: datetime | None) -> bool:
        return entry.used_at < self.now() or super().is_swept(entry, before)


class SweepRevives(Broken, found_by="sweep_keeps_absent_sessions_absent"):
    """A sweep renews the sessions that it does not remove, and the expired ones among them."""

    async def delete_expired(self, before: datetime | None = None) -> int:
        self.check_open()
        for entry in self.table().values():
            self.renew(entry)
            entry.deadline = NO_DEADLINE
        return await super().delete_expired(before)


class SweepOnlyCounts(Broken, found_by="second_sweep_removes_nothing swept_session_is_deleted"):
    """A sweep removes nothing."""

    async def delete_expired(self, before: datetime | None = None) -> int:
        self.check_open()
        return sum(self.is_swept(entry, before) for entry in self.table().values())


class GuessesTimeZones(Broken, found_by="sweep_before_a_naive_moment_is_refused"):
    """A sweep accepts a naive moment."""

    async def delete_expired(self, before: datetime | None = None) -> int:
        with suppress(InvalidSession):
            return await super().delete_expired(before)
        return 0
