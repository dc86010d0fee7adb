"""The readiness check: its report on servers, and its errors when no server answers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from redis.asyncio import Redis

from aiosessions import (
    RedisStorage,
    ServerHealth,
    Session,
    StorageClosed,
    StorageUnavailable,
    new_session_id,
)
from aiosessions.redis.health import health as health_of
from tests.support.clients import cluster_storage
from tests.support.proxy import Counts, FaultProxy, delay, replace
from tests.support.secrets import said_by
from tests.support.servers import Server, binaries, refused_port
from tests.support.topologies import Cluster, ask, cluster, mended

Storage = RedisStorage[Any]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A cluster of two masters."""
    with cluster(binaries()["valkey"], masters=2) as made:
        yield made


@pytest.fixture
async def storage(proxy: FaultProxy) -> AsyncIterator[Storage]:
    """A storage behind the proxy, connected."""
    async with Storage.from_url(proxy.url, ttl=60) as storage:
        await storage.ping()
        proxy.counts = Counts()
        yield storage


async def warnings_of(server: Server) -> tuple[str, ...]:
    """The warnings of the check."""
    async with Storage.from_url(server.url, ttl=60) as storage:
        (health,) = await storage.ping()
    return health.warnings


# Reports.


async def test_good_server_causes_no_warning(redis_or_valkey: Server) -> None:
    """The report has the address, name, version, role and policy of the server."""
    async with Storage.from_url(redis_or_valkey.url, ttl=60) as storage:
        (health,) = await storage.ping()

    with redis_or_valkey.client() as client:
        info: Any = client.info()
    assert health.available
    assert health.address == f"127.0.0.1:{redis_or_valkey.port}"
    assert health.name == info.get("server_name", "redis")
    assert health.version == info.get("valkey_version", info["redis_version"])
    assert (health.role, health.eviction_policy, health.warnings) == ("master", "noeviction", ())
    assert 0 < health.round_trip < 5


async def test_ping_is_one_round_trip(proxy: FaultProxy, storage: Storage) -> None:
    """INFO is sent on the connection that all callers share."""
    await storage.ping()

    assert proxy.counts.requests == {"INFO": 1}
    assert proxy.counts.round_trips == 1
    assert proxy.counts.connections == 0


async def test_round_trip_is_measured(proxy: FaultProxy, storage: Storage) -> None:
    """The report has the seconds from the question to the answer."""
    proxy.on_reply("INFO", delay(0.2))

    (health,) = await storage.ping()

    assert health.round_trip >= 0.2


async def test_ping_disturbs_no_other_call(storage: Storage) -> None:
    """Many checks among many loads each get their own reply."""
    sessions = [Session[Any](id=new_session_id(), data=number) for number in range(50)]
    await asyncio.gather(*(storage.store(session) for session in sessions))

    results: list[Any] = await asyncio.gather(
        *(storage.ping() for _ in range(50)), *(storage.load(each.id) for each in sessions)
    )

    assert results[50:] == sessions
    assert {len(healths) for healths in results[:50]} == {1}


async def test_ping_works_with_decoding_client(valkey: Server) -> None:
    """A borrowed client that decodes replies makes no difference."""
    async with (
        Redis.from_url(valkey.url, decode_responses=True) as client,
        Storage(client, ttl=60) as storage,
    ):
        (health,) = await storage.ping()

    assert health.name == "valkey"


async def test_ping_asks_every_master_of_a_cluster(nodes: Cluster) -> None:
    """The report has all masters, also those that the storage has not used."""
    async with cluster_storage(nodes) as storage:
        healths = await storage.ping()

    addresses = {f"127.0.0.1:{node.port}" for node in nodes.nodes}
    assert {health.address for health in healths} == addresses
    assert [(health.role, health.warnings) for health in healths] == [("master", ())] * 2


@pytest.mark.parametrize("end", [Server.pause, Server.kill])
async def test_silent_master_is_not_available(
    nodes: Cluster, end: Callable[[Server], None]
) -> None:
    """The report tells the reason for that master, and has the other ones as usual."""
    last = nodes.nodes[1]
    async with cluster_storage(nodes, timeout=0.5) as storage:
        await storage.ping()
        end(last)
        with mended(last):
            healths = {health.address: health for health in await storage.ping()}
        await asyncio.to_thread(nodes.settle)

    gone = healths.pop(f"127.0.0.1:{last.port}")
    (other,) = healths.values()
    assert (gone.available, gone.version, len(gone.warnings)) == (False, "", 1)
    assert (other.available, other.warnings) == (True, ())


# Warnings.


