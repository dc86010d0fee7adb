"""`NearCache`: hits, shared loads, limits and outages."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import anyio
import msgspec
import pytest

from aiosessions import (
    EncryptedCodec,
    IndexedStorage,
    InvalidSession,
    JsonCodec,
    LocalStorage,
    NearCache,
    Session,
    SessionNotFound,
    StorageUnavailable,
    When,
    new_session_id,
)
from aiosessions.cache import CacheStatistics
from tests.support.caches import AnnouncingRemoteStorage, RemoteStorage
from tests.support.loops import on_both
from tests.support.secrets import locals_in, secretive
from tests.support.storages import ReferenceStorage, unavailable_at


def loads(storage: RemoteStorage) -> int:
    """The number of remote loads."""
    return storage.calls.count("load")


async def stored(storage: RemoteStorage, **fields: Any) -> Session[Any]:
    """A session that another replica has stored."""
    fields.setdefault("data", {"n": [1]})
    session = Session[Any](id=new_session_id(), **fields)
    session.created_at = session.updated_at = storage.clock.now()
    await storage.inner.store(session)
    return session


class Bare(ReferenceStorage):
    """A storage that publishes nothing."""

    def __init__(self) -> None:
        """Make one without attributes."""


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"max_staleness": 30.001}, ValueError, "at most half the TTL of the storage, 60.0 s"),
        ({"max_staleness": 0}, ValueError, "max_staleness must be at least one millisecond"),
        ({"max_staleness": "10"}, TypeError, "max_staleness is a number of seconds or a timedelta"),
        ({"serve_stale_for": 0}, ValueError, "serve_stale_for must be at least one millisecond"),
        ({"serve_stale_for": timedelta(0)}, ValueError, "serve_stale_for must be at least"),
        ({"max_sessions": 0}, ValueError, "max_sessions must be at least 1, not 0"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes is an int, not float"),
        ({"storage": LocalStorage}, TypeError, "not the class LocalStorage"),
        ({"storage": Bare()}, TypeError, "has the attributes codec and ttl; Bare has not"),
    ],
)
def test_constructor_explains_refusal(
    options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    """A wrong argument is named, with the bound that it misses."""
    storage: Any = options.pop("storage", None) or LocalStorage[Any](ttl=60)

    with pytest.raises(error, match=reason):
        NearCache(storage, **{"max_staleness": 10} | options)


def test_cache_has_the_index_of_its_storage() -> None:
    """`isinstance` tells, and a subclass keeps its type."""

    class Mine(NearCache[Any]):
        pass

    plain = ReferenceStorage(backend=None, ttl=0.06, codec=JsonCodec(), clock=None)  # type: ignore[arg-type]
    indexed = LocalStorage[Any](ttl=60)

    assert isinstance(NearCache(indexed, max_staleness=10), IndexedStorage)
    assert isinstance(NearCache(storage=indexed, max_staleness=10), IndexedStorage)
    assert not isinstance(NearCache(plain, max_staleness=10), IndexedStorage)
    assert type(Mine(indexed, max_staleness=10)) is Mine


async def test_repr_reveals_no_session() -> None:
    """It names the storage and the bound."""
    cache = NearCache(LocalStorage[Any](ttl=60), max_staleness=10)
    await cache.store(secretive())

    assert repr(cache) == "NearCache(LocalStorage(ttl=60.0, sessions=1), max_staleness=10.0)"


@on_both
async def test_hit_makes_no_remote_call() -> None:
    """Until a copy is `max_staleness` old, counted from the start of its load."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache = storage.cache()

    async with anyio.create_task_group() as tasks, storage.held("after load") as gate:
        tasks.start_soon(cache.load, session.id)
        await gate.reached.wait()
        storage.clock.advance(4)
    storage.clock.advance(5.999)
    assert await cache.load(session.id) == session
    assert loads(storage) == 1

    storage.clock.advance(0.001)
    assert await cache.load(session.id) == session
    assert loads(storage) == 2


async def test_callers_share_no_object() -> None:
    """A caller that changes its session changes no copy."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache = storage.cache()

    for _ in range(3):
        found = await cache.load(session.id)
        assert found.data == {"n": [1]}
        found.data["n"].append(2)


@on_both
async def test_concurrent_misses_share_one_load() -> None:
    """Each caller gets its own object."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache, found = storage.cache(), list[Any]()

    async def load() -> None:
        found.append(await cache.load(session.id))

    async with anyio.create_task_group() as tasks, storage.held("before load") as gate:
        for _ in range(10):
            tasks.start_soon(load)
        await gate.reached.wait()
        await anyio.wait_all_tasks_blocked()

    assert found == [session] * 10
    assert len({id(each.data["n"]) for each in found}) == 10
    assert (cache.statistics().misses, cache.statistics().coalesced, loads(storage)) == (1, 9, 1)


