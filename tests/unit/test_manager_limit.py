"""`SessionManager(max_per_principal=...)`: which sessions go, and what failures leave."""

import asyncio
import contextlib
import random
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aiosessions import InvalidSession, LocalStorage, Session, SessionManager, StorageUnavailable
from tests.support.loops import on_both
from tests.support.storages import IndexedReplicas, every_grace


class Interrupted(BaseException):
    """Stands for `KeyboardInterrupt`, which event loops treat specially."""


def sign_in(session: Session[Any]) -> None:
    """A change that gives a session to alice."""
    session.principal = "alice"


async def limited(most: int, *used: str, **options: Any) -> IndexedReplicas:
    """Replicas with a limit, and with sessions of alice, used one second apart."""
    r = IndexedReplicas(max_per_principal=most, **options)
    for id in used:
        await r.storage.store(Session(id=id, principal="alice"))
    for id in used:
        r.clock.advance(1)
        await r.storage.load(id)
    r.clock.advance(1)
    r.storage.intercept()
    return r


async def left(r: IndexedReplicas, *ids: str) -> str:
    """Those of the ids that have a session, in one string."""
    return "".join([id for id in ids if await r.lives(id)])


@pytest.mark.parametrize(
    ("most", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), (1.0, TypeError)]
)
def test_limit_is_a_positive_number(most: Any, error: type[Exception]) -> None:
    """The constructor raises otherwise, and the message names the setting."""
    with pytest.raises(error, match="max_per_principal"):
        SessionManager(LocalStorage[Any](ttl=60), max_per_principal=most)


@on_both
async def test_longest_unused_session_goes() -> None:
    """A load is use. The limit may have been higher before, and the new session stays."""
    r = await limited(3, *"cabde")

    await r.sessions.create(id="f", principal="alice")

    assert r.storage.calls == ["store absent", "trim"]
    assert await left(r, *"abcdef") == "def"
    await r.sessions.get("d")
    await r.sessions.create(id="g", principal="alice")
    assert await left(r, *"defg") == "dfg"


@on_both
async def test_limit_counts_the_sessions_of_one_owner() -> None:
    """Sessions of others, and those without an owner, neither count nor go."""
    r = await limited(1, "a")

    for id, principal in (("x", None), ("y", None), ("z", "bob"), ("e", "")):
        await r.sessions.create(id=id, principal=principal)
    assert await left(r, *"axyze") == "axyze"
    await r.sessions.create(id="b", principal="alice")

    assert await left(r, *"abxyze") == "bxyze"


@every_grace
@on_both
async def test_sign_in_by_rotation_is_limited(grace: float) -> None:
    """The rotated session counts for its new owner, under its new id only."""
    r = await limited(2, *"ab", grace=grace)
    await r.sessions.create(id="c")
    r.clock.advance(1)

    new = await r.sessions.rotate("c", sign_in, new_id="d")

    assert new.id == "d"
    assert await left(r, *"abd") == "bd"
    assert await r.sessions.count("alice") == 2


@every_grace
@on_both
async def test_rotation_of_the_same_owner_removes_nothing(grace: float) -> None:
    """At the limit, a session moves to another id, and the others stay."""
    r = await limited(2, *"ab", grace=grace)

    await r.sessions.rotate("a", sign_in, new_id="c")

    assert "trim" not in r.storage.calls
    assert await left(r, *"bc") == "bc"


@pytest.mark.parametrize("how", ["create", "rotate"])
@pytest.mark.parametrize("most", [1, 3])
@on_both
async def test_concurrent_sign_ins_end_at_the_limit(how: str, most: int) -> None:
    """However the calls interleave, the limit holds, and no sign-in removes all sessions."""
    r = await limited(most, *"abcde")
    rng = random.Random(most)  # noqa: S311 - repeatable interleavings

    async def pause(_: int, __: str) -> None:
        for _ in range(rng.randrange(4)):
            await checkpoint()

    async def begin(id: str) -> None:
        if how == "create":
            await r.sessions.create(principal="alice")
        else:
            await r.sessions.rotate(id, sign_in)

    for number in range(10):
        guests = [await r.rival.create() for _ in range(6)]
        r.storage.intercept(pause)
        async with anyio.create_task_group() as tasks:
            for guest in guests:
                tasks.start_soon(begin, guest.id)
        assert await r.rival.count("alice") == most, number


# Failures. A failure happens at a point; see `InterceptedStorage`.

CREATE_POINTS = [2, 3]  # before and after the trim
ROTATE_POINTS = [6, 7]
ERRORS = {
    "outage": StorageUnavailable("no answer", in_doubt=True),
    "refusal": InvalidSession(),
    "foreign": OSError(),
    "interrupt": Interrupted(),
}
every_error = pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)


