"""Clients that a storage borrows, and the event loop and process that its connection belongs to.

A borrowed client works beside the storage and is left as it was, whatever it is like.
"""

import asyncio
import copy
import math
import os
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from redis.asyncio import BlockingConnectionPool, Connection, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
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
from tests.fault_proxy import Counts, Exchange, FaultProxy, until
from tests.servers import Server, binaries, deaf_port, running

_PASSWORD = "correct horse"

Storage = RedisStorage[Any]


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    """A server that asks for a user name and a password."""
    options = ("--user", "default", "off")
    users = ("--user", "app", "on", ">correct horse", "~session:*", "+@all")
    with running(binaries()["valkey"], *options, *users) as server:
        yield server


def plain(server: Server) -> Redis:
    """As redis-py makes it."""
    return Redis(host="127.0.0.1", port=server.port)


def from_url(server: Server) -> Redis:
    """Without retries."""
    return Redis.from_url(server.url)


def decoding(server: Server) -> Redis:
    """Whose replies are text."""
    return Redis(host="127.0.0.1", port=server.port, decode_responses=True)


def old_protocol(server: Server) -> Redis:
    """RESP2."""
    return Redis(host="127.0.0.1", port=server.port, protocol=2)


def new_protocol(server: Server) -> Redis:
    """RESP3."""
    return Redis(host="127.0.0.1", port=server.port, protocol=3)


def single_connection(server: Server) -> Redis:
    """With a connection of its own outside its pool."""
    return Redis(host="127.0.0.1", port=server.port, single_connection_client=True)


def blocking_pool(server: Server) -> Redis:
    """Whose pool has one connection."""
    return Redis.from_pool(
        BlockingConnectionPool(host="127.0.0.1", port=server.port, max_connections=1, timeout=1)
    )


def small_pool(server: Server) -> Redis:
    """Whose pool has one connection, and no patience."""
    return Redis.from_pool(ConnectionPool(host="127.0.0.1", port=server.port, max_connections=1))


def unix_socket(server: Server) -> Redis:
    """Over a unix socket."""
    return Redis(unix_socket_path=str(server.directory / "socket"))


def unix_url(server: Server) -> Redis:
    """Over a unix socket, from a URL."""
    return Redis.from_url(server.unix_url)


def database(server: Server) -> Redis:
    """In another database."""
    return Redis(host="127.0.0.1", port=server.port, db=3)


def impatient(server: Server) -> Redis:
    """With every setting that would be in our way."""
    return Redis(
        host="127.0.0.1",
        port=server.port,
        socket_timeout=0.001,
        socket_connect_timeout=5,
        socket_keepalive=True,
        health_check_interval=1,
        retry=Retry(ExponentialBackoff(), 5),
        retry_on_error=[ConnectionError],
        client_name="theirs",
    )


_CLIENTS = [
    plain,
    from_url,
    decoding,
    old_protocol,
    new_protocol,
    single_connection,
    blocking_pool,
    small_pool,
    unix_socket,
    unix_url,
    database,
    impatient,
]


async def use(storage: Storage) -> None:
    """Each verb, to good and to bad ends, and many at once."""
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


@pytest.mark.parametrize("make", _CLIENTS, ids=lambda make: make.__name__)
async def test_any_client_can_be_borrowed(valkey: Server, make: Callable[[Server], Redis]) -> None:
    """It is used for nothing, and is left as it was: its pool, its settings, and itself open."""
    with valkey.client() as direct:
        async with make(valkey) as client:
            pool: Any = client.connection_pool
            settings = copy.copy(pool.connection_kwargs)
            connections = [*pool._available_connections, *pool._in_use_connections]
            before = {each["id"] for each in direct.client_list()}

            async with RedisStorage[Any](client, ttl=60, timeout=5) as storage:
                await use(storage)
                ours = {each["id"] for each in direct.client_list()} - before
                assert len(ours) == 1
                await asyncio.sleep(0.005)
                await use(storage)
                assert {each["id"] for each in direct.client_list()} - before == ours

            assert client.connection_pool is pool
            assert pool.connection_kwargs == settings
            assert connections == [*pool._available_connections, *pool._in_use_connections]
            await until(lambda: {each["id"] for each in direct.client_list()} <= before)
            if make is not impatient:
                assert await client.set("theirs", "1", px=60_000)
                assert await client.get("theirs") in ("1", b"1")


async def test_a_client_works_beside_the_storage(valkey: Server) -> None:
    """At the same time, with all the connections of its pool, and in its own database."""
    client: Any = Redis(host="127.0.0.1", port=valkey.port, db=3, decode_responses=True)
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
    with valkey.client() as direct:
        assert not direct.exists(f"session:{session.id}")  # in database 0


