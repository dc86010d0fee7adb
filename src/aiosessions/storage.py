"""The interface of every storage: five verbs, and their meaning for missing and expired sessions.

Invariants of every storage, which `aiosessions.testing.StorageContract` checks:

- A session is absent when it was never stored, was deleted, has been idle for its TTL, or has
  reached `expires_at`. That holds to the millisecond, for every verb, and before any sweep. Expiry
  is half-open: at exactly the TTL the session is gone. The clock of the process or of the server
  decides.
- Loading renews the TTL, atomically with the read. There is no verb that only renews. A load
  of a record that may not be read (past its deadline, unreadable) does not prolong it.
- A write that raises leaves the caller's object unchanged.
"""

import builtins
import enum
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from .session import D, Session, SessionInfo, as_utc

# 10,000 years: long enough for "for ever", and far from overflowing the clock of a server.
_LONGEST = 10_000 * 366 * 86_400
_is_digest = re.compile(r"[0-9a-f]{32}", re.ASCII).fullmatch


class When(enum.Enum):
    """The condition under which `Storage.store` writes."""

    ALWAYS = "always"
    """No condition: create or overwrite."""
    ABSENT = "absent"
    """Only if there is no such session; else `SessionExists`."""
    PRESENT = "present"
    """Only if there is one; else `SessionNotFound`: a deleted session stays deleted."""
    UNCHANGED = "unchanged"
    """Only over the revision `session.revision`; else `SessionConflict` or `SessionNotFound`."""


class Storage(Protocol[D]):
    """A place that keeps sessions.

    To write a storage, subclass this, implement the five verbs, and run
    `aiosessions.testing.StorageContract` over it. `async with` comes with `aclose`.

    Every verb raises `StorageClosed` after `aclose`, `InvalidSessionId` for a malformed id, and
    `StorageUnavailable` when the backend cannot answer.
    """

    async def store(self, session: Session[D], *, when: When = When.ALWAYS) -> None:
        """Create or overwrite a session, and start a full TTL (never beyond `expires_at`).

        Stamps a new `revision` on `session`, in place. On any error `session` is unchanged.
        Storing a session that is already past its `expires_at` succeeds and removes the session.

        Raises:
            InvalidSession: The session cannot be stored: a malformed id, a naive datetime, data
                that cannot be encoded or is too large.
            SessionExists: `When.ABSENT`, and there is such a session.
            SessionNotFound: `When.PRESENT` or `When.UNCHANGED`, and there is no such session.
            SessionConflict: `When.UNCHANGED`, and the stored revision is another one.
            CorruptSession: The stored record cannot be read, so the condition cannot be judged.
                The record stays as it is; `When.ALWAYS` overwrites it.
        """
        ...

    async def load(self, id: str) -> Session[D]:
        """Return an independent copy of the session; renew its TTL atomically with the read.

        Raises:
            SessionNotFound: There is no such session.
            CorruptSession: The stored record cannot be read, or it holds another session.
        """
        ...

    async def delete(self, id: str) -> bool:
        """Remove a session and return whether there was one. An absent session is not an error."""
        ...

    async def delete_expired(self, before: datetime | None = None) -> int:
        """Remove expired sessions and return how many.

        Returns 0 without any work where the backend expires sessions by itself.

        Args:
            before: Remove the sessions that were last used (stored or loaded) before this moment,
                instead of those past their TTL or `expires_at`.

        Raises:
            InvalidSession: `before` is a naive datetime.
        """
        ...

    async def aclose(self) -> None:
        """Release everything. Afterwards every other verb raises `StorageClosed`.

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


@runtime_checkable
class IndexedStorage(Storage[D], Protocol[D]):
    """A storage that finds the sessions of a principal.

    Promises, which `aiosessions.testing.IndexedStorageContract` checks:

    - No live session of a principal is ever missing from its list, wherever a process ends.
    - A session that is dead (deleted, expired, evicted) is never listed, and its trace in the index
      is removed in time, without a scan.
    - A load or a save sends no more commands than without the index, or hardly ever.
    - An id that was rotated away (its metadata has `aiosessions.record.ROTATED_KEY`) is neither
      listed nor counted, but it is revoked with the others.

    Every method raises `StorageClosed` after `aclose`, `TypeError` for a principal that is not a
    string, and `StorageUnavailable` when the backend cannot answer.
    """

    async def list(self, principal: str) -> builtins.list[SessionInfo[D]]:
        """Return the sessions of a principal, the latest update first. Renews nothing.

        A record that cannot be read is left out, with a warning in the log.
        """
        ...

    async def count(self, principal: str) -> int:
        """Return the number of a principal's sessions."""
        ...

    async def revoke(self, principal: str, digest: str) -> bool:
        """Delete one session, and return whether the principal had it.

        Args:
            principal: The owner.
            digest: The digest of the session's id. Any other string names no session.

        Raises:
            CorruptSession: The record cannot be read, so its owner is unknown. It stays as it is.
        """
        ...

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        """Delete the sessions of a principal, and return their number.

        When it returns, each session that existed when it began is gone, and so is a new one that a
        rotation has made of it. A session that is created meanwhile is either deleted or listed.

        Args:
            principal: The owner.
            keep: The id of a session to keep.

        Raises:
            CorruptSession: A record cannot be read, so its owner is unknown; the others are gone.
            InvalidSessionId: `keep` is malformed.
        """
        ...

    async def trim(self, principal: str, most: int, *, keep: str) -> int:
        """Delete the longest-unused sessions if there are more than `most`; return their number.

        Calls at the same time must not delete each other's new session. A storage that cannot see
        all sessions in one step may leave one more, if `keep` is the longest unused one.

        Args:
            principal: The owner.
            most: The number of sessions to leave, at least 1.
            keep: The id of a session to keep: the newest, as a rule.
        """
        ...


