"""Clients that a storage borrows, and URLs: every kind works, and no client is changed."""

import asyncio
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import redis
from redis.asyncio import BlockingConnectionPool, Connection, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError

from aiosessions import Session, StorageUnavailable
from tests.support.clients import Storage, key_of, storage_at, use
from tests.support.proxy import Exchange, FaultProxy, until
from tests.support.secrets import locals_in, said_by
from tests.support.servers import Server, refused_port


def tcp(server: Server, **settings: Any) -> Redis:
    """A client over TCP."""
    return Redis(host="127.0.0.1", port=server.port, **settings)


def pooled(server: Server, pool_class: type[ConnectionPool], **settings: Any) -> Redis:
    """A client with a pool of one connection."""
    pool = pool_class(host="127.0.0.1", port=server.port, max_connections=1, **settings)
    return Redis.from_pool(pool)


CLIENTS: dict[str, Callable[[Server], Redis]] = {
    "plain": tcp,
    "decoding": lambda server: tcp(server, decode_responses=True),
    "resp2": lambda server: tcp(server, protocol=2),
    "resp3": lambda server: tcp(server, protocol=3),
    "single-connection": lambda server: tcp(server, single_connection_client=True),
    "blocking-pool": lambda server: pooled(server, BlockingConnectionPool, timeout=1),
    "small-pool": lambda server: pooled(server, ConnectionPool),
    "unix-url": lambda server: Redis.from_url(server.unix_url),
    "database": lambda server: tcp(server, db=3),
    "keepalive": lambda server: tcp(server, socket_keepalive=True, health_check_interval=1),
    # Only the timeout of the storage counts.
    "timeouts": lambda server: tcp(server, socket_timeout=1e-6, socket_connect_timeout=1e-6),
}


@pytest.mark.parametrize("make", CLIENTS.values(), ids=CLIENTS)
async def test_any_client_can_be_borrowed(
    valkey: Server, new_connections: Callable[[], set[str]], make: Callable[[Server], Redis]
) -> None:
    """The storage has its own connection; the client keeps its pool and settings."""
    async with make(valkey) as client:
        pool: Any = client.connection_pool
        settings, theirs = copy.copy(pool.connection_kwargs), new_connections()

        async with Storage(client, ttl=60) as storage:
            await use(storage, callers=20)
            ours = new_connections() - theirs
            assert len(ours) == 1
            await use(storage)
            assert new_connections() - theirs == ours

        assert client.connection_pool is pool
        assert pool.connection_kwargs == settings
        await until(lambda: new_connections() <= theirs)


URLS: dict[str, Callable[[Server], str]] = {
    "valkey": lambda server: server.url.replace("redis://", "valkey://"),
    "unix": lambda server: server.unix_url,
    "decoding": lambda server: f"{server.url}?decode_responses=true",
    "resp3": lambda server: f"{server.url}?protocol=3",
}


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
async def test_every_verb_works_with_a_url(server: Server, url: Callable[[Server], str]) -> None:
    """TCP, unix sockets, and options of redis-py lead to the same results."""
    async with storage_at(url(server)) as storage:
        await use(storage)


async def test_client_works_beside_storages(server: Server) -> None:
    """The client and two storages work concurrently; closing one storage disturbs nothing."""
    async with tcp(server, decode_responses=True) as client:
        one, other = Storage(client, ttl=60), Storage(client, ttl=60, key_prefix="other:")

        async def theirs(number: int) -> None:
            for turn in range(10):
                await client.set(f"theirs:{number}", turn, ex=60)
                assert await client.get(f"theirs:{number}") == str(turn)

        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(theirs(number))
                tasks.create_task(use(one))
                tasks.create_task(use(other))
        await one.aclose()

        await use(other)
        await other.aclose()
        assert await client.ping()


async def test_database_of_the_client_is_used(server: Server, observer: "redis.Redis") -> None:
    """Sessions are in the database that the borrowed client, or the URL, selects."""
    url = server.url.replace("/0", "/3")
    async with Redis.from_url(url) as client, Storage(client, ttl=60) as storage:
        await storage.store(Session(id="borrowed"))
    async with storage_at(url) as storage:
        await storage.store(Session(id="owned"))

    assert observer.dbsize() == 0
    with redis.Redis.from_url(url) as third:
        names: Any = third.keys("*")
    assert {name.decode() for name in names} == {key_of("borrowed"), key_of("owned")}