@on_both
@pytest.mark.parametrize("cancelled", [1, 2], ids=["one", "all"])
async def test_load_outlives_cancelled_callers(cancelled: int) -> None:
    """The others get the session, and so does the next caller."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache, found = storage.cache(), list[Any]()
    scopes = [anyio.CancelScope() for _ in range(2)]

    async def load(scope: anyio.CancelScope) -> None:
        with scope:
            found.append(await cache.load(session.id))

    async with anyio.create_task_group() as tasks, storage.held("before load") as gate:
        for scope in scopes:
            tasks.start_soon(load, scope)
        await gate.reached.wait()
        await anyio.wait_all_tasks_blocked()
        for scope in scopes[:cancelled]:
            scope.cancel()
        await anyio.wait_all_tasks_blocked()
    await anyio.wait_all_tasks_blocked()

    assert len(found) == 2 - cancelled
    assert await cache.load(session.id) == session
    assert loads(storage) == 1


@pytest.mark.every_loop
async def test_caller_after_a_write_does_not_join_an_older_load() -> None:
    """The older load leaves no copy either."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache = storage.cache()

    async with storage.held("after load") as gate:
        older = asyncio.create_task(cache.load(session.id))
        await gate.reached.wait()
        session.data["n"].append(2)
        await cache.store(session)
        await cache.delete_expired(storage.clock.now())  # drops the copy of the write
        await storage.inner.store(session)
        newer = asyncio.create_task(cache.load(session.id))
        await anyio.wait_all_tasks_blocked()
        assert loads(storage) == 2

    assert (await older).data == {"n": [1]}
    assert (await newer).data == {"n": [1, 2]}
    assert (await cache.load(session.id)).data == {"n": [1, 2]}


async def test_overtaken_load_leaves_no_copy() -> None:
    """A load that took longer than `max_staleness` does not replace the copy of a later one."""
    storage = RemoteStorage()
    session = await stored(storage)
    cache = storage.cache(serve_stale_for=100)

    async with storage.held("after load") as gate:
        slow = asyncio.create_task(cache.load(session.id))
        await gate.reached.wait()
        storage.clock.advance(10)
        storage.intercept_nothing()
        await storage.inner.store(session)
        assert await cache.load(session.id) == session
    assert (await slow).revision != session.revision

    assert (await cache.load(session.id)).revision == session.revision
    storage.clock.advance(10)
    storage.intercept(unavailable_at())
    assert (await cache.load(session.id)).revision == session.revision


async def test_absence_is_not_cached() -> None:
    """A session that another replica creates is found at once."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = Session[Any](id=new_session_id())

    with pytest.raises(SessionNotFound):
        await cache.load(session.id)
    await storage.inner.store(session)

    assert await cache.load(session.id) == session


async def test_deadline_is_exact_on_hits() -> None:
    """A late answer of the storage does not carry a session past it."""
    storage = RemoteStorage()
    deadline = storage.clock.now() + timedelta(seconds=3)
    session = await stored(storage, expires_at=deadline)
    cache = storage.cache(serve_stale_for=100)

    async with storage.held("after load") as gate:
        late = asyncio.create_task(cache.load(session.id))
        await gate.reached.wait()
        storage.clock.advance(2.999)
    assert await late == await cache.load(session.id) == session
    await cache.delete_expired(storage.clock.now() - timedelta(days=1))  # drops the copy

    async with storage.held("after load") as gate:
        late = asyncio.create_task(cache.load(session.id))
        await gate.reached.wait()
        storage.clock.advance(0.001)
    storage.intercept(unavailable_at())
    with pytest.raises(SessionNotFound):
        await late
    with pytest.raises(StorageUnavailable):
        await cache.load(session.id)


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
    assert all(b'"n"' not in copy.payload for _, copy in cache._copies._fresh.items())

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


async def test_unreadable_copy_is_dropped() -> None:
    """It does not count as a hit, and the callers get the session that was loaded."""
    storage = RemoteStorage()
    session = await stored(storage)
    storage.codec = codec = Forgetful()
    cache = storage.cache()

    assert await cache.load(session.id) == session
    codec.seen = codec.encode(msgspec.structs.replace(session, id=session.digest, revision=""))
    assert await cache.load(session.id) == session
    assert (loads(storage), cache.statistics().hits) == (2, 0)


class PickyError(Exception):
    """An error that cannot be copied."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} {two}")


@on_both
@pytest.mark.parametrize(
    "make", [lambda: StorageUnavailable("down", in_doubt=True), lambda: PickyError("so", "sad")]
)
async def test_error_of_a_shared_load_reaches_each_caller(make: Callable[[], Exception]) -> None:
    """With its attributes, its cause and the frames of the load."""
    storage = RemoteStorage()
    cache, errors = storage.cache(), list[Any]()
    id = new_session_id()

    async def fail(_: int, __: str) -> None:
        await anyio.wait_all_tasks_blocked()
        raise make() from KeyError("cause")

    async def load(private: str) -> None:
        assert private
        try:
            await cache.load(id)
        except Exception as error:  # noqa: BLE001 - that is the question
            errors.append(error)

    storage.intercept(fail)
    async with anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(load, f"private-{number}")

    assert (len(errors), loads(storage)) == (3, 1)
    for error in errors:
        assert type(error) is type(make())
        assert (str(error), vars(error)) == (str(make()), vars(make()))
        assert isinstance(error.__cause__, KeyError)
        assert "in fail" in locals_in(error)
        if isinstance(error, StorageUnavailable):
            assert locals_in(error).count("private-") == 1


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

    size = len(cache._copies._fresh.items()[0][1].payload)
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
