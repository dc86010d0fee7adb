"""Random replies lead to the truth, to their claim, or to an error.

The proxy answers in the place of the server, and the server does not see the command. So a reply
that is wrongly taken for "done" or "not found" shows. AIOSESSIONS_FUZZ sets the number of random
replies; without it, the tests use the same two hundred in every run.
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
    RedisStorage,
    Session,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionNotFound,
    StorageUnavailable,
    When,
    new_session_id,
)
from tests.support.proxy import Cut, Exchange, Fault, FaultProxy
from tests.support.secrets import said_by
from tests.support.servers import Server

_EXAMPLES = int(os.environ.get("AIOSESSIONS_FUZZ", "0"))
_TIMEOUT = 2.0
_SLACK = 1.0  # seconds that a slow machine may take beyond the timeout
_SECRET = "a-secret-in-the-payload"

Storage = RedisStorage[Any]

fuzz = settings(
    max_examples=_EXAMPLES or 200,
    derandomize=not _EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
async def proxy(valkey: Server) -> AsyncIterator[FaultProxy]:
    """A fault proxy for an empty server that knows the scripts."""
    valkey.flush()
    async with Storage.from_url(valkey.url, ttl=600) as direct:
        await direct.store(Session(id="first"), when=When.ABSENT)
        await direct.delete("first")
    async with FaultProxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
async def other(valkey: Server) -> AsyncIterator[Storage]:
    """A storage without the proxy, which sees the truth."""
    async with Storage.from_url(valkey.url, ttl=600) as storage:
        yield storage


@pytest.fixture
async def storage(proxy: FaultProxy) -> AsyncIterator[Storage]:
    """A storage behind the proxy."""
    async with Storage.from_url(proxy.url, ttl=600, timeout=_TIMEOUT) as storage:
        yield storage


# Replies, by https://redis.io/docs/latest/develop/reference/protocol-spec/.

CRLF = b"\r\n"
LINES = st.sampled_from(
    [b"OK", b"", b"QUEUED", b"hello", b"\xff\xfe", b"1", b"-1", b"None", b"x" * 70_000]
)
CODES = [
    "ERR",
    "BUSY",
    "CLUSTERDOWN",
    "EXECABORT",
    "LOADING",
    "MASTERDOWN",
    "MISCONF",
    "NOAUTH",
    "NOPERM",
    "NOREPLICAS",
    "NOSCRIPT",
    "OOM",
    "READONLY",
    "TRYAGAIN",
    "UNKILLABLE",
    "WRONGPASS",
    "WRONGTYPE",
    "lower",
    "",
]
NULLS = (b"$-1\r\n", b"_\r\n", b"*-1\r\n")
INTEGERS = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**63 - 1, -(2**63), 2**63, 2**64, 10**40, -(10**40)]),
    st.integers(),
)


def _bulk(kind: bytes) -> Callable[[bytes], bytes]:
    return lambda text: kind + str(len(text)).encode() + CRLF + text + CRLF


def _many(kind: bytes, each: int = 1) -> Callable[[list[bytes]], bytes]:
    return lambda values: (
        kind + str(len(values) // each).encode() + CRLF + b"".join(values)
        if len(values) % each == 0
        else _many(kind, each)(values[1:])
    )


SCALARS = st.one_of(
    LINES.map(lambda line: b"+" + line + CRLF),
    st.builds(
        lambda code, text: f"-{code} {text}\r\n".encode(),
        st.sampled_from(CODES),
        st.sampled_from(["", "no", "'GETEX', with args beginning with: 'session:<id>'"]),
    ),
    st.sampled_from([b"-MOVED 1 127.0.0.1:1\r\n", b"-ASK 1 127.0.0.1:1\r\n"]),
    INTEGERS.map(lambda number: b":%d\r\n" % number),
    INTEGERS.map(lambda number: b"(%d\r\n" % number),
    st.one_of(LINES, st.binary(max_size=80)).map(_bulk(b"$")),
    LINES.map(lambda line: _bulk(b"=")(b"txt:" + line)),
    LINES.map(_bulk(b"!")),
    st.sampled_from(NULLS),
    st.sampled_from([b"#t\r\n", b"#f\r\n", b"#x\r\n"]),
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
GARBAGE = st.one_of(
    st.binary(min_size=1, max_size=40).map(lambda noise: noise + CRLF),
    st.sampled_from(
        [
            b"$-5\r\n",
            b"$99999999999999999999\r\n",
            b"*99999999999\r\n",
            b"*-7\r\n",
            b"$5\r\nhelloworld\r\n",
            b":\r\n",
            b":1.5\r\n",
            b"-MOVED\r\n",  # servers never put it inside of a map, on which hiredis 3.5 may crash
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            b"\x15\x03\x01\x00\x02\x02\x46",
        ]
    ),
)
TRUNCATED = st.builds(
    lambda value, part: value[: max(1, math.floor(part * len(value)))],
    VALUES,
    st.floats(0, 0.99),
)


# Verbs, and the meaning of their replies.

Verb = Callable[[Storage, Session[Any]], Awaitable[Any]]

SCRIPT = {
    b":1\r\n": None,
    b":0\r\n": SessionNotFound,
    b":-1\r\n": SessionExists,
    b":-2\r\n": SessionConflict,
    b":-3\r\n": CorruptSession,
}


def _store(when: When) -> Verb:
    return lambda storage, session: storage.store(session, when=when)


VERBS: dict[str, tuple[str, Verb]] = {
    "load": ("GETEX", lambda storage, session: storage.load(session.id)),
    "delete": ("EVALSHA", lambda storage, session: storage.delete(session.id)),
    "always": ("SET", _store(When.ALWAYS)),
    "absent": ("EVALSHA", _store(When.ABSENT)),
    "present": ("EVALSHA", _store(When.PRESENT)),
    "unchanged": ("EVALSHA", _store(When.UNCHANGED)),
}


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
    if name == "always":
        return (None,) if reply in (b"+OK\r\n", b"$2\r\nOK\r\n", b"=6\r\ntxt:OK\r\n") else ()
    return (SCRIPT[reply],) if reply in SCRIPT else ()


async def truth(name: str, result: object, session: Session[Any], other: Storage) -> bool:
    """Whether the result is true: the session was there, and the write is in place."""
    if name == "load":
        return result == session
    if name == "delete":
        return result is True and await _gone(other, session)
    if name == "absent":
        return result is SessionExists
    return result is None and (await other.load(session.id)).data == session.data


async def _gone(other: Storage, session: Session[Any]) -> bool:
    try:
        await other.load(session.id)
    except SessionNotFound:
        return True
    return False


async def outcome(verb: Awaitable[Any], session: Session[Any]) -> object:
    """The result of a verb, or the type of its error; check its duration and its texts."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    try:
        result: object = await verb
    except SessionError as error:
        result = type(error)
        texts = said_by(error)
        assert session.id not in texts
        assert _SECRET not in texts
    assert loop.time() - start < _TIMEOUT + _SLACK
    return result


