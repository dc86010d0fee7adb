"""Clusters that lose nodes, slots or their majority: what callers are told, and for how long.

What a test breaks it mends again, and the next one begins when all nodes agree.
"""

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode

from aiosessions import RedisStorage, Session, StorageUnavailable, When, new_session_id
from aiosessions.redis.cluster import Cluster as SlotMap
from tests.callers import (
    NAME,
    Caller,
    busy,
    cluster_client,
    cluster_storage,
    id_on,
    last_error,
    outcome,
    slot_of,
)
from tests.servers import binaries, deaf_port
from tests.topologies import Cluster, ask, cluster, connections, eventually, mended, offset, role

RECOVERS_WITHIN = 3.0


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """Three masters, each with a replica."""
    with cluster(binaries()["valkey"], masters=3, replicas=1) as made:
        yield made


@pytest.fixture
def nodes(shared_cluster: Cluster) -> Cluster:
    """The same, empty, and with nothing going on."""
    shared_cluster.settle()
    shared_cluster.flush()
    return shared_cluster


@pytest.fixture(scope="session")
def lone_masters() -> Iterator[Cluster]:
    """Three masters without replicas, to be taken down."""
    with cluster(binaries()["valkey"], masters=3) as made:
        yield made


def _in_step(nodes: Cluster) -> bool:
    """Whether all replicas have what their masters have."""
    return all(
        {offset(replica) for replica in nodes.replicas(master)} == {offset(master)}
        for master in nodes.masters()
    )


async def _replicated(nodes: Cluster, storage: RedisStorage[Any], count: int) -> list[Session[Any]]:
    """Sessions all over the cluster that a failover cannot lose."""
    sessions = [Session[Any](id=new_session_id()) for _ in range(count)]
    for session in sessions:
        session.data = session.id
        await storage.store(session)
    eventually(lambda: _in_step(nodes))
    return sessions


@pytest.mark.parametrize("breakdown", ["killed", "hung"])
async def test_a_lost_master_is_replaced_by_its_replica(nodes: Cluster, breakdown: str) -> None:
    """Meanwhile all errors are `StorageUnavailable`; from the promotion on it works soon again."""
    master = nodes.masters()[0]
    replica = nodes.replicas(master)[0]
    async with cluster_storage(nodes, timeout=0.5) as storage:
        sessions = await _replicated(nodes, storage, 60)
        callers = [Caller(storage, new_session_id) for _ in range(20)]
        turns = itertools.cycle(sessions)

        async def live(caller: Caller) -> None:
            await caller.read_and_write(next(turns))

        with mended(master):
            async with busy(callers, live):
                await asyncio.sleep(0.2)
                if breakdown == "killed":
                    master.kill()
                else:
                    master.pause()
                await asyncio.to_thread(eventually, lambda: role(replica) == "master")
                promoted = time.monotonic()
                last = await last_error(callers, promoted + RECOVERS_WITHIN)
                rounds = [caller.rounds for caller in callers]
                await asyncio.sleep(0.2)

        count = sum(len(caller.unavailable) for caller in callers)
        took = max(0.0, last - promoted)
        print(f"\n{breakdown}: {count} errors, until {took:.2f} s after the promotion")  # noqa: T201
        assert [error for caller in callers for error in caller.wrong] == []
        assert took < RECOVERS_WITHIN
        assert all(caller.rounds > before for caller, before in zip(callers, rounds, strict=True))
        nodes.settle()
        for session in sessions:
            assert (await storage.load(session.id)).data == session.id
        assert connections(replica, NAME) == 1
        assert connections(master, NAME) == 0


async def test_nobody_notices_a_planned_failover(nodes: Cluster) -> None:
    """A replica that takes over with its master's consent: no error, and no wrong answer."""
    master = nodes.masters()[0]
    replica = nodes.replicas(master)[0]
    async with cluster_storage(nodes) as storage:
        callers = [Caller(storage, new_session_id) for _ in range(20)]

        async with busy(callers, Caller.use_all_verbs):
            await asyncio.sleep(0.1)
            ask(replica, "CLUSTER", "FAILOVER")
            await asyncio.to_thread(eventually, lambda: role(replica) == "master")
            await asyncio.to_thread(eventually, lambda: role(master) == "slave")
            await asyncio.sleep(0.3)

    assert [error for caller in callers for error in caller.wrong] == []
    assert [error for caller in callers for error in caller.unavailable] == []


