"""Tests of concurrent and cancelled callers: races, lost updates and mixed-up replies."""

from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from ..errors import SessionConflict, SessionError, SessionExists, SessionNotFound
from ..session import Session, new_session_id
from ..storage import Storage, When
from ._harness import Harness, content, new_session

ROUNDS = 20
_INCREMENTS = 24


async def together(*actions: Callable[[], Awaitable[object]]) -> list[object]:
    """Run actions at once, and return the result or the `SessionError` of each."""
    results: list[object] = [None] * len(actions)

    async def act(number: int) -> None:
        try:
            results[number] = await actions[number]()
        except SessionError as error:
            results[number] = error

    async with anyio.create_task_group() as tasks:
        for number in range(len(actions)):
            tasks.start_soon(act, number)
    return results


async def cancelled_after(delay: int, verb: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Start a verb, and cancel it after `delay` turns of the event loop."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(verb)
        for _ in range(delay):
            await checkpoint()
        tasks.cancel_scope.cancel()


async def increment(storage: Storage[int], id: str) -> None:
    """Add one to a session's data by compare-and-set, and try again after a conflict.

    Each conflict is the success of another increment, so their number is bounded.
    """
    for _ in range(_INCREMENTS):
        session = await storage.load(id)
        await checkpoint()  # so that increments overlap also where verbs do not yield
        session.data += 1
        try:
            await storage.store(session, when=When.UNCHANGED)
        except SessionConflict:
            continue
        return
    raise AssertionError("a conflict without a write")


class Concurrency(Harness):
    """Races and cancellations, over the storages that `_views` returns."""

    async def test_one_of_many_unchanged_writes_wins(self) -> None:
        """The others raise `SessionConflict`, and the winner's write is stored."""
        views = await self._views()
        for _ in range(ROUNDS):
            session = new_session()
            await views[0].store(session)
            rivals = [await views[n % len(views)].load(session.id) for n in range(8)]
            for number, rival in enumerate(rivals):
                rival.data = number

            results = await together(
                *(
                    partial(views[n % len(views)].store, rival, when=When.UNCHANGED)
                    for n, rival in enumerate(rivals)
                )
            )

            winners = [n for n, result in enumerate(results) if result is None]
            assert len(winners) == 1
            losers = [result for result in results if result is not None]
            assert {type(error) for error in losers} == {SessionConflict}
            assert (await views[0].load(session.id)).data == rivals[winners[0]].data

    async def test_one_of_many_creators_wins(self) -> None:
        """The others raise `SessionExists`, and the winner's write is stored."""
        views = await self._views()
        for _ in range(ROUNDS):
            id = new_session_id()
            rivals = [Session[Any](id=id, data=number) for number in range(8)]

            results = await together(
                *(
                    partial(views[n % len(views)].store, rival, when=When.ABSENT)
                    for n, rival in enumerate(rivals)
                )
            )

            winners = [n for n, result in enumerate(results) if result is None]
            assert len(winners) == 1
            losers = [result for result in results if result is not None]
            assert {type(error) for error in losers} == {SessionExists}
            assert (await views[0].load(id)).data == rivals[winners[0]].data

    async def test_one_of_many_deletes_finds_the_session(self) -> None:
        """`delete` returns True to one caller only."""
        views = await self._views()
        for _ in range(ROUNDS):
            session = new_session()
            await views[0].store(session)

            results = await together(
                *(partial(views[n % len(views)].delete, session.id) for n in range(6))
            )

            assert sorted(map(repr, results)) == ["False"] * 5 + ["True"]

    async def test_concurrent_increments_all_count(self) -> None:
        """Compare-and-set in a loop loses no update."""
        views = await self._views()
        session = new_session(data=0)
        await views[0].store(session)

        results = await together(
            *(partial(increment, views[n % len(views)], session.id) for n in range(_INCREMENTS))
        )

        assert results == [None] * _INCREMENTS
        assert (await views[0].load(session.id)).data == _INCREMENTS

    @pytest.mark.parametrize("when", [When.PRESENT, When.UNCHANGED], ids=lambda when: when.name)
    async def test_no_save_outlives_a_delete(self, when: When) -> None:
        """The session is gone, whether the save or the delete comes first."""
        views = await self._views()
        for number in range(ROUNDS):
            session = new_session()
            await views[0].store(session)
            copy = await views[-1].load(session.id)
            save = partial(views[-1].store, copy, when=when)
            delete = partial(views[0].delete, session.id)

            results = await together(*((save, delete) if number % 2 else (delete, save)))

            assert True in results
            assert all(
                isinstance(result, SessionNotFound)
                for result in results
                if result not in (None, True)
            )
            with pytest.raises(SessionNotFound):
                await views[0].load(session.id)

    async def test_concurrent_callers_get_their_own_sessions(self) -> None:
        """Each of 50 callers sees its own last write."""
        views = await self._views()

        async def use(number: int) -> None:
            storage = views[number % len(views)]
            session = new_session(data=number)
            for turn in range(4):
                session.metadata["turn"] = str(turn)
                await storage.store(session)
                assert content(await storage.load(session.id)) == content(session)
            assert await storage.delete(session.id) is True

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(use, number)

    async def test_loads_see_whole_writes(self) -> None:
        """A load never mixes the data of one write with the metadata or revision of another."""
        views = await self._views()
        session = new_session(data=-1, metadata={"turn": "-1"})
        await views[0].store(session)
        revisions = {session.revision: -1}

        async def write() -> None:
            for turn in range(30):
                session.data, session.metadata["turn"] = turn, str(turn)
                await views[0].store(session)
                revisions[session.revision] = turn
                await checkpoint()

        async def read() -> list[Session[Any]]:
            seen: list[Session[Any]] = []
            for _ in range(30):
                seen.append(await views[-1].load(session.id))
                await checkpoint()
            return seen

        _, seen = await together(write, read)

        assert isinstance(seen, list)
        assert all(
            one.metadata["turn"] == str(one.data) and revisions.get(one.revision) == one.data
            for one in seen  # pyright: ignore[reportUnknownVariableType] - what `read` returned
        )

    @pytest.mark.parametrize("when", [When.ALWAYS, When.ABSENT], ids=lambda when: when.name)
    async def test_cancelled_store_writes_all_or_nothing(self, when: When) -> None:
        """It is cancelled at each point. A caller without an answer keeps the old revision."""
        storage = (await self._views())[0]
        for delay in range(ROUNDS):
            session = new_session(data="whole")
            returned: list[bool] = []

            async def store(
                session: Session[Any] = session, returned: list[bool] = returned
            ) -> None:
                await storage.store(session, when=when)
                returned.append(True)

            await cancelled_after(delay, store)

            assert bool(session.revision) == bool(returned)
            try:
                loaded = await storage.load(session.id)
            except SessionNotFound:
                assert not returned
                continue
            assert content(loaded) == content(session)
            await storage.store(loaded, when=When.UNCHANGED)

    async def test_cancelled_verb_mixes_up_no_replies(self) -> None:
        """After cancelled loads and deletes, every caller still gets its own session."""
        storage = (await self._views())[0]
        bystander = new_session(data="bystander")
        await storage.store(bystander)
        for delay in range(ROUNDS):
            session = new_session(data=delay)
            await storage.store(session)

            await cancelled_after(delay, partial(storage.load, session.id))
            assert content(await storage.load(bystander.id)) == content(bystander)
            assert content(await storage.load(session.id)) == content(session)

            await cancelled_after(delay, partial(storage.delete, session.id))
            assert content(await storage.load(bystander.id)) == content(bystander)
            await storage.delete(session.id)

    async def test_cancelling_a_caller_cancels_that_caller_only(self) -> None:
        """The loads beside a cancelled one return their own sessions."""
        storage = (await self._views())[0]
        sessions = [new_session(data=number) for number in range(20)]
        for session in sessions:
            await storage.store(session)

        for delay in range(ROUNDS):
            loaded: dict[int, Session[Any]] = {}
            scopes = [anyio.CancelScope() for _ in sessions]

            async def load(
                number: int,
                scope: anyio.CancelScope,
                loaded: dict[int, Session[Any]] = loaded,
            ) -> None:
                with scope:
                    loaded[number] = await storage.load(sessions[number].id)

            async with anyio.create_task_group() as tasks:
                for number, scope in enumerate(scopes):
                    tasks.start_soon(load, number, scope)
                for _ in range(delay):
                    await checkpoint()
                for scope in scopes[1::2]:
                    scope.cancel()

            assert set(range(0, 20, 2)) <= loaded.keys()
            assert all(
                content(session) == content(sessions[number]) for number, session in loaded.items()
            )
