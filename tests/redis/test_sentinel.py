"""Sessions on the master that Sentinel names, before, during and after a failover."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
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
    new_session_id,
)
from tests.support.clients import NAME, Caller, busy, last_error, timed_outcome
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
    offset,
    role,
    watched,
)

RECOVERS_WITHIN = 3.0


@pytest.fixture(scope="session")
def shared_sentinels() -> Iterator[Watched]:
    """A master, a replica and three Sentinels."""
    with watched(binaries()["valkey"]) as made:
        yield made


@pytest.fixture
def servers(shared_sentinels: Watched) -> Watched:
    """The same servers, empty, and ready for a failover."""
    shared_sentinels.settle()
    shared_sentinels.master().flush()
    return shared_sentinels


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
async def storage_of(*ports: int, timeout: float = 5.0) -> AsyncIterator[RedisStorage[Any]]:
    """A storage that borrows a client of these Sentinels."""
    async with (
        client_of(*ports) as client,
        RedisStorage[Any](client, ttl=600, timeout=timeout) as storage,
    ):
        yield storage


async def test_all_verbs_work_on_the_master(servers: Watched) -> None:
    """Many callers share one connection; the replica has none."""
    async with storage_of(*servers.ports) as storage:
        callers = [Caller(storage, new_session_id) for _ in range(50)]
        await asyncio.gather(*(caller.use_all_verbs() for caller in callers))
        found = [connections(server, NAME) for server in servers.servers]

    assert [error for caller in callers for error in caller.wrong] == []
    assert [error for caller in callers for error in caller.unavailable] == []
    assert found == [int(server is servers.master()) for server in servers.servers]


def test_documentation_runs(servers: Watched) -> None:
    """Only the addresses and the name of the master are replaced."""
    places = {
        f'("sentinel-{number}", 26379)': f'("127.0.0.1", {port})'
        for number, port in enumerate(servers.ports, start=1)
    }

    run_block("sentinel", {**places, '"mymaster"': repr(SENTINEL_NAME)})

    assert ask(servers.master(), "DBSIZE") == 1


async def test_borrowed_client_stays_open(servers: Watched) -> None:
    """It works before, during and after; the storage has another connection."""
    async with client_of(*servers.ports) as client:
        assert await client.set("theirs", "1")
        async with RedisStorage[Any](client, ttl=600) as storage:
            await storage.store(Session(id="mine"))
            assert await client.get("theirs") == b"1"
            assert connections(servers.master(), NAME) == 2

        eventually(lambda: connections(servers.master(), NAME) == 1)
        assert await client.get("session:mine")


async def test_aclose_leaves_nothing_behind(servers: Watched) -> None:
    """No task and no connection remains, even if the storage asks a Sentinel at that time."""
    tasks = asyncio.all_tasks()
    async with client_of(*servers.ports) as client:
        for turns in range(0, 60, 4):
            storage = RedisStorage[Any](client, ttl=600)
            call = asyncio.create_task(timed_outcome(storage.load("any")))
            for _ in range(turns):
                await asyncio.sleep(0)

            async with asyncio.timeout(5):
                await storage.aclose()

            await call
            assert asyncio.all_tasks() == tasks
    disconnected(servers.servers, NAME)


async def test_storage_asks_the_next_sentinel(servers: Watched) -> None:
    """The first one refuses connections, and the second one hangs."""
    last, hung, _ = servers.sentinels
    with refused_port() as refused, mended(hung):
        hung.pause()
        async with storage_of(refused, hung.port, last.port) as storage:
            result, took = await timed_outcome(storage.store(Session(id="mine")))

    assert result is None
    assert took < 2


async def test_open_connection_outlives_the_sentinels(servers: Watched) -> None:
    """A new connection fails with `StorageUnavailable`, in time and without secrets."""
    timeout = 0.5
    async with storage_of(*servers.ports, timeout=timeout) as storage:
        await storage.store(Session(id="mine"))
        with mended(*servers.sentinels), refused_port() as refused:
            for sentinel in servers.sentinels:
                sentinel.pause()

            assert (await storage.load("mine")).id == "mine"
            for ports in (servers.ports, [refused]):
                async with storage_of(*ports, timeout=timeout) as late:
                    id = new_session_id()
                    result, took = await timed_outcome(late.load(id))

                assert isinstance(result, StorageUnavailable)
                assert id not in said_by(result)
                assert took < timeout + 0.4


@pytest.mark.parametrize("end", ["planned", "killed", "hung"])
async def test_callers_follow_a_failover(servers: Watched, end: str) -> None:
    """All errors are `StorageUnavailable`, and they stop soon after the promotion."""
    master = servers.master()
    async with storage_of(*servers.ports, timeout=0.5) as storage:
        sessions = [Session[Any](id=new_session_id()) for _ in range(60)]
        for session in sessions:
            session.data = session.id
            await storage.store(session)
        (replica,) = (server for server in servers.servers if server is not master)
        eventually(lambda: offset(replica) == offset(master))
        callers = [Caller(storage, new_session_id) for _ in range(20)]
        turns = itertools.cycle(sessions)

        async def live(caller: Caller) -> None:
            await caller.read_and_write(next(turns))

        with mended(master):
            async with busy(callers, live):
                await asyncio.sleep(0.2)
                if end == "planned":
                    servers.fail_over()
                elif end == "killed":
                    master.kill()
                else:
                    master.pause()
                await asyncio.to_thread(eventually, lambda: servers.master() is replica)
                if end == "planned":  # until the Sentinels tell the old master, it goes on
                    await asyncio.to_thread(eventually, lambda: role(master) == "slave")
                promoted = time.monotonic()
                last = await last_error(callers, promoted + RECOVERS_WITHIN)
                rounds = [caller.rounds for caller in callers]
                await asyncio.sleep(0.2)

        count = sum(len(caller.unavailable) for caller in callers)
        took = max(0.0, last - promoted)
        print(f"\n{end}: {count} errors, until {took:.2f} s after the promotion")  # noqa: T201
        assert [error for caller in callers for error in caller.wrong] == []
        assert took < RECOVERS_WITHIN
        assert all(caller.rounds > before for caller, before in zip(callers, rounds, strict=True))
        for session in sessions:
            assert (await storage.load(session.id)).data == session.id
        assert connections(replica, NAME) == 1


class _Directory:
    """Replaces Sentinels: names the master that a test chooses."""

    def __init__(self, master: Server) -> None:
        self.master = master

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Return the address of the master."""
        assert service_name == SENTINEL_NAME
        return "127.0.0.1", self.master.port


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Server, Server]]:
    """Two servers without Sentinels."""
    with ExitStack() as stack:
        first, second = (stack.enter_context(running(binaries()["valkey"])) for _ in range(2))
        yield first, second


