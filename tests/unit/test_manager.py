"""`SessionManager`: creating, loading, saving and deleting sessions, and their lifetimes."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest

from aiosessions import (
    InvalidSession,
    InvalidSessionId,
    JsonCodec,
    LocalStorage,
    Session,
    SessionConflict,
    SessionExists,
    SessionManager,
    SessionNotFound,
    StorageClosed,
    StorageUnavailable,
)
from tests.support.loops import on_both
from tests.support.storages import Replicas, fields, unavailable_at

VERBS: dict[str, Callable[[SessionManager[Any], Session[Any]], Awaitable[Any]]] = {
    "get": lambda sessions, session: sessions.get(session.id),
    "save": lambda sessions, session: sessions.save(session),
    "mutate": lambda sessions, session: sessions.mutate(session, lambda _: None),
    "rotate": lambda sessions, session: sessions.rotate(session),
}

# create


@on_both
async def test_created_session_can_be_loaded() -> None:
    """`create` returns the stored session: its fields, its dates and its revision."""
    r = Replicas()

    session = await r.sessions.create(
        kind="mcp", principal="alice", metadata={"a": "b"}, data={"n": 1}
    )

    assert (session.kind, session.principal) == ("mcp", "alice")
    assert (session.metadata, session.data) == ({"a": "b"}, {"n": 1})
    assert session.created_at == session.updated_at == r.clock.now()
    assert session.expires_at is None
    assert session.revision
    assert r.storage.calls == ["store absent"]
    assert await r.sessions.get(session.id) == session


@on_both
async def test_new_ids_are_random() -> None:
    """Sessions that are created without an id get different, long ones."""
    r = Replicas()

    ids = {(await r.sessions.create()).id for _ in range(50)}

    assert len(ids) == 50
    assert min(map(len, ids)) >= 22


@on_both
async def test_create_refuses_a_used_id() -> None:
    """A second session under an id is `SessionExists`, and the first one stays."""
    r = Replicas()
    session = await r.sessions.create(id="chosen", data=1)

    with pytest.raises(SessionExists):
        await r.sessions.create(id="chosen", data=2)

    assert await r.sessions.get("chosen") == session


@pytest.mark.parametrize("id", ["", "a b", "x" * 257, "é"], ids=ascii)
@on_both
async def test_create_refuses_a_malformed_id(id: str) -> None:
    """A malformed id is an error. The empty string does not mean "a new id"."""
    with pytest.raises(InvalidSessionId):
        await Replicas().sessions.create(id=id)


@on_both
async def test_create_copies_the_metadata() -> None:
    """The metadata may be any mapping, and later changes of the session do not reach it."""
    r = Replicas()
    given = {"a": "b"}

    session = await r.sessions.create(metadata=MappingProxyType(given))
    session.metadata["c"] = "d"

    assert given == {"a": "b"}
    assert (await r.sessions.get(session.id)).metadata == {"a": "b"}


@on_both
async def test_refused_data_is_not_created() -> None:
    """Data that the codec refuses is `InvalidSession`, and the id stays free."""
    r = Replicas(codec=JsonCodec(int))

    for data in ("one", None):
        with pytest.raises(InvalidSession):
            await r.sessions.create(id="chosen", data=data)

    assert (await r.sessions.create(id="chosen", data=1)).data == 1


@on_both
async def test_the_key_of_rotated_sessions_is_reserved() -> None:
    """An application that sets this metadata key gets `InvalidSession`."""
    r = Replicas()
    reserved = {"aiosessions.rotated": "x"}
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

    assert (await r.sessions.get("old")).metadata == {}
    assert await r.count() == 1


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

    with pytest.raises(SessionNotFound):
        await r.sessions.get(session.id)
    with pytest.raises(SessionNotFound):
        await r.sessions.save(session)
    assert await r.sessions.delete(session.id) is False


@on_both
async def test_unlimited_session_lives_while_used() -> None:
    """Without `max_lifetime`, a session expires after its TTL without use, and only then."""
    r = Replicas(ttl=10)
    session = await r.sessions.create()

    for _ in range(20):
        r.clock.advance(9.999)
        await r.sessions.get(session.id)
    r.clock.advance(10)

    assert not await r.lives(session.id)


async def stored_without_lifetime(r: Replicas) -> Session[Any]:
    """A session that a manager without `max_lifetime` has stored."""
    session = await SessionManager[Any](r.storage, clock=r.clock).create(id="old", data=1)
    assert session.expires_at is None
    return session


@on_both
async def test_lifetime_bounds_a_session_stored_without_it() -> None:
    """`get` returns such a session with an `expires_at`, and a save stores it."""
    r = Replicas(max_lifetime=100)
    session = await stored_without_lifetime(r)
    end = r.clock.now() + timedelta(seconds=100)

    r.clock.advance(99.999)
    assert (await r.sessions.get("old")).expires_at == end
    await r.sessions.save(session)
    assert session.expires_at == end

    assert (await r.storage.inner.load("old")).expires_at == end


@pytest.mark.parametrize("verb", VERBS)
@on_both
async def test_session_past_the_lifetime_is_removed(verb: str) -> None:
    """Each method reports `SessionNotFound`, and removes a session stored without a lifetime."""
    r = Replicas(max_lifetime=100)
    session = await stored_without_lifetime(r)
    r.clock.advance(100)
    before = fields(session)

    with pytest.raises(SessionNotFound):
        await VERBS[verb](r.sessions, session)

    assert fields(session) == before
    assert await r.count() == 0


@on_both
async def test_removal_past_the_lifetime_spares_a_newer_session() -> None:
    """A session that took the id after the load survives, because the removal is conditional."""
    r = Replicas(max_lifetime=100)
    await stored_without_lifetime(r)
    r.clock.advance(100)

    async def replace(_: int, name: str) -> None:
        if name == "after load":
            await r.rival.delete("old")
            await r.rival.create(id="old", data=2)

    r.storage.intercept(replace)
    with pytest.raises(SessionNotFound):
        await r.sessions.get("old")

    assert (await r.rival.get("old")).data == 2


@on_both
async def test_session_past_the_lifetime_is_not_found_in_an_outage() -> None:
    """A failing removal does not hide that the session has ended."""
    r = Replicas(max_lifetime=100)
    await stored_without_lifetime(r)
    r.clock.advance(100)
    r.storage.intercept(unavailable_at(2))

    with pytest.raises(SessionNotFound):
        await r.sessions.get("old")


@on_both
async def test_lifetime_may_reach_beyond_the_calendar() -> None:
    """A session that was created in the far future can be loaded."""
    r = Replicas(max_lifetime=100)
    await r.storage.inner.store(Session(id="x", created_at=datetime.max.replace(tzinfo=UTC)))

    assert (await r.sessions.get("x")).expires_at == datetime.max.replace(tzinfo=UTC)


@on_both
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
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 0.0001, timedelta(-1)])
def test_durations_are_positive(name: str, value: Any) -> None:
    """A negative, infinite or very short duration is a `ValueError` that names the setting."""
    with pytest.raises(ValueError, match=name):
        SessionManager(LocalStorage[Any](ttl=1), **{name: value})


@pytest.mark.parametrize("name", ["max_lifetime", "sweep_interval"])
@pytest.mark.parametrize("value", [0, timedelta(0)])
def test_only_the_grace_may_be_zero(name: str, value: Any) -> None:
    """None means "no limit"; 0 is a mistake."""
    with pytest.raises(ValueError, match=name):
        SessionManager(LocalStorage[Any](ttl=1), **{name: value})


@pytest.mark.parametrize("name", ["max_lifetime", "sweep_interval", "grace"])
@pytest.mark.parametrize("value", ["60", True, [1]])
def test_durations_are_numbers(name: str, value: Any) -> None:
    """Another type is a `TypeError` that names the setting."""
    with pytest.raises(TypeError, match=name):
        SessionManager(LocalStorage[Any](ttl=1), **{name: value})


def test_lifetime_ends_before_the_calendar() -> None:
    """A `max_lifetime` beyond the year 9999 is refused by the constructor, not by `create`."""
    with pytest.raises(ValueError, match="max_lifetime"):
        SessionManager(LocalStorage[Any](ttl=1), max_lifetime=timedelta(days=365 * 9_000))


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("redis://alice:secret@localhost", r"RedisStorage\.from_url"),
        (LocalStorage, "the class LocalStorage"),
        (None, "NoneType"),
        ({}, "dict"),
    ],
)
def test_storage_is_a_storage(storage: Any, message: str) -> None:
    """A URL, a class or another object is a `TypeError`. The message hides the password."""
    with pytest.raises(TypeError, match=message) as caught:
        SessionManager(storage)

    assert "secret" not in str(caught.value)


def test_repr_hides_the_sessions() -> None:
    """The `repr` of a manager is short and shows no content."""
    assert len(repr(Replicas().sessions)) < 200


# get, save and delete


@on_both
async def test_get_is_one_load() -> None:
    """`get` costs one load of the storage, which renews the TTL."""
    r = Replicas(ttl=10)
    session = await r.sessions.create()
    r.storage.intercept()

    r.clock.advance(9)
    await r.sessions.get(session.id)
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
        revision = session.revision
        await r.sessions.save(session)
        assert session.updated_at == r.clock.now()
        assert session.revision != revision
        assert await r.rival.get(session.id) == session

    kept = ("id", "created_at", "expires_at", "metadata")
    assert {name: fields(session)[name] for name in kept} == {name: before[name] for name in kept}
    assert r.storage.calls == ["store unchanged", "store unchanged"]


@on_both
async def test_lost_update_is_an_error() -> None:
    """The second of two saves is a `SessionConflict`, and the first one's change stays."""
    r = Replicas()
    session = await r.sessions.create(data=0)
    other = await r.rival.get(session.id)
    other.data = 1
    await r.rival.save(other)
    session.data = 2
    before = fields(session)

    r.clock.advance(1)
    with pytest.raises(SessionConflict):
        await r.sessions.save(session)

    assert fields(session) == before
    assert await r.sessions.get(session.id) == other