async def test_replica_causes_a_warning(fragile: Server) -> None:
    """A replica accepts neither writes nor loads."""
    with refused_port() as port:
        ask(fragile, "REPLICAOF", "127.0.0.1", port)
        (warning,) = await warnings_of(fragile)
    assert "replica" in warning


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "volatile-lru"])
async def test_eviction_causes_a_warning(fragile: Server, policy: str) -> None:
    """All sessions have a TTL, so every policy except noeviction removes them at the limit."""
    ask(fragile, "CONFIG", "SET", "maxmemory-policy", policy)
    assert await warnings_of(fragile) == ()

    ask(fragile, "CONFIG", "SET", "maxmemory", "100mb")
    (warning,) = await warnings_of(fragile)
    assert policy in warning
    assert "noeviction" in warning

    ask(fragile, "CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert await warnings_of(fragile) == ()


def report(info: bytes) -> ServerHealth:
    """The report for a reply to INFO."""
    return health_of("localhost:6379", info, 0.1)


@pytest.mark.parametrize("version", ["2.8.24", "5.0.14", "6.0.16", "6.1.240"])
def test_old_version_causes_a_warning(version: str) -> None:
    """The warning names the version, the missing command, and the version that is needed."""
    (warning,) = report(f"redis_version:{version}\r\n".encode()).warnings

    assert version in warning
    assert "GETEX" in warning
    assert "6.2" in warning


@pytest.mark.parametrize("version", ["6.2.0", "7.0.15", "8.2.3", "10.0.0", "255.255.255"])
def test_new_version_causes_no_warning(version: str) -> None:
    """All versions since 6.2 are fine, also future ones."""
    assert report(f"redis_version:{version}\r\n".encode()).warnings == ()


@pytest.mark.parametrize(
    "info",
    [
        b"",
        b"\r\n# Server\r\n",
        b"redis_version:\r\n",
        b"redis_version:unstable\r\n",
        b"redis_version:" + b"9" * 5_000,
        b"redis_version:7." * 1_000,
        b"\xff:\xfe",
    ],
    ids=lambda info: repr(info)[:20],
)
def test_odd_field_causes_no_warning(info: bytes) -> None:
    """A field that a server leaves out, or fills with nonsense, is neither warning nor error."""
    health = report(info)

    assert (health.available, health.role, health.warnings) == (True, "", ())


# Servers without GETEX. test_bad_servers.py has a real one.


@pytest.mark.parametrize(
    "text",
    [
        "-ERR unknown command 'GETEX'",
        "-ERR unknown command `GETEX`, with args beginning with: `session:{id}`, `PX`, `60000`, ",
        "-ERR unknown command 'GETEX', with args beginning with: 'session:{id}' 'PX' '60000' ",
    ],
    ids=["redis-4", "redis-5", "redis-7"],
)
async def test_all_wordings_of_old_servers_are_understood(
    proxy: FaultProxy, storage: Storage, text: str
) -> None:
    """The error says which version is needed, and does not repeat the id of the reply."""
    id = new_session_id()
    proxy.on_reply("GETEX", replace(text.format(id=id).encode() + b"\r\n"))

    with pytest.raises(StorageUnavailable, match=r"GETEX: Redis 6\.2 or later") as caught:
        await storage.load(id)

    assert id not in said_by(caught.value)


# Errors.


async def test_absent_server_is_unavailable() -> None:
    """`ping` raises if no server answers."""
    with refused_port() as port:
        async with Storage.from_url(f"redis://127.0.0.1:{port}", ttl=60) as storage:
            with pytest.raises(StorageUnavailable, match="Connection refused"):
                await storage.ping()


async def test_hanging_server_is_unavailable(fragile: Server) -> None:
    """`ping` raises at the timeout, and works again when the server goes on."""
    async with Storage.from_url(fragile.url, ttl=60, timeout=0.3) as storage:
        await storage.ping()
        with mended(fragile):
            fragile.pause()
            with pytest.raises(StorageUnavailable, match="did not answer in time"):
                await storage.ping()
        assert len(await storage.ping()) == 1


async def test_user_without_the_right_is_refused(fragile: Server) -> None:
    """The error says that the right is missing; sessions do not need it."""
    password = "a-password-that-is-secret"
    rights = ("~session:*", "+getex", "+set", "+client|setname")
    ask(fragile, "ACL", "SETUSER", "app", "on", f">{password}", *rights)
    url = fragile.url.replace("redis://", f"redis://app:{password}@")
    async with Storage.from_url(url, ttl=60) as storage:
        with pytest.raises(StorageUnavailable, match="may not run a command") as caught:
            await storage.ping()
        await storage.store(Session(id="session"))
        assert (await storage.load("session")).id == "session"

    assert password not in said_by(caught.value)


async def test_closed_storage_does_not_ping(valkey: Server) -> None:
    """`ping` raises `StorageClosed` like any verb."""
    storage = Storage.from_url(valkey.url, ttl=60)
    await storage.ping()
    await storage.aclose()

    with pytest.raises(StorageClosed):
        await storage.ping()
