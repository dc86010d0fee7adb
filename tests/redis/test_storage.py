"""`RedisStorage` beyond the contract of storages: its keys, TTLs and connections."""

from datetime import timedelta

import pytest
import redis

from aiosessions import MsgpackCodec, RedisStorage, Session, SessionNotFound, When, new_session_id
from aiosessions.record import unseal
from tests.support.clients import key_of, load_all, many, storage_at
from tests.support.servers import Server

# Keys and TTLs.


async def test_key_is_prefix_and_digest(server: Server, observer: "redis.Redis") -> None:
    """The value is the stored form, which other programs may read."""
    codec = MsgpackCodec()
    session = Session(id="{x}*?[a]:b", data=[1, 2])
    async with storage_at(server.url, key_prefix="app:web:", codec=codec) as storage:
        await storage.store(session)

    key = key_of(session.id, "app:web:")
    assert observer.keys("*") == [key.encode()]
    record = observer.get(key)
    assert isinstance(record, bytes)
    assert unseal(record, session.id, codec, lambda: 0) == session


async def test_prefixes_separate_storages(server: Server) -> None:
    """One id under two prefixes is two sessions."""
    async with (
        storage_at(server.url, key_prefix="a:") as one,
        storage_at(server.url, key_prefix="a:b:") as other,
    ):
        await one.store(Session(id="x", data=1))

        with pytest.raises(SessionNotFound):
            await other.load("x")
        assert await other.delete("x") is False
        assert (await one.load("x")).data == 1


@pytest.mark.parametrize(
    "ttl", [600.25, timedelta(days=3_660_000)], ids=["fraction", "ten-thousand-years"]
)
@pytest.mark.parametrize("use", [*When, None], ids=[*(when.name for when in When), "load"])
async def test_use_starts_a_full_ttl(
    server: Server, observer: "redis.Redis", ttl: float | timedelta, use: When | None
) -> None:
    """The TTL of the key has the precision of a millisecond, for fractions and for many days."""
    full = round((ttl.total_seconds() if isinstance(ttl, timedelta) else ttl) * 1_000)
    session = Session(id=new_session_id())
    key = key_of(session.id)
    async with storage_at(server.url, ttl=ttl) as storage:
        assert storage.ttl == full / 1_000
        if use is not When.ABSENT:
            await storage.store(session)
            observer.pexpire(key, 300_000)

        await (storage.load(session.id) if use is None else storage.store(session, when=use))

        left = observer.pttl(key)
        assert isinstance(left, int)
        assert full - 30_000 < left <= full


# Connections.


async def test_nothing_connects_before_the_first_use(valkey: Server) -> None:
    """A storage that is made, swept and closed sends nothing."""
    async with RedisStorage.from_url(valkey.url, ttl=60) as storage:
        await storage.delete_expired()
        assert storage.statistics().connected == 0


@pytest.mark.parametrize("number", [1, 3])
async def test_callers_share_connections(
    server: Server, observer: "redis.Redis", number: int
) -> None:
    """Concurrent first callers share the one connection, or as many as the setting says."""

    def received() -> int:
        return int(observer.info("stats")["total_connections_received"])

    before = received()
    async with storage_at(server.url, connections=number) as storage:
        await load_all(storage, await many(storage, 100))

        assert received() - before == number
        assert storage.statistics().connected == number
