"""The readiness check: what it says about servers, and what it does when they cannot be asked."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from redis.asyncio import Redis

from aiosessions import (
    RedisStorage,
    Session,
    StorageClosed,
    StorageUnavailable,
    When,
    new_session_id,
)
from aiosessions.redis.health import health_from_info
from tests.callers import cluster_storage
from tests.fault_proxy import Counts, Exchange, FaultProxy, delay, replace
from tests.leaks import said_by
from tests.servers import Server, binaries, deaf_port, running
from tests.topologies import Cluster, ask, cluster, mended

Storage = RedisStorage[Any]


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A server for this module alone."""
    with running(binaries()["valkey"]) as server:
        yield server


@pytest.fixture
def pliable(own_server: Server) -> Iterator[Server]:
    """A server whose settings may be changed; the next test finds it as it was."""
    yield own_server
    own_server.kill()
    own_server.start()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Two masters."""
    with cluster(binaries()["valkey"], masters=2) as made:
        yield made


@pytest.fixture
async def proxy(valkey: Server) -> AsyncIterator[FaultProxy]:
    """A proxy for a server that is well."""
    async with FaultProxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
async def storage(proxy: FaultProxy) -> AsyncIterator[Storage]:
    """A storage behind the proxy, connected."""
    async with Storage.from_url(proxy.url, ttl=60) as storage:
        await storage.ping()
        proxy.counts = Counts()
        yield storage


async def warnings_of(server: Server) -> tuple[str, ...]:
    """What the check warns of."""
    async with Storage.from_url(server.url, ttl=60) as storage:
        (health,) = await storage.ping()
    return health.warnings


# What is said.


async def test_a_server_that_is_well(redis_or_valkey: Server) -> None:
    """Is a master of that name and version that evicts nothing, and there is nothing to warn of."""
    async with Storage.from_url(redis_or_valkey.url, ttl=60) as storage:
        (health,) = await storage.ping()

    with redis_or_valkey.client() as client:
        info: Any = client.info()
    assert health.name == info.get("server_name", "redis")
    assert health.version == info.get("valkey_version", info["redis_version"])
    assert (health.role, health.eviction_policy, health.warnings) == ("master", "noeviction", ())
    assert 0 < health.round_trip < 5


async def test_it_is_one_round_trip(proxy: FaultProxy, storage: Storage) -> None:
    """On the connection that all callers share."""
    await storage.ping()

    assert proxy.counts.requests == {"INFO": 1}
    assert proxy.counts.round_trips == 1
    assert proxy.counts.connections == 0


async def test_the_round_trip_is_timed(proxy: FaultProxy, storage: Storage) -> None:
    """From the question to the answer."""
    proxy.on_reply("INFO", delay(0.2))

    (health,) = await storage.ping()

    assert 0.2 <= health.round_trip < 1.2


async def test_it_disturbs_nobody(storage: Storage) -> None:
    """Many at once, among loads and stores."""
    sessions = [Session[Any](id=new_session_id(), data=number) for number in range(50)]
    await asyncio.gather(*(storage.store(session) for session in sessions))

    results: list[Any] = await asyncio.gather(
        *(storage.ping() for _ in range(50)), *(storage.load(each.id) for each in sessions)
    )

    assert results[50:] == sessions
    assert {len(healths) for healths in results[:50]} == {1}


async def test_a_borrowed_client_will_do(valkey: Server) -> None:
    """Also one that decodes what it reads."""
    async with (
        Redis.from_url(valkey.url, decode_responses=True) as client,
        Storage(client, ttl=60) as storage,
    ):
        (health,) = await storage.ping()

    assert health.name == "valkey"


async def test_every_master_of_a_cluster_is_asked(nodes: Cluster) -> None:
    """However few of them have been used."""
    async with cluster_storage(nodes) as storage:
        healths = await storage.ping()

    assert [health.role for health in healths] == ["master", "master"]
    assert [health.warnings for health in healths] == [(), ()]


async def test_a_cluster_is_as_ready_as_its_masters(nodes: Cluster) -> None:
    """One that is gone, or hangs, makes it unavailable, in time."""
    last = nodes.nodes[1]
    async with cluster_storage(nodes, timeout=0.5) as storage:
        await storage.ping()
        for end in (last.pause, last.kill):
            end()
            with mended(last):
                start = time.monotonic()
                with pytest.raises(StorageUnavailable):
                    await storage.ping()
                assert time.monotonic() - start < 1.0
        await asyncio.to_thread(nodes.settle)
        assert len(await storage.ping()) == 2


# What it warns of.


async def test_a_replica_is_warned_of(pliable: Server) -> None:
    """It accepts neither writes nor loads."""
    with deaf_port() as nobody:
        ask(pliable, "REPLICAOF", "127.0.0.1", nobody)
        (warning,) = await warnings_of(pliable)
    assert "replica" in warning


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl", "volatile-lru"])
async def test_eviction_of_sessions_is_warned_of(pliable: Server, policy: str) -> None:
    """They all have a TTL, so every policy but one evicts them, if memory is limited at all."""
    ask(pliable, "CONFIG", "SET", "maxmemory-policy", policy)
    assert await warnings_of(pliable) == ()

    ask(pliable, "CONFIG", "SET", "maxmemory", "100mb")
    (warning,) = await warnings_of(pliable)
    assert policy in warning
    assert "noeviction" in warning

    ask(pliable, "CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert await warnings_of(pliable) == ()


def rewriting(field: bytes, value: bytes) -> Any:
    """A server that says something else about itself."""

    async def fault(exchange: Exchange) -> bytes:
        assert exchange.reply is not None
        text = exchange.reply.partition(b"\r\n")[2]
        before, _, rest = text.partition(field + b":")
        said = before + field + b":" + value + b"\r\n" + rest.partition(b"\r\n")[2]
        said = said.removesuffix(b"\r\n")
        return b"$%d\r\n%b\r\n" % (len(said), said)

    return fault


@pytest.mark.parametrize("version", ["2.8.24", "5.0.14", "6.0.16", "6.1.240"])
async def test_a_server_that_is_too_old_is_warned_of(
    proxy: FaultProxy, storage: Storage, version: str
) -> None:
    """With what it lacks, and what is needed."""
    proxy.on_reply("INFO", rewriting(b"redis_version", version.encode()))

    (health,) = await storage.ping()

    (warning,) = health.warnings
    assert version in warning
    assert "GETEX" in warning
    assert "6.2" in warning


@pytest.mark.parametrize("version", ["6.2.0", "7.0.15", "8.2.3", "10.0.0", "255.255.255"])
async def test_a_server_that_is_new_enough_is_not(
    proxy: FaultProxy, storage: Storage, version: str
) -> None:
    """Nor one that has not been released yet."""
    proxy.on_reply("INFO", rewriting(b"redis_version", version.encode()))

    (health,) = await storage.ping()

    assert health.warnings == ()


@pytest.mark.parametrize(
    "info",
    [b"", b"\r\n# Server\r\n", b"redis_version:\r\n", b"redis_version:unstable\r\n", b"\xff:\xfe"],
)
def test_what_a_server_does_not_say_is_not_warned_of(info: bytes) -> None:
    """Nothing is known then, so nothing is claimed."""
    assert health_from_info(info, 0.1).warnings == ()


@pytest.mark.parametrize("info", [b"redis_version:" + b"9" * 5_000, b"redis_version:7." * 1_000])
def test_nonsense_for_a_version_is_no_error(info: bytes) -> None:
    """Whatever the check makes of it."""
    assert health_from_info(info, 0.1).role == ""


# Servers that lack what is needed.


@pytest.fixture(scope="module", params=binaries())
def without_getex(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that does not know the command, as before Redis 6.2."""
    with running(binaries()[request.param], "--rename-command", "GETEX", "") as server:
        yield server