@dataclass
class Demotion:
    """A master that becomes a read-only replica while callers are connected to it.

    Attributes:
        old: The old master; its data differs from that of the new one.
        new: The new master.
        directory: Names the address of the new master.
    """

    old: Server
    new: Server
    directory: _Directory

    def happen(self, session: Session[Any], *, on_old: bool, on_new: bool) -> None:
        """Demote the old master, which has a session, and choose which server has it afterwards."""
        key = f"session:{session.id}"
        with self.old.client() as old, self.new.client() as new:
            if on_new:
                new.restore(key, 0, old.dump(key) or b"")
            if not on_old:
                old.delete(key)
        with refused_port() as master:
            ask(self.old, "REPLICAOF", "127.0.0.1", master)
        self.directory.master = self.new


@pytest.fixture
def demotion(pair: tuple[Server, Server]) -> Iterator[Demotion]:
    """Two empty servers; the first one is the master that the directory names."""
    for server in pair:
        server.flush()
    yield Demotion(*pair, _Directory(pair[0]))
    ask(pair[0], "REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize("verb", ["load", "delete", *(f"store-{when.name}" for when in When)])
@pytest.mark.parametrize("on_new", [False, True], ids=["new-has-none", "new-has-it"])
@pytest.mark.parametrize("on_old", [False, True], ids=["old-has-none", "old-has-it"])
async def test_demoted_master_gives_no_answer(
    demotion: Demotion, verb: str, *, on_old: bool, on_new: bool
) -> None:
    """Its READONLY leads to the new master, which answers without doubt."""
    pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]  # redis-py does not type it
        SENTINEL_NAME, demotion.directory, client_name=NAME
    )
    async with Redis(connection_pool=pool) as client, RedisStorage[Any](client, ttl=60) as storage:
        session = Session[Any](id=new_session_id(), data="theirs")
        await storage.store(session)
        demotion.happen(session, on_old=on_old, on_new=on_new)

        expected: object
        if verb == "load":
            result, _ = await timed_outcome(storage.load(session.id))
            expected = session if on_new else SessionNotFound
        elif verb == "delete":
            result, _ = await timed_outcome(storage.delete(session.id))
            expected = on_new
        else:
            when = When[verb.removeprefix("store-")]
            result, _ = await timed_outcome(storage.store(session, when=when))
            expected = {
                When.ALWAYS: None,
                When.ABSENT: SessionExists if on_new else None,
                When.PRESENT: None if on_new else SessionNotFound,
                When.UNCHANGED: None if on_new else SessionNotFound,
            }[when]

        assert result == expected or type(result) is expected
        assert connections(demotion.new, NAME) == 1
        await pool.disconnect()
