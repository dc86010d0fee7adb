"""Bad ids, settings, URLs, data and records: each a specific error, and no secret in it.

After each of them it is checked that nothing was stored and nothing was lost. The servers are real.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest
import redis
from redis.asyncio import Redis

from aiosessions import (
    CorruptSession,
    InvalidSession,
    JsonCodec,
    LocalStorage,
    MsgpackCodec,
    RedisStorage,
    Session,
    SessionManager,
    SessionNotFound,
    Storage,
    StorageUnavailable,
    When,
)
from tests.refusals import (
    HEADER,
    ID,
    PASSWORD,
    READS,
    SECRET,
    SECRETS,
    VERBS,
    WRITES,
    Verb,
    contents,
    leaked,
    refused,
)
from tests.servers import Server, deaf_port

# Ids

BAD_IDS: dict[str, Any] = {
    "empty": "",
    "overlong": "x" * 257,
    "space": "a b",
    "space-before": " a",
    "space-after": "a ",
    "newline": "a\nb",
    "newline-after": "a\n",
    "carriage-return": "a\r",
    "tab": "a\tb",
    "nul": "a\x00b",
    "nul-after": "a\x00",
    "delete": "a\x7f",
    "latin": "caf\xe9",
    "wide": "\uff41",
    "surrogate": "a\udc80",
    "bytes": b"a",
    "none": None,
    "int": 1,
}
every_bad_id = pytest.mark.parametrize("id", BAD_IDS.values(), ids=BAD_IDS)


@every_bad_id
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
async def test_a_bad_id_is_refused_without_asking_a_server(verb: Verb, id: Any) -> None:
    """`InvalidSession` even if the server is out of reach: it is not asked, nor sent anything."""
    with deaf_port() as port:
        url = f"redis://127.0.0.1:{port}"
        async with RedisStorage[Any].from_url(url, ttl=60) as storage:
            await refused(verb, storage, Session(id=id), InvalidSession, "session id")


@every_bad_id
async def test_a_bad_id_is_refused_by_the_manager(id: Any) -> None:
    """By each of its methods; None makes `create` draw an id of its own."""
    async with LocalStorage[Any](ttl=60) as storage, SessionManager(storage) as sessions:
        with pytest.raises(InvalidSession):
            await sessions.get(id)
        with pytest.raises(InvalidSession):
            await sessions.delete(id)
        with pytest.raises(InvalidSession):
            await sessions.mutate(id, lambda _: None)
        with pytest.raises(InvalidSession):
            await sessions.save(Session(id=id))
        with pytest.raises(InvalidSession):
            await sessions.rotate(Session(id=id))
        if id is not None:
            with pytest.raises(InvalidSession):
                await sessions.create(id=id)


# Settings

Make = Callable[..., Storage[Any]]


def borrowing(**options: Any) -> Storage[Any]:
    """A storage that borrows a client, which never connects."""
    return RedisStorage[Any](Redis(), **options)


def owning(**options: Any) -> Storage[Any]:
    """A storage that owns a client, which never connects."""
    return RedisStorage[Any].from_url("redis://127.0.0.1:1", **options)


def local(**options: Any) -> Storage[Any]:
    """A storage in process."""
    return LocalStorage[Any](**options)


every_redis = pytest.mark.parametrize("make", [borrowing, owning])
every_maker = pytest.mark.parametrize("make", [borrowing, owning, local])

BAD_DURATIONS: list[Any] = [
    0,
    0.0,
    -0.0,
    -1,
    -0.001,
    0.0004,
    float("nan"),
    float("inf"),
    float("-inf"),
    1e308,
    10**400,
    timedelta(0),
    timedelta(microseconds=1),
    timedelta(seconds=-1),
    timedelta.max,
    timedelta.min,
]


@every_maker
@pytest.mark.parametrize("ttl", BAD_DURATIONS, ids=lambda ttl: repr(ttl)[:40])
async def test_a_ttl_is_positive_and_finite(make: Make, ttl: Any) -> None:
    """Zero, negative, NaN, infinite, or what no server could count: `ValueError`, at once."""
    with pytest.raises(ValueError, match="ttl"):
        make(ttl=ttl)


@every_redis
@pytest.mark.parametrize("timeout", BAD_DURATIONS, ids=lambda timeout: repr(timeout)[:40])
async def test_a_timeout_is_positive_and_finite(make: Make, timeout: Any) -> None:
    """Nobody waits for ever, nor not at all."""
    with pytest.raises(ValueError, match="timeout"):
        make(ttl=60, timeout=timeout)


@every_maker
@pytest.mark.parametrize("ttl", ["60", b"60", None, True, [60], 1j, datetime.now(UTC)], ids=repr)
async def test_a_ttl_is_a_number_or_a_timedelta(make: Make, ttl: Any) -> None:
    """Whatever else it is, the error says so; a text is not guessed at."""
    with pytest.raises(TypeError, match="ttl"):
        make(ttl=ttl)


@every_redis
@pytest.mark.parametrize("key_prefix", ["", "session", ": ", ":session", "a:b", "session:\n"])
async def test_a_key_prefix_ends_with_a_colon(make: Make, key_prefix: str) -> None:
    """Else keys of two prefixes could be the same: `ValueError`."""
    with pytest.raises(ValueError, match="key_prefix"):
        make(ttl=60, key_prefix=key_prefix)


@every_redis
@pytest.mark.parametrize("key_prefix", [b"session:", None, 1, ["session:"]])
async def test_a_key_prefix_is_a_string(make: Make, key_prefix: Any) -> None:
    """Anything else is refused at once, by name."""
    with pytest.raises((TypeError, ValueError), match="key_prefix"):
        make(ttl=60, key_prefix=key_prefix)


@pytest.mark.parametrize(
    "client", [None, "redis://localhost", redis.Redis(), object()], ids=lambda c: type(c).__name__
)
async def test_a_client_is_one_of_redis_asyncio(client: Any) -> None:
    """A URL, or a client that blocks, is refused when the storage is made, not when it is used."""
    with pytest.raises(TypeError, match="client"):
        RedisStorage(client, ttl=60)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "Zq7",
        "localhost:6379/Zq7",
        "user:Zq7@localhost:6379",
        "http://user:Zq7@localhost",
        "redis:user:Zq7@localhost",
        "redis:?password=Zq7",
        "unix:user:Zq7@/tmp/Xv9",
        "valkey://user:Zq7@localhost/Xv9",
        "redis+sentinel://user:Zq7@localhost",
        "redis://user:Zq7/Xv9@localhost",
        "redis://:Zq7/Xv9@localhost",
        "redis://:Zq7/Xv9@localhost/0",
        "redis://:0/Xv9@localhost",
        "redis://user:Zq7#Xv9@localhost",
        "redis://user:Zq7?Xv9@localhost",
        "redis://user:Zq7?db=Xv9@localhost",
        "redis://user:Zq7[Xv9@localhost",
        "redis://user:Zq7@localhost:port",
        "redis://user:Zq7@localhost:Xv9/0",
        "redis://user:Zq7@localhost:99999",
        "redis://user:Zq7@localhost:-1",
        "redis://user:Zq7@[::1",
        "redis://user:Zq7@localhost/Xv9",
        "redis://user:Zq7@localhost/0/1",
        "redis://user:Zq7@localhost/-1",
        "redis://localhost?db=Zq7",
        "redis://localhost?nonsense=Zq7",
        "redis://localhost?socket_timeout=Zq7",
        "redis://localhost?protocol=Zq7",
        "redis://user:Zq7@localhost?health_check_interval=Xv9",
        "unix://user:Zq7@/tmp/Xv9?db=Wk3",
    ],
)
async def test_a_url_that_is_not_understood_is_not_quoted(url: str) -> None:
    """`ValueError` at once; what is wrong may be the password, so no piece of it is told."""
    with pytest.raises(ValueError, match="URL is not understood") as caught:
        RedisStorage.from_url(url, ttl=60)

    assert leaked(caught.value) == []
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "url",
    [
        "REDIS://user:Zq7@localhost",
        " redis://user:Zq7@localhost",
        "\tredis://user:Zq7@localhost",
        "redis://user:Zq7@localhost\n",
        "red\nis://user:Zq7@localhost",
        "redis://user:Zq7\x00@localhost",
        "redis://user:Zq7\ud800@localhost",
        "redis://user:Zq7@local\u2100host",
    ],
    ids=ascii,
)
async def test_an_odd_url_is_taken_or_refused_but_not_quoted(url: str) -> None:
    """Capitals and stray characters: it may be accepted; if not, that is `ValueError` as ever."""
    try:
        storage = RedisStorage[Any].from_url(url, ttl=60)
    except ValueError as error:
        refusal: Exception | None = error
    else:
        refusal = None
        await storage.aclose()

    assert refusal is None or leaked(refusal) == []


@pytest.mark.parametrize("url", [None, b"redis://:Zq7@localhost", 6379, ["redis://:Zq7@x"]])
async def test_a_url_is_a_string(url: Any) -> None:
    """Anything else is refused, without being quoted."""
    with pytest.raises((TypeError, ValueError)) as caught:
        RedisStorage.from_url(url, ttl=60)

    assert leaked(caught.value) == []


async def test_storages_do_not_show_passwords(caplog: pytest.LogCaptureFixture) -> None:
    """Nor does making, showing or failing to connect one log any."""
    caplog.set_level(logging.DEBUG)
    with deaf_port() as port:
        url = f"redis://user:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/0"
        async with RedisStorage[Any].from_url(url, ttl=60, timeout=2) as storage:
            shown = [repr(storage), str(storage), f"{storage}", f"{[storage]}"]
            manager = SessionManager(storage)
            shown += [repr(manager), str(manager)]
            with pytest.raises(StorageUnavailable) as caught:
                await storage.load(ID)

    text = "\n".join([*shown, caplog.text])
    assert [secret for secret in SECRETS if secret in text] == []
    assert leaked(caught.value) == []


# Data and records, in a database


@pytest.fixture
def server(redis_or_valkey: Server) -> Server:
    """An empty server of each kind."""
    redis_or_valkey.flush()
    return redis_or_valkey


@contextmanager
def nothing_changes(server: Server) -> Iterator[None]:
    """Check that what a server holds is the same after the block as it was before."""
    with server.client() as client:
        before = contents(client)
        yield
        assert contents(client) == before


UNSTORABLE: dict[str, dict[str, Any]] = {
    "object": {"data": {SECRET: object()}},
    "surrogate": {"data": f"{SECRET}\ud800"},
    "too-large": {"data": SECRET * 100},
    "naive-created": {"created_at": datetime(2030, 1, 1)},  # noqa: DTZ001 - the point
    "naive-updated": {"updated_at": datetime(2030, 1, 1)},  # noqa: DTZ001 - the point
    "naive-expires": {"expires_at": datetime(2030, 1, 1)},  # noqa: DTZ001 - the point
    "date-of-text": {"expires_at": SECRET},
    "metadata": {"metadata": {SECRET: 1}},
    "kind": {"kind": None},
}


@pytest.mark.parametrize("fields", UNSTORABLE.values(), ids=UNSTORABLE)
@pytest.mark.parametrize("verb", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "stored"])
async def test_what_cannot_be_stored_changes_nothing(
    server: Server, verb: Verb, fields: dict[str, Any], *, exists: bool
) -> None:
    """`InvalidSession`; the server holds what it held, if anything."""
    codec = JsonCodec[Any](max_bytes=500)
    async with RedisStorage[Any].from_url(server.url, ttl=60, codec=codec) as storage:
        session = Session[Any](id=ID)
        if exists:
            await storage.store(session)
        for name, value in fields.items():
            setattr(session, name, value)

        with nothing_changes(server):
            await refused(verb, storage, session, InvalidSession, "")


async def test_naive_moments_are_refused_by_the_sweep(server: Server) -> None:
    """Even where there is nothing to sweep, so that code is not right by luck."""
    naive = datetime(2030, 1, 1)  # noqa: DTZ001 - the point
    async with RedisStorage[Any].from_url(server.url, ttl=60) as storage:
        with pytest.raises(InvalidSession, match="before is a naive datetime"):
            await storage.delete_expired(naive)
    with pytest.raises(InvalidSession, match="before is a naive datetime"):
        await LocalStorage[Any](ttl=60).delete_expired(naive)


OWN = f'{{"id":"{ID}","principal":"{SECRET}"}}'.encode()
# Records whose header cannot be read.
UNREADABLE: dict[str, bytes] = {
    "empty": b"",
    "byte": b"1",
    "text": SECRET.encode() * 10,
    "json": OWN,
    "newer": b"2" + HEADER[1:] + OWN,
    "newest": b"9" + HEADER[1:] + OWN,
    "no-version": b"x" + HEADER[1:] + OWN,
    "truncated-header": HEADER[:31],
    "deadline": HEADER[:17] + b"fifteen-letters" + OWN,
}
# Records with a header in order, and something else below it.
SPOILT: dict[str, bytes] = {
    "no-payload": HEADER,
    "truncated": HEADER + OWN[:-1],
    "garbage": HEADER + b"\x80\x00\xff" + SECRET.encode(),
    "list": HEADER + b"[]",
    "empty-object": HEADER + b"{}",
    "another-codec": HEADER + MsgpackCodec[Any]().encode(Session(id=ID)),
    "swapped": HEADER + b'{"id":"somebody-elses"}',
    "longer-id": HEADER + f'{{"id":"{ID}x"}}'.encode(),
    "another-type": HEADER + f'{{"id":"{ID}","data":"{SECRET}"}}'.encode(),
}
RECORDS = UNREADABLE | SPOILT


@asynccontextmanager
async def spoilt(server: Server, record: bytes | None) -> AsyncIterator[RedisStorage[Any]]:
    """A storage of sessions with integers, and this under the session's key; None is a list."""
    with server.client() as client:
        if record is None:
            client.rpush(f"session:{ID}", SECRET)
        else:
            client.set(f"session:{ID}", record, px=60_000)
    async with RedisStorage.from_url(server.url, ttl=60, codec=JsonCodec(int)) as storage:
        yield storage


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
async def test_a_bad_record_is_corrupt(server: Server, record: bytes) -> None:
    """Neither an empty session, nor somebody else's, nor "not found"; it stays for a look at it."""
    async with spoilt(server, record) as storage:
        with nothing_changes(server):
            for _ in range(2):
                await refused(READS["load"], storage, Session(id=ID), CorruptSession, "")


