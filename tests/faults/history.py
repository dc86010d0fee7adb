"""The history of a load: one event for each call of a verb.

Invariants:

- Each attempt to write puts a unique token into the session's data. So the data that a later
  load finds names the attempt that wrote it.
- Times are on the monotonic clock, which all processes of a machine share.
"""

import hashlib
import re
from typing import Any

import msgspec

OK = "ok"
UNAVAILABLE = "StorageUnavailable"

LOAD = "load"
DELETE = "delete"
LIST = "list"
REVOKE_ALL = "revoke_all"
# Writes have the names of their conditions.
ABSENT = "absent"
UNCHANGED = "unchanged"
PRESENT = "present"
ALWAYS = "always"

LATE = "the server did not answer in time"

CLIENTS = 1_000
"""The numbers of clients that each process has."""

MAX_REPLICATION_LAG = 0.5
"""Seconds between a write and its arrival at a replica."""


# The address, and the remark about doubt, which both differ between errors of one cause.
_TAIL = re.compile(r" \([^()]*\)(; the write may have been applied)?$")


class Event(msgspec.Struct, array_like=True, omit_defaults=True):
    """One call of a verb."""

    verb: str
    id: str
    start: float
    end: float
    client: int = 0  # unique over all processes
    outcome: str = OK  # or the name of the error's class
    message: str = ""  # of the error
    in_doubt: bool = False  # the error says that the write may have been applied
    token: str = ""  # that a write stored, or that a load found
    before: str = ""  # the token that an `UNCHANGED` write replaces
    count: int = 0  # of the changes so far, according to the data written or found
    existed: bool = False  # the result of a delete
    principal: str = ""  # of the session that was written or found, or of the call
    marked: bool = False  # the session written or found was rotated away
    origin: str = ""  # the digest of the session that a rotation moves to this id
    digests: list[str] = []  # the sessions of a list; the session that a revocation keeps
    staleness: float = 0.0  # of a load through a cache: its `max_staleness`
    announced: bool = False  # before and after the call, the cache got announcements
    late: float = 0.0  # seconds from the deadline to the end, without delays of the event loop
    flaws: list[str] = []  # broken promises that this call shows by itself

    @property
    def ok(self) -> bool:
        """Whether the call succeeded."""
        return self.outcome == OK

    @property
    def since(self) -> float:
        """The earliest time at which the result may have been right."""
        return self.start - self.staleness

    @property
    def process(self) -> int:
        """The process of the client."""
        return self.client // CLIENTS

    def follows(self, other: "Event") -> bool:
        """Whether the other call had ended when this one began, and its effect was visible.

        A cache shows the writes of its own process at once.
        """
        own = self.process == other.process and other.verb not in (LOAD, LIST)
        return other.end < (self.start if own else self.since)

    @property
    def may_be_applied(self) -> bool:
        """Whether the call succeeded, or is in doubt."""
        return self.ok or self.in_doubt

    @property
    def unavailable(self) -> bool:
        """Whether the call failed with `StorageUnavailable`."""
        return self.outcome == UNAVAILABLE


class Found(msgspec.Struct, frozen=True):
    """The data stored under an id: the token of the write, and the count of changes."""

    token: str
    count: int
    marked: bool = False  # rotated away
    indexed: bool = True  # the index of its principal, if it has one, holds it


def cause(message: str) -> str:
    """The message of a `StorageUnavailable` without the parts that differ from server to server."""
    return _TAIL.sub("", message)


def secret_of(id: str) -> str:
    """A secret that belongs to one session. No other client may see it."""
    return hashlib.blake2b(id.encode(), key=b"secret", digest_size=16).hexdigest()


def id_of(seed: str, *name: str | int) -> str:
    """Derive a session id from a name, so that all processes agree on it."""
    return hashlib.blake2b(repr(name).encode(), key=seed.encode(), digest_size=20).hexdigest()


def content(id: str) -> dict[str, Any]:
    """The data of a new session."""
    return {"secret": secret_of(id), "token": "", "count": 0}