async def test_connections_have_a_name(server: Server, observer: "redis.Redis") -> None:
    """CLIENT LIST shows the name of the package, of the borrowed client, or of the URL."""
    async with (
        storage_at(server.url) as owning,
        storage_at(f"{server.url}?client_name=mine") as naming,
        tcp(server, client_name="gateway") as client,
        Storage(client, ttl=60) as borrowing,
    ):
        for storage in (owning, naming, borrowing):
            await storage.delete("absent")
        clients: Any = observer.client_list()

    assert {"aiosessions", "mine", "gateway"} <= {each["name"] for each in clients}


async def test_maintenance_notifications_are_off(proxy: FaultProxy) -> None:
    """The connection of the storage does not ask for them, although those of the client do."""
    clients: list[bytes] = []

    async def look(exchange: Exchange) -> bytes:
        clients.append(exchange.request)
        return exchange.message

    proxy.on_request("CLIENT", look, times=math.inf)
    async with (
        Redis(host="127.0.0.1", port=proxy.port) as client,
        Storage(client, ttl=60) as storage,
    ):
        await use(storage)

    assert clients
    assert not [each for each in clients if b"MAINT_NOTIFICATIONS" in each]


@pytest.mark.usefixtures("short_bridge")
async def test_retries_of_a_client_do_not_apply() -> None:
    """With them, each attempt to connect would take minutes, and the reason would be lost."""
    retry = Retry(ConstantBackoff(60), 5)
    with refused_port() as port:
        async with (
            Redis(port=port, retry=retry, retry_on_error=[ConnectionError]) as client,
            Storage(client, ttl=60) as storage,
        ):
            with pytest.raises(StorageUnavailable, match="Connection refused"):
                await storage.load("absent")


async def test_connection_class_is_respected(valkey: Server) -> None:
    """Each socket has a new object of that class, which connects once."""
    made: list[Any] = []

    class Recorded(Connection):
        """A connection class that records its objects, and how often each has connected."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.connects = 0
            made.append(self)

        async def connect(self) -> None:
            self.connects += 1
            await super().connect()  # type: ignore[no-untyped-call] # redis-py does not annotate it

    pool = ConnectionPool(Recorded, host="127.0.0.1", port=valkey.port, client_name="recorded")
    async with Redis.from_pool(pool) as client, Storage(client, ttl=60) as storage:
        with valkey.client() as direct:
            for number in range(1, 3):
                await use(storage)
                assert [each.connects for each in made] == [1] * number
                (own,) = [each for each in direct.client_list() if each["name"] == "recorded"]
                direct.client_kill_filter(_id=own["id"])
                await until(lambda: storage.statistics().connected == 0)


# Credential providers.

_SECRET = "correct-horse-battery"


@pytest.mark.parametrize(
    "error",
    [
        OSError(f"GET https://vault/?token={_SECRET}"),
        FileNotFoundError(2, "no such file", f"/run/{_SECRET}"),
        TimeoutError(_SECRET),
        KeyError(_SECRET),
        RedisConnectionError(f"Error in the vault: {_SECRET}"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.usefixtures("short_bridge")
async def test_error_of_credential_provider_is_not_revealed(
    valkey: Server, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """A provider may raise anything; the error says only that connecting failed."""

    class Vault(CredentialProvider):
        def get_credentials(self) -> tuple[str]:
            raise error

    error.__cause__ = ValueError(_SECRET)
    async with (
        tcp(valkey, credential_provider=Vault()) as client,
        Storage(client, ttl=60) as storage,
    ):
        with pytest.raises(StorageUnavailable) as caught:
            await storage.load("id")

    assert _SECRET not in said_by(caught.value) + caplog.text
    # pytest's frame of this test is the first; the others belong to the library.
    caught.value.__traceback__ = caught.tb.tb_next
    assert _SECRET not in locals_in(caught.value)


@pytest.mark.usefixtures("short_bridge")
async def test_cancelled_credential_provider_is_a_failure(valkey: Server) -> None:
    """The storage asks such a provider again after a pause, not at once."""
    asked = 0

    class Vault(CredentialProvider):
        def get_credentials(self) -> tuple[str]:
            raise NotImplementedError

        async def get_credentials_async(self) -> tuple[str]:
            nonlocal asked
            asked += 1
            raise asyncio.CancelledError

    async with (
        tcp(valkey, credential_provider=Vault()) as client,
        Storage(client, ttl=60) as storage,
    ):
        with pytest.raises(StorageUnavailable, match="cannot connect"):
            await storage.load("id")

    assert asked < 100
