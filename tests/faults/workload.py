"""The load of one client: private sessions, and sessions and principals that clients share.

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
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from aiosessions import (
    Session,
    SessionError,
    SessionManager,
    SessionNotFound,
    StorageUnavailable,
    When,
    session_digest,
)
from aiosessions.record import principal_digest
from tests.support.clients import key_of
from tests.support.loops import LOOPS

from .client import Endpoint, RecordingStorage
from .history import CLIENTS, content, id_of

_SHARED = 2  # sessions that all clients change
_PRINCIPALS = [f"principal {number}" for number in range(3)]  # all clients list and revoke theirs
_LIFETIME = 86_400  # so that deadlines are compared with clocks
_SHORT_LIVED_EVERY = 0.5
_SHORT_LIFE = 0.3
# The longest time, in seconds, between the load and the save of a change: for shared sessions, and
# for sessions that are deleted during the change.
_CHANGE_TAKES = 0.004
_LONG_CHANGE_TAKES = 0.02
# The weights of the steps with a session of a shared principal.
_PRINCIPAL_STEPS = {"get": 30, "mutate": 15, "rotate": 15, "list": 30, "revoke_all": 5, "leave": 5}


class LoadForm(msgspec.Struct, frozen=True):
    """The size of a load."""

    workers: int = 3  # processes; the last one has two connections to each server
    clients: int = 6  # in each process
    rounds: int = 3  # how often a fault happens
    span: float = 1.0  # seconds before and after a fault
    loops: tuple[str, ...] = tuple(LOOPS)  # the processes take them in turn


class WorkerSettings(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The settings of one process of the load. Times are in seconds."""

    endpoint: Endpoint
    form: LoadForm
    seed: str  # from which all processes derive the same ids
    epoch: float  # the start of the load, on the monotonic clock
    worker: int  # the number of the process
    timeout: float  # of the storage
    ttl: float = 600.0
    max_staleness: float = 0.0  # of the cache that the clients of a process share; 0 for none
    pause: float = 0.008  # of a client between two steps, on average
    retry_after: tuple[float, float] = (0.005, 0.02)  # the range of the pause after an error
    secrets: list[str] = []  # texts that no error may contain
    steps: list[tuple[float, float]] = []  # of the first process's clock: time, new offset
    sample: float = 0.0  # between two samples of the resource usage; 0 for a history


def shared_ids(seed: str) -> list[str]:
    """The ids of the sessions that all clients change."""
    return [id_of(seed, "shared", number) for number in range(_SHARED)]


def shared_keys(seed: str) -> list[str]:
    """The keys of these sessions, and of the indexes that all clients change."""
    indexes = [f"session:principal:{principal_digest(each)}" for each in _PRINCIPALS]
    return [*map(key_of, shared_ids(seed)), *indexes]


async def prepare(storage: RecordingStorage, seed: str) -> None:
    """Create the shared sessions before the load begins."""
    sessions = SessionManager[Any](storage, max_lifetime=_LIFETIME)
    for id in shared_ids(seed):
        await sessions.create(id=id, principal="all", data=content(id))


def _change(session: Session[Any]) -> None:
    session.data["count"] += 1


def _moved_from(id: str) -> Callable[[Session[Any]], None]:
    """The change of a rotation: new content, which names the session under the old id."""

    def change(session: Session[Any]) -> None:
        session.data = content(session.id) | {"origin": session_digest(id)}

    return change


