"""Live resources of sessions, such as open connections, on the replica that has them.

Invariants:

- A session has at most one resource here at a time, and one task owns it (_held.py).
- Resources that are being opened or closed count towards `max_open`. When there are so many, a new
  one takes the place of an unused one, and waits until that one is closed.
- A resource is used only by callers for whom `SessionManager.get` has found the session just now.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from datetime import timedelta
from functools import partial
from types import GenericAlias, TracebackType
from typing import TYPE_CHECKING, Generic, Self

import anyio
import msgspec
from msgspec import UNSET

from ._background import spawn
from ._held import Held, R
from ._principals import Owner, check_owner, check_owner_type
from .errors import (
    CorruptSession,
    SessionNotFound,
    StorageClosed,
    StorageUnavailable,
)
from .manager import SessionManager
from .record import NOT_FOUND
from .session import D, Session, session_digest
from .storage import AnnouncingStorage, StorageListener, check_count, milliseconds

_CHECKS_PER_TTL = 4
# After an interruption, all sessions in use need a check, which must not block the event loop.
_CHECKS_AT_ONCE = 50


class ResourceStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of `SessionResources`: the state now, and counts since it was made.

    Attributes:
        open: The resources that are open, or are being opened or closed.
        in_use: Those that someone uses.
        closed: How often a resource was opened and closed again.
        failed: How often opening or closing has failed.
    """

    open: int
    in_use: int
    closed: int
    failed: int