def answer(reply: bytes, *, hang_up: bool) -> Fault:
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


async def check(
    proxy: FaultProxy,
    storage: Storage,
    other: Storage,
    name: str,
    reply: bytes,
    *,
    hang_up: bool = False,
) -> object:
    """Answer one of several concurrent verbs with a reply, and check all results."""
    command, verb = VERBS[name]
    session = await put(other, "old")
    before = msgspec.structs.replace(session)
    if name != "load":
        session.data = [_SECRET, "new"]
    neighbours = [await put(other, number) for number in range(4)]
    first = [outcome(storage.load(each.id), each) for each in neighbours[:2]]
    last = [outcome(storage.load(each.id), each) for each in neighbours[2:]]
    order = proxy.on_request(
        command, answer(reply, hang_up=hang_up), first=3 if name == "load" else 1
    )

    *_, result, third, fourth = results = await asyncio.gather(
        *first, outcome(verb(storage, session), session), *last
    )

    assert order.hits == 1
    proxy.forgive()
    for neighbour, got in zip(neighbours, (*results[:2], third, fourth), strict=True):
        assert got in (neighbour, StorageUnavailable), reply
    if result is not StorageUnavailable and result not in claimed(name, reply):
        expected = session if name != "load" else before
        assert await truth(name, result, expected, other), (name, reply, result)
    if isinstance(result, type):
        assert session.revision == before.revision
    assert await storage.load(neighbours[0].id) == neighbours[0]
    return result


