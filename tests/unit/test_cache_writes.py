"""`NearCache`: writes, deletes and revocations, and the listeners of their announcements."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import anyio
import pytest

from aiosessions import (
    IndexedStorage,
    LocalStorage,
    NearCache,
    Session,
    SessionConflict,
    SessionError,
    SessionNotFound,
    StorageUnavailable,
    When,
    new_session_id,
)
from aiosessions.testing import FakeClock
from tests.support.caches import AnnouncingRemoteStorage, Heard, RemoteStorage
from tests.support.loops import on_both
from tests.support.secrets import SECRET, locals_in, secretive
from tests.support.storages import unavailable_at


async def cached(cache: NearCache[Any], **fields: Any) -> Session[Any]:
    """A session of which the cache has a copy."""
    session = Session[Any](id=new_session_id(), data={"n": [1]}, **fields)
    await cache.store(session)
    return session


async def test_load_after_a_write_is_a_hit() -> None:
    """Under the revision of the write."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = await cached(cache)
    session.data["n"].append(2)
    await cache.store(session, when=When.UNCHANGED)

    assert await cache.load(session.id) == session
    assert "load" not in storage.calls


@on_both
async def test_change_during_a_write_is_not_written() -> None:
    """The storage and the copy have the same state under one revision."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = Session[Any](id=new_session_id(), data={"n": [1]})

    async with anyio.create_task_group() as tasks, storage.held("before store always") as gate:
        tasks.start_soon(cache.store, session)
        await gate.reached.wait()
        session.data["n"].append(2)

    hit, record = await cache.load(session.id), await storage.inner.load(session.id)
    assert hit == record
    assert hit.revision == session.revision
    assert hit.data == {"n": [1]}


class Abort(BaseException):
    """An exception that is not an `Exception`."""


async def _conflict(storage: RemoteStorage, session: Session[Any]) -> None:
    stale = await storage.inner.load(session.id)
    await storage.inner.store(stale)


async def _lost_reply(storage: RemoteStorage, _: Session[Any]) -> None:
    storage.intercept(unavailable_at(1, in_doubt=True))


async def _abort(storage: RemoteStorage, _: Session[Any]) -> None:
    async def abort(_: int, __: str) -> None:
        raise Abort

    storage.intercept(abort)


@pytest.mark.parametrize(
    ("prepare", "error", "dropped"),
    [(_conflict, SessionConflict, 1), (_lost_reply, StorageUnavailable, 0), (_abort, Abort, 0)],
)
async def test_failed_write_drops_the_copy(
    prepare: Any, error: type[BaseException], dropped: int
) -> None:
    """The next load is fresh, and the caller's object is as it was."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = await cached(cache)
    revision = session.revision
    await prepare(storage, session)

    with pytest.raises(error):
        await cache.store(session, when=When.UNCHANGED)
    storage.intercept()

    assert session.revision == revision
    assert await cache.load(session.id) == await storage.inner.load(session.id)
    assert storage.calls == ["load"]
    assert cache.statistics().stale_dropped == dropped


@on_both
@pytest.mark.parametrize("verb", ["store", "delete"])
async def test_cancelled_write_drops_the_copy(verb: str) -> None:
    """It may have been applied."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = await cached(cache)
    point = {"store": "after store always", "delete": "after delete"}[verb]

    async with anyio.create_task_group() as tasks, storage.held(point) as gate:
        tasks.start_soon(getattr(cache, verb), {"store": session, "delete": session.id}[verb])
        await gate.reached.wait()
        tasks.cancel_scope.cancel()

    assert cache.statistics().sessions == 0
    assert not cache._copies._pending


async def test_refused_session_is_refused_by_the_storage() -> None:
    """With the storage's error, which holds no secret."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = secretive()
    session.data = {SECRET: {1, 2}}

    with pytest.raises(SessionError) as caught:
        await cache.store(session)
    with pytest.raises(TypeError, match="a session is a Session, not str"):
        await cache.store("session")  # type: ignore[arg-type]

    assert SECRET not in str(caught.value) + locals_in(caught.value)


async def test_sweep_before_a_moment_drops_copies() -> None:
    """The storage does not say which sessions it has removed."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = await cached(cache)
    storage.clock.advance(1)

    assert await cache.delete_expired() == 0
    assert cache.statistics().sessions == 1
    assert await cache.delete_expired(storage.clock.now()) == 1
    with pytest.raises(SessionNotFound):
        await cache.load(session.id)


def index(cache: NearCache[Any]) -> IndexedStorage[Any]:
    """The cache, for a type checker."""
    assert isinstance(cache, IndexedStorage)
    return cache


async def test_revocations_drop_the_copies_they_concern() -> None:
    """`trim` and `revoke` leave the others; `revoke_all` drops all if nobody tells new owners."""
    storage = RemoteStorage()
    cache = storage.cache()
    one, two, kept, other = [
        await cached(cache, principal=principal) for principal in ("alice", "alice", "alice", "bob")
    ]

    assert await index(cache).revoke("alice", one.digest) is True
    assert await index(cache).revoke("alice", other.digest) is False
    assert await index(cache).trim("alice", 2, keep=kept.id) == 0
    assert cache.statistics().sessions == 2
    elsewhere = await storage.inner.load(other.id)
    elsewhere.principal = "alice"
    await storage.inner.store(elsewhere)
    assert await index(cache).revoke_all("alice", keep=kept.id) == 2
    assert cache.statistics().sessions == 0

    for gone in (one, two, other):
        with pytest.raises(SessionNotFound):
            await cache.load(gone.id)
    assert await cache.load(kept.id) == kept
    assert await index(cache).count("alice") == len(await index(cache).list("alice")) == 1


@pytest.mark.parametrize("verb", ["trim", "revoke_all", "revoke", "delete"])
async def test_revocation_in_doubt_drops_copies(verb: str) -> None:
    """The reply was lost, so each session of the principal may be gone."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = await cached(cache, principal="alice")
    storage.intercept(unavailable_at(1))

    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "trim": lambda: index(cache).trim("alice", 1, keep=new_session_id()),
        "revoke_all": lambda: index(cache).revoke_all("alice"),
        "revoke": lambda: index(cache).revoke("alice", session.digest),
        "delete": lambda: cache.delete(session.id),
    }

    with pytest.raises(StorageUnavailable):
        await calls[verb]()

    assert cache.statistics().sessions == 0


