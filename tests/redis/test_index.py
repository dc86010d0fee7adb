"""The index of a principal on one server: its cost, its leases and how it heals.

The clock of the storages is a fake one, and tests age the keys of the server with it.
tests/redis/topologies has the same index in a cluster, and crashes between two commands.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import redis

from aiosessions import (
    CorruptSession,
    Session,
    SessionManager,
    SessionNotFound,
    When,
    new_session_id,
)
from aiosessions.redis._time import ServerTime
from aiosessions.testing import FakeClock
from tests.support.clients import Storage, key_of, many, outcome, storage_at, stored
from tests.support.proxy import Counts, FaultProxy, hold, until
from tests.support.servers import Server
from tests.support.steps import counted, index_key, listed

TTL = 60.0
ALICE = "alice@example.com"
INDEX = index_key(ALICE)

Call = Callable[[SessionManager[Any], Storage, Session[Any]], Awaitable[object]]
Cost = tuple[int, dict[str, int]]
"""Round trips, and how often each command was sent."""


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[FaultProxy]:
    """A proxy for each server in turn. It only counts."""
    async with FaultProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def clock() -> FakeClock:
    """The clock of the storages."""
    return FakeClock()


@pytest.fixture
def age(clock: FakeClock, server: Server) -> Callable[[float], None]:
    """A function that lets time pass for the storages and the server."""

    def age(seconds: float) -> None:
        clock.advance(seconds)
        server.age(seconds)

    return age


@pytest.fixture
async def storage(proxy: FaultProxy, clock: FakeClock) -> AsyncIterator[Storage]:
    """A connected storage on a server that knows the scripts."""
    async with (
        storage_at(proxy.url, ttl=TTL, clock=clock) as storage,
        SessionManager(storage, max_per_principal=1) as sessions,
    ):
        session = await sessions.create(principal="bob")
        await sessions.save(session)
        await sessions.create(principal="bob")
        await sessions.list("bob")
        await sessions.count("bob")
        await sessions.revoke_all("bob")
        clock.advance(1.5 * TTL)  # the server's time stands still, so the lease ends sooner
        session = await sessions.create(principal="carol")
        clock.advance(1.5 * TTL)
        await sessions.get(session.id)
        await sessions.delete(session.id)
        yield storage


async def owned(storage: Storage, number: int = 1) -> list[Session[Any]]:
    """Store sessions of Alice."""
    return await many(storage, number, principal=ALICE)


# The cost of each call.

EIGHT = 8
MANY = 300
SCRIPT: Cost = (1, {"EVALSHA": 1})

COSTS: dict[str, tuple[Call, Cost]] = {
    "create": (lambda manager, _, _s: manager.create(principal=ALICE), SCRIPT),
    "store": (lambda _, storage, s: storage.store(s), SCRIPT),
    "get": (lambda manager, _, s: manager.get(s.id, principal=ALICE), (1, {"GETEX": 1})),
    "save": (lambda manager, _, s: manager.save(s), SCRIPT),
    "rotate": (lambda manager, _, s: manager.rotate(s), (3, {"GETEX": 1, "EVALSHA": 2})),
    "delete": (lambda manager, _, s: manager.delete(s.id), SCRIPT),
    "list": (lambda manager, _, _s: manager.list(ALICE), (2, {"EVALSHA": 1, "GETEX": EIGHT})),
    "list-none": (lambda manager, _, _s: manager.list("dave"), SCRIPT),
    "count": (lambda manager, _, _s: manager.count(ALICE), (2, {"EVALSHA": 1 + EIGHT})),
    "revoke": (lambda manager, _, s: manager.revoke(ALICE, s.digest), SCRIPT),
    "revoke_all": (lambda manager, _, _s: manager.revoke_all(ALICE), (2, {"EVALSHA": 1 + EIGHT})),
    "revoke_all-none": (lambda manager, _, _s: manager.revoke_all("dave"), SCRIPT),
    "trim-nothing": (lambda _, storage, s: storage.trim(ALICE, EIGHT, keep=s.id), SCRIPT),
}


@pytest.mark.parametrize(("call", "cost"), COSTS.values(), ids=COSTS)
async def test_call_costs_these_round_trips(
    proxy: FaultProxy, storage: Storage, call: Call, cost: Cost
) -> None:
    """On an open connection to a server that knows the scripts, a call costs exactly this."""
    session, *_ = await owned(storage, EIGHT)
    proxy.counts = Counts()

    await call(SessionManager(storage), storage, session)

    assert (proxy.counts.round_trips, proxy.counts.requests) == cost


async def test_listing_many_costs_two_round_trips(proxy: FaultProxy, storage: Storage) -> None:
    """The storage asks for all records before the first of them arrives."""
    await owned(storage, MANY)
    reply = asyncio.Event()
    proxy.on_reply("GETEX", hold(reply))
    proxy.counts = Counts()

    listing = asyncio.create_task(storage.list(ALICE))
    await until(lambda: proxy.counts.requests["GETEX"] == MANY)
    reply.set()

    assert len(await listing) == MANY
    assert proxy.counts.requests == {"EVALSHA": 1, "GETEX": MANY}


async def test_lease_is_extended_once_per_ttl(
    storage: Storage, observer: "redis.Redis", age: Callable[[float], None]
) -> None:
    """A load that extends the lease costs one more command. Loads keep the session listed."""
    (session,) = await owned(storage)
    renewals, ttls = 0, 20
    for _ in range(4 * ttls):
        age(TTL / 4)
        with counted(storage) as sent:
            await storage.load(session.id)
        assert len(sent) in (1, 2)
        renewals += len(sent) - 1
        assert observer.zrange(INDEX, 0, -1) == [session.digest.encode()]
    assert ttls / 2 < renewals <= ttls


async def test_save_extends_the_lease_without_a_command(
    storage: Storage, observer: "redis.Redis", age: Callable[[float], None]
) -> None:
    """Saves alone keep a session listed, and most of them leave the index alone."""
    (session,) = await owned(storage)
    scores = set()
    for _ in range(10):
        age(0.3 * TTL)
        with counted(storage) as sent:
            await storage.store(session, when=When.UNCHANGED)
        assert len(sent) == 1
        scores.add(observer.zscore(INDEX, session.digest))
    assert None not in scores
    assert len(scores) == 3


@pytest.mark.parametrize("behind", [1.5, 3, 1_000])
async def test_slow_clock_does_not_hide_a_session(
    server: Server, observer: "redis.Redis", behind: float
) -> None:
    """A replica with a clock several TTLs behind extends leases in time."""
    async with storage_at(server.url, ttl=TTL) as storage:
        (session,) = await owned(storage)
        for _ in range(20):
            server.age(TTL / 2)
            _shorten_lease(observer, session, TTL / 2)
            with _behind(storage, behind * TTL):
                await storage.load(session.id)
            assert observer.zscore(INDEX, session.digest) is not None


@contextmanager
def _behind(storage: Storage, seconds: float) -> Iterator[None]:
    """Let the clock of a replica, but not that of the server, be behind."""
    now = ServerTime.now
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerTime, "now", lambda self: now(self) - round(seconds * 1000))
        assert storage._time.offset() == b"0"
        yield


def _shorten_lease(observer: "redis.Redis", session: Session[Any], seconds: float) -> None:
    """Move the lease in a record, as if the clocks had advanced."""
    record: Any = observer.getrange(key_of(session.id), 32, 46)
    observer.setrange(key_of(session.id), 32, b"%015d" % (int(record) - seconds * 1000))


async def test_failed_renewal_matters_in_the_last_ttl(
    storage: Storage, observer: "redis.Redis", age: Callable[[float], None]
) -> None:
    """While the lease lasts for another TTL, a load succeeds without extending it."""
    (session,) = await owned(storage)
    observer.set(INDEX, "not an index")
    for expected in (Session, Session, CorruptSession):
        age(0.9 * TTL)
        observer.persist(INDEX)
        assert await outcome(storage.load(session.id)) is expected
    observer.delete(INDEX)

    await storage.load(session.id)
    assert await listed(storage, ALICE) == {session.digest}


# The life of the index.


async def test_index_always_expires(
    storage: Storage, observer: "redis.Redis", clock: FakeClock
) -> None:
    """Every call that writes an index gives it a TTL, of three TTLs of a session at most."""
    sessions = SessionManager(storage, clock=clock)
    one = await sessions.create(principal=ALICE)
    for call in (
        lambda: sessions.save(one),
        lambda: sessions.rotate(one),
        lambda: sessions.create(principal=ALICE),
        lambda: sessions.get(one.id),
        lambda: sessions.list(ALICE),
    ):
        await call()
        assert 2 * TTL * 1000 < int(observer.pttl(INDEX)) <= 3 * TTL * 1000
    await sessions.revoke_all(ALICE)
    await sessions.list(ALICE)
    assert observer.exists(INDEX) == 0


@pytest.mark.parametrize("end", ["expired", "evicted", "moved"])
@pytest.mark.parametrize("heal", ["list", "count", "write"])
async def test_entries_of_dead_sessions_disappear(
    storage: Storage, observer: "redis.Redis", age: Callable[[float], None], end: str, heal: str
) -> None:
    """A list removes them all; each write removes those of a sample."""
    dead = await owned(storage, 20)
    (live,) = await owned(storage)
    if end == "expired":
        age(0.6 * TTL)
        await storage.load(live.id)
        age(0.6 * TTL)
    for session in dead:
        if end == "evicted":
            observer.delete(key_of(session.id))
        elif end == "moved":
            session.principal = "bob"
            await storage.store(session)
    assert observer.zcard(INDEX) == 21

    if heal == "list":
        assert await listed(storage, ALICE) == {live.digest}
    elif heal == "count":
        assert await storage.count(ALICE) == 1
    else:  # three dead ones at least in each sample of four
        for _ in range(7):
            await storage.store(live)
    assert observer.zrange(INDEX, 0, -1) == [live.digest.encode()]


async def test_deletion_removes_the_entry(
    storage: Storage, observer: "redis.Redis", clock: FakeClock, age: Callable[[float], None]
) -> None:
    """The command that deletes a session removes its entry, too."""
    sessions = await owned(storage, 4)
    age(1)
    sessions += await owned(storage)
    await storage.delete(sessions[0].id)
    await storage.revoke(ALICE, sessions[1].digest)
    sessions[2].expires_at = clock.now() - timedelta(seconds=1)
    await storage.store(sessions[2])
    assert await storage.trim(ALICE, 1, keep=sessions[4].id) == 1
    assert observer.zrange(INDEX, 0, -1) == [sessions[4].digest.encode()]


@pytest.mark.parametrize("create", [True, False], ids=["short-creates", "long-creates"])
async def test_storages_with_different_ttls_share_an_index(
    server: Server, clock: FakeClock, age: Callable[[float], None], *, create: bool
) -> None:
    """A session that any of them keeps alive is listed by all of them."""
    async with (
        storage_at(server.url, ttl=TTL, clock=clock) as short,
        storage_at(server.url, ttl=20 * TTL, clock=clock) as long,
    ):
        (session,) = await owned(short if create else long)
        for storage, ttls in ((long, 15), (long, 19), (short, 0.9), (short, 0.9), (long, 19)):
            await storage.load(session.id)
            age(ttls * TTL)
            for each in (short, long):
                assert await listed(each, ALICE) == {session.digest}


async def test_evicted_index_heals_with_the_next_renewal(
    storage: Storage, observer: "redis.Redis", age: Callable[[float], None]
) -> None:
    """A server that evicts keys may lose an index. Its sessions are listed again within a TTL."""
    (session,) = await owned(storage)
    observer.delete(INDEX)
    assert await listed(storage, ALICE) == set()
    for _ in range(2):
        age(0.51 * TTL)
        await storage.load(session.id)
    assert await listed(storage, ALICE) == {session.digest}


async def test_wrong_type_of_index_fails_only_its_principal(
    storage: Storage, observer: "redis.Redis"
) -> None:
    """A foreign value under the key of an index is an error, and stays as it is."""
    observer.set(INDEX, "not an index")
    keys = observer.dbsize()
    for call in (
        storage.store(Session(id=new_session_id(), principal=ALICE)),
        storage.list(ALICE),
        storage.count(ALICE),
        storage.revoke_all(ALICE),
    ):
        assert await outcome(call) is CorruptSession
    assert observer.get(INDEX) == b"not an index"
    assert observer.dbsize() == keys

    await stored(storage, principal="bob")
    await stored(storage)
    assert await storage.count("bob") == 1


async def test_unreadable_lease_is_corrupt(storage: Storage, observer: "redis.Redis") -> None:
    """The storage neither overwrites, lists nor counts a record with a damaged lease."""
    (session,) = await owned(storage)
    observer.setrange(key_of(session.id), 40, b"x")
    for when in (When.ABSENT, When.PRESENT, When.UNCHANGED):
        assert await outcome(storage.store(session, when=when)) is CorruptSession
    assert await outcome(storage.revoke(ALICE, session.digest)) is CorruptSession
    assert await listed(storage, ALICE) == set()
    assert await storage.count(ALICE) == 0


async def test_keys_and_entries_hold_neither_ids_nor_principals(
    storage: Storage, observer: "redis.Redis"
) -> None:
    """The server names sessions and principals by their digests."""
    (session,) = await owned(storage)
    assert set(observer.scan_iter("*")) >= {key_of(session.id).encode(), INDEX.encode()}
    words = b" ".join([*observer.scan_iter("*"), *observer.zrange(INDEX, 0, -1)])
    assert session.id.encode() not in words
    assert ALICE.encode() not in words


async def test_rotated_session_is_not_counted(storage: Storage, clock: FakeClock) -> None:
    """In its grace the old id answers, and only the new session is listed and counted."""
    sessions = SessionManager(storage, clock=clock)
    old = await sessions.create(principal=ALICE)
    new = await sessions.rotate(old)
    assert await listed(storage, ALICE) == {new.digest}
    assert await storage.count(ALICE) == 1
    assert await storage.revoke_all(ALICE) == 1
    assert await outcome(storage.load(old.id)) is SessionNotFound
