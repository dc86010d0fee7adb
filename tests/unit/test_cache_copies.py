"""`NearCache`: copies in outages, limits, codecs and statistics."""

import asyncio
from typing import Any

import msgspec
import pytest

from aiosessions import (
    EncryptedCodec,
    InvalidSession,
    JsonCodec,
    LocalStorage,
    Session,
    StorageUnavailable,
    When,
    new_session_id,
)
from aiosessions.cache import CacheStatistics
from tests.support.caches import AnnouncingRemoteStorage, RemoteStorage, loads, stored
from tests.support.storages import unavailable_at


async def test_outage_is_an_error_by_default() -> None:
    """A copy that is too old does not hide it."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache = storage.cache()
    await cache.load(session.id)

    storage.intercept(unavailable_at())
    assert await cache.load(session.id) == session
    storage.clock.advance(10)
    with pytest.raises(StorageUnavailable):
        await cache.load(session.id)


async def test_older_copy_bridges_an_outage() -> None:
    """With `serve_stale_for`, up to its end, and only for a session that did not change."""
    storage = AnnouncingRemoteStorage()
    session, changed = await stored(storage), await stored(storage)
    cache = storage.cache(serve_stale_for=20)
    for each in (session, changed):
        await cache.load(each.id)

    storage.intercept(unavailable_at())
    storage.listener.interrupted()  # as a server that is down does
    assert await cache.load(session.id) == session
    storage.listener.changed(changed.digest, "another")
    with pytest.raises(StorageUnavailable):
        await cache.load(changed.id)
    storage.clock.advance(29.999)
    assert await cache.load(session.id) == session
    assert cache.statistics().stale_served == 2
    storage.clock.advance(0.001)
    with pytest.raises(StorageUnavailable):
        await cache.load(session.id)


@pytest.mark.parametrize("limit", [{"max_sessions": 2}, {"max_bytes": 350}], ids=str)
async def test_limits_evict_the_longest_unused(limit: dict[str, int]) -> None:
    """A hit counts as use; a session over `max_bytes` is not kept."""
    storage = RemoteStorage()
    first, second, third = [await stored(storage) for _ in range(3)]
    large = await stored(storage, data="x" * 500)
    cache = storage.cache(**limit)

    for each in (first, second, first, third, first):
        await cache.load(each.id)
    assert (cache.statistics().sessions, cache.statistics().evictions, loads(storage)) == (2, 1, 3)

    await cache.load(large.id)
    assert cache.statistics().bytes <= limit.get("max_bytes", 1000)


async def test_new_copies_remove_expired_ones() -> None:
    """Ids and payloads do not stay in memory for long."""
    storage = RemoteStorage()
    sessions = [await stored(storage) for _ in range(6)]
    cache = storage.cache()
    for each in sessions[:4]:
        await cache.load(each.id)

    storage.clock.advance(10)
    for each in sessions[4:]:
        await cache.load(each.id)
    assert cache.statistics().sessions == 2
    assert cache.statistics().evictions == 0


class Old(msgspec.Struct):
    """Data of an older release."""

    x: int


class New(msgspec.Struct):
    """Data of a newer release."""

    x: int
    y: int


async def test_saved_hit_keeps_unknown_fields() -> None:
    """A newer release finds its fields again."""
    storage = RemoteStorage(codec=JsonCodec(Old))
    newer = LocalStorage(ttl=60, codec=JsonCodec(New), clock=storage.clock)
    newer._table = storage.inner._table
    session = Session[New](id=new_session_id(), data=New(1, 2))
    await newer.store(session)
    cache = storage.cache()

    await cache.load(session.id)
    for x in (5, 6):
        hit = await cache.load(session.id)
        hit.data.x = x
        await cache.store(hit, when=When.UNCHANGED)

    assert (await newer.load(session.id)).data == New(6, 2)
    assert loads(storage) == 1


class DecodeOnly(JsonCodec[Any]):
    """A codec that only decodes."""

    def encode(self, session: Session[Any]) -> bytes:
        """Refuse."""
        del session
        raise InvalidSession("read only")


async def test_any_codec_will_do() -> None:
    """Copies are encrypted where records are; a codec that only decodes leaves no copies."""
    encrypted = RemoteStorage(codec=EncryptedCodec(JsonCodec(), [b"k" * 32]))
    session = await stored(encrypted)
    cache = encrypted.cache()
    assert [await cache.load(session.id) for _ in range(2)] == [session] * 2
    assert loads(encrypted) == 1
    kept = cache._copies.get(session.id)
    assert kept is not None
    assert b'"n"' not in kept.payload

    read_only = RemoteStorage()
    session = await stored(read_only)
    read_only.codec = DecodeOnly()
    cache = read_only.cache()
    for _ in range(2):
        found = await cache.load(session.id)
        assert found == session
        found.data["n"].append(2)
    assert (loads(read_only), cache.statistics().sessions) == (2, 0)


class Forgetful(JsonCodec[Any]):
    """A codec that reads no payload a second time."""

    seen: bytes | None = None

    def decode(self, payload: bytes) -> Session[Any]:
        """Decode a payload, unless it is the last one."""
        if payload == self.seen:
            raise KeyError(payload)
        self.seen = payload
        return super().decode(payload)


async def test_unreadable_copy_is_not_a_hit() -> None:
    """The storage is asked, and the caller gets the session that was loaded."""
    storage = RemoteStorage()
    session = await stored(storage)
    storage.codec = codec = Forgetful()
    cache = storage.cache()

    assert await cache.load(session.id) == session
    codec.seen = codec.encode(msgspec.structs.replace(session, id=session.digest, revision=""))
    assert await cache.load(session.id) == session
    assert (loads(storage), cache.statistics().hits) == (2, 0)


async def test_statistics_count_everything() -> None:
    """Each number has one cause."""
    storage = AnnouncingRemoteStorage()
    session, other = await stored(storage), await stored(storage)
    cache = storage.cache(max_sessions=1, serve_stale_for=20)

    await asyncio.gather(*(cache.load(session.id) for _ in range(3)))  # one miss
    await cache.load(session.id)  # a hit
    await storage.inner.store(session)
    stale = await cache.load(session.id)  # a hit
    with pytest.raises(Exception, match="written since"):
        await cache.store(stale, when=When.UNCHANGED)
    await cache.load(session.id)  # a miss
    await cache.load(other.id)  # a miss, and an eviction
    storage.listener.changed(new_session_id(), "")
    storage.clock.advance(10)
    storage.intercept(unavailable_at())
    await cache.load(other.id)  # a miss, but served

    size = len(cache._copies._copies.get(other.digest) or b"")
    assert cache.statistics() == CacheStatistics(
        sessions=1,
        bytes=size,
        announced=True,
        hits=2,
        misses=4,
        coalesced=2,
        stale_served=1,
        stale_dropped=1,
        evictions=1,
        invalidations=1,
    )
