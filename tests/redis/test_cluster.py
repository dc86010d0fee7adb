"""Sessions in a cluster of real nodes: one connection to each master, and slots that move.

test_cluster_faults.py covers nodes that fail.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from redis.cluster import LoadBalancingStrategy
from redis.crc import key_slot

from aiosessions import (
    Codec,
    JsonCodec,
    RedisStorage,
    Session,
    SessionConflict,
    SessionExists,
    SessionManager,
    SessionNotFound,
    StorageClosed,
    When,
    new_session_id,
)
from aiosessions.testing import (
    FakeTime,
    RemoteStorageContract,
    SelfExpiringStorageContract,
    SharedStorageContract,
    StorageFactory,
)
from tests.support.clients import (
    NAME,
    Caller,
    busy,
    cluster_client,
    cluster_storage,
    id_on,
    slot_of,
    timed_outcome,
)
from tests.support.connecting import run_block
from tests.support.servers import Server, binaries, refused_port
from tests.support.topologies import (
    Cluster,
    ask,
    cluster,
    connections,
    disconnected,
    eventually,
    move_keys,
)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """Three masters, each with a replica."""
    # No node fails here. On a busy machine, a shorter timeout would let replicas take over.
    options = ("--cluster-node-timeout", "30000")
    with cluster(binaries()["valkey"], *options, masters=3, replicas=1) as made:
        yield made


@pytest.fixture
def nodes(shared_cluster: Cluster) -> Cluster:
    """The same cluster, empty, after all nodes agree."""
    shared_cluster.settle()
    shared_cluster.flush()
    return shared_cluster


class TestRedisStorageOnACluster(
    FakeTime, RemoteStorageContract, SharedStorageContract, SelfExpiringStorageContract
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

    @pytest.fixture
    def make_unreachable_storage(self) -> Iterator[StorageFactory]:
        """Storages of a cluster that refuses connections."""
        with refused_port() as port:

            @asynccontextmanager
            async def make(
                *, ttl: float = 60.0, codec: Codec[Any] | None = None
            ) -> AsyncIterator[RedisStorage[Any]]:
                async with (
                    cluster_client(port) as client,
                    RedisStorage[Any](client, ttl=ttl, codec=codec or JsonCodec()) as storage,
                ):
                    yield storage

            yield make


async def test_load_is_one_command_to_one_node(nodes: Cluster) -> None:
    """No command is redirected while no slot moves, even with braces in the ids."""
    ids = [f"{new_session_id()}{tag}" for tag in ("", "{}", "{a}", "{b", "}{c}", "{{d}}") * 5]
    async with cluster_storage(nodes) as storage:
        for id in ids:
            await storage.store(Session(id=id))
    async with cluster_storage(nodes) as storage:
        await storage.ping()  # so that it has the map from a node
        nodes.reset_statistics()

        await asyncio.gather(*(storage.load(id) for id in ids))

    assert nodes.calls("getex") == {"calls": len(ids), "refusals": 0}


async def test_one_connection_to_each_master(nodes: Cluster) -> None:
    """Replicas have none, not even the one that sent the map."""
    masters = nodes.masters()
    replica = nodes.replicas(masters[0])[0]

    async with (
        cluster_client(replica.port) as client,
        RedisStorage[Any](client, ttl=600) as one,
        RedisStorage[Any](client, ttl=600) as other,
    ):
        for count, storage in ((1, one), (2, other)):
            sessions = [Session[Any](id=id_on(nodes, n)) for n in masters for _ in range(50)]
            await asyncio.gather(*(storage.store(session) for session in sessions))
            await asyncio.gather(*(storage.load(session.id) for session in sessions))

            found = {node: connections(node, NAME) for node in nodes.nodes}

            assert found == {node: count if node in masters else 0 for node in nodes.nodes}


def test_documentation_runs(nodes: Cluster) -> None:
    """Only the addresses are replaced."""
    places = {
        f'("node-{number}", 6379)': f'("127.0.0.1", {node.port})'
        for number, node in enumerate(nodes.nodes[:3], start=1)
    }

    run_block("cluster", places)

    assert sum(ask(master, "DBSIZE") for master in nodes.masters()) == 1


async def test_ping_asks_every_master(nodes: Cluster) -> None:
    """It is the first call of the storage, so it has to find the masters."""
    async with cluster_storage(nodes) as storage:
        found = await storage.ping()

    assert [(each.role, each.available) for each in found] == [("master", True)] * 3


async def test_first_callers_share_one_discovery(nodes: Cluster) -> None:
    """200 callers use a new storage at once; it asks for CLUSTER SLOTS once."""
    for _ in range(5):
        async with cluster_storage(nodes) as storage:
            sessions = [Session[Any](id=new_session_id()) for _ in range(200)]
            for session in sessions:
                session.data = session.id

            async def use(session: Session[Any], storage: RedisStorage[Any] = storage) -> None:
                await storage.store(session, when=When.ABSENT)
                assert await storage.load(session.id) == session

            nodes.reset_statistics()
            await asyncio.gather(*(use(session) for session in sessions))

            assert nodes.calls("cluster|slots")["calls"] == 1
            found = Counter({node: connections(node, NAME) for node in nodes.nodes})
            assert max(found.values()) == 1


async def test_borrowed_client_is_unchanged(nodes: Cluster) -> None:
    """It works before, during and after; its settings and its connections do not change."""
    async with cluster_client(nodes.nodes[0].port) as client:
        await client.set("session:theirs", "1")
        pools = {node.name: id(node) for node in client.get_nodes()}
        settings = dict(client.connection_kwargs)

        async with RedisStorage[Any](client, ttl=600) as storage:
            session = Session[Any](id=new_session_id())
            await storage.store(session)
            await client.set("session:theirs", "2")
            await storage.load(session.id)

        assert await client.get("session:theirs") == b"2"
        assert await client.mget_nonatomic("session:theirs", f"session:{session.id}")
        assert {node.name: id(node) for node in client.get_nodes()} == pools
        assert client.connection_kwargs == settings


async def test_borrowed_client_does_not_connect(nodes: Cluster) -> None:
    """Only the storage connects."""
    async with (
        cluster_client(nodes.nodes[0].port) as client,
        RedisStorage[Any](client, ttl=9) as storage,
    ):
        await storage.store(Session(id=new_session_id()))

        assert client._initialize
        assert client.get_nodes() == []


@pytest.mark.parametrize(
    "settings",
    [
        {"protocol": 2},
        {"protocol": 3},
        {"decode_responses": True},
        {"load_balancing_strategy": LoadBalancingStrategy.ROUND_ROBIN},
        {"socket_timeout": 0.001, "max_connections": 1},
    ],
    ids=["resp2", "resp3", "text", "replicas", "small-pool"],
)
async def test_client_settings_make_no_difference(nodes: Cluster, settings: dict[str, Any]) -> None:
    """They concern the client's connections, or the form of its replies."""
    async with cluster_storage(nodes, **settings) as storage:
        caller = Caller(storage, new_session_id)
        for _ in range(10):
            await caller.use_all_verbs()

        assert caller.wrong == []
        assert caller.unavailable == []


