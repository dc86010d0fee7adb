"""Sessions in a cluster of real nodes: one connection to each master, and slots that move.

What goes wrong with nodes is in test_cluster_faults.py.
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
from tests.callers import (
    NAME,
    Caller,
    busy,
    cluster_client,
    cluster_storage,
    id_on,
    outcome,
    slot_of,
)
from tests.connecting import run_block
from tests.servers import Server, binaries, deaf_port
from tests.topologies import (
    Cluster,
    ask,
    asking,
    cluster,
    connections,
    disconnected,
    eventually,
    move_keys,
)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    """Three masters, each with a replica."""
    # Nothing fails in here: on a starved machine, a shorter one would have replicas take over.
    patient = ("--cluster-node-timeout", "30000")
    with cluster(binaries()["valkey"], *patient, masters=3, replicas=1) as made:
        yield made


@pytest.fixture
def nodes(shared_cluster: Cluster) -> Cluster:
    """The same, empty, and with nothing going on."""
    shared_cluster.settle()
    shared_cluster.flush()
    return shared_cluster


class TestRedisStorageOnACluster(
    FakeTime, RemoteStorageContract, SharedStorageContract, SelfExpiringStorageContract
):
    """The contract, with redis-py's cluster client as it comes."""

    tick = 5.0  # the servers' own clocks cannot be stopped, so this is what a test may take

    async def advance(self, seconds: float) -> None:
        """Move the storages' clock, and let the cluster's keys age with it."""
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
        """Storages of a cluster that nobody can connect to."""
        with deaf_port() as port:

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


def forget_statistics(nodes: Cluster) -> None:
    """Let all nodes count from zero."""
    for node in nodes.nodes:
        ask(node, "CONFIG", "RESETSTAT")


def calls(nodes: Cluster, command: str) -> Counter[str]:
    """How often all nodes together were sent a command, and how often they refused it."""
    found = Counter[str]()
    for node in nodes.nodes:
        with asking(node) as client:
            statistics = client.info("commandstats").get(f"cmdstat_{command}", {})
        found["calls"] += statistics.get("calls", 0)
        found["refusals"] += statistics.get("rejected_calls", 0)
    return found


async def test_a_load_is_one_command_to_one_node(nodes: Cluster) -> None:
    """Nothing is redirected while no slot moves, whatever is in the ids."""
    ids = [f"{new_session_id()}{tag}" for tag in ("", "{}", "{a}", "{b", "}{c}", "{{d}}") * 5]
    async with cluster_storage(nodes) as storage:
        for id in ids:
            await storage.store(Session(id=id))
    async with cluster_storage(nodes) as storage:
        await storage.ping()  # so that it knows the map, and has not corrected any of it
        forget_statistics(nodes)

        await asyncio.gather(*(storage.load(id) for id in ids))

    assert calls(nodes, "getex") == {"calls": len(ids), "refusals": 0}


async def test_a_storage_has_one_connection_to_each_master(nodes: Cluster) -> None:
    """And none to a replica, also if that was asked for the map, however many callers there are."""
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


def test_the_documentation_runs(nodes: Cluster) -> None:
    """As it stands, but for the addresses."""
    places = {
        f'("node-{number}", 6379)': f'("127.0.0.1", {node.port})'
        for number, node in enumerate(nodes.nodes[:3], start=1)
    }

    run_block("cluster", places)

    assert sum(ask(master, "DBSIZE") for master in nodes.masters()) == 1


async def test_a_readiness_check_asks_every_master(nodes: Cluster) -> None:
    """Also as the first thing that a storage is asked."""
    async with cluster_storage(nodes) as storage:
        found = await storage.ping()

    assert [each.role for each in found] == ["master"] * 3


async def test_first_use_by_many_callers_at_once_works(nodes: Cluster) -> None:
    """Nothing has to be initialised: 200 callers share one look at the map of slots."""
    for _ in range(5):
        async with cluster_storage(nodes) as storage:
            sessions = [Session[Any](id=new_session_id()) for _ in range(200)]
            for session in sessions:
                session.data = session.id

            async def use(session: Session[Any], storage: RedisStorage[Any] = storage) -> None:
                await storage.store(session, when=When.ABSENT)
                assert await storage.load(session.id) == session

            forget_statistics(nodes)
            await asyncio.gather(*(use(session) for session in sessions))

            assert calls(nodes, "cluster|slots")["calls"] == 1
            found = Counter({node: connections(node, NAME) for node in nodes.nodes})
            assert max(found.values()) == 1


async def test_a_borrowed_client_is_left_as_it_is(nodes: Cluster) -> None:
    """It works before, during and after, and neither its settings nor its connections change."""
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


async def test_a_client_that_nobody_used_stays_unused(nodes: Cluster) -> None:
    """The storage has connections of its own; the client does not connect at all."""
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
async def test_a_client_may_have_any_settings(nodes: Cluster, settings: dict[str, Any]) -> None:
    """What is for its own connections, or for the form of its replies, makes no difference."""
    async with cluster_storage(nodes, **settings) as storage:
        caller = Caller(storage, new_session_id)
        for _ in range(10):
            await caller.use_all_verbs()

        assert caller.wrong == []
        assert caller.unavailable == []


