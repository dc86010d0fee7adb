"""`RedisStorage` beyond the contract: its commands, keys, TTLs and connections.

The commands are pinned exactly, because they are the cost of a load and the rights of an ACL user.
The server counts them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any

import anyio
import msgspec
import pytest
import redis
from redis.asyncio import Redis

from aiosessions import (
    JsonCodec,
    MsgpackCodec,
    RedisStorage,
    Session,
    SessionConflict,
    SessionExists,
    SessionManager,
    SessionNotFound,
    When,
    new_session_id,
)
from aiosessions.record import unseal
from aiosessions.testing import FakeClock
from tests.support.clients import our_tasks
from tests.support.servers import Server

# Longer than any step takes.
_TIMEOUT = 20.0


@pytest.fixture
def server(redis_or_valkey: Server) -> Server:
    """An empty server of each kind."""
    redis_or_valkey.flush()
    return redis_or_valkey


@pytest.fixture
def observer(server: Server) -> Iterator["redis.Redis"]:
    """A client of the test, connected."""
    with server.client() as client:
        client.ping()
        yield client


@asynccontextmanager
async def connected(server: Server, **options: Any) -> AsyncIterator[RedisStorage[Any]]:
    """A storage with a connection, and a server that knows the scripts."""
    settings: dict[str, Any] = {"ttl": 600, **options}
    async with RedisStorage[Any].from_url(server.url, **settings) as storage:
        session = Session[Any](id=new_session_id())
        await storage.store(session, when=When.ABSENT)
        await storage.delete(session.id)
        yield storage


# The commands of the observer; Redis 6.2 does not count subcommands.
_OBSERVER = {"info", "config", "config|resetstat"}


def commands(observer: "redis.Redis") -> dict[str, int]:
    """How often the server has run each command since the last reset, scripts included."""
    statistics: Any = observer.info("commandstats")
    return {
        name.removeprefix("cmdstat_"): each["calls"]
        for name, each in statistics.items()
        if name.removeprefix("cmdstat_") not in _OBSERVER
    }


@contextmanager
def sends(observer: "redis.Redis", expected: dict[str, int]) -> Iterator[None]:
    """Check that the server runs exactly these commands in the block."""
    observer.config_resetstat()
    yield
    assert commands(observer) == expected


async def refused(kind: type[Exception], storage: RedisStorage[Any], *what: Any) -> None:
    """Check that a store is refused."""
    session, when = what
    with pytest.raises(kind):
        await storage.store(session, when=when)


# Commands.


@pytest.mark.parametrize("lifetime", [None, timedelta(hours=1)], ids=["endless", "limited"])
async def test_load_is_one_command(
    server: Server, observer: "redis.Redis", lifetime: timedelta | None
) -> None:
    """One GETEX reads a session and renews its TTL, also if the session has a deadline."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id(), data="x" * 800)
        if lifetime is not None:
            session.expires_at = session.created_at + lifetime
        await storage.store(session)

        with sends(observer, {"getex": 100}):
            for _ in range(100):
                await storage.load(session.id)


async def test_load_through_the_manager_is_one_command(
    server: Server, observer: "redis.Redis"
) -> None:
    """`get` adds no command, and neither does a sweep."""
    async with (
        connected(server) as storage,
        SessionManager(storage, max_lifetime=3_600, sweep_interval=0.001) as sessions,
    ):
        session = await sessions.create()

        with sends(observer, {"getex": 100}):
            for _ in range(100):
                await sessions.get(session.id)


async def test_concurrent_loads_are_one_command_each(
    server: Server, observer: "redis.Redis"
) -> None:
    """No load on the shared connection is sent twice or left out."""
    async with connected(server) as storage:
        made = [Session[Any](id=new_session_id(), data=n) for n in range(100)]
        for session in made:
            await storage.store(session)

        with sends(observer, {"getex": 100}):
            loaded = await asyncio.gather(*(storage.load(session.id) for session in made))

        assert loaded == made


async def test_load_of_absent_session_is_one_command(
    server: Server, observer: "redis.Redis"
) -> None:
    """A missing key needs no second look."""
    async with connected(server) as storage:
        with sends(observer, {"getex": 10}):
            for _ in range(10):
                with pytest.raises(SessionNotFound):
                    await storage.load(new_session_id())