async def test_a_cluster_with_unserved_slots_is_unavailable(lone_masters: Cluster) -> None:
    """Servers answer CLUSTERDOWN: no session is "not found", and all are there when it is over."""
    lone_masters.settle()
    lone_masters.flush()
    async with cluster_storage(lone_masters) as storage:
        sessions = [Session[Any](id=new_session_id()) for _ in range(30)]
        for session in sessions:
            await storage.store(session)
        slot = slot_of(sessions[0].id)
        owner = lone_masters.owner(slot)
        (low, high) = next(row[:2] for row in lone_masters.map() if row[0] <= slot <= row[1])

        ask(owner, "CLUSTER", "DELSLOTSRANGE", low, high)
        try:
            with pytest.raises(StorageUnavailable):
                await storage.load(sessions[0].id)
            eventually(lambda: "fail" in str(ask(owner, "CLUSTER", "INFO")))
            for verb in (
                storage.load(sessions[0].id),
                storage.delete(sessions[0].id),
                *(storage.store(sessions[0], when=when) for when in When),
            ):
                result, took = await outcome(verb)
                assert type(result) is StorageUnavailable
                assert took < 1
            # One that has never seen the cluster whole.
            async with cluster_storage(lone_masters) as late:
                assert type((await outcome(late.load(sessions[0].id)))[0]) is StorageUnavailable
        finally:
            ask(owner, "CLUSTER", "ADDSLOTSRANGE", low, high)
        lone_masters.settle()

        for session in sessions:
            assert await storage.load(session.id) == session


async def _all_unavailable(storage: RedisStorage[Any], within: float) -> None:
    calls = [
        *(storage.load(new_session_id()) for _ in range(50)),
        *(storage.delete(new_session_id()) for _ in range(50)),
        *(storage.store(Session(id=new_session_id()), when=when) for when in list(When) * 10),
    ]
    results = await asyncio.gather(*(outcome(call) for call in calls))
    assert {type(result) for result, _ in results} == {StorageUnavailable}
    assert max(took for _, took in results) < within


async def test_a_cluster_without_a_majority_is_unavailable(lone_masters: Cluster) -> None:
    """With two of three masters gone, and also with all: in time, and until they are back."""
    lone_masters.settle()
    timeout = 0.5
    async with cluster_storage(lone_masters, timeout=timeout) as storage:
        await storage.store(Session(id="before"))
        first, *others = lone_masters.nodes
        with mended(first, *others):
            for node in others:
                node.kill()
            eventually(lambda: "cluster_state:fail" in str(ask(first, "CLUSTER", "INFO")))
            await _all_unavailable(storage, timeout + 0.5)

            first.kill()
            await _all_unavailable(storage, timeout + 0.5)
            async with cluster_storage(lone_masters, timeout=timeout) as late:
                await _all_unavailable(late, timeout + 0.5)
        lone_masters.settle()

        await storage.store(Session(id="after"))
        assert (await storage.load("after")).id == "after"


async def test_a_cluster_that_hangs_is_unavailable(lone_masters: Cluster) -> None:
    """Connections are accepted and nothing is answered: every verb still ends in time."""
    lone_masters.settle()
    timeout = 0.4
    async with cluster_storage(lone_masters, timeout=timeout) as storage:
        await storage.store(Session(id="before"))
        with mended(*lone_masters.nodes):
            for node in lone_masters.nodes:
                node.pause()
            await _all_unavailable(storage, timeout + 0.5)
            async with cluster_storage(lone_masters, timeout=timeout) as late:
                await _all_unavailable(late, timeout + 0.5)
        lone_masters.settle()

        await storage.store(Session(id="after"))
        assert (await storage.load("after")).id == "after"


async def test_a_redirected_call_ends_in_time(lone_masters: Cluster) -> None:
    """Also where it has to queue behind calls that may take longer than it."""
    lone_masters.settle()
    timeout = 1.0
    source, target, _ = lone_masters.masters()
    moved, other = id_on(lone_masters, source), id_on(lone_masters, target)
    async with cluster_storage(lone_masters, timeout=timeout) as storage:
        for id in (moved, other):
            await storage.store(Session(id=id))
        lone_masters.move(slot_of(moved), target)

        with mended(source, target):
            source.pause()
            early = asyncio.create_task(outcome(storage.load(moved)))
            await asyncio.sleep(0.7)
            target.pause()
            late = asyncio.create_task(outcome(storage.load(other)))
            await asyncio.sleep(0.05)
            source.resume()  # and says that the slot has moved
            result, took = await early
            await late

    assert type(result) is StorageUnavailable
    assert took < timeout + 0.4