async def test_a_prefix_may_choose_the_slot(nodes: Cluster) -> None:
    """With a hash tag in it, all sessions are on one node, whatever their ids."""
    async with (
        cluster_client(nodes.nodes[0].port) as client,
        RedisStorage[Any](client, ttl=600, key_prefix="{app}:") as storage,
    ):
        sessions = [Session[Any](id=new_session_id()) for _ in range(20)]
        for session in sessions:
            await storage.store(session)

        assert [await storage.load(session.id) for session in sessions] == sessions
        assert ask(nodes.owner(key_slot(b"{app}:")), "DBSIZE") == len(sessions)


async def test_closing_leaves_nothing_behind(nodes: Cluster) -> None:
    """No task and no connection to any node, though callers were waiting."""
    tasks = asyncio.all_tasks()
    async with cluster_client(nodes.nodes[0].port) as client:
        for turns in range(12):
            storage = RedisStorage[Any](client, ttl=600)
            calls = [asyncio.create_task(outcome(storage.load(str(n)))) for n in range(30)]
            for _ in range(turns):
                await asyncio.sleep(0)
            if turns == 11:
                await asyncio.wait(calls)

            await storage.aclose()

            results = {type(result) for result, _ in await asyncio.gather(*calls)}
            assert results <= {SessionNotFound, StorageClosed}
            assert asyncio.all_tasks() == tasks

    disconnected(nodes.nodes, NAME)


async def test_a_cancelled_closing_leaves_nothing_behind(nodes: Cluster) -> None:
    """A storage that is left because its scope was cancelled is closed, like any other."""
    loop = asyncio.get_running_loop()
    tasks = asyncio.all_tasks()
    async with cluster_client(nodes.nodes[0].port) as client:
        with anyio.CancelScope() as scope:
            async with RedisStorage[Any](client, ttl=600) as storage:
                for number in range(20):
                    await outcome(storage.load(str(number)))
                scope.cancel()
                await anyio.lowlevel.checkpoint()

        await asyncio.to_thread(eventually, lambda: asyncio.all_tasks(loop) == tasks)

    disconnected(nodes.nodes, NAME)


async def test_closing_amid_redirections_leaves_nothing_behind(nodes: Cluster) -> None:
    """No task and no connection, though callers were about to follow an ASK to another node."""
    tag = new_session_id()
    slot = slot_of(f"{{{tag}}}")
    target = next(node for node in nodes.masters() if node is not nodes.owner(slot))
    tasks = asyncio.all_tasks()
    left: list[str] = []
    with nodes.moving(slot, target) as source:
        async with cluster_client(source.port) as client:
            for turns in range(300):
                storage = RedisStorage[Any](client, ttl=600)
                await outcome(storage.load(f"{{{tag}}}"))
                loads = [storage.load(f"{{{tag}}}{number}") for number in range(3)]
                calls = [asyncio.create_task(outcome(load)) for load in loads]
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
async def test_braces_in_ids_mean_nothing_to_the_caller(nodes: Cluster, id: str) -> None:
    """They choose the slot, as hash tags do, and each id is still a session of its own."""
    async with cluster_storage(nodes) as storage:
        caller = Caller(storage, lambda: id)
        for _ in range(3):
            await caller.use_all_verbs()
        session = Session[Any](id=id, data=id)
        await storage.store(session)

        assert await storage.load(id) == session
        assert caller.wrong == []
        assert ask(nodes.owner(slot_of(id)), "EXISTS", f"session:{id}") == 1


async def test_a_session_can_be_rotated_to_another_node(nodes: Cluster) -> None:
    """Old and new id need not share a slot: each answers on its own node."""
    async with cluster_storage(nodes) as storage, SessionManager(storage) as sessions:
        before = await sessions.create(data="mine")
        for _ in range(100):
            after = await sessions.rotate(before)
            if nodes.owner(slot_of(after.id)) is not nodes.owner(slot_of(before.id)):
                break
            before = after
        else:
            pytest.fail("a hundred random ids were all on one node")

        assert (await sessions.get(after.id)).data == "mine"
        with pytest.raises(SessionConflict):
            await sessions.save(await sessions.get(before.id))
        assert await sessions.delete(after.id) is True


async def test_nobody_notices_that_a_slot_moves(nodes: Cluster) -> None:
    """Round and round while all verbs are in use there: no error, and no wrong answer."""
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


async def test_all_verbs_work_while_a_slot_is_half_moved(nodes: Cluster) -> None:
    """Whatever is where: moved already, not moved yet, or nowhere and created on the way (ASK)."""
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
    """Have all nodes say in a certain way where they are: by names in a domain, or not by name."""

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
async def test_nodes_may_announce_what_only_the_client_understands(
    nodes: Cluster, kind: str, domain: str
) -> None:
    """The client's `address_remap`, and "where you reached me", count in the map, MOVED and ASK."""
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
