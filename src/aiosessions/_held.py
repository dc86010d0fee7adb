"""The life of one live resource of a session, in a task for this resource.

Invariants:

- The task opens the resource, waits for its end, and closes it. So it is closed once.
- It is closed only while it is unused. `closing` is set in the step that decides this, and from
  then on no user gets it.
- Each change of the state wakes the task, if the task would otherwise wake too late.
"""

import logging
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from math import inf
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic

import anyio

from ._background import BackgroundTask
from .errors import CorruptSession, SessionNotFound, StorageClosed
from .manager import SessionManager
from .record import NOT_FOUND, ROTATED_KEY
from .session import D, Session

if TYPE_CHECKING:  # a default, as for `D`
    from typing_extensions import TypeVar

    R = TypeVar("R", default=Any)
else:
    from typing import TypeVar

    R = TypeVar("R")

_log = logging.getLogger("aiosessions")


class Held(Generic[R, D]):
    """The resource of a session.

    Args:
        sessions: The sessions.
        session: The session, as the caller has found it.
        idle: Seconds after which the resource is closed if it is unused.
        check_every: Seconds between two checks of the session while someone uses it.
        checks: Bounds the checks at one time.
        previous: The resource that is closed before this one is opened.

    Attributes:
        task: The task that runs `live`.
        resource: The resource, once it is opened.
        previous: See above; None once it is closed.
        used_at: The moment at which the last user has left.
        users: The number of callers that use it or wait for it.
        gone: Whether the session has ended, or `aclose` was called.
        closing: Whether new users must wait for `closed`.
        claimed: Whether another resource takes its place.
        ready: Set when the resource was opened, or could not be.
        closed: Set when nothing of it is left.
        opened: Whether it was opened.
        failed: Whether opening or closing it has failed.
    """

    task: BackgroundTask
    resource: R

    def __init__(
        self,
        sessions: SessionManager[D],
        session: Session[D],
        *,
        idle: float,
        check_every: float,
        checks: anyio.Semaphore,
        previous: "Held[R, D] | None" = None,
    ) -> None:
        self._sessions = sessions
        self._session = session
        self._idle = idle
        self._check_every = check_every
        self._checks = checks
        self.previous = previous
        self.used_at = anyio.current_time()
        self._check_at = self.used_at + check_every
        self._suspect = False  # the session was changed since the last check
        self._retiring = False  # close as soon as it is unused
        self._discarded = False
        self._scopes: set[anyio.CancelScope] = set()
        self._life = anyio.CancelScope()
        self._stirred = anyio.Event()
        self._wake_at = inf
        self._error: Exception = StorageClosed("the task that opens the resource was cancelled")
        self._traceback: TracebackType | None = None
        self.users = 0
        self.gone = self.closing = self.claimed = self.opened = self.failed = False
        self.ready = anyio.Event()
        self.closed = anyio.Event()

    def serves(self, session: Session[D]) -> bool:
        """Whether a caller who has found this session can take the resource.

        Raises:
            SessionNotFound: The session was deleted, and created anew under the same id.
        """
        if session.created_at < self._session.created_at:
            raise SessionNotFound(NOT_FOUND)
        if session.created_at > self._session.created_at:
            self.end()
        return not (self.gone or self.closing or self._discarded)

    def take(self, session: Session[D], scope: anyio.CancelScope | None) -> None:
        """Begin the use of one user, who has found the session just now.

        Args:
            session: The session.
            scope: The scope to cancel when the session ends.
        """
        self.users += 1
        if scope is not None:
            self._scopes.add(scope)
        self._found(session)

    def leave(self, scope: anyio.CancelScope | None) -> None:
        """End the use of one user."""
        if scope is not None:
            self._scopes.discard(scope)
        self.users -= 1
        self.used_at = anyio.current_time()
        if not self.users and not self.ready.is_set():  # no one waits for `open` any more
            self._retiring = True
        self._settle()

    def check_opened(self) -> None:
        """Raise the error of `open`, if the resource could not be opened."""
        if not self.opened:
            # All waiting callers get this object; without a reset, each `raise` would add to it.
            raise self._error.with_traceback(self._traceback)

    def retire(self) -> None:
        """Close the resource as soon as it is unused."""
        self._retiring = True
        self._settle()

    def discard(self) -> None:
        """Let new users wait until the present ones have left, and the resource is closed."""
        self._discarded = True
        self.retire()

    def end(self) -> None:
        """Cancel the blocks that end with the session, and retire."""
        self.gone = True
        for scope in self._scopes:
            scope.cancel()
        self.retire()

    def suspect(self) -> None:
        """Check the session soon, because it has changed.

        Called by the storage, perhaps from a callback of asyncio, where anyio tells no time.
        """
        self._suspect = True
        self._check_at = -inf
        self._stirred.set()

    async def live(
        self, open: Callable[[Session[D]], Awaitable[R]], close: Callable[[R], Awaitable[object]]
    ) -> None:
        """Open the resource, wait for its end, and close it."""
        if self.previous is not None:
            await self.previous.closed.wait()
            self.previous = None
        if self.closing:
            return
        # One scope for the whole life, because `open` may enter a task group that `close` leaves.
        with self._life:
            await self._live(open, close)

    async def _live(
        self, open: Callable[[Session[D]], Awaitable[R]], close: Callable[[R], Awaitable[object]]
    ) -> None:
        try:
            self.resource = await open(self._session)
            self.opened = True
        except Exception as error:  # noqa: BLE001 - callers get what `open` raises
            self._error, self._traceback = error, error.__traceback__
            self.failed = True
        if not self.opened:
            return
        self.ready.set()
        try:
            while not self.closing:
                await self._step()
        finally:
            self.closing = True
            self._life.shield = True
            # `open` may have succeeded although it was cancelled.
            late = self._life.cancel_called
            with anyio.CancelScope(shield=True) if late else nullcontext():
                try:
                    await close(self.resource)
                except Exception as error:  # noqa: BLE001 - the application's own
                    self.failed = True
                    _log.warning("a resource failed to close: %s", type(error).__name__)

    async def _step(self) -> None:
        """Wait until there is something to do, and do it."""
        self._stirred = anyio.Event()
        self._wake_at = self._due()
        delay = self._wake_at - anyio.current_time()
        if delay > 0:
            with anyio.move_on_after(delay):
                await self._stirred.wait()
        now = anyio.current_time()
        if self.gone or self.closing:
            return
        if self._left() <= 0:
            self.end()
        elif (self.users or self._suspect) and now >= self._check_at:
            await self._check()
        elif not self.users and now >= self.used_at + self._idle:
            self.closing = True

    def _due(self) -> float:
        """The moment at which there is something to do."""
        if self.closing:
            return -inf
        if self.gone:
            return inf  # until the last user leaves
        due = anyio.current_time() + self._left()
        if self.users or self._suspect:
            due = min(due, self._check_at)
        return due if self.users else min(due, self.used_at + self._idle)

    async def _check(self) -> None:
        """Load the session, to renew it and to see whether it still exists."""
        suspect, self._suspect = self._suspect, False
        self._check_at = anyio.current_time() + self._check_every
        try:
            async with self._checks:
                session = await self._sessions.get(self._session.id)
        except (SessionNotFound, CorruptSession, StorageClosed):
            self.end()
        except Exception:  # noqa: BLE001 - an outage; third-party storages raise anything
            self._suspect |= suspect  # the next check is due in time
        else:
            if self.serves(session):
                self._found(session)

    def _found(self, session: Session[D]) -> None:
        """Note that the session was loaded just now."""
        self._session = session
        if not self._suspect:  # else the session may have changed since that load began
            self._check_at = anyio.current_time() + self._check_every
        if ROTATED_KEY in session.metadata:  # the old id answers until its grace ends
            self.retire()
        self._wake()

    def _settle(self) -> None:
        """Decide to close the resource, if it is retiring and unused."""
        if self._retiring and not self.users:
            self.closing = True
            if not self.ready.is_set():
                self._life.cancel()
        self._wake()

    def _wake(self) -> None:
        """Wake the task, if it sleeps for too long."""
        if self._due() < self._wake_at:
            self._stirred.set()

    def _left(self) -> float:
        """Seconds until the deadline of the session."""
        end = self._session.expires_at
        return inf if end is None else end.timestamp() - self._sessions.clock.time()
