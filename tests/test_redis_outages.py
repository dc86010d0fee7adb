"""`RedisStorage` while its server hangs or is away: every verb ends in time; then all is well."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import msgspec
import pytest

from aiosessions import (
    RedisStorage,
    Session,
    StorageUnavailable,
    When,
    new_session_id,
)
from tests.servers import Server, binaries, running

# What anything here may take that does not end in an error; nothing comes near it.
_PATIENCE = 20.0


@pytest.fixture(scope="module", params=binaries())
def fragile(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that may be paused and ended, as nobody else uses it."""
    with running(binaries()[request.param]) as server:
        yield server


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """Stop the process: connections stay open, and nothing comes back."""
    server.pause()
    try:
        yield
    finally:
        server.resume()


@contextmanager
def client_pause(server: Server) -> Iterator[None]:
    """Have the server itself hold back whatever writes, which is all that a storage does."""
    with server.client() as client:
        client.client_pause(60_000, all=False)
        try:
            yield
        finally:
            client.client_unpause()


def verbs(storage: RedisStorage[Any], session: Session[Any]) -> list[Any]:
    """One call of each verb."""
    return [
        storage.load(session.id),
        storage.delete(new_session_id()),
        *(storage.store(msgspec.structs.replace(session), when=when) for when in When),
    ]


@pytest.mark.parametrize("stop", [paused, client_pause])
async def test_a_server_that_hangs(fragile: Server, stop: Callable[..., Any]) -> None:
    """Every verb ends with `StorageUnavailable` within its timeout; afterwards all is well."""
    fragile.flush()
    async with RedisStorage[Any].from_url(fragile.url, ttl=60, timeout=0.25) as storage:
        session = Session[Any](id=new_session_id(), data=1)
        await storage.store(session)

        with stop(fragile):
            start = time.monotonic()
            with anyio.fail_after(_PATIENCE):
                results = await asyncio.gather(*verbs(storage, session), return_exceptions=True)
                for verb in verbs(storage, session):
                    results += await asyncio.gather(verb, return_exceptions=True)
            # Six at once, then one after another. 0.25 s each, and a machine may be slow.
            assert time.monotonic() - start < 7 * 0.25 + 5

        assert [type(result) for result in results] == [StorageUnavailable] * 12
        assert {str(result) for result in results} == {"the server did not answer in time"}
        await recovered(storage)
        assert (await storage.load(session.id)).data == 1


async def recovered(storage: RedisStorage[Any]) -> None:
    """Wait until the storage is at work again."""
    with anyio.fail_after(_PATIENCE):
        while True:
            try:
                session = Session[Any](id=new_session_id())
                await storage.store(session, when=When.ABSENT)
                assert await storage.load(session.id) == session
                assert await storage.delete(session.id) is True
            except StorageUnavailable:
                await anyio.sleep(0.01)
            else:
                return


async def test_a_server_that_hangs_from_the_start(fragile: Server) -> None:
    """Connecting is bounded, too; whoever comes when the server is back is served."""
    async with RedisStorage[Any].from_url(fragile.url, ttl=60, timeout=0.25) as storage:
        with paused(fragile), anyio.fail_after(_PATIENCE):
            session = Session[Any](id=new_session_id())
            results = await asyncio.gather(*verbs(storage, session), return_exceptions=True)

        assert [type(result) for result in results] == [StorageUnavailable] * 6
        await recovered(storage)


async def test_a_hanging_server_cannot_hold_up_closing(fragile: Server) -> None:
    """Closing needs no answer; nor does it leave anybody waiting for one."""
    async with RedisStorage[Any].from_url(fragile.url, ttl=60, timeout=10) as storage:
        with paused(fragile), anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:

                async def load() -> None:
                    with pytest.raises(Exception, match="closed"):
                        await storage.load("x")

                tasks.start_soon(load)
                await anyio.wait_all_tasks_blocked()
                await storage.aclose()


async def test_a_server_that_ends_and_comes_back(fragile: Server) -> None:
    """`StorageUnavailable` while it is away, whoever asks; then the same storage works again."""
    async with RedisStorage[Any].from_url(fragile.url, ttl=60) as storage:
        fragile.kill()
        try:
            session = Session[Any](id=new_session_id())
            with anyio.fail_after(_PATIENCE):
                for verb in verbs(storage, session):
                    with pytest.raises(StorageUnavailable):
                        await verb
        finally:
            fragile.start()
        await recovered(storage)
