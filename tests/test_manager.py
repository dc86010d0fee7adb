"""`SessionManager`: creating, loading, saving and deleting sessions, and how long they live."""

from datetime import timedelta
from types import MappingProxyType
from typing import Any

import pytest

from aiosessions import (
    InvalidSession,
    JsonCodec,
    LocalStorage,
    Session,
    SessionConflict,
    SessionExists,
    SessionManager,
    SessionNotFound,
    StorageClosed,
    StorageUnavailable,
    When,
)
from tests.backends import on_both
from tests.hooked import Setting, fields, unavailable

# create


@on_both
async def test_created_sessions_can_be_got() -> None:
    """What `create` returns is what is stored: its fields, its dates and its revision."""
    s = Setting()

    session = await s.sessions.create(
        kind="mcp", principal="alice", metadata={"a": "b"}, data={"n": 1}
    )

    assert (session.kind, session.principal) == ("mcp", "alice")
    assert (session.metadata, session.data) == ({"a": "b"}, {"n": 1})
    assert session.created_at == session.updated_at == s.clock.now()
    assert session.expires_at is None
    assert session.revision
    assert s.storage.calls == ["store absent"]
    assert await s.sessions.get(session.id) == session


@on_both
async def test_created_sessions_have_ids_of_their_own() -> None:
    """Without an id, each gets a new one that nobody can guess."""
    s = Setting()

    ids = {(await s.sessions.create()).id for _ in range(50)}

    assert len(ids) == 50
    assert min(map(len, ids)) >= 22


@on_both
async def test_an_id_can_be_given() -> None:
    """Once: a second session under it is `SessionExists`, and the first one stays."""
    s = Setting()
    session = await s.sessions.create(id="chosen", data=1)

    with pytest.raises(SessionExists):
        await s.sessions.create(id="chosen", data=2)

    assert session.id == "chosen"
    assert await s.sessions.get("chosen") == session


@on_both
async def test_an_empty_id_is_not_a_missing_one() -> None:
    """An id that cannot be one is refused; it does not quietly become a new one."""
    s = Setting()

    for id in ("", "a b", "x" * 257, "é"):
        with pytest.raises(InvalidSession):
            await s.sessions.create(id=id)


@on_both
async def test_metadata_is_copied() -> None:
    """Any mapping will do, and it stays the caller's own."""
    s = Setting()
    given = {"a": "b"}

    session = await s.sessions.create(metadata=MappingProxyType(given))
    session.metadata["c"] = "d"

    assert given == {"a": "b"}
    assert (await s.sessions.get(session.id)).metadata == {"a": "b"}


@on_both
async def test_what_cannot_be_stored_is_not_created() -> None:
    """Data that the codec refuses is `InvalidSession`, and the id is still free."""
    s = Setting(codec=JsonCodec(int))

    with pytest.raises(InvalidSession):
        await s.sessions.create(id="chosen", data="one")

    assert (await s.sessions.create(id="chosen", data=1)).data == 1


# Dates and lifetimes


@pytest.mark.parametrize("lifetime", [12.345, timedelta(seconds=12, milliseconds=345)])
@on_both
async def test_a_lifetime_ends_to_the_millisecond(lifetime: float | timedelta) -> None:
    """`max_lifetime` after its creation a session is gone, however active it was."""
    s = Setting(ttl=10, max_lifetime=lifetime)
    session = await s.sessions.create()
    end = s.clock.now() + timedelta(seconds=12.345)

    assert session.expires_at == end
    for _ in range(2):
        s.clock.advance(6)
        await s.sessions.save(session)
        session = await s.sessions.get(session.id)
    s.clock.advance(0.344)
    assert (await s.sessions.get(session.id)).expires_at == end
    s.clock.advance(0.001)

    with pytest.raises(SessionNotFound):
        await s.sessions.get(session.id)
    with pytest.raises(SessionNotFound):
        await s.sessions.save(session)
    assert await s.sessions.delete(session.id) is False


@on_both
async def test_without_a_lifetime_only_idleness_ends_a_session() -> None:
    """A session that is used lives on for as long as it is."""
    s = Setting(ttl=10)
    session = await s.sessions.create()

    for _ in range(20):
        s.clock.advance(9.999)
        await s.sessions.get(session.id)
    s.clock.advance(10)

    with pytest.raises(SessionNotFound):
        await s.sessions.get(session.id)


@pytest.mark.parametrize("name", ["max_lifetime", "sweep_interval", "grace"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 0.0001, timedelta(-1)])
def test_durations_are_positive(name: str, value: Any) -> None:
    """Negative, NaN, infinite, less than a millisecond: `ValueError`, which names the setting."""
    with pytest.raises(ValueError, match=name):
        SessionManager(LocalStorage[Any](ttl=1), **{name: value})


@pytest.mark.parametrize("name", ["max_lifetime", "sweep_interval"])
@pytest.mark.parametrize("value", [0, 0.0, timedelta(0)])
def test_a_lifetime_or_interval_is_not_zero(name: str, value: Any) -> None:
    """None means none; zero is a mistake. Only `grace` may be 0."""
    with pytest.raises(ValueError, match=name):
        SessionManager(LocalStorage[Any](ttl=1), **{name: value})


@pytest.mark.parametrize("name", ["max_lifetime", "sweep_interval", "grace"])
@pytest.mark.parametrize("value", ["60", True, [1]])
def test_durations_are_numbers(name: str, value: Any) -> None:
    """Anything else is a `TypeError`, which names the setting."""
    with pytest.raises(TypeError, match=name):
        SessionManager(LocalStorage[Any](ttl=1), **{name: value})


