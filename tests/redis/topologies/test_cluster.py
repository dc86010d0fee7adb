"""Sessions in a cluster of real nodes: one connection to each master, and slots that move.

test_cluster_outages.py covers nodes that fail, test_failover.py replicas that take over.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from typing import Any

import pytest
from redis.cluster import LoadBalancingStrategy

from aiosessions import (
    Codec,
    JsonCodec,
    RedisStorage,
    Session,
    SessionExists,
    SessionNotFound,
    StorageClosed,
    When,
    new_session_id,
)
from aiosessions.testing import (
    FakeTime,
    IndexedStorageContract,
    SelfExpiringStorageContract,
    SharedStorageContract,
    StorageFactory,
)
from tests.support.clients import (
    LONG,
    NAME,
    Caller,
    busy,
    cluster_client,
    cluster_storage,
    id_on,
    ids_in,
    index_slot_of,
    key_of,
    many,
    slot_of,
    stored,
    timed_outcome,
    use,
)
from tests.support.connecting import run_block
from tests.support.servers import Server
from tests.support.topologies import (
    QUIET,
    Cluster,
    ask,
    connections,
    disconnected,
    eventually,
    move_keys,
)

pytestmark = pytest.mark.slow


class TestRedisStorageOnACluster(
    FakeTime, SharedStorageContract, SelfExpiringStorageContract, IndexedStorageContract
):
    """The contract, with redis-py's cluster client."""

    tick = 5.0  # the clocks of the servers cannot be stopped, so a test may take this long

    async def advance(self, seconds: float) -> None:
        """Move the clock of the storages, and age the keys of the cluster."""
        await super().advance(seconds)
        self.nodes.age(seconds)

    @pytest.fixture
    def make_storage(self, shared_cluster: Cluster) -> StorageFactory:
        """Storages on an empty cluster, each with a client to borrow."""
        shared_cluster.flush()
        self.nodes = shared_cluster

        @asynccontextmanager
        async def make(
            *, ttl: float = 60.0, codec: Codec[Any] | None = None
        ) -> AsyncIterator[RedisStorage[Any]]:
            async with (
                cluster_client(self.nodes.nodes[0].port) as client,
                RedisStorage[Any](
                    client, ttl=ttl, codec=codec or JsonCodec(), clock=self.clock
                ) as storage,
            ):
                yield storage

        return make


async def test_load_is_one_command_to_one_node(nodes: Cluster) -> None:
    """No command is redirected while no slot moves, even with braces in the ids."""
    tags = ("", "{}", "{}a", "a{}b", "{a}", "{b", "}", "}{c}", "{{d}}", "{e}{f}")
    ids = [f"{new_session_id()}{tag}" for tag in tags]
    async with cluster_storage(nodes) as storage:
        for id in ids:
            await storage.store(Session(id=id))
            assert ask(nodes.owner(slot_of(id)), "EXISTS", key_of(id)) == 1
    async with cluster_storage(nodes) as storage:
        await storage.ping()  # so that it has the map from a node
        nodes.ask_all("CONFIG", "RESETSTAT")

        await asyncio.gather(*(storage.load(id) for id in ids))

    assert nodes.calls("getex") == {"calls": len(ids), "refusals": 0}


async def test_one_connection_to_each_master(replicated: Cluster) -> None:
    """Replicas have none, not even the one that sent the map."""
    masters = replicated.masters()
    replica = replicated.replicas(masters[0])[0]

    async with (
        cluster_client(replica.port) as client,
        RedisStorage[Any](client, ttl=600) as one,
        RedisStorage[Any](client, ttl=600) as other,
    ):
        for count, storage in ((1, one), (2, other)):
            sessions = [Session[Any](id=id_on(replicated, n)) for n in masters for _ in range(50)]
            await asyncio.gather(*(storage.store(session) for session in sessions))
            await asyncio.gather(*(storage.load(session.id) for session in sessions))

            found = {node: connections(node, NAME) for node in replicated.nodes}

            assert found == {node: count * (node in masters) for node in replicated.nodes}


@pytest.mark.parametrize(
    "settings",
    [
        {"decode_responses": True},
        {"load_balancing_strategy": LoadBalancingStrategy.ROUND_ROBIN},
        {"socket_timeout": 0.001, "max_connections": 1},
    ],
    ids=["text", "replicas", "small-pool"],
)
async def test_client_settings_make_no_difference(
    replicated: Cluster, settings: dict[str, Any]
) -> None:
    """They concern the client's connections, or the form of its replies."""
    async with cluster_storage(replicated, **settings) as storage:
        await use(storage, callers=10)


