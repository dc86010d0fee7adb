"""The contracts: what every storage promises, and what some kinds of storage promise besides."""

from typing import Any

import pytest

from ..errors import SessionConflict, SessionError, SessionNotFound, StorageUnavailable
from ..session import new_session_id
from ..storage import Storage, When
from ._closing import Closing
from ._concurrency import Concurrency
from ._expiring import Expiring
from ._harness import StorageFactory, content, is_gone, new_session, unchanged
from ._refusing import Refusing, everything_said
from ._storing import WHENS, Storing, begin


class StorageContract(Storing, Expiring, Refusing, Closing, Concurrency):
    """What every storage must do. See the module's docstring for how to run it."""


class SharedStorageContract(StorageContract):
    """What storages must do that several replicas share: all of it holds across two of them.

    Storages that one test makes must be views of one backend.
    """

    async def _views(self) -> list[Storage[Any]]:
        return [await self.open(), await self.open()]

    async def test_replicas_see_each_others_writes(self) -> None:
        """At once, with the revision, so that either can go on where the other left off."""
        here, there = await self._views()
        session = new_session(data=1)

        await here.store(session, when=When.ABSENT)
        theirs = await there.load(session.id)
        assert (content(theirs), theirs.revision) == (content(session), session.revision)
        theirs.data = 2
        await there.store(theirs, when=When.UNCHANGED)

        assert (await here.load(session.id)).data == 2
        with unchanged(session), pytest.raises(SessionConflict):
            await here.store(session, when=When.UNCHANGED)

    async def test_replicas_see_each_others_deletes(self) -> None:
        """What one has deleted, the other neither finds nor brings back."""
        here, there = await self._views()
        session = new_session()
        await here.store(session)
        await there.load(session.id)

        assert await there.delete(session.id) is True

        assert await here.delete(session.id) is False
        for when in (When.PRESENT, When.UNCHANGED):
            with unchanged(session), pytest.raises(SessionNotFound):
                await here.store(session, when=when)
        with pytest.raises(SessionNotFound):
            await here.load(session.id)

    async def test_use_on_one_replica_counts_on_all(self) -> None:
        """A load or store through one renews the TTL for the other."""
        here, there = await self.open(ttl=self.ttl), await self.open(ttl=self.ttl)
        loaded, stored = new_session(), new_session()
        for session in (loaded, stored):
            await here.store(session)

        await self.advance(self.ttl - self.unit)
        await there.load(loaded.id)
        await there.store(stored, when=When.UNCHANGED)
        await self.advance(self.ttl - self.unit)

        assert not await is_gone(here, loaded)
        assert not await is_gone(here, stored)

    async def test_closing_one_replica_leaves_the_others(self) -> None:
        """Sessions belong to the backend, not to the storage that wrote them."""
        here, there = await self._views()
        session = new_session()
        await here.store(session)

        await here.aclose()

        assert not await is_gone(there, session)
        await there.store(session, when=When.UNCHANGED)


