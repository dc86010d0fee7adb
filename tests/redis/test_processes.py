"""Several replicas on one server: real processes, and thousands of races between storages."""

import asyncio
import contextlib
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
    RedisStorage,
    Session,
    SessionConflict,
    SessionError,
    SessionManager,
    SessionNotFound,
    When,
    new_session_id,
)
from aiosessions.manager import ROTATED_KEY
from tests.support.servers import Server

_WORKER = Path(__file__).with_name("incrementing_worker.py")
_PROCESSES = 4
_INCREMENTS = 1_000

_REPLICAS = 4
_RACES = 10_000
_ROTATIONS = 1_000
_AT_ONCE = 250

Storage = RedisStorage[Any]


@pytest.fixture
async def replicas(valkey: Server) -> AsyncIterator[list[Storage]]:
    """Storages on one empty server, each with another connection."""
    valkey.flush()
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(Storage.from_url(valkey.url, ttl=600))
            for _ in range(_REPLICAS)
        ]


async def in_batches(race: Callable[[random.Random], Awaitable[str]], races: int) -> Counter[str]:
    """Run races, many at a time, and count their results."""
    rng = random.Random(20260101)  # noqa: S311 - not for secrets
    ends: Counter[str] = Counter()
    for start in range(0, races, _AT_ONCE):
        count = min(_AT_ONCE, races - start)
        ends.update(await asyncio.gather(*(race(rng) for _ in range(count))))
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


def name(result: Any) -> str:
    """A short name for the result of a verb."""
    return type(result).__name__ if isinstance(result, SessionError) else str(result is not False)


async def test_increments_of_several_processes_all_count(valkey: Server) -> None:
    """No update is lost, and none is made twice."""
    async with Storage.from_url(valkey.url, ttl=600) as storage, SessionManager(storage) as manager:
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


async def test_no_save_outlives_a_delete(replicas: list[Storage]) -> None:
    """A deleted session stays deleted in thousands of races with saves."""

    async def race(rng: random.Random) -> str:
        first, second, third, fourth = rng.sample(replicas, 4)
        session = Session[Any](id=new_session_id(), data=0)
        await first.store(session, when=When.ABSENT)
        mine, theirs = await asyncio.gather(second.load(session.id), third.load(session.id))
        verbs = [
            first.delete(session.id),
            second.store(mine, when=When.UNCHANGED),
            third.store(theirs, when=rng.choice([When.PRESENT, When.UNCHANGED])),
            fourth.load(session.id),
        ]
        order = rng.sample(range(4), 4)
        results = dict(
            zip(order, await asyncio.gather(*(soon(rng, verbs[n]) for n in order)), strict=True)
        )

        assert results[0] is True
        assert {type(results[n]) for n in (1, 2)} <= {
            type(None),
            SessionConflict,
            SessionNotFound,
        }
        for storage in (first, fourth):
            with pytest.raises(SessionNotFound):
                await storage.load(session.id)
        return f"{name(results[1])} {name(results[2])}"

    ends = await in_batches(race, _RACES)

    assert ends.total() == _RACES
    assert len(ends) >= 3, ends  # otherwise the calls did not race


async def test_no_mutation_outlives_a_delete(replicas: list[Storage]) -> None:
    """A mutation that retries after a conflict does not, either."""
    managers = [SessionManager(storage) for storage in replicas]

    def increment(session: Session[Any]) -> None:
        session.data = (session.data or 0) + 1

    async def race(rng: random.Random) -> str:
        session = await managers[0].create(data=0)
        deleting = soon(rng, managers[0].delete(session.id), after=replicas[0], trips=6)
        mutations = [soon(rng, each.mutate(session.id, increment)) for each in managers[1:]]
        results = await asyncio.gather(*mutations, deleting)

        assert results.pop() is True
        assert {type(each) for each in results} <= {Session, SessionNotFound}
        with pytest.raises(SessionNotFound):
            await managers[0].get(session.id)
        return str(sum(isinstance(each, Session) for each in results))

    ends = await in_batches(race, _RACES // 10)

    assert len(ends) >= 2, ends


async def test_rotating_races_saving(replicas: list[Storage], valkey: Server) -> None:
    """One holder of the same revision wins; no saved data is lost."""
    managers = [SessionManager(storage, grace=600) for storage in replicas]

    async def race(rng: random.Random) -> str:
        session = await managers[0].create(data="old")
        copies = await asyncio.gather(*(manager.get(session.id) for manager in managers))
        copies[0].data = copies[1].data = "saved"
        copies[2].data = copies[3].data = "rotated"
        results = await asyncio.gather(
            soon(rng, managers[0].save(copies[0]), after=replicas[0], trips=6),
            soon(rng, managers[1].save(copies[1]), after=replicas[1], trips=6),
            soon(rng, managers[2].rotate(copies[2])),
            soon(rng, managers[3].rotate(copies[3])),
        )

        won = [each for each in results if not isinstance(each, SessionError)]
        assert len(won) == 1
        assert all(isinstance(each, SessionConflict) for each in results if each is not won[0])
        old = await managers[0].get(session.id)
        if won[0] is None:
            assert (old.data, ROTATED_KEY in old.metadata) == ("saved", False)
            return "saved"
        new = await managers[1].get(won[0].id)
        assert (new.data, ROTATED_KEY in new.metadata) == ("rotated", False)
        assert (old.data, ROTATED_KEY in old.metadata) == ("old", True)
        return "rotated"

    ends = await in_batches(race, _ROTATIONS)

    assert set(ends) == {"saved", "rotated"}
    with valkey.client() as direct:  # every session is known to a caller
        assert direct.dbsize() == _ROTATIONS + ends["rotated"]


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

    ends = await in_batches(race, _ROTATIONS)

    assert ends.keys() >= {"rotated", "deleted"}, ends
    with valkey.client() as direct:
        assert direct.dbsize() == ends["rotated"]
