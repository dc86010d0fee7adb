"""`SessionManager.rotate`: failures, cancellation and other clients at each of its steps.

A failure happens at a `point` before or after each call of the storage; see `InterceptedStorage`.
At the end one session is usable and nothing else is left, or none if another client deleted it.
"""

import asyncio
import contextlib
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aiosessions import (
    Session,
    SessionConflict,
    SessionError,
    StorageUnavailable,
)
from tests.support.loops import on_both
from tests.support.storages import LAST_POINT, Intercept, Replicas, every_grace, every_point, fields


class Interrupted(BaseException):
    """Stands for `KeyboardInterrupt`, which event loops treat specially."""


def raise_at(error: BaseException, *points: int) -> Intercept:
    """Raise an error at some points."""

    async def intercept(point: int, _: str) -> None:
        if point in points:
            raise error

    return intercept


def no_answer() -> StorageUnavailable:
    """The loss of a request or of a reply."""
    return StorageUnavailable("no answer", in_doubt=True)


async def replicas(grace: float = 10, **options: Any) -> tuple[Replicas, Session[Any]]:
    """Replicas, and a stored session with new rights that are not saved."""
    r = Replicas(grace=grace, **options)
    session = await r.sessions.create(id="old", data="before")
    session.data = "new rights"
    return r, session


async def check_new(r: Replicas, new: Session[Any], grace: float) -> None:
    """The new session is usable, and the old one is read-only for the grace or removed."""
    assert await r.rival.get(new.id) == new
    assert new.data == "new rights"
    assert await r.writable(new.id)
    assert not await r.writable("old")
    assert await r.count() == (2 if grace else 1)
    if grace:
        assert (await r.rival.get("old")).data == "before"


async def check_old(r: Replicas) -> None:
    """The old session is as it was, and it is the only one."""
    old = await r.rival.get("old")
    assert (old.data, old.metadata, old.expires_at) == ("before", {}, None)
    assert await r.count() == 1
    assert (await r.rival.rotate(old)).data == "before"


# Errors


@every_grace
@every_point
@pytest.mark.parametrize("new_id", [None, "new"])
@pytest.mark.parametrize("failure", ["outage", "doubtful outage", "foreign", "interrupt"])
@on_both
async def test_error_at_any_point_leaves_one_session(
    point: int, grace: float, new_id: str | None, failure: str
) -> None:
    """The rotation fails or succeeds, as a whole.

    A lost write may be reported as in doubt although it was not sent. A storage should not raise
    foreign errors, but it may.
    """
    r, session = await replicas(grace)
    before = fields(session)
    errors = {
        "outage": StorageUnavailable("no answer", in_doubt=point in {3, 5, 7}),
        "doubtful outage": no_answer(),
        "foreign": OSError(),
        "interrupt": Interrupted(),
    }
    error = errors[failure]
    r.storage.intercept(raise_at(error, point))
    new = raised = None
    try:
        new = await r.sessions.rotate(session, new_id=new_id)
    except (SessionError, OSError, Interrupted) as caught:
        raised = caught

    assert new or raised is error
    assert fields(session) == before
    # After a lost reply, a rotation finds its mark, or that it has removed the old session.
    recognised = point in {5, 7} and failure != "interrupt"
    assert (new is not None) is (recognised or point > LAST_POINT[int(grace)])
    if new is not None:
        await check_new(r, new, grace)
    elif failure == "interrupt" and point == 7:
        assert await r.count() == 0  # removed, and whether another client did so is unknown
    else:
        await check_old(r)


@on_both
async def test_untrue_conflict_leaves_one_session() -> None:
    """A storage may repeat a lost write, and meet its own revision."""
    r, session = await replicas()
    r.storage.intercept(raise_at(SessionConflict(), 5))

    with pytest.raises(SessionConflict) as caught:
        await r.sessions.rotate(session)

    assert type(caught.value) is SessionConflict
    await check_old(r)


@every_grace
@every_point
@on_both
async def test_lasting_outage_leaves_one_session(point: int, grace: float) -> None:
    """If nothing can be taken back, as after a crash, at most one session accepts writes."""
    r, session = await replicas(grace)
    r.storage.intercept(raise_at(no_answer(), *range(point, 99)))

    with contextlib.suppress(StorageUnavailable):
        await r.sessions.rotate(session, new_id="new")
        assert point > LAST_POINT[int(grace)]

    assert await r.writable("old") is (point < 5)
    if await r.lives("old"):
        assert (await r.rival.get("old")).data == "before"
    r.clock.advance(60)
    assert await r.lives("old") is (point < 5)
    assert await r.lives("new") is (point >= 3)