class SweptStorageContract(StorageContract):
    """What storages must do that need `delete_expired` to be rid of the dead."""

    async def test_a_sweep_counts_what_it_removes(self) -> None:
        """Idle or past the deadline, each dead session counts once, and no living one."""
        storage = await self.open(ttl=self.ttl)
        idle, dead, living = ([new_session() for _ in range(count)] for count in (2, 3, 4))
        deadline = self.now()
        for session in idle:
            await storage.store(session)
        await self.advance(self.ttl)
        for session in dead:
            session.expires_at = deadline
        for session in dead + living:
            await storage.store(session)

        assert await storage.delete_expired() == len(idle + dead)

        assert await storage.delete_expired() == 0
        assert not any([await is_gone(storage, session) for session in living])
        assert all([await is_gone(storage, session) for session in idle + dead])

    async def test_a_sweep_before_a_moment_removes_what_was_not_used_since(self) -> None:
        """Alive or not: what was last stored or loaded before it goes, and is counted."""
        storage = await self.open(ttl=self.ttl)
        unused, loaded, stored = new_session(), new_session(), new_session()
        for session in (unused, loaded, stored):
            await storage.store(session)
        await self.advance(self.tick)
        moment = self.now()
        await storage.load(loaded.id)
        await storage.store(stored, when=When.UNCHANGED)

        assert await storage.delete_expired(moment) == 1

        assert await is_gone(storage, unused)
        assert not await is_gone(storage, loaded)
        assert not await is_gone(storage, stored)

    async def test_what_was_swept_up_is_deleted(self) -> None:
        """It can be created anew, and nothing else."""
        storage = await self.open(ttl=self.ttl)
        session = await begin(storage, When.ALWAYS)
        await self.advance(self.tick)
        await storage.delete_expired(self.now())

        with unchanged(session), pytest.raises(SessionNotFound):
            await storage.store(session, when=When.UNCHANGED)
        await storage.store(session, when=When.ABSENT)

        assert not await is_gone(storage, session)


class SelfExpiringStorageContract(StorageContract):
    """What storages must do whose backend expires sessions by itself."""

    async def test_there_is_nothing_to_sweep(self) -> None:
        """`delete_expired` is 0, with whatever argument, and removes nothing."""
        storage = await self.open(ttl=self.ttl)
        dead, living = new_session(), new_session()
        await storage.store(dead)
        await self.advance(self.ttl)
        await storage.store(living)
        await self.advance(self.unit)

        assert await storage.delete_expired() == 0
        assert await storage.delete_expired(self.now()) == 0
        assert not await is_gone(storage, living)


class RemoteStorageContract(StorageContract):
    """What storages must do whose backend can be out of reach.

    Needs a fixture `make_unreachable_storage` besides: a factory like `make_storage` whose storages
    have a backend that does not answer, or cannot be connected to.
    """

    @pytest.fixture(autouse=True)
    def _given_too(self, make_unreachable_storage: StorageFactory) -> None:
        self._make_unreachable = make_unreachable_storage

    async def _open_unreachable(self) -> Storage[Any]:
        return await self._opened.enter_async_context(self._make_unreachable(ttl=60.0, codec=None))

    async def test_an_outage_is_not_an_absent_session(self) -> None:
        """Nothing is known, so `load` and `delete` raise `StorageUnavailable`: 503, not 404."""
        storage = await self._open_unreachable()

        with pytest.raises(StorageUnavailable):
            await storage.load(new_session_id())
        with pytest.raises(StorageUnavailable):
            await storage.delete(new_session_id())

    @pytest.mark.parametrize("when", WHENS)
    async def test_no_store_succeeds_in_an_outage(self, when: When) -> None:
        """`StorageUnavailable`, and the caller's session stays as it is."""
        storage = await self._open_unreachable()
        session = new_session(revision="of an earlier write")

        with unchanged(session), pytest.raises(StorageUnavailable):
            await storage.store(session, when=when)

    async def test_an_outage_does_not_tell_secrets(self) -> None:
        """No id and no content in what the errors of a driver say."""
        storage = await self._open_unreachable()
        hint = "hush" + new_session_id()
        session = new_session(data=hint, principal=hint)
        session.id = hint
        errors: list[SessionError] = []

        for when in When:
            with pytest.raises(StorageUnavailable) as raised:
                await storage.store(session, when=when)
            errors.append(raised.value)
        with pytest.raises(StorageUnavailable) as raised:
            await storage.load(hint)
        errors.append(raised.value)

        assert [text for error in errors for text in everything_said(error) if hint in text] == []

    async def test_a_storage_closes_in_an_outage(self) -> None:
        """Closing needs no backend."""
        storage = await self._open_unreachable()
        with pytest.raises(StorageUnavailable):
            await storage.load(new_session_id())

        await storage.aclose()