@every_error
@pytest.mark.parametrize("point", CREATE_POINTS)
@on_both
async def test_created_session_is_taken_back(point: int, error: BaseException) -> None:
    """If the limit cannot be enforced, the caller gets the error, and no session is left."""
    r = await limited(2, "a")

    async def fail(number: int, _: str) -> None:
        if number == point:
            raise error

    r.storage.intercept(fail)
    with pytest.raises(type(error)) as caught:
        await r.sessions.create(id="b", principal="alice")

    assert caught.value is error
    assert await left(r, *"ab") == "a"
    assert await r.count() == 1


@every_grace
@every_error
@pytest.mark.parametrize("point", ROTATE_POINTS)
@on_both
async def test_rotation_is_undone(point: int, error: BaseException, grace: float) -> None:
    """If the limit cannot be enforced, the old id works as before, and is the only one."""
    r = await limited(2, "a", grace=grace)
    old = await r.sessions.create(id="b", data="before")

    async def fail(number: int, name: str) -> None:
        if number == point:
            assert name.endswith("trim")
            raise error

    r.storage.intercept(fail)
    with pytest.raises(type(error)) as caught:
        await r.sessions.rotate(old, sign_in)

    assert caught.value is error
    assert await r.count() == 2
    assert await r.sessions.count("alice") == 1
    assert (await r.sessions.get("b", principal=None)).metadata == {}
    r.storage.intercept()
    assert (await r.sessions.rotate("b", sign_in)).data == "before"


@on_both
async def test_outage_leaves_the_session_to_its_owner() -> None:
    """A session that cannot be taken back is listed, and goes with the others."""
    r = await limited(1, "a")

    async def fail(number: int, _: str) -> None:
        if number >= CREATE_POINTS[0]:
            raise StorageUnavailable("no answer", in_doubt=True)

    r.storage.intercept(fail)
    with pytest.raises(StorageUnavailable):
        await r.sessions.create(principal="alice")

    assert await r.rival.count("alice") == 2
    assert await r.rival.revoke_all("alice") == 2
    assert await r.count() == 0


@pytest.mark.parametrize(
    ("how", "point"),
    [("create", point) for point in CREATE_POINTS] + [("rotate", point) for point in ROTATE_POINTS],
)
@every_grace
@on_both
async def test_cancelled_sign_in_leaves_no_session(how: str, point: int, grace: float) -> None:
    """The session of a caller that is cancelled during the trim is taken back."""
    r = await limited(2, "a", grace=grace)
    await r.sessions.create(id="b")
    with anyio.CancelScope() as scope:

        async def cancel(number: int, _: str) -> None:
            if number == point:
                scope.cancel()
                await checkpoint()

        r.storage.intercept(cancel)
        if how == "create":
            await r.sessions.create(principal="alice")
        else:
            await r.sessions.rotate("b", sign_in)

    assert scope.cancelled_caught
    assert await r.count() == 2
    assert (await r.sessions.get("b")).metadata == {}


async def test_second_cancellation_does_not_stop_the_way_back() -> None:
    """`Task.cancel` may come again while the new session is deleted."""
    r = await limited(2, "a")

    async def cancel(number: int, _: str) -> None:
        if number >= CREATE_POINTS[0]:
            task.cancel()
            await checkpoint()

    r.storage.intercept(cancel)
    task = asyncio.create_task(r.sessions.create(principal="alice"))
    with contextlib.suppress(asyncio.CancelledError):
        await task

    assert task.cancelled()
    assert r.storage.calls[-1] == "delete"
    assert await r.count() == 1


@on_both
async def test_way_back_is_bounded_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that hangs delays the error for a few seconds, not for ever."""
    monkeypatch.setattr("aiosessions._rotation._TIMEOUT", 0.01)
    r = await limited(1)

    async def hang(number: int, _: str) -> None:
        if number == CREATE_POINTS[0]:
            raise ZeroDivisionError
        if number > CREATE_POINTS[0]:
            await anyio.sleep_forever()

    r.storage.intercept(hang)
    with pytest.raises(ZeroDivisionError):
        await r.sessions.create(principal="alice")


@pytest.mark.parametrize("how", ["create", "rotate"])
async def test_closed_sign_in_takes_nothing_back(how: str) -> None:
    """A coroutine that is closed during the trim ends at once, because it cannot wait."""
    r = await limited(1)
    await r.rival.create(id="b")
    reached = False

    async def pause(_: int, name: str) -> None:
        nonlocal reached
        reached = name == "before trim"
        await asyncio.sleep(0)

    r.storage.intercept(pause)
    if how == "create":
        call = r.sessions.create(principal="alice")
    else:
        call = r.sessions.rotate("b", sign_in)
    while not reached:
        call.send(None)
    call.close()

    assert r.storage.calls[-1] == "trim"
