"""When a session ends: idle for its TTL, or at its deadline, and what sweeping has to do with it.

Ages are in `unit`s: a TTL is three. What must still be there is looked at one `tick` early, what
must be gone at exactly the end.
"""

from datetime import UTC, datetime, timedelta

import pytest

from ..errors import InvalidSession, SessionConflict, SessionExists
from ..session import Session
from ..storage import When
from ._harness import Harness, is_gone, new_session
from ._storing import ABSENT_STATES, OVERWRITES, absent


class Expiring(Harness):
    """The TTL, the deadline, and sweeping."""

    async def test_a_session_ends_when_idle_for_its_ttl(self) -> None:
        """Unused, it is there until just before its TTL is over, and gone at the end."""
        storage = await self.open(ttl=self.ttl)
        used, unused = new_session(), new_session()
        await storage.store(used)
        await storage.store(unused)

        await self.advance(self.ttl - self.tick)
        assert not await is_gone(storage, used)
        await self.advance(self.tick)

        assert await is_gone(storage, unused)

    async def test_an_ended_session_stays_ended(self) -> None:
        """Looking for a session that is gone does not bring it back."""
        storage = await self.open(ttl=self.ttl)
        session = new_session()
        await storage.store(session)

        await self.advance(self.ttl)

        assert [await is_gone(storage, session) for _ in range(3)] == [True] * 3

    async def test_load_renews_the_ttl(self) -> None:
        """A session in use never ends."""
        storage = await self.open(ttl=self.ttl)
        session = new_session()
        await storage.store(session)

        for _ in range(3):
            await self.advance(self.ttl - self.unit)
            assert not await is_gone(storage, session)

    async def test_load_starts_a_full_ttl_and_no_more(self) -> None:
        """After the last load, a session lasts exactly as long as after a store."""
        storage = await self.open(ttl=self.ttl)
        used, unused = new_session(), new_session()
        await storage.store(used)
        await storage.store(unused)
        await self.advance(self.unit)
        await storage.load(used.id)
        await storage.load(unused.id)

        await self.advance(self.ttl - self.tick)
        assert not await is_gone(storage, used)
        await self.advance(self.tick)

        assert await is_gone(storage, unused)

    async def test_load_renews_only_the_session_it_loads(self) -> None:
        """The others go on ageing."""
        storage = await self.open(ttl=self.ttl)
        used, unused = new_session(), new_session()
        await storage.store(used)
        await storage.store(unused)

        await self.advance(self.unit)
        await storage.load(used.id)
        await self.advance(self.ttl - self.unit)

        assert await is_gone(storage, unused)
        assert not await is_gone(storage, used)

    @pytest.mark.parametrize("when", OVERWRITES)
    async def test_store_starts_a_full_ttl(self, when: When) -> None:
        """Each write counts as use, and a session lasts one whole TTL from it."""
        storage = await self.open(ttl=self.ttl)
        used, unused = new_session(), new_session()
        for session in (used, unused):
            await storage.store(session)
        await self.advance(self.unit)
        for session in (used, unused):
            await storage.store(session, when=when)

        await self.advance(self.ttl - self.tick)
        assert not await is_gone(storage, used)
        await self.advance(self.tick)

        assert await is_gone(storage, unused)

    async def test_a_refused_write_is_no_use(self) -> None:
        """A write that raises does not keep a session alive."""
        storage = await self.open(ttl=self.ttl)
        session = new_session()
        await storage.store(session)
        stranger = Session(id=session.id)

        await self.advance(self.unit)
        with pytest.raises(SessionExists):
            await storage.store(stranger, when=When.ABSENT)
        with pytest.raises(SessionConflict):
            await storage.store(stranger, when=When.UNCHANGED)
        await self.advance(self.ttl - self.unit)

        assert await is_gone(storage, session)

    async def test_a_session_ends_at_its_deadline(self) -> None:
        """Although its TTL would last, it is gone at `expires_at`, and there just before."""
        storage = await self.open(ttl=self.ttl)
        deadline = self.now() + timedelta(seconds=2 * self.unit)
        session = new_session(expires_at=deadline)
        await storage.store(session)

        await self.advance(2 * self.unit - self.tick)
        assert not await is_gone(storage, session)
        await self.advance(self.tick)

        assert await is_gone(storage, session)

    async def test_no_load_carries_a_session_past_its_deadline(self) -> None:
        """Renewed again and again, it ends at `expires_at` all the same."""
        storage = await self.open(ttl=self.ttl)
        session = new_session(expires_at=self.now() + timedelta(seconds=5 * self.unit))
        await storage.store(session)

        for _ in range(4):
            await self.advance(self.unit)
            assert not await is_gone(storage, session)
        await self.advance(self.unit - self.tick)
        await storage.load(session.id)
        await self.advance(self.tick)

        assert await is_gone(storage, session)

    @pytest.mark.parametrize("when", OVERWRITES)
    async def test_no_store_carries_a_session_past_its_deadline(self, when: When) -> None:
        """A full TTL is started, but `expires_at` bounds it."""
        storage = await self.open(ttl=self.ttl)
        session = new_session(expires_at=self.now() + timedelta(seconds=3 * self.unit))
        await storage.store(session)

        await self.advance(2 * self.unit)
        await storage.store(session, when=when)
        await self.advance(self.unit)

        assert await is_gone(storage, session)

    async def test_a_far_deadline_leaves_the_ttl_alone(self) -> None:
        """An idle session ends with its TTL, however far its deadline."""
        storage = await self.open(ttl=self.ttl)
        session = new_session(expires_at=datetime.max.replace(tzinfo=UTC))
        await storage.store(session)

        await self.advance(self.ttl)

        assert await is_gone(storage, session)

    @pytest.mark.parametrize("when", OVERWRITES)
    async def test_a_deadline_can_be_put_off(self, when: When) -> None:
        """What counts is the `expires_at` that was stored last, or that there is none."""
        storage = await self.open(ttl=self.ttl)
        later, never = (
            new_session(expires_at=self.now() + timedelta(seconds=2 * self.unit)) for _ in range(2)
        )
        for session in (later, never):
            await storage.store(session)
        later.expires_at = self.now() + timedelta(seconds=9 * self.unit)
        never.expires_at = None
        for session in (later, never):
            await storage.store(session, when=when)

        await self.advance(2 * self.unit)

        assert not await is_gone(storage, later)
        assert not await is_gone(storage, never)

    @pytest.mark.parametrize("when", OVERWRITES)
    async def test_a_deadline_can_be_brought_forward(self, when: When) -> None:
        """A session that had no deadline ends at the one it is given."""
        storage = await self.open(ttl=self.ttl)
        session = new_session()
        await storage.store(session)
        session.expires_at = self.now() + timedelta(seconds=self.unit)
        await storage.store(session, when=when)

        await self.advance(self.unit)

        assert await is_gone(storage, session)

    @pytest.mark.parametrize("when", list(When), ids=lambda when: when.name)
    @pytest.mark.parametrize("year", [1, 1969, 2001])
    async def test_what_is_stored_past_its_deadline_is_absent_at_once(
        self, year: int, when: When
    ) -> None:
        """Such a write succeeds, stamps a revision, and ends the session."""
        storage = await self.open()
        session = new_session()
        if when is not When.ABSENT:
            await storage.store(session)
        before = session.revision
        session.expires_at = datetime(year, 1, 1, tzinfo=UTC)

        await storage.store(session, when=when)

        assert session.revision not in ("", before)
        assert await is_gone(storage, session)
        assert await storage.delete(session.id) is False

    @pytest.mark.parametrize("state", ABSENT_STATES)
    async def test_sweeping_makes_no_difference_to_the_dead(self, state: str) -> None:
        """What was absent before a sweep is absent after it."""
        storage = await self.open(ttl=self.ttl)
        session = await absent(self, storage, state)

        await storage.delete_expired()

        assert await is_gone(storage, session)
        assert await storage.delete(session.id) is False

    async def test_sweeping_makes_no_difference_to_the_living(self) -> None:
        """A sweep neither removes nor renews a session that can be loaded."""
        storage = await self.open(ttl=self.ttl)
        used, unused = new_session(), new_session()
        deadline = self.now() + timedelta(seconds=9 * self.unit)
        for session in (used, unused):
            session.expires_at = deadline
            await storage.store(session)

        await self.advance(self.ttl - self.unit)
        await storage.delete_expired()
        assert not await is_gone(storage, used)
        await self.advance(self.unit)

        assert await is_gone(storage, unused)

    async def test_a_second_sweep_finds_nothing(self) -> None:
        """The first one has left nothing to count."""
        storage = await self.open(ttl=self.ttl)
        await storage.store(new_session())
        await self.advance(self.ttl)
        await storage.delete_expired()

        assert await storage.delete_expired() == 0

    async def test_sweeping_before_a_moment_spares_what_was_used_since(self) -> None:
        """Used means stored or loaded."""
        storage = await self.open(ttl=self.ttl)
        loaded, stored = new_session(), new_session()
        await storage.store(loaded)
        await self.advance(self.unit)
        since = self.now()
        await self.advance(self.unit)
        await storage.load(loaded.id)
        await storage.store(stored)

        await storage.delete_expired(since)

        assert not await is_gone(storage, loaded)
        assert not await is_gone(storage, stored)

    async def test_sweeping_before_a_naive_moment_is_refused(self) -> None:
        """It could mean any of two dozen moments, so nothing is removed."""
        storage = await self.open()
        session = new_session()
        await storage.store(session)

        with pytest.raises(InvalidSession):
            await storage.delete_expired(datetime.max)  # noqa: DTZ901 - that is the point

        assert not await is_gone(storage, session)
