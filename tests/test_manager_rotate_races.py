"""`SessionManager.rotate`: what holds if anything happens in its midst.

Something happens before or after each step of the rotation in turn: its `point`, see
`tests.hooked`. Whatever it is, there is one session that can be used and written in the end, or
none if somebody deleted it; never two.
"""

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aiosessions import (
    Session,
    SessionConflict,
    SessionError,
    SessionNotFound,
    StorageUnavailable,
)
from tests.backends import on_both
from tests.hooked import Setting, fields

# More than a rotation has: it is checked that the last ones are not reached.
POINTS = 10
every_point = pytest.mark.parametrize("point", range(POINTS))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every id that is drawn from here on, also those that nobody is told."""
    ids: list[str] = []

    def draw() -> str:
        ids.append(f"drawn-{len(ids)}")
        return ids[-1]

    monkeypatch.setattr("aiosessions.manager.new_session_id", draw)
    return ids


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
