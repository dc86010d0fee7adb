"""Clients that a storage borrows: every kind works, keeps working beside it, and is not changed."""

import asyncio
import copy
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from redis.asyncio import BlockingConnectionPool, Connection, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError

from aiosessions import (
    RedisStorage,
    Session,
    SessionConflict,
    SessionExists,
    SessionNotFound,
    StorageUnavailable,
    When,
    new_session_id,
)
from tests.support.proxy import Exchange, FaultProxy, until
from tests.support.secrets import locals_in, said_by
from tests.support.servers import Server, binaries, refused_port, running

_PASSWORD = "correct horse"

Storage = RedisStorage[Any]


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    """A server that needs a user name and a password."""
    options = ("--user", "default", "off")
    users = ("--user", "app", "on", f">{_PASSWORD}", "~session:*", "+@all")
    with running(binaries()["valkey"], *options, *users) as server:
        yield server


def tcp(server: Server, **settings: Any) -> Redis:
    """A client over TCP."""
    return Redis(host="127.0.0.1", port=server.port, **settings)


def pooled(server: Server, pool_class: type[ConnectionPool], **settings: Any) -> Redis:
    """A client with a pool of one connection."""
    pool = pool_class(host="127.0.0.1", port=server.port, max_connections=1, **settings)
    return Redis.from_pool(pool)


CLIENTS: dict[str, Callable[[Server], Redis]] = {
    "plain": tcp,
    "url": lambda server: Redis.from_url(server.url),
    "decoding": lambda server: tcp(server, decode_responses=True),
    "resp2": lambda server: tcp(server, protocol=2),
    "resp3": lambda server: tcp(server, protocol=3),
    "single-connection": lambda server: tcp(server, single_connection_client=True),
    "blocking-pool": lambda server: pooled(server, BlockingConnectionPool, timeout=1),
    "small-pool": lambda server: pooled(server, ConnectionPool),
    "unix-socket": lambda server: Redis(unix_socket_path=str(server.directory / "socket")),
    "unix-url": lambda server: Redis.from_url(server.unix_url),
    "database": lambda server: tcp(server, db=3),
    "keepalive": lambda server: tcp(
        server, socket_keepalive=True, health_check_interval=1, client_name="theirs"
    ),
}


async def use(storage: Storage) -> None:
    """Use each verb with success and with refusal, then many verbs concurrently."""
    session = Session[Any](id=new_session_id(), data={"text": "ä\r\n"})
    await storage.store(session, when=When.ABSENT)
    with pytest.raises(SessionExists):
        await storage.store(Session[Any](id=session.id), when=When.ABSENT)
    loaded = await storage.load(session.id)
    assert loaded == session
    for when in (When.UNCHANGED, When.PRESENT, When.ALWAYS):
        await storage.store(loaded, when=when)
    with pytest.raises(SessionConflict):
        await storage.store(session, when=When.UNCHANGED)
    assert await storage.delete(session.id) is True
    assert await storage.delete(session.id) is False
    with pytest.raises(SessionNotFound):
        await storage.load(session.id)

    async def one() -> None:
        session = Session[Any](id=new_session_id(), data="x")
        await storage.store(session)
        assert await storage.load(session.id) == session

    await asyncio.gather(*(one() for _ in range(100)))


@pytest.mark.parametrize("make", CLIENTS.values(), ids=CLIENTS)
async def test_any_client_can_be_borrowed(valkey: Server, make: Callable[[Server], Redis]) -> None:
    """The storage has its own connection; the client stays open, with its pool and settings."""
    with valkey.client() as direct:
        async with make(valkey) as client:
            pool: Any = client.connection_pool
            settings = copy.copy(pool.connection_kwargs)
            before = {each["id"] for each in direct.client_list()}

            async with RedisStorage[Any](client, ttl=60) as storage:
                await use(storage)
                ours = {each["id"] for each in direct.client_list()} - before
                assert len(ours) == 1
                await use(storage)
                assert {each["id"] for each in direct.client_list()} - before == ours

            assert client.connection_pool is pool
            assert pool.connection_kwargs == settings
            await until(lambda: {each["id"] for each in direct.client_list()} <= before)
            assert await client.set("theirs", "1", px=60_000)
            assert await client.get("theirs") in ("1", b"1")


async def test_client_works_beside_the_storage(valkey: Server) -> None:
    """The client and the storage can be used concurrently, in one database."""
    client: Any = tcp(valkey, db=3, decode_responses=True)
    async with client, RedisStorage[Any](client, ttl=60) as storage:

        async def theirs(number: int) -> None:
            for turn in range(10):
                await client.set(f"theirs:{number}", turn, ex=60)
                assert await client.get(f"theirs:{number}") == str(turn)

        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(theirs(number))
                tasks.create_task(use(storage))

        session = Session[Any](id=new_session_id())
        await storage.store(session)
        assert await client.exists(f"session:{session.id}")
    with valkey.client() as direct:  # which looks into database 0
        assert not direct.exists(f"session:{session.id}")


