"""The load: clients in several processes that use sessions of their own and shared sessions.

Invariants:

- The clients do not know about faults. After a `StorageUnavailable` a client pauses and goes on, as
  a client of a web service does after a 503. It loads the session to learn whether its write was
  applied.
- One client creates an id, in one attempt. So everything that is found under the id is either
  explained by the history, or wrong.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from aiosessions import (
    RedisStorage,
    Session,
    SessionError,
    SessionManager,
    SessionNotFound,
    StorageUnavailable,
    When,
)
from tests.support.topologies import SENTINEL_NAME

from .history import Event, content, id_of
from .recording import LoopLag, RecordingStorage

NAME = "fault-suite"
"""The client name of the connections, except for those that a URL makes."""

SHARED = 2
"""The number of sessions that all clients change."""

_LIFETIME = 86_400  # so that deadlines are compared with clocks
_SHORT_LIVED_EVERY = 0.5
_SHORT_LIFE = 0.3
# The longest time, in seconds, between the load and the save of a change: for shared sessions, and
# for sessions that are deleted during the change.
_CHANGE_TAKES = 0.004
_LONG_CHANGE_TAKES = 0.02


class Endpoint(msgspec.Struct, omit_defaults=True):
    """The address of the storage. One of the first three fields is set.

    Attributes:
        url: The URL of one server.
        sentinels: The ports of Sentinels.
        nodes: The ports of nodes of a cluster.
        user: With a URL, the user name. The password is in `password_file`.
        password_file: See `user`.
    """

    url: str = ""
    sentinels: list[int] = []
    nodes: list[int] = []
    user: str = ""
    password_file: str = ""


class WorkerSettings(msgspec.Struct, omit_defaults=True):
    """The settings of one process of the load.

    Attributes:
        endpoint: The address of the storage.
        seed: The seed from which all processes derive the same ids.
        worker: The number of the process.
        workers: The number of processes.
        epoch: The start of the load, on the monotonic clock.
        clients: The number of clients in the process.
        timeout: The timeout of the storage, in seconds.
        loop: The name of the event loop, of those in tests/support/loops.py.
        connections: The number of connections per server.
        ttl: The TTL of the storage, in seconds.
        pause: The mean pause of a client between two steps, in seconds.
        retry_after: The range of the pause after an error, in seconds.
        history: The file for the events; empty for none.
        secrets: Texts that no error may contain.
        steps: Steps of the process's clock: seconds after the start, and the new offset.
        sample: Seconds between two samples of the resource usage; 0 for none.
    """

    endpoint: Endpoint
    seed: str
    worker: int
    workers: int
    epoch: float
    clients: int
    timeout: float
    loop: str = "asyncio"
    connections: int = 1
    ttl: float = 600.0
    pause: float = 0.008
    retry_after: tuple[float, float] = (0.005, 0.02)
    history: str = ""
    secrets: list[str] = []
    steps: list[tuple[float, float]] = []
    sample: float = 0.0


class _PasswordFile(CredentialProvider):
    """Reads the password for each connection, as from a mounted secret."""

    def __init__(self, user: str, path: Path) -> None:
        self._user = user
        self._path = path

    def get_credentials(self) -> tuple[str, str]:
        return self._user, self._path.read_text("utf-8")

    async def get_credentials_async(self) -> tuple[str, str]:
        return self.get_credentials()


@asynccontextmanager
async def open_storage(
    endpoint: Endpoint, *, timeout: float, ttl: float, connections: int = 1
) -> AsyncIterator[RedisStorage[Any]]:
    """Open the storage under test."""
    settings: Any = {"timeout": timeout, "ttl": ttl, "connections": connections}
    if endpoint.nodes:
        cluster = RedisCluster(host="127.0.0.1", port=endpoint.nodes[0], client_name=NAME)
        async with RedisStorage[Any](cluster, **settings) as storage:
            yield storage
        await cluster.aclose()
    elif endpoint.sentinels:
        sentinel_settings = {
            "socket_timeout": 0.3,
            "socket_connect_timeout": 0.3,
            "retry": Retry(NoBackoff(), 0),
        }
        addresses = [("127.0.0.1", port) for port in endpoint.sentinels]
        async with (
            Sentinel(  # type: ignore[no-untyped-call]  # redis-py does not type it
                addresses, sentinel_kwargs=sentinel_settings
            ) as sentinel,
            sentinel.master_for(SENTINEL_NAME, client_name=NAME) as client,
            RedisStorage[Any](client, **settings) as storage,
        ):
            yield storage
    elif endpoint.user:
        provider = _PasswordFile(endpoint.user, Path(endpoint.password_file))
        async with (
            Redis.from_url(endpoint.url, credential_provider=provider, client_name=NAME) as client,
            RedisStorage[Any](client, **settings) as storage,
        ):
            yield storage
    else:
        async with RedisStorage[Any].from_url(endpoint.url, **settings) as storage:
            yield storage


def shared_ids(seed: str) -> list[str]:
    """The ids of the sessions that all clients change."""
    return [id_of(seed, "shared", number) for number in range(SHARED)]


async def prepare(storage: RecordingStorage, seed: str) -> None:
    """Create the shared sessions before the load begins."""
    for id in shared_ids(seed):
        await SessionManager[Any](storage, max_lifetime=_LIFETIME).create(
            id=id, principal="all", data=content("", id, 0)
        )


def change(session: Session[Any]) -> None:
    """Make the change of every save and every mutation."""
    data: Any = session.data
    data["count"] += 1


class LoadClient:
    """A client that uses sessions until the load ends.

    Args:
        settings: The settings of the process.
        number: The number of the client in the process.
        storage: The storage under test.
        record: Called with each event.
        lag: The lag of the event loop.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        number: int,
        storage: RedisStorage[Any],
        record: Callable[[Event], None],
        lag: LoopLag,
    ) -> None:
        self._settings = settings
        self._name = f"{settings.worker}.{number}"
        self._rng = random.Random(f"{settings.seed} {self._name}")  # noqa: S311 - not for secrets
        self._storage = RecordingStorage(
            storage,
            record,
            number=settings.worker * 1_000 + number,
            timeout=settings.timeout,
            lag=lag,
            secrets=settings.secrets,
        )
        self._sessions = SessionManager[Any](self._storage, max_lifetime=_LIFETIME)
        self._first = number == 0
        self._shared = shared_ids(settings.seed)
        self._lives = 0
        self._id = ""  # of the client's own session, if it has one
        self._session: Session[Any] | None = None  # the client's copy, if it is fresh
        self._left = 0  # steps until the session is deleted or left alone
        self._register = Session[Any](id=id_of(settings.seed, "register", self._name))
        self._register.data = content("", self._register.id, 0)
        self._registered = False
        self._created: int | None = None
        self._deleted: int | None = None

    async def run(self, done: asyncio.Event) -> None:
        """Take one step after the other."""
        steps = (self._use_own, self._use_shared, self._use_short_lived, self._overwrite)
        while not done.is_set():
            (step,) = self._rng.choices(steps, (50, 25, 15, 10))
            try:
                await step()
            except StorageUnavailable:
                self._session = None
                await asyncio.sleep(self._rng.uniform(*self._settings.retry_after))
            except SessionError:
                self._session = None
            await asyncio.sleep(self._rng.expovariate(1 / self._settings.pause))

    async def _use_own(self) -> None:
        """Take a step in the life of a session that no other client knows."""
        if not self._id:
            self._lives += 1
            self._id = id_of(self._settings.seed, self._name, self._lives)
            self._left = self._rng.randint(3, 20)
            self._session = await self._sessions.create(
                id=self._id, principal=self._name, data=content("", self._id, 0)
            )
        elif self._session is None or self._left % 4 == 0:
            self._left -= 1
            try:
                self._session = await self._sessions.get(self._id)
            except SessionNotFound:
                self._id = ""
        elif self._left > 0:
            self._left -= 1
            if self._rng.random() < 0.5:
                change(self._session)
                await self._sessions.save(self._session)
            else:
                self._session = await self._sessions.mutate(self._id, change)
        else:
            id, self._id = self._id, ""
            if self._rng.random() < 0.7:  # otherwise it stays until the end
                await self._sessions.delete(id)
                await self._sessions.get(id)

    async def _use_shared(self) -> None:
        """Load or change a session that all clients change."""
        id = self._rng.choice(self._shared)
        if self._rng.random() < 0.7:
            await self._sessions.mutate(id, self._slow_change(_CHANGE_TAKES))
        else:
            await self._sessions.get(id)

    def _slow_change(self, seconds: float) -> Callable[[Session[Any]], Awaitable[None]]:
        """A change that takes up to so many seconds, so that other clients come between."""

        async def slow_change(session: Session[Any]) -> None:
            await asyncio.sleep(self._rng.uniform(0, seconds))
            change(session)

        return slow_change

    async def _use_short_lived(self) -> None:
        """Use a session that is deleted while clients change it; create and delete it in turn.

        The clock tells all clients which session is alive.
        """
        number, age = divmod(time.monotonic() - self._settings.epoch, _SHORT_LIVED_EVERY)
        number = int(number)
        id = id_of(self._settings.seed, "short-lived", number)
        if self._first and number % self._settings.workers == self._settings.worker:
            if self._created != number:
                self._created = number
                await self._sessions.create(id=id, data=content("", id, 0))
            elif age > _SHORT_LIFE and self._deleted != number:
                self._deleted = number
                await self._sessions.delete(id)
        if self._rng.random() < 0.6:
            await self._sessions.mutate(id, self._slow_change(_LONG_CHANGE_TAKES))
        else:
            await self._sessions.get(id)

    async def _overwrite(self) -> None:
        """Overwrite a session without looking at it, or load it. No other client writes it."""
        if self._registered and self._rng.random() < 0.4:
            await self._storage.load(self._register.id)
            return
        change(self._register)
        always = not self._registered or self._rng.random() < 0.5
        await self._storage.store(self._register, when=When.ALWAYS if always else When.PRESENT)
        self._registered = True
