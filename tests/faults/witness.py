"""A storage that writes down how every verb ended, and finds fault with what it sees on the spot.

It sits between a manager and the storage under test. What one verb shows by itself is judged here:
the type of an error, what it says and to what it is chained, the deadline, and whose session a load
has brought. What only the whole history shows is the checker's.
"""

import asyncio
import itertools
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any

from aiosessions import Session, SessionError, Storage, StorageUnavailable, When
from aiosessions.errors import InvalidSession, StorageClosed
from tests.leaks import said_by

from .journal import DELETE, LOAD, Event, secret_of

# What a machine with better things to do may take, besides the event loop's own lag.
_SLACK = 0.25
_BEAT = 0.01
_REMEMBERED = 1_000
# Nothing but the storage's own reasoning is behind these, so there is nothing to chain to.
_OWN = re.compile(r"a reply was lost|no reachable node|no node of the cluster")


class Pulse:
    """How late the event loop is: no verb can answer for that."""

    def __init__(self) -> None:
        self._lags: deque[tuple[float, float]] = deque(maxlen=1_000)
        self._due = time.monotonic()

    async def beat(self) -> None:
        """Feel it, until cancelled."""
        while True:
            self._due = time.monotonic() + _BEAT
            await asyncio.sleep(_BEAT)
            now = time.monotonic()
            if now - self._due > _BEAT:
                self._lags.append((now, now - self._due))

    def lag_since(self, start: float) -> float:
        """How many seconds the loop has lost since then."""
        lost = max(0.0, time.monotonic() - self._due)
        for at, lag in reversed(self._lags):
            if at < start:
                break
            lost += lag
        return lost


class Witness(Storage[Any]):
    """What one caller uses.

    Args:
        storage: The storage under test.
        record: What to do with each event.
        number: The caller's, which no other has in any process.
        timeout: What every verb of the storage has to end within.
        pulse: The event loop's.
        secrets: What no error may say, besides what belongs to the session.
    """

    def __init__(
        self,
        storage: Storage[Any],
        record: Callable[[Event], None],
        *,
        number: int,
        timeout: float,
        pulse: Pulse,
        secrets: Sequence[str] = (),
    ) -> None:
        self._storage = storage
        self._record = record
        self._number = number
        self._timeout = timeout
        self._pulse = pulse
        self._secrets = tuple(secrets)
        self._tokens = (f"{number}.{count}" for count in itertools.count(1))
        self._token_of: dict[str, str] = {}  # by revision

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        """Store it with a token of its own."""
        data: Any = session.data
        data["token"] = next(self._tokens)
        event = self._event(when.value, session.id)
        event.token, event.count = data["token"], data["count"]
        revision = session.revision
        if when is When.UNCHANGED:
            event.before = self._token_of.get(revision, "?")
        try:
            await self._watched(event, self._storage.store(session, when=when))
        except SessionError:
            if session.revision != revision:
                event.flaws.append("a write that failed has changed the session")
            raise
        self._remember(session)

    async def load(self, id: str) -> Session[Any]:
        """Load it, and see whose it is."""
        session: Session[Any] = await self._watched(self._event(LOAD, id), self._storage.load(id))
        return session

    async def delete(self, id: str) -> bool:
        """Delete it."""
        existed: bool = await self._watched(self._event(DELETE, id), self._storage.delete(id))
        return existed

    async def delete_expired(self, before: datetime | None = None) -> int:
        """Nothing to witness."""
        return await self._storage.delete_expired(before)

    async def aclose(self) -> None:
        """Leave the storage open: others use it, too."""

    def _event(self, verb: str, id: str) -> Event:
        return Event(verb=verb, id=id, caller=self._number, start=time.monotonic(), end=0.0)

    async def _watched(self, event: Event, verb: Awaitable[Any]) -> Any:
        try:
            result = await verb
        except Exception as error:
            event.outcome, event.message = type(error).__name__, str(error)
            self._judge(event, error)
            self._end(event)
            raise
        if isinstance(result, Session):
            self._look_at(event, result)
        elif result is not None:
            event.existed = result
        self._end(event)
        return result

    def _end(self, event: Event) -> None:
        event.end = time.monotonic()
        lag = self._pulse.lag_since(event.start)
        event.late = max(0.0, event.end - event.start - self._timeout - lag)
        if event.late > _SLACK:
            event.flaws.append("late")
        self._record(event)

    def _look_at(self, event: Event, session: Session[Any]) -> None:
        """Whose session this is."""
        data: Any = session.data
        event.token, event.count = data["token"], data["count"]
        if session.id != event.id or data["secret"] != secret_of(event.id):
            event.flaws.append("somebody else's session")
        self._remember(session)

    def _judge(self, event: Event, error: Exception) -> None:
        """What is wrong with an error, as such."""
        if not isinstance(error, SessionError) or isinstance(error, InvalidSession | StorageClosed):
            event.flaws.append(f"{type(error).__name__} is no error for that")
        if isinstance(error, StorageUnavailable):
            chained = isinstance(error.__cause__, Exception)
            if not chained and not _OWN.match(event.message):
                event.flaws.append("chained to nothing")
        said = said_by(error)
        secrets = (event.id, secret_of(event.id), *self._secrets)
        if any(secret in said for secret in secrets):
            event.flaws.append("an error tells a secret")

    def _remember(self, session: Session[Any]) -> None:
        data: Any = session.data
        self._token_of[session.revision] = data["token"]
        if len(self._token_of) > _REMEMBERED:
            del self._token_of[next(iter(self._token_of))]
