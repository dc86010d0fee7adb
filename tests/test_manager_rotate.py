"""`SessionManager.rotate`: what holds after it, and what holds if anything happens in its midst.

Tests with a `point` let something happen before or after each step of the rotation in turn; see
`tests.hooked`. Whatever it is, there is one session that can be used and written in the end, or
none if somebody deleted it; never two.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import anyio
import msgspec
import pytest
from anyio.lowlevel import checkpoint

from aiosessions import (
    InvalidSession,
    LocalStorage,
    Session,
    SessionConflict,
    SessionError,
    SessionManager,
    SessionNotFound,
    StorageUnavailable,
)
from aiosessions.testing import FakeClock
from tests.backends import on_both
from tests.hooked import HookedStorage

# More than a rotation has: it is checked that the last ones are not reached.
POINTS = 10
every_point = pytest.mark.parametrize("point", range(POINTS))


class Setting:
    """A manager over a storage that can be hooked, both on a clock that stands still."""

    def __init__(self, *, grace: float = 10, ttl: float = 600, **options: Any) -> None:
        self.clock = FakeClock()
        inner = LocalStorage[Any](ttl=ttl, clock=self.clock)
        self.storage = HookedStorage(inner)
        self.sessions = SessionManager[Any](self.storage, grace=grace, clock=self.clock, **options)
        # Somebody else, on another replica, whom no hook sees.
        self.rival = SessionManager[Any](inner, grace=grace, clock=self.clock, **options)

    async def lives(self, id: str) -> bool:
        """Whether there is a session under this id."""
        try:
            await self.rival.get(id)
        except SessionNotFound:
            return False
        return True

    async def writable(self, id: str) -> bool:
        """Whether there is a session under this id that can be written."""
        try:
            await self.rival.mutate(id, lambda _: None)
        except (SessionNotFound, SessionConflict):
            return False
        return True


def fields(session: Session[Any]) -> dict[str, Any]:
    """What a session is now, to compare it with what it is later."""
    return msgspec.structs.asdict(session) | {"metadata": dict(session.metadata)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every id that is drawn from here on, also those that nobody is told."""
    ids: list[str] = []

    def draw() -> str:
        ids.append(f"drawn-{len(ids)}")
        return ids[-1]

    monkeypatch.setattr("aiosessions.manager.new_session_id", draw)
    return ids


# Without disturbance


@on_both
async def test_the_session_gets_a_new_id() -> None:
    """All else stays: data, kind, principal, metadata, and when it was created and will end."""
    s = Setting(max_lifetime=1_000)
    old = await s.sessions.create(kind="web", principal="alice", metadata={"a": "b"}, data=[1])
    s.clock.advance(5)

    new = await s.sessions.rotate(old)

    moved = {"id", "updated_at", "revision"}
    assert {k: v for k, v in fields(new).items() if k not in moved} == {
        k: v for k, v in fields(old).items() if k not in moved
    }
    assert len({new.id, old.id}) == 2
    assert len(new.id) >= 22
    assert new.updated_at == s.clock.now()
    assert await s.sessions.get(new.id) == new


@on_both
async def test_the_new_session_is_independent() -> None:
    """It can be saved and changed like any other, and its end is its own."""
    s = Setting()
    old = await s.sessions.create(metadata={"a": "b"}, data=1)

    new = await s.sessions.rotate(old)
    new.metadata["c"] = "d"
    await s.sessions.save(new)
    changed = await s.sessions.mutate(new.id, lambda session: session.metadata.pop("a"))
    s.clock.advance(599)

    assert changed[0].metadata == {"c": "d"}
    assert old.metadata == {"a": "b"}
    assert (await s.sessions.get(new.id)).metadata == {"c": "d"}


@on_both
async def test_the_object_that_was_passed_keeps_its_id() -> None:
    """`rotate` returns another object, and leaves the one it was given as it was."""
    s = Setting()
    old = await s.sessions.create(metadata={"a": "b"}, data=1)
    before = fields(old)

    new = await s.sessions.rotate(old)

    assert new is not old
    assert fields(old) == before