async def test_prefix_may_choose_the_slot(nodes: Cluster) -> None:
    """A hash tag in the prefix keeps all sessions on one node."""
    async with (
        cluster_client(nodes.nodes[0].port) as client,
        RedisStorage[Any](client, ttl=600, key_prefix="{app}:") as storage,
    ):
        sessions = [Session[Any](id=new_session_id()) for _ in range(20)]
        for session in sessions:
            await storage.store(session)

        assert [await storage.load(session.id) for session in sessions] == sessions
        assert ask(nodes.owner(key_slot(b"{app}:")), "DBSIZE") == len(sessions)


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


async def test_cancelled_aclose_leaves_nothing_behind(nodes: Cluster) -> None:
    """The storage of a cancelled scope is closed like any other."""
    loop = asyncio.get_running_loop()
    tasks = asyncio.all_tasks()
    async with cluster_client(nodes.nodes[0].port) as client:
        with anyio.CancelScope() as scope:
            async with RedisStorage[Any](client, ttl=600) as storage:
                for number in range(20):
                    await timed_outcome(storage.load(str(number)))
                scope.cancel()
                await anyio.lowlevel.checkpoint()

        await asyncio.to_thread(eventually, lambda: asyncio.all_tasks(loop) == tasks)

    disconnected(nodes.nodes, NAME)


async def test_aclose_during_redirections_leaves_nothing_behind(nodes: Cluster) -> None:
    """No task and no connection remains while callers follow an ASK to another node."""
    tag = new_session_id()
    slot = slot_of(f"{{{tag}}}")
    target = next(node for node in nodes.masters() if node is not nodes.owner(slot))
    tasks = asyncio.all_tasks()
    left: list[str] = []
    with nodes.moving(slot, target) as source:
        async with cluster_client(source.port) as client:
            for turns in range(300):
                storage = RedisStorage[Any](client, ttl=600)
                await timed_outcome(storage.load(f"{{{tag}}}"))
                loads = [storage.load(f"{{{tag}}}{number}") for number in range(3)]
                calls = [asyncio.create_task(timed_outcome(load)) for load in loads]
                for _ in range(turns % 60):
                    await asyncio.sleep(0)

                await storage.aclose()

                await asyncio.gather(*calls)
                left += [f"after {turns} turns" for _ in asyncio.all_tasks() - tasks]
                tasks = asyncio.all_tasks()

    assert left == []
    disconnected(nodes.nodes, NAME)


@pytest.mark.parametrize(
    "id",
    ["{tag}1", "{tag}2", "a{tag}", "{}", "{}a", "a{}b", "}{", "{", "}", "{{a}}", "{a}{b}", "a}{b}"],
)
async def test_braces_in_ids_choose_only_the_slot(nodes: Cluster, id: str) -> None:
    """Each id is another session."""
    async with cluster_storage(nodes) as storage:
        caller = Caller(storage, lambda: id)
        for _ in range(3):
            await caller.use_all_verbs()
        session = Session[Any](id=id, data=id)
        await storage.store(session)

        assert await storage.load(id) == session
        assert caller.wrong == []
        assert ask(nodes.owner(slot_of(id)), "EXISTS", f"session:{id}") == 1