# Cancellation


@every_grace
@every_point
@pytest.mark.parametrize("new_id", [None, "new"])
@on_both
async def test_cancelled_rotation_leaves_one_session(
    point: int, grace: float, new_id: str | None
) -> None:
    """Cancelled at any point, a rotation restores the old session. The last write completes."""
    r, session = await replicas(grace)
    new = None
    with anyio.CancelScope() as scope:

        async def cancel(number: int, _: str) -> None:
            if number == point:
                scope.cancel()
                await checkpoint()

        r.storage.intercept(cancel)
        new = await r.sessions.rotate(session, new_id=new_id)

    assert (new is None) is (point <= 5)
    if new is None:
        await check_old(r)
    else:
        await check_new(r, new, grace)


@every_grace
@every_point
async def test_cancelled_asyncio_task_leaves_one_session(point: int, grace: float) -> None:
    """`Task.cancel` has the same effect; during the removal, the new session remains."""
    r, session = await replicas(grace)

    async def cancel(number: int, _: str) -> None:
        if number == point:
            task.cancel()
            await checkpoint()

    r.storage.intercept(cancel)
    task = asyncio.create_task(r.sessions.rotate(session))
    await asyncio.wait([task])

    assert task.cancelled() is (point <= LAST_POINT[int(grace)])
    if not task.cancelled():
        await check_new(r, task.result(), grace)
    elif point >= 6:  # the removal goes on to its end, and completes the rotation
        assert await r.count() == 1
        assert not await r.lives("old")
    else:
        await check_old(r)


@on_both
async def test_undoing_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that hangs delays a cancelled caller for a few seconds, not for ever."""
    monkeypatch.setattr("aiosessions._rotation._TIMEOUT", 0.01)
    r, session = await replicas()
    with anyio.CancelScope() as scope:

        async def hang(number: int, _: str) -> None:
            if number == 3:
                scope.cancel()
            if number >= 3:
                await anyio.sleep_forever()

        r.storage.intercept(hang)
        await r.sessions.rotate(session)

    assert scope.cancelled_caught


@on_both
async def test_removal_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that hangs in the last write without grace is `StorageUnavailable`."""
    monkeypatch.setattr("aiosessions._rotation._TIMEOUT", 0.01)
    r, session = await replicas(grace=0)

    async def hang(number: int, _: str) -> None:
        if number == 6:
            await anyio.sleep_forever()

    r.storage.intercept(hang)
    with pytest.raises(StorageUnavailable):
        await r.sessions.rotate(session)

    await check_old(r)


@pytest.mark.parametrize("point", [3, 5])
async def test_closed_rotation_takes_nothing_back(point: int) -> None:
    """A coroutine that is closed ends at once, because it cannot wait for the storage."""
    r, session = await replicas(grace=0)
    reached = False

    async def pause(number: int, _: str) -> None:
        nonlocal reached
        reached = number == point
        await asyncio.sleep(0)

    r.storage.intercept(pause)
    rotation = r.sessions.rotate(session)
    while not reached:
        rotation.send(None)
    rotation.close()

    assert len(r.storage.calls) == (point + 1) // 2


@pytest.mark.parametrize("point", [2, 3])
@pytest.mark.parametrize("how", ["in doubt", "cancelled"])
@on_both
async def test_named_id_of_another_session_is_spared(point: int, how: str) -> None:
    """A rotation that fails in doubt deletes only a session that it has stored itself."""
    r, session = await replicas()
    r.clock.advance(1)
    taken = await r.sessions.create(id="new", data="another client's")
    r.clock.advance(1)
    with anyio.CancelScope() as scope:

        async def fail(number: int, _: str) -> None:
            if number == point and how == "in doubt":
                raise no_answer()
            if number == point:
                scope.cancel()
                await checkpoint()

        r.storage.intercept(fail)
        with contextlib.suppress(StorageUnavailable):
            await r.sessions.rotate(session, new_id="new")

    assert await r.rival.get("new") == taken
    assert (await r.rival.get("old")).revision == session.revision
