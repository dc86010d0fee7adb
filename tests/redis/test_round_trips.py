"""The cost of each call: commands and round trips, counted by a proxy, or by the server.

Speed rests on these numbers; docs/benchmarks.md shows the speed itself.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
import redis

from aiosessions import (
    JsonCodec,
    Session,
    SessionConflict,
    SessionExists,
    SessionManager,
    SessionNotFound,
    When,
    new_session_id,
)
from aiosessions.testing import FakeClock
from tests.support.clients import Storage, outcome, storage_at, stored
from tests.support.proxy import Counts, FaultProxy
from tests.support.servers import Server

Call = Callable[[SessionManager[Any], Storage, Session[Any]], Awaitable[object]]
Cost = tuple[int, dict[str, int]]
"""Round trips, and how often each command was sent."""


def new(**fields: Any) -> Session[Any]:
    """A session that is not stored."""
    return Session(id=new_session_id(), **fields)


def store(make: Callable[[Session[Any]], Session[Any]], when: When) -> Call:
    """A store of the session that `make` returns."""
    return lambda _, storage, session: outcome(storage.store(make(session), when=when))


def same(session: Session[Any]) -> Session[Any]:
    """The session itself."""
    return session


NOTHING: Cost = (0, {})
LOAD: Cost = (1, {"GETEX": 1})
SCRIPT: Cost = (1, {"EVALSHA": 1})

COSTS: dict[str, tuple[Call, Cost]] = {
    "load": (lambda _, storage, s: storage.load(s.id), LOAD),
    "load-absent": (lambda _, storage, _s: outcome(storage.load("absent")), LOAD),
    "load-invalid": (lambda _, storage, _s: outcome(storage.load("a b")), NOTHING),
    "store": (store(same, When.ALWAYS), SCRIPT),
    "store-limited": (
        store(lambda s: new(expires_at=s.created_at + timedelta(seconds=9)), When.ALWAYS),
        SCRIPT,
    ),
    "store-absent": (store(lambda _: new(), When.ABSENT), SCRIPT),
    "store-present": (store(same, When.PRESENT), SCRIPT),
    "store-unchanged": (store(same, When.UNCHANGED), SCRIPT),
    "store-absent-refused": (store(same, When.ABSENT), SCRIPT),
    "store-present-refused": (store(lambda _: new(), When.PRESENT), SCRIPT),
    "store-unchanged-refused": (store(lambda s: Session(id=s.id), When.UNCHANGED), SCRIPT),
    "store-invalid-id": (store(lambda _: Session(id="a b"), When.PRESENT), NOTHING),
    "store-invalid-data": (store(lambda _: new(data=object()), When.ALWAYS), NOTHING),
    "store-too-large": (store(lambda _: new(data="x" * 500), When.ABSENT), NOTHING),
    "delete": (lambda _, storage, s: storage.delete(s.id), SCRIPT),
    "delete-absent": (lambda _, storage, _s: storage.delete("absent"), SCRIPT),
    "delete_expired": (lambda _, storage, _s: storage.delete_expired(), NOTHING),
    "ping": (lambda _, storage, _s: storage.ping(), (1, {"INFO": 1})),
    "create": (lambda manager, _, _s: manager.create(data=1), SCRIPT),
    "get": (lambda manager, _, s: manager.get(s.id), LOAD),
    "save": (lambda manager, _, s: manager.save(s), SCRIPT),
    "mutate": (
        lambda manager, _, s: manager.mutate(s.id, lambda _session: None),
        (2, {"GETEX": 1, "EVALSHA": 1}),
    ),
    "rotate": (lambda manager, _, s: manager.rotate(s), (3, {"GETEX": 1, "EVALSHA": 2})),
    "manager-delete": (lambda manager, _, s: manager.delete(s.id), SCRIPT),
}


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[FaultProxy]:
    """A proxy for each server in turn. It only counts."""
    async with FaultProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def clock() -> FakeClock:
    """The clock of the storage."""
    return FakeClock()


@pytest.fixture
async def storage(proxy: FaultProxy, clock: FakeClock) -> AsyncIterator[Storage]:
    """A connected storage on a server that knows the scripts."""
    async with storage_at(proxy.url, codec=JsonCodec(max_bytes=500), clock=clock) as storage:
        session = await stored(storage, expires_at=clock.now() + timedelta(seconds=1))
        await storage.store(session, when=When.UNCHANGED)
        await storage.store(session, when=When.PRESENT)
        clock.advance(1)
        assert await outcome(storage.load(session.id)) is SessionNotFound
        assert await storage.delete(session.id) is False
        proxy.counts = Counts()
        yield storage


@pytest.mark.parametrize(("call", "cost"), COSTS.values(), ids=COSTS)
async def test_call_costs_these_round_trips(
    proxy: FaultProxy, storage: Storage, call: Call, cost: Cost
) -> None:
    """On an open connection to a server that knows the scripts, a call costs exactly this."""
    session = await stored(storage)
    proxy.counts = Counts()

    await call(SessionManager(storage), storage, session)

    assert (proxy.counts.round_trips, proxy.counts.requests) == cost
    assert proxy.counts.connections == 0


async def test_load_is_one_command(observer: "redis.Redis", server: Server) -> None:
    """The server runs one GETEX for each load, also with a deadline and beside a sweep."""
    async with (
        storage_at(server.url) as storage,
        SessionManager(storage, max_lifetime=3_600, sweep_interval=0.001) as sessions,
    ):
        session = await sessions.create(data="x" * 800)
        observer.config_resetstat()
        for _ in range(100):
            await sessions.get(session.id)
        statistics: Any = observer.info("commandstats")

    calls = {name: each["calls"] for name, each in statistics.items() if "config" not in name}
    assert calls.pop("cmdstat_info", 0) <= 1  # of the observer
    assert calls == {"cmdstat_getex": 100}


async def test_dead_session_costs_a_script_once(
    proxy: FaultProxy, storage: Storage, clock: FakeClock
) -> None:
    """The first load past the deadline removes the record, so the next one finds no key."""
    session = await stored(storage, expires_at=clock.now() + timedelta(seconds=1))
    await storage.load(session.id)
    clock.advance(1)

    for requests in ({"GETEX": 1, "EVALSHA": 1}, {"GETEX": 1}):
        proxy.counts = Counts()
        assert await outcome(storage.load(session.id)) is SessionNotFound
        assert proxy.counts.requests == requests


async def test_unknown_script_is_sent_once(
    proxy: FaultProxy, storage: Storage, observer: "redis.Redis"
) -> None:
    """A server that does not know a script gets its source; later its digest is enough."""
    session = await stored(storage)
    observer.script_flush()
    for cost in ((2, {"EVALSHA": 1, "EVAL": 1}), SCRIPT):
        proxy.counts = Counts()
        await storage.store(session, when=When.UNCHANGED)
        assert (proxy.counts.round_trips, proxy.counts.requests) == cost


async def test_flushed_script_cache_changes_no_result(
    storage: Storage, observer: "redis.Redis"
) -> None:
    """Each conditional verb gives its result on a server without scripts."""
    session, stale = new(), new(revision="another-revision")
    stale.id = session.id
    for verb, result in (
        (storage.store(session, when=When.ABSENT), type(None)),
        (storage.store(stale, when=When.ABSENT), SessionExists),
        (storage.store(stale, when=When.UNCHANGED), SessionConflict),
        (storage.delete(session.id), bool),
        (storage.store(session, when=When.PRESENT), SessionNotFound),
    ):
        observer.script_flush()
        assert await outcome(verb) is result
