"""The cost of each call on the wire: commands and round trips, counted by a proxy.

Speed rests on these numbers; docs/benchmarks.md shows the speed itself.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from aiosessions import Session, SessionManager, When, new_session_id
from tests.support.clients import Storage, outcome, stored
from tests.support.proxy import Counts, FaultProxy
from tests.support.servers import Server

Call = Callable[[SessionManager[Any], Storage, Session[Any]], Awaitable[object]]
Cost = tuple[int, dict[str, int]]
"""Round trips, and how often each command was sent."""

COSTS: dict[str, tuple[Call, Cost]] = {
    "load": (lambda _, storage, s: storage.load(s.id), (1, {"GETEX": 1})),
    "load-absent": (lambda _, storage, _s: outcome(storage.load("absent")), (1, {"GETEX": 1})),
    "store": (lambda _, storage, s: storage.store(s), (1, {"SET": 1})),
    "store-absent": (
        lambda _, storage, _s: storage.store(Session(id=new_session_id()), when=When.ABSENT),
        (1, {"EVALSHA": 1}),
    ),
    "store-present": (
        lambda _, storage, s: storage.store(s, when=When.PRESENT),
        (1, {"EVALSHA": 1}),
    ),
    "store-unchanged": (
        lambda _, storage, s: storage.store(s, when=When.UNCHANGED),
        (1, {"EVALSHA": 1}),
    ),
    "delete": (lambda _, storage, s: storage.delete(s.id), (1, {"EVALSHA": 1})),
    "delete-absent": (lambda _, storage, _s: storage.delete("absent"), (1, {"EVALSHA": 1})),
    "delete_expired": (lambda _, storage, _s: storage.delete_expired(), (0, {})),
    "ping": (lambda _, storage, _s: storage.ping(), (1, {"INFO": 1})),
    "create": (lambda manager, _, _s: manager.create(data=1), (1, {"EVALSHA": 1})),
    "get": (lambda manager, _, s: manager.get(s.id), (1, {"GETEX": 1})),
    "save": (lambda manager, _, s: manager.save(s), (1, {"EVALSHA": 1})),
    "mutate": (
        lambda manager, _, s: manager.mutate(s.id, lambda _session: None),
        (2, {"GETEX": 1, "EVALSHA": 1}),
    ),
    "rotate": (lambda manager, _, s: manager.rotate(s), (3, {"GETEX": 1, "EVALSHA": 2})),
    "manager-delete": (lambda manager, _, s: manager.delete(s.id), (1, {"EVALSHA": 1})),
}


@pytest.fixture
async def proxy(redis_or_valkey: Server) -> AsyncIterator[FaultProxy]:
    """A proxy for each server in turn. It only counts."""
    redis_or_valkey.flush()
    async with FaultProxy(redis_or_valkey.port) as proxy:
        yield proxy


@pytest.mark.parametrize(("call", "cost"), COSTS.values(), ids=COSTS)
async def test_call_costs_these_round_trips(proxy: FaultProxy, call: Call, cost: Cost) -> None:
    """On an open connection to a server that knows the scripts, a call costs exactly this."""
    async with Storage.from_url(proxy.url, ttl=60) as storage:
        session = await stored(storage)
        await storage.store(session, when=When.UNCHANGED)
        await storage.delete("absent")
        proxy.counts = Counts()

        await call(SessionManager(storage), storage, session)

        assert (proxy.counts.round_trips, proxy.counts.requests) == cost
        assert proxy.counts.connections == 0


async def test_unknown_script_costs_one_more_round_trip(
    proxy: FaultProxy, redis_or_valkey: Server
) -> None:
    """A server that does not know a script gets its source once."""
    async with Storage.from_url(proxy.url, ttl=60) as storage:
        session = await stored(storage)
        with redis_or_valkey.client() as direct:
            direct.script_flush()
        for cost in ((2, {"EVALSHA": 1, "EVAL": 1}), (1, {"EVALSHA": 1})):
            proxy.counts = Counts()
            await storage.store(session, when=When.UNCHANGED)
            assert (proxy.counts.round_trips, proxy.counts.requests) == cost
