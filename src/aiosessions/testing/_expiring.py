"""Tests of expiry: the TTL, the deadline, and sweeping.

Ages are in `unit`s; a TTL has three. A session must be there one `tick` before its end, and gone at
its end. Tests write with every `When`, because a storage may write in several ways, and each of
them sets an expiry.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ..errors import CorruptSession, InvalidSession, SessionConflict, SessionExists, SessionNotFound
from ..session import Session
from ..storage import Storage, When
from ._harness import Harness, is_gone, new_session
from ._spoiling import UNREADABLE, reader_of_floats
from ._storing import ABSENT_STATES, CREATES, OVERWRITES, WHENS, absent, begin


async def written(storage: Storage[Any], when: When, **fields: Any) -> Session[Any]:
    """Store a session with `when`; before that, without these fields, if `when` needs one."""
    session = await begin(storage, when)
    for name, value in fields.items():
        setattr(session, name, value)
    await storage.store(session, when=when)
    return session


class Expiring(Harness):
    """The TTL, the deadline, and sweeping."""

    @pytest.mark.parametrize("when", WHENS)
    async def test_store_starts_a_full_ttl(self, when: When) -> None:
        """An unused session expires one TTL after its last write, and not before."""
        storage = await self.open(ttl=self.ttl)
        used, unused = [await begin(storage, when) for _ in range(2)]
        await self.advance(self.unit)
        for session in (used, unused):
            await storage.store(session, when=when)

        await self.advance(self.ttl - self.tick)
        assert not await is_gone(storage, used)
        await self.advance(self.tick)

        assert await is_gone(storage, unused)

    async def test_expired_session_stays_expired(self) -> None:
        """A load of an expired session does not revive it."""
        storage = await self.open(ttl=self.ttl)
        session = await written(storage, When.ABSENT)

        await self.advance(self.ttl)

        assert [await is_gone(storage, session) for _ in range(3)] == [True] * 3

    @pytest.mark.parametrize("when", WHENS)
    async def test_load_starts_a_full_ttl(self, when: When) -> None:
        """A session expires one TTL after its last load, and not before, load after load."""
        storage = await self.open(ttl=self.ttl)
        used, unused = [await written(storage, when) for _ in range(2)]
        for _ in range(2):
            await self.advance(self.ttl - self.unit)
            await storage.load(used.id)
            await storage.load(unused.id)

        await self.advance(self.ttl - self.tick)
        assert not await is_gone(storage, used)
        await self.advance(self.tick)

        assert await is_gone(storage, unused)

    async def test_load_renews_only_the_loaded_session(self) -> None:
        """The other sessions go on ageing."""
        storage = await self.open(ttl=self.ttl)
        used, unused = [await written(storage, When.ABSENT) for _ in range(2)]

        await self.advance(self.unit)
        await storage.load(used.id)
        await self.advance(self.ttl - self.unit)

        assert await is_gone(storage, unused)
        assert not await is_gone(storage, used)

    async def test_refused_write_does_not_renew(self) -> None:
        """A write that raises does not count as use."""
        storage = await self.open(ttl=self.ttl)
        session = await written(storage, When.ABSENT)
        stranger = Session(id=session.id)

        await self.advance(self.unit)
        with pytest.raises(SessionExists):
            await storage.store(stranger, when=When.ABSENT)
        with pytest.raises(SessionConflict):
            await storage.store(stranger, when=When.UNCHANGED)
        await self.advance(self.ttl - self.unit)

        assert await is_gone(storage, session)

    async def test_load_does_not_prolong_unreadable_records(self) -> None:
        """A client that polls an unreadable session does not keep its record in the storage.

        One renewal of each record is allowed, because a storage may read and renew in one step.
        """
        codec = reader_of_floats()
        storage = await self.open(ttl=self.ttl, codec=codec)
        sessions = [new_session(data=1.5) for _ in UNREADABLE]
        for session, codec.spoil in zip(sessions, UNREADABLE.values(), strict=True):
            await storage.store(session, when=When.ABSENT)

        for _ in range(3 * 3):
            await self.advance(self.unit)
            for session in sessions:
                with pytest.raises((CorruptSession, SessionNotFound)):
                    await storage.load(session.id)

        assert [await storage.delete(session.id) for session in sessions] == [False] * len(sessions)

    @pytest.mark.parametrize("when", WHENS)
    async def test_session_expires_at_its_deadline(self, when: When) -> None:
        """It is there just before `expires_at` and gone at it, although its TTL would last."""
        storage = await self.open(ttl=self.ttl)
        deadline = self.now() + timedelta(seconds=2 * self.unit)
        session = await written(storage, when, expires_at=deadline)

        await self.advance(2 * self.unit - self.tick)
        assert not await is_gone(storage, session)
        await self.advance(self.tick)

        assert await is_gone(storage, session)

    @pytest.mark.parametrize("when", WHENS)
    async def test_load_keeps_the_deadline(self, when: When) -> None:
        """A session that is loaded again and again expires at `expires_at`."""
        storage = await self.open(ttl=self.ttl)
        deadline = self.now() + timedelta(seconds=5 * self.unit)
        session = await written(storage, when, expires_at=deadline)

        for _ in range(4):
            await self.advance(self.unit)
            assert not await is_gone(storage, session)
        await self.advance(self.unit - self.tick)
        await storage.load(session.id)
        await self.advance(self.tick)

        assert await is_gone(storage, session)

    @pytest.mark.parametrize("when", OVERWRITES)
    async def test_store_keeps_the_deadline(self, when: When) -> None:
        """The full TTL that a write starts ends at `expires_at`."""
        storage = await self.open(ttl=self.ttl)
        deadline = self.now() + timedelta(seconds=3 * self.unit)
        session = await written(storage, When.ABSENT, expires_at=deadline)

        await self.advance(2 * self.unit)
        await storage.store(session, when=when)
        await self.advance(self.unit)

        assert await is_gone(storage, session)

    @pytest.mark.parametrize("when", WHENS)
    async def test_far_deadline_leaves_the_ttl_alone(self, when: When) -> None:
        """An idle session expires after its TTL, however far away its deadline is."""
        storage = await self.open(ttl=self.ttl)
        session = await written(storage, when, expires_at=datetime.max.replace(tzinfo=UTC))

        await self.advance(self.ttl)

        assert await is_gone(storage, session)

    @pytest.mark.parametrize("when", OVERWRITES)
    async def test_deadline_can_be_put_off(self, when: When) -> None:
        """The `expires_at` of the last write counts, or that it has none."""
        storage = await self.open(ttl=self.ttl)
        deadline = self.now() + timedelta(seconds=2 * self.unit)
        later, never = [await written(storage, When.ABSENT, expires_at=deadline) for _ in range(2)]
        later.expires_at = self.now() + timedelta(seconds=9 * self.unit)
        never.expires_at = None
        for session in (later, never):
            await storage.store(session, when=when)

        await self.advance(2 * self.unit)

        assert not await is_gone(storage, later)
        assert not await is_gone(storage, never)

    @pytest.mark.parametrize("when", OVERWRITES)
    async def test_deadline_can_be_brought_forward(self, when: When) -> None:
        """A session without a deadline expires at the one that a later write gives it."""
        storage = await self.open(ttl=self.ttl)
        session = await written(storage, When.ABSENT)
        session.expires_at = self.now() + timedelta(seconds=self.unit)
        await storage.store(session, when=when)

        await self.advance(self.unit)

        assert await is_gone(storage, session)

    @pytest.mark.parametrize("when", CREATES)
    async def test_recreated_session_has_a_full_ttl(self, when: When) -> None:
        """A session that takes the id of an expired one inherits neither age nor deadline."""
        storage = await self.open(ttl=self.ttl)
        session = await absent(self, storage, "past-deadline")
        await storage.store(session, when=when)

        await self.advance(self.ttl - self.tick)

        assert not await is_gone(storage, session)

    @pytest.mark.parametrize("when", WHENS)
    @pytest.mark.parametrize("year", [1, 1969, 2001])
    async def test_store_past_the_deadline_removes(self, year: int, when: When) -> None:
        """A write past its `expires_at` succeeds, stamps a revision and removes the session."""
        storage = await self.open()
        session = await begin(storage, when)
        before = session.revision
        session.expires_at = datetime(year, 1, 1, tzinfo=UTC)

        await storage.store(session, when=when)

        assert session.revision not in ("", before)
        assert await is_gone(storage, session)
        assert await storage.delete(session.id) is False

    @pytest.mark.parametrize("state", ABSENT_STATES)
    async def test_sweep_keeps_absent_sessions_absent(self, state: str) -> None:
        """A session that was absent before a sweep is absent after it."""
        storage = await self.open(ttl=self.ttl)
        session = await absent(self, storage, state)

        await storage.delete_expired()

        assert await is_gone(storage, session)
        assert await storage.delete(session.id) is False

    async def test_sweep_leaves_live_sessions_alone(self) -> None:
        """A sweep neither removes nor renews a live session."""
        storage = await self.open(ttl=self.ttl)
        deadline = self.now() + timedelta(seconds=9 * self.unit)
        used, unused = [await written(storage, When.ABSENT, expires_at=deadline) for _ in range(2)]

        await self.advance(self.ttl - self.unit)
        await storage.delete_expired()
        assert not await is_gone(storage, used)
        await self.advance(self.unit)

        assert await is_gone(storage, unused)

    async def test_second_sweep_removes_nothing(self) -> None:
        """The first sweep has removed every expired session."""
        storage = await self.open(ttl=self.ttl)
        await written(storage, When.ABSENT)
        await self.advance(self.ttl)
        await storage.delete_expired()

        assert await storage.delete_expired() == 0

    async def test_sweep_before_a_moment_keeps_sessions_used_since(self) -> None:
        """Use is a load or a store."""
        storage = await self.open(ttl=self.ttl)
        loaded = await written(storage, When.ABSENT)
        await self.advance(self.unit)
        since = self.now()
        await self.advance(self.unit)
        await storage.load(loaded.id)
        stored = await written(storage, When.ABSENT)

        await storage.delete_expired(since)

        assert not await is_gone(storage, loaded)
        assert not await is_gone(storage, stored)

    async def test_sweep_before_a_naive_moment_is_refused(self) -> None:
        """The zone of a naive datetime is unknown, so nothing is removed."""
        storage = await self.open()
        session = await written(storage, When.ABSENT)

        with pytest.raises(InvalidSession):
            await storage.delete_expired(datetime.max)  # noqa: DTZ901 - that is the point

        assert not await is_gone(storage, session)
