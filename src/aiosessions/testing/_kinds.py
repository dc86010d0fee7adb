"""The contracts: the one for every storage, and those for some kinds of storage."""

from datetime import timedelta
from typing import Any

import pytest

from ..codec import Codec
from ..errors import SessionConflict, SessionError, SessionNotFound, StorageUnavailable
from ..session import new_session_id
from ..storage import Storage, When
from ._closing import Closing
from ._concurrency import Concurrency
from ._expiring import Expiring
from ._harness import StorageFactory, content, is_gone, new_session, unchanged
from ._index_races import IndexRaces
from ._refusing import Refusing, texts_of
from ._revoking import Revoking
from ._storing import WHENS, Storing, begin


class StorageContract(Storing, Expiring, Refusing, Closing, Concurrency):
    """The contract of every storage. The module's docstring shows how to run it."""


class SharedStorageContract(StorageContract):
    """The contract of storages that several replicas share.

    The storages that one test makes must be views of one backend.
    """

    async def _views(
        self, *, ttl: float = 60.0, codec: Codec[Any] | None = None
    ) -> list[Storage[Any]]:
        return [await self.open(ttl=ttl, codec=codec) for _ in range(2)]

    async def test_replicas_see_each_others_writes(self) -> None:
        """A write is visible at once, with its revision, so either replica can go on from it."""
        here, there = await self._views()
        session = new_session(data=1)

        await here.store(session, when=When.ABSENT)
        loaded = await there.load(session.id)
        assert (content(loaded), loaded.revision) == (content(session), session.revision)
        loaded.data = 2
        await there.store(loaded, when=When.UNCHANGED)

        assert (await here.load(session.id)).data == 2
        with unchanged(session), pytest.raises(SessionConflict):
            await here.store(session, when=When.UNCHANGED)

    async def test_replicas_see_each_others_deletes(self) -> None:
        """A session that one replica deleted is neither found nor revived by the other."""
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
        """A load or a store through one replica renews the TTL for the other."""
        here, there = await self.open(ttl=self.ttl), await self.open(ttl=self.ttl)
        loaded, stored = new_session(), new_session()
        for session in (loaded, stored):
            await here.store(session, when=When.ABSENT)

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
    """The contract of storages that keep expired sessions until `delete_expired` removes them."""

    async def test_sweep_counts_removed_sessions(self) -> None:
        """Each session that is idle or past its deadline counts once, and no live session."""
        storage = await self.open(ttl=self.ttl)
        idle, ended, live = ([new_session() for _ in range(count)] for count in (2, 3, 4))
        for session in idle:
            await storage.store(session, when=When.ABSENT)
        await self.advance(self.ttl - self.unit)
        for session in ended:
            session.expires_at = self.now() + timedelta(seconds=self.unit)
        for session in ended + live:
            await storage.store(session, when=When.ABSENT)
        await self.advance(self.unit)

        assert await storage.delete_expired() == len(idle + ended)

        assert await storage.delete_expired() == 0
        assert not any([await is_gone(storage, session) for session in live])
        assert all([await is_gone(storage, session) for session in idle + ended])

    @pytest.mark.parametrize("when", WHENS)
    async def test_store_past_the_deadline_leaves_nothing_to_sweep(self, when: When) -> None:
        """A session that is stored past its `expires_at` is removed, not kept as expired."""
        storage = await self.open(ttl=self.ttl)
        session = await begin(storage, when)
        session.expires_at = self.now() - timedelta(seconds=1)

        await storage.store(session, when=when)

        assert await storage.delete_expired() == 0
        assert await storage.delete_expired(self.now() + timedelta(days=1)) == 0

    async def test_sweep_before_a_moment_removes_unused_sessions(self) -> None:
        """A sweep removes and counts the sessions that were last used before the moment."""
        storage = await self.open(ttl=self.ttl)
        unused, loaded, stored = new_session(), new_session(), new_session()
        for session in (unused, loaded, stored):
            await storage.store(session, when=When.ABSENT)
        await self.advance(self.tick)
        moment = self.now()
        await storage.load(loaded.id)
        await storage.store(stored, when=When.UNCHANGED)

        assert await storage.delete_expired(moment) == 1

        assert await is_gone(storage, unused)
        assert not await is_gone(storage, loaded)
        assert not await is_gone(storage, stored)

    async def test_swept_session_is_deleted(self) -> None:
        """It can be created anew, and not overwritten."""
        storage = await self.open(ttl=self.ttl)
        session = await begin(storage, When.ALWAYS)
        await self.advance(self.tick)
        await storage.delete_expired(self.now())

        with unchanged(session), pytest.raises(SessionNotFound):
            await storage.store(session, when=When.UNCHANGED)
        await storage.store(session, when=When.ABSENT)

        assert not await is_gone(storage, session)


