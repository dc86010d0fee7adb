"""`SessionManager`: creating, loading, saving and deleting sessions, and their lifetimes."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest

from aiosessions import (
    InvalidSession,
    InvalidSessionId,
    LocalStorage,
    Session,
    SessionConflict,
    SessionError,
    SessionManager,
    SessionNotFound,
    StorageUnavailable,
)
from aiosessions.manager import ROTATED_KEY
from tests.support.loops import on_both
from tests.support.storages import Replicas, fields, unavailable_at

Unlimited = tuple[Replicas, Session[Any]]
VERBS: dict[str, Callable[[SessionManager[Any], Session[Any]], Awaitable[Any]]] = {
    "get": lambda sessions, session: sessions.get(session.id),
    "save": lambda sessions, session: sessions.save(session),
    "mutate": lambda sessions, session: sessions.mutate(session, lambda _: None),
    "rotate": lambda sessions, session: sessions.rotate(session),
}


# create, get and save


@on_both
async def test_created_session_can_be_loaded() -> None:
    """`create` returns the session as it is stored, with a copy of the metadata."""
    r = Replicas()
    given = {"a": "b"}

    session = await r.sessions.create(
        kind="mcp", principal="alice", metadata=MappingProxyType(given), data={"n": 1}
    )

    assert len(session.id) >= 22
    assert (session.kind, session.principal) == ("mcp", "alice")
    assert (session.metadata, session.data) == ({"a": "b"}, {"n": 1})
    assert session.created_at == session.updated_at == r.clock.now()
    assert session.expires_at is None
    assert r.storage.calls == ["store absent"]
    assert await r.sessions.get(session.id) == session
    session.metadata["c"] = "d"
    assert given == {"a": "b"}


@on_both
async def test_invalid_ids_are_refused() -> None:
    """Each method that takes an id raises `InvalidSessionId` for a wrong one."""
    r = Replicas()

    for call in (
        lambda: r.sessions.get("a b"),
        lambda: r.sessions.delete("a b"),
        lambda: r.sessions.mutate("a b", lambda _: None),
        lambda: r.sessions.rotate("a b"),
    ):
        with pytest.raises(InvalidSessionId):
            await call()


@on_both
async def test_invalid_sessions_are_not_stored() -> None:
    """The key of rotated sessions is reserved, and the empty string is not an id."""
    r = Replicas()
    reserved = {ROTATED_KEY: "x"}
    session = await r.sessions.create(id="old")
    session.metadata |= reserved

    for call in (
        lambda: r.sessions.create(metadata=reserved),
        lambda: r.sessions.save(session),
        lambda: r.sessions.mutate("old", lambda session: session.metadata.update(reserved)),
        lambda: r.sessions.rotate(session),
        lambda: r.sessions.rotate("old", lambda session: session.metadata.update(reserved)),
    ):
        with pytest.raises(InvalidSession, match="reserved"):
            await call()
    with pytest.raises(InvalidSessionId):  # not "a new id"
        await r.sessions.create(id="")
    with pytest.raises(TypeError, match="session is a Session, not str"):
        await r.sessions.save("old")  # type: ignore[arg-type]

    assert (await r.sessions.get("old")).metadata == {}
    assert await r.count() == 1


@on_both
async def test_get_is_one_load() -> None:
    """`get` costs one load of the storage, which renews the TTL."""
    r = Replicas(ttl=10)
    session = await r.sessions.create()
    r.storage.intercept()

    for _ in range(2):
        r.clock.advance(9)
        assert await r.sessions.get(session.id) == session

    assert r.storage.calls == ["load", "load"]


@on_both
async def test_save_stamps_the_object() -> None:
    """The object gets a new `updated_at` and `revision`, and can be saved again."""
    r = Replicas(max_lifetime=1_000)
    session = await r.sessions.create(data=1)
    before = fields(session)
    r.storage.intercept()

    for data in (2, 3):
        r.clock.advance(1)
        session.data = data
        await r.sessions.save(session)
        assert session.updated_at == r.clock.now()
        assert await r.rival.get(session.id) == session

    changed = {name for name, value in fields(session).items() if value != before[name]}
    assert changed == {"data", "updated_at", "revision"}
    assert r.storage.calls == ["store unchanged", "store unchanged"]


async def replace(r: Replicas, id: str) -> None:
    """Delete a session, and create another one under its id."""
    await r.rival.delete(id)
    await r.rival.create(id=id, data="rival")


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda r, id: r.rival.mutate(id, lambda _: None), SessionConflict),
        (lambda r, id: r.rival.delete(id), SessionNotFound),
        (replace, SessionConflict),
    ],
    ids=["save", "delete", "replace"],
)
@on_both
async def test_lost_update_is_an_error(act: Any, error: type[SessionError]) -> None:
    """A save after a write of another replica writes nothing. An outage hides no conflict."""
    r = Replicas()
    session = await r.sessions.create(id="x", data=0)
    await act(r, "x")
    session.data = 1
    before = fields(session)
    r.clock.advance(1)
    r.storage.intercept(unavailable_at(2))

    with pytest.raises(error) as caught:
        await r.sessions.save(session)

    assert type(caught.value) is error
    assert fields(session) == before
    assert await r.lives("x") is (error is SessionConflict)
    if error is SessionConflict:
        assert (await r.rival.get("x")).data != 1


@on_both
async def test_failed_save_leaves_the_object_unchanged() -> None:
    """Refused data and outages leave all fields as they were."""
    r = Replicas()
    session = await r.sessions.create()
    r.clock.advance(1)

    for data, point, error in (
        (object(), -1, InvalidSession),
        (1, 0, StorageUnavailable),
        (1, 1, StorageUnavailable),
    ):
        session.data = data
        before = fields(session)
        r.storage.intercept(unavailable_at(point))
        with pytest.raises(error):
            await r.sessions.save(session)
        assert fields(session) == before


@on_both
async def test_outage_is_not_an_absent_session() -> None:
    """Each method raises the error of the storage."""
    r = Replicas()
    session = await r.sessions.create()
    r.storage.intercept(unavailable_at())

    with pytest.raises(StorageUnavailable):
        await r.sessions.create()
    with pytest.raises(StorageUnavailable):
        await r.sessions.delete(session.id)
    for verb in VERBS.values():
        with pytest.raises(StorageUnavailable):
            await verb(r.sessions, session)


# Lifetimes


@pytest.mark.parametrize("lifetime", [12.345, timedelta(seconds=12, milliseconds=345)])
@on_both
async def test_lifetime_ends_to_the_millisecond(lifetime: float | timedelta) -> None:
    """A session ends `max_lifetime` after its creation, however active it is."""
    r = Replicas(ttl=10, max_lifetime=lifetime)
    session = await r.sessions.create()
    end = r.clock.now() + timedelta(seconds=12.345)

    assert session.expires_at == end
    for _ in range(2):
        r.clock.advance(6)
        await r.sessions.save(session)
        session = await r.sessions.get(session.id)
    r.clock.advance(0.344)
    assert (await r.sessions.get(session.id)).expires_at == end
    r.clock.advance(0.001)

    for verb in VERBS.values():
        with pytest.raises(SessionNotFound):
            await verb(r.sessions, session)
    assert await r.sessions.delete(session.id) is False


@pytest.fixture
async def unlimited() -> Unlimited:
    """A manager with a lifetime of 100 seconds, and a session that another manager has stored."""
    r = Replicas(max_lifetime=100)
    return r, await SessionManager[Any](r.storage, clock=r.clock).create(id="old", data=1)


async def test_lifetime_bounds_a_session_stored_without_it(unlimited: Unlimited) -> None:
    """`get` returns such a session with an `expires_at`, and a save stores it."""
    r, session = unlimited
    end = r.clock.now() + timedelta(seconds=100)

    r.clock.advance(99.999)
    assert (await r.sessions.get("old")).expires_at == end
    await r.sessions.save(session)

    assert session.expires_at == (await r.storage.inner.load("old")).expires_at == end


@pytest.mark.parametrize("verb", VERBS)
async def test_session_past_the_lifetime_is_removed(unlimited: Unlimited, verb: str) -> None:
    """Each method reports `SessionNotFound`, and removes a session stored without a lifetime."""
    r, session = unlimited
    r.clock.advance(100)
    before = fields(session)

    with pytest.raises(SessionNotFound):
        await VERBS[verb](r.sessions, session)

    assert fields(session) == before
    assert await r.count() == 0


async def test_removal_past_the_lifetime_spares_a_newer_session(unlimited: Unlimited) -> None:
    """A session that took the id after the load survives, because the removal is conditional."""
    r, _ = unlimited
    r.clock.advance(100)

    async def interfere(_: int, name: str) -> None:
        if name == "after load":
            await replace(r, "old")

    r.storage.intercept(interfere)
    with pytest.raises(SessionNotFound):
        await r.sessions.get("old")

    assert (await r.rival.get("old")).data == "rival"


async def test_failed_removal_past_the_lifetime_is_hidden(unlimited: Unlimited) -> None:
    """A failing removal does not hide that the session has ended."""
    r, _ = unlimited
    r.clock.advance(100)
    r.storage.intercept(unavailable_at(2))

    with pytest.raises(SessionNotFound):
        await r.sessions.get("old")


async def test_lifetime_may_reach_beyond_the_calendar() -> None:
    """A session that was created in the far future can be loaded."""
    r = Replicas(max_lifetime=100)
    await r.storage.inner.store(Session(id="x", created_at=datetime.max.replace(tzinfo=UTC)))

    assert (await r.sessions.get("x")).expires_at == datetime.max.replace(tzinfo=UTC)


async def test_save_bounds_the_deadline() -> None:
    """`save` brings an `expires_at` beyond `max_lifetime` back, and keeps an earlier one."""
    r = Replicas(max_lifetime=100)
    session = await r.sessions.create()
    created = r.clock.now()

    for seconds, expected in ((1_000, 100), (50, 50)):
        session.expires_at = created + timedelta(seconds=seconds)
        await r.sessions.save(session)
        assert session.expires_at == created + timedelta(seconds=expected)


# Arguments of the manager


@pytest.mark.parametrize("name", ["max_lifetime", "sweep_interval", "grace"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        *((value, ValueError) for value in (-1, float("nan"), float("inf"), 4e-4, timedelta(-1))),
        *((value, TypeError) for value in ("60", False, [1])),
    ],
    ids=str,
)
def test_wrong_durations_are_refused(name: str, value: Any, error: type[Exception]) -> None:
    """The error names the setting."""
    with pytest.raises(error, match=name):
        SessionManager(LocalStorage[Any](ttl=1), **{name: value})


@pytest.mark.parametrize("value", [0, timedelta(0)])
def test_only_the_grace_may_be_zero(value: Any) -> None:
    """None means "no limit", and a `max_lifetime` beyond the year 9999 is refused, too."""
    assert SessionManager(LocalStorage[Any](ttl=1), grace=value)
    for name in ("max_lifetime", "sweep_interval"):
        with pytest.raises(ValueError, match=name):
            SessionManager(LocalStorage[Any](ttl=1), **{name: value})
    with pytest.raises(ValueError, match="max_lifetime"):
        SessionManager(LocalStorage[Any](ttl=1), max_lifetime=timedelta(days=365 * 9_000))


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("redis://alice:secret@localhost", r"RedisStorage\.from_url"),
        (LocalStorage, "the class LocalStorage"),
        ({}, "dict"),
    ],
)
def test_storage_is_a_storage(storage: Any, message: str) -> None:
    """A URL, a class or another object is a `TypeError`. The message hides the password."""
    with pytest.raises(TypeError, match=message) as caught:
        SessionManager(storage)

    assert "secret" not in str(caught.value)
