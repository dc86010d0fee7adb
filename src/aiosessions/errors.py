"""The errors that sessions raise, and the HTTP status a proxy answers each of them with.

Invariants:

- Every error that leaves this package, other than a wrong argument to a constructor, is a
  `SessionError`.
- Messages name the cause. They never carry a session id, a payload or a password, because messages
  end up in logs.
- An outage is `StorageUnavailable`, never `SessionNotFound`: "I cannot look" and "there is none"
  ask for different answers.
"""

from typing import ClassVar


class SessionError(Exception):
    """The base of every error that sessions raise.

    Attributes:
        status: The HTTP status that a proxy or web service would answer with.
    """

    status: ClassVar[int] = 500


class InvalidSession(SessionError, ValueError):
    """The session cannot be stored, or the id cannot be one, whatever the storage holds.

    Raised for an id that is not 1 to 256 visible ASCII characters, a naive datetime, data that the
    codec cannot encode, and data that is too large once encoded.
    """

    status = 400


class SessionNotFound(SessionError, LookupError):
    """There is no such session: never created, deleted, idle past its TTL or past `expires_at`."""

    status = 404


class SessionExists(SessionError):
    """`When.ABSENT` found a session with this id."""

    status = 409


class SessionConflict(SessionError):
    """`When.UNCHANGED` found another revision: someone has written since the session was loaded."""

    status = 409


class CorruptSession(SessionError):
    """What is stored under the id is not a session that this codec and release can read.

    Raised for a record that does not decode or does not validate against the data type, claims a
    newer format, or holds a session whose id is not the id that was asked for.
    """

    status = 500


class StorageUnavailable(SessionError):
    """The backend did not answer, or refused to: nothing is known about the session.

    Raised for timeouts, connection and authentication failures, read-only replicas, servers that
    are out of memory, loading, or too old, and clusters that are down. After a failed write it is
    unknown whether the write was applied.
    """

    status = 503


class StorageClosed(SessionError):
    """The storage was used after `aclose`."""

    status = 503