async def test_load_of_dead_session_costs_a_script_once(
    server: Server, observer: "redis.Redis"
) -> None:
    """The first load past the deadline removes the record, so the next one finds no key."""
    clock = FakeClock()
    async with connected(server, clock=clock) as storage:
        for number in range(2):
            session = Session[Any](id=str(number), expires_at=clock.now() + timedelta(seconds=1))
            await storage.store(session)
            await storage.load(session.id)
        clock.advance(1)
        with pytest.raises(SessionNotFound):
            await storage.load("0")  # the server learns the script

        with sends(observer, {"getex": 2, "evalsha": 1, "getrange": 1, "time": 1, "del": 1}):
            for _ in range(2):
                with pytest.raises(SessionNotFound):
                    await storage.load("1")


async def test_unconditional_store_is_one_command(server: Server, observer: "redis.Redis") -> None:
    """One SET creates or overwrites, with and without a deadline."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id())
        with sends(observer, {"set": 10}):
            for _ in range(5):
                await storage.store(session)
            session.expires_at = session.created_at + timedelta(minutes=1)
            for _ in range(5):
                await storage.store(session)


async def test_conditional_store_is_one_script(server: Server, observer: "redis.Redis") -> None:
    """One EVALSHA compares and writes; a refusal writes nothing."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id())
        other = Session[Any](id=new_session_id())
        for when in (When.ABSENT, When.PRESENT, When.UNCHANGED):
            with sends(observer, {"evalsha": 1, "getrange": 1, "set": 1}):
                await storage.store(session, when=when)

        stale = msgspec.structs.replace(session, revision="another-revision")
        for kind, each, when in (
            (SessionExists, session, When.ABSENT),
            (SessionNotFound, other, When.PRESENT),
            (SessionNotFound, other, When.UNCHANGED),
            (SessionConflict, stale, When.UNCHANGED),
        ):
            # A replica, which may be out of date, rejects GETEX, and so cannot refuse a write.
            with sends(observer, {"evalsha": 1, "getrange": 1, "getex": 1}):
                await refused(kind, storage, each, when)


async def test_delete_is_one_script(server: Server, observer: "redis.Redis") -> None:
    """One EVALSHA checks the deadline and removes the session."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id())
        await storage.store(session)

        for existed in (True, False):
            with sends(observer, {"evalsha": 1, "getrange": 1, "del": 1}):
                assert await storage.delete(session.id) is existed


async def test_invalid_input_and_sweeps_send_nothing(
    server: Server, observer: "redis.Redis"
) -> None:
    """The storage refuses invalid input by itself, and the server expires keys by itself."""
    async with connected(server, codec=JsonCodec[Any](max_bytes=200)) as storage:
        with sends(observer, {}):
            assert await storage.delete_expired() == 0
            for when in When:
                await refused(ValueError, storage, Session(id="x", data=object()), when)
                await refused(ValueError, storage, Session(id="x", data="x" * 200), when)
                await refused(ValueError, storage, Session(id="a b"), when)
            for verb in (storage.load, storage.delete):
                with pytest.raises(ValueError, match="session id"):
                    await verb("")


async def test_script_source_is_sent_once(server: Server, observer: "redis.Redis") -> None:
    """A server that does not know a script gets its source; later its digest is enough."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id())
        observer.script_flush()

        with sends(observer, {"evalsha": 1, "eval": 1, "getrange": 1, "set": 1}):
            await storage.store(session, when=When.ABSENT)
        with sends(observer, {"evalsha": 1, "getrange": 1, "set": 1}):
            await storage.store(session, when=When.PRESENT)
        with sends(observer, {"evalsha": 1, "eval": 1, "getrange": 1, "del": 1}):
            await storage.delete(session.id)


