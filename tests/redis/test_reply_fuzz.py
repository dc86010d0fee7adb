"""Random replies lead to the truth, to their claim, or to an error.

The proxy answers in the place of the server, and the server does not see the command. So a reply
that is wrongly taken for "done" or "not found" shows. AIOSESSIONS_FUZZ sets the number of random
replies; without it, the tests use the same ones in every run.
"""

import asyncio
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aiosessions import (
    CorruptSession,
    Session,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionNotFound,
    StorageUnavailable,
    When,
    new_session_id,
)
from tests.support.clients import LONG, Storage, recovered, storage_at
from tests.support.proxy import Cut, Exchange, Fault, FaultProxy
from tests.support.secrets import VERBS, said_by

_EXAMPLES = int(os.environ.get("AIOSESSIONS_FUZZ", "0"))
_SECRET = "a-secret-in-the-payload"


def fuzz(examples: int) -> settings:
    """The settings of a test with so many examples by default."""
    return settings(
        max_examples=_EXAMPLES or examples,
        derandomize=not _EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture
async def storage(proxy: FaultProxy, other: Storage) -> AsyncIterator[Storage]:
    """A storage behind the proxy, on a server that knows the scripts."""
    await other.store(Session(id="first"), when=When.ABSENT)
    await other.delete("first")
    async with storage_at(proxy.url, ttl=600, timeout=2.0) as storage:
        yield storage


# Replies, by https://redis.io/docs/latest/develop/reference/protocol-spec/.

CRLF = b"\r\n"
LINES = st.sampled_from(
    [b"OK", b"", b"QUEUED", b"hello", b"\xff\xfe", b"1", b"-1", b"None", b"x" * 70_000]
)
CODES = """
ERR BUSY CLUSTERDOWN EXECABORT LOADING MASTERDOWN MISCONF NOAUTH NOPERM NOREPLICAS NOSCRIPT OOM
READONLY TRYAGAIN UNKILLABLE WRONGPASS WRONGTYPE lower
"""
NULLS = (b"$-1\r\n", b"_\r\n", b"*-1\r\n")
INTEGERS = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**63 - 1, -(2**63), 2**63, 2**64, 10**40, -(10**40)]),
)


def _bulk(kind: bytes) -> Callable[[bytes], bytes]:
    return lambda text: kind + str(len(text)).encode() + CRLF + text + CRLF