@on_both
async def test_conflict_is_reported_in_an_outage() -> None:
    """An outage after the refused write does not replace the `SessionConflict`."""
    r = Replicas()
    session = await r.sessions.create()
    await r.rival.mutate(session.id, lambda _: None)
    r.storage.intercept(unavailable_at(2))

    with pytest.raises(SessionConflict):
        await r.sessions.save(session)


@on_both
async def test_save_does_not_restore_a_deleted_session() -> None:
    """Saving a deleted session is `SessionNotFound`, and it stays deleted."""
    r = Replicas()
    session = await r.sessions.create()
    assert await r.rival.delete(session.id) is True
    before = fields(session)

    with pytest.raises(SessionNotFound):
        await r.sessions.save(session)

    assert fields(session) == before
    assert await r.sessions.delete(session.id) is False
    with pytest.raises(SessionNotFound):
        await r.sessions.get(session.id)


@on_both
async def test_save_does_not_overwrite_a_namesake() -> None:
    """A new session under the id of a deleted one is another session."""
    r = Replicas()
    session = await r.sessions.create(id="chosen", data=1)
    await r.rival.delete("chosen")
    namesake = await r.rival.create(id="chosen", data=2)

    with pytest.raises(SessionConflict):
        await r.sessions.save(session)

    assert await r.sessions.get("chosen") == namesake


