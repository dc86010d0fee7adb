"""The interface of every storage: five verbs, and what each means for what is missing or expired.

Invariants of every storage, which `aiosessions.testing.StorageContract` checks:

- A session is absent when it was never stored, was deleted, has been idle for its TTL, or has
  reached `expires_at`: to the millisecond, for every verb alike, and whether or not anything has
  swept it up. Expiry is half-open: at exactly the TTL the session is gone.
- Loading renews the TTL, atomically with the read. There is no verb for renewing alone.
- A write that raises has changed nothing about the caller's object.
"""

import enum
from datetime import datetime, timedelta
from types import TracebackType
from typing import Protocol, Self

from .session import D, Session

# 10,000 years: room for whatever is meant as "for ever", and far from overflowing a server's clock.
_LONGEST = 10_000 * 366 * 86_400


class When(enum.Enum):
    """What must be true of the stored session for `Storage.store` to write."""

    ALWAYS = "always"
    """Nothing: create or overwrite."""
    ABSENT = "absent"
    """There is no such session; else `SessionExists`."""
    PRESENT = "present"
    """There is one; else `SessionNotFound`: a write must not bring a deleted session back."""
    UNCHANGED = "unchanged"
    """Its revision is still `session.revision`; else `SessionConflict`, or `SessionNotFound`."""


class Storage(Protocol[D]):
    """Where sessions are kept.

    To write a storage, subclass this, implement the five verbs, and run
    `aiosessions.testing.StorageContract` over it. `async with` comes with `aclose`.

    Every verb raises `StorageClosed` after `aclose`, `InvalidSession` for an id that cannot be one,
    and `StorageUnavailable` when the backend cannot be asked.
    """

    async def store(self, session: Session[D], *, when: When = When.ALWAYS) -> None:
        """Create or overwrite a session, and start a full TTL (never beyond `expires_at`).

        Stamps a new `revision` on `session`, in place. On any error `session` is as it was.
        Storing a session that is already past its `expires_at` is allowed; it is absent at once.

        Raises:
            InvalidSession: The session cannot be stored: a bad id, a naive datetime, data that
                cannot be encoded or is too large.
            SessionExists: `When.ABSENT`, and there is one.
            SessionNotFound: `When.PRESENT` or `When.UNCHANGED`, and there is none.
            SessionConflict: `When.UNCHANGED`, and the stored revision is another.
            CorruptSession: What is stored cannot be read, so the condition cannot be judged. It is
                left as it is; `When.ALWAYS` overwrites it.
        """
        ...

    async def load(self, id: str) -> Session[D]:
        """An independent copy of the session; renews its TTL atomically with the read.

        Raises:
            SessionNotFound: There is no such session.
            CorruptSession: What is stored under the id cannot be read, or is another session.
        """
        ...

    async def delete(self, id: str) -> bool:
        """Remove a session. Says whether there was one; none is no error."""
        ...

    async def delete_expired(self, before: datetime | None = None) -> int:
        """Remove what nobody can load any more, and say how many sessions that was.

        0, and no work, where the backend expires sessions by itself.

        Args:
            before: Remove what was last used (stored or loaded) before this moment, instead of
                what is past its TTL or its `expires_at`.

        Raises:
            InvalidSession: `before` is a naive datetime.
        """
        ...

    async def aclose(self) -> None:
        """Release everything. Every other verb raises `StorageClosed` from now on.

        Closing twice is fine.
        """
        ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


def check_when(when: When) -> None:
    """Refuse what is no `When`, also one that only looks like it.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(when, When):
        message = f"when is a When, such as When.ABSENT, not {type(when).__name__}"
        raise TypeError(message)


class Clock(Protocol):
    """Where the time comes from. The standard module `time` is one; tests bring their own."""

    def monotonic(self) -> float:
        """Seconds that never step, from an arbitrary start: for ages and TTLs."""
        ...

    def time(self) -> float:
        """Seconds since the epoch: for dates."""
        ...


def milliseconds(duration: float | timedelta, what: str) -> int:
    """A duration in whole milliseconds; the only place where durations are converted.

    Args:
        duration: Seconds, or a timedelta.
        what: What to call it in an error message.

    Raises:
        TypeError: It is no number and no timedelta.
        ValueError: It is less than one millisecond, over 10,000 years, or not finite.
    """
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        message = f"{what} is a number of seconds or a timedelta, not {type(duration).__name__}"
        raise TypeError(message)
    # The bound first: neither NaN, infinity nor a huge integer can be multiplied and rounded.
    if not 0 < seconds <= _LONGEST or round(seconds * 1000) < 1:
        message = (
            f"{what} must be at least one millisecond and at most 10,000 years, not {seconds} s"
        )
        raise ValueError(message)
    return round(seconds * 1000)