@on_both
async def test_a_rotation_carries_changes_that_were_not_saved() -> None:
    """New rights that were set on the object are in the new session, and in it alone."""
    s = Setting()
    rights: list[str] = []
    old = await s.sessions.create(principal=None, data={"rights": rights})
    old.principal = "alice"
    rights.append("admin")
    old.metadata["role"] = "admin"

    new = await s.sessions.rotate(old)
    snapshot = await s.sessions.get(old.id)

    assert (await s.sessions.get(new.id)).principal == "alice"
    assert (await s.sessions.get(new.id)).data == {"rights": ["admin"]}
    assert (snapshot.principal, snapshot.data) == (None, {"rights": []})
    assert "role" not in snapshot.metadata
    assert new.id not in repr(fields(snapshot))


@on_both
async def test_the_old_id_never_gains_what_the_new_one_is_given() -> None:
    """Whatever is saved under the new id later, the old one answers with the old snapshot."""
    s = Setting()
    old = await s.sessions.create(data={"rights": []})
    new = await s.sessions.rotate(old)

    new.data = {"rights": ["admin"]}
    await s.sessions.save(new)
    await s.sessions.mutate(new.id, lambda session: setattr(session, "principal", "alice"))

    snapshot = await s.sessions.get(old.id)
    assert (snapshot.principal, snapshot.data) == (None, {"rights": []})


@pytest.mark.parametrize("waits", [[9, 0.9, 0.099], [0, 0], [2.499]], ids=str)
@on_both
async def test_the_old_id_answers_for_the_grace(waits: list[float]) -> None:
    """Exactly so long, to the millisecond, however often it is asked; the new one lives on."""
    s = Setting(grace=sum(waits) + 0.001)
    old = await s.sessions.create(data=1)

    new = await s.sessions.rotate(old)
    for wait in waits:
        s.clock.advance(wait)
        assert (await s.sessions.get(old.id)).data == 1
    s.clock.advance(0.001)

    with pytest.raises(SessionNotFound):
        await s.sessions.get(old.id)
    assert await s.sessions.get(new.id) == new
    assert await s.storage.inner.delete_expired() == 1


@on_both
async def test_a_grace_may_be_a_timedelta() -> None:
    """Like every duration."""
    s = Setting()
    sessions = SessionManager[Any](s.storage, grace=timedelta(seconds=3), clock=s.clock)
    old = await sessions.create()

    await sessions.rotate(old)
    s.clock.advance(2.999)
    assert await s.lives(old.id)
    s.clock.advance(0.001)

    assert not await s.lives(old.id)


@on_both
async def test_without_grace_the_old_id_is_gone_at_once() -> None:
    """With `grace=0` it is not found when `rotate` returns."""
    s = Setting(grace=0)
    old = await s.sessions.create()

    new = await s.sessions.rotate(old)

    with pytest.raises(SessionNotFound):
        await s.sessions.get(old.id)
    assert await s.sessions.delete(old.id) is False
    with pytest.raises((SessionNotFound, SessionConflict)):
        await s.sessions.save(old)
    assert await s.sessions.get(new.id) == new


@on_both
async def test_no_rotation_moves_the_end() -> None:
    """However often it is rotated, a session ends `max_lifetime` after it was created."""
    s = Setting(max_lifetime=100, grace=50)
    session = old = await s.sessions.create()
    created_at, expires_at = session.created_at, session.expires_at

    for _ in range(3):
        s.clock.advance(30)
        old, session = session, await s.sessions.rotate(session)
        assert (session.created_at, session.expires_at) == (created_at, expires_at)
    s.clock.advance(9.999)
    assert await s.lives(session.id)
    assert await s.lives(old.id)  # for 50 seconds, but not past the end of the session
    s.clock.advance(0.001)

    assert not await s.lives(session.id)
    assert not await s.lives(old.id)


@on_both
async def test_the_end_is_the_stored_one() -> None:
    """An `expires_at` that somebody set on the object does not prolong the session."""
    s = Setting(max_lifetime=100)
    session = await s.sessions.create()
    end = session.expires_at
    session.expires_at = None

    new = await s.sessions.rotate(session)

    assert new.expires_at == end
    assert (await s.sessions.get(new.id)).expires_at == end


@on_both
async def test_nothing_can_be_written_under_the_old_id() -> None:
    """Save, mutate and rotate are `SessionConflict`, for old objects and freshly loaded ones."""
    s = Setting()
    old = await s.sessions.create(data=1)
    new = await s.sessions.rotate(old)

    for session in (old, await s.sessions.get(old.id)):
        before = fields(session)
        with pytest.raises(SessionConflict):
            await s.sessions.save(session)
        with pytest.raises(SessionConflict):
            await s.sessions.rotate(session)
        assert fields(session) == before
    with pytest.raises(SessionConflict):
        await s.sessions.mutate(old.id, lambda session: setattr(session, "data", 2))

    assert (await s.sessions.get(old.id)).data == 1
    assert await s.sessions.get(new.id) == new


