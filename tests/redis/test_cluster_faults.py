"""Clusters that lose nodes, slots or their majority: the errors, and the recovery.

Each test mends the cluster, and begins when all nodes agree.
"""

import asyncio
import itertools
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode

from aiosessions import RedisStorage, Session, StorageUnavailable, When, new_session_id
from aiosessions.redis._cluster_map import ClusterMap
from aiosessions.redis._driver import Address
from tests.support.clients import (
    NAME,
    Caller,
    busy,
    cluster_client,
    cluster_storage,
    id_on,
    last_error,
    our_tasks,
    slot_of,
    timed_outcome,
)
from tests.support.servers import binaries, refused_port
from tests.support.topologies import (
    Cluster,
    ask,
    cluster,
    connections,
    eventually,
    mended,
    offset,
    role,
)

RECOVERS_WITHIN = 3.0


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """Three masters, each with a replica."""
    with cluster(binaries()["valkey"], masters=3, replicas=1) as made:
        yield made


@pytest.fixture
def nodes(shared_cluster: Cluster) -> Cluster:
    """The same cluster, empty, after all nodes agree."""
    shared_cluster.settle()
    shared_cluster.flush()
    return shared_cluster


@pytest.fixture(scope="session")
def lone_masters() -> Iterator[Cluster]:
    """Three masters without replicas."""
    with cluster(binaries()["valkey"], masters=3) as made:
        yield made


@pytest.fixture
def masters(lone_masters: Cluster) -> Cluster:
    """The same cluster, empty, after all nodes agree."""
    lone_masters.settle()
    lone_masters.flush()
    return lone_masters


def _in_step(nodes: Cluster) -> bool:
    """Whether all replicas have the data of their masters."""
    return all(
        {offset(replica) for replica in nodes.replicas(master)} == {offset(master)}
        for master in nodes.masters()
    )


async def _replicated(nodes: Cluster, storage: RedisStorage[Any], count: int) -> list[Session[Any]]:
    """Store sessions on all masters, and wait until they are replicated."""
    sessions = [Session[Any](id=new_session_id()) for _ in range(count)]
    for session in sessions:
        session.data = session.id
        await storage.store(session)
    eventually(lambda: _in_step(nodes))
    return sessions


@pytest.mark.parametrize("breakdown", ["killed", "hung"])
async def test_callers_follow_a_promotion(nodes: Cluster, breakdown: str) -> None:
    """All errors are `StorageUnavailable`, and they stop soon after the promotion."""
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


async def test_commands_of_a_dead_master_go_to_its_replica(nodes: Cluster) -> None:
    """Those that wait leave for the promoted replica as soon as the map names it."""
    master = nodes.masters()[0]
    (replica,) = nodes.replicas(master)
    id = id_on(nodes, master)
    async with cluster_storage(nodes) as storage:
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


async def test_planned_failover_causes_no_error(nodes: Cluster) -> None:
    """The replica takes over with the consent of its master."""
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


@contextmanager
def unserved(nodes: Cluster, id: str) -> Iterator[None]:
    """Take the slot of a session, and its range, away from their master during the block."""
    slot = slot_of(id)
    owner = nodes.owner(slot)
    low, high = next(row[:2] for row in nodes.map() if row[0] <= slot <= row[1])
    ask(owner, "CLUSTER", "DELSLOTSRANGE", low, high)
    try:
        yield
    finally:
        ask(owner, "CLUSTER", "ADDSLOTSRANGE", low, high)


async def test_commands_wait_for_a_cluster_that_is_down(masters: Cluster) -> None:
    """CLUSTERDOWN for less than a second costs no error."""
    async with cluster_storage(masters) as storage:
        session = Session[Any](id=new_session_id())
        await storage.store(session)

        with unserved(masters, session.id):
            load = asyncio.create_task(storage.load(session.id))
            await asyncio.to_thread(eventually, lambda: masters.calls("getex")["refusals"] > 1)

        assert await load == session


async def test_commands_fail_while_the_cluster_is_down(masters: Cluster) -> None:
    """The first one waits for a second; later ones fail after one attempt. Then all works again."""
    async with cluster_storage(masters) as storage:
        session = Session[Any](id=new_session_id())
        await storage.store(session)

        with unserved(masters, session.id):
            attempts: list[int] = []
            for _ in range(3):
                masters.reset_statistics()
                with pytest.raises(StorageUnavailable, match="the cluster is down") as caught:
                    await storage.load(session.id)
                assert not caught.value.in_doubt
                attempts.append(masters.calls("getex")["refusals"])
            assert attempts[0] > 5
            assert attempts[1:] == [1, 1]
            for verb in (
                storage.delete(session.id),
                *(storage.store(session, when=when) for when in When),
            ):
                with pytest.raises(StorageUnavailable) as caught:
                    await verb
                assert not caught.value.in_doubt
            async with cluster_storage(masters) as late:  # has never had the whole map
                assert type((await timed_outcome(late.load(session.id)))[0]) is StorageUnavailable
        masters.settle()

        assert await storage.load(session.id) == session


