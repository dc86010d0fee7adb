"""`RedisStorage` beyond the contract: what it sends, by the server's own count, and to whom.

Commands are pinned exactly, as they are what a load costs, what an ACL has to allow, and what a
proxy in between sees. What happens when servers fail is in other files.
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
from tests.calls import our_tasks
from tests.servers import Server

# What anything here may take that does not end in an error; nothing comes near it.
_PATIENCE = 20.0


@pytest.fixture
def server(redis_or_valkey: Server) -> Server:
    """An empty server of each kind."""
    redis_or_valkey.flush()
    return redis_or_valkey


@pytest.fixture
def observer(server: Server) -> Iterator["redis.Redis"]:
    """A client of the test's own, which is connected already."""
    with server.client() as client:
        client.ping()
        yield client


@asynccontextmanager
async def connected(server: Server, **options: Any) -> AsyncIterator[RedisStorage[Any]]:
    """A storage that has connected, and a server that knows its scripts."""
    settings: dict[str, Any] = {"ttl": 600, **options}
    async with RedisStorage[Any].from_url(server.url, **settings) as storage:
        session = Session[Any](id=new_session_id())
        await storage.store(session, when=When.ABSENT)
        await storage.delete(session.id)
        yield storage


# The observer's.
_OURS = {"info", "config|resetstat"}
# How the script for conditional stores looks at the session's key, before it writes.
PROBE = "getrange"


def commands(observer: "redis.Redis") -> dict[str, int]:
    """How often the server has run each command since the count began, inside scripts, too."""
    statistics: Any = observer.info("commandstats")
    return {
        name.removeprefix("cmdstat_"): each["calls"]
        for name, each in statistics.items()
        if name.removeprefix("cmdstat_") not in _OURS
    }


@contextmanager
def sends(observer: "redis.Redis", expected: dict[str, int]) -> Iterator[None]:
    """Check that exactly these commands are run in the block."""
    observer.config_resetstat()
    yield
    assert commands(observer) == expected


async def refused(kind: type[Exception], storage: RedisStorage[Any], *what: Any) -> None:
    """Check that a store is refused."""
    session, when = what
    with pytest.raises(kind):
        await storage.store(session, when=when)


# What is sent


async def test_a_hundred_loads_are_a_hundred_commands(
    server: Server, observer: "redis.Redis"
) -> None:
    """One GETEX each, which renews the TTL; nothing before, nothing after, nothing besides."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id(), data="x" * 800)
        await storage.store(session)

        with sends(observer, {"getex": 100}):
            for _ in range(100):
                assert await storage.load(session.id) == session


async def test_loads_through_the_manager_are_the_same(
    server: Server, observer: "redis.Redis"
) -> None:
    """`get` adds nothing, and a sweep of a server that sweeps by itself sends nothing."""
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
    """However many callers share the connection, no load is sent twice or left out."""
    async with connected(server) as storage:
        made = [Session[Any](id=new_session_id(), data=n) for n in range(100)]
        for session in made:
            await storage.store(session)

        with sends(observer, {"getex": 100}):
            loaded = await asyncio.gather(*(storage.load(session.id) for session in made))

        assert loaded == made


async def test_a_load_that_finds_nothing_is_one_command(
    server: Server, observer: "redis.Redis"
) -> None:
    """Nobody looks twice."""
    async with connected(server) as storage:
        with sends(observer, {"getex": 10}):
            for _ in range(10):
                with pytest.raises(SessionNotFound):
                    await storage.load(new_session_id())


async def test_an_unconditional_store_is_one_command(
    server: Server, observer: "redis.Redis"
) -> None:
    """One SET, whether there was a session or not."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id())

        with sends(observer, {"set": 10}):
            for _ in range(10):
                await storage.store(session)


async def test_a_conditional_store_is_one_script(server: Server, observer: "redis.Redis") -> None:
    """One EVALSHA: what it does on the server is in there, and a refusal writes nothing."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id())
        other = Session[Any](id=new_session_id())
        applied = {"evalsha": 1, PROBE: 1, "set": 1}
        for when in (When.ABSENT, When.PRESENT, When.UNCHANGED):
            with sends(observer, applied):
                await storage.store(session, when=when)

        stale = msgspec.structs.replace(session, revision="another-revision")
        for kind, each, when in (
            (SessionExists, session, When.ABSENT),
            (SessionNotFound, other, When.PRESENT),
            (SessionNotFound, other, When.UNCHANGED),
            (SessionConflict, stale, When.UNCHANGED),
        ):
            # GETEX without an option: only a master may say no.
            with sends(observer, {"evalsha": 1, PROBE: 1, "getex": 1}):
                await refused(kind, storage, each, when)


async def test_a_delete_is_one_script(server: Server, observer: "redis.Redis") -> None:
    """One EVALSHA, which looks whether the session was alive and removes it."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id())
        await storage.store(session)

        for existed in (True, False):
            with sends(observer, {"evalsha": 1, "getrange": 1, "del": 1}):
                assert await storage.delete(session.id) is existed


