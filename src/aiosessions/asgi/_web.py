"""The session of one request, as the application sees it."""

from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Generic

from .._retry import Change
from ..errors import SessionError
from ..session import D
from ._answers import status_of
from ._work import Work


class WebSession(Generic[D]):
    """The session of one request or WebSocket; `get_session(request)` returns it.

    It exists also for a visitor without a stored session. A session is stored when something is
    set. With `lazy=True`, `load` must come before everything else.
    """

    __slots__ = ("_work",)  # a misspelt `principal` is an error, not a sign-in that is lost

    def __init__(self, work: Work[D]) -> None:
        self._work = work

    def __repr__(self) -> str:
        state = (
            "stored" if self._work.is_stored else "new" if self._work.is_loaded else "not loaded"
        )
        return f"<WebSession {state}>"

    @property
    def id(self) -> str:
        """The id that the client has after a response that succeeds. A credential."""
        self._work.touch()
        return self._work.id

    @property
    def is_new(self) -> bool:
        """Whether the session is not stored yet."""
        self._work.touch()
        return not self._work.is_stored

    @property
    def principal(self) -> str | None:
        """The owner. A new one gives the session a new id, if the response succeeds.

        Raises:
            RuntimeError: It is set after the head of the response has left.
        """
        self._work.touch()
        return self._work.principal

    @principal.setter
    def principal(self, principal: str | None) -> None:
        if principal is not None and not isinstance(principal, str):
            raise TypeError(f"a principal is a str or None, not {type(principal).__name__}")
        self._work.set_principal(principal)

    @property
    def data(self) -> D:
        """The application's data. For a new session, `empty()`."""
        self._work.read = None
        return self._work.touch().data

    @data.setter
    def data(self, data: D) -> None:
        self._work.touch().data = data

    @property
    def metadata(self) -> dict[str, str]:
        """Small string pairs. Of two requests that set a key, the later one wins."""
        return self._work.touch().metadata

    @property
    def created_at(self) -> datetime:
        """The time of the session's creation."""
        return self._work.touch().created_at

    @property
    def expires_at(self) -> datetime | None:
        """The absolute deadline of a stored session, if there is one."""
        return self._work.touch().expires_at

    async def load(self) -> "WebSession[D]":
        """Load the session, if the middleware has not done so (`lazy=True`).

        Raises:
            CorruptSession: The stored record cannot be read.
            StorageUnavailable: The storage cannot be reached.
        """
        with _noted(self._work):
            await self._work.load()
        return self

    async def save(self) -> None:
        """Store the changes now, as at the start of a response that succeeds.

        Raises:
            SessionConflict: Another request has written the session, and the changes cannot be
                merged.
            SessionRotated: Another request has given the session a new id.
            SessionNotFound: Another request has deleted the session.
            RuntimeError: The head of the response has left, and the client would need a new id.
        """
        with _noted(self._work):
            await self._work.load()
            await self._work.finish()

    async def mutate(self, change: Change[D]) -> None:
        """Save, and then change the stored session; after a conflict, again with a fresh copy.

        Args:
            change: As for `SessionManager.mutate`. It may run several times.

        Raises:
            SessionConflict, SessionNotFound, RuntimeError: As for `save`.
        """
        with _noted(self._work):
            await self._work.load()
            await self._work.mutate(change)

    def rotate(self) -> Awaitable[None]:
        """Give the session a new id: at once if awaited, else when a response succeeds."""
        self._work.rotate()
        return _Later(self.save)

    def delete(self) -> Awaitable[None]:
        """Delete the session: at once if awaited, else with the response, even a failed one.

        Afterwards the session is an empty one. If something is set in it, it is stored under
        another id.

        Raises:
            SessionRotated: Awaited only. Another request has given the session a new id.
        """
        self._work.delete()
        return _Later(self.save)

    async def revoke_all(self, *, keep: bool = False) -> int:
        """Delete all sessions of this principal: sign out everywhere.

        Args:
            keep: Whether to keep this session, to sign out everywhere else.

        Returns:
            The number of deleted sessions; 0 without a principal.

        Raises:
            NotImplementedError: The storage has no index of principals.
            StorageUnavailable: The storage cannot be reached. Revoking again is safe.
        """
        with _noted(self._work):
            await self._work.load()
            return await self._work.revoke_all(keep=keep)


@contextmanager
def _noted(work: Work[Any]) -> Iterator[None]:
    """Note an error, so that the middleware can answer with its status instead of 500."""
    try:
        yield
    except SessionError as error:
        work.error_status = status_of(error)
        raise


class _Later:
    """An awaitable that need not be awaited."""

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work = work

    def __await__(self) -> Generator[Any, None, None]:
        return self._work().__await__()