@pytest.mark.parametrize("protocol", [2, 3])
async def test_a_user_with_a_password_can_be_borrowed(locked: Server, protocol: int) -> None:
    """By either protocol; the storage's own connection signs in as that user."""
    async with Redis(
        host="127.0.0.1",
        port=locked.port,
        username="app",
        password=_PASSWORD,
        protocol=protocol,
    ) as client:
        async with RedisStorage[Any](client, ttl=60) as storage:
            await use(storage)
        assert await client.ping()


async def test_a_url_can_name_user_password_and_database(locked: Server) -> None:
    """With what is special quoted."""
    url = f"redis://app:correct%20horse@127.0.0.1:{locked.port}/2"
    async with RedisStorage[Any].from_url(url, ttl=60) as storage:
        await use(storage)


@pytest.mark.parametrize(
    ("user", "password"), [("app", "wrong-password"), ("nobody", "wrong-password"), (None, None)]
)
async def test_a_wrong_password_is_unavailable(
    locked: Server, user: str | None, password: str | None
) -> None:
    """At once, and the message holds neither."""
    async with (
        Redis(host="127.0.0.1", port=locked.port, username=user, password=password) as client,
        RedisStorage[Any](client, ttl=60, timeout=20) as storage,
    ):
        start = asyncio.get_running_loop().time()
        with pytest.raises(StorageUnavailable, match="password") as raised:
            await storage.load("nobody")
        assert asyncio.get_running_loop().time() - start < 10
        assert "wrong-password" not in repr(raised.value)


async def test_what_would_be_in_our_way_is_left_out(valkey: Server) -> None:
    """A client's retries, which would multiply attempts, and its maintenance notifications."""
    clients: list[list[bytes]] = []

    async def look(exchange: Exchange) -> bytes:
        clients.append(exchange.arguments)
        return exchange.message

    async with FaultProxy(valkey.port) as proxy, Redis(host="127.0.0.1", port=proxy.port) as client:
        proxy.on_request("CLIENT", look, times=math.inf)
        async with RedisStorage[Any](client, ttl=60, timeout=20) as storage:
            await use(storage)
            assert not [each for each in clients if b"MAINT_NOTIFICATIONS" in each]

        with deaf_port() as nobody:
            proxy.target = nobody
            proxy.counts = Counts()
            async with RedisStorage[Any](client, ttl=60, timeout=20) as storage:
                with pytest.raises(StorageUnavailable):
                    await storage.load("nobody")
                assert proxy.counts.connections == 1


class Watched(Connection):
    """A connection that is remembered, with how often it was connected."""

    made: list["Watched"]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.connects = 0
        type(self).made.append(self)

    async def _connect(self) -> None:
        self.connects += 1
        await super()._connect()  # type: ignore[no-untyped-call]


@pytest.fixture
async def watched(valkey: Server) -> AsyncIterator[Storage]:
    """A storage whose connections are watched."""
    Watched.made = []
    pool = ConnectionPool(Watched, host="127.0.0.1", port=valkey.port, client_name="watched")
    async with Redis.from_pool(pool) as client, RedisStorage[Any](client, ttl=60) as storage:
        yield storage
    assert not any(each.is_connected for each in Watched.made)


async def test_a_connection_class_is_respected(watched: Storage, valkey: Server) -> None:
    """It is made anew for each connection, and never used after it has failed."""
    with valkey.client() as direct:
        for number in range(1, 4):
            await use(watched)
            assert [each.connects for each in Watched.made] == [1] * number
            (own,) = [each for each in direct.client_list() if each["name"] == "watched"]
            direct.client_kill_filter(_id=own["id"])
            await until(lambda: not any(each.is_connected for each in Watched.made))


@pytest.mark.parametrize("turns", range(4))
async def test_a_connection_that_ends_as_something_is_to_be_sent_is_not_used(
    watched: Storage, turns: int
) -> None:
    """It is not connected again; and what has not been sent is not thought to have been."""
    session = Session[Any](id=new_session_id())
    await watched.store(session)
    for number in range(1, 11):
        connection: Any = Watched.made[-1]
        loading = asyncio.create_task(watched.load(session.id))
        connection._reader.feed_eof()  # in the very turn, as the server might
        for _ in range(turns):
            await asyncio.sleep(0)
        creating = watched.store(Session[Any](id=session.id), when=When.ABSENT)
        with pytest.raises(SessionExists):
            await creating
        assert (await loading).id == session.id
        assert [each.connects for each in Watched.made] == [1] * (number + 1)


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
async def test_what_a_credential_provider_knows_is_not_told(
    valkey: Server, error: Exception
) -> None:
    """Whatever it raises: the error says that there is no connection, and not what it was told."""

    class Vault(CredentialProvider):
        def get_credentials(self) -> tuple[str]:
            raise error

    error.__cause__ = ValueError(_SECRET)
    client = Redis(port=valkey.port, credential_provider=Vault())
    async with client, RedisStorage[Any](client, ttl=60) as storage:
        with pytest.raises(StorageUnavailable) as caught:
            await storage.load("id")

    assert _SECRET not in "".join(traceback.format_exception(caught.value))