class SelfExpiringStorageContract(StorageContract):
    """The contract of storages with a backend that removes expired sessions by itself."""

    async def test_sweep_does_nothing(self) -> None:
        """`delete_expired` returns 0 and removes nothing, with and without an argument."""
        storage = await self.open(ttl=self.ttl)
        expired, live = new_session(), new_session()
        await storage.store(expired)
        await self.advance(self.ttl)
        await storage.store(live)
        await self.advance(self.unit)

        assert await storage.delete_expired() == 0
        assert await storage.delete_expired(self.now()) == 0
        assert not await is_gone(storage, live)


class IndexedStorageContract(Revoking, IndexRaces, StorageContract):
    """The contract of storages that find the sessions of a principal: of an `IndexedStorage`."""


class RemoteStorageContract(StorageContract):
    """The contract of storages with a backend that can be out of reach.

    It needs a second fixture, `make_unreachable_storage`: a factory like `make_storage` of storages
    with a backend that does not answer or refuses the connection.
    """

    @pytest.fixture(autouse=True)
    def _given_too(self, make_unreachable_storage: StorageFactory) -> None:
        self._make_unreachable = make_unreachable_storage

    async def _open_unreachable(self) -> Storage[Any]:
        return await self._opened.enter_async_context(self._make_unreachable(ttl=60.0, codec=None))

    async def test_outage_is_not_an_absent_session(self) -> None:
        """`load` and `delete` raise `StorageUnavailable` (503), not `SessionNotFound` (404)."""
        storage = await self._open_unreachable()

        with pytest.raises(StorageUnavailable):
            await storage.load(new_session_id())
        with pytest.raises(StorageUnavailable):
            await storage.delete(new_session_id())

    @pytest.mark.parametrize("when", WHENS)
    async def test_store_fails_in_an_outage(self, when: When) -> None:
        """It raises `StorageUnavailable`, and the caller's session does not change."""
        storage = await self._open_unreachable()
        session = new_session(revision="of an earlier write")

        with unchanged(session), pytest.raises(StorageUnavailable):
            await storage.store(session, when=when)

    async def test_only_writes_are_in_doubt(self) -> None:
        """`in_doubt` is a bool on each `StorageUnavailable`, and False on that of a load."""
        storage = await self._open_unreachable()

        with pytest.raises(StorageUnavailable) as store:
            await storage.store(new_session())
        with pytest.raises(StorageUnavailable) as load:
            await storage.load(new_session_id())

        assert isinstance(store.value.in_doubt, bool)
        assert load.value.in_doubt is False

    async def test_outage_errors_hold_no_secrets(self) -> None:
        """No id and no content is in an error, nor in a driver's error that it is chained to."""
        storage = await self._open_unreachable()
        secret = "hush" + new_session_id()
        session = new_session(data=secret, principal=secret)
        session.id = secret
        errors: list[SessionError] = []

        for when in When:
            with pytest.raises(StorageUnavailable) as raised:
                await storage.store(session, when=when)
            errors.append(raised.value)
        with pytest.raises(StorageUnavailable) as raised:
            await storage.load(secret)
        errors.append(raised.value)

        assert [text for error in errors for text in texts_of(error) if secret in text] == []

    async def test_storage_closes_in_an_outage(self) -> None:
        """`aclose` needs no backend."""
        storage = await self._open_unreachable()
        with pytest.raises(StorageUnavailable):
            await storage.load(new_session_id())

        await storage.aclose()