def _many(kind: bytes, each: int = 1) -> Callable[[list[bytes]], bytes]:
    return lambda values: (
        kind
        + str(len(values) // each).encode()
        + CRLF
        + b"".join(values[: len(values) // each * each])
    )


SCALARS = st.one_of(
    LINES.map(lambda line: b"+" + line + CRLF),
    st.builds(
        lambda code, text: f"-{code} {text}\r\n".encode(),
        st.sampled_from(CODES.split()),
        st.sampled_from(["", "no", "'GETEX', with args beginning with: 'session:<id>'"]),
    ),
    st.sampled_from([b"-MOVED 1 127.0.0.1:1\r\n", b"-ASK 1 127.0.0.1:1\r\n"]),
    INTEGERS.map(lambda number: b":%d\r\n" % number),
    INTEGERS.map(lambda number: b"(%d\r\n" % number),
    st.one_of(LINES, st.binary(max_size=80)).map(_bulk(b"$")),
    LINES.map(lambda line: _bulk(b"=")(b"txt:" + line)),
    LINES.map(_bulk(b"!")),
    st.sampled_from([*NULLS, b"#t\r\n", b"#f\r\n", b"#x\r\n"]),
    st.sampled_from([b",1.5\r\n", b",inf\r\n", b",nan\r\n", b",-inf\r\n", b",x\r\n"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(_many(b"*")),
        st.lists(inner, max_size=4).map(_many(b"~")),
        st.lists(inner, max_size=4).map(_many(b"%", 2)),
    ),
    max_leaves=8,
)
# Push messages and attributes are not replies.
PUSHES = st.one_of(
    st.lists(SCALARS, min_size=1, max_size=3).map(_many(b">")),
    st.sampled_from(
        [
            b">2\r\n$10\r\ninvalidate\r\n*1\r\n$3\r\nkey\r\n",
            b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nm\r\n",
            b">4\r\n$6\r\nMOVING\r\n:1\r\n:2\r\n$11\r\n127.0.0.1:1\r\n",
            b"|1\r\n+ttl\r\n:3600\r\n",
        ]
    ),
)
# Servers never put "-MOVED" without words into a map, on which hiredis 3.5 may crash.
BAD_LINES = """
$-5 $99999999999999999999 *99999999999 *-7 : :1.5 -MOVED HTTP/1.1 \x15\x03\x01\x00\x02\x02\x46
"""
GARBAGE = st.one_of(
    st.binary(min_size=1, max_size=40), st.sampled_from(BAD_LINES.split()).map(str.encode)
).map(lambda noise: noise + CRLF)
TRUNCATED = st.builds(
    lambda value, part: value[: max(1, math.floor(part * len(value)))], VALUES, st.floats(0, 0.99)
)
# A reply, and whether the server hangs up after it.
REPLIES = st.one_of(
    st.tuples(VALUES, st.booleans()), st.tuples(st.one_of(GARBAGE, TRUNCATED), st.just(value=True))
)


# Verbs, and the meaning of their replies.

SCRIPT = {
    b":1\r\n": None,
    b":0\r\n": SessionNotFound,
    b":-1\r\n": SessionExists,
    b":-2\r\n": SessionConflict,
    b":-3\r\n": CorruptSession,
}
each_name = st.sampled_from([*VERBS])


def command(name: str) -> str:
    """The command of a verb."""
    return "GETEX" if name == "load" else "EVALSHA"


def claimed(name: str, reply: bytes) -> tuple[object, ...]:
    """The results that a reply claims, even if they are not true."""
    if reply.startswith(b"-WRONGTYPE"):
        return (CorruptSession,)
    if name == "load":
        if reply in NULLS:
            return (SessionNotFound,)
        return (CorruptSession,) if reply[:1] in b"+$=(" else ()
    if name == "delete":
        return {b":1\r\n": (True,), b":0\r\n": (False,)}.get(reply, ())
    return (SCRIPT[reply],) if reply in SCRIPT else ()


async def outcome(verb: Awaitable[Any], session: Session[Any]) -> object:
    """The result of a verb, or the type of its error; check the texts of the error."""
    try:
        async with asyncio.timeout(LONG):
            return await verb
    except SessionError as error:
        texts = said_by(error)
        assert session.id not in texts
        assert _SECRET not in texts
        return type(error)


def answer(reply: bytes, *, hang_up: bool = False) -> Fault:
    """Make a fault that answers a request in its turn, and hides it from the server."""

    async def say(exchange: Exchange) -> bytes:
        exchange.tunnel.say(reply)
        if hang_up:
            raise Cut
        return b""

    async def fault(exchange: Exchange) -> bytes:
        exchange.faults.append(say)
        return b"*1\r\n$4\r\nPING\r\n"

    return fault


async def put(other: Storage, data: object) -> Session[Any]:
    """Store a session with a secret."""
    session = Session[Any](id=new_session_id(), data=[_SECRET, data])
    await other.store(session)
    return session


class Trial:
    """A stored session, and a verb for it that gets a spoilt reply.

    Attributes:
        session: The session. For a write it has new data.
    """

    def __init__(self, name: str, session: Session[Any]) -> None:
        self.session = session
        self._before = msgspec.structs.replace(session)
        self._name = name
        if name != "load":
            session.data = [_SECRET, "new"]

    async def run(self, storage: Storage) -> object:
        """Call the verb."""
        return await outcome(VERBS[self._name](storage, self.session), self.session)

    async def check(self, result: object, other: Storage, reply: bytes = b"") -> None:
        """Check that a result is the truth, the claim of the reply, or `StorageUnavailable`."""
        if isinstance(result, type):
            assert self.session.revision == self._before.revision
        if result is not StorageUnavailable and result not in claimed(self._name, reply):
            assert await self._is_true(result, other), (self._name, reply, result)

    async def _is_true(self, result: object, other: Storage) -> bool:
        """Whether the session was there, and the write is in place."""
        if self._name == "load":
            return result == self._before
        if self._name == "store-absent":
            return result is SessionExists
        stored = await outcome(other.load(self.session.id), self.session)
        if self._name == "delete":
            return result is True and stored is SessionNotFound
        return result is None and isinstance(stored, Session) and stored.data == self.session.data


@pytest.mark.slow
@fuzz(200)
@given(name=each_name, reply=REPLIES)
@example(name="store-always", reply=(b"$5\r\nhello\r\n", False))
@example(name="store-always", reply=(b"+OK\r\n", False))
@example(name="store-present", reply=(b":7\r\n", False))
@example(name="delete", reply=(b":-1\r\n", False))
@example(name="store-unchanged", reply=(b":9223372036854775807\r\n", False))
@example(name="load", reply=(b"-WRONGTYPE no\r\n", False))
async def test_any_reply_is_claim_or_truth(
    proxy: FaultProxy, storage: Storage, other: Storage, name: str, reply: tuple[bytes, bool]
) -> None:
    """Any bytes lead to their claim, to the truth, or to `StorageUnavailable`, for one verb."""
    said, hang_up = reply
    trial = Trial(name, await put(other, "old"))
    neighbours = [await put(other, number) for number in range(4)]
    loads = [outcome(storage.load(each.id), each) for each in neighbours]
    fault = answer(said, hang_up=hang_up)
    order = proxy.on_request(command(name), fault, first=3 if name == "load" else 1)

    first, second, result, *rest = await asyncio.gather(*loads[:2], trial.run(storage), *loads[2:])

    assert order.hits == 1
    proxy.forgive()
    for neighbour, loaded in zip(neighbours, (first, second, *rest), strict=True):
        assert loaded in (neighbour, StorageUnavailable), said
    await trial.check(result, other, said)
    await recovered(storage, neighbours[0])


@fuzz(60)
@given(name=each_name, push=PUSHES, after=st.booleans())
async def test_push_messages_are_not_replies(
    proxy: FaultProxy, storage: Storage, other: Storage, name: str, push: bytes, *, after: bool
) -> None:
    """A push message before or after a reply changes nothing, or ends the connection."""
    trial, neighbour = Trial(name, await put(other, "old")), await put(other, "neighbour")

    async def fault(exchange: Exchange) -> bytes:
        assert exchange.reply is not None
        return exchange.reply + push if after else push + exchange.reply

    proxy.on_reply(command(name), fault)
    result = await trial.run(storage)

    proxy.forgive()
    await trial.check(result, other)
    await recovered(storage, neighbour)


@fuzz(60)
@given(reply=st.one_of(VALUES, GARBAGE), turn=st.integers(1, 4))
async def test_any_reply_to_the_handshake(
    proxy: FaultProxy, other: Storage, reply: bytes, turn: int
) -> None:
    """A reply to any command of the handshake leads to the truth, or to an error in time."""
    session = await put(other, "old")
    proxy.on_request("*", answer(reply), first=turn)
    url = proxy.url.replace("redis://", "redis://user:password-in-the-url@")
    async with storage_at(url, timeout=0.2) as storage:
        result = await outcome(storage.load(session.id), session)
        assert result in (session, StorageUnavailable, *claimed("load", reply))
    proxy.forgive()


FIELDS = st.sampled_from(
    ["redis_version", "valkey_version", "server_name", "role", "maxmemory_policy"]
)
INFO = st.dictionaries(FIELDS, st.text(max_size=20)).map(
    lambda fields: "\r\n".join(f"{name}:{value}" for name, value in fields.items()).encode()
)


@fuzz(40)
@given(reply=st.one_of(VALUES, INFO.map(_bulk(b"$"))))
@example(reply=_bulk(b"$")(b"redis_version:" + b"9" * 5_000 + b".0.0"))
async def test_any_reply_to_info(proxy: FaultProxy, storage: Storage, reply: bytes) -> None:
    """`ping` returns the contents of any reply, or raises `StorageUnavailable`."""
    proxy.on_request("INFO", answer(reply))
    try:
        (health,) = await storage.ping()
    except StorageUnavailable:
        pass
    else:
        assert health.available
    proxy.forgive()
