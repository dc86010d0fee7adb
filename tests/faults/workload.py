"""The load: callers in several processes who use mixed verbs on sessions of their own and of all.

Invariants:

- The callers know nothing of faults. Who is told 503 waits a little and goes on, as a client would;
  what that means for a session is found out by loading it again.
- An id is created by one caller and in one attempt, so that whatever is found under it is either
  explained by the journal, or wrong.
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
from tests.topologies import SENTINEL_NAME

from .journal import Event, content, id_of
from .witness import Pulse, Witness

NAME = "fault-suite"
"""What servers call the connections of the load, but for those that a URL has made."""

SHARED = 2
"""How many sessions all callers change."""

_LIFETIME = 86_400  # so that clocks are looked at
_MORTAL_SECONDS = 0.5
_MORTAL_AGE = 0.3  # when it is deleted
# Seconds, at most, between a load and the save that follows: of what all change, and of what is
# deleted meanwhile.
_THOUGHT = 0.004
_LONG_THOUGHT = 0.02


class Target(msgspec.Struct, omit_defaults=True):
    """Where the storage is, and how it is reached.

    Attributes:
        url: Of one server.
        sentinels: Or, ports of Sentinels.
        nodes: Or, ports of nodes of a cluster.
        user: With a URL, who to connect as, with the password that is in `password_file`.
        password_file: See `user`.
    """

    url: str = ""
    sentinels: list[int] = []
    nodes: list[int] = []
    user: str = ""
    password_file: str = ""


class Settings(msgspec.Struct, omit_defaults=True):
    """What a worker is told.

    Attributes:
        target: Where the storage is.
        seed: Makes the ids that all agree on.
        worker: Its number.
        workers: How many there are.
        epoch: A moment on the monotonic clock that all agree on.
        callers: How many callers it has.
        timeout: The storage's, in seconds.
        ttl: The storage's, in seconds.
        pause: Seconds that a caller waits between two verbs, in the mean.
        journal: Where to leave the journal; empty for nowhere.
        secrets: What no error may say.
        steps: When to set its clock, in seconds after the start, and by how many.
        sample: Seconds between two samples of what it uses up; 0 for none.
    """

    target: Target
    seed: str
    worker: int
    workers: int
    epoch: float
    callers: int
    timeout: float
    ttl: float = 600.0
    pause: float = 0.008
    journal: str = ""
    secrets: list[str] = []
    steps: list[tuple[float, float]] = []
    sample: float = 0.0


class _PasswordFile(CredentialProvider):
    """Reads the password whenever a connection is made, as from a secret that is mounted."""

    def __init__(self, user: str, path: Path) -> None:
        self._user = user
        self._path = path

    def get_credentials(self) -> tuple[str, str]:
        return self._user, self._path.read_text("utf-8")

    async def get_credentials_async(self) -> tuple[str, str]:
        return self.get_credentials()


@asynccontextmanager
async def opened(target: Target, *, timeout: float, ttl: float) -> AsyncIterator[RedisStorage[Any]]:
    """The storage under test."""
    if target.nodes:
        cluster = RedisCluster(host="127.0.0.1", port=target.nodes[0], client_name=NAME)
        async with RedisStorage[Any](cluster, ttl=ttl, timeout=timeout) as storage:
            yield storage
        await cluster.aclose()
    elif target.sentinels:
        patience = {
            "socket_timeout": 0.3,
            "socket_connect_timeout": 0.3,
            "retry": Retry(NoBackoff(), 0),
        }
        addresses = [("127.0.0.1", port) for port in target.sentinels]
        async with (
            Sentinel(  # type: ignore[no-untyped-call]
                addresses, sentinel_kwargs=patience
            ) as sentinel,
            sentinel.master_for(SENTINEL_NAME, client_name=NAME) as client,
            RedisStorage[Any](client, ttl=ttl, timeout=timeout) as storage,
        ):
            yield storage
    elif target.user:
        provider = _PasswordFile(target.user, Path(target.password_file))
        async with (
            Redis.from_url(target.url, credential_provider=provider, client_name=NAME) as client,
            RedisStorage[Any](client, ttl=ttl, timeout=timeout) as storage,
        ):
            yield storage
    else:
        async with RedisStorage[Any].from_url(target.url, ttl=ttl, timeout=timeout) as storage:
            yield storage


def shared_ids(seed: str) -> list[str]:
    """The sessions that all callers change."""
    return [id_of(seed, "shared", number) for number in range(SHARED)]


async def prepare(witness: Witness, seed: str) -> None:
    """Create what has to be there before the load begins."""
    for id in shared_ids(seed):
        await SessionManager[Any](witness, max_lifetime=_LIFETIME).create(
            id=id, principal="everybody", data=content("", id, 0)
        )


def change(session: Session[Any]) -> None:
    """What every save and every mutation does."""
    data: Any = session.data
    data["count"] += 1


class Caller:
    """Somebody who uses sessions until told to stop.

    Args:
        settings: The worker's.
        number: The caller's.
        storage: The storage under test.
        record: What to do with each event.
        pulse: The event loop's.
    """

    def __init__(
        self,
        settings: Settings,
        number: int,
        storage: RedisStorage[Any],
        record: Callable[[Event], None],
        pulse: Pulse,
    ) -> None:
        self._settings = settings
        self._name = f"{settings.worker}.{number}"
        self._dice = random.Random(f"{settings.seed} {self._name}")  # noqa: S311 - not for secrets
        self._storage = Witness(
            storage,
            record,
            number=settings.worker * 1_000 + number,
            timeout=settings.timeout,
            pulse=pulse,
            secrets=settings.secrets,
        )
        self._sessions = SessionManager[Any](self._storage, max_lifetime=_LIFETIME)
        self._first = number == 0
        self._shared = shared_ids(settings.seed)
        self._lives = 0
        self._id = ""  # of the session of its own, if it has one
        self._session: Session[Any] | None = None  # and the session, if what it has is fresh
        self._left = 0  # verbs until it is deleted or left alone
        self._register = Session[Any](id=id_of(settings.seed, "register", self._name))
        self._register.data = content("", self._register.id, 0)
        self._registered = False
        self._born: int | None = None
        self._died: int | None = None

    async def work(self, done: asyncio.Event) -> None:
        """Use one verb after the other."""
        habits = (self._own, self._shared_one, self._mortal, self._blind)
        while not done.is_set():
            (habit,) = self._dice.choices(habits, (50, 25, 15, 10))
            try:
                await habit()
            except StorageUnavailable:
                self._session = None
                await asyncio.sleep(self._dice.uniform(0.005, 0.02))  # as who is told 503
            except SessionError:
                self._session = None
            await asyncio.sleep(self._dice.expovariate(1 / self._settings.pause))

    async def _own(self) -> None:
        """A step in the life of a session that nobody else knows."""
        if not self._id:
            self._lives += 1
            self._id = id_of(self._settings.seed, self._name, self._lives)
            self._left = self._dice.randint(3, 20)
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
            if self._dice.random() < 0.5:
                change(self._session)
                await self._sessions.save(self._session)
            else:
                self._session = await self._sessions.mutate(self._id, change)
        else:
            id, self._id = self._id, ""
            if self._dice.random() < 0.7:  # else it stays, to be found in the end
                await self._sessions.delete(id)
                await self._sessions.get(id)

    async def _shared_one(self) -> None:
        """Use what all others change, too."""
        id = self._dice.choice(self._shared)
        if self._dice.random() < 0.7:
            await self._sessions.mutate(id, self._thoughtful(_THOUGHT))
        else:
            await self._sessions.get(id)

    def _thoughtful(self, seconds: float) -> Callable[[Session[Any]], Awaitable[None]]:
        """A change that takes so long, at most, that others come between."""

        async def thoughtful(session: Session[Any]) -> None:
            await asyncio.sleep(self._dice.uniform(0, seconds))
            change(session)

        return thoughtful

    async def _mortal(self) -> None:
        """Use what is deleted while others change it; or create or delete it, if it is its turn.

        One after the other lives for a moment that all can tell by the clock.
        """
        number, age = divmod(time.monotonic() - self._settings.epoch, _MORTAL_SECONDS)
        number = int(number)
        id = id_of(self._settings.seed, "mortal", number)
        if self._first and number % self._settings.workers == self._settings.worker:
            if self._born != number:
                self._born = number
                await self._sessions.create(id=id, data=content("", id, 0))
            elif age > _MORTAL_AGE and self._died != number:
                self._died = number
                await self._sessions.delete(id)
        if self._dice.random() < 0.6:
            await self._sessions.mutate(id, self._thoughtful(_LONG_THOUGHT))
        else:
            await self._sessions.get(id)

    async def _blind(self) -> None:
        """Overwrite, without looking, what nobody else writes; or look."""
        if self._registered and self._dice.random() < 0.4:
            await self._storage.load(self._register.id)
            return
        change(self._register)
        always = not self._registered or self._dice.random() < 0.5
        await self._storage.store(self._register, when=When.ALWAYS if always else When.PRESENT)
        self._registered = True