class UnrevisedStorage(RemoteStorage):
    """A storage that fails the contract: its sessions have no revision."""

    async def load(self, id: str) -> Session[Any]:
        """See `Storage.load`."""
        session = await super().load(id)
        session.revision = ""
        return session


async def test_load_in_flight_leaves_no_copy_after_a_delete() -> None:
    """Even if the session has an empty revision, as a deleted one has."""
    storage = UnrevisedStorage()
    cache = storage.cache()
    session = Session[Any](id=new_session_id())
    await storage.inner.store(session)

    async with storage.held("after load") as gate:
        load = asyncio.create_task(cache.load(session.id))
        await gate.reached.wait()
        await cache.delete(session.id)
    await load

    assert cache.statistics().sessions == 0


async def test_load_in_flight_leaves_no_copy_after_a_sign_out() -> None:
    """It may have read a session before it was revoked."""
    storage = RemoteStorage()
    cache = storage.cache()
    session = Session[Any](id=new_session_id(), principal="alice")
    await storage.inner.store(session)

    async with storage.held("after load") as gate:
        load = asyncio.create_task(cache.load(session.id))
        await gate.reached.wait()
        await index(cache).revoke_all("alice")
    await load

    with pytest.raises(SessionNotFound):
        await cache.load(session.id)


async def test_listener_hears_after_the_copies_are_dropped() -> None:
    """It hears of deletions only if there was one, and nothing after it has stopped."""
    storage = RemoteStorage()
    cache = storage.cache()
    heard = Heard(cache)
    stop = cache.listen(heard)
    session = await cached(cache, principal="alice")
    first = session.revision
    await cache.store(session)
    storage.intercept(unavailable_at(0))
    with pytest.raises(StorageUnavailable):
        await cache.store(session)
    storage.intercept()
    await cache.load(session.id)
    await index(cache).revoke_all("alice")
    await cache.delete(session.id)
    stop()
    await cache.store(session)

    digest = session.digest
    assert heard.events[0] == ("interrupted",)
    assert [event[:2] for event in heard.events[1:3]] == [
        (digest, first),
        (digest, heard.events[2][1]),
    ]
    assert heard.events[3:] == [(digest, "", 0), (digest, "", 0)]


async def test_listener_hears_each_change_once() -> None:
    """Either the storage announces a change, or the cache does."""
    clock = FakeClock()
    cache = NearCache(LocalStorage[Any](ttl=60, clock=clock), max_staleness=10, clock=clock)
    heard = Heard(cache)
    cache.listen(heard)
    session = await cached(cache)
    await cache.delete(session.id)

    digest, revision = session.digest, session.revision
    assert heard.events == [("resumed",), (digest, revision, 0), (digest, "", 0)]


async def test_announcement_ends_a_copy_past_its_deadline() -> None:
    """Although the wall clock may be set back afterwards."""
    storage = AnnouncingRemoteStorage()
    cache = storage.cache()
    deadline = storage.clock.now() + timedelta(seconds=1)
    session = await cached(cache, expires_at=deadline)
    await storage.inner.delete(session.id)

    storage.clock.advance(1)
    storage.listener.changed(session.digest, "")
    storage.clock.set_back(1)
    with pytest.raises(SessionNotFound):
        await cache.load(session.id)


async def test_interruption_empties_the_cache_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And so does the end of the interruption."""
    storage = AnnouncingRemoteStorage()
    cache = storage.cache()
    heard = Heard(cache)
    cache.listen(heard)
    caplog.set_level(logging.DEBUG, "aiosessions")

    for event in ("interrupted", "interrupted", "resumed"):
        session = await cached(cache)
        getattr(storage.listener, event)()
        assert cache.statistics().sessions == 0
        assert cache.statistics().announced is (event == "resumed")
        await cache.load(session.id)

    assert caplog.messages == [
        "changes of sessions are not announced at present; a copy may be 10.0 s out of date",
        "changes of sessions are announced again",
    ]
    assert [each for each in heard.events if len(each) == 1] == [
        ("resumed",),
        ("interrupted",),
        ("interrupted",),
        ("resumed",),
    ]


async def test_announcement_of_own_write_keeps_the_copy() -> None:
    """Whether it comes before or after the reply."""
    storage = AnnouncingRemoteStorage()
    cache = storage.cache()
    session = Session[Any](id=new_session_id())

    async def announce(_: int, name: str) -> None:
        if name == "after store always":
            revision = (await storage.inner.load(session.id)).revision
            storage.listener.changed(session.digest, revision)

    storage.intercept(announce)
    await cache.store(session)
    storage.listener.changed(session.digest, session.revision)

    assert await cache.load(session.id) == session
    assert cache.statistics().hits == 1

    storage.listener.changed(session.digest, "another")
    assert cache.statistics().sessions == 0