def test_a_lifetime_ends_before_the_calendar_does() -> None:
    """A `max_lifetime` that no datetime could express is refused at once, not at each `create`."""
    with pytest.raises(ValueError, match="max_lifetime"):
        SessionManager(LocalStorage[Any](ttl=1), max_lifetime=timedelta(days=365 * 9_000))


# get, save and delete


@on_both
async def test_get_is_one_load() -> None:
    """It costs nothing but the storage's load, which renews the TTL."""
    s = Setting(ttl=10)
    session = await s.sessions.create()
    s.storage.watch()

    s.clock.advance(9)
    await s.sessions.get(session.id)
    s.clock.advance(9)

    assert await s.sessions.get(session.id) == session
    assert s.storage.calls == ["load", "load"]


@on_both
async def test_save_stores_and_stamps() -> None:
    """The object gets a new `updated_at` and `revision`, keeps the rest, and can be saved again."""
    s = Setting(max_lifetime=1_000)
    session = await s.sessions.create(data=1)
    before = fields(session)
    s.storage.watch()

    for data in (2, 3):
        s.clock.advance(1)
        session.data = data
        revision = session.revision
        await s.sessions.save(session)
        assert session.updated_at == s.clock.now()
        assert session.revision != revision
        assert await s.rival.get(session.id) == session

    kept = ("id", "created_at", "expires_at", "metadata")
    assert {name: fields(session)[name] for name in kept} == {name: before[name] for name in kept}
    assert s.storage.calls == ["store unchanged", "store unchanged"]


@on_both
async def test_a_lost_update_is_an_error() -> None:
    """Whoever saves second gets `SessionConflict`; the first one's change stays."""
    s = Setting()
    session = await s.sessions.create(data=0)
    other = await s.rival.get(session.id)
    other.data = 1
    await s.rival.save(other)
    session.data = 2
    before = fields(session)

    s.clock.advance(1)
    with pytest.raises(SessionConflict):
        await s.sessions.save(session)

    assert fields(session) == before
    assert await s.sessions.get(session.id) == other


@on_both
async def test_no_save_brings_a_session_back() -> None:
    """What somebody deleted stays deleted: `SessionNotFound`."""
    s = Setting()
    session = await s.sessions.create()
    assert await s.rival.delete(session.id) is True
    before = fields(session)

    with pytest.raises(SessionNotFound):
        await s.sessions.save(session)

    assert fields(session) == before
    assert await s.sessions.delete(session.id) is False
    with pytest.raises(SessionNotFound):
        await s.sessions.get(session.id)


@on_both
async def test_no_save_overwrites_a_namesake() -> None:
    """A session that was deleted and created anew under the same id is another one."""
    s = Setting()
    session = await s.sessions.create(id="chosen", data=1)
    await s.rival.delete("chosen")
    namesake = await s.rival.create(id="chosen", data=2)

    with pytest.raises(SessionConflict):
        await s.sessions.save(session)

    assert await s.sessions.get("chosen") == namesake


@on_both
async def test_a_session_that_was_never_stored_cannot_be_saved() -> None:
    """`save` is for sessions that exist; `create` makes them."""
    s = Setting()

    with pytest.raises(SessionNotFound):
        await s.sessions.save(Session(id="x"))


@on_both
async def test_a_failed_save_leaves_the_object_alone() -> None:
    """Unencodable data, or an outage before or after the write: all fields are as before."""
    s = Setting()
    session = await s.sessions.create()
    session.data = object()
    s.clock.advance(1)
    before = fields(session)

    with pytest.raises(InvalidSession):
        await s.sessions.save(session)
    assert fields(session) == before
    session.data = 1
    before = fields(session)
    for failing in (0, 1):

        async def fail(point: int, name: str, failing: int = failing) -> None:
            if point == failing:
                await unavailable(point, name)

        s.storage.watch(fail)
        with pytest.raises(StorageUnavailable):
            await s.sessions.save(session)
        assert fields(session) == before


@on_both
async def test_outages_are_not_absences() -> None:
    """What the storage raises comes out as it is."""
    s = Setting()
    session = await s.sessions.create()
    s.storage.watch(unavailable)

    for verb in (s.sessions.get, s.sessions.delete):
        with pytest.raises(StorageUnavailable):
            await verb(session.id)
    with pytest.raises(StorageUnavailable):
        await s.sessions.create()
    with pytest.raises(StorageUnavailable):
        await s.sessions.mutate(session.id, lambda _: None)
    with pytest.raises(StorageUnavailable):
        await s.sessions.rotate(session)


@on_both
async def test_a_closed_storage_is_said_to_be_closed() -> None:
    """Every method raises `StorageClosed` once somebody has closed the storage."""
    s = Setting()
    session = await s.sessions.create()
    await s.storage.aclose()

    for verb in (s.sessions.get, s.sessions.delete):
        with pytest.raises(StorageClosed):
            await verb(session.id)
    with pytest.raises(StorageClosed):
        await s.sessions.create()
    with pytest.raises(StorageClosed):
        await s.sessions.save(session)
    with pytest.raises(StorageClosed):
        await s.sessions.mutate(session.id, lambda _: None)
    with pytest.raises(StorageClosed):
        await s.sessions.rotate(session)


def test_a_manager_shows_no_secret() -> None:
    """Its `repr` is short, and says nothing of what it manages."""
    s = Setting()

    assert len(repr(s.sessions)) < 200
    assert When.ALWAYS.value not in repr(s.sessions)
