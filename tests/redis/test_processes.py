"""Several replicas on one server: real processes, and hundreds of races between storages.

AIOSESSIONS_RACES multiplies the number of races.
"""

import asyncio
import contextlib
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest

from aiosessions import (
    Session,
    SessionConflict,
    SessionError,
    SessionManager,
    SessionNotFound,
)
from tests.support.clients import Storage, storage_at
from tests.support.servers import Server

_WORKER = Path(__file__).with_name("incrementing_worker.py")
_PROCESSES = 2
_INCREMENTS = 200

_REPLICAS = 4
_RACES = 500 * int(os.environ.get("AIOSESSIONS_RACES", "1"))
_AT_ONCE = 250


@pytest.fixture
async def replicas(valkey: Server) -> AsyncIterator[list[Storage]]:
    """Storages on one empty server, each with another connection."""
    valkey.flush()
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(storage_at(valkey.url, ttl=600))
            for _ in range(_REPLICAS)
        ]


async def in_batches(race: Callable[[random.Random], Awaitable[str]]) -> Counter[str]:
    """Run races, many at a time, and count their results."""
    rng = random.Random(20260101)  # noqa: S311 - not for secrets
    ends: Counter[str] = Counter()
    for _ in range(_RACES // _AT_ONCE):
        ends.update(await asyncio.gather(*(race(rng) for _ in range(_AT_ONCE))))
    return ends


async def soon(
    rng: random.Random, verb: Awaitable[Any], *, after: Storage | None = None, trips: int = 0
) -> Any:
    """Call a verb after a few turns of the event loop, and return its result or its error.

    Args:
        rng: Draws the delay.
        verb: The call.
        after: A storage for round trips before the call, to give the others a head start.
        trips: The maximum number of these round trips.
    """
    for _ in range(rng.randrange(4)):
        await asyncio.sleep(0)
    for _ in range(rng.randint(0, trips)):
        assert after is not None
        with contextlib.suppress(SessionNotFound):
            await after.load("nobody")
    try:
        return await verb
    except SessionError as error:
        return error


async def test_increments_of_several_processes_all_count(valkey: Server) -> None:
    """No update is lost, and none is made twice."""
    async with storage_at(valkey.url, ttl=600) as storage, SessionManager(storage) as manager:
        session = await manager.create(data=0)
        with ExitStack() as stack:
            workers: list[subprocess.Popen[str]] = []
            for _ in range(_PROCESSES):
                arguments = [valkey.url, session.id, str(_INCREMENTS // _PROCESSES)]
                worker = subprocess.Popen(  # noqa: ASYNC220, S603 - our own; nothing else runs here
                    [sys.executable, _WORKER, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                stack.enter_context(worker)
                stack.callback(worker.kill)
                workers.append(worker)
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "ready\n"
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
            done = [int(worker.communicate(timeout=60)[0]) for worker in workers]

        assert sum(done) == _INCREMENTS
        assert (await manager.get(session.id)).data == _INCREMENTS


async def test_rotating_races_deleting(replicas: list[Storage], valkey: Server) -> None:
    """The session is deleted, or rotated to an id that the caller knows; never half of both."""
    managers = [SessionManager(storage, grace=600) for storage in replicas]

    async def race(rng: random.Random) -> str:
        session = await managers[0].create(data="old")
        copies = await asyncio.gather(*(manager.get(session.id) for manager in managers[:3]))
        deleted, saved, rotated = await asyncio.gather(
            soon(rng, managers[3].delete(session.id), after=replicas[3], trips=6),
            soon(rng, managers[1].save(copies[1]), after=replicas[1], trips=6),
            soon(rng, managers[2].rotate(copies[2])),
        )

        assert deleted is True
        with pytest.raises(SessionNotFound):
            await managers[0].get(session.id)
        if isinstance(rotated, Session):  # before it was deleted
            assert isinstance(saved, SessionError)
            assert (await managers[0].get(rotated.id)).data == "old"
            return "rotated"
        assert isinstance(rotated, SessionConflict | SessionNotFound)
        return "saved" if saved is None else "deleted"

    ends = await in_batches(race)

    assert ends.keys() >= {"rotated", "deleted"}, ends
    with valkey.client() as direct:
        assert direct.dbsize() == ends["rotated"]
