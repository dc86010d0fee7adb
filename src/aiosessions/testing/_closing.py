"""Tests of closing: every verb then raises, and nothing stays behind."""

import gc
import warnings
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from ..errors import SessionError, StorageClosed
from ..session import Session, new_session_id
from ..storage import Storage, When
from ._harness import Harness, new_session, unchanged

_Verb = Callable[[Storage[Any], Session[Any]], Coroutine[Any, Any, object]]


async def _store(when: When, storage: Storage[Any], session: Session[Any]) -> None:
    await storage.store(session, when=when)


_VERBS: dict[str, _Verb] = {
    **{f"store-{when.name}": partial(_store, when) for when in When},
    "load": lambda storage, session: storage.load(session.id),
    "delete": lambda storage, session: storage.delete(session.id),
    "delete_expired": lambda storage, _: storage.delete_expired(),
}


async def _load_an_unknown_id(storage: Storage[Any]) -> None:
    with suppress(SessionError):
        await storage.load(new_session_id())


class Closing(Harness):
    """`aclose` and `async with`."""

    @pytest.mark.parametrize("verb", _VERBS.values(), ids=_VERBS)
    async def test_closed_storage_refuses_every_verb(self, verb: _Verb) -> None:
        """Each verb raises `StorageClosed` and does not change the caller's session."""
        storage = await self.open()
        session = new_session()
        await storage.store(session)

        await storage.aclose()

        with unchanged(session), pytest.raises(StorageClosed):
            await verb(storage, session)

    async def test_unused_storage_can_be_closed(self) -> None:
        """`aclose` needs no verb before it."""
        storage = await self.open()

        await storage.aclose()

        with pytest.raises(StorageClosed):
            await storage.delete_expired()

    async def test_closing_twice_is_fine(self) -> None:
        """Calls of `aclose` may follow each other or run at the same time."""
        storage = await self.open()
        await storage.store(new_session())

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(storage.aclose)
        await storage.aclose()

        with pytest.raises(StorageClosed):
            await storage.store(new_session())

    async def test_leaving_the_context_closes(self) -> None:
        """`async with` returns the storage itself, and closes it, also after an error."""
        storage = await self.open()
        session = new_session()

        with suppress(ZeroDivisionError):
            async with storage as entered:
                assert entered is storage
                await storage.store(session)
                raise ZeroDivisionError
        with pytest.raises(StorageClosed):
            await storage.load(session.id)

    async def test_closing_ends_verbs_in_flight(self) -> None:
        """Each verb in flight returns, or raises `StorageClosed` or `StorageUnavailable`."""
        storage = await self.open()
        sessions = [new_session(data=number) for number in range(20)]
        for session in sessions:
            await storage.store(session)
        loaded: dict[str, Session[Any]] = {}
        refused: list[SessionError] = []

        async def load(session: Session[Any]) -> None:
            try:
                loaded[session.id] = await storage.load(session.id)
            except SessionError as error:
                refused.append(error)

        async with anyio.create_task_group() as tasks:
            for session in sessions:
                tasks.start_soon(load, session)
            await checkpoint()
            await storage.aclose()

        assert len(loaded) + len(refused) == len(sessions)
        assert all(session.id == id for id, session in loaded.items())
        assert {error.status for error in refused} <= {StorageClosed.status}

    def test_closing_during_verbs_leaks_nothing(self) -> None:
        """No connection or file stays open after verbs in flight, connecting ones included."""
        gc.freeze()  # leave out the objects of other tests
        try:
            with warnings.catch_warnings(record=True) as leaks:
                warnings.simplefilter("always", ResourceWarning)
                self.run(self._close_during_verbs)
                gc.collect()
        finally:
            gc.unfreeze()

        assert [str(leak.message) for leak in leaks] == []

    async def _close_during_verbs(self) -> None:
        for delay in (0, 1, 2, 3, 5, 8, 13, 21, 34):
            storage = await self.open()
            async with anyio.create_task_group() as tasks:
                for _ in range(5):
                    tasks.start_soon(_load_an_unknown_id, storage)
                for _ in range(delay):
                    await checkpoint()
                await storage.aclose()

    async def test_closing_leaves_no_task_behind(self) -> None:
        """Every task that the storage started has ended when `aclose` returns."""
        before = {task.id for task in anyio.get_running_tasks()}
        storage = await self.open()
        for _ in range(3):
            await storage.store(new_session())

        await storage.aclose()

        assert {task.id for task in anyio.get_running_tasks()} - before == set()
