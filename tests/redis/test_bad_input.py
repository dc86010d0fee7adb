"""Invalid ids, settings and URLs: each is a specific error that reveals no secret.

The contract of storages has the invalid sessions.
"""

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
    InvalidSessionId,
    JsonCodec,
    RedisStorage,
    Session,
    SessionManager,
    Storage,
    StorageUnavailable,
)
from tests.support.clients import storage_at
from tests.support.secrets import ID, PASSWORD, SECRETS, VERBS, Verb, leaked, refused
from tests.support.servers import refused_port

# Ids.


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
async def test_invalid_id_is_refused_without_a_server(verb: Verb) -> None:
    """`InvalidSessionId` also if the server cannot be reached, because it is not asked."""
    async with storage_at("redis://127.0.0.1:1") as storage:
        await refused(verb, storage, Session(id="a b"), InvalidSessionId, "session id")


# Settings.

Make = Callable[..., Storage[Any]]


def borrowing(**options: Any) -> Storage[Any]:
    """A storage that borrows a client, which never connects."""
    return RedisStorage[Any](Redis(), **options)


def owning(**options: Any) -> Storage[Any]:
    """A storage that owns a client, which never connects."""
    return RedisStorage[Any].from_url("redis://127.0.0.1:1", **options)


each_make = pytest.mark.parametrize("make", [borrowing, owning])

BAD_DURATIONS: list[Any] = [0, 0.0004, float("nan"), float("inf"), timedelta(-1), timedelta.max]


@each_make
@pytest.mark.parametrize("name", ["ttl", "timeout"])
@pytest.mark.parametrize(
    "duration", BAD_DURATIONS, ids=lambda duration: repr(duration).removeprefix("datetime.")[:24]
)
async def test_durations_are_positive_and_finite(make: Make, name: str, duration: Any) -> None:
    """Another TTL or timeout is a `ValueError` at construction."""
    with pytest.raises(ValueError, match=name):
        make(**{"ttl": 60, name: duration})


class Cart(msgspec.Struct):
    """A data type, which is sometimes passed in place of a codec."""


@each_make
@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        *(("ttl", ttl, TypeError) for ttl in ("60", None, True, datetime(2027, 1, 1, tzinfo=UTC))),
        *(("key_prefix", prefix, ValueError) for prefix in ("", "session", ": ", "session:\n")),
        *(("key_prefix", prefix, TypeError) for prefix in (b"session:", None)),
        *(("connections", number, ValueError) for number in (0, -1)),
        *(("connections", number, TypeError) for number in (1.0, "1", True, None)),
        *(("codec", codec, TypeError) for codec in (None, "json")),
    ],
    ids=ascii,
)
async def test_settings_are_checked(
    make: Make, name: str, value: Any, kind: type[Exception]
) -> None:
    """A wrong setting is refused at construction, by name."""
    with pytest.raises(kind, match=name):
        make(**{"ttl": 60, name: value})


@each_make
@pytest.mark.parametrize(
    ("codec", "hint"),
    [(JsonCodec, r"use codec=JsonCodec\(\)"), (Cart, r"use codec=JsonCodec\(Cart\)")],
    ids=["class", "data-type"],
)
async def test_error_shows_the_right_codec(make: Make, codec: Any, hint: str) -> None:
    """A class or a data type is a `TypeError` at construction that shows the right argument."""
    with pytest.raises(TypeError, match=hint):
        make(ttl=60, codec=codec)


@pytest.mark.parametrize(
    "client", [None, "redis://localhost", redis.Redis()], ids=lambda client: type(client).__name__
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


@pytest.mark.parametrize("url", [None, b"redis://:Zq7@localhost", 6379], ids=ascii)
async def test_url_is_a_string(url: Any) -> None:
    """A URL of another type is a `TypeError` that does not quote it."""
    with pytest.raises(TypeError, match="url is a str") as caught:
        RedisStorage.from_url(url, ttl=60)

    assert leaked(caught.value) == []


async def test_scheme_may_be_in_capitals() -> None:
    """The scheme of a URL is case-insensitive, as in RFC 3986."""
    await storage_at("REDIS://user:Zq7@localhost").aclose()


@pytest.mark.usefixtures("short_bridge")
async def test_storage_shows_no_password(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a repr nor the log of a failed connection has the password or the id."""
    caplog.set_level(logging.DEBUG)
    with refused_port() as port:
        url = f"redis://user:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/0"
        async with storage_at(url) as storage:
            shown = [repr(storage), str(storage), repr(SessionManager(storage))]
            with pytest.raises(StorageUnavailable) as caught:
                await storage.load(ID)

    text = "\n".join([*shown, caplog.text])
    assert [secret for secret in SECRETS if secret in text] == []
    assert leaked(caught.value) == []