def test_documentation_runs(nodes: Cluster) -> None:
    """Only the addresses are replaced."""
    places = {
        f'("node-{number}", 6379)': f'("127.0.0.1", {node.port})'
        for number, node in enumerate(nodes.nodes, start=1)
    }

    run_block("cluster", places)

    assert sum(nodes.ask_all("DBSIZE")) == 1


async def test_first_callers_share_one_discovery(nodes: Cluster) -> None:
    """200 callers use a new storage at once; it asks for CLUSTER SLOTS once."""
    nodes.ask_all("CONFIG", "RESETSTAT")
    async with cluster_storage(nodes) as storage:
        sessions = await many(storage, 200)
        await asyncio.gather(*(storage.load(session.id) for session in sessions))

        assert nodes.calls("cluster|slots")["calls"] == 1
        assert max(connections(node, NAME) for node in nodes.nodes) == 1


async def test_borrowed_client_is_unchanged(nodes: Cluster) -> None:
    """The storage does not connect it, and it works during and after."""
    async with cluster_client(nodes.nodes[0].port) as client:
        async with RedisStorage[Any](client, ttl=600) as storage:
            session = await stored(storage)
            assert client.get_nodes() == []
            await client.set("theirs", "1")
            pools = {node.name: id(node) for node in client.get_nodes()}
            settings = dict(client.connection_kwargs)
            await storage.load(session.id)

        assert await client.mget_nonatomic("theirs", key_of(session.id))
        assert {node.name: id(node) for node in client.get_nodes()} == pools
        assert client.connection_kwargs == settings


async def test_aclose_leaves_nothing_behind(nodes: Cluster) -> None:
    """No task and no connection remains, even if callers wait."""
    tasks = asyncio.all_tasks()
    async with cluster_client(nodes.nodes[0].port) as client:
        for turns in range(12):
            storage = RedisStorage[Any](client, ttl=600)
            calls = [asyncio.create_task(timed_outcome(storage.load(str(n)))) for n in range(30)]
            for _ in range(turns):
                await asyncio.sleep(0)
            if turns == 11:
                await asyncio.wait(calls)

            await storage.aclose()

            results = {type(result) for result, _ in await asyncio.gather(*calls)}
            assert results <= {SessionNotFound, StorageClosed}
            assert asyncio.all_tasks() == tasks

    disconnected(nodes.nodes, NAME)


class Moving:
    """A slot that moves, and ids in it.

    Attributes:
        slot: The slot.
        target: A master that does not have it.
    """

    def __init__(self, nodes: Cluster) -> None:
        self.slot = slot_of(new_session_id())
        self._ids = ids_in(self.slot)
        self.target = next(node for node in nodes.nodes if node is not nodes.owner(self.slot))

    def id(self) -> str:
        """A new id in the slot."""
        return next(self._ids)


async def test_aclose_during_redirections_leaves_nothing_behind(nodes: Cluster) -> None:
    """No task and no connection remains while callers follow an ASK to another node."""
    moving = Moving(nodes)
    absent = moving.id()
    tasks = asyncio.all_tasks()
    left: list[str] = []
    with nodes.moving(moving.slot, moving.target) as source:
        async with cluster_client(source.port) as client:
            for turns in range(60):
                storage = RedisStorage[Any](client, ttl=600)
                await timed_outcome(storage.load(absent))
                loads = [storage.load(absent) for _ in range(3)]
                calls = [asyncio.create_task(timed_outcome(load)) for load in loads]
                for _ in range(turns):
                    await asyncio.sleep(0)

                await storage.aclose()

                await asyncio.gather(*calls)
                left += [f"after {turns} turns" for _ in asyncio.all_tasks() - tasks]
                tasks = asyncio.all_tasks()

    assert left == []
    disconnected(nodes.nodes, NAME)


async def test_moving_slot_causes_no_error(nodes: Cluster) -> None:
    """The slot moves from master to master while callers use all verbs in it."""
    moving = Moving(nodes)
    residents = [Session[Any](id=moving.id(), data=number) for number in range(50)]
    async with cluster_storage(nodes, timeout=LONG) as storage:
        for session in residents:
            await storage.store(session)
        callers = [Caller(storage, moving.id) for _ in range(20)]

        async with busy(callers, Caller.use_everything):
            begin = nodes.nodes.index(nodes.owner(moving.slot))
            for step in range(1, 4):
                rounds = sum(caller.rounds for caller in callers)
                await asyncio.to_thread(nodes.move, moving.slot, nodes.nodes[(begin + step) % 3])
                while sum(caller.rounds for caller in callers) <= rounds:  # noqa: ASYNC110 - a poll
                    await asyncio.sleep(0.01)

        for session in residents:
            assert await storage.load(session.id) == session
    assert [problem for each in callers for problem in (*each.wrong, *each.unavailable)] == []