@fuzz
@given(name=st.sampled_from([*VERBS]), reply=VALUES)
@example(name="always", reply=b"$5\r\nhello\r\n")
@example(name="always", reply=b"+QUEUED\r\n")
@example(name="present", reply=b":7\r\n")
@example(name="delete", reply=b":-1\r\n")
@example(name="unchanged", reply=b":9223372036854775807\r\n")
@example(name="load", reply=b"-WRONGTYPE no\r\n")
async def test_any_value_is_claim_or_truth(
    proxy: FaultProxy, storage: Storage, other: Storage, name: str, reply: bytes
) -> None:
    """A value of any type leads to its claim, to the truth, or to `StorageUnavailable`."""
    await check(proxy, storage, other, name, reply)


@fuzz
@given(name=st.sampled_from([*VERBS]), reply=st.one_of(GARBAGE, VALUES, TRUNCATED))
async def test_any_bytes_are_like_lost_connection(
    proxy: FaultProxy, storage: Storage, other: Storage, name: str, reply: bytes
) -> None:
    """Garbage and incomplete replies are like a lost connection."""
    await check(proxy, storage, other, name, reply, hang_up=True)


@fuzz
@given(name=st.sampled_from([*VERBS]), push=PUSHES, after=st.booleans())
async def test_push_messages_are_not_replies(
    proxy: FaultProxy, storage: Storage, other: Storage, name: str, push: bytes, *, after: bool
) -> None:
    """A push message before or after a reply changes nothing, or ends the connection."""
    command, verb = VERBS[name]
    session = await put(other, "old")
    before = msgspec.structs.replace(session)
    if name != "load":
        session.data = [_SECRET, "new"]

    async def fault(exchange: Exchange) -> bytes:
        assert exchange.reply is not None
        return exchange.reply + push if after else push + exchange.reply

    proxy.on_reply(command, fault)
    result = await outcome(verb(storage, session), session)

    proxy.forgive()
    if result is not StorageUnavailable:
        assert await truth(name, result, session if name != "load" else before, other)
    neighbour = await put(other, "neighbour")
    assert await storage.load(neighbour.id) == neighbour


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
async def test_unfinished_reply_ends_in_timeout(
    proxy: FaultProxy, other: Storage, name: str, part: float
) -> None:
    """A reply that never ends fails its call in time, and another connection serves the next."""
    command, verb = VERBS[name]
    session = await put(other, "old")
    revision = session.revision

    async def fault(exchange: Exchange) -> bytes:
        assert exchange.reply is not None
        return exchange.reply[: math.floor(part * len(exchange.reply))]

    proxy.on_reply(command, fault)
    async with Storage.from_url(proxy.url, ttl=600, timeout=0.1) as storage:
        result = await outcome(verb(storage, session), session)

        assert result is StorageUnavailable
        assert session.revision == revision
        neighbour = await put(other, "neighbour")
        assert await storage.load(neighbour.id) == neighbour


@fuzz
@given(reply=st.one_of(VALUES, GARBAGE), turn=st.integers(1, 4))
async def test_any_reply_to_the_handshake(
    proxy: FaultProxy, other: Storage, reply: bytes, turn: int
) -> None:
    """A reply to any command of the handshake leads to the truth, or to an error in time."""
    session = await put(other, "old")
    proxy.on_request("*", answer(reply, hang_up=False), first=turn)
    url = proxy.url.replace("redis://", "redis://user:password-in-the-url@")
    async with Storage.from_url(url, ttl=600, timeout=0.5) as storage:
        result = await outcome(storage.load(session.id), session)
        assert result in (session, StorageUnavailable, *claimed("load", reply))
    proxy.forgive()


@fuzz
@given(
    reply=st.one_of(
        VALUES,
        st.dictionaries(
            st.sampled_from(
                ["redis_version", "valkey_version", "server_name", "role", "maxmemory_policy"]
            ),
            st.text(max_size=20),
        ).map(
            lambda fields: _bulk(b"$")(
                "\r\n".join(f"{name}:{value}" for name, value in fields.items()).encode()
            )
        ),
    )
)
@example(reply=_bulk(b"$")(b"redis_version:" + b"9" * 5_000 + b".0.0"))
async def test_any_reply_to_info(proxy: FaultProxy, storage: Storage, reply: bytes) -> None:
    """`ping` returns the contents of any reply, or raises `StorageUnavailable`."""
    proxy.on_request("INFO", answer(reply, hang_up=False))
    try:
        (health,) = await storage.ping()
    except StorageUnavailable:
        pass
    else:
        assert health.round_trip < _TIMEOUT + _SLACK
    proxy.forgive()
