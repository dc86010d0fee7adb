"""What each verb costs on the wire: commands and round trips, counted by a relay, exactly.

These are the structural facts that speed rests on. How fast it is has no place in a test; see
docs/benchmarks.md.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from aiosessions import (
    RedisStorage,
    Session,
    SessionManager,
    SessionNotFound,
    When,
    new_session_id,
)
from benchmarks.relay import Counts, Relay
from tests.servers import Server

# Long enough for all that is sent at once to have passed before the first reply can.
ONE_WAY = 0.005

Cost = tuple[int, dict[str, int]]
"""Round trips, and how often each command was sent."""


class Wire:
    """A storage behind a relay, and what its verbs cost.

    Attributes:
        storage: It has loaded, stored and deleted before: connected, and its scripts are known.
    """

    def __init__(self, storage: RedisStorage[Any], relay: Relay) -> None:
        self.storage = storage
        self.relay = relay

    async def stored(self) -> Session[Any]:
        """A session that the server has."""
        session = Session[Any](id=new_session_id(), data={"counter": 0})
        await self.storage.store(session)
        return session

    async def cost(self, *actions: Awaitable[object]) -> Cost:
        """What actions cost that are all begun at once."""
        self.relay.count()
        await asyncio.gather(*actions)
        return cost(self.relay.counts())


def cost(counts: Counts) -> Cost:
    """Round trips and commands."""
    return counts.turns, counts.commands


@pytest.fixture
async def wire(redis_or_valkey: Server) -> AsyncIterator[Wire]:
    """A storage with a warm connection through a relay, on each server there is."""
    async with opened(redis_or_valkey) as wire:
        await warm_up(wire.storage)
        yield wire


@asynccontextmanager
async def opened(server: Server) -> AsyncIterator[Wire]:
    """A storage that has not connected yet."""
    async with Relay("127.0.0.1", server.port) as relay:
        relay.delay = ONE_WAY
        url = f"redis://127.0.0.1:{relay.port}"
        storage: RedisStorage[Any] = RedisStorage.from_url(url, ttl=60.0)
        async with storage:
            yield Wire(storage, relay)


async def warm_up(storage: RedisStorage[Any]) -> None:
    """Use every command once."""
    session = Session[Any](id=new_session_id())
    await storage.store(session, when=When.ABSENT)
    await storage.load(session.id)
    await storage.delete(session.id)


async def test_load_is_one_command_and_one_round_trip(wire: Wire) -> None:
    """A load is one GETEX, which reads and renews."""
    session = await wire.stored()

    assert await wire.cost(wire.storage.load(session.id)) == (1, {"GETEX": 1})


async def test_the_server_counts_the_same(wire: Wire, redis_or_valkey: Server) -> None:
    """A load is one GETEX and nothing else by the server's own statistics, too."""
    session = await wire.stored()
    with redis_or_valkey.client() as client:
        client.config_resetstat()

        await wire.storage.load(session.id)

        executed: Any = client.info("commandstats")
    calls = {name: each["calls"] for name, each in executed.items()}
    assert calls.pop("cmdstat_getex") == 1
    assert not calls.keys() - {"cmdstat_config|resetstat", "cmdstat_info"}


async def test_load_of_an_absent_session_costs_the_same(wire: Wire) -> None:
    """That there is none is known after one round trip."""

    async def load() -> None:
        with pytest.raises(SessionNotFound):
            await wire.storage.load(new_session_id())

    assert await wire.cost(load()) == (1, {"GETEX": 1})


async def test_plain_store_is_one_set(wire: Wire) -> None:
    """Storing without a condition is one SET, with the TTL in it."""
    session = await wire.stored()

    assert await wire.cost(wire.storage.store(session)) == (1, {"SET": 1})


@pytest.mark.parametrize("when", [When.ABSENT, When.PRESENT, When.UNCHANGED])
async def test_conditional_store_is_one_script(wire: Wire, when: When) -> None:
    """Storing on a condition is one EVALSHA: the server decides and writes in one step."""
    session = Session[Any](id=new_session_id()) if when is When.ABSENT else await wire.stored()

    assert await wire.cost(wire.storage.store(session, when=when)) == (1, {"EVALSHA": 1})


async def test_delete_is_one_script(wire: Wire) -> None:
    """Deleting, and saying whether there was one, is one EVALSHA."""
    session = await wire.stored()

    assert await wire.cost(wire.storage.delete(session.id)) == (1, {"EVALSHA": 1})
    assert await wire.cost(wire.storage.delete(session.id)) == (1, {"EVALSHA": 1})


