"""Live resources over a real server, which announces changes."""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from aiosessions import NearCache, Session, SessionManager, SessionNotFound, SessionResources
from tests.support.clients import Storage, storage_at
from tests.support.servers import Server


@pytest.mark.every_loop
@pytest.mark.parametrize("cached", [False, True])
async def test_deletion_elsewhere_closes_the_resource(server: Server, *, cached: bool) -> None:
    """Unused or used, without waiting for a check."""
    closed: asyncio.Queue[str] = asyncio.Queue()

    async def open(session: Session[Any]) -> str:
        return session.id

    async with storage_at(server.url) as there, storage_at(server.url) as here:
        storage = NearCache(here, max_staleness=25) if cached else here
        sessions = SessionManager(storage)
        async with (
            SessionResources(sessions, open, closed.put, max_open=2, idle=30) as resources,
            asyncio.timeout(20),
        ):
            while not await _announced(server):
                await sessions.count("nobody")
            first, second = await sessions.create(), await sessions.create()
            async with resources.use(first.id):
                pass
            await there.delete(first.id)
            assert await closed.get() == first.id
            use = resources.use(second.id, cancel=True)
            with pytest.raises(SessionNotFound):
                await _delete_within(use, there, second.id)
            assert await closed.get() == second.id
        await storage.aclose()


async def _delete_within(
    block: AbstractAsyncContextManager[Any], storage: Storage, id: str
) -> None:
    async with block:
        await storage.delete(id)
        await asyncio.Event().wait()


async def _announced(server: Server) -> bool:
    """Whether someone has subscribed to the changes."""

    def subscribed() -> bool:
        with server.client() as client:
            return bool(client.pubsub_channels())

    return await asyncio.to_thread(subscribed)
