"""`SessionManager.rotate`, while another client uses the same session.

The other client acts at a `point` before or after each call of the storage; see
`InterceptedStorage`. At most one id accepts writes at the end.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aiosessions import (
    Session,
    SessionConflict,
    SessionError,
    SessionNotFound,
    SessionRotated,
    StorageUnavailable,
)
from tests.support.loops import on_both
from tests.support.storages import LAST_POINT, Replicas, every_grace, every_point


async def replicas(grace: float = 10, **options: Any) -> tuple[Replicas, Session[Any]]:
    """Replicas, and a stored session."""
    r = Replicas(grace=grace, **options)
    return r, await r.sessions.create(id="old", data="before")


async def rotate_while(
    r: Replicas, point: int, act: Callable[[], Awaitable[Any]], change: Any = None
) -> tuple[Session[Any] | SessionError, Any]:
    """Rotate "old" while another client acts at one point; return both results, or errors."""
    session = await r.sessions.get("old")
    other: Any = None

    async def intercept(number: int, _: str) -> None:
        nonlocal other
        if number == point:
            try:
                other = await act()
            except SessionError as error:
                other = error

    r.storage.intercept(intercept)
    try:
        return await r.sessions.rotate(session, change), other
    except SessionError as error:
        return error, other


async def check_moved(r: Replicas, new: Session[Any], data: object) -> None:
    """Only the new id accepts writes, and it alone is left after the grace."""
    assert (await r.rival.get(new.id)).data == data
    assert await r.writable(new.id)
    assert not await r.writable("old")
    r.clock.advance(10)
    assert await r.count() == 1


def nothing(_: Session[Any]) -> None:
    """A change that leaves the session as it is."""


@every_grace
@every_point
@on_both
async def test_delete_during_a_rotation_wins(point: int, grace: float) -> None:
    """A session that was deleted before the rotation was complete is gone under both ids."""
    r, _ = await replicas(grace)

    rotated, existed = await rotate_while(r, point, lambda: r.rival.delete("old"))

    if isinstance(rotated, Session):
        # The delete was late: the ids were two sessions already.
        assert existed is None or point == LAST_POINT[int(grace)]
        assert await r.writable(rotated.id)
        assert await r.lives("old") is (existed is None and grace > 0)
    else:
        assert isinstance(rotated, SessionNotFound)
        assert existed is True
        assert await r.count() == 0


@pytest.mark.parametrize(
    ("deleted_at", "lost", "error", "left"),
    [
        (4, {5}, StorageUnavailable, 0),  # the reply that reports the delete is lost
        (10, {5, 6}, StorageUnavailable, 0),  # deleted while the mark is taken back
        (4, {8}, SessionNotFound, 1),  # an outage leaves the new session, and hides no reason
    ],
)
@on_both
async def test_deleted_session_is_not_restored(
    deleted_at: int, lost: set[int], error: type[SessionError], left: int
) -> None:
    """A delete and lost replies during a rotation do not bring the old session back."""
    r, session = await replicas()

    async def intercept(number: int, _: str) -> None:
        if number == deleted_at:
            assert await r.rival.delete("old")
        if number in lost:
            raise StorageUnavailable("no answer", in_doubt=True)

    r.storage.intercept(intercept)
    with pytest.raises(error):
        await r.sessions.rotate(session)

    assert await r.count() == left
    assert not await r.lives("old")


@every_grace
@every_point
@pytest.mark.parametrize("change", [None, nothing])
@on_both
async def test_save_during_a_rotation_is_not_lost(point: int, grace: float, change: Any) -> None:
    """The save or the rotation wins. With a change, the rotation is redone after the save."""
    r, _ = await replicas(grace)

    async def save() -> bool:
        await r.rival.mutate("old", lambda session: setattr(session, "data", "saved"))
        return True

    rotated, saved = await rotate_while(r, point, save, change)

    if isinstance(rotated, Session):
        assert saved is None or isinstance(saved, SessionConflict | SessionNotFound) or change
        await check_moved(r, rotated, "saved" if saved is True else "before")
    else:
        assert type(rotated) is SessionConflict
        assert change is None
        assert (await r.rival.get("old")).data == "saved"
        assert await r.writable("old")
        assert await r.count() == 1


@on_both
async def test_rotation_with_a_change_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a hundred conflicts the rotation is a `SessionConflict`."""
    monkeypatch.setattr("random.uniform", lambda low, _: low)
    r, _ = await replicas()

    async def interfere(_: int, name: str) -> None:
        if name == "before store unchanged":
            await r.rival.mutate("old", nothing)

    r.storage.intercept(interfere)
    with pytest.raises(SessionConflict):
        await r.sessions.rotate("old", nothing, new_id="new")

    assert r.storage.calls.count("store absent") == 100
    assert await r.writable("old")
    assert await r.count() == 1


@every_grace
@every_point
@pytest.mark.parametrize("change", [None, nothing])
@on_both
async def test_one_of_two_rotations_wins(point: int, grace: float, change: Any) -> None:
    """The other one gets `SessionRotated`, or `SessionNotFound` without grace."""
    r, _ = await replicas(grace)

    both = await rotate_while(r, point, lambda: r.rival.rotate("old"), change)

    (winner,) = [each for each in both if isinstance(each, Session)]
    losers = [each for each in both if isinstance(each, SessionError)]
    assert all(isinstance(each, SessionRotated | SessionNotFound) for each in losers)
    await check_moved(r, winner, "before")


@every_point
@on_both
async def test_session_may_end_during_its_rotation(point: int) -> None:
    """A session that reaches its lifetime half-way ends under both ids."""
    r, _ = await replicas(max_lifetime=100)

    async def wait() -> None:
        r.clock.advance(100)

    await rotate_while(r, point, wait)
    r.clock.advance(100)

    assert await r.count() == 0