class LoadClient:
    """A client that uses sessions until the load ends."""

    def __init__(self, settings: WorkerSettings, storage: RecordingStorage) -> None:
        self._settings = settings
        self._storage = storage
        self._sessions = SessionManager[Any](storage, max_lifetime=_LIFETIME)
        seed, self._number = settings.seed, storage.number
        self._rng = random.Random(f"{seed} {self._number}")  # noqa: S311 - not for secrets
        self._lives = 0
        self._id = ""  # of the client's own session, if it has one
        self._session: Session[Any] | None = None  # the client's copy, if it is fresh
        self._left = 0  # steps until the session is deleted or left alone
        self._register = Session[Any](id=id_of(seed, "register", self._number))
        self._register.data = content(self._register.id)
        self._registered = False
        self._created = self._deleted = -1  # numbers of short-lived sessions
        self._principal = self._owned = ""  # a shared principal, and a session of it

    async def run(self, done: asyncio.Event) -> None:
        """Take one step after the other."""
        steps = (
            self._use_own,
            self._use_shared,
            self._use_principal,
            self._use_short_lived,
            self._overwrite,
        )
        while not done.is_set():
            (step,) = self._rng.choices(steps, (50, 25, 25, 15, 10))
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
            self._id = id_of(self._settings.seed, self._number, self._lives)
            self._left = self._rng.randint(3, 20)
            self._session = await self._sessions.create(
                id=self._id, principal=f"client {self._number}", data=content(self._id)
            )
            await self._sessions.list(f"client {self._number}")
        elif self._session is None or self._left % 4 == 0:
            self._left -= 1
            try:
                self._session = await self._sessions.get(self._id)
            except SessionNotFound:
                self._id = ""
        elif self._left > 0:
            self._left -= 1
            if self._rng.random() < 0.5:
                _change(self._session)
                await self._sessions.save(self._session)
            else:
                self._session = await self._sessions.mutate(self._id, _change)
        else:
            id, self._id = self._id, ""
            if self._rng.random() < 0.7:  # otherwise it stays until the end
                await self._sessions.delete(id)
                await self._sessions.get(id)

    async def _use_shared(self) -> None:
        """Load or change a session that all clients change."""
        id = self._rng.choice(shared_ids(self._settings.seed))
        if self._rng.random() < 0.7:
            await self._sessions.mutate(id, self._slow_change(_CHANGE_TAKES))
        else:
            await self._sessions.get(id)

    async def _use_principal(self) -> None:
        """Take a step with a session of a principal whose sessions all clients list and revoke."""
        sessions, principal, id = self._sessions, self._principal, self._owned
        names, weights = zip(*_PRINCIPAL_STEPS.items(), strict=True)
        (step,) = self._rng.choices(names, weights) if id else ("create",)
        try:
            if step == "create":
                self._principal = self._rng.choice(_PRINCIPALS)
                self._lives += 1
                id = id_of(self._settings.seed, self._number, self._lives)
                await sessions.create(id=id, principal=self._principal, data=content(id))
            elif step == "get":
                await sessions.get(id, principal=principal)
            elif step == "mutate":
                await sessions.mutate(id, _change, principal=principal)
            elif step == "rotate":
                id = (await sessions.rotate(id, _moved_from(id), principal=principal)).id
            elif step == "list":
                await sessions.list(principal)
            elif step == "revoke_all":
                await sessions.revoke_all(principal, keep=self._rng.choice((None, id)))
            self._owned = "" if step == "leave" else id
        except StorageUnavailable:
            raise
        except SessionError:
            self._owned = ""
            raise

    def _slow_change(self, seconds: float) -> Callable[[Session[Any]], Awaitable[None]]:
        """A change that takes up to so many seconds, so that other clients come between."""

        async def slow_change(session: Session[Any]) -> None:
            await asyncio.sleep(self._rng.uniform(0, seconds))
            _change(session)

        return slow_change

    async def _use_short_lived(self) -> None:
        """Use a session that is deleted while clients change it; create and delete it in turn.

        The clock tells all clients which session is alive.
        """
        lives, age = divmod(time.monotonic() - self._settings.epoch, _SHORT_LIVED_EVERY)
        number = int(lives)
        id = id_of(self._settings.seed, "short-lived", number)
        if self._number == number % self._settings.form.workers * CLIENTS:  # the first of a process
            if self._created != number:
                self._created = number
                await self._sessions.create(id=id, data=content(id))
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
        _change(self._register)
        always = not self._registered or self._rng.random() < 0.5
        await self._storage.store(self._register, when=When.ALWAYS if always else When.PRESENT)
        self._registered = True
