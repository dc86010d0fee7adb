"""The readiness check: its report on servers, and its errors when no server answers."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis.asyncio import Redis

from aiosessions import (
    ServerHealth,
    Session,
    SessionNotFound,
    StorageClosed,
    StorageUnavailable,
    new_session_id,
)
from aiosessions.redis.health import health as health_of
from tests.support.clients import (
    LONG,
    Storage,
    cluster_storage,
    outcome,
    storage_at,
    turns,
)
from tests.support.proxy import FaultProxy, hold, replace
from tests.support.secrets import said_by
from tests.support.servers import Server, binaries, refused_port
from tests.support.topologies import Cluster, ask, cluster, mended


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A cluster of two masters."""
    with cluster(binaries()["valkey"], masters=2) as made:
        yield made


# Reports.


async def test_good_server_causes_no_warning(redis_or_valkey: Server) -> None:
    """The report has the address, name, version, role and policy of the server."""
    async with (  # decoded replies make no difference
        Redis.from_url(redis_or_valkey.url, decode_responses=True) as client,
        Storage(client, ttl=60) as storage,
    ):
        (health,) = await storage.ping()

    with redis_or_valkey.client() as direct:
        info: Any = direct.info()
    assert health.available
    assert health.address == f"127.0.0.1:{redis_or_valkey.port}"
    assert health.name == info.get("server_name", "redis")
    assert health.version == info.get("valkey_version", info["redis_version"])
    assert (health.role, health.eviction_policy, health.warnings) == ("master", "noeviction", ())


async def test_round_trip_is_measured(
    proxy: FaultProxy, storage: Storage, jump: Callable[[float], None]
) -> None:
    """The report has the seconds from the question to the answer."""
    released = asyncio.Event()
    order = proxy.on_reply("INFO", hold(released))
    checking = asyncio.create_task(storage.ping())
    await order.hit.wait()
    jump(LONG / 2)
    released.set()

    (health,) = await checking

    assert LONG / 2 <= health.round_trip < LONG


@pytest.mark.slow
async def test_ping_asks_every_master_of_a_cluster(nodes: Cluster) -> None:
    """A silent master is not available; the report has the reason, and the other master."""
    first, last = nodes.nodes
    async with cluster_storage(nodes, timeout=2.0) as storage:
        async with asyncio.timeout(LONG):
            while not all(each.available for each in await storage.ping()):  # noqa: ASYNC110 - it connects
                await asyncio.sleep(0.01)
        last.pause()
        with mended(last):
            gone, other = sorted(await storage.ping(), key=lambda health: health.available)
        await asyncio.to_thread(nodes.settle)

    assert {gone.address, other.address} == {f"127.0.0.1:{node.port}" for node in (last, first)}
    assert (gone.available, gone.version, len(gone.warnings)) == (False, "", 1)
    assert (other.available, other.role, other.warnings) == (True, "master", ())


# Warnings.


def report(info: bytes) -> ServerHealth:
    """The report for a reply to INFO."""
    return health_of("localhost:6379", info, 0.1)


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (b"role:slave\r\n", ["replica"]),
        (
            b"maxmemory:1\r\nmaxmemory_policy:volatile-lru\r\n",
            ["volatile-lru", "noeviction"],
        ),
        (b"redis_version:2.8.24\r\n", ["2.8.24", "GETEX", "6.2"]),
        (b"redis_version:6.1.240\r\n", ["6.1.240", "GETEX", "6.2"]),
    ],
    ids=["replica", "eviction", "old", "nearly-new"],
)
def test_danger_to_sessions_causes_a_warning(info: bytes, words: list[str]) -> None:
    """One warning names the problem and the remedy."""
    (warning,) = report(info).warnings

    assert [word for word in words if word not in warning] == []


NO_WARNING: dict[str, bytes] = {
    "empty": b"",
    "new-version": b"redis_version:6.2.0\r\n",
    "later-version": b"redis_version:10.0.0\r\n",
    "no-limit": b"maxmemory:0\r\nmaxmemory_policy:volatile-lru\r\n",
    "no-eviction": b"maxmemory:1\r\nmaxmemory_policy:noeviction\r\n",
    "headings": b"\r\n# Server\r\n",
    "no-version": b"redis_version:\r\n",
    "text": b"redis_version:unstable\r\n",
    "long-number": b"redis_version:" + b"9" * 5_000,
    "many-numbers": b"redis_version:7." * 1_000,
    "not-text": b"\xff:\xfe",
}


@pytest.mark.parametrize("info", NO_WARNING.values(), ids=NO_WARNING)
def test_harmless_report_causes_no_warning(info: bytes) -> None:
    """A field that a server leaves out, or fills with nonsense, is neither warning nor error."""
    health = report(info)

    assert (health.available, health.role, health.warnings) == (True, "", ())


# Errors.


WORDINGS: dict[str, str] = {
    "redis-4": "-ERR unknown command 'GETEX'",
    "redis-5": "-ERR unknown command `GETEX`, with args beginning with: `session:{id}`, `PX`, ",
    "redis-7": "-ERR unknown command 'GETEX', with args beginning with: 'session:{id}' 'PX' ",
}


@pytest.mark.parametrize("text", WORDINGS.values(), ids=WORDINGS)
async def test_all_wordings_of_old_servers_are_understood(
    proxy: FaultProxy, storage: Storage, text: str
) -> None:
    """The error of a load says which version is needed, and does not repeat the id."""
    id = new_session_id()
    proxy.on_reply("GETEX", replace(text.format(id=id).encode() + b"\r\n"))

    with pytest.raises(StorageUnavailable, match=r"GETEX: Redis 6\.2 or later") as caught:
        await storage.load(id)

    assert id not in said_by(caught.value)


@pytest.mark.usefixtures("short_bridge")
async def test_ping_of_absent_server_is_unavailable() -> None:
    """`ping` raises if no server answers."""
    with refused_port() as port:
        async with storage_at(f"redis://127.0.0.1:{port}") as storage:
            with pytest.raises(StorageUnavailable, match="Connection refused"):
                await storage.ping()


async def test_ping_of_hanging_server_is_unavailable(
    proxy: FaultProxy, storage: Storage, jump: Callable[[float], None]
) -> None:
    """`ping` raises at the timeout, and works again when the server goes on."""
    proxy.stall()
    checking = asyncio.create_task(outcome(storage.ping()))
    await turns(3)
    jump(LONG)
    assert await checking is StorageUnavailable
    proxy.resume()
    assert len(await storage.ping()) == 1


async def test_user_without_the_right_is_refused(fragile: Server) -> None:
    """The error says that the right is missing; sessions do not need it."""
    password = "a-password-that-is-secret"
    rights = ("allkeys", "allchannels", "+@all", "-info")
    ask(fragile, "ACL", "SETUSER", "app", "on", f">{password}", *rights)
    async with storage_at(fragile.url.replace("redis://", f"redis://app:{password}@")) as storage:
        with pytest.raises(StorageUnavailable, match="may not run ") as caught:
            await storage.ping()
        await storage.store(Session(id="session"))
        assert await outcome(storage.load("absent")) is SessionNotFound

    assert password not in said_by(caught.value)


async def test_closed_storage_does_not_ping(storage: Storage) -> None:
    """`ping` raises `StorageClosed` like any verb."""
    await storage.aclose()

    assert await outcome(storage.ping()) is StorageClosed