async def _all_unavailable(storage: RedisStorage[Any], within: float) -> None:
    calls = [
        *(storage.load(new_session_id()) for _ in range(50)),
        *(storage.delete(new_session_id()) for _ in range(50)),
        *(storage.store(Session(id=new_session_id()), when=when) for when in list(When) * 10),
    ]
    results = await asyncio.gather(*(timed_outcome(call) for call in calls))
    assert {type(result) for result, _ in results} == {StorageUnavailable}
    assert max(took for _, took in results) < within


async def test_failing_calls_share_few_discoveries(masters: Cluster) -> None:
    """At most four a second, however many calls fail; CLUSTER SLOTS is counted at the nodes."""
    first, dead, _ = masters.nodes
    ids = itertools.cycle([id_on(masters, dead) for _ in range(20)])
    failed = 0
    async with cluster_storage(masters) as storage:
        await timed_outcome(storage.load(id_on(masters, first)))
        with mended(dead):
            dead.kill()
            masters.reset_statistics()
            began = time.monotonic()
            while (lasted := time.monotonic() - began) < 2.0:
                results = await asyncio.gather(
                    *(timed_outcome(storage.load(next(ids))) for _ in "x" * 50)
                )
                failed += sum(type(result) is StorageUnavailable for result, _ in results)
                await asyncio.sleep(0.01)
            discoveries = masters.calls("cluster|slots")["calls"]

    assert failed > 500
    assert 1 <= discoveries <= 4 * lasted + 2


async def test_ping_reports_each_master(masters: Cluster) -> None:
    """A dead master is not available, and its warning says why; only a dead cluster is an error."""
    dead, *others = masters.nodes
    async with cluster_storage(masters, timeout=1.0) as storage:
        await storage.ping()
        with mended(dead, *others):
            dead.kill()
            found = {each.address: each for each in await storage.ping()}

            assert {address for address, each in found.items() if each.available} == {
                f"127.0.0.1:{node.port}" for node in others
            }
            (warning,) = found[f"127.0.0.1:{dead.port}"].warnings
            assert "Connection refused" in warning

            for node in others:
                node.kill()
            with pytest.raises(StorageUnavailable):
                await storage.ping()


async def _recovered(storage: RedisStorage[Any]) -> None:
    """Use the storage until it works; the first calls after an outage may fail at once."""
    session = Session[Any](id=new_session_id())
    async with asyncio.timeout(RECOVERS_WITHIN):
        while (await timed_outcome(storage.store(session)))[0] is not None:  # noqa: ASYNC110 - a retry
            await asyncio.sleep(0.05)
    assert await storage.load(session.id) == session


async def test_cluster_without_a_majority_is_unavailable(masters: Cluster) -> None:
    """Two of three masters are gone, then all; verbs end in time, and work again afterwards."""
    timeout = 0.5
    async with cluster_storage(masters, timeout=timeout) as storage:
        await storage.store(Session(id="before"))
        first, *others = masters.nodes
        with mended(first, *others):
            for node in others:
                node.kill()
            eventually(lambda: "cluster_state:fail" in str(ask(first, "CLUSTER", "INFO")))
            await _all_unavailable(storage, timeout + 0.5)

            first.kill()
            await _all_unavailable(storage, timeout + 0.5)
            async with cluster_storage(masters, timeout=timeout) as late:
                await _all_unavailable(late, timeout + 0.5)
        masters.settle()

        await _recovered(storage)


async def test_cluster_that_hangs_is_unavailable(masters: Cluster) -> None:
    """The nodes accept connections and answer nothing; every verb ends in time.

    Without further calls, the storage does not go on trying.
    """
    timeout = 0.4
    async with cluster_storage(masters, timeout=timeout) as storage:
        await storage.store(Session(id="before"))
        with mended(*masters.nodes):
            for node in masters.nodes:
                node.pause()
            await _all_unavailable(storage, timeout + 0.5)
            async with asyncio.timeout(RECOVERS_WITHIN):
                while our_tasks():  # noqa: ASYNC110 - nothing tells their end
                    await asyncio.sleep(0.05)
            async with cluster_storage(masters, timeout=timeout) as late:
                await _all_unavailable(late, timeout + 0.5)
        masters.settle()

        await _recovered(storage)


