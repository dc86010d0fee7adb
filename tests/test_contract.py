"""The storages of this package, each under the contract that every storage has to keep.

Servers are aged rather than waited for: a test's fake clock moves, and every key on its server
becomes older by as much. A few tests at the end let a server's own clock run.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import anyio
import fakeredis
import pytest
from redis.asyncio import Redis

from aiosessions import (
    Codec,
    JsonCodec,
    LocalStorage,
    RedisStorage,
    Session,
    SessionNotFound,
    When,
    new_session_id,
)
from aiosessions.testing import (
    FakeTime,
    RemoteStorageContract,
    SelfExpiringStorageContract,
    SharedStorageContract,
    StorageFactory,
    SweptStorageContract,
)
from tests.servers import Server, SyncClient, age, deaf_port


class TestLocalStorage(FakeTime, SweptStorageContract):
    """In process, on asyncio."""

    @pytest.fixture
    def make_storage(self) -> StorageFactory:
        """Storages on the fake clock."""

        def make(*, ttl: float = 60.0, codec: Codec[Any] | None = None) -> LocalStorage[Any]:
            return LocalStorage(ttl=ttl, codec=codec or JsonCodec(), clock=self.clock)

        return make


class TestLocalStorageOnTrio(TestLocalStorage):
    """In process, on trio."""

    backend = "trio"


class RedisContract(
    FakeTime, RemoteStorageContract, SharedStorageContract, SelfExpiringStorageContract
):
    """What `RedisStorage` has to do, over whatever server; subclasses say how its keys age."""

    tick = 5.0  # a server's own clock cannot be stopped, so this is what a test may take

    client: Callable[[], AbstractContextManager[SyncClient]]

    async def advance(self, seconds: float) -> None:
        """Move the storages' clock, and let the server's keys age with it."""
        await super().advance(seconds)
        with self.client() as client:
            age(client, seconds)

    def storage(self, client: "Redis", ttl: float, codec: Codec[Any] | None) -> RedisStorage[Any]:
        """A storage that borrows a client."""
        return RedisStorage(client, ttl=ttl, codec=codec or JsonCodec(), clock=self.clock)

    def owner(self, url: str, ttl: float, codec: Codec[Any] | None) -> RedisStorage[Any]:
        """A storage with a client of its own."""
        return RedisStorage.from_url(
            url, ttl=ttl, codec=codec or JsonCodec(), clock=self.clock, timeout=5.0
        )

    @pytest.fixture
    def make_unreachable_storage(self) -> Iterator[StorageFactory]:
        """Storages of a server that nobody can connect to."""
        with deaf_port() as port:

            def make(*, ttl: float = 60.0, codec: Codec[Any] | None = None) -> RedisStorage[Any]:
                return self.owner(f"redis://127.0.0.1:{port}", ttl, codec)

            yield make

    async def test_a_deadline_is_exact_to_the_millisecond(self) -> None:
        """Although the server still holds the key: the clock that counts is the caller's."""
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


class TestRedisStorage(RedisContract):
    """With a client of its own, on each server there is."""

    @pytest.fixture
    def make_storage(self, redis_or_valkey: Server) -> StorageFactory:
        """Storages on an empty server."""
        redis_or_valkey.flush()
        self.client = redis_or_valkey.client

        def make(*, ttl: float = 60.0, codec: Codec[Any] | None = None) -> RedisStorage[Any]:
            return self.owner(redis_or_valkey.url, ttl, codec)

        return make


class TestRedisStorageWithABorrowedClient(RedisContract):
    """With redis-py's own client as it comes, on Valkey."""

    @pytest.fixture
    def make_storage(self, valkey: Server) -> StorageFactory:
        """Storages on an empty server, each with a client to borrow."""
        valkey.flush()
        self.client = valkey.client

        @asynccontextmanager
        async def make(
            *, ttl: float = 60.0, codec: Codec[Any] | None = None
        ) -> AsyncIterator[RedisStorage[Any]]:
            async with (
                Redis(host="127.0.0.1", port=valkey.port) as client,
                self.storage(client, ttl, codec) as storage,
            ):
                yield storage
                await storage.aclose()
                assert await client.ping()

        return make


class TestRedisStorageOnFakeredis(RedisContract):
    """Over fakeredis, which users have in their own tests: it has to be good enough for these."""

    @pytest.fixture
    def make_storage(self) -> StorageFactory:
        """Storages on one fake server."""
        server = fakeredis.FakeServer()
        self.client = partial(fakeredis.FakeStrictRedis, server=server)

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


class TestServersOwnClocks:
    """What ageing skips: that servers let time pass for the keys that they are given."""

    def storage(self, server: Server, ttl: float) -> RedisStorage[Any]:
        """A storage that has the time from the machine, as the server has."""
        return RedisStorage.from_url(server.url, ttl=ttl)

    @pytest.fixture
    async def server(self, redis_or_valkey: Server) -> AsyncIterator["Redis"]:
        """A client of an empty server that announces whenever a key has expired."""
        redis_or_valkey.flush()
        async with Redis.from_url(redis_or_valkey.url) as client:
            await client.config_set("notify-keyspace-events", "Ex")
            yield client

    @pytest.fixture
    async def expired(self, server: "Redis") -> AsyncIterator[AsyncIterator[Any]]:
        """What the server announces, from now on."""
        async with server.pubsub() as announcements:
            await announcements.psubscribe("__keyevent@*__:expired")
            messages = announcements.listen()
            await anext(messages)  # that it has subscribed
            yield messages

    async def test_an_idle_session_expires(
        self, redis_or_valkey: Server, expired: AsyncIterator[Any]
    ) -> None:
        """After its TTL of 100 ms, the server is rid of it."""
        session = Session[Any](id=new_session_id())
        async with self.storage(redis_or_valkey, 0.1) as storage:
            start = time.monotonic()
            await storage.store(session)

            with anyio.fail_after(10):
                message = await anext(expired)

            assert message["data"] == f"session:{session.id}".encode()
            assert time.monotonic() - start > 0.09
            with pytest.raises(SessionNotFound):
                await storage.load(session.id)

    async def test_a_session_expires_at_its_deadline(
        self, redis_or_valkey: Server, expired: AsyncIterator[Any]
    ) -> None:
        """Its TTL of an hour notwithstanding."""
        session = Session[Any](id=new_session_id())
        async with self.storage(redis_or_valkey, 3_600) as storage:
            session.expires_at = datetime.now(UTC) + timedelta(milliseconds=100)
            await storage.store(session)

            with anyio.fail_after(10):
                message = await anext(expired)

            assert message["data"] == f"session:{session.id}".encode()
            assert datetime.now(UTC) >= session.expires_at - timedelta(milliseconds=10)

    async def test_a_load_renews_the_ttl(self, redis_or_valkey: Server, server: "Redis") -> None:
        """However little was left of it."""
        session = Session[Any](id=new_session_id())
        async with self.storage(redis_or_valkey, 3_600) as storage:
            await storage.store(session)
            await server.pexpire(f"session:{session.id}", 10_000)

            await storage.load(session.id)

            assert 3_500_000 < await server.pttl(f"session:{session.id}") <= 3_600_000
