"""The longest lifetime of a session, also of one that was stored without it."""

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Generic

import msgspec

from .errors import SessionError, SessionNotFound
from .record import NOT_FOUND
from .session import D, Session, SessionInfo, as_utc, revised
from .storage import Storage, When

LATEST = datetime.max.replace(tzinfo=UTC)


class Lifetime(Generic[D]):
    """Loads sessions, and ends those that are too old.

    Args:
        storage: The storage of the sessions.
        longest: The time from a session's creation to its end; None for no limit.
        now: Returns the current time.

    Raises:
        ValueError: `longest` reaches beyond the year 9999.
    """

    def __init__(
        self, storage: Storage[D], longest: timedelta | None, now: Callable[[], datetime]
    ) -> None:
        if longest and longest > LATEST - now():
            raise ValueError("max_lifetime reaches beyond the year 9999; use None for no limit")
        self._storage = storage
        self._longest = longest
        self._now = now

    async def load(self, id: str) -> Session[D]:
        """Load a session, or remove it if it is too old."""
        session = await self._storage.load(id)
        end = self.end_of(session)
        if self.has_ended(session, end):
            # With its end in the record, the storage judges it, by the one clock of all replicas.
            ended = revised(session, expires_at=end)
            with contextlib.suppress(SessionError):
                await self._storage.store(ended, when=When.UNCHANGED)
            session = await self._storage.load(id)
            if session.expires_at != end:
                raise SessionNotFound(NOT_FOUND)
        session.expires_at = end
        return session

    def bounded(self, info: SessionInfo[D]) -> SessionInfo[D] | None:
        """A listed session with its end, or None if it is too old."""
        end = self.end_of(info)
        if self.has_ended(info, end):
            return None
        return msgspec.structs.replace(info, expires_at=end)

    def end_of(self, session: Session[D] | SessionInfo[D]) -> datetime | None:
        """Return the session's `expires_at`, but no later than its longest lifetime allows."""
        if self._longest is None:
            return session.expires_at
        created_at = as_utc(session.created_at, "created_at")
        latest = created_at + min(self._longest, LATEST - created_at)
        return min(as_utc(session.expires_at or latest, "expires_at"), latest)

    def has_ended(self, session: Session[D] | SessionInfo[D], end: datetime | None) -> bool:
        """Whether the longest lifetime has ended the session, and its record does not say so."""
        return end is not None and end != session.expires_at and end <= self._now()
