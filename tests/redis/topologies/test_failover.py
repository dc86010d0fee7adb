"""Replicas that take over, in a cluster and with Sentinels."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import pytest
from redis.asyncio.sentinel import Sentinel

from aiosessions import Session, When, new_session_id
from tests.support.clients import (
    LONG,
    NAME,
    Caller,
    Storage,
    busy,
    cluster_storage,
    id_on,
    many,
)
from tests.support.servers import Server
from tests.support.topologies import (
    QUIET,
    SENTINEL_NAME,
    Cluster,
    Watched,
    ask,
    connections,
    eventually,
    mended,
    offset,
    role,
)

pytestmark = pytest.mark.slow


@dataclass
class Group:
    """Servers that notice the end of a master.

    Attributes:
        pairs: Each master with its replica; the first master is the one to end.
        storage: A storage on them, with a timeout that runs out.
    """

    pairs: Sequence[tuple[Server, Server]]
    storage: Callable[[], AbstractAsyncContextManager[Storage]]

    def in_step(self) -> bool:
        """Whether all replicas have the data of their masters."""
        return all(offset(replica) == offset(master) for master, replica in self.pairs)


@pytest.fixture
def cluster_group(replicated: Cluster) -> Iterator[Group]:
    """A cluster that notices after a second."""
    pairs = [(master, replicated.replicas(master)[0]) for master in replicated.masters()]
    replicated.ask_all("CONFIG", "SET", "cluster-node-timeout", 1_000)
    yield Group(pairs, lambda: cluster_storage(replicated, timeout=1.0))
    replicated.ask_all("CONFIG", "SET", "cluster-node-timeout", QUIET)


@pytest.fixture
def sentinel_group(sentinels: Watched) -> Group:
    """A master and its replica."""
    master = sentinels.master()
    (replica,) = (server for server in sentinels.servers if server is not master)

    @asynccontextmanager
    async def storage() -> AsyncIterator[Storage]:
        places = [("127.0.0.1", port) for port in sentinels.ports]
        settings = {"socket_timeout": 0.5}
        sentinel = Sentinel(places, sentinel_kwargs=settings)  # type: ignore[no-untyped-call]
        async with (
            sentinel,
            sentinel.master_for(SENTINEL_NAME, client_name=NAME) as client,
            Storage(client, ttl=600, timeout=1.0) as storage,
        ):
            yield storage

    return Group([(master, replica)], storage)


async def calm(callers: list[Caller]) -> None:
    """Wait until each caller has made two rounds while none had an error."""

    def counts() -> tuple[list[int], int]:
        return [each.rounds for each in callers], sum(len(each.unavailable) for each in callers)

    async with asyncio.timeout(LONG):
        while True:
            before, errors = counts()
            while min(map(int.__sub__, counts()[0], before)) < 2:  # noqa: ASYNC110 - a poll
                await asyncio.sleep(0.01)
            if counts()[1] == errors:
                return


@pytest.mark.parametrize("end", [Server.kill, Server.pause], ids=["killed", "hung"])
@pytest.mark.parametrize("kind", ["cluster_group", "sentinel_group"])
async def test_callers_follow_a_promotion(
    request: pytest.FixtureRequest, kind: str, end: Callable[[Server], None]
) -> None:
    """All errors are `StorageUnavailable`, and they stop after the promotion."""
    group: Group = request.getfixturevalue(kind)
    master, replica = group.pairs[0]
    async with group.storage() as storage:
        sessions = await many(storage, 60, data="old")
        await asyncio.to_thread(eventually, group.in_step)
        callers = [Caller(storage, new_session_id) for _ in range(20)]
        turns = itertools.cycle(sessions)

        async def live(caller: Caller) -> None:
            await caller.read_and_write(next(turns))

        with mended(master):
            async with busy(callers, live):
                await calm(callers)
                end(master)
                await asyncio.to_thread(eventually, lambda: role(replica) == "master")
                await calm(callers)
            assert [error for caller in callers for error in caller.wrong] == []
            for session in sessions:
                assert (await storage.load(session.id)).data == "old"
            assert connections(replica, NAME) == 1


@pytest.mark.usefixtures("long_bridge")
async def test_commands_of_a_dead_master_go_to_its_replica(replicated: Cluster) -> None:
    """Those that wait leave for the promoted replica as soon as the map names it."""
    master = replicated.masters()[0]
    (replica,) = replicated.replicas(master)
    id = id_on(replicated, master)
    async with cluster_storage(replicated, timeout=LONG) as storage:
        await storage.store(Session(id=id, data="replicated"))
        eventually(lambda: offset(replica) == offset(master))
        with mended(master):
            master.kill()
            loads = [asyncio.create_task(storage.load(id)) for _ in range(20)]
            write = asyncio.create_task(storage.store(Session(id=id), when=When.PRESENT))
            await asyncio.to_thread(ask, replica, "CLUSTER", "FAILOVER", "TAKEOVER")

            assert {(await load).id for load in loads} == {id}
            await write
            assert connections(replica, NAME) == 1


async def test_planned_failover_causes_no_error(replicated: Cluster) -> None:
    """The replica takes over with the consent of its master."""
    master = replicated.masters()[0]
    replica = replicated.replicas(master)[0]
    async with cluster_storage(replicated, timeout=LONG) as storage:
        callers = [Caller(storage, new_session_id) for _ in range(20)]

        async with busy(callers, Caller.use_everything):
            await calm(callers)
            ask(replica, "CLUSTER", "FAILOVER")
            await asyncio.to_thread(eventually, lambda: role(master) == "slave")
            await calm(callers)

    assert [problem for each in callers for problem in (*each.wrong, *each.unavailable)] == []
