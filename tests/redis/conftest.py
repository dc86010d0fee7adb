"""Servers, clients and clocks of the tests of `RedisStorage`."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis

from aiosessions.redis import _outage
from tests.support.clients import LONG, Storage, storage_at
from tests.support.servers import Server


@pytest.fixture
def server(redis_or_valkey: Server) -> Server:
    """An empty server of each kind."""
    redis_or_valkey.flush()
    return redis_or_valkey


@pytest.fixture
def observer(server: Server) -> Iterator["redis.Redis"]:
    """A connected client of `server` without a storage."""
    with server.client() as client:
        client.ping()
        yield client


@pytest.fixture
async def other(valkey: Server) -> AsyncIterator[Storage]:
    """A storage on `valkey` without the proxy."""
    async with storage_at(valkey.url) as storage:
        yield storage


@pytest.fixture
def new_connections(valkey: Server) -> Iterator[Callable[[], set[str]]]:
    """A function that returns the ids of the connections to `valkey` since the test began."""
    with valkey.client() as client:

        def ids() -> set[str]:
            listed: Any = client.client_list()
            return {each["id"] for each in listed}

        before = ids()
        yield lambda: ids() - before


@pytest.fixture
async def jump(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that advances the clock of the event loop, so that its timers fire at once.

    uvloop's clock cannot be replaced, so tests with this fixture do not run on it.
    """
    loop = asyncio.get_running_loop()
    right, ahead = loop.time, 0.0

    def jump(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds

    monkeypatch.setattr(loop, "time", lambda: right() + ahead)
    return jump


@pytest.fixture
def short_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands wait in an outage for a moment only."""
    monkeypatch.setattr(_outage, "BRIDGE", 0.05)


@pytest.fixture
def long_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands wait until the end of an outage."""
    monkeypatch.setattr(_outage, "BRIDGE", LONG)
