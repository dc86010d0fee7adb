"""The history of a load: one event for each call of a storage's verb.

Invariants:

- Each attempt to write puts a unique token into the session's data. So the data that a later
  load finds names the attempt that wrote it.
- Times are on the monotonic clock, which all processes of a machine share.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
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
    """One call of a verb.

    Attributes:
        verb: One of the names above.
        id: The id of the session.
        start: The time at which the call began.
        end: The time at which it ended.
        client: The number of the client that called.
        outcome: `OK`, or the name of the error's class.
        message: The message of the error.
        in_doubt: Whether the error says that the write may have been applied.
        token: The token that a write stored, or that a load found.
        before: The token that an `UNCHANGED` write replaces.
        count: How often the session had been changed, according to the data written or found.
        existed: The result of a delete.
        late: Seconds from the deadline to the end, without delays of the event loop itself.
        flaws: Broken promises that this call shows by itself.
    """

    verb: str
    id: str
    start: float
    end: float
    client: int = 0
    outcome: str = OK
    message: str = ""
    in_doubt: bool = False
    token: str = ""
    before: str = ""
    count: int = 0
    existed: bool = False
    late: float = 0.0
    flaws: list[str] = []

    @property
    def ok(self) -> bool:
        """Whether the call succeeded."""
        return self.outcome == OK

    @property
    def unavailable(self) -> bool:
        """Whether the call failed with `StorageUnavailable`."""
        return self.outcome == UNAVAILABLE


class Found(msgspec.Struct, frozen=True):
    """The data stored under an id: the token of the write, and the count."""

    token: str
    count: int


def secret_of(id: str) -> str:
    """A secret that belongs to one session. No other client may see it."""
    return hashlib.blake2b(id.encode(), key=b"secret", digest_size=16).hexdigest()


def id_of(seed: str, *name: str | int) -> str:
    """Derive a session id from a name, so that all processes agree on it."""
    return hashlib.blake2b(repr(name).encode(), key=seed.encode(), digest_size=20).hexdigest()


def content(token: str, id: str, count: int) -> dict[str, Any]:
    """The data of a session."""
    return {"secret": secret_of(id), "token": token, "count": count}


def write(events: Iterable[Event], path: Path) -> None:
    """Write events to a file."""
    path.write_bytes(msgspec.msgpack.encode(list(events)))


def read(path: Path) -> list[Event]:
    """Read the events of a file."""
    return msgspec.msgpack.decode(path.read_bytes(), type=list[Event])
