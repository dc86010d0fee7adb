"""The errors of this package, each with the HTTP status that a proxy would answer.

Invariants:

- Every error that a verb raises is a `SessionError`, except for wrong arguments: a wrong type
  raises `TypeError`, and a wrong value of a setting raises `ValueError`.
- Messages name the cause. They never hold a session id, a payload or a password, because messages
  end up in logs.
- An outage is `StorageUnavailable`, never `SessionNotFound`: "I cannot look" and "there is none"
  need different answers.
"""

from typing import ClassVar


class SessionError(Exception):
    """The base of every error of this package.

    Attributes:
        status: The HTTP status that a proxy or web service would answer with.
    """

    status: ClassVar[int] = 500


class InvalidSession(SessionError, ValueError):
    """The application tried to store a session that cannot be stored.

    Raised for a naive datetime, for data that the codec cannot encode or that is not of its data
    type, for a session that is too large once encoded, for a changed principal, and for a reserved
    metadata key.
    """


class InvalidSessionId(InvalidSession):
    """The id is not 1 to 256 visible ASCII characters (0x21 to 0x7E). Clients send such ids."""

    status = 400


class SessionNotFound(SessionError, LookupError):
    """There is no such session: never stored, deleted, idle past its TTL, or past `expires_at`."""

    status = 404


class SessionExists(SessionError):
    """`When.ABSENT` found a session with this id."""

    status = 409


class SessionConflict(SessionError):
    """`When.UNCHANGED` found another revision: the session was written since it was loaded."""

    status = 409


class SessionRotated(SessionConflict):
    """The id was rotated away. It accepts no writes; the session continues under its new id."""


class CorruptSession(SessionError):
    """The stored record is not a session that this codec and this release can read.

    Raised for a record that does not decode or does not validate against the data type, that
    claims a newer format, or that holds a session with another id.
    """

    status = 500


class StorageUnavailable(SessionError):
    """The backend did not answer or refused to answer, so nothing is known about the session.

    Raised for timeouts, connection and authentication failures, read-only replicas, full queues,
    servers that are out of memory, loading or too old, and clusters that are down.

    Args:
        message: The cause.
        in_doubt: See the attribute.

    Attributes:
        in_doubt: True if a write may have been applied although this error was raised. False if
            nothing was written.
    """

    status = 503

    def __init__(self, message: str = "", *, in_doubt: bool = False) -> None:
        super().__init__(message)
        self.in_doubt = in_doubt


class StorageClosed(SessionError):
    """The storage was used after `aclose`, or was closed during the call.

    Args:
        message: The cause.
        in_doubt: See the attribute.

    Attributes:
        in_doubt: True if a write may have been applied before the storage was closed.
    """

    status = 503

    def __init__(self, message: str = "", *, in_doubt: bool = False) -> None:
        super().__init__(message)
        self.in_doubt = in_doubt


class StorageMisused(SessionError, RuntimeError):
    """The storage belongs to another event loop that still runs, or to a process that forked."""

    status = 500
