"""The storages of this package under the contract of every storage.

Tests do not wait: they advance a fake clock, and age the keys of their server by the same time. A
few tests at the end use the clock of the server.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import fakeredis
import pytest
import sniffio
from redis.asyncio import Redis

from aiosessions import (
    Codec,
    JsonCodec,
    LocalStorage,
    NearCache,
    RedisStorage,
    Session,
    SessionNotFound,
    Storage,
    StorageUnavailable,
    When,
    new_session_id,
    session_digest,
)
from aiosessions.redis import _outage
from aiosessions.testing import (
    FakeTime,
    IndexedStorageContract,
    RemoteStorageContract,
    SelfExpiringStorageContract,
    SharedStorageContract,
    StorageFactory,
    SweptStorageContract,
)
from tests.support.clients import key_of
from tests.support.servers import Server, age, refused_port


class TestLocalStorage(FakeTime, SweptStorageContract, IndexedStorageContract):
    """The local storage on asyncio."""

    @pytest.fixture
    def make_storage(self) -> StorageFactory:
        """Storages on the fake clock."""

        def make(*, ttl: float = 60.0, codec: Codec[Any] | None = None) -> LocalStorage[Any]:
            return LocalStorage(ttl=ttl, codec=codec or JsonCodec(), clock=self.clock)

        return make


class TestLocalStorageOnTrio(TestLocalStorage):
    """The local storage on trio."""

    backend = "trio"

    async def test_added_test_runs_on_the_backend(self) -> None:
        """A coroutine test of a subclass needs no plugin."""
        await self.open()

        assert sniffio.current_async_library() == "trio"


class NearCacheContract(FakeTime):
    """A near cache over any storage."""

    def staleness(self, ttl: float) -> float:
        """The staleness of the caches: one `tick`, which is too short for the kit to notice."""
        return min(self.tick, ttl / 2)

    def cache(self, storage: Storage[Any], ttl: float) -> NearCache[Any]:
        """A cache, which owns the storage."""
        return NearCache(storage, max_staleness=self.staleness(ttl), clock=self.clock)


class TestNearCache(NearCacheContract, SweptStorageContract, IndexedStorageContract):
    """A cache over the local storage."""

    @pytest.fixture
    def make_storage(self) -> StorageFactory:
        """Caches, each over a storage of its own."""

        def make(*, ttl: float = 60.0, codec: Codec[Any] | None = None) -> NearCache[Any]:
            storage = LocalStorage(ttl=ttl, codec=codec or JsonCodec(), clock=self.clock)
            return self.cache(storage, ttl)

        return make


class TestNearCacheOnTrio(TestNearCache):
    """A cache over the local storage, on trio."""

    backend = "trio"


class TestNearCacheWithManyHits(TestNearCache):
    """A cache over the local storage, with copies that live for a long time."""

    def staleness(self, ttl: float) -> float:
        """A quarter of the TTL. With more, some tests use sessions too rarely to keep them."""
        return ttl / 4

    # These two judge the order of use, and a hit does not count as use.
    test_trim_deletes_the_longest_unused = None  # type: ignore[assignment]
    test_sweep_before_a_moment_removes_unused_sessions = None  # type: ignore[assignment]


class RedisContract(
    FakeTime, SharedStorageContract, SelfExpiringStorageContract, IndexedStorageContract
):
    """`RedisStorage` over any server; subclasses can age its keys."""

    tick = 5.0  # the clock of a server cannot be stopped, so a test may take this long

    age: Callable[[float], object]

    async def advance(self, seconds: float) -> None:
        """Advance the clock of the storages, and age the keys of the server."""
        await super().advance(seconds)
        self.age(seconds)

    def storage(self, client: "Redis", ttl: float, codec: Codec[Any] | None) -> RedisStorage[Any]:
        """A storage that borrows a client."""
        return RedisStorage(client, ttl=ttl, codec=codec or JsonCodec(), clock=self.clock)

    def owner(self, url: str, ttl: float, codec: Codec[Any] | None) -> RedisStorage[Any]:
        """A storage with an owned client."""
        return RedisStorage.from_url(
            url, ttl=ttl, codec=codec or JsonCodec(), clock=self.clock, timeout=5.0
        )

    async def test_deadline_is_exact_to_the_millisecond(self) -> None:
        """A session ends at its deadline, although the server still has the key."""
        storage = await self.open(ttl=5_000.0)
        deadline = self.now() + timedelta(seconds=3_600)
        sessions = [Session[Any](id=new_session_id(), expires_at=deadline) for _ in range(5)]
        for session in sessions:
            await storage.store(session)

        self.clock.advance(3_599.999)
        for session in sessions:
            assert await storage.load(session.id) == session
        self.clock.advance(0.001)

        loaded, deleted, created, overwritten, saved = sessions
        with pytest.raises(SessionNotFound):
            await storage.load(loaded.id)
        assert await storage.delete(deleted.id) is False
        await storage.store(created, when=When.ABSENT)
        with pytest.raises(SessionNotFound):
            await storage.store(overwritten, when=When.PRESENT)
        with pytest.raises(SessionNotFound):
            await storage.store(saved, when=When.UNCHANGED)


class TestRedisStorage(RedisContract, RemoteStorageContract):
    """A storage with an owned client, on each available server."""

    @pytest.fixture
    def make_storage(self, redis_or_valkey: Server) -> StorageFactory:
        """Storages on an empty server."""
        redis_or_valkey.flush()
        self.age = redis_or_valkey.age

        def make(*, ttl: float = 60.0, codec: Codec[Any] | None = None) -> RedisStorage[Any]:
            return self.owner(redis_or_valkey.url, ttl, codec)

        return make

    async def test_outage_is_not_an_empty_list(self) -> None:
        """The calls with a principal raise `StorageUnavailable`."""
        storage: Any = await self._open_unreachable()
        id = new_session_id()

        for call in (
            storage.list("alice"),
            storage.count("alice"),
            storage.revoke("alice", session_digest(id)),
            storage.revoke_all("alice"),
            storage.trim("alice", 1, keep=id),
        ):
            with pytest.raises(StorageUnavailable):
                await call

    @pytest.fixture
    def make_unreachable_storage(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageFactory]:
        """Storages of a port that refuses connections; commands hardly wait for the server."""
        monkeypatch.setattr(_outage, "BRIDGE", 0.05)
        with refused_port() as port:

            def make(*, ttl: float = 60.0, codec: Codec[Any] | None = None) -> RedisStorage[Any]:
                return self.owner(f"redis://127.0.0.1:{port}", ttl, codec)

            yield make


class TestNearCacheOnRedis(
    NearCacheContract, SelfExpiringStorageContract, RemoteStorageContract, IndexedStorageContract
):
    """A cache over `RedisStorage`, on one server."""

    tick = RedisContract.tick

    @pytest.fixture
    def make_storage(self, valkey: Server) -> StorageFactory:
        """Caches on an empty server."""
        valkey.flush()
        self.age = valkey.age
        return partial(self.cache_at, valkey.url)

    def cache_at(
        self, url: str, *, ttl: float = 60.0, codec: Codec[Any] | None = None
    ) -> NearCache[Any]:
        """A cache over a storage with an owned client."""
        storage = RedisStorage[Any].from_url(
            url, ttl=ttl, codec=codec or JsonCodec(), clock=self.clock
        )
        return self.cache(storage, ttl)

    @pytest.fixture
    def make_unreachable_storage(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[StorageFactory]:
        """Caches over storages of a port that refuses connections."""
        monkeypatch.setattr(_outage, "BRIDGE", 0.05)
        with refused_port() as port:
            yield partial(self.cache_at, f"redis://127.0.0.1:{port}")

    async def advance(self, seconds: float) -> None:
        """Advance the clock of the storages, and age the keys of the server."""
        await super().advance(seconds)
        self.age(seconds)


class TestRedisStorageOnFakeredis(RedisContract):
    """A storage with a borrowed client of fakeredis, which applications use in their tests."""

    @pytest.fixture
    def make_storage(self) -> StorageFactory:
        """Storages on one fake server."""
        server = fakeredis.FakeServer()
        self.age = partial(age, fakeredis.FakeStrictRedis(server=server))

        @asynccontextmanager
        async def make(
            *, ttl: float = 60.0, codec: Codec[Any] | None = None
        ) -> AsyncIterator[RedisStorage[Any]]:
            async with (
                fakeredis.FakeAsyncRedis(server=server) as client,
                self.storage(client, ttl, codec) as storage,
            ):
                yield storage

        return make


class TestClockOfTheServer:
    """Expiry by the clock of the server, which ageing keys skips."""

    @pytest.fixture
    async def server(self, redis_or_valkey: Server) -> AsyncIterator["Redis"]:
        """A client of an empty server that announces each expiry of a key."""
        redis_or_valkey.flush()
        async with Redis.from_url(redis_or_valkey.url) as client:
            await client.config_set("notify-keyspace-events", "Ex")
            yield client

    @pytest.fixture
    async def expired(self, server: "Redis") -> AsyncIterator[AsyncIterator[Any]]:
        """The announcements from now on."""
        async with server.pubsub() as announcements:
            await announcements.psubscribe("__keyevent@*__:expired")
            messages = announcements.listen()
            await anext(messages)  # the confirmation of the subscription
            yield messages

    @pytest.mark.parametrize("when", [When.ALWAYS, When.ABSENT])
    @pytest.mark.parametrize(("ttl", "lifetime"), [(0.1, 3_600), (3_600, 0.1)])
    async def test_session_expires(
        self,
        redis_or_valkey: Server,
        expired: AsyncIterator[Any],
        when: When,
        ttl: float,
        lifetime: float,
    ) -> None:
        """The server removes a session at the end of its TTL or at its deadline, not before."""
        start = time.monotonic()
        session = Session[Any](id=new_session_id())
        session.expires_at = session.created_at + timedelta(seconds=lifetime)
        async with RedisStorage[Any].from_url(redis_or_valkey.url, ttl=ttl) as storage:
            await storage.store(session, when=when)

            with anyio.fail_after(10):
                message = await anext(expired)

            assert message["data"] == key_of(session.id).encode()
            assert time.monotonic() - start > 0.09
            with pytest.raises(SessionNotFound):
                await storage.load(session.id)
