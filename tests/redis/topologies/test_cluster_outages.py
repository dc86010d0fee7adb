"""Clusters that lose nodes or slots: the errors, and the recovery.

Each test mends the cluster, and begins when all nodes agree.
"""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import redis
from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode

from aiosessions import Session, StorageUnavailable, When, new_session_id
from aiosessions.redis import _outage
from aiosessions.redis._cluster_map import ClusterMap
from aiosessions.redis._driver import Address
from tests.support.clients import (
    LONG,
    Storage,
    cluster_client,
    cluster_storage,
    id_on,
    our_tasks,
    outcome,
    recovered,
    slot_of,
    stored,
    timed_outcome,
)
from tests.support.secrets import said_by
from tests.support.servers import Server, refused_port
from tests.support.topologies import Cluster, ask, eventually, mended

pytestmark = pytest.mark.slow


@contextmanager
def unserved(nodes: Cluster, id: str) -> Iterator[None]:
    """Take the slots of a master, that of a session among them, away during the block."""
    owner = nodes.owner(slot_of(id))
    low, high = next(row[:2] for row in nodes.map() if row[2] is owner)
    ask(owner, "CLUSTER", "DELSLOTSRANGE", low, high)
    try:
        yield
    finally:
        ask(owner, "CLUSTER", "ADDSLOTSRANGE", low, high)


@pytest.mark.usefixtures("long_bridge")
async def test_commands_wait_for_a_cluster_that_is_down(nodes: Cluster) -> None:
    """A short CLUSTERDOWN costs no error."""
    session = Session[object](id=id_on(nodes, nodes.nodes[0]))
    async with (
        cluster_storage(nodes, timeout=LONG) as storage,
        cluster_storage(nodes, timeout=LONG) as late,  # gets a map without a master for the slot
    ):
        await storage.store(session)
        nodes.ask_all("CONFIG", "RESETSTAT")

        with unserved(nodes, session.id):
            loads = [asyncio.create_task(each.load(session.id)) for each in (storage, late)]
            await asyncio.to_thread(eventually, lambda: nodes.calls("getex")["refusals"] > 5)

        assert [await load for load in loads] == [session] * 2


