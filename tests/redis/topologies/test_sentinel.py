"""Sessions on the master that Sentinel names; test_failover.py covers failovers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from aiosessions import (
    RedisStorage,
    Session,
    SessionExists,
    SessionNotFound,
    StorageUnavailable,
    When,
)
from tests.support.clients import LONG, NAME, key_of, stored, timed_outcome, use
from tests.support.connecting import run_block
from tests.support.secrets import said_by
from tests.support.servers import Server, binaries, refused_port, running
from tests.support.topologies import (
    SENTINEL_NAME,
    Watched,
    ask,
    connections,
    disconnected,
    eventually,
    mended,
)


@asynccontextmanager
async def client_of(*ports: int) -> AsyncIterator[Redis]:
    """A client to borrow that asks the Sentinels on these ports, in this order."""
    sentinel = Sentinel(  # type: ignore[no-untyped-call]  # redis-py does not type it
        [("127.0.0.1", port) for port in ports],
        sentinel_kwargs={
            "socket_timeout": 0.3,
            "socket_connect_timeout": 0.3,
            "retry": Retry(NoBackoff(), 0),
        },
    )
    async with sentinel, sentinel.master_for(SENTINEL_NAME, client_name=NAME) as client:
        yield client


@asynccontextmanager
async def storage_of(*ports: int, timeout: float = LONG) -> AsyncIterator[RedisStorage[Any]]:
    """A storage that borrows a client of these Sentinels."""
    async with (
        client_of(*ports) as client,
        RedisStorage[Any](client, ttl=600, timeout=timeout) as storage,
    ):
        yield storage


async def test_all_verbs_work_on_the_master(sentinels: Watched) -> None:
    """Many callers share one connection; the replica has none."""
    async with storage_of(*sentinels.ports) as storage:
        await use(storage, callers=50)
        found = [connections(server, NAME) for server in sentinels.servers]

    assert found == [int(server is sentinels.master()) for server in sentinels.servers]


def test_documentation_runs(sentinels: Watched) -> None:
    """Only the addresses and the name of the master are replaced."""
    places = {
        f'("sentinel-{number}", 26379)': f'("127.0.0.1", {port})'
        for number, port in enumerate(sentinels.ports, start=1)
    }

    run_block("sentinel", {**places, '"mymaster"': repr(SENTINEL_NAME)})

    assert ask(sentinels.master(), "DBSIZE") == 1


async def test_borrowed_client_stays_open(sentinels: Watched) -> None:
    """It works before, during and after; the storage has another connection."""
    async with client_of(*sentinels.ports) as client:
        assert await client.set("theirs", "1")
        async with RedisStorage[Any](client, ttl=600) as storage:
            await storage.store(Session(id="mine"))
            assert await client.get("theirs") == b"1"
            assert connections(sentinels.master(), NAME) == 2

        eventually(lambda: connections(sentinels.master(), NAME) == 1)
        assert await client.get(key_of("mine"))


async def test_aclose_leaves_nothing_behind(sentinels: Watched) -> None:
    """No task and no connection remains, even if the storage asks a Sentinel at that time."""
    tasks = asyncio.all_tasks()
    async with client_of(*sentinels.ports) as client:
        for turns in range(0, 60, 4):
            storage = RedisStorage[Any](client, ttl=600)
            call = asyncio.create_task(timed_outcome(storage.load("any")))
            for _ in range(turns):
                await asyncio.sleep(0)

            async with asyncio.timeout(5):
                await storage.aclose()

            await call
            assert asyncio.all_tasks() == tasks
    disconnected(sentinels.servers, NAME)


async def test_storage_asks_the_next_sentinel(sentinels: Watched) -> None:
    """The first one refuses connections, and the second one hangs."""
    last, hung, _ = sentinels.sentinels
    with refused_port() as refused, mended(hung):
        hung.pause()
        async with storage_of(refused, hung.port, last.port) as storage:
            await stored(storage)


async def test_open_connection_outlives_the_sentinels(sentinels: Watched) -> None:
    """A new connection fails with `StorageUnavailable`, without secrets."""
    async with storage_of(*sentinels.ports) as storage:
        session = await stored(storage)
        with mended(*sentinels.sentinels), refused_port() as refused:
            for sentinel in sentinels.sentinels:
                sentinel.pause()

            assert await storage.load(session.id) == session
            for ports in (sentinels.ports, [refused]):
                async with storage_of(*ports, timeout=0.5) as late:
                    result, _ = await timed_outcome(late.load(session.id))

                assert isinstance(result, StorageUnavailable)
                assert session.id not in said_by(result)


@dataclass
class Demotion:
    """A master that becomes a read-only replica while callers are connected to it.

    Stands for the Sentinels, too: it names the address of the master.

    Attributes:
        old: The old master; its data differs from that of the new one.
        new: The new master.
        named: The master that it names.
    """

    old: Server
    new: Server
    named: Server

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Return the address of the master, as a Sentinel client does."""
        assert service_name == SENTINEL_NAME
        return "127.0.0.1", self.named.port

    def happen(self, session: Session[Any], *, on_old: bool, on_new: bool) -> None:
        """Demote the old master, which has a session, and choose which server has it afterwards."""
        key = key_of(session.id)
        with self.old.client() as old, self.new.client() as new:
            if on_new:
                new.restore(key, 0, old.dump(key) or b"")
            if not on_old:
                old.delete(key)
        with refused_port() as master:
            ask(self.old, "REPLICAOF", "127.0.0.1", master)
        self.named = self.new


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Server, Server]]:
    """Two servers without Sentinels."""
    with running(binaries()["valkey"]) as first, running(binaries()["valkey"]) as second:
        yield first, second


@pytest.fixture
def demotion(pair: tuple[Server, Server]) -> Iterator[Demotion]:
    """Two empty servers; the first one is the master."""
    for server in pair:
        server.flush()
    yield Demotion(*pair, named=pair[0])
    ask(pair[0], "REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize("verb", ["load", "delete", *(f"store-{when.name}" for when in When)])
@pytest.mark.parametrize("on_new", [False, True], ids=["new-has-none", "new-has-it"])
@pytest.mark.parametrize("on_old", [False, True], ids=["old-has-none", "old-has-it"])
async def test_demoted_master_gives_no_answer(
    demotion: Demotion, verb: str, *, on_old: bool, on_new: bool
) -> None:
    """Its READONLY leads to the new master, which answers without doubt."""
    pool = SentinelConnectionPool(SENTINEL_NAME, demotion, client_name=NAME)  # type: ignore[no-untyped-call]
    async with Redis(connection_pool=pool) as client, RedisStorage[Any](client, ttl=60) as storage:
        session = await stored(storage, data="theirs")
        demotion.happen(session, on_old=on_old, on_new=on_new)

        expected: object = SessionNotFound if not on_new else None
        if verb == "load":
            result, _ = await timed_outcome(storage.load(session.id))
            expected = session if on_new else SessionNotFound
        elif verb == "delete":
            result, _ = await timed_outcome(storage.delete(session.id))
            expected = on_new
        else:
            when = When[verb.removeprefix("store-")]
            result, _ = await timed_outcome(storage.store(session, when=when))
            if when is When.ALWAYS or when is When.ABSENT:
                expected = SessionExists if on_new and when is When.ABSENT else None

        assert result == expected or type(result) is expected
        assert connections(demotion.new, NAME) == 1
        await pool.disconnect()
