"""A storage in memory under a clock that stands still, and a client."""

from typing import Any

import pytest

from aiosessions import LocalStorage, SessionManager
from aiosessions.testing import FakeClock
from tests.support.web import Client

TTL = 100


@pytest.fixture
def clock() -> FakeClock:
    """The clock of the storage and the manager."""
    return FakeClock()


@pytest.fixture
def local(clock: FakeClock) -> LocalStorage[Any]:
    """The storage."""
    return LocalStorage(ttl=TTL, clock=clock)


@pytest.fixture
def sessions(local: LocalStorage[Any], clock: FakeClock) -> SessionManager[Any]:
    """The manager."""
    return SessionManager(local, clock=clock, max_lifetime=1000)


@pytest.fixture
def client(sessions: SessionManager[Any]) -> Client:
    """A browser without a cookie."""
    return Client(sessions)