async def test_redirected_call_ends_in_time(masters: Cluster) -> None:
    """It waits behind calls with later deadlines."""
    timeout = 1.0
    source, target, _ = masters.masters()
    moved, other = id_on(masters, source), id_on(masters, target)
    async with cluster_storage(masters, timeout=timeout) as storage:
        for id in (moved, other):
            await storage.store(Session(id=id))
        masters.move(slot_of(moved), target)

        with mended(source, target):
            source.pause()
            early = asyncio.create_task(timed_outcome(storage.load(moved)))
            await asyncio.sleep(0.7)
            target.pause()
            late = asyncio.create_task(timed_outcome(storage.load(other)))
            await asyncio.sleep(0.05)
            source.resume()  # answers that the slot has moved
            result, took = await early
            await late

    assert type(result) is StorageUnavailable
    assert took < timeout + 0.4


async def test_late_redirected_call_fails_alone(masters: Cluster) -> None:
    """It fails at its deadline; the other callers of the node do not."""
    timeout = 1.0
    source, target, _ = masters.masters()
    moved, other = id_on(masters, source), id_on(masters, target)
    async with cluster_storage(masters, timeout=timeout) as storage:
        for id in (moved, other):
            await storage.store(Session(id=id))
        masters.move(slot_of(moved), target)

        with mended(source, target):
            source.pause()
            late = asyncio.create_task(timed_outcome(storage.load(moved)))
            await asyncio.sleep(0.6)
            target.pause()  # for half a second, half of the timeout
            source.resume()  # answers that the slot has moved
            await asyncio.sleep(0.2)
            on_time = asyncio.create_task(timed_outcome(storage.load(other)))
            await late
            await asyncio.sleep(0.1)
            target.resume()
            result, _ = await on_time

    assert isinstance(result, Session)


async def test_one_startup_node_is_enough(masters: Cluster) -> None:
    """The other start-up nodes of the client refuse connections or hang."""
    with socket.socket() as silent, refused_port() as refused:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # the system accepts connections, and nothing answers
        ports = (refused, silent.getsockname()[1], masters.nodes[0].port)
        client = RedisCluster(startup_nodes=[ClusterNode("127.0.0.1", port) for port in ports])
        async with RedisStorage[Any](client, ttl=600, timeout=4.0) as storage:
            session = Session[Any](id=new_session_id())
            await storage.store(session)
            assert await storage.load(session.id) == session
        await client.aclose()


@pytest.mark.parametrize(
    ("password", "reason"),
    [("wrong", "refuses the user name or password"), (None, "asks for a password")],
)
async def test_refused_password_is_the_reason(
    masters: Cluster, password: str | None, reason: str
) -> None:
    """Loads and pings fail with it before there is a map of slots."""
    nodes = masters.nodes
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


async def test_missing_cluster_is_named() -> None:
    """The error says which node refuses connections."""
    with refused_port() as port:
        client = RedisCluster(host="127.0.0.1", port=port)
        async with RedisStorage[Any](client, ttl=600) as storage:
            with pytest.raises(StorageUnavailable, match=f"refused .127.0.0.1:{port}"):
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
async def test_invalid_map_is_refused(row: list[object]) -> None:
    """No master of it is used."""

    async def answer(_: Address) -> list[object]:
        return [row]

    client = RedisCluster(host="127.0.0.1", port=1)
    found = ClusterMap(client, answer, lambda _: False, lambda: None)
    await found.discover(asyncio.get_running_loop().time() + 5)

    assert found.masters() == set()


async def test_aclose_in_an_outage_leaves_nothing_behind(masters: Cluster) -> None:
    """No task and no connection remains while callers look for a new master."""
    first, dead, _ = masters.nodes
    ids = [id_on(masters, dead) for _ in range(3)]
    left: list[str] = []
    async with cluster_client(first.port) as client:
        tasks = asyncio.all_tasks()
        with mended(dead):
            dead.kill()
            for turns in range(30):
                storage = RedisStorage[Any](client, ttl=600, timeout=1.0)
                await timed_outcome(storage.load(id_on(masters, first)))
                calls = [asyncio.create_task(timed_outcome(storage.load(id))) for id in ids]
                for _ in range(turns):
                    await asyncio.sleep(0)

                await storage.aclose()

                await asyncio.gather(*calls)
                left += [f"after {turns} turns" for _ in asyncio.all_tasks() - tasks]
                tasks = asyncio.all_tasks()

    assert left == []
