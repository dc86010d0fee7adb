"""A storage that records each call of a verb, and judges the call by itself.

It sits between a manager and the storage under test. It judges everything that one call shows: the
type of an error, its message and its cause, the deadline, and the session that a load returned. The
checker judges the rest from the whole history.
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
from aiosessions.errors import InvalidSession, StorageClosed, StorageMisused
from tests.support.secrets import said_by

from .history import DELETE, LOAD, Event, secret_of

# Seconds that a busy machine may add to a timeout, apart from the measured delays of the loop.
_SLACK = 0.1
_INTERVAL = 0.01
_MAX_TOKENS = 1_000
# The storage itself gives these reasons, so there is nothing to chain.
_WITHOUT_CAUSE = re.compile(r"a reply was lost|no node of the cluster")


class LoopLag:
    """Measures how late an event loop is. A verb cannot end while its loop is blocked."""

    def __init__(self) -> None:
        self._lags: deque[tuple[float, float]] = deque(maxlen=1_000)
        self._due = time.monotonic()

    async def measure(self) -> None:
        """Measure until cancelled."""
        while True:
            self._due = time.monotonic() + _INTERVAL
            await asyncio.sleep(_INTERVAL)
            now = time.monotonic()
            if now - self._due > _INTERVAL:
                self._lags.append((now, now - self._due))

    def since(self, start: float) -> float:
        """Seconds for which the loop was blocked since a time."""
        lost = max(0.0, time.monotonic() - self._due)
        for at, lag in reversed(self._lags):
            if at < start:
                break
            lost += lag
        return lost


class RecordingStorage(Storage[Any]):
    """The storage of one client of the load.

    Args:
        storage: The storage under test.
        record: Called with each event.
        number: The number of the client, unique over all processes.
        timeout: The timeout of the storage under test, in seconds.
        lag: The lag of the event loop.
        secrets: Texts that no error may contain, in addition to those of the session.
    """

    def __init__(
        self,
        storage: Storage[Any],
        record: Callable[[Event], None],
        *,
        number: int,
        timeout: float,
        lag: LoopLag,
        secrets: Sequence[str] = (),
    ) -> None:
        self._storage = storage
        self._record = record
        self._number = number
        self._timeout = timeout
        self._lag = lag
        self._secrets = tuple(secrets)
        self._tokens = (f"{number}.{count}" for count in itertools.count(1))
        self._token_of: dict[str, str] = {}  # by revision

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        """Store the session with a new token in its data."""
        data: Any = session.data
        data["token"] = next(self._tokens)
        event = self._event(when.value, session.id)
        event.token, event.count = data["token"], data["count"]
        revision = session.revision
        if when is When.UNCHANGED:
            event.before = self._token_of.get(revision, "?")
        try:
            await self._recorded(event, self._storage.store(session, when=when))
        except SessionError:
            if session.revision != revision:
                event.flaws.append("a write that failed has changed the session")
            raise
        self._remember(session)

    async def load(self, id: str) -> Session[Any]:
        """Load a session and check its identity."""
        session: Session[Any] = await self._recorded(self._event(LOAD, id), self._storage.load(id))
        return session

    async def delete(self, id: str) -> bool:
        """Delete a session."""
        existed: bool = await self._recorded(self._event(DELETE, id), self._storage.delete(id))
        return existed

    async def delete_expired(self, before: datetime | None = None) -> int:
        """Pass the call on; there is nothing to record."""
        return await self._storage.delete_expired(before)

    async def aclose(self) -> None:
        """Leave the storage open, because the clients of a process share it."""

    def _event(self, verb: str, id: str) -> Event:
        return Event(verb=verb, id=id, client=self._number, start=time.monotonic(), end=0.0)

    async def _recorded(self, event: Event, verb: Awaitable[Any]) -> Any:
        try:
            result = await verb
        except Exception as error:
            event.outcome, event.message = type(error).__name__, str(error)
            self._judge_error(event, error)
            self._end(event)
            raise
        if isinstance(result, Session):
            self._judge_session(event, result)
        elif result is not None:
            event.existed = result
        self._end(event)
        return result

    def _end(self, event: Event) -> None:
        event.end = time.monotonic()
        lag = self._lag.since(event.start)
        event.late = max(0.0, event.end - event.start - self._timeout - lag)
        if event.late > _SLACK:
            event.flaws.append("late")
        self._record(event)

    def _judge_session(self, event: Event, session: Session[Any]) -> None:
        data: Any = session.data
        event.token, event.count = data["token"], data["count"]
        if session.id != event.id or data["secret"] != secret_of(event.id):
            event.flaws.append("a session of another client")
        self._remember(session)

    def _judge_error(self, event: Event, error: Exception) -> None:
        unexpected = InvalidSession | StorageClosed | StorageMisused
        if not isinstance(error, SessionError) or isinstance(error, unexpected):
            event.flaws.append(f"an unexpected error, {type(error).__name__}")
        if isinstance(error, StorageUnavailable):
            event.in_doubt = error.in_doubt
            if error.in_doubt and event.verb == LOAD:
                event.flaws.append("a load in doubt")
            cause = error.__cause__
            if cause is None and not _WITHOUT_CAUSE.match(event.message):
                event.flaws.append("an error without a cause")
            if cause is not None and cause.__traceback__ is not None:
                event.flaws.append("a cause with a traceback")
        text = said_by(error)
        secrets = (event.id, secret_of(event.id), *self._secrets)
        if any(secret in text for secret in secrets):
            event.flaws.append("an error with a secret")

    def _remember(self, session: Session[Any]) -> None:
        data: Any = session.data
        self._token_of[session.revision] = data["token"]
        if len(self._token_of) > _MAX_TOKENS:
            del self._token_of[next(iter(self._token_of))]