class StorageListener(Protocol):
    """The methods that an `AnnouncingStorage` calls. They return at once and raise nothing."""

    def changed(self, digest: str, revision: str) -> None:
        """Note that a session was written or deleted, here or by another process.

        A change may be announced more than once.

        Args:
            digest: The digest of its id.
            revision: The revision that was written; empty if the session was deleted.
        """
        ...

    def interrupted(self) -> None:
        """Note that announcements may be missing from now on."""
        ...

    def resumed(self) -> None:
        """Note that every change is announced from now on."""
        ...


@runtime_checkable
class AnnouncingStorage(Storage[D], Protocol[D]):
    """A storage that tells its listeners of writes and deletes by any process.

    A load that starts after an announcement sees the change. The announcement may arrive shortly
    after the verb has returned. Expiry and eviction need no announcement.
    """

    def listen(self, listener: StorageListener) -> Callable[[], None]:
        """Call a listener for each change, until the returned function is called.

        The first call is `resumed` or `interrupted`, at once or later.
        """
        ...


def check_principal(principal: str) -> None:
    """Check that a principal is a string.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(principal, str):
        message = f"a principal is a str, not {type(principal).__name__}"
        raise TypeError(message)


def check_digest(digest: str) -> bool:
    """Whether a string is a digest.

    Raises:
        TypeError: `digest` is not a string.
    """
    if not isinstance(digest, str):
        message = f"a digest is a str, not {type(digest).__name__}"
        raise TypeError(message)
    return _is_digest(digest) is not None


def check_when(when: When) -> None:
    """Check that `when` is a `When`; a string such as "absent" is not.

    Raises:
        TypeError: `when` is not a `When`.
    """
    if not isinstance(when, When):
        message = f"when is a When, such as When.ABSENT, not {type(when).__name__}"
        raise TypeError(message)


class Clock(Protocol):
    """A source of time. The standard module `time` is one; tests bring their own."""

    def monotonic(self) -> float:
        """Seconds that never step, from an arbitrary start: for ages and TTLs."""
        ...

    def time(self) -> float:
        """Seconds since the epoch: for dates."""
        ...


def milliseconds(duration: float | timedelta, what: str) -> int:
    """Convert a duration to whole milliseconds. All durations are converted here.

    Args:
        duration: Seconds, or a timedelta.
        what: The name of the duration in an error message.

    Raises:
        TypeError: The duration is neither a number nor a timedelta.
        ValueError: The duration is less than one millisecond, over 10,000 years, or not finite.
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


def whole_milliseconds(seconds: float) -> int:
    """The milliseconds that have passed at a reading of a clock; a part of one does not count."""
    return int(seconds * 1000 + 0.001)  # clocks that count milliseconds are inexact as floats


def check_moment(moment: datetime, what: str) -> datetime:
    """Return a moment that is an argument of a verb, in UTC.

    Raises:
        TypeError: `moment` is not a datetime.
        InvalidSession: `moment` is naive.
    """
    if not isinstance(moment, datetime):
        message = f"{what} is a datetime, not {type(moment).__name__}"
        raise TypeError(message)
    return as_utc(moment, what)


def check_count(number: int, what: str) -> None:
    """Check that a number is a count of at least 1.

    Raises:
        TypeError: `number` is not an int.
        ValueError: `number` is not positive.
    """
    if isinstance(number, bool) or not isinstance(number, int):
        message = f"{what} is an int, not {type(number).__name__}"
        raise TypeError(message)
    if number < 1:
        message = f"{what} must be at least 1, not {number}"
        raise ValueError(message)


def check_storage(storage: object) -> None:
    """Check that `storage` is a storage, and not its class or a URL.

    Raises:
        TypeError: It is something else. The message names the right argument.
    """
    verbs = "store", "load", "delete", "delete_expired"
    if isinstance(storage, type):
        found = f"the class {storage.__name__}"
    elif isinstance(storage, str):
        found = "a URL; use RedisStorage.from_url(url, ttl=...)"
    elif not all(callable(getattr(storage, verb, None)) for verb in verbs):
        found = type(storage).__name__
    else:
        return
    message = f"storage is a Storage, such as RedisStorage or LocalStorage, not {found}"
    raise TypeError(message)


def check_codec(codec: object) -> None:
    """Check that `codec` is a codec, and not its class or a data type.

    Raises:
        TypeError: It is something else. The message names the right argument.
    """
    if isinstance(codec, type):
        if callable(getattr(codec, "encode", None)) and callable(getattr(codec, "decode", None)):
            message = f"codec is a codec, not a class; use codec={codec.__name__}()"
        else:
            message = f"codec is a codec, not a data type; use codec=JsonCodec({codec.__name__})"
        raise TypeError(message)
    if not callable(getattr(codec, "encode", None)) or not callable(getattr(codec, "decode", None)):
        message = f"codec has no encode and decode: {type(codec).__name__} is not a codec"
        raise TypeError(message)
