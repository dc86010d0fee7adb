"""The history of a load: one event for each call of a verb.

Invariants:

- Each attempt to write puts a unique token into the session's data. So the data that a later
  load finds names the attempt that wrote it.
- Times are on the monotonic clock, which all processes of a machine share.
"""

import hashlib
from typing import Any

import msgspec

OK = "ok"
UNAVAILABLE = "StorageUnavailable"

LOAD = "load"
DELETE = "delete"
# Writes have the names of their conditions.
ABSENT = "absent"
UNCHANGED = "unchanged"
PRESENT = "present"
ALWAYS = "always"


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
    late: float = 0.0  # seconds from the deadline to the end, without delays of the event loop
    flaws: list[str] = []  # broken promises that this call shows by itself

    @property
    def ok(self) -> bool:
        """Whether the call succeeded."""
        return self.outcome == OK

    @property
    def unavailable(self) -> bool:
        """Whether the call failed with `StorageUnavailable`."""
        return self.outcome == UNAVAILABLE


class Found(msgspec.Struct, frozen=True):
    """The data stored under an id: the token of the write, and the count of changes."""

    token: str
    count: int


def secret_of(id: str) -> str:
    """A secret that belongs to one session. No other client may see it."""
    return hashlib.blake2b(id.encode(), key=b"secret", digest_size=16).hexdigest()


def id_of(seed: str, *name: str | int) -> str:
    """Derive a session id from a name, so that all processes agree on it."""
    return hashlib.blake2b(repr(name).encode(), key=seed.encode(), digest_size=20).hexdigest()


def content(id: str) -> dict[str, Any]:
    """The data of a new session."""
    return {"secret": secret_of(id), "token": "", "count": 0}