# Event loops and processes.


def test_another_event_loop_is_told_at_once(valkey: Server) -> None:
    """Rather than to wait for a reply that is read elsewhere; and nothing is harmed by it."""
    storage = RedisStorage[Any].from_url(valkey.url, ttl=60, timeout=20)
    session = Session[Any](id=new_session_id())

    async def elsewhere() -> None:
        start = asyncio.get_running_loop().time()
        for verb in (
            storage.load(session.id),
            storage.store(session),
            storage.store(session, when=When.UNCHANGED),
            storage.delete(session.id),
            storage.aclose(),
        ):
            with pytest.raises(StorageUnavailable, match="event loop"):
                await verb
        assert asyncio.get_running_loop().time() - start < 5

    async def at_home() -> None:
        await storage.store(session)
        await asyncio.to_thread(asyncio.run, elsewhere())
        assert await storage.load(session.id) == session
        await storage.aclose()

    asyncio.run(at_home())


def test_a_storage_can_be_made_before_there_is_an_event_loop(valkey: Server) -> None:
    """It belongs to the one that uses it first, and outlives none; it can be closed anywhere."""
    storage = RedisStorage[Any].from_url(valkey.url, ttl=60)

    async def use_and_close() -> None:
        await use(storage)
        await storage.aclose()

    asyncio.run(use_and_close())
    asyncio.run(storage.aclose())


_FORK = """
import asyncio, gc, os, sys, warnings
from aiosessions import RedisStorage, Session, StorageUnavailable
warnings.simplefilter("error")

async def child(storage):
    loop = asyncio.get_running_loop()
    start = loop.time()
    for verb in (storage.load("a"), storage.delete("a"), storage.store(Session(id="a"))):
        try:
            await verb
        except StorageUnavailable as error:
            assert "forked" in str(error), error
        else:
            raise AssertionError("no error")
    assert loop.time() - start < 5
    await storage.aclose()
    async with RedisStorage.from_url(sys.argv[1], ttl=60) as own:
        assert (await own.load("a")).data == "parent"

async def parent():
    async with RedisStorage.from_url(sys.argv[1], ttl=60, timeout=20) as storage:
        await storage.store(Session(id="a", data="parent"))
        loading = [asyncio.create_task(storage.load("a")) for _ in range(10)]
        await asyncio.sleep(0)
        pid = os.fork()
        if not pid:
            # The event loop that runs here is the parent's, so the child needs a thread to run one.
            import threading
            result = []
            thread = threading.Thread(
                target=lambda: result.append(asyncio.run(child(storage)) or "ok")
            )
            thread.start()
            thread.join()
            os._exit(0 if result == ["ok"] else 1)
        assert os.waitpid(pid, 0)[1] == 0
        for each in await asyncio.gather(*loading):
            assert each.data == "parent"
        for _ in range(10):
            assert (await storage.load("a")).data == "parent"
        assert await storage.delete("a")

asyncio.run(parent())
gc.collect()
print("done")
"""

_FORK_UNUSED = """
import asyncio, gc, os, sys, warnings
from aiosessions import RedisStorage, Session, StorageUnavailable
warnings.simplefilter("error")

async def use(storage):
    await storage.store(Session(id="b", data="parent"))

storage = RedisStorage.from_url(sys.argv[1], ttl=60)
if os.fork() == 0:
    asyncio.run(use(storage))  # it had not been used, so it is the child's as well
    os._exit(0)
assert os.wait()[1] == 0

async def main():
    assert (await storage.load("b")).data == "parent"
    assert await storage.delete("b")
    await storage.aclose()

asyncio.run(main())
gc.collect()
print("done")
"""

_IN_ORDER = """
import asyncio, gc, sys, warnings
from aiosessions import RedisStorage, Session, SessionNotFound
warnings.simplefilter("error")

async def main():
    storage = RedisStorage.from_url(sys.argv[1], ttl=60)
    await storage.store(Session(id="c"))
    loading = asyncio.create_task(storage.load("c"))
    await asyncio.sleep(0)
    await storage.aclose()
    await asyncio.wait([loading])
    assert loading.exception() is not None
    assert asyncio.all_tasks() == {asyncio.current_task()}

asyncio.run(main())
gc.collect()
print("done")
"""


def run(program: str, server: Server) -> None:
    """Run a program, which must end well and warn of nothing."""
    process = subprocess.run(  # noqa: S603 - ours
        [sys.executable, "-X", "dev", "-W", "error", "-c", program, server.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("program", [_FORK, _FORK_UNUSED], ids=["used", "unused"])
def test_a_forked_process_is_told_at_once(valkey: Server, program: str) -> None:
    """If the storage was in use; the parent goes on as if nothing had happened."""
    run(program, valkey)


def test_a_closed_storage_leaves_no_warning(valkey: Server) -> None:
    """With calls in flight, and every warning an error, in Python's development mode."""
    run(_IN_ORDER, valkey)