async def test_a_server_without_getex_is_refused(without_getex: Server) -> None:
    """A load says what it lacks, and nothing of whose session it was."""
    session = Session[Any](id=new_session_id(), data="a secret")
    async with Storage.from_url(without_getex.url, ttl=60) as storage:
        await storage.store(session, when=When.ABSENT)
        with pytest.raises(StorageUnavailable, match=r"GETEX: Redis 6\.2 or later") as raised:
            await storage.load(session.id)

    assert isinstance(raised.value.__cause__, Exception)
    assert session.id not in said_by(raised.value)


@pytest.mark.parametrize(
    "said",
    [
        "-ERR unknown command 'GETEX'",  # Redis 4
        "-ERR unknown command `GETEX`, with args beginning with: `session:{id}`, `PX`, `60000`, ",
        "-ERR unknown command 'GETEX', with args beginning with: 'session:{id}' 'PX' '60000' ",
    ],
    ids=["4", "5", "7"],
)
async def test_old_servers_say_it_in_their_ways(
    proxy: FaultProxy, storage: Storage, said: str
) -> None:
    """And are understood all the same."""
    id = new_session_id()
    proxy.on_reply("GETEX", replace(said.format(id=id).encode() + b"\r\n"))

    with pytest.raises(StorageUnavailable, match=r"GETEX: Redis 6\.2 or later") as raised:
        await storage.load(id)

    assert id not in said_by(raised.value)


# When it cannot be asked.


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    """At once."""
    with deaf_port() as port:
        async with Storage.from_url(f"redis://127.0.0.1:{port}", ttl=60) as storage:
            with pytest.raises(StorageUnavailable):
                await storage.ping()


async def test_a_server_that_hangs_is_unavailable(pliable: Server) -> None:
    """When the timeout is over; and well again when it goes on."""
    async with Storage.from_url(pliable.url, ttl=60, timeout=0.3) as storage:
        await storage.ping()
        with mended(pliable):
            pliable.pause()
            start = time.monotonic()
            with pytest.raises(StorageUnavailable, match="did not answer in time"):
                await storage.ping()
            assert time.monotonic() - start < 0.8
        assert len(await storage.ping()) == 1


async def test_a_user_without_the_right_is_told(pliable: Server) -> None:
    """That it may not ask; sessions are served all the same."""
    password = "a-password-that-is-secret"
    rights = ("~session:*", "+getex", "+set", "+client|setname")
    ask(pliable, "ACL", "SETUSER", "app", "on", f">{password}", *rights)
    url = pliable.url.replace("redis://", f"redis://app:{password}@")
    async with Storage.from_url(url, ttl=60) as storage:
        with pytest.raises(StorageUnavailable, match="may not run a command") as raised:
            await storage.ping()
        await storage.store(Session(id="session"))
        assert (await storage.load("session")).id == "session"

    assert password not in said_by(raised.value)


async def test_a_missing_password_is_told(pliable: Server) -> None:
    """As what it is."""
    ask(pliable, "CONFIG", "SET", "requirepass", "secret")
    async with Storage.from_url(pliable.url, ttl=60) as storage:
        with pytest.raises(StorageUnavailable, match="password"):
            await storage.ping()


async def test_a_closed_storage_asks_nobody(valkey: Server) -> None:
    """Like any verb."""
    storage = Storage.from_url(valkey.url, ttl=60)
    await storage.ping()
    await storage.aclose()

    with pytest.raises(StorageClosed):
        await storage.ping()
