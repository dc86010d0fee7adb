"""The life of one live resource of a session, in a task of its own.

Invariants:

- The task opens the resource, waits for its end, and closes it. So it is closed once.
- It is closed only while nobody uses it. From the decision on, nobody can take it.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import anyio

from ._background import BackgroundTask
from .errors import SessionError, StorageClosed, StorageUnavailable
from .manager import SessionManager
from .record import ROTATED_KEY
from .session import D, Session

R = TypeVar("R")
_log = logging.getLogger("aiosessions")


class Held(Generic[R, D]):
    """The resource of a session.

    Args:
        sessions: The sessions.
        session: The session, as the caller has found it.
        idle: Seconds after which the resource is closed if nobody uses it.
        check_every: Seconds between two checks of the session while someone uses it.

    Attributes:
        task: The task that runs `live`.
        resource: The resource, once `ready` is set and `error` is None.
        error: The reason why it could not be opened.
        users: The number of callers that use it or wait for it.
        gone: Whether the session has ended.
        closing: Whether nobody can take the resource any more.
        ready: Set when the resource was opened, or could not be.
        closed: Set when nothing of it is left.
        close_failed: Whether closing it has raised an error.
    """

    task: BackgroundTask
    resource: R

    def __init__(
        self, sessions: SessionManager[D], session: Session[D], *, idle: float, check_every: float
    ) -> None:
        self._sessions = sessions
        self._session = session
        self._idle = idle
        self._check_every = check_every
        self._checked_at = self._used_at = anyio.current_time()
        self._suspect = False  # the session was changed since the last check
        self._retiring = False  # close as soon as nobody uses it
        self._scopes: set[anyio.CancelScope] = set()
        self._stirred = anyio.Event()
        self.error: BaseException | None = None
        self.users = 0
        self.gone = self.closing = self.close_failed = False
        self.ready = anyio.Event()
        self.closed = anyio.Event()

    def enter(self, scope: anyio.CancelScope | None) -> None:
        """Tie a block of a user to the session: cancel it when the session ends."""
        if scope is not None:
            self._scopes.add(scope)
            if self.gone:
                scope.cancel()

    def leave(self, scope: anyio.CancelScope | None) -> None:
        """End the use of one user."""
        if scope is not None:
            self._scopes.discard(scope)
        self.users -= 1
        self._used_at = anyio.current_time()
        self._stirred.set()

    def retire(self) -> None:
        """Close the resource as soon as nobody uses it."""
        self._retiring = True
        self._stirred.set()

    def end(self) -> None:
        """The session has ended: cancel the blocks that are tied to it, and retire."""
        self.gone = True
        for scope in self._scopes:
            scope.cancel()
        self.retire()

    def suspect(self) -> None:
        """Check the session soon, because it has changed."""
        self._suspect = True
        self._stirred.set()

    def found(self, session: Session[D]) -> None:
        """Note that the session was loaded just now."""
        self._session = session
        self._checked_at = anyio.current_time()
        if ROTATED_KEY in session.metadata:  # the old id answers until its grace ends
            self.retire()

    async def live(
        self, open: Callable[[Session[D]], Awaitable[R]], close: Callable[[R], Awaitable[object]]
    ) -> None:
        """Open the resource, wait for its end, and close it."""
        try:
            resource = self.resource = await open(self._session)
        except Exception as error:  # noqa: BLE001 - callers get what `open` raises
            self.error = error
            return
        except BaseException:
            self.error = StorageClosed("the task that opens the resource was cancelled")
            raise
        self.ready.set()
        try:
            while not await self._is_over():
                pass
        finally:
            self.closing = True
            with anyio.CancelScope(shield=True):
                try:
                    await close(resource)
                except Exception as error:  # noqa: BLE001 - the application's own
                    self.close_failed = True
                    _log.warning("a resource failed to close: %s", type(error).__name__)

    async def _is_over(self) -> bool:
        """Wait for the next event, and return whether to close the resource now."""
        delay = self._delay()
        if delay > 0:
            self._stirred = anyio.Event()
            with anyio.move_on_after(delay):
                await self._stirred.wait()
        if self._left() <= 0:
            self.end()
        elif self._suspect or (self.users and self._since(self._checked_at) >= self._check_every):
            await self._check()
        if not self.users and (self._retiring or self._since(self._used_at) >= self._idle):
            self.closing = True  # in this step, so that nobody comes in between
        return self.closing

    def _delay(self) -> float:
        """Seconds until there is something to do."""
        if self._suspect or (self._retiring and not self.users):
            return 0
        if self.gone:
            return float("inf")
        if self.users:
            delay = self._check_every - self._since(self._checked_at)
        else:
            delay = self._idle - self._since(self._used_at)
        return min(delay, self._left())

    async def _check(self) -> None:
        """Look whether the session is still there, which renews it."""
        self._suspect = False
        self._checked_at = anyio.current_time()
        try:
            self.found(await self._sessions.get(self._session.id))
        except StorageUnavailable:
            pass  # an outage: the next check is due in time
        except SessionError:
            self.end()

    def _left(self) -> float:
        """Seconds until the deadline of the session."""
        end = self._session.expires_at
        return float("inf") if end is None else end.timestamp() - self._sessions.clock.time()

    def _since(self, moment: float) -> float:
        return anyio.current_time() - moment