async def test_session_rotates_to_another_node(nodes: Cluster) -> None:
    """The old and the new id need not share a slot."""
    async with cluster_storage(nodes) as storage, SessionManager(storage) as sessions:
        before = await sessions.create(data="mine")
        for _ in range(100):
            after = await sessions.rotate(before)
            if nodes.owner(slot_of(after.id)) is not nodes.owner(slot_of(before.id)):
                break
            before = after
        else:
            pytest.fail("a hundred random ids are all on one node")

        assert (await sessions.get(after.id)).data == "mine"
        with pytest.raises(SessionConflict):
            await sessions.save(await sessions.get(before.id))
        assert await sessions.delete(after.id) is True


async def test_moving_slot_causes_no_error(nodes: Cluster) -> None:
    """The slot moves from master to master while callers use all verbs in it."""
    tag = new_session_id()
    slot = slot_of(f"{{{tag}}}")
    counter = itertools.count()
    async with cluster_storage(nodes) as storage:
        for number in range(200):
            await storage.store(Session(id=f"{{{tag}}}resident-{number}", data=number))
        callers = [Caller(storage, lambda: f"{{{tag}}}{next(counter)}") for _ in range(20)]

        async with busy(callers, Caller.use_all_verbs):
            masters = nodes.masters()
            begin = masters.index(nodes.owner(slot))
            for step in range(1, 7):
                await asyncio.to_thread(nodes.move, slot, masters[(begin + step) % 3])
                await asyncio.sleep(0.05)

        for number in range(200):
            loaded = await storage.load(f"{{{tag}}}resident-{number}")
            assert loaded.data == number
    assert [error for caller in callers for error in caller.wrong] == []
    assert [error for caller in callers for error in caller.unavailable] == []
    assert all(caller.rounds > 3 for caller in callers)


async def test_all_verbs_work_in_a_half_moved_slot(nodes: Cluster) -> None:
    """Sessions are moved, not moved yet, or created during the move (ASK)."""
    tag = new_session_id()
    slot = slot_of(f"{{{tag}}}")
    target = next(node for node in nodes.masters() if node is not nodes.owner(slot))
    ids = [f"{{{tag}}}{number}" for number in range(30)]
    async with cluster_storage(nodes) as storage:
        for id in ids:
            await storage.store(Session(id=id, data=id))

        with nodes.moving(slot, target) as source:
            move_keys([f"session:{id}" for id in ids[::2]], source, target)

            for id in ids:
                session = await storage.load(id)
                assert session.data == id
                with pytest.raises(SessionExists):
                    await storage.store(Session(id=id), when=When.ABSENT)
                await storage.store(session, when=When.UNCHANGED)
                await storage.store(session, when=When.PRESENT)
                await storage.store(session)
                assert await storage.load(id) == session
            assert ask(source, "CLUSTER", "COUNTKEYSINSLOT", slot) == len(ids) // 2
            caller = Caller(storage, lambda: f"{{{tag}}}new")
            for _ in range(3):
                await caller.use_all_verbs()
            assert caller.wrong == []
            assert caller.unavailable == []
            await asyncio.gather(*(storage.load(id) for id in ids * 10))
            assert [await storage.delete(id) for id in ids] == [True] * len(ids)
            assert [await storage.delete(id) for id in ids] == [False] * len(ids)
            created = Session[Any](id=ids[0], data="created")
            await storage.store(created, when=When.ABSENT)
            assert ask(target, "CLUSTER", "COUNTKEYSINSLOT", slot) == 1

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

    announce(kind, domain)
    try:
        yield
    finally:
        announce("ip", "")


@pytest.mark.parametrize(
    ("kind", "domain"),
    [("hostname", "invalid"), ("hostname", ""), ("unknown-endpoint", "")],
    ids=["hostname", "hostname-not-set", "unknown-endpoint"],
)
async def test_announced_addresses_are_remapped(nodes: Cluster, kind: str, domain: str) -> None:
    """The client's `address_remap` applies to the map, MOVED and ASK, as do missing names."""
    tag = new_session_id()
    slot = slot_of(f"{{{tag}}}")
    target = next(node for node in nodes.masters() if node is not nodes.owner(slot))
    counter = itertools.count()

    def remap(address: tuple[str, int]) -> tuple[str, int]:
        return "127.0.0.1", address[1]

    with announcing(nodes, kind, domain):
        remapping = remap if domain else None
        async with cluster_storage(nodes, timeout=2.0, address_remap=remapping) as storage:
            caller = Caller(storage, lambda: f"{{{tag}}}{next(counter)}")
            await caller.use_all_verbs()
            with nodes.moving(slot, target):
                await caller.use_all_verbs()
            for _ in range(3):
                await caller.use_all_verbs()

            assert caller.wrong == []
            assert caller.unavailable == []
            assert {connections(node, NAME) for node in nodes.nodes} <= {0, 1}