class SessionResources(StorageListener, Generic[R, D]):
    """Keeps a live object for each session in use: a connection, a stream, the context of a model.

    Another replica, or this one after a restart, opens the resource again from the session's data.
    A resource is closed when its session was deleted, revoked or rotated away, or has expired; when
    it was not used for `idle`; to make room for another one; and by `aclose`.

    If the storage announces changes, the end of a session is noticed when the announcement arrives;
    otherwise by the next `use` or check. A check loads the session of a resource in use, so that
    the session does not expire: every half `max_staleness` of the cache, or four times per TTL
    without a cache. Each `use` loads the session, too, so put a `NearCache` under the manager.

    Runs wherever the storage does. Use it as an async context manager, or call `aclose`.

    Args:
        sessions: The sessions; borrowed.
        open: Opens the resource of a session. An async function that gets the session. It is called
            once, so later changes of the session's data do not reach an open resource.
        close: Closes a resource. An async function that must end, as `aclose` waits for it. Its
            errors are logged.
        max_open: The most resources to keep open. The longest unused goes first.
        idle: The time after which an unused resource is closed; more than the TTL means the TTL. As
            for all durations: seconds or a timedelta.

    Raises:
        ValueError, TypeError: `max_open` or `idle` is not positive, or has a wrong type.
    """

    def __init__(
        self,
        sessions: SessionManager[D],
        open: Callable[[Session[D]], Awaitable[R]],
        close: Callable[[R], Awaitable[object]],
        *,
        max_open: int,
        idle: float | timedelta,
    ) -> None:
        if not isinstance(sessions, SessionManager):
            message = f"sessions is a SessionManager, not {type(sessions).__name__}"
            raise TypeError(message)
        for name, function in (("open", open), ("close", close)):
            if not callable(function):
                raise TypeError(f"{name} is an async function, not {type(function).__name__}")
        check_count(max_open, "max_open")
        self._sessions = sessions
        self._open = open
        self._close = close
        self._max_open = max_open
        self._idle = milliseconds(idle, "idle") / 1000
        storage = sessions.storage
        ttl: float | None = getattr(storage, "ttl", None)
        if ttl is not None:
            self._idle = min(self._idle, ttl)
        # A third-party storage may have no attribute `ttl`.
        staleness: float | None = getattr(storage, "max_staleness", None)
        # Half, because a check may meet a copy that is nearly stale, which has renewed nothing.
        self._check_every = staleness / 2 if staleness else (ttl or self._idle) / _CHECKS_PER_TTL
        self._held: dict[str, Held[R, D]] = {}  # by digest
        self._checks = anyio.Semaphore(_CHECKS_AT_ONCE)
        self._closed = self._failed = 0
        self._stopped = False
        self._stop_listening: Callable[[], None] | None = None
        if isinstance(storage, AnnouncingStorage):
            self._stop_listening = storage.listen(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    # A type checker knows a default for the second parameter, which 3.11 has not at run time.
    if not TYPE_CHECKING:
        __class_getitem__ = classmethod(GenericAlias)

    def statistics(self) -> ResourceStatistics:
        """Count resources."""
        return ResourceStatistics(
            open=sum(each.previous is None for each in self._held.values()),
            in_use=sum(each.users > 0 for each in self._held.values()),
            closed=self._closed,
            failed=self._failed,
        )

    @asynccontextmanager
    async def use(
        self, id: str, *, principal: Owner = UNSET, cancel: bool = False
    ) -> AsyncIterator[R]:
        """Use the resource of a session for the length of the block; open it if it is not open.

        Any number of callers at one time share it. Cancelling one of them cancels no other.

        Args:
            id: The session's id.
            principal: As for `SessionManager.get`.
            cancel: Whether to cancel the block when the session ends. By default the block goes on,
                and the resource is closed after it.

        Raises:
            SessionNotFound: The session does not exist, or belongs to another principal; with
                `cancel`, also when it has ended during the block.
            StorageUnavailable: The storage cannot be reached, or `max_open` resources are in use.
            StorageClosed: `aclose` was called.
            Exception: The resource cannot be opened. Each caller that waits for it gets the error;
                the next one tries again.
        """
        check_owner_type(principal)
        # A scope only with `cancel`: without one, another task may leave the block.
        with anyio.CancelScope() if cancel else nullcontext() as scope:
            held = await self._take(id, principal, scope)
            try:
                await held.ready.wait()
                held.check_opened()
                yield held.resource
            finally:
                held.leave(scope)
        if scope is not None and scope.cancelled_caught:
            self._check_open()
            raise SessionNotFound(NOT_FOUND)

    def discard(self, id: str) -> None:
        """Have the resource of a session closed, because it is broken.

        Those who use it keep it. The next `use` waits until they have left, and opens another one.

        Raises:
            InvalidSessionId: The id is malformed.
        """
        held = self._held.get(session_digest(id))
        if held is not None:
            held.discard()

    async def aclose(self) -> None:
        """Close every resource, those in use after their last user has left. Twice is fine.

        Blocks of `use` with `cancel` are cancelled. In a block without `cancel`, do not call this:
        it would wait for that block.
        """
        self._stopped = True
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        for held in tuple(self._held.values()):
            held.end()
        for held in tuple(self._held.values()):
            await held.task.wait()

    # The storage announces changes.

    def changed(self, digest: str, revision: str) -> None:
        """See `StorageListener.changed`."""
        held = self._held.get(digest)
        if held is None:
            return
        if revision or held.users:  # a rotation writes, too
            held.suspect()
        else:  # without a check, which would renew a session that was created anew
            held.retire()

    def interrupted(self) -> None:
        """See `StorageListener.interrupted`."""

    def resumed(self) -> None:
        """See `StorageListener.resumed`. Checks only sessions in use, because a check renews."""
        for held in self._held.values():
            if held.users:
                held.suspect()

    async def _take(self, id: str, principal: Owner, scope: anyio.CancelScope | None) -> Held[R, D]:
        """Find or make the resource of a session, with the caller among its users."""
        while True:
            self._check_open()
            try:
                session = await self._sessions.get(id)
            except (SessionNotFound, CorruptSession):
                held = self._held.get(session_digest(id))
                if held is not None:  # it may have been created anew since
                    held.suspect()
                raise
            check_owner(session, principal)
            self._check_open()
            held = self._held.get(session.digest)
            if held is None:
                held = self._make(session)
            elif not held.serves(session):
                await held.closed.wait()
                continue
            held.take(session, scope)
            return held

    def _make(self, session: Session[D]) -> Held[R, D]:
        """Make the resource of a session; at `max_open`, it waits for the end of another one.

        Raises:
            StorageUnavailable: All are in use.
        """
        previous = None
        if len(self._held) >= self._max_open:
            unused = [each for each in self._held.values() if not (each.users or each.claimed)]
            if not unused:
                raise StorageUnavailable(f"all {self._max_open} resources are in use")
            previous = min(unused, key=lambda each: (not each.closing, each.used_at))
            previous.claimed = True
            previous.retire()
        held = self._held[session.digest] = Held(
            self._sessions,
            session,
            idle=self._idle,
            check_every=self._check_every,
            checks=self._checks,
            previous=previous,
        )
        live = partial(held.live, self._open, self._close)
        ended = partial(self._ended, held, session.digest)
        held.task = spawn(live, "aiosessions: resource", ended)
        return held

    def _ended(self, held: Held[R, D], digest: str) -> None:
        held.closing = True
        if self._held.get(digest) is held:
            del self._held[digest]
        self._closed += held.opened
        self._failed += held.failed
        held.ready.set()
        held.closed.set()

    def _check_open(self) -> None:
        if self._stopped:
            raise StorageClosed("the resources are closed")