async def test_a_sweep_is_no_command(server: Server, observer: "redis.Redis") -> None:
    """The server expires keys by itself; there is nothing to ask it."""
    async with connected(server) as storage:
        with sends(observer, {}):
            assert await storage.delete_expired() == 0


async def test_what_is_invalid_is_not_sent(server: Server, observer: "redis.Redis") -> None:
    """No command is spent on what cannot be stored or asked for."""
    async with connected(server, codec=JsonCodec[Any](max_bytes=200)) as storage:
        with sends(observer, {}):
            for when in When:
                await refused(ValueError, storage, Session(id="x", data=object()), when)
                await refused(ValueError, storage, Session(id="x", data="x" * 200), when)
                await refused(ValueError, storage, Session(id="a b"), when)
            with pytest.raises(ValueError, match="session id"):
                await storage.load("")
            with pytest.raises(ValueError, match="session id"):
                await storage.delete("")


async def test_scripts_are_loaded_once(server: Server, observer: "redis.Redis") -> None:
    """A server that does not know a script is told it, and knows it from then on."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id())
        observer.script_flush()

        with sends(observer, {"evalsha": 1, "eval": 1, PROBE: 1, "set": 1}):
            await storage.store(session, when=When.ABSENT)
        with sends(observer, {"evalsha": 1, PROBE: 1, "set": 1}):
            await storage.store(session, when=When.PRESENT)
        with sends(observer, {"evalsha": 1, "eval": 1, "getrange": 1, "del": 1}):
            await storage.delete(session.id)


async def test_a_flushed_script_cache_disturbs_nobody(
    server: Server, observer: "redis.Redis"
) -> None:
    """Every script verb gives its answer, flushed or not."""
    async with connected(server) as storage:
        session = Session[Any](id=new_session_id())
        observer.script_flush()
        await storage.store(session, when=When.ABSENT)
        observer.script_flush()
        await refused(SessionExists, storage, session, When.ABSENT)
        observer.script_flush()
        await storage.store(session, when=When.UNCHANGED)
        observer.script_flush()
        stale = msgspec.structs.replace(session, revision="")
        await refused(SessionConflict, storage, stale, When.UNCHANGED)
        assert await storage.load(session.id) == session
        observer.script_flush()
        assert await storage.delete(session.id) is True
        observer.script_flush()
        await refused(SessionNotFound, storage, session, When.PRESENT)


async def test_nothing_connects_before_it_is_needed(
    server: Server, observer: "redis.Redis"
) -> None:
    """Making a storage, sweeping it and closing it send nothing at all."""
    with sends(observer, {}):
        async with RedisStorage[Any].from_url(server.url, ttl=60) as storage:
            await storage.delete_expired()


async def test_many_first_callers_share_one_connection(
    server: Server, observer: "redis.Redis"
) -> None:
    """A hundred callers at once, on a storage that is not connected yet: it connects once."""
    before: Any = observer.info("stats")
    async with RedisStorage[Any].from_url(server.url, ttl=60) as storage:
        made = [Session[Any](id=new_session_id(), data=n) for n in range(100)]
        await asyncio.gather(*(storage.store(session) for session in made))
        assert await asyncio.gather(*(storage.load(session.id) for session in made)) == made

        after: Any = observer.info("stats")
        assert after["total_connections_received"] - before["total_connections_received"] == 1


# Where it is stored, and for how long


async def test_the_key_is_the_prefix_and_the_id(server: Server, observer: "redis.Redis") -> None:
    """And the value is the stored form, which other programs may read."""
    codec = MsgpackCodec[Any]()
    async with connected(server, key_prefix="app:web:", codec=codec) as storage:
        session = Session[Any](id="{x}*?[a]:b", data=[1, 2])
        await storage.store(session)

    keys: Any = observer.keys("*")
    record: Any = observer.get("app:web:{x}*?[a]:b")
    assert keys == [b"app:web:{x}*?[a]:b"]
    assert unseal(record, session.id, codec, lambda: 0) == session


async def test_prefixes_keep_storages_apart(server: Server) -> None:
    """The same id under two prefixes is two sessions."""
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
    """Milliseconds until the server forgets a session."""
    milliseconds: Any = observer.pttl(f"session:{session.id}")
    return int(milliseconds)


STORES: dict[str, Callable[[RedisStorage[Any], Session[Any]], Any]] = {
    "always": lambda storage, session: storage.store(session),
    "present": lambda storage, session: storage.store(session, when=When.PRESENT),
    "unchanged": lambda storage, session: storage.store(session, when=When.UNCHANGED),
    "load": lambda storage, session: storage.load(session.id),
}


@pytest.mark.parametrize("use", STORES.values(), ids=STORES)
@pytest.mark.parametrize("ttl", [600, 600.25, timedelta(days=14), timedelta(days=3_660_000)])
async def test_use_starts_a_full_ttl(
    server: Server, observer: "redis.Redis", use: Callable[..., Any], ttl: float | timedelta
) -> None:
    """To the millisecond, fractions and many days included, and never more."""
    full = round((ttl.total_seconds() if isinstance(ttl, timedelta) else ttl) * 1_000)
    async with connected(server, ttl=ttl) as storage:
        session = Session[Any](id=new_session_id())
        await storage.store(session, when=When.ABSENT)
        assert full - 5_000 < left(observer, session) <= full

        server.age(300)
        assert left(observer, session) <= full - 300_000
        await use(storage, session)

        assert full - 5_000 < left(observer, session) <= full


async def test_a_refused_write_renews_nothing(server: Server, observer: "redis.Redis") -> None:
    """Neither does it write: the key, its value and its time are as they were."""
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


@pytest.mark.parametrize("when", [When.ALWAYS, When.ABSENT, When.PRESENT, When.UNCHANGED])
async def test_no_key_outlasts_its_deadline_for_long(
    server: Server, observer: "redis.Redis", when: When
) -> None:
    """A store gives the key no more time than `expires_at` allows; a load no more than the TTL."""
    clock = FakeClock()
    async with connected(server, clock=clock) as storage:
        session = Session[Any](id=new_session_id())
        if when in (When.PRESENT, When.UNCHANGED):
            await storage.store(session)
        session.expires_at = clock.now() + timedelta(seconds=60)

        await storage.store(session, when=when)
        assert 55_000 < left(observer, session) <= 60_000
        await storage.load(session.id)
        assert left(observer, session) <= 600_000

        clock.advance(60)
        with pytest.raises(SessionNotFound):
            await storage.load(session.id)


@pytest.mark.parametrize("when", [When.ALWAYS, When.ABSENT])
@pytest.mark.parametrize("past", [timedelta(0), timedelta(milliseconds=1), timedelta(days=40_000)])
async def test_what_is_past_its_deadline_leaves_nothing_behind(
    server: Server, observer: "redis.Redis", when: When, past: timedelta
) -> None:
    """It is stored, and gone at once; the server does not keep it for a TTL."""
    clock = FakeClock()
    async with connected(server, clock=clock) as storage:
        session = Session[Any](id=new_session_id(), expires_at=clock.now() - past)

        await storage.store(session, when=when)

        with pytest.raises(SessionNotFound):
            await storage.load(session.id)
        assert session.revision
        assert left(observer, session) <= 600_000


# Borrowed and owned clients


async def every_verb(storage: RedisStorage[Any]) -> None:
    """Use each verb, with each condition, once or twice."""
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


async def test_a_borrowed_clients_database_is_used(server: Server, observer: "redis.Redis") -> None:
    """Sessions are in the database that the client has selected, also the owned one of a URL."""
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
    """Closing one leaves the other, and the client, at work."""
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
    "tcp": lambda server: server.url,
    "valkey": lambda server: server.url.replace("redis://", "valkey://"),
    "socket": lambda server: server.unix_url,
}


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
async def test_a_storage_with_a_url_works(server: Server, url: Callable[[Server], str]) -> None:
    """Over TCP, by either name, and over a unix socket."""
    async with RedisStorage[Any].from_url(url(server), ttl=60) as storage:
        await every_verb(storage)


@pytest.mark.parametrize("option", ["decode_responses=true", "protocol=3", "client_name=mine"])
async def test_a_url_may_have_options_of_the_driver(server: Server, option: str) -> None:
    """As redis-py has them, and they change no answer."""
    async with RedisStorage[Any].from_url(f"{server.url}?{option}", ttl=60) as storage:
        await every_verb(storage)


def connections(observer: "redis.Redis") -> int:
    """How many there are, besides the observer's."""
    clients: Any = observer.client_list()
    return len(clients) - 1