@pytest.mark.parametrize("protocol", [2, 3])
async def test_credentials_of_a_client_are_used(locked: Server, protocol: int) -> None:
    """The connection of the storage authenticates as the user of the client."""
    credentials = {"username": "app", "password": _PASSWORD}
    async with tcp(locked, protocol=protocol, **credentials) as client:
        async with RedisStorage[Any](client, ttl=60) as storage:
            await use(storage)
        assert await client.ping()


async def test_credentials_of_a_url_are_used(locked: Server) -> None:
    """A URL may have a quoted password and a database."""
    url = f"redis://app:correct%20horse@127.0.0.1:{locked.port}/2"
    async with RedisStorage[Any].from_url(url, ttl=60) as storage:
        await use(storage)


async def test_maintenance_notifications_are_off(valkey: Server) -> None:
    """The connection of the storage does not ask for them, although those of the client do."""
    clients: list[list[bytes]] = []

    async def look(exchange: Exchange) -> bytes:
        clients.append(exchange.arguments)
        return exchange.message

    async with FaultProxy(valkey.port) as proxy, Redis(host="127.0.0.1", port=proxy.port) as client:
        proxy.on_request("CLIENT", look, times=math.inf)
        async with RedisStorage[Any](client, ttl=60) as storage:
            await use(storage)

    assert clients
    assert not [each for each in clients if b"MAINT_NOTIFICATIONS" in each]


async def test_timeouts_of_a_client_do_not_apply(valkey: Server) -> None:
    """Only the timeout of the storage counts."""
    async with (
        tcp(valkey, socket_timeout=1e-6, socket_connect_timeout=1e-6) as client,
        RedisStorage[Any](client, ttl=60) as storage,
    ):
        await use(storage)


async def test_retries_of_a_client_do_not_apply() -> None:
    """With them, each attempt to connect would take minutes, and the reason would be lost."""
    retry = Retry(ConstantBackoff(60), 5)
    with refused_port() as port:
        async with (
            Redis(port=port, retry=retry, retry_on_error=[ConnectionError]) as client,
            RedisStorage[Any](client, ttl=60) as storage,
        ):
            with pytest.raises(StorageUnavailable, match="Connection refused"):
                await storage.load("absent")


class Recorded(Connection):
    """A connection class that records its objects, and how often each has connected."""

    made: list["Recorded"]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.connects = 0
        type(self).made.append(self)

    async def connect(self) -> None:
        """Count, then connect."""
        self.connects += 1
        await super().connect()  # type: ignore[no-untyped-call] # redis-py does not annotate it


@pytest.fixture
async def recorded(valkey: Server) -> AsyncIterator[Storage]:
    """A storage with recorded connections."""
    Recorded.made = []
    pool = ConnectionPool(Recorded, host="127.0.0.1", port=valkey.port, client_name="recorded")
    async with Redis.from_pool(pool) as client, RedisStorage[Any](client, ttl=60) as storage:
        yield storage


async def test_connection_class_is_respected(recorded: Storage, valkey: Server) -> None:
    """Each socket has a new object of that class, which connects once."""
    with valkey.client() as direct:
        for number in range(1, 4):
            await use(recorded)
            assert [each.connects for each in Recorded.made] == [1] * number
            (own,) = [each for each in direct.client_list() if each["name"] == "recorded"]
            direct.client_kill_filter(_id=own["id"])
            await until(lambda: recorded.statistics().connected == 0)


_SECRET = "correct-horse-battery"


@pytest.mark.parametrize(
    "error",
    [
        OSError(f"GET https://vault/?token={_SECRET}"),
        FileNotFoundError(2, "no such file", f"/run/{_SECRET}"),
        TimeoutError(_SECRET),
        RuntimeError(_SECRET),
        AttributeError(_SECRET),
        KeyError(_SECRET),
        RedisConnectionError(f"Connection to the vault with {_SECRET}"),
        RedisConnectionError(f"Error in the vault: {_SECRET}"),
    ],
    ids=repr,
)
async def test_error_of_credential_provider_is_not_revealed(
    valkey: Server, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """A provider may raise anything; the error says only that connecting failed."""

    class Vault(CredentialProvider):
        def get_credentials(self) -> tuple[str]:
            raise error

    error.__cause__ = ValueError(_SECRET)
    client = tcp(valkey, credential_provider=Vault())
    async with client, RedisStorage[Any](client, ttl=60, timeout=0.1) as storage:
        with pytest.raises(StorageUnavailable) as caught:
            await storage.load("id")

    assert _SECRET not in said_by(caught.value) + caplog.text
    # pytest's frame of this test is the first; the others belong to the library.
    caught.value.__traceback__ = caught.tb.tb_next
    assert _SECRET not in locals_in(caught.value)


async def test_cancelled_credential_provider_is_a_failure(valkey: Server) -> None:
    """A provider whose own task was cancelled is asked again after a pause, not at once."""
    asked = 0

    class Vault(CredentialProvider):
        def get_credentials(self) -> tuple[str]:
            raise NotImplementedError

        async def get_credentials_async(self) -> tuple[str]:
            nonlocal asked
            asked += 1
            raise asyncio.CancelledError

    client = Redis(port=valkey.port, credential_provider=Vault())
    async with client, RedisStorage[Any](client, ttl=60) as storage:
        with pytest.raises(StorageUnavailable, match="cannot connect"):
            await storage.load("id")

    assert asked < 100