async def test_moving_index_causes_no_error(nodes: Cluster) -> None:
    """Principals are used before, during and after the move of their index."""
    slot = index_slot_of("alice")
    target = next(node for node in nodes.nodes if node is not nodes.owner(slot))
    principals = (id for id in iter(new_session_id, "") if index_slot_of(id) == slot)
    ids = (next(principals) if number % 4 == 0 else new_session_id() for number in count())
    async with cluster_storage(nodes, timeout=LONG) as storage:
        caller = Caller(storage, lambda: next(ids))
        await caller.use_principal()
        with nodes.moving(slot, target):
            await caller.use_principal()
        await caller.use_principal()

    assert (caller.wrong, caller.unavailable) == ([], [])


async def test_all_verbs_work_in_a_half_moved_slot(nodes: Cluster) -> None:
    """Sessions are moved, not moved yet, or created during the move (ASK)."""
    moving = Moving(nodes)
    ids = [moving.id() for _ in range(30)]
    async with cluster_storage(nodes) as storage:
        for id in ids:
            await storage.store(Session(id=id, data=id))

        with nodes.moving(moving.slot, moving.target) as source:
            move_keys([key_of(id) for id in ids[::2]], source, moving.target)

            for id in ids:
                session = await storage.load(id)
                assert session.data == id
                with pytest.raises(SessionExists):
                    await storage.store(Session(id=id), when=When.ABSENT)
                for when in (When.UNCHANGED, When.PRESENT, When.ALWAYS):
                    await storage.store(session, when=when)
                assert await storage.load(id) == session
            assert ask(source, "CLUSTER", "COUNTKEYSINSLOT", moving.slot) == len(ids) // 2
            caller = Caller(storage, moving.id)
            await caller.use_everything()
            assert caller.wrong == []
            assert caller.unavailable == []
            await asyncio.gather(*(storage.load(id) for id in ids * 10))
            assert Counter([await storage.delete(id) for id in ids * 2]) == {True: 30, False: 30}
            created = Session[Any](id=ids[0], data="created")
            await storage.store(created, when=When.ABSENT)
            assert ask(moving.target, "CLUSTER", "COUNTKEYSINSLOT", moving.slot) == 1

        assert await storage.load(created.id) == created


@contextmanager
def announcing(nodes: Cluster, kind: str, domain: str) -> Iterator[None]:
    """Let all nodes announce their addresses in one way: by names in a domain, or without names."""

    def announce(kind: str, domain: str) -> None:
        for node in nodes.nodes:
            name = domain and f"node-{node.port}.{domain}"
            ask(node, "CONFIG", "SET", "cluster-announce-hostname", name)
            ask(node, "CONFIG", "SET", "cluster-preferred-endpoint-type", kind)
        expected = len(nodes.nodes) ** 2 if domain else 0
        eventually(lambda: sum(map(named, nodes.nodes)) == expected)

    def named(node: Server) -> int:
        return str(ask(node, "CLUSTER", "NODES")).count(".invalid")

    # Nodes tell each other their names in pings, which are the more frequent the shorter this is.
    nodes.ask_all("CONFIG", "SET", "cluster-node-timeout", 1_500 if domain else QUIET)
    announce(kind, domain)
    try:
        yield
    finally:
        announce("ip", "")
        nodes.ask_all("CONFIG", "SET", "cluster-node-timeout", QUIET)


@pytest.mark.parametrize(
    ("kind", "domain"),
    [("hostname", "invalid"), ("hostname", ""), ("unknown-endpoint", "")],
    ids=["hostname", "hostname-not-set", "unknown-endpoint"],
)
async def test_announced_addresses_are_remapped(nodes: Cluster, kind: str, domain: str) -> None:
    """The client's `address_remap` applies to the map, MOVED and ASK, as do missing names."""
    moving = Moving(nodes)

    def remap(address: tuple[str, int]) -> tuple[str, int]:
        return "127.0.0.1", address[1]

    with announcing(nodes, kind, domain):
        remapping = remap if domain else None
        async with cluster_storage(nodes, timeout=LONG, address_remap=remapping) as storage:
            caller = Caller(storage, moving.id)
            await caller.use_all_verbs()
            with nodes.moving(moving.slot, moving.target):
                await caller.use_all_verbs()
            await caller.use_all_verbs()

            assert caller.wrong == []
            assert caller.unavailable == []
            assert {connections(node, NAME) for node in nodes.nodes} <= {0, 1}