@pytest.mark.parametrize("how", ["replaced", "cleared"])
@on_both
async def test_changed_metadata_does_not_open_the_old_id(how: str) -> None:
    """Nor can anything be written by whoever sets the metadata of what they loaded anew."""
    s = Setting()
    old = await s.sessions.create(metadata={"a": "b"}, data=1)
    new = await s.sessions.rotate(old)

    def change(session: Session[Any]) -> None:
        session.data = 2
        session.expires_at = None
        if how == "replaced":
            session.metadata = {"c": "d"}
        else:
            session.metadata.clear()

    loaded = await s.sessions.get(old.id)
    change(loaded)
    with pytest.raises(SessionConflict):
        await s.sessions.save(loaded)
    with pytest.raises(SessionConflict):
        await s.sessions.rotate(loaded)
    with pytest.raises(SessionConflict):
        await s.sessions.mutate(old.id, change)

    assert (await s.sessions.get(old.id)).data == 1
    assert await s.sessions.get(new.id) == new
    s.clock.advance(10)
    assert not await s.lives(old.id)


@on_both
async def test_a_refused_mutate_does_not_wait_for_the_old_id() -> None:
    """A rotated id stays rotated, so the change is not tried again."""
    s = Setting()
    old = await s.sessions.create(data=1)
    await s.sessions.rotate(old)
    s.storage.watch()

    with pytest.raises(SessionConflict):
        await s.sessions.mutate(old.id, lambda session: setattr(session, "data", 2))

    assert s.storage.calls.count("load") == 1


@on_both
async def test_deleting_the_old_id_leaves_the_new_one() -> None:
    """What is deleted in its grace is the old answer; the session lives on under its new id."""
    s = Setting()
    old = await s.sessions.create()
    new = await s.sessions.rotate(old)

    assert await s.sessions.delete(old.id) is True

    assert not await s.lives(old.id)
    assert await s.sessions.get(new.id) == new


@on_both
async def test_a_session_is_rotated_from_its_last_revision() -> None:
    """Over what somebody else has written since, it is a `SessionConflict`, and nothing moves."""
    s = Setting()
    session = await s.sessions.create(data=1)
    other = await s.rival.get(session.id)
    other.data = 2
    await s.rival.save(other)
    s.storage.watch()

    with pytest.raises(SessionConflict):
        await s.sessions.rotate(session)

    assert await s.sessions.get(session.id) == other
    assert await s.writable(session.id)
    assert "store absent" not in s.storage.calls


@on_both
async def test_a_session_that_is_gone_is_not_rotated() -> None:
    """`SessionNotFound`: a rotation brings nobody back."""
    s = Setting()
    session = await s.sessions.create()
    await s.sessions.delete(session.id)
    s.storage.watch()

    for missing in (session, Session[Any](id="never-stored")):
        with pytest.raises(SessionNotFound):
            await s.sessions.rotate(missing)

    assert s.storage.calls == ["load", "load"]


@on_both
async def test_a_session_that_cannot_be_stored_is_not_rotated() -> None:
    """`InvalidSession`; the stored session stays as it was, under its id."""
    s = Setting()
    session = await s.sessions.create(data=1)
    session.data = object()

    with pytest.raises(InvalidSession):
        await s.sessions.rotate(session)

    assert (await s.sessions.get(session.id)).data == 1
    assert await s.writable(session.id)


@on_both
async def test_sessions_can_be_rotated_again() -> None:
    """And again, at once: each time the last id is the one that counts."""
    s = Setting()
    session = await s.sessions.create(data=1)
    retired: list[str] = []

    for _ in range(4):
        retired.append(session.id)
        session = await s.sessions.rotate(session)

    assert len({session.id, *retired}) == 5
    assert await s.writable(session.id)
    assert [await s.writable(id) for id in retired] == [False] * 4
    assert [await s.lives(id) for id in retired] == [True] * 4


