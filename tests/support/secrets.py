"""Secrets that no message may reveal, and checks that a verb fails without revealing one."""

from collections.abc import Awaitable, Callable
from traceback import TracebackException
from typing import Any

import msgspec
import pytest
import redis

from aiosessions import Session, SessionError, Storage, When


def chain_of(error: BaseException) -> list[BaseException]:
    """An error, its causes and its contexts.

    A context that `from None` hides is included, because error trackers record it.
    """
    chain: list[BaseException] = []
    rest: list[BaseException | None] = [error]
    while rest:
        each = rest.pop()
        if each is not None and each not in chain:
            chain.append(each)
            rest += [each.__cause__, each.__context__]
    return chain


def said_by(error: BaseException) -> str:
    """The texts and the attributes of an error and of its chain."""
    return "\n".join(f"{each}\n{each!r}\n{vars(each)!r}" for each in chain_of(error))


def locals_in(error: BaseException) -> str:
    """The tracebacks of an error and of its chain, with the local variables of every frame."""
    return "".join(
        line
        for each in chain_of(error)
        for line in TracebackException.from_exception(each, capture_locals=True).format(chain=False)
    )


ID = "credential-0123456789"
SECRET = "hunter2-is-secret"
# Every special character of a URL is in it.
PASSWORD = "Zq7/Xv9@Wk3:Jp5#Ym1?Tn8%Bc6 [Fd4]"
PIECES = ("Zq7", "Xv9", "Wk3", "Jp5", "Ym1", "Tn8", "Bc6", "Fd4")
SECRETS = (ID, SECRET, *PIECES)

HEADER = b"1AbCd-_01234.MdOG999999999999999"
"""The header of a record without a deadline."""


def secretive() -> Session[Any]:
    """A session with a secret in every field that may hold one."""
    return Session(id=ID, principal=SECRET, metadata={"a": SECRET}, data={"b": SECRET})


def leaked(error: BaseException) -> list[str]:
    """The secrets that an error or its chain reveals."""
    said = said_by(error)
    return [secret for secret in SECRETS if secret in said]


Verb = Callable[[Storage[Any], Session[Any]], Awaitable[object]]
READS: dict[str, Verb] = {"load": lambda storage, session: storage.load(session.id)}
WRITES: dict[str, Verb] = {
    "store-always": lambda storage, session: storage.store(session),
    "store-absent": lambda storage, session: storage.store(session, when=When.ABSENT),
    "store-present": lambda storage, session: storage.store(session, when=When.PRESENT),
    "store-unchanged": lambda storage, session: storage.store(session, when=When.UNCHANGED),
}
DELETES: dict[str, Verb] = {"delete": lambda storage, session: storage.delete(session.id)}
VERBS = READS | WRITES | DELETES


async def refused(
    verb: Verb, storage: Storage[Any], session: Session[Any], kind: type[SessionError], hint: str
) -> None:
    """Check that a verb raises an error with a hint, and leaves the session unchanged.

    Args:
        verb: The verb.
        storage: The storage to use.
        session: The session to use.
        kind: The exact type of the error.
        hint: A part of the message.
    """
    before = msgspec.structs.asdict(session)
    with pytest.raises(kind) as caught:
        await verb(storage, session)
    assert type(caught.value) is kind
    assert hint in str(caught.value)
    assert not getattr(caught.value, "in_doubt", False)
    assert leaked(caught.value) == []
    assert msgspec.structs.asdict(session) == before


def contents(client: "redis.Redis") -> dict[bytes, Any]:
    """The serialised values of all keys of a server."""
    keys: Any = client.keys("*")
    return {key: client.dump(key) for key in keys}
