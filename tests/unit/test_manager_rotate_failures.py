"""`SessionManager.rotate`: failures, cancellation and other clients at each of its steps.

A failure happens at a `point` before or after each call of the storage; see `InterceptedStorage`.
At the end one session is usable and nothing else is left, or none if another client deleted it.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aiosessions import (
    Session,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionNotFound,
    SessionRotated,
    StorageUnavailable,
)
from tests.support.loops import on_both
from tests.support.storages import Replicas, fields

# load, store absent, store unchanged; and store unchanged once more without grace.
POINTS = range(9)
every_point = pytest.mark.parametrize("point", POINTS)
every_grace = pytest.mark.parametrize("grace", [10, 0])
LAST_POINT = {10: 5, 0: 7}


class Interrupted(BaseException):
    """Stands for `KeyboardInterrupt`, which event loops treat specially."""


def nothing(_: Session[Any]) -> None:
    """A change that leaves the session as it is."""


# Errors at one point


async def rotate_with_error_at(
    r: Replicas, point: int, error: BaseException, **options: Any
) -> Session[Any] | BaseException:
    """Create the session "old", give it new rights, and let one step of its rotation fail."""
    session = await r.sessions.create(id="old", data="before")
    session.data = "new rights"
    before = fields(session)

    async def fail(number: int, _: str) -> None:
        if number == point:
            raise error

    r.storage.intercept(fail)
    try:
        new = await r.sessions.rotate(session, **options)
    except (SessionError, OSError, Interrupted) as raised:
        return raised
    finally:
        assert fields(session) == before
    return new


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


@every_grace
@every_point
@pytest.mark.parametrize("new_id", [None, "new"])
@on_both
async def test_outage_at_any_point_leaves_one_session(
    point: int, grace: float, new_id: str | None
) -> None:
    """A request that was not sent fails. A lost reply fails or succeeds, as a whole."""
    r = Replicas(grace=grace)
    sent = point % 2 == 1
    outage = StorageUnavailable("no answer", in_doubt=sent and point > 1)

    result = await rotate_with_error_at(r, point, outage, new_id=new_id)

    if isinstance(result, Session):
        assert point in {5, 7} or point > LAST_POINT[int(grace)]
        await check_new(r, result, grace)
    else:
        assert result is outage
        await check_old(r)


@every_grace
@every_point
@on_both
async def test_unsent_write_in_doubt_leaves_one_session(point: int, grace: float) -> None:
    """An error may be in doubt although the request never reached the server."""
    r = Replicas(grace=grace)
    outage = StorageUnavailable("no answer", in_doubt=True)

    result = await rotate_with_error_at(r, point, outage)

    if isinstance(result, Session):
        await check_new(r, result, grace)
    else:
        await check_old(r)
    assert isinstance(result, Session) is (point in {5, 7} or point > LAST_POINT[int(grace)])


@every_grace
@every_point
@pytest.mark.parametrize("error", [OSError(), Interrupted()], ids=repr)
@on_both
async def test_foreign_error_leaves_one_session(
    point: int, grace: float, error: BaseException
) -> None:
    """The same holds for errors that a storage should not raise, and for interrupts."""
    r = Replicas(grace=grace)

    result = await rotate_with_error_at(r, point, error)

    if isinstance(result, Session):
        await check_new(r, result, grace)
    elif isinstance(error, Interrupted) and point == 7:
        assert await r.count() == 0  # removed, and whether another client did so is unknown
    else:
        assert result is error
        await check_old(r)


@on_both
async def test_untrue_conflict_leaves_one_session() -> None:
    """A storage may repeat a write after a lost reply, and find its own revision in the way."""
    r = Replicas()

    result = await rotate_with_error_at(r, 5, SessionConflict())

    assert type(result) is SessionConflict
    await check_old(r)


@every_grace
@every_point
@on_both
async def test_lasting_outage_leaves_one_session(point: int, grace: float) -> None:
    """If nothing can be taken back, as after a crash, at most one session accepts writes."""
    r = Replicas(grace=grace)
    session = await r.sessions.create(id="old", data="before")
    session.data = "new rights"

    async def fail(number: int, _: str) -> None:
        if number >= point:
            raise StorageUnavailable("no answer", in_doubt=True)

    r.storage.intercept(fail)
    try:
        await r.sessions.rotate(session, new_id="new")
    except StorageUnavailable:
        assert point <= LAST_POINT[int(grace)]
    else:
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
    r = Replicas(grace=grace)
    session = await r.sessions.create(id="old", data="before")
    session.data = "new rights"
    new = None
    with anyio.CancelScope() as scope:

        async def cancel(number: int, _: str) -> None:
            if number == point:
                scope.cancel()
                await checkpoint()

        r.storage.intercept(cancel)
        new = await r.sessions.rotate(session, new_id=new_id)

    if new is None:
        assert point <= 5
        await check_old(r)
    else:
        assert point > 5
        await check_new(r, new, grace)


@every_grace
@every_point
async def test_cancelled_asyncio_task_leaves_one_session(point: int, grace: float) -> None:
    """`Task.cancel` has the same effect; during the removal, the new session remains."""
    r = Replicas(grace=grace)
    session = await r.sessions.create(id="old", data="before")
    session.data = "new rights"

    async def cancel(number: int, _: str) -> None:
        if number == point:
            task.cancel()
            await checkpoint()

    r.storage.intercept(cancel)
    task = asyncio.create_task(r.sessions.rotate(session))
    await asyncio.wait([task])

    if point > LAST_POINT[int(grace)]:
        await check_new(r, task.result(), grace)
    elif point >= 6:  # the removal goes on to its end, and completes the rotation
        assert task.cancelled()
        assert await r.count() == 1
        assert not await r.lives("old")
    else:
        assert task.cancelled()
        await check_old(r)


@on_both
async def test_taking_back_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that hangs delays a cancelled caller for a few seconds, not for ever."""
    monkeypatch.setattr("aiosessions._rotation._TIMEOUT", 0.01)
    r = Replicas()
    session = await r.sessions.create()
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
async def test_removal_of_the_old_session_is_bounded_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A storage that hangs in the last write without grace is `StorageUnavailable`."""
    monkeypatch.setattr("aiosessions._rotation._TIMEOUT", 0.01)
    r = Replicas(grace=0)
    session = await r.sessions.create(id="old", data="before")

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
    r = Replicas(grace=0)
    session = await r.sessions.create()
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


# A named id


@pytest.mark.parametrize("point", [2, 3])
@pytest.mark.parametrize("how", ["in doubt", "cancelled"])
@on_both
async def test_named_id_of_another_session_is_spared(point: int, how: str) -> None:
    """A rotation that fails in doubt deletes only a session that it has stored itself."""
    r = Replicas()
    session = await r.sessions.create(id="old", data="before")
    r.clock.advance(1)
    taken = await r.sessions.create(id="new", data="another client's")
    r.clock.advance(1)
    with anyio.CancelScope() as scope:

        async def fail(number: int, _: str) -> None:
            if number == point and how == "in doubt":
                raise StorageUnavailable("no answer", in_doubt=True)
            if number == point:
                scope.cancel()
                await checkpoint()

        r.storage.intercept(fail)
        with contextlib.suppress(StorageUnavailable):
            await r.sessions.rotate(session, new_id="new")

    assert await r.rival.get("new") == taken
    assert await r.rival.get("old") == session


# Other clients


async def rotate_while(
    r: Replicas, point: int, act: Callable[[], Awaitable[Any]], *, retry: bool = False
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
        result: Session[Any] | SessionError = await r.sessions.rotate(
            session, nothing if retry else None
        )
    except SessionError as error:
        result = error
    r.storage.intercept()
    return result, other


@every_grace
@every_point
@on_both
async def test_delete_during_a_rotation_wins(point: int, grace: float) -> None:
    """A session that was deleted before the rotation was complete is gone under both ids."""
    r = Replicas(grace=grace)
    await r.sessions.create(id="old", data=1)

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


@every_grace
@pytest.mark.parametrize("first", [4, 6])
@on_both
async def test_deleted_session_stays_deleted_after_a_lost_refusal(first: int, grace: float) -> None:
    """A delete, and then the loss of the reply that reports it, do not restore the old id."""
    r = Replicas(grace=grace)
    session = await r.sessions.create(id="old")

    async def intercept(number: int, _: str) -> None:
        if number == first:
            await r.rival.delete("old")
        if number == first + 1:
            raise StorageUnavailable("no answer", in_doubt=True)

    r.storage.intercept(intercept)
    if first == 4:
        with pytest.raises(StorageUnavailable):
            await r.sessions.rotate(session)
        assert await r.count() == 0
    else:
        new = await r.sessions.rotate(session)
        assert await r.writable(new.id)
        assert await r.lives("old") is (grace > 0)  # it has fewer calls with grace


@on_both
async def test_deleted_session_is_not_restored() -> None:
    """A delete while a rotation is taken back wins, too."""
    r = Replicas()
    session = await r.sessions.create(id="old")
    marked = False

    async def intercept(_: int, name: str) -> None:
        nonlocal marked
        if name == "after store unchanged" and not marked:
            marked = True
            raise Interrupted
        if name == "before store unchanged" and marked:
            await r.rival.delete("old")

    r.storage.intercept(intercept)
    with pytest.raises(Interrupted):
        await r.sessions.rotate(session)

    assert await r.count() == 0


@every_grace
@every_point
@pytest.mark.parametrize("by", ["save", "mutate"])
@on_both
async def test_save_during_a_rotation_is_not_lost(point: int, grace: float, by: str) -> None:
    """The save or the rotation wins, and the other one gets an error."""
    r = Replicas(grace=grace)
    other = await r.sessions.create(id="old", data=1)

    async def save() -> bool:
        if by == "save":
            other.data = 2
            await r.rival.save(other)
        else:
            await r.rival.mutate("old", lambda session: setattr(session, "data", 2))
        return True

    rotated, saved = await rotate_while(r, point, save)

    if isinstance(rotated, Session):
        # A save before the load of a rotation by mutate is part of it: the revision tells.
        assert saved is None or isinstance(saved, SessionConflict | SessionNotFound)
        await check_moved(r, rotated, 1)
    else:
        assert type(rotated) is SessionConflict
        assert saved is True
        assert (await r.rival.get("old")).data == 2
        assert await r.writable("old")
        assert await r.count() == 1


async def check_moved(r: Replicas, new: Session[Any], data: object) -> None:
    """Only the new id accepts writes."""
    assert (await r.rival.get(new.id)).data == data
    assert await r.writable(new.id)
    assert not await r.writable("old")


@every_grace
@every_point
@on_both
async def test_rotation_with_a_change_is_redone_after_a_conflict(point: int, grace: float) -> None:
    """A save before the last write is part of the new session."""
    r = Replicas(grace=grace)
    await r.sessions.create(id="old", data=1)

    rotated, saved = await rotate_while(
        r,
        point,
        lambda: r.rival.mutate("old", lambda session: setattr(session, "data", 2)),
        retry=True,
    )

    assert isinstance(rotated, Session)
    await check_moved(r, rotated, 2 if isinstance(saved, Session) else 1)
    r.clock.advance(10)
    assert await r.count() == 1


@on_both
async def test_rotation_with_a_change_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a hundred conflicts the rotation is a `SessionConflict`."""
    monkeypatch.setattr("random.uniform", lambda low, _: low)
    r = Replicas()
    await r.sessions.create(id="old", data=1)

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
@pytest.mark.parametrize("retry", ["without a change", "with a change"])
@on_both
async def test_one_of_two_rotations_wins(point: int, grace: float, retry: str) -> None:
    """The other one gets `SessionRotated`, or `SessionNotFound` without grace."""
    r = Replicas(grace=grace)
    await r.sessions.create(id="old", data=1)

    both = await rotate_while(
        r, point, lambda: r.rival.rotate("old"), retry=retry == "with a change"
    )

    winners = [each for each in both if isinstance(each, Session)]
    losers = [each for each in both if isinstance(each, SessionError)]
    assert len(winners) == 1
    assert all(isinstance(each, SessionRotated | SessionNotFound) for each in losers)
    await check_moved(r, winners[0], 1)
    r.clock.advance(10)
    assert await r.count() == 1