@pytest.mark.parametrize("grace", [timedelta(days=365 * 9_000), 86_400 * 365 * 9_000])
@on_both
async def test_a_grace_beyond_the_calendar(grace: Any) -> None:
    """It is refused when the manager is made, or works; no rotation fails because of it."""
    s = Setting()
    try:
        sessions = SessionManager[Any](s.storage, grace=grace, clock=s.clock)
    except ValueError:
        return
    session = await sessions.create()

    new = await sessions.rotate(session)

    assert await s.sessions.get(new.id) == new


# Something goes wrong half-way


@pytest.mark.parametrize("grace", [10, 0])
@pytest.mark.parametrize("how", ["outage", "cancelled"])
@every_point
@on_both
async def test_a_rotation_that_breaks_off_leaves_a_usable_session(
    point: int, how: str, grace: float
) -> None:
    """Under the old id, writable, until the very moment it is retired; no rights leak to it."""
    s = Setting(grace=grace)
    session = await s.sessions.create(id="old", data="before")
    session.data = "new rights"
    before = fields(session)
    scope = anyio.CancelScope()
    reached: list[str] = []

    async def break_off(number: int, name: str) -> None:
        if number == point:
            reached.append(name)
            if how == "outage":
                message = "the server did not answer in time"
                raise StorageUnavailable(message)
            scope.cancel()
            await checkpoint()

    s.storage.watch(break_off)
    new: Session[Any] | None = None
    with scope:
        try:
            new = await s.sessions.rotate(session)
        except StorageUnavailable:
            assert reached
    assert fields(session) == before
    assert (new is None) is bool(reached)

    if new is not None:
        assert await s.writable(new.id)
        assert not await s.writable("old")
    elif reached == ["after store unchanged"]:
        # It was applied and the reply was lost: the grace is what there is to be had.
        assert not await s.writable("old")
        assert await s.lives("old") is (grace > 0)
    else:
        assert (await s.rival.get("old")).data == "before"
        assert await s.writable("old")
        fresh = await s.rival.get("old")
        assert (await s.rival.rotate(fresh)).data == "before"
    if await s.lives("old"):
        assert (await s.rival.get("old")).data == "before"


@on_both
async def test_a_rotation_has_no_more_steps_than_are_tested() -> None:
    """The points above cover it whole, the last ones being past its end."""
    s = Setting()
    session = await s.sessions.create()
    seen: list[int] = []

    async def note(number: int, _: str) -> None:
        seen.append(number)

    s.storage.watch(note)
    await s.sessions.rotate(session)

    assert max(seen) < POINTS - 2  # a refused one deletes what it has made, besides
    assert s.storage.calls[0] == "load"


# Somebody else comes in between


async def rotate_while(
    s: Setting, session: Session[Any], point: int, meanwhile: Callable[[], Any]
) -> tuple[Session[Any] | SessionError, Session[Any] | bool | SessionError | None, str]:
    """Rotate, and at some point do something else; what both gave, and after which step."""
    other: Session[Any] | bool | SessionError | None = None
    reached = ""

    async def interfere(number: int, name: str) -> None:
        nonlocal other, reached
        if number == point:
            reached = name
            try:
                other = await meanwhile()
            except SessionError as error:
                other = error

    s.storage.watch(interfere)
    try:
        rotated: Session[Any] | SessionError = await s.sessions.rotate(session)
    except SessionError as error:
        rotated = error
    s.storage.watch()
    return rotated, other, reached


@pytest.mark.parametrize("grace", [10, 0])
@every_point
@on_both
async def test_a_delete_during_a_rotation(point: int, grace: float, drawn: list[str]) -> None:
    """Until the old id is retired it ends the session, which the rotation does not bring back."""
    s = Setting(grace=grace)
    session = await s.sessions.create(id="old", data=1)

    rotated, existed, reached = await rotate_while(s, session, point, lambda: s.rival.delete("old"))

    lives = [id for id in ("old", *drawn) if await s.lives(id)]
    if isinstance(rotated, Session):
        # Nobody came, or it came to an id that was retired already, as if after the rotation.
        assert reached in ("", "after store unchanged")
        assert existed in (None, grace > 0)
        assert rotated.id in lives
        assert await s.writable(rotated.id)
        assert reached == "" or "old" not in lives
    else:
        assert isinstance(rotated, SessionNotFound)
        assert existed is True
        assert lives == []


