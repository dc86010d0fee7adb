"""Invalid ids, settings, URLs and sessions: each is a specific error that reveals no secret."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
import redis
from redis.asyncio import Redis

from aiosessions import (
    InvalidSession,
    InvalidSessionId,
    JsonCodec,
    LocalStorage,
    RedisStorage,
    Session,
    SessionManager,
    Storage,
    StorageUnavailable,
)
from tests.support.secrets import (
    ID,
    PASSWORD,
    SECRET,
    SECRETS,
    VERBS,
    WRITES,
    Verb,
    contents,
    leaked,
    refused,
)
from tests.support.servers import Server, refused_port

# Ids.

BAD_IDS: dict[str, str] = {
    "empty": "",
    "overlong": "x" * 257,
    "space": "a b",
    "newline-after": "a\n",
    "nul": "a\x00b",
    "delete": "a\x7f",
    "latin": "caf\xe9",
    "wide": "\uff41",
    "surrogate": "a\udc80",
}
OTHER_TYPES: list[Any] = [b"a", None, 1]


def unreachable() -> RedisStorage[Any]:
    """A storage without a server, so that it can only refuse."""
    return RedisStorage[Any].from_url("redis://127.0.0.1:1", ttl=60)


@pytest.mark.parametrize("id", BAD_IDS.values(), ids=BAD_IDS)
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
async def test_invalid_id_is_refused_without_a_server(verb: Verb, id: str) -> None:
    """`InvalidSessionId` also if the server cannot be reached, because it is not asked."""
    async with unreachable() as storage:
        await refused(verb, storage, Session(id=id), InvalidSessionId, "session id")


@pytest.mark.parametrize("id", OTHER_TYPES, ids=repr)
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
async def test_id_of_another_type_is_a_type_error(verb: Verb, id: Any) -> None:
    """An id that is not a string is a mistake in the application."""
    async with unreachable() as storage:
        with pytest.raises(TypeError, match="a session id is a str"):
            await verb(storage, Session(id=id))


MANAGER_CALLS: dict[str, Callable[[SessionManager[Any], Any], Any]] = {
    "get": lambda sessions, id: sessions.get(id),
    "delete": lambda sessions, id: sessions.delete(id),
    "mutate": lambda sessions, id: sessions.mutate(id, lambda _: None),
    "save": lambda sessions, id: sessions.save(Session(id=id)),
    "rotate": lambda sessions, id: sessions.rotate(Session(id=id)),
    "create": lambda sessions, id: sessions.create(id=id),
}


@pytest.mark.parametrize("call", MANAGER_CALLS.values(), ids=MANAGER_CALLS)
async def test_manager_refuses_invalid_ids(
    call: Callable[[SessionManager[Any], Any], Any],
) -> None:
    """Every method of the manager that takes an id checks it."""
    async with LocalStorage[Any](ttl=60) as storage, SessionManager(storage) as sessions:
        for id in BAD_IDS.values():
            with pytest.raises(InvalidSessionId):
                await call(sessions, id)
        with pytest.raises(TypeError):
            await call(sessions, b"a")


# Settings.

Make = Callable[..., Storage[Any]]


def borrowing(**options: Any) -> Storage[Any]:
    """A storage that borrows a client, which never connects."""
    return RedisStorage[Any](Redis(), **options)


def owning(**options: Any) -> Storage[Any]:
    """A storage that owns a client, which never connects."""
    return RedisStorage[Any].from_url("redis://127.0.0.1:1", **options)


def local(**options: Any) -> Storage[Any]:
    """A storage in this process."""
    return LocalStorage[Any](**options)


every_redis = pytest.mark.parametrize("make", [borrowing, owning])
every_maker = pytest.mark.parametrize("make", [borrowing, owning, local])

BAD_DURATIONS: list[Any] = [
    0,
    -0.0,
    -1,
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
]
every_bad_duration = pytest.mark.parametrize(
    "duration", BAD_DURATIONS, ids=lambda duration: repr(duration)[:40]
)


@every_maker
@every_bad_duration
async def test_ttl_is_positive_and_finite(make: Make, duration: Any) -> None:
    """Another TTL is a `ValueError` at construction."""
    with pytest.raises(ValueError, match="ttl"):
        make(ttl=duration)


@every_redis
@every_bad_duration
async def test_timeout_is_positive_and_finite(make: Make, duration: Any) -> None:
    """Another timeout is a `ValueError` at construction."""
    with pytest.raises(ValueError, match="timeout"):
        make(ttl=60, timeout=duration)


@every_maker
@pytest.mark.parametrize(
    "ttl", ["60", b"60", None, True, [60], 1j, datetime(2027, 1, 1, tzinfo=UTC)], ids=repr
)
async def test_ttl_is_a_number_or_a_timedelta(make: Make, ttl: Any) -> None:
    """A TTL of another type is a `TypeError` at construction."""
    with pytest.raises(TypeError, match="ttl"):
        make(ttl=ttl)


@every_redis
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        *(({"key_prefix": prefix}, ValueError) for prefix in ("", "session", ": ", "session:\n")),
        *(({"key_prefix": prefix}, TypeError) for prefix in (b"session:", None, 1)),
        *(({"connections": number}, ValueError) for number in (0, -1)),
        *(({"connections": number}, TypeError) for number in (1.0, "1", True, None)),
    ],
    ids=repr,
)
async def test_settings_of_redis_are_checked(
    make: Make, options: dict[str, Any], kind: type[Exception]
) -> None:
    """A wrong prefix or number of connections is refused at construction, by name."""
    with pytest.raises(kind, match=next(iter(options))):
        make(ttl=60, **options)


class Cart(msgspec.Struct):
    """A data type, which is sometimes passed in place of a codec."""


@every_maker
@pytest.mark.parametrize(
    ("codec", "hint"),
    [
        (JsonCodec, r"use codec=JsonCodec\(\)"),
        (Cart, r"use codec=JsonCodec\(Cart\)"),
        (None, "NoneType is not a codec"),
        ("json", "str is not a codec"),
    ],
    ids=repr,
)
async def test_codec_is_a_codec(make: Make, codec: Any, hint: str) -> None:
    """A class or a data type is a `TypeError` at construction, which tells the right argument."""
    with pytest.raises(TypeError, match=hint):
        make(ttl=60, codec=codec)


@pytest.mark.parametrize(
    "client", [None, "redis://localhost", redis.Redis(), object()], ids=lambda c: type(c).__name__
)
async def test_client_is_one_of_redis_asyncio(client: Any) -> None:
    """A URL, or a synchronous client, is a `TypeError` at construction."""
    with pytest.raises(TypeError, match="client"):
        RedisStorage(client, ttl=60)


# URLs. The wrong part of each may be a password.

SCHEME, HOST, PORT = "no scheme", "the host of the URL", "the port of the URL"
DATABASE, OPTION = "the database of the URL", "an option of the URL"


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("", SCHEME),
        ("Zq7", SCHEME),
        ("localhost:6379/Zq7", SCHEME),
        ("user:Zq7@localhost:6379", SCHEME),
        ("http://user:Zq7@localhost", SCHEME),
        ("redis:user:Zq7@localhost", SCHEME),
        ("unix:user:Zq7@/tmp/Xv9", SCHEME),
        ("redis+sentinel://user:Zq7@localhost", SCHEME),
        (" redis://user:Zq7@localhost", SCHEME),
        ("redis://user:Zq7@localhost\n", "a space or a control character"),
        ("redis://user:Zq7\x00@localhost", "a space or a control character"),
        ("redis://user:Zq7 Xv9@localhost", "a space or a control character"),
        ("redis://user:Zq7#Xv9@localhost", "quote it as %23"),
        ("redis://user:Zq7[Xv9@localhost", f"{HOST} is not valid; in a password, quote"),
        ("redis://user:Zq7@[::1", HOST),
        ("redis://user:Zq7@local\u2100host", HOST),
        ("redis://user:Zq7/Xv9@localhost", "in a password, quote / as %2F"),
        ("redis://:0/Xv9@localhost", "in a password, quote / as %2F"),
        ("redis://user:Zq7?Xv9@localhost", r"\? as %3F"),
        ("redis://user:Zq7@localhost:Xv9/0", PORT),
        ("redis://user:Zq7@localhost:99999", PORT),
        ("redis://user:Zq7@localhost:0", PORT),
        ("redis://user:Zq7@localhost/Xv9", DATABASE),
        ("redis://user:Zq7@localhost/0/1", DATABASE),
        ("valkey://user:Zq7@localhost/-1", DATABASE),
        ("redis://localhost?db=Zq7", OPTION),
        ("redis://localhost?nonsense=Zq7", OPTION),
        ("redis://localhost?protocol=Zq7", OPTION),
        ("redis://user:Zq7@localhost?health_check_interval=Xv9", OPTION),
        ("unix://user:Zq7@/tmp/Xv9?db=Wk3", OPTION),
        ("unix://user:Zq7@", "no path of a socket"),
    ],
    ids=ascii,
)
async def test_error_names_the_wrong_part_of_a_url(url: str, hint: str) -> None:
    """A wrong URL is a `ValueError` that names the part and shows the form, without a quote."""
    with pytest.raises(ValueError, match=rf"{hint}.*use redis://\[user:password@\]host") as caught:
        RedisStorage.from_url(url, ttl=60)

    assert leaked(caught.value) == []


@pytest.mark.parametrize("url", [None, b"redis://:Zq7@localhost", 6379, ["redis://:Zq7@x"]])
async def test_url_is_a_string(url: Any) -> None:
    """A URL of another type is a `TypeError` that does not quote it."""
    with pytest.raises(TypeError, match="url is a str") as caught:
        RedisStorage.from_url(url, ttl=60)

    assert leaked(caught.value) == []


async def test_scheme_may_be_in_capitals() -> None:
    """The scheme of a URL is case-insensitive, as in RFC 3986."""
    await RedisStorage[Any].from_url("REDIS://user:Zq7@localhost", ttl=60).aclose()


async def test_storage_shows_no_password(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a repr nor the log of a failed connection has the password or the id."""
    caplog.set_level(logging.DEBUG)
    with refused_port() as port:
        url = f"redis://user:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/0"
        async with RedisStorage[Any].from_url(url, ttl=60, timeout=0.2) as storage:
            shown = [repr(storage), str(storage), repr(SessionManager(storage))]
            with pytest.raises(StorageUnavailable) as caught:
                await storage.load(ID)

    text = "\n".join([*shown, caplog.text])
    assert [secret for secret in SECRETS if secret in text] == []
    assert leaked(caught.value) == []