async def test_sweeping_costs_nothing(wire: Wire) -> None:
    """The server expires sessions by itself, so it is not asked."""
    assert await wire.cost(wire.storage.delete_expired()) == (0, {})


async def test_a_script_that_the_server_lacks_is_sent_once(
    wire: Wire, redis_or_valkey: Server
) -> None:
    """A server that does not know a script is told it in a second round trip, and never again."""
    session = await wire.stored()
    with redis_or_valkey.client() as client:
        client.script_flush()

    first = await wire.cost(wire.storage.store(session, when=When.UNCHANGED))
    second = await wire.cost(wire.storage.store(session, when=When.UNCHANGED))

    assert first == (2, {"EVALSHA": 1, "EVAL": 1})
    assert second == (1, {"EVALSHA": 1})


async def test_loads_at_once_share_a_round_trip(wire: Wire) -> None:
    """What many callers ask in one turn of the event loop leaves together."""
    sessions = [await wire.stored() for _ in range(64)]

    loads = [wire.storage.load(session.id) for session in sessions]

    assert await wire.cost(*loads) == (1, {"GETEX": 64})


async def test_connecting_is_done_once(redis_or_valkey: Server) -> None:
    """However many callers come first, one connection is made, and each loads with one command."""
    async with opened(redis_or_valkey) as wire:
        ids = [new_session_id() for _ in range(64)]
        async with Redis(host="127.0.0.1", port=redis_or_valkey.port) as client:
            before: Counter[str] = Counter(each["name"] for each in await client.client_list())

            _, commands = await wire.cost(*(_missing(wire.storage, id) for id in ids))

            after = Counter(each["name"] for each in await client.client_list())
    assert after["aiosessions"] - before["aiosessions"] == 1
    assert commands["GETEX"] == 64


async def _missing(storage: RedisStorage[Any], id: str) -> None:
    with pytest.raises(SessionNotFound):
        await storage.load(id)


Use = Callable[[SessionManager[Any], Session[Any]], Awaitable[object]]


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        pytest.param(lambda m, _: m.create(data=1), (1, {"EVALSHA": 1}), id="create"),
        pytest.param(lambda m, s: m.get(s.id), (1, {"GETEX": 1}), id="get"),
        pytest.param(lambda m, s: m.save(s), (1, {"EVALSHA": 1}), id="save"),
        pytest.param(lambda m, s: m.delete(s.id), (1, {"EVALSHA": 1}), id="delete"),
        pytest.param(
            lambda m, s: m.mutate(s.id, lambda _: None),
            (2, {"GETEX": 1, "EVALSHA": 1}),
            id="mutate",
        ),
        pytest.param(lambda m, s: m.rotate(s), (3, {"GETEX": 1, "EVALSHA": 2}), id="rotate"),
    ],
)
async def test_manager_adds_nothing(wire: Wire, use: Use, expected: Cost) -> None:
    """The manager's calls cost what the documentation says."""
    manager = SessionManager[Any](wire.storage)
    session = await wire.stored()

    assert await wire.cost(use(manager, session)) == expected


async def test_relay_tells_one_round_trip_from_two(redis_or_valkey: Server) -> None:
    """GET then EXPIRE is two round trips, and both in a pipeline one: the relay can tell."""
    async with (
        Relay("127.0.0.1", redis_or_valkey.port) as relay,
        Redis(host="127.0.0.1", port=relay.port) as client,
    ):
        relay.delay = ONE_WAY
        await client.ping()

        relay.count()
        await client.get("absent")
        await client.expire("absent", 1)
        in_turn = relay.counts()

        relay.count()
        async with client.pipeline(transaction=False) as pipeline:
            _ = pipeline.get("absent"), pipeline.expire("absent", 1)  # queued
            await pipeline.execute()
        together = relay.counts()

    assert cost(in_turn) == (2, {"GET": 1, "EXPIRE": 1})
    assert cost(together) == (1, {"GET": 1, "EXPIRE": 1})
    assert in_turn.replies == together.replies == 2
    assert in_turn.bytes_sent == together.bytes_sent
    assert in_turn.bytes_received == together.bytes_received


async def test_relay_delays_without_queueing(valkey: Server) -> None:
    """Ten commands under way at once take one delayed round trip, not ten."""
    async with (
        Relay("127.0.0.1", valkey.port) as relay,
        Redis(host="127.0.0.1", port=relay.port) as client,
    ):
        await asyncio.gather(*(client.ping() for _ in range(10)))  # connects
        relay.delay = 0.05
        clock = asyncio.get_running_loop().time
        start = clock()
        await asyncio.gather(*(client.ping() for _ in range(10)))
        elapsed = clock() - start

    assert 0.1 <= elapsed < 0.5