@pytest.mark.parametrize("grace", [10, 0])
@every_point
@on_both
async def test_a_save_during_a_rotation(point: int, grace: float, drawn: list[str]) -> None:
    """One of the two wins and the other is told: no write is lost, and no session is split."""
    s = Setting(grace=grace)
    session = await s.sessions.create(id="old", data=1)
    other = await s.rival.get("old")
    other.data = 2

    async def save() -> bool:
        await s.rival.save(other)
        return True

    rotated, saved, _ = await rotate_while(s, session, point, save)

    writable = [id for id in ("old", *drawn) if await s.writable(id)]
    if isinstance(rotated, Session):
        assert saved is None or isinstance(saved, SessionConflict | SessionNotFound)
        assert writable == [rotated.id]
        assert (await s.rival.get(rotated.id)).data == 1
    else:
        assert isinstance(rotated, SessionConflict)
        assert saved is True
        assert writable == ["old"]
        assert (await s.rival.get("old")).data == 2
        assert [id for id in drawn if await s.lives(id)] == []


@every_point
@on_both
async def test_a_mutate_during_a_rotation(point: int, drawn: list[str]) -> None:
    """The change is applied to the session that goes on, or its caller is told so."""
    s = Setting()
    session = await s.sessions.create(id="old", data=1)

    rotated, mutated, _ = await rotate_while(
        s,
        session,
        point,
        lambda: s.rival.mutate("old", lambda session: setattr(session, "data", 2)),
    )

    writable = [id for id in ("old", *drawn) if await s.writable(id)]
    if isinstance(rotated, Session):
        assert mutated is None or isinstance(mutated, SessionConflict)
        assert writable == [rotated.id]
    else:
        assert isinstance(rotated, SessionConflict)
        assert isinstance(mutated, Session)
        assert writable == ["old"]
        assert (await s.rival.get("old")).data == 2


@pytest.mark.parametrize("grace", [10, 0])
@every_point
@on_both
async def test_two_rotations_at_once(point: int, grace: float, drawn: list[str]) -> None:
    """One wins, the other is told; there is one session in the end that can be written."""
    s = Setting(grace=grace)
    session = await s.sessions.create(id="old", data=1)
    other = await s.rival.get("old")

    rotated, also, _ = await rotate_while(s, session, point, lambda: s.rival.rotate(other))

    writable = [id for id in ("old", *drawn) if await s.writable(id)]
    winners = [each for each in (rotated, also) if isinstance(each, Session)]
    losers = [each for each in (rotated, also) if isinstance(each, SessionError)]
    assert len(winners) == 1
    assert writable == [winners[0].id]
    assert all(isinstance(each, SessionConflict | SessionNotFound) for each in losers)


@every_point
@on_both
async def test_the_old_session_ends_during_a_rotation(point: int, drawn: list[str]) -> None:
    """A session past its lifetime is gone under every id, even if it ended half-way."""
    s = Setting(max_lifetime=100)
    session = await s.sessions.create(id="old")

    async def wait() -> None:
        s.clock.advance(100)

    await rotate_while(s, session, point, wait)
    s.clock.advance(100)

    assert [id for id in ("old", *drawn) if await s.lives(id)] == []


@on_both
async def test_a_refused_rotation_that_cannot_clean_up_says_why_it_was_refused(
    drawn: list[str],
) -> None:
    """An outage while the new session is removed does not hide the conflict."""
    s = Setting()
    session = await s.sessions.create(id="old")

    async def hook(_: int, name: str) -> None:
        if name == "before store unchanged":
            await s.rival.delete("old")
        if name == "before delete":
            message = "the server did not answer in time"
            raise StorageUnavailable(message)

    s.storage.watch(hook)
    with pytest.raises(SessionNotFound):
        await s.sessions.rotate(session)

    assert drawn


@on_both
async def test_of_many_rotations_one_wins() -> None:
    """Many tasks with the same session: one gets the new id, all others are told."""
    s = Setting()
    await s.sessions.create(id="old")

    async def yielding(_: int, __: str) -> None:
        await checkpoint()

    s.storage.watch(yielding)
    won: list[str] = []
    told: list[SessionError] = []

    async def rotate() -> None:
        session = await s.sessions.get("old")
        try:
            won.append((await s.sessions.rotate(session)).id)
        except SessionError as error:
            told.append(error)

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(rotate)

    assert len(won) == 1
    assert len(told) == 7
    assert await s.writable(won[0])
    assert not await s.writable("old")