@on_both
async def test_save_needs_a_stored_session() -> None:
    """`save` does not create a session."""
    with pytest.raises(SessionNotFound):
        await Replicas().sessions.save(Session(id="x"))


@on_both
async def test_failed_save_leaves_the_object_unchanged() -> None:
    """Refused data and outages leave all fields as they were."""
    r = Replicas()
    session = await r.sessions.create()
    session.data = object()
    r.clock.advance(1)
    before = fields(session)

    with pytest.raises(InvalidSession):
        await r.sessions.save(session)
    assert fields(session) == before
    session.data = 1
    before = fields(session)
    for point in (0, 1):
        r.storage.intercept(unavailable_at(point))
        with pytest.raises(StorageUnavailable):
            await r.sessions.save(session)
        assert fields(session) == before


@pytest.mark.parametrize("error", [StorageUnavailable, StorageClosed])
@on_both
async def test_errors_of_the_storage_pass(error: type[Exception]) -> None:
    """An outage is never "not found", and a closed storage raises `StorageClosed`."""
    r = Replicas()
    session = await r.sessions.create()
    r.storage.intercept(unavailable_at())
    if error is StorageClosed:
        r.storage.intercept()
        await r.storage.aclose()

    with pytest.raises(error):
        await r.sessions.create()
    with pytest.raises(error):
        await r.sessions.delete(session.id)
    for verb in VERBS.values():
        with pytest.raises(error):
            await verb(r.sessions, session)
