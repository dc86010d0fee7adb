"""Sessions as an application uses them: ids, dates, lifetimes and lost updates are taken care of.

Invariants:

- A session is created only where there was none, and saved only over the revision that was loaded:
  no write is lost without an error, and none brings a deleted session back.
- The manager stamps `expires_at` at creation and never moves it, nor lets it go beyond
  `max_lifetime`.
- After a rotation the old id answers with what was stored under it before, and accepts no writes:
  what happens after the rotation happens under the new id alone.
"""

import contextlib
import inspect
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

import anyio
import anyio.abc
import msgspec

from .errors import (
    InvalidSession,
    SessionConflict,
    SessionError,
    SessionNotFound,
    StorageUnavailable,
)
from .session import D, Session, as_utc, new_session_id
from .storage import Clock, Storage, When, milliseconds

_log = logging.getLogger("aiosessions")
T = TypeVar("T")
_LATEST = datetime.max.replace(tzinfo=UTC)

RETIRED = "aiosessions.retired"
"""The metadata key that marks a session whose id was rotated away; its value is the moment."""


class SessionManager(Generic[D]):
    """Creates, loads, saves and rotates sessions in a storage, which it borrows and leaves open.

    Args:
        storage: Where the sessions are.
        max_lifetime: How long any session may live, however active: seconds or a timedelta.
            None for as long as it is used.
        sweep_interval: How often to call `delete_expired`, while the manager is entered: seconds or
            a timedelta. None for never: Redis needs no sweep, and `LocalStorage` is bounded anyway.
        grace: How long the old id of a rotated session still answers: seconds or a timedelta.
            0 for not at all.
        clock: Where the time comes from.

    Raises:
        ValueError: A duration is not positive (`grace` may be 0).
    """

    def __init__(
        self,
        storage: Storage[D],
        *,
        max_lifetime: float | timedelta | None = None,
        sweep_interval: float | timedelta | None = None,
        grace: float | timedelta = 10.0,
        clock: Clock = time,
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._max_lifetime = _optional(max_lifetime, "max_lifetime")
        if self._max_lifetime and self._max_lifetime > _LATEST - self._now():
            message = "max_lifetime reaches beyond the year 9999; use None for no limit"
            raise ValueError(message)
        self._sweep_interval = _optional(sweep_interval, "sweep_interval")
        self._grace = _optional(grace or None, "grace") or timedelta(0)
        self._tasks: anyio.abc.TaskGroup | None = None

    async def __aenter__(self) -> Self:
        if self._sweep_interval is not None:
            self._tasks = anyio.create_task_group()
            await self._tasks.__aenter__()
            self._tasks.start_soon(self._sweep, self._sweep_interval.total_seconds())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        tasks, self._tasks = self._tasks, None
        if tasks is not None:
            tasks.cancel_scope.cancel()
            # Without the exception, which would come out inside a group. The sweep raises none.
            await tasks.__aexit__(None, None, None)

    async def create(
        self,
        *,
        kind: str = "",
        principal: str | None = None,
        metadata: Mapping[str, str] | None = None,
        data: D | None = None,
        id: str | None = None,
    ) -> Session[D]:
        """Create and store a session.

        Args:
            kind: What sort of session it is.
            principal: Whom it belongs to.
            metadata: Small string pairs.
            data: The application's own payload.
            id: The id to use; a new one from `new_session_id` by default.

        Raises:
            InvalidSession: The session cannot be stored.
            SessionExists: There is a session with this id.
            StorageUnavailable: The storage cannot be reached.
        """
        _check_metadata(metadata or {})
        now = self._now()
        session = Session(
            id=new_session_id() if id is None else id,
            kind=kind,
            principal=principal,
            metadata=dict(metadata or {}),
            data=data,
            created_at=now,
            updated_at=now,
            expires_at=None if self._max_lifetime is None else now + self._max_lifetime,
        )
        await self._storage.store(session, when=When.ABSENT)
        return session

    async def get(self, id: str) -> Session[D]:
        """Load a session and renew its TTL: one round trip.

        Raises:
            SessionNotFound: There is no such session.
            InvalidSession: The id cannot be one.
            CorruptSession: What is stored cannot be read.
            StorageUnavailable: The storage cannot be reached.
        """
        session = await self._storage.load(id)
        if RETIRED in session.metadata:
            # No stored revision is empty, so no write can be based on this one.
            session.revision = ""
        return session

    async def save(self, session: Session[D]) -> None:
        """Store a session that was loaded or created, if nobody else has written it since.

        Stamps `updated_at` and `revision` on it, and brings an `expires_at` that was moved beyond
        `max_lifetime` back; on any error it is as it was.

        Raises:
            SessionConflict: Someone has. Load it again and redo the change, as `mutate` does. Also
                when the id has been rotated away.
            SessionNotFound: Someone has deleted it, or it has expired.
            InvalidSession: The session cannot be stored.
            StorageUnavailable: The storage cannot be reached; it may have been stored or not.
        """
        if session.revision:
            _check_metadata(session.metadata)
        saved = msgspec.structs.replace(
            session, updated_at=self._now(), expires_at=self._bounded(session)
        )
        await self._storage.store(saved, when=When.UNCHANGED)
        session.updated_at = saved.updated_at
        session.expires_at = saved.expires_at
        session.revision = saved.revision

    async def delete(self, id: str) -> bool:
        """Remove a session. Says whether there was one.

        Raises:
            InvalidSession: The id cannot be one.
            StorageUnavailable: The storage cannot be reached.
        """
        return await self._storage.delete(id)

    @overload
    async def mutate(  # type: ignore[overload-overlap]  # None is told apart at run time, too
        self,
        id: str,
        change: Callable[[Session[D]], None],
        *,
        attempts: int = ...,
        timeout: float | timedelta = ...,
    ) -> Session[D]: ...

    @overload
    async def mutate(  # type: ignore[overload-overlap]  # None is told apart at run time, too
        self,
        id: str,
        change: Callable[[Session[D]], Awaitable[None]],
        *,
        attempts: int = ...,
        timeout: float | timedelta = ...,
    ) -> Session[D]: ...

    @overload
    async def mutate(
        self,
        id: str,
        change: Callable[[Session[D]], Awaitable[T]],
        *,
        attempts: int = ...,
        timeout: float | timedelta = ...,
    ) -> tuple[Session[D], T]: ...

    @overload
    async def mutate(
        self,
        id: str,
        change: Callable[[Session[D]], T],
        *,
        attempts: int = ...,
        timeout: float | timedelta = ...,
    ) -> tuple[Session[D], T]: ...

    async def mutate(
        self,
        id: str,
        change: Callable[[Session[D]], Any],
        *,
        attempts: int = 100,
        timeout: float | timedelta = 10.0,
    ) -> Session[D] | tuple[Session[D], Any]:
        """Load a session, change it and save it; with a fresh copy again when someone else did.

        Args:
            id: The session's id.
            change: A plain or an async function that changes the session it is given, in place. It
                runs once for every attempt, so it must not do anything that cannot be repeated.
                What it raises abandons the write and comes out of `mutate`.
            attempts: The most attempts.
            timeout: When no further attempt begins any more: seconds or a timedelta.

        Returns:
            The session as saved; if the last run of `change` returned something other than None,
            a pair of the session and that.

        Raises:
            SessionConflict: Every attempt met another writer, or the id has been rotated away.
            SessionNotFound: There is no such session, or no longer.
            InvalidSession: `change` made it a session that cannot be stored, or changed its id.
            ValueError: `attempts` is not positive.
            StorageUnavailable: The storage cannot be reached; the change may have been saved or
                not. It is not tried again, as it would then be applied twice.
        """
        if attempts < 1:
            message = f"attempts must be at least 1, not {attempts}"
            raise ValueError(message)
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        deadline = anyio.current_time() + seconds
        for attempt in itertools.count(1):
            session = await self.get(id)
            if not session.revision:
                message = "this id has been rotated away; changes go to the new one"
                raise SessionConflict(message)
            value = change(session)
            if inspect.isawaitable(value):
                value = await value
            if session.id != id:
                message = "a change must leave the id alone; `rotate` gives a new one"
                raise InvalidSession(message)
            try:
                await self.save(session)
            except SessionConflict:
                wait = random.uniform(0, 0.001 * 2 ** min(attempt, 6))  # noqa: S311 - only jitter
                late = anyio.current_time() + wait >= deadline
                if late or attempt >= attempts:
                    raise
                await anyio.sleep(wait)
            else:
                return session if value is None else (session, value)
        raise AssertionError  # pragma: no cover - the loop above has no other end

    async def rotate(self, session: Session[D]) -> Session[D]:
        """Give a session a new id, as is due when its rights change: after a sign-in, say.

        The new session is stored first and the old one is retired then, so there is no moment
        without a usable session. For `grace` seconds the old id answers requests that are under
        way, with what was stored before the rotation, so whoever only knows the old id gains no
        rights. It accepts no writes: a save under it is a `SessionConflict`. With `grace=0` it is
        gone when this returns. `created_at` and `expires_at` do not move.

        Returns:
            The session under its new id; the object that was passed keeps the old one.

        Raises:
            SessionConflict: Someone has written the session since it was loaded, or rotated it.
            SessionNotFound: Someone has deleted it, or it has expired.
            InvalidSession: The session cannot be stored.
            StorageUnavailable: The storage cannot be reached. The old id works on, at least for
                `grace` seconds.
        """
        stored = await self.get(session.id)
        if stored.revision != session.revision or not stored.revision:
            message = "the session was written or rotated since it was loaded"
            raise SessionConflict(message)
        _check_metadata(session.metadata)
        now = self._now()
        rotated = msgspec.structs.replace(
            session,
            id=new_session_id(),
            metadata=dict(session.metadata),
            updated_at=now,
            expires_at=stored.expires_at,
        )
        await self._storage.store(rotated, when=When.ABSENT)
        # What is retired is what was stored: the object at hand may have the new rights already.
        stored.metadata[RETIRED] = now.isoformat()
        end = now + min(self._grace, _LATEST - now)
        stored.expires_at = end if stored.expires_at is None else min(end, stored.expires_at)
        try:
            await self._storage.store(stored, when=When.UNCHANGED)
        except (SessionConflict, SessionNotFound):
            # The new one must not outlive a session that someone deleted. Should that fail, it is
            # out of reach all the same: nobody knows its id.
            with contextlib.suppress(StorageUnavailable):
                await self._storage.delete(rotated.id)
            raise
        return rotated

    def _bounded(self, session: Session[D]) -> datetime | None:
        """The session's `expires_at`, not beyond `max_lifetime`."""
        if self._max_lifetime is None:
            return session.expires_at
        created_at = as_utc(session.created_at, "created_at")
        latest = created_at + min(self._max_lifetime, _LATEST - created_at)
        if session.expires_at is None:
            return latest
        return min(as_utc(session.expires_at, "expires_at"), latest)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.time(), UTC)

    async def _sweep(self, interval: float) -> None:
        while True:
            await anyio.sleep(interval)
            try:
                await self._storage.delete_expired()
            except Exception as error:  # noqa: BLE001 - an outage must not end the application
                # The next round may succeed. What is no error of ours may say an id.
                ours = isinstance(error, SessionError)
                _log.warning("a sweep failed: %s", error if ours else type(error).__name__)


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if RETIRED in metadata:
        message = f"the metadata key {RETIRED} is reserved"
        raise InvalidSession(message)


def _optional(duration: float | timedelta | None, what: str) -> timedelta | None:
    if duration is None:
        return None
    return timedelta(milliseconds=milliseconds(duration, what))