@pytest.mark.parametrize("record", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("when", [When.ABSENT, When.PRESENT, When.UNCHANGED])
async def test_an_unreadable_record_is_not_overwritten(
    server: Server, record: bytes, when: When
) -> None:
    """Whether a condition holds cannot be told of it, which is `CorruptSession`."""
    async with spoilt(server, record) as storage:
        with nothing_changes(server):
            await refused(
                lambda storage, session: storage.store(session, when=when),
                storage,
                Session(id=ID, revision="AbCd-_0123456789"),
                CorruptSession,
                "",
            )


async def test_a_key_of_another_type_is_corrupt(server: Server) -> None:
    """A list under a session's key is somebody else's: it is said to be there, and kept."""
    async with spoilt(server, None) as storage:
        with nothing_changes(server):
            for name in ("load", "store-absent", "store-present", "store-unchanged"):
                await refused(VERBS[name], storage, Session(id=ID), CorruptSession, "no string")


@pytest.mark.parametrize("record", [*RECORDS.values(), None], ids=[*RECORDS, "list-key"])
async def test_a_bad_record_can_be_overwritten(server: Server, record: bytes | None) -> None:
    """On purpose: `When.ALWAYS` needs to know nothing of what it replaces."""
    async with spoilt(server, record) as storage:
        session = Session[int](id=ID, data=1)
        await storage.store(session)

        assert await storage.load(ID) == session


@pytest.mark.parametrize("record", [*RECORDS.values(), None], ids=[*RECORDS, "list-key"])
async def test_a_bad_record_can_be_deleted(server: Server, record: bytes | None) -> None:
    """There was one, whatever it was; now there is none."""
    async with spoilt(server, record) as storage:
        assert await storage.delete(ID) is True
        assert await storage.delete(ID) is False
        with pytest.raises(SessionNotFound):
            await storage.load(ID)


async def test_swapped_records_reach_nobody(server: Server) -> None:
    """Two sessions whose values were exchanged: neither client gets the other's session."""
    async with RedisStorage[Any].from_url(server.url, ttl=60) as storage:
        await storage.store(Session(id="mine", data=SECRET))
        await storage.store(Session(id="yours", data=SECRET))
        with server.client() as client:
            client.rename("session:mine", "session:x")
            client.rename("session:yours", "session:mine")
            client.rename("session:x", "session:yours")

        for id in ("mine", "yours"):
            await refused(READS["load"], storage, Session(id=id), CorruptSession, "another session")