async def test_commands_fail_while_the_cluster_is_down(
    nodes: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one waits for a moment; later ones fail after one attempt, until it is up again."""
    monkeypatch.setattr(_outage, "BRIDGE", 0.3)
    async with cluster_storage(nodes, timeout=LONG) as storage:
        session = await stored(storage)

        for _ in range(2):  # a second time, the same
            with unserved(nodes, session.id):
                attempts: list[int] = []
                for _ in range(3):
                    nodes.ask_all("CONFIG", "RESETSTAT")
                    with pytest.raises(StorageUnavailable, match="the cluster is down") as caught:
                        await storage.load(session.id)
                    assert not caught.value.in_doubt
                    attempts.append(nodes.calls("getex")["refusals"])
                assert attempts[0] > 1
                assert attempts[1:] == [1, 1]
                verbs = [storage.delete(session.id)]
                for verb in (*verbs, *(storage.store(session, when=when) for when in When)):
                    with pytest.raises(StorageUnavailable) as caught:
                        await verb
                    assert not caught.value.in_doubt
            await recovered(storage, session)


@pytest.mark.usefixtures("short_bridge")
async def test_ping_reports_each_master(nodes: Cluster) -> None:
    """A dead master is not available, and its warning says why."""
    dead, *others = nodes.nodes
    async with cluster_storage(nodes, timeout=LONG) as storage:
        await storage.ping()
        with mended(dead):
            dead.kill()
            found = {each.address: each for each in await storage.ping()}

    assert {address for address, each in found.items() if each.available} == {
        f"127.0.0.1:{node.port}" for node in others
    }
    (warning,) = found[f"127.0.0.1:{dead.port}"].warnings
    assert "Connection refused" in warning


async def unavailable(storage: Storage) -> None:
    """Check that each of many concurrent verbs is `StorageUnavailable`."""
    calls = [
        *(storage.load(new_session_id()) for _ in range(50)),
        *(storage.delete(new_session_id()) for _ in range(50)),
        *(storage.store(Session(id=new_session_id()), when=when) for when in list(When) * 10),
        storage.ping(),
    ]
    assert set(await asyncio.gather(*map(outcome, calls))) == {StorageUnavailable}


@pytest.mark.parametrize(
    "end", [pytest.param(Server.kill, marks=pytest.mark.slow), Server.pause], ids=["killed", "hung"]
)
async def test_cluster_without_nodes_is_unavailable(
    nodes: Cluster, end: Callable[[Server], None]
) -> None:
    """Every verb ends, and works again later. Without calls, the storage does not go on trying."""
    async with cluster_storage(nodes, timeout=0.5) as storage:
        await recovered(storage)
        with mended(*nodes.nodes):
            for node in nodes.nodes:
                end(node)
            await unavailable(storage)
            async with asyncio.timeout(LONG):
                while our_tasks():  # noqa: ASYNC110 - nothing tells their end
                    await asyncio.sleep(0.05)
            async with cluster_storage(nodes, timeout=0.5) as late:
                await unavailable(late)

        await recovered(storage)


async def test_one_startup_node_is_enough(nodes: Cluster) -> None:
    """The other start-up nodes of the client refuse connections or hang."""
    with socket.socket() as silent, refused_port() as refused:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # the system accepts connections, and nothing answers
        ports = (refused, silent.getsockname()[1], nodes.nodes[0].port)
        client = RedisCluster(startup_nodes=[ClusterNode("127.0.0.1", port) for port in ports])
        async with Storage(client, ttl=600, timeout=2.4) as storage:
            session = await stored(storage)
            assert await storage.load(session.id) == session
        await client.aclose()


@pytest.mark.parametrize(
    ("password", "reason"),
    [("wrong", "refuses the user name or password"), (None, "asks for a password")],
)
async def test_refused_password_is_the_reason(
    nodes: Cluster, password: str | None, reason: str
) -> None:
    """Loads and pings fail with it before there is a map of slots."""
    client = RedisCluster(host="127.0.0.1", port=nodes.nodes[0].port, password=password)
    async with Storage(client, ttl=600) as storage:
        try:
            nodes.ask_all("CONFIG", "SET", "requirepass", "right")
            for verb in (storage.load("id"), storage.ping()):
                with pytest.raises(StorageUnavailable, match=reason) as caught:
                    await verb
                assert caught.value.__cause__ is not None
        finally:
            for node in nodes.nodes:
                with redis.Redis(port=node.port, password="right") as direct:
                    direct.config_set("requirepass", "")
    await client.aclose()


async def test_missing_cluster_is_named() -> None:
    """The error says which node refuses connections, and does not name the session."""
    id = new_session_id()
    with refused_port() as port:
        async with cluster_client(port) as client, Storage(client, ttl=60, timeout=1.0) as storage:
            with pytest.raises(StorageUnavailable, match=f"refused .127.0.0.1:{port}") as caught:
                await storage.load(id)

    assert id not in said_by(caught.value)


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

    found = cluster_map(answer)
    await found.discover(asyncio.get_running_loop().time() + LONG)

    assert found.masters() == set()


def cluster_map(ask: Callable[[Address], object]) -> ClusterMap:
    """A map that calls a function for each discovery."""
    client = RedisCluster(host="127.0.0.1", port=1)
    return ClusterMap(client, ask, lambda _: False, lambda: None)  # type: ignore[arg-type]


async def test_failing_calls_share_few_discoveries(jump: Callable[[float], None]) -> None:
    """At most four begin in a second, however many calls ask for one."""
    asked: list[Address] = []

    async def fail(address: Address) -> Exception:
        asked.append(address)
        return ConnectionRefusedError()

    loop = asyncio.get_running_loop()
    began = loop.time()
    found = cluster_map(fail)
    for _ in range(10):
        for _ in range(50):
            found.discover_soon()
            await asyncio.sleep(0)
        jump(0.1)

    assert 3 <= len(asked) <= 1 + (loop.time() - began) * 4
    assert not found.known


async def test_aclose_in_an_outage_leaves_nothing_behind(nodes: Cluster) -> None:
    """No task remains while callers look for a new master."""
    first, dead, _ = nodes.nodes
    ids = [id_on(nodes, dead) for _ in range(3)]
    left: list[str] = []
    async with cluster_client(first.port) as client:
        tasks = asyncio.all_tasks()
        with mended(dead):
            dead.kill()
            for turns in range(30):
                storage = Storage(client, ttl=600, timeout=1.0)
                await timed_outcome(storage.load(id_on(nodes, first)))
                calls = [asyncio.create_task(timed_outcome(storage.load(id))) for id in ids]
                for _ in range(turns):
                    await asyncio.sleep(0)

                await storage.aclose()

                await asyncio.gather(*calls)
                left += [f"after {turns} turns" for _ in asyncio.all_tasks() - tasks]
                tasks = asyncio.all_tasks()

    assert left == []
