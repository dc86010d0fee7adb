"""The public interface as type checkers see it. mypy and pyright check it; nothing runs it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self, assert_type

from redis.asyncio import Redis, RedisCluster

from aiosessions import (
    Clock,
    Codec,
    EncryptedCodec,
    IndexedStorage,
    InvalidSession,
    JsonCodec,
    LocalStorage,
    MsgpackCodec,
    NearCache,
    RedisStorage,
    Session,
    SessionError,
    SessionInfo,
    SessionManager,
    SessionNotFound,
    Storage,
    StorageUnavailable,
    When,
    new_session_id,
    session_digest,
)
from aiosessions.asgi import (
    CookieTransport,
    HeaderTransport,
    SessionMiddleware,
    Transport,
    WebSession,
    get_session,
)


@dataclass
class Cart:
    """The session data of a shop."""

    items: list[str]


# A session is generic over the type of its data, which is inferred.

session = Session(id=new_session_id(), kind="web", data=Cart(["tea"]))
assert_type(session, Session[Cart])
assert_type(session.principal, str | None)
assert_type(session.data.items, list[str])
assert_type(session.expires_at, datetime | None)
assert_type(session.digest, str)
assert_type(session_digest("x"), str)
session.digest = "x"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]

empty: Session[Cart | None] = Session(id="x")
missing: Session[Cart] = Session(id="x")  # pyright: ignore[reportAssignmentType]  # no None in it
Session("x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]  # keyword-only
session.owner = "x"  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
Session(id=b"x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Storages and managers take the data type from their codec.

json_codec = JsonCodec(data_type=Cart, max_bytes=65_536)
assert_type(json_codec.decode(b""), Session[Cart])
msgpack_codec = MsgpackCodec(Cart)
assert_type(JsonCodec(Cart, upgrade=lambda data: data), JsonCodec[Cart])
codec: Codec[Cart] = msgpack_codec
# Unions are not classes, so the annotation has to tell the data type.
optional: JsonCodec[Cart | None] = JsonCodec(Cart | None)
assert_type(optional.decode(b"").data, Cart | None)
other: Codec[int] = msgpack_codec  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]

encrypted = EncryptedCodec(json_codec, [b"", ""])
assert_type(encrypted, EncryptedCodec[Cart])
assert_type(encrypted.decode(b""), Session[Cart])
assert_type(encrypted.key_ids, tuple[str, ...])
wrapped: Codec[Cart] = EncryptedCodec(msgpack_codec, ["a", "b"])
EncryptedCodec(json_codec, b"")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

local = LocalStorage(ttl=timedelta(minutes=30), max_sessions=10, codec=json_codec)
assert_type(local, LocalStorage[Cart])


def borrow(client: Redis, cluster: RedisCluster) -> None:
    """A storage takes a client of either kind."""
    assert_type(RedisStorage(client, ttl=1.5, codec=json_codec), RedisStorage[Cart])
    assert_type(
        RedisStorage(cluster, ttl=1, key_prefix="shop:", codec=msgpack_codec, timeout=1.0),
        RedisStorage[Cart],
    )


owned = RedisStorage.from_url("redis://localhost", ttl=60, codec=json_codec)
assert_type(owned, RedisStorage[Cart])

# Without a codec, the annotation tells the data type.
plain: LocalStorage[dict[str, int]] = LocalStorage(ttl=60)
anything: Storage[Any] = RedisStorage.from_url("redis://localhost", ttl=60)
storages: list[Storage[Cart]] = [local, owned]
indexed: list[IndexedStorage[Cart]] = [local, owned]


async def five_verbs(storage: Storage[Cart]) -> None:
    """The interface of every storage."""
    assert_type(await storage.load("x"), Session[Cart])
    assert_type(await storage.delete("x"), bool)
    assert_type(await storage.delete_expired(datetime.now(UTC)), int)
    await storage.store(session, when=When.UNCHANGED)
    await storage.store(session, When.ABSENT)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await storage.store(Session(id="x", data=1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await storage.aclose()
    async with local as entered:
        assert_type(entered, LocalStorage[Cart])


async def manager() -> None:
    """A manager has the data type of its storage."""
    sessions = SessionManager(local, max_lifetime=timedelta(hours=8), sweep_interval=60, grace=0.5)
    async with sessions as entered:
        assert_type(entered, SessionManager[Cart])
        created = await entered.create(
            kind="web", principal="ada", metadata={"a": "b"}, data=Cart([]), id="x"
        )
        assert_type(created, Session[Cart])
        assert_type(await entered.get("x"), Session[Cart])
        assert_type(await entered.delete("x"), bool)
        await entered.save(created)
        await entered.create(data="tea")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await entered.create(data=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    SessionManager("redis://localhost")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def principals(sessions: SessionManager[Cart], storage: IndexedStorage[Cart]) -> None:
    """Owners are checked, and their sessions are listed with their data."""
    infos = await sessions.list("ada")
    assert_type(infos, list[SessionInfo[Cart]])
    assert_type(infos[0].data, Cart)
    assert_type(infos[0].principal, str | None)
    assert_type(await sessions.count("ada"), int)
    assert_type(await sessions.revoke("ada", infos[0].digest), bool)
    assert_type(await sessions.revoke_all("ada"), int)
    assert_type(await sessions.revoke_all("ada", keep="x"), int)
    for owner in ("ada", None):
        assert_type(await sessions.get("x", principal=owner), Session[Cart])
        assert_type(await sessions.mutate("x", add, principal=owner), Session[Cart])
        assert_type(await sessions.rotate("x", add, principal=owner), Session[Cart])
    await sessions.get("x", principal=b"ada")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await sessions.list(None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    _ = infos[0].id  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    infos[0].kind = "x"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    assert_type(await storage.list("ada"), list[SessionInfo[Cart]])
    assert_type(await storage.trim("ada", 5, keep="x"), int)
    assert_type(SessionManager(storage, max_per_principal=5), SessionManager[Cart])


def add(changed: Session[Cart]) -> None:
    """A change."""
    changed.data.items.append("tea")


async def add_slowly(changed: Session[Cart]) -> int:
    """A coroutine function with a result, which is ignored."""
    changed.data.items.append("tea")
    return len(changed.data.items)


async def changes(sessions: SessionManager[Cart]) -> None:
    """`mutate` and `rotate` take a session or an id, and any change of a session."""
    for given in ("x", Session(id="x", data=Cart([]))):
        assert_type(await sessions.mutate(given, add), Session[Cart])
        assert_type(await sessions.mutate(given, add_slowly, attempts=3), Session[Cart])
        assert_type(await sessions.mutate(given, lambda each: each.data.items.pop()), Session[Cart])
        assert_type(await sessions.rotate(given), Session[Cart])
        assert_type(await sessions.rotate(given, add, new_id="y"), Session[Cart])
        assert_type(await sessions.rotate(given, add_slowly), Session[Cart])
    await sessions.mutate("x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await sessions.mutate("x", len)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await sessions.rotate(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# An application's storage, codec or clock needs the right methods, not a base class.


class OwnStorage:
    """A storage that inherits nothing."""

    async def store(self, session: Session[Cart], *, when: When = When.ALWAYS) -> None: ...

    async def load(self, id: str) -> Session[Cart]:
        raise NotImplementedError

    async def delete(self, id: str) -> bool:
        raise NotImplementedError

    async def delete_expired(self, before: datetime | None = None) -> int:
        raise NotImplementedError

    async def aclose(self) -> None: ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class OwnCodec:
    """A codec that inherits nothing."""

    def encode(self, session: Session[Cart]) -> bytes:
        raise NotImplementedError

    def decode(self, payload: bytes) -> Session[Cart]:
        raise NotImplementedError


class OwnClock:
    """A clock that inherits nothing."""

    def monotonic(self) -> float:
        raise NotImplementedError

    def time(self) -> float:
        raise NotImplementedError


assert_type(SessionManager(OwnStorage()), SessionManager[Cart])
unindexed: IndexedStorage[Cart] = OwnStorage()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
assert_type(LocalStorage(ttl=60, codec=OwnCodec()), LocalStorage[Cart])
clock: Clock = OwnClock()
local_with_clock: LocalStorage[Cart] = LocalStorage(ttl=60, clock=clock)


# Every error has an HTTP status, and some have the standard base that callers know.

assert_type(SessionError.status, int)
as_value_error: type[ValueError] = InvalidSession
as_lookup_error: type[LookupError] = SessionNotFound
errors: list[type[SessionError]] = [SessionNotFound, StorageUnavailable]


# The middleware takes any ASGI application.


async def application(scope: Any, _receive: Any, _send: Any) -> None:
    """An application."""
    web: WebSession[Cart] = get_session(scope)
    assert_type(web.data, Cart)
    assert_type(web.principal, str | None)
    assert_type(web.metadata, dict[str, str])
    assert_type(await web.load(), WebSession[Cart])
    assert_type(await web.revoke_all(keep=True), int)
    web.principal = None
    web.principal = 1  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    await web.mutate(add)
    await web.rotate()
    await web.delete()


transports: list[Transport] = [CookieTransport("__Host-session"), HeaderTransport("X-Session")]
CookieTransport(same_site="Lax")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
middleware = SessionMiddleware(
    application, SessionManager(local), transport=transports[0], empty=lambda: Cart([])
)
assert_type(middleware, SessionMiddleware[Cart])
around: SessionMiddleware[Cart] = SessionMiddleware(middleware, SessionManager(local))


def caches(storage: LocalStorage[Cart]) -> None:
    """A cache has the data type of its storage, so mistakes in the data behind it are found."""
    cache = NearCache(storage, max_staleness=30)
    assert_type(cache, NearCache[Cart])
    assert_type(SessionManager(cache), SessionManager[Cart])
