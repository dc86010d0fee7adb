"""Operations on stored sessions that the manager does not have, and the dates of a cookie."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic

from .._retry import Retry
from .._rotation import ROTATED, remove
from ..errors import (
    CorruptSession,
    InvalidSession,
    SessionConflict,
    SessionNotFound,
    SessionRotated,
)
from ..manager import ROTATED_KEY, SessionManager
from ..session import D, Session


@dataclass(frozen=True)
class Settings(Generic[D]):
    """The settings of the middleware that concern the session; see `SessionMiddleware`."""

    sessions: SessionManager[D]
    kind: str
    empty: Callable[[], D]
    merges: bool
    starts_fresh: bool
    slides: bool  # whether the client forgets the id in time

    @property
    def ttl(self) -> float | None:
        """The TTL of the storage in seconds, if it has one."""
        return getattr(self.sessions.storage, "ttl", None)

    def now(self) -> datetime:
        """Return the time of the manager's clock."""
        return datetime.fromtimestamp(self.sessions.clock.time(), UTC)

    def max_age(self, session: Session[D]) -> int | None:
        """Seconds for which a client may keep the id; None for no limit."""
        ends = [] if self.ttl is None else [self.ttl]
        if session.expires_at is not None:
            ends.append((session.expires_at - self.now()).total_seconds())
        return max(0, int(min(ends))) if ends else None

    def is_due(self, session: Session[D]) -> bool:
        """Whether half of a TTL, counted from the creation, has ended since the last write."""
        if self.ttl is None or not self.slides or ROTATED_KEY in session.metadata:
            return False
        written = session.updated_at - session.created_at
        return (self.now() - session.created_at) // self._half > written // self._half

    @property
    def _half(self) -> timedelta:
        return timedelta(seconds=(self.ttl or 0.0) / 2)


async def delete_in_use(sessions: SessionManager[Any], id: str) -> None:
    """Delete a session, unless it continues under a new id.

    `SessionManager.delete` would delete only the old id then, and the new one would stay signed in.

    Raises:
        SessionRotated: It continues under a new id.
        StorageUnavailable: The storage cannot be reached.
    """
    retry = Retry()
    while True:
        try:
            found = await sessions.get(id)
            if ROTATED_KEY not in found.metadata:
                await remove(sessions.storage, found)
                return
        except SessionNotFound:
            return
        except SessionConflict:
            if not await retry.wait():
                raise
        except (CorruptSession, InvalidSession):  # without a mark, or too large to write again
            await sessions.delete(id)
            return
        else:
            raise SessionRotated(ROTATED)