async def test_a_late_caller_takes_nobody_along(lone_masters: Cluster) -> None:
    """Redirected shortly before its deadline, it fails, and its node's other callers do not."""
    lone_masters.settle()
    timeout = 1.0
    source, target, _ = lone_masters.masters()
    moved, other = id_on(lone_masters, source), id_on(lone_masters, target)
    async with cluster_storage(lone_masters, timeout=timeout) as storage:
        for id in (moved, other):
            await storage.store(Session(id=id))
        lone_masters.move(slot_of(moved), target)

        with mended(source, target):
            source.pause()
            late = asyncio.create_task(outcome(storage.load(moved)))
            await asyncio.sleep(0.6)
            target.pause()  # for half a second: a hiccup, half as long as callers wait
            source.resume()  # and says that the slot has moved
            await asyncio.sleep(0.2)
            innocent = asyncio.create_task(outcome(storage.load(other)))
            await late
            await asyncio.sleep(0.1)
            target.resume()
            result, _ = await innocent

    assert isinstance(result, Session)


async def test_one_node_that_answers_is_enough_to_begin_with(lone_masters: Cluster) -> None:
    """Of the nodes that the client was told, others may refuse connections or hang."""
    lone_masters.settle()
    hung, *others = lone_masters.nodes
    id = id_on(lone_masters, others[1])
    with mended(hung), deaf_port() as deaf:
        hung.pause()
        ports = (deaf, hung.port, others[0].port)
        client = RedisCluster(startup_nodes=[ClusterNode("127.0.0.1", port) for port in ports])
        async with RedisStorage[Any](client, ttl=600, timeout=2.0) as storage:
            await storage.store(Session(id=id))
            assert (await storage.load(id)).id == id
        await client.aclose()


@pytest.mark.parametrize(
    ("password", "reason"),
    [("wrong", "refuses the user name or password"), (None, "asks for a password")],
)
async def test_a_cluster_that_lets_nobody_in_says_why(
    lone_masters: Cluster, password: str | None, reason: str
) -> None:
    """Before there is a map of slots, too, and when it is asked how it is."""
    lone_masters.settle()
    nodes = lone_masters.nodes
    client = RedisCluster(host="127.0.0.1", port=nodes[0].port, password=password)
    async with RedisStorage[Any](client, ttl=600) as storage:
        try:
            for node in nodes:
                ask(node, "CONFIG", "SET", "requirepass", "right")
            for verb in (storage.load("id"), storage.ping()):
                with pytest.raises(StorageUnavailable, match=reason) as caught:
                    await verb
                assert caught.value.__cause__ is not None
        finally:
            for node in nodes:
                with redis.Redis(port=node.port, password="right") as direct:
                    direct.config_set("requirepass", "")
    await client.aclose()


async def test_a_cluster_that_is_not_there_says_so() -> None:
    """As one server would."""
    with deaf_port() as deaf:
        client = RedisCluster(host="127.0.0.1", port=deaf)
        async with RedisStorage[Any](client, ttl=600) as storage:
            with pytest.raises(StorageUnavailable, match="connection to the server failed"):
                await storage.load("id")
        await client.aclose()


@pytest.mark.parametrize(
    "row",
    [
        [0, -2, [b"127.0.0.1", 7000, b"id"]],
        [0, 2**40, [b"127.0.0.1", 7000, b"id"]],
        [5, 1, [b"127.0.0.1", 7000, b"id"]],
        [0, 16_384, [b"127.0.0.1", 7000, b"id"]],
        [0, 16_383, [b"127.0.0.1", [7000], b"id"]],
        [b"0", b"5", [b"127.0.0.1", 7000, b"id"]],
    ],
    ids=repr,
)
def test_a_map_of_slots_that_cannot_be_is_refused(row: list[object]) -> None:
    """Whatever a node makes of it."""
    client = RedisCluster(host="127.0.0.1", port=1)
    servers = SlotMap(client, 1.0)

    with pytest.raises((TypeError, ValueError)):
        servers._read_map([row], ("127.0.0.1", 7000))


async def test_closing_amid_a_breakdown_leaves_nothing_behind(lone_masters: Cluster) -> None:
    """No task and no connection, though callers were about to ask who replaces a node."""
    lone_masters.settle()
    first, dead, _ = lone_masters.nodes
    ids = [id_on(lone_masters, dead) for _ in range(3)]
    left: list[str] = []
    async with cluster_client(first.port) as client:
        tasks = asyncio.all_tasks()
        with mended(dead):
            dead.kill()
            for turns in range(30):
                storage = RedisStorage[Any](client, ttl=600, timeout=1.0)
                await outcome(storage.load(id_on(lone_masters, first)))
                calls = [asyncio.create_task(outcome(storage.load(id))) for id in ids]
                for _ in range(turns):
                    await asyncio.sleep(0)

                await storage.aclose()

                await asyncio.gather(*calls)
                left += [f"after {turns} turns" for _ in asyncio.all_tasks() - tasks]
                tasks = asyncio.all_tasks()

    assert left == []