# Sessions.

UNSTORABLE: dict[str, dict[str, Any]] = {
    "object": {"data": {SECRET: object()}},
    "surrogate": {"data": f"{SECRET}\ud800"},
    "too-large": {"data": SECRET * 100},
    "naive-created": {"created_at": datetime(2030, 1, 1)},  # noqa: DTZ001 - naive on purpose
    "naive-updated": {"updated_at": datetime(2030, 1, 1)},  # noqa: DTZ001 - naive on purpose
    "naive-expires": {"expires_at": datetime(2030, 1, 1)},  # noqa: DTZ001 - naive on purpose
    "date-of-text": {"expires_at": SECRET},
    "metadata": {"metadata": {SECRET: 1}},
    "kind": {"kind": None},
}


@pytest.mark.parametrize("fields", UNSTORABLE.values(), ids=UNSTORABLE)
@pytest.mark.parametrize("verb", WRITES.values(), ids=WRITES)
async def test_invalid_session_changes_nothing(
    valkey: Server, verb: Verb, fields: dict[str, Any]
) -> None:
    """A session that cannot be stored is `InvalidSession`, and the stored one stays as it is."""
    valkey.flush()
    codec = JsonCodec[Any](max_bytes=500)
    async with RedisStorage[Any].from_url(valkey.url, ttl=60, codec=codec) as storage:
        session = Session[Any](id=ID)
        await storage.store(session)
        for name, value in fields.items():
            setattr(session, name, value)

        with valkey.client() as client:
            before = contents(client)
            await refused(verb, storage, session, InvalidSession, "")
            assert contents(client) == before


@pytest.mark.parametrize("make", [owning, local])
async def test_sweep_refuses_naive_moments(make: Make) -> None:
    """The argument is checked also where a sweep has nothing to do."""
    naive = datetime(2030, 1, 1)  # noqa: DTZ001 - naive on purpose
    async with make(ttl=60) as storage:
        with pytest.raises(InvalidSession, match="before is a naive datetime"):
            await storage.delete_expired(naive)