async def test_flushed_script_cache_changes_no_result(
    server: Server, observer: "redis.Redis"
) -> None:
    """Each conditional verb gives its result on a server without scripts."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id())
        observer.script_flush()
        await storage.store(session, when=When.ABSENT)
        observer.script_flush()
        await refused(SessionExists, storage, session, When.ABSENT)
        observer.script_flush()
        stale = msgspec.structs.replace(session, revision="")
        await refused(SessionConflict, storage, stale, When.UNCHANGED)
        observer.script_flush()
        assert await storage.delete(session.id) is True
        observer.script_flush()
        await refused(SessionNotFound, storage, session, When.PRESENT)


# Keys and TTLs.


async def test_key_is_prefix_and_id(server: Server, observer: "redis.Redis") -> None:
    """The value is the stored form, which other programs may read."""
    codec = MsgpackCodec[Any]()
    async with connected(server, key_prefix="app:web:", codec=codec) as storage:
        session = Session[Any](id="{x}*?[a]:b", data=[1, 2])
        await storage.store(session)

    keys: Any = observer.keys("*")
    record: Any = observer.get("app:web:{x}*?[a]:b")
    assert keys == [b"app:web:{x}*?[a]:b"]
    assert unseal(record, session.id, codec, lambda: 0) == session


async def test_prefixes_separate_storages(server: Server) -> None:
    """One id under two prefixes is two sessions."""
    async with (
        connected(server, key_prefix="a:") as one,
        connected(server, key_prefix="a:b:") as other,
    ):
        await one.store(Session(id="x", data=1))

        with pytest.raises(SessionNotFound):
            await other.load("x")
        assert await other.delete("x") is False
        assert (await one.load("x")).data == 1


def left(observer: "redis.Redis", session: Session[Any]) -> int:
    """The PTTL of the key of a session."""
    milliseconds: Any = observer.pttl(f"session:{session.id}")
    return int(milliseconds)


USES: dict[str, Callable[[RedisStorage[Any], Session[Any]], Any]] = {
    "always": lambda storage, session: storage.store(session),
    "present": lambda storage, session: storage.store(session, when=When.PRESENT),
    "unchanged": lambda storage, session: storage.store(session, when=When.UNCHANGED),
    "load": lambda storage, session: storage.load(session.id),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("ttl", [600, 600.25, timedelta(days=14), timedelta(days=3_660_000)])
async def test_use_starts_a_full_ttl(
    server: Server, observer: "redis.Redis", use: Callable[..., Any], ttl: float | timedelta
) -> None:
    """The TTL of the key is exact to the millisecond, for fractions and for many days."""
    full = round((ttl.total_seconds() if isinstance(ttl, timedelta) else ttl) * 1_000)
    async with connected(server, ttl=ttl) as storage:
        assert storage.ttl == full / 1_000
        session = Session[Any](id=new_session_id())
        await storage.store(session, when=When.ABSENT)
        assert full - 5_000 < left(observer, session) <= full

        server.age(300)
        assert left(observer, session) <= full - 300_000
        await use(storage, session)

        assert full - 5_000 < left(observer, session) <= full


async def test_refused_write_changes_nothing(server: Server, observer: "redis.Redis") -> None:
    """The key keeps its value and its TTL."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id())
        await storage.store(session)
        server.age(300)
        record = observer.get(f"session:{session.id}")

        await refused(SessionExists, storage, session, When.ABSENT)
        stale = msgspec.structs.replace(session, revision="another-revision")
        await refused(SessionConflict, storage, stale, When.UNCHANGED)

        assert left(observer, session) <= 300_000
        assert observer.get(f"session:{session.id}") == record


# Connections.


async def test_nothing_connects_before_the_first_use(
    server: Server, observer: "redis.Redis"
) -> None:
    """A storage that is made, swept and closed sends nothing."""
    with sends(observer, {}):
        async with RedisStorage[Any].from_url(server.url, ttl=60) as storage:
            await storage.delete_expired()
            assert storage.statistics().connected == 0


@pytest.mark.parametrize("number", [1, 3])
async def test_callers_share_connections(
    server: Server, observer: "redis.Redis", number: int
) -> None:
    """Concurrent first callers share the one connection, or as many as the setting says."""
    before: Any = observer.info("stats")
    async with RedisStorage[Any].from_url(server.url, ttl=60, connections=number) as storage:
        made = [Session[Any](id=new_session_id(), data=n) for n in range(100)]
        await asyncio.gather(*(storage.store(session) for session in made))
        assert await asyncio.gather(*(storage.load(session.id) for session in made)) == made

        after: Any = observer.info("stats")
        assert after["total_connections_received"] - before["total_connections_received"] == number
        assert storage.statistics().connected == number


async def every_verb(storage: RedisStorage[Any]) -> None:
    """Use each verb, with each condition."""
    session = Session[Any](id=new_session_id(), principal="zoë", data={"a": [1, None]})
    await storage.store(session, when=When.ABSENT)
    await refused(SessionExists, storage, session, When.ABSENT)
    await storage.store(session, when=When.UNCHANGED)
    await storage.store(session, when=When.PRESENT)
    await storage.store(session)
    assert await storage.load(session.id) == session
    assert await storage.delete(session.id) is True
    assert await storage.delete(session.id) is False
    with pytest.raises(SessionNotFound):
        await storage.load(session.id)


