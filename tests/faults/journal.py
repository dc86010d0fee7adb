"""What a load leaves behind: one event for every verb of a storage that was used.

Invariants:

- Every attempt to write bears a token of its own, in the session's data. So whatever is found later
  tells which attempt wrote it.
- Moments are on the monotonic clock, which all processes of a machine share.
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
# Writes are called by their condition.
ABSENT = "absent"
UNCHANGED = "unchanged"
PRESENT = "present"
ALWAYS = "always"


class Event(msgspec.Struct, array_like=True, omit_defaults=True):
    """One use of a verb.

    Attributes:
        verb: One of the names above.
        id: The session's id.
        start: When it began.
        end: When it ended.
        caller: Who used it, by number.
        outcome: `OK`, or the name of the error's class.
        message: The error's message.
        token: Of a write, its own; of a load, that of the write it has found.
        before: Of an `UNCHANGED` write, the token of the write that it goes over.
        count: How often the session had been changed, by what was written or found.
        existed: What a delete has said.
        late: Seconds by which it missed its deadline, without what the process itself is to blame
            for.
        flaws: What is wrong with it, whatever else happened.
    """

    verb: str
    id: str
    start: float
    end: float
    caller: int = 0
    outcome: str = OK
    message: str = ""
    token: str = ""
    before: str = ""
    count: int = 0
    existed: bool = False
    late: float = 0.0
    flaws: list[str] = []

    @property
    def ok(self) -> bool:
        """Whether it was acknowledged."""
        return self.outcome == OK

    @property
    def unknown(self) -> bool:
        """Whether it may have been applied or not."""
        return self.outcome == UNAVAILABLE


class Found(msgspec.Struct, frozen=True):
    """What is stored under an id: the token of the write that did, and the count."""

    token: str
    count: int


def secret_of(id: str) -> str:
    """What belongs to a session and to no other, and must not be told to anybody else."""
    return hashlib.blake2b(id.encode(), key=b"secret", digest_size=16).hexdigest()


def id_of(seed: str, *name: str | int) -> str:
    """A session id that all who know the seed agree on."""
    return hashlib.blake2b(repr(name).encode(), key=seed.encode(), digest_size=20).hexdigest()


def content(token: str, id: str, count: int) -> dict[str, Any]:
    """The data of a session."""
    return {"secret": secret_of(id), "token": token, "count": count}


def write(events: Iterable[Event], path: Path) -> None:
    """Leave a journal in a file."""
    path.write_bytes(msgspec.msgpack.encode(list(events)))


def read(path: Path) -> list[Event]:
    """The journal in a file."""
    return msgspec.msgpack.decode(path.read_bytes(), type=list[Event])
