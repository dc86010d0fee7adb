"""Tests of the index of principals under concurrent, cancelled and rotating callers."""

import time
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from ..manager import SessionManager
from ..session import Session
from ..storage import IndexedStorage, When
from ._concurrency import ROUNDS, cancelled_after, together
from ._harness import Harness, is_gone, new_session
from ._indexing import ALICE, Indexing, listed, stored
from ._storing import CREATES

_graces = pytest.mark.parametrize("grace", [10.0, 0], ids=["grace", "no-grace"])


class _Clock:
    """The clock of the storages, for a manager."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return self._harness.now().timestamp()


class IndexRaces(Indexing):
    """Races and cancellations, over the storages that `_views` returns."""

    def _manager(self, storage: IndexedStorage[Any], grace: float = 10.0) -> SessionManager[Any]:
        return SessionManager(storage, grace=grace, clock=_Clock(self))

    async def test_list_is_right_during_writes(self) -> None:
        """It has each session that was there before it began, whole, and none deleted before."""
        views = await self._indexes()
        kept = new_session(principal=ALICE, data=-1, metadata={"turn": "-1"})
        await views[0].store(kept)
        stored, deleted = {kept.digest}, set[str]()
        problems: list[str] = []

        async def save() -> None:
            for turn in range(ROUNDS):
                await checkpoint()
                kept.data, kept.metadata["turn"] = turn, str(turn)
                await views[0].store(kept, when=When.UNCHANGED)

        async def create_and_delete(number: int) -> None:
            for turn in range(5):
                session = new_session(principal=ALICE, data=turn, metadata={"turn": str(turn)})
                await views[number % len(views)].store(session, when=When.ABSENT)
                stored.add(session.digest)
                await checkpoint()
                if turn % 2:
                    stored.remove(session.digest)
                    await views[-1].delete(session.id)
                    deleted.add(session.digest)

        async def look() -> None:
            for _ in range(ROUNDS):
                before, gone = set(stored), set(deleted)
                infos = await views[-1].list(ALICE)
                found = {info.digest for info in infos}
                problems.extend(before.intersection(stored) - found)
                problems.extend(gone & found)
                problems.extend(i.digest for i in infos if i.metadata["turn"] != str(i.data))

        creators = (partial(create_and_delete, number) for number in range(4))
        assert await together(save, look, *creators) == [None] * 6

        assert problems == []
        assert await listed(views[0], ALICE) == stored

    @pytest.mark.parametrize("when", CREATES)
    async def test_cancelled_store_leaves_no_unlisted_session(self, when: When) -> None:
        """A store is cancelled at each point. A session that can be loaded is then listed."""
        views = await self._indexes()
        for delay in range(ROUNDS):
            session = new_session(principal=ALICE)

            await cancelled_after(delay, partial(views[0].store, session, when=when))

            if not await is_gone(views[0], session):
                # The number may differ: earlier stores may still be in flight.
                infos = await views[-1].list(ALICE)
                assert session.digest in [info.digest for info in infos]

    async def test_session_is_revoked_once(self) -> None:
        """Of concurrent revocations, one counts a session."""
        views = await self._indexes()
        for _ in range(ROUNDS):
            sessions = await stored(views[0], ALICE, 4)
            one = [partial(view.revoke, ALICE, sessions[0].digest) for view in views * 2]
            every = [partial(view.revoke_all, ALICE) for view in views * 2]

            results = await together(*one, *every)

            assert sum(each for each in results if isinstance(each, int)) == len(sessions)
            assert await listed(views[0], ALICE) == set()

    async def test_save_in_flight_does_not_survive(self) -> None:
        """A session that existed when `revoke_all` began is gone, although it is being saved."""
        views = await self._indexes()
        for delay in range(ROUNDS):
            sessions = await stored(views[0], ALICE, 4)

            async def save(session: Session[Any], when: When) -> None:
                for _ in range(ROUNDS):
                    await checkpoint()  # so that they overlap also where verbs do not yield
                    await views[-1].store(session, when=when)

            async def revoke(delay: int = delay) -> None:
                for _ in range(delay):
                    await checkpoint()
                await views[0].revoke_all(ALICE)

            whens = [When.PRESENT, When.UNCHANGED] * 2
            await together(*(map(partial, [save] * 4, sessions, whens)), revoke)

            assert all([await is_gone(views[0], session) for session in sessions])
            assert await listed(views[-1], ALICE) == set()

    async def test_concurrently_created_session_is_revoked_or_listed(self) -> None:
        """A session that is created during `revoke_all` is in the next list if it can be loaded."""
        views = await self._indexes()
        for delay in range(ROUNDS):
            await stored(views[0], ALICE, 2)
            sessions = [new_session(principal=ALICE) for _ in range(4)]

            async def create(
                number: int, delay: int = delay, sessions: list[Session[Any]] = sessions
            ) -> None:
                for _ in range(number * delay // 4):
                    await checkpoint()
                await views[-1].store(sessions[number], when=When.ABSENT)

            creators = (partial(create, number) for number in range(4))
            await together(partial(views[0].revoke_all, ALICE), *creators)

            alive = {each.digest for each in sessions if not await is_gone(views[0], each)}
            assert await listed(views[0], ALICE) == alive
            await views[0].revoke_all(ALICE)

    async def test_cancelled_revoke_all_can_be_repeated(self) -> None:
        """Each session is then deleted or listed, and a second call deletes the rest."""
        views = await self._indexes()
        for delay in range(ROUNDS):
            sessions = await stored(views[0], ALICE, 4)

            await cancelled_after(delay, partial(views[0].revoke_all, ALICE))
            await views[-1].revoke_all(ALICE)

            assert all([await is_gone(views[0], session) for session in sessions])
            assert await listed(views[0], ALICE) == set()

    @_graces
    async def test_rotation_keeps_one_session_listed(self, grace: float) -> None:
        """After each rotation, the list has the session once, under its new id."""
        views = await self._indexes()
        sessions = self._manager(views[0], grace)
        session = await sessions.create(data=1)

        def sign_in(session: Session[Any]) -> None:
            session.principal = ALICE

        for change in (sign_in, None, None):
            session = await sessions.rotate(session, change)

            assert await listed(views[-1], ALICE) == {session.digest}

    @_graces
    async def test_rotation_in_flight_does_not_survive(self, grace: float) -> None:
        """`revoke_all` ends each session that existed when it began, under its new ids too."""
        views = await self._indexes()
        here, there = self._manager(views[0], grace), self._manager(views[-1], grace)
        for delay in range(ROUNDS):
            ids: list[str] = []
            revoked = anyio.Event()

            async def rotate(
                session: Session[Any], ids: list[str] = ids, revoked: anyio.Event = revoked
            ) -> None:
                ids.append(session.id)
                for _ in range(ROUNDS):
                    await checkpoint()
                    too_late = revoked.is_set()
                    session = await here.rotate(session)
                    ids.append(session.id)
                    assert not too_late

            async def revoke(delay: int = delay, revoked: anyio.Event = revoked) -> None:
                for _ in range(delay):
                    await checkpoint()
                await there.revoke_all(ALICE)
                revoked.set()

            sessions = [await here.create(principal=ALICE) for _ in range(2)]
            rotations = (partial(rotate, session) for session in sessions)
            *_, end = await together(*rotations, revoke)

            assert end is None
            assert all([await is_gone(views[0], Session[Any](id=id)) for id in ids])
            assert await listed(views[0], ALICE) == set()