async def test_database_of_the_client_is_used(server: Server, observer: "redis.Redis") -> None:
    """Sessions are in the database that the borrowed client, or the URL, selects."""
    url = server.url.replace("/0", "/3")
    async with Redis.from_url(url) as client, RedisStorage[Any](client, ttl=60) as storage:
        await storage.store(Session(id="borrowed"))
    async with RedisStorage[Any].from_url(url, ttl=60) as storage:
        await storage.store(Session(id="owned"))

    assert observer.dbsize() == 0
    with redis.Redis.from_url(url) as third:
        names: Any = third.keys("*")
    assert sorted(names) == [b"session:borrowed", b"session:owned"]


async def test_storages_share_a_borrowed_client(server: Server) -> None:
    """Closing one storage disturbs neither the other one nor the client."""
    async with Redis(port=server.port) as client:
        one = RedisStorage[Any](client, ttl=60)
        other = RedisStorage[Any](client, ttl=60, key_prefix="other:")
        await every_verb(one)
        await every_verb(other)

        await one.aclose()

        await every_verb(other)
        await other.aclose()
        assert await client.ping()


URLS: dict[str, Callable[[Server], str]] = {
    "redis": lambda server: server.url,
    "valkey": lambda server: server.url.replace("redis://", "valkey://"),
    "unix": lambda server: server.unix_url,
    "decoding": lambda server: f"{server.url}?decode_responses=true",
    "resp3": lambda server: f"{server.url}?protocol=3",
    "name": lambda server: f"{server.url}?client_name=mine",
}


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
async def test_every_verb_works_with_a_url(server: Server, url: Callable[[Server], str]) -> None:
    """TCP, unix sockets, and options of redis-py lead to the same results."""
    async with RedisStorage[Any].from_url(url(server), ttl=60) as storage:
        await every_verb(storage)


def connections(observer: "redis.Redis") -> int:
    """The number of connections to the server, without the one of the observer."""
    clients: Any = observer.client_list()
    return len(clients) - 1


async def no_connections(observer: "redis.Redis") -> None:
    """Wait until the server has noticed that all connections are closed."""
    with anyio.fail_after(_TIMEOUT):
        while connections(observer):  # noqa: ASYNC110 - a server raises no event
            await anyio.sleep(0.005)


@pytest.mark.parametrize("how", ["owned", "borrowed"])
async def test_closing_leaves_no_connection_or_task(
    server: Server, observer: "redis.Redis", how: str
) -> None:
    """`aclose` closes the connections and ends the tasks of the storage."""
    await no_connections(observer)
    tasks = asyncio.all_tasks()
    client = Redis(port=server.port)
    storage = (
        RedisStorage[Any].from_url(server.url, ttl=60)
        if how == "owned"
        else RedisStorage[Any](client, ttl=60)
    )

    await asyncio.gather(*(every_verb(storage) for _ in range(10)))
    assert connections(observer) > 0
    await storage.aclose()

    assert asyncio.all_tasks() == tasks
    await no_connections(observer)
    await client.aclose()


async def test_connections_have_a_name(server: Server, observer: "redis.Redis") -> None:
    """CLIENT LIST shows the name of the package, or of the borrowed client."""
    async with (
        RedisStorage[Any].from_url(server.url, ttl=60) as owning,
        Redis(port=server.port, client_name="gateway") as client,
        RedisStorage[Any](client, ttl=60) as borrowing,
    ):
        await every_verb(owning)
        await every_verb(borrowing)

        clients: Any = observer.client_list()

    assert {"aiosessions", "gateway"} <= {each["name"] for each in clients}


async def test_closed_idle_connection_fails_no_call(
    server: Server, observer: "redis.Redis"
) -> None:
    """Servers and middleboxes close idle connections; the next call makes a new one."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id())
        await storage.store(session)

        for verb in (
            lambda: storage.load(session.id),
            lambda: storage.store(session),
            lambda: storage.store(session, when=When.UNCHANGED),
            lambda: storage.delete(session.id),
        ):
            observer.client_kill_filter(_type="normal", skipme=True)
            # A command in flight would be lost, so wait until the storage has noticed.
            while our_tasks():  # noqa: ASYNC110 - the end of the task sets no event
                await asyncio.sleep(0)
            await verb()

        assert storage.statistics().reconnects == 4