@on_both
async def test_one_of_two_rotations_to_one_id_wins() -> None:
    """The rotation that finds its new id taken leaves the other one alone."""
    r = Replicas()
    session = await r.sessions.create(id="old", data=1)

    async def rotate(number: int, _: str) -> None:
        if number == 2:
            await r.rival.rotate("old", new_id="new")

    r.storage.intercept(rotate)
    with pytest.raises(SessionExists):
        await r.sessions.rotate(session, new_id="new")

    assert await r.writable("new")


@on_both
async def test_of_many_rotations_one_wins() -> None:
    """Many tasks rotate the same session, and only one of them succeeds."""
    r = Replicas()
    await r.sessions.create(id="old")
    won: list[str] = []
    errors: list[SessionError] = []

    async def rotate() -> None:
        session = await r.sessions.get("old")
        try:
            won.append((await r.sessions.rotate(session)).id)
        except SessionError as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(rotate)

    assert len(won) == 1
    assert [type(error) for error in errors] == [SessionRotated] * 7
    assert await r.writable(won[0])
    assert await r.count() == 2


@every_point
@on_both
async def test_session_may_end_during_its_rotation(point: int) -> None:
    """A session that reaches its lifetime half-way ends under both ids."""
    r = Replicas(max_lifetime=100)
    await r.sessions.create(id="old")

    async def wait() -> None:
        r.clock.advance(100)

    await rotate_while(r, point, wait)
    r.clock.advance(100)

    assert await r.count() == 0


@on_both
async def test_conflict_is_reported_though_the_new_session_stays() -> None:
    """An outage while the new session is deleted does not replace the reason."""
    r = Replicas()
    session = await r.sessions.create(id="old")

    async def intercept(_: int, name: str) -> None:
        if name == "before store unchanged":
            await r.rival.delete("old")
        if name == "before delete":
            raise StorageUnavailable("no answer")

    r.storage.intercept(intercept)
    with pytest.raises(SessionNotFound):
        await r.sessions.rotate(session)