async def no_connections(observer: "redis.Redis") -> None:
    """Wait until the server has noticed that all are closed."""
    with anyio.fail_after(_PATIENCE):
        while connections(observer):  # noqa: ASYNC110 - a server raises no event
            await anyio.sleep(0.005)


@pytest.mark.parametrize("how", ["owned", "borrowed"])
async def test_closing_leaves_nothing_behind(
    server: Server, observer: "redis.Redis", how: str
) -> None:
    """No connection and no task: neither of an owned client, nor of what a borrowed one is for."""
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
    """Whoever looks at the server sees which connections are ours; a borrowed client's say its."""
    async with (
        RedisStorage[Any].from_url(server.url, ttl=60) as owning,
        Redis(port=server.port, client_name="gateway") as client,
        RedisStorage[Any](client, ttl=60) as borrowing,
    ):
        await every_verb(owning)
        await every_verb(borrowing)

        clients: Any = observer.client_list()

    assert {"aiosessions", "gateway"} <= {each["name"] for each in clients}


async def test_a_connection_that_the_server_closed(server: Server, observer: "redis.Redis") -> None:
    """Idle connections get closed by servers and by whatever is in between: nobody notices."""
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
            # Until the storage has noticed: what is under way then is another matter.
            while our_tasks():  # noqa: ASYNC110 - its end sets no event
                await asyncio.sleep(0)
            await verb()
