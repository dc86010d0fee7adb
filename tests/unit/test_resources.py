"""Live resources of sessions: when they are opened and closed, and for whom."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, suppress
from datetime import timedelta
from typing import Any

import anyio
import pytest

from aiosessions import (
    CorruptSession,
    Session,
    SessionManager,
    SessionNotFound,
    SessionResources,
    StorageClosed,
    StorageUnavailable,
)
from tests.support.resources import (
    GRACE,
    IDLE,
    MAX_OPEN,
    STALENESS,
    TTL,
    World,
    in_a_world,
    settle,
)

Ending = Callable[[World, Session[Any]], Awaitable[object]]


ENDS: dict[str, Ending] = {
    "delete": lambda world, session: world.sessions.delete(session.id),
    "revoke_all": lambda world, _: world.sessions.revoke_all("alice"),
    "revoke": lambda world, session: world.sessions.revoke("alice", session.digest),
    "elsewhere": lambda world, session: world.shared.inner.delete(session.id),
}


async def _created(world: World) -> Session[Any]:
    return await world.sessions.create(principal="alice", data="the session's data")


async def _during(
    block: AbstractAsyncContextManager[Any],
    act: Callable[..., Coroutine[Any, Any, object]],
    *arguments: Any,
) -> None:
    """Enter a block, and stay there while a function acts."""
    async with block, anyio.create_task_group() as group:
        group.start_soon(act, *arguments)
        await anyio.sleep_forever()


async def _used(world: World, id: str) -> Any:
    async with world.use(id) as resource:
        return resource


@in_a_world
async def test_resource_is_opened_once_for_concurrent_callers(world: World) -> None:
    """It gets the session's data. Each later caller gets it, too."""
    session, gate, leave = await _created(world), anyio.Event(), anyio.Event()
    world.before_open = gate.wait
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(world.hold, session.id, leave)
        await settle()
        gate.set()
        await settle()
        assert [(each.users, each.session.data) for each in world.live] == [
            (5, "the session's data")
        ]
        leave.set()
    assert [await _used(world, session.id)] == world.live
    assert world.opens == 1


@in_a_world
async def test_error_of_open_reaches_each_waiting_caller(world: World) -> None:
    """Its traceback does not grow with each of them. The next caller tries again."""
    session, gate, lengths = await _created(world), anyio.Event(), []

    async def fail() -> None:
        await gate.wait()
        raise ConnectionError("refused")

    async def caller() -> None:
        try:
            await _used(world, session.id)
        except ConnectionError as error:
            traceback, length = error.__traceback__, 0
            while traceback is not None:
                traceback, length = traceback.tb_next, length + 1
            lengths.append(length)

    world.before_open = fail
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(caller)
        await settle()
        gate.set()
    assert len(lengths) == 3
    assert len(set(lengths)) == 1
    assert (world.opens, world.resources.statistics().failed) == (1, 1)
    world.before_open = settle
    await _used(world, session.id)


@in_a_world
async def test_cancelled_caller_cancels_no_other(world: World) -> None:
    """Neither while the resource is opened nor while it is used, nor is opening cancelled."""
    session, gate, leave = await _created(world), anyio.Event(), anyio.Event()
    world.before_open = gate.wait
    async with anyio.create_task_group() as group:
        for opened in (False, True):
            if opened:
                gate.set()
            async with anyio.create_task_group() as cancelled:
                cancelled.start_soon(world.hold, session.id, leave)
                await settle()
                group.start_soon(world.hold, session.id, leave)
                await settle()
                cancelled.cancel_scope.cancel()
        await settle()
        assert [each.users for each in world.live] == [2]
        leave.set()
    assert world.opens == 1


@in_a_world
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("cancel", [False, True])
async def test_resource_ends_with_its_session(world: World, end: str, *, cancel: bool) -> None:
    """At once if it is unused. If it is used, after the block, which `cancel` cancels."""
    session, leave = await _created(world), anyio.Event()
    await _used(world, session.id)
    await ENDS[end](world, session)
    await settle()
    assert not world.live
    session, outcomes = await _created(world), []

    async def caller() -> None:
        try:
            await world.hold(session.id, leave, cancel=cancel)
        except SessionNotFound:
            outcomes.append("not found")

    async with anyio.create_task_group() as group:
        group.start_soon(caller)
        await settle()
        await ENDS[end](world, session)
        await settle()
        assert len(world.live) == (not cancel)
        with pytest.raises(SessionNotFound):
            await _used(world, session.id)
        leave.set()
    await settle()
    assert outcomes == ["not found"] * cancel
    assert not world.live


@in_a_world
@pytest.mark.parametrize("grace", [0, GRACE])
async def test_resource_of_rotated_id_ends(world: World, grace: int) -> None:
    """The old id gets a resource for a short time, if it has a grace, and the new id its own."""
    sessions = SessionManager[Any](world.storage, grace=grace, clock=world.clock)
    old, leave, answered = await _created(world), anyio.Event(), []
    new = old
    async with anyio.create_task_group() as group:
        group.start_soon(world.hold, old.id, leave)
        await settle()
        new = await sessions.rotate(old.id)
        await _used(world, new.id)
        with suppress(SessionNotFound):
            answered.append(await _used(world, old.id))
        await settle()
        assert len(answered) == bool(grace)
        assert {each.session.id for each in world.live} == {old.id, new.id}
        leave.set()
    await settle()
    assert [each.session.id for each in world.live] == [new.id]


@in_a_world
async def test_deadline_ends_a_block(world: World) -> None:
    """A change after the deadline, while another block goes on, does no harm."""
    lifetime = timedelta(seconds=25)
    sessions = SessionManager[Any](world.storage, max_lifetime=lifetime, clock=world.clock)
    session, leave = await sessions.create(), anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(world.hold, session.id, leave)
        with pytest.raises(SessionNotFound):
            await _during(world.use(session.id, cancel=True), world.advance, 26)
        await sessions.delete(session.id)
        await settle()
        assert len(world.live) == 1
        leave.set()
    await settle()
    assert not world.live


@in_a_world
async def test_unused_resource_is_closed(world: World) -> None:
    """Each use begins the time anew."""
    session = await _created(world)
    for _ in range(2):
        await _used(world, session.id)
        await world.advance(IDLE - 1)
        assert world.opens == len(world.live) == 1
    await world.advance(1)
    assert not world.live


@in_a_world
async def test_idle_counts_up_to_the_ttl(world: World) -> None:
    """By then, an unused session has expired."""
    session = await _created(world)
    resources = SessionResources(world.sessions, world.open, world.close, max_open=1, idle=10 * TTL)
    async with resources:
        async with resources.use(session.id):
            pass
        await world.advance(TTL)
        assert not world.live


@in_a_world
@pytest.mark.parametrize("idle", [STALENESS, TTL])
async def test_session_in_use_outlives_its_ttl(world: World, idle: int) -> None:
    """Also if an unused resource is taken again."""
    session = await _created(world)
    resources = SessionResources(world.sessions, world.open, world.close, max_open=1, idle=idle)
    async with resources:
        async with resources.use(session.id):
            pass
        await world.advance(STALENESS - 1)
        async with resources.use(session.id, cancel=True):
            await world.advance(3 * TTL)
    await world.sessions.get(session.id)


@in_a_world
async def test_unused_resource_does_not_renew_its_session(world: World) -> None:
    """The session expires a TTL after its last use."""
    session = await _created(world)
    await _used(world, session.id)
    await world.advance(TTL)
    with pytest.raises(SessionNotFound):
        await world.sessions.get(session.id)


@in_a_world
async def test_deletion_closes_an_unused_resource_without_a_check(world: World) -> None:
    """So a message that is wrong renews nothing."""
    session = await _created(world)
    await _used(world, session.id)
    await world.advance(IDLE - 1)

    world.resources.changed(session.digest, "")
    await world.advance(TTL - IDLE + 1)
    assert not world.live
    with pytest.raises(SessionNotFound):
        await world.sessions.get(session.id)


@in_a_world
async def test_longest_unused_resource_makes_room(world: World) -> None:
    """The end of its last use counts, not the beginning."""
    sessions, leave = [await _created(world) for _ in range(MAX_OPEN + 1)], anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(world.hold, sessions[0].id, leave)
        for each in sessions[1:-1]:
            await world.advance(1)
            await _used(world, each.id)
        await world.advance(1)
        leave.set()
        await settle()
    await _used(world, sessions[-1].id)
    expected = {sessions[0].id, *(each.id for each in sessions[2:])}
    assert {each.session.id for each in world.live} == expected


@in_a_world
async def test_all_resources_in_use_is_unavailable(world: World) -> None:
    """The resources that are open can still be used."""
    sessions, leave = [await _created(world) for _ in range(MAX_OPEN + 1)], anyio.Event()
    async with anyio.create_task_group() as group:
        for each in sessions[:-1]:
            group.start_soon(world.hold, each.id, leave)
        await settle()
        with pytest.raises(StorageUnavailable, match="resources are in use"):
            await _used(world, sessions[-1].id)
        await _used(world, sessions[0].id)
        leave.set()
    await _used(world, sessions[-1].id)


@in_a_world
async def test_callers_of_one_session_evict_one_resource(world: World) -> None:
    """Callers of two sessions evict two, which are closed at the same time."""
    sessions, leave, gate = [await _created(world) for _ in range(5)], anyio.Event(), anyio.Event()
    for each in sessions[:MAX_OPEN]:
        await _used(world, each.id)
    world.before_close = gate.wait
    async with anyio.create_task_group() as group:
        for each in sessions[MAX_OPEN:] * 3:
            group.start_soon(world.hold, each.id, leave)
        await settle()
        assert [each.closed for each in world.live] == [True, True, False]
        assert world.resources.statistics().open == MAX_OPEN
        gate.set()
        await settle()
        assert [each.users for each in world.live] == [0, 3, 3]
        leave.set()


@in_a_world
async def test_wrong_principal_closes_nothing(world: World) -> None:
    """The resource of another principal's session cannot be used."""
    session = await _created(world)
    await _used(world, session.id)
    for principal in "bob", None:
        with pytest.raises(SessionNotFound):
            async with world.use(session.id, principal=principal):
                pytest.fail("used")
    await settle()
    assert len(world.live) == 1
    async with world.use(session.id, principal="alice"):
        assert world.opens == 1


@in_a_world
@pytest.mark.parametrize(
    ("error", "kept"),
    [(StorageUnavailable(""), True), (RuntimeError(""), True), (CorruptSession(""), False)],
)
async def test_outage_during_a_check_keeps_the_resource(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, *, kept: bool
) -> None:
    """The end of the session is noticed after the outage."""
    session = await _created(world)

    async def fail(_: str) -> Any:
        raise error

    with monkeypatch.context() as patch:
        async with world.use(session.id):
            patch.setattr(world.sessions, "get", fail)
            await world.sessions.delete(session.id)
            await settle()
        await settle()
        assert len(world.live) == kept
    await world.advance(STALENESS)
    assert not world.live


@in_a_world
async def test_late_use_does_not_delay_the_check(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has found the session, because its load began before the deletion."""
    session = await _created(world)

    async def late(_: str) -> Session[Any]:
        monkeypatch.undo()
        return session

    async with world.use(session.id):
        await world.sessions.delete(session.id)
        monkeypatch.setattr(world.sessions, "get", late)
        await _used(world, session.id)
        await settle()
    await settle()
    assert not world.live


@in_a_world
async def test_other_replica_opens_it_from_the_session(world: World) -> None:
    """Each replica has a resource, and a deletion on one of them closes both."""
    session = await _created(world)
    async with World(near=world.near, shared=world.shared, clock=world.clock) as other:
        await _used(world, session.id)
        assert (await _used(other, session.id)).session.data == "the session's data"
        await other.sessions.delete(session.id)
        await settle()
        assert [*world.live, *other.live] == []


@in_a_world
async def test_new_session_of_the_same_id_gets_a_new_resource(world: World) -> None:
    """It is opened after the last use of the old one."""
    session, leave, own = await _created(world), anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(world.hold, session.id, leave)
        await settle()
        await world.shared.inner.delete(session.id)
        world.clock.advance(1)
        await world.sessions.create(id=session.id)
        group.start_soon(world.hold, session.id, own)
        await settle()
        assert world.opens == 1
        leave.set()
        await settle()
        assert (world.opens, [each.users for each in world.live]) == (2, [1])
        own.set()


@in_a_world
async def test_aclose_waits_for_users(world: World) -> None:
    """It cancels blocks with `cancel`. Nothing can be used afterwards. Twice is fine."""
    session, leave, closed = await _created(world), anyio.Event(), anyio.Event()

    async def tied() -> None:
        with pytest.raises(StorageClosed):
            await world.hold(session.id, anyio.Event(), cancel=True)

    async def close() -> None:
        await world.resources.aclose()
        closed.set()

    async with anyio.create_task_group() as group:
        group.start_soon(world.hold, session.id, leave)
        group.start_soon(tied)
        await settle()
        group.start_soon(close)
        await settle()
        assert [each.users for each in world.live] == [1]
        with pytest.raises(StorageClosed):
            await _used(world, session.id)
        with anyio.move_on_after(0):
            await world.resources.aclose()
        assert not closed.is_set()
        leave.set()
    assert not world.live


@in_a_world
async def test_aclose_during_a_load_refuses_the_use(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the resource would stay open."""
    session = await _created(world)

    async def late(_: str) -> Session[Any]:
        await world.resources.aclose()
        return session

    monkeypatch.setattr(world.sessions, "get", late)
    with pytest.raises(StorageClosed):
        await _used(world, session.id)


@in_a_world
async def test_opening_ends_when_no_caller_waits(world: World) -> None:
    """An `open` that hangs takes no room from others, and the next caller begins anew."""
    session = await _created(world)
    world.before_open = anyio.sleep_forever
    async with anyio.create_task_group() as group:
        group.start_soon(_used, world, session.id)
        await settle()
        assert len(world.live) == 1
        group.cancel_scope.cancel()
    await settle()
    assert not world.live

    world.before_open = settle
    await _used(world, session.id)
    assert world.opens == 2


@in_a_world
async def test_discarded_resource_is_replaced(world: World) -> None:
    """Its user keeps it; the next one waits for its end, and gets another one."""
    session = await _created(world)
    async with anyio.create_task_group() as group:
        async with world.use(session.id) as broken:
            world.resources.discard(session.id)
            group.start_soon(_used, world, session.id)
            await settle()
            assert (world.opens, broken.closed) == (1, False)
        await settle()
    assert (world.opens, broken.closed) == (2, True)
    world.resources.discard("absent")


@in_a_world
async def test_late_load_of_a_deleted_session_ends_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session was created anew under its id, and is in use."""
    old = await _created(world)
    await world.sessions.delete(old.id)
    await world.advance(1)
    new = await world.sessions.create(id=old.id)

    async def late(_: str) -> Session[Any]:
        return old

    async with world.use(new.id, cancel=True):
        with monkeypatch.context() as patch:
            patch.setattr(world.sessions, "get", late)
            with pytest.raises(SessionNotFound):
                await _used(world, old.id)
        await settle()
    assert world.opens == 1


@in_a_world
async def test_failing_close_is_logged_without_id(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The resource counts as closed."""
    session = await _created(world)

    async def fail() -> None:
        raise OSError(session.id)

    world.before_close = fail
    await _used(world, session.id)
    assert session.id not in repr(world.resources) + repr(world.resources.statistics())
    with caplog.at_level(logging.DEBUG):
        await world.sessions.delete(session.id)
        await settle()
    assert "a resource failed to close: OSError" in caplog.text
    assert session.id not in caplog.text
    statistics = world.resources.statistics()
    assert (statistics.open, statistics.closed, statistics.failed) == (0, 1, 1)


@in_a_world
async def test_hanging_close_delays_its_own_session_only(world: World) -> None:
    """The next use of the session waits for it."""
    first, second, gate = await _created(world), await _created(world), anyio.Event()
    world.before_close = gate.wait
    await _used(world, first.id)
    await world.advance(IDLE)
    await _used(world, second.id)
    async with anyio.create_task_group() as group:
        group.start_soon(_used, world, first.id)
        await settle()
        assert world.opens == 2
        gate.set()
    assert world.opens == 3


@in_a_world
async def test_caller_cancelled_at_any_step_leaves(world: World) -> None:
    """After the cancellation of all callers, a resource has no users, and can be used again."""
    for steps in range(12):
        session = await _created(world)
        async with anyio.create_task_group() as group:
            group.start_soon(lambda id: world.hold(id, anyio.Event(), cancel=True), session.id)
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        await settle()
        assert world.resources.statistics().in_use == 0
        await _used(world, session.id)
        await world.sessions.delete(session.id)
        await settle()
    assert not world.live


@in_a_world
async def test_another_task_may_leave_the_block(world: World) -> None:
    """As a fixture or a generator may do; not with `cancel`."""
    session = await _created(world)
    block = world.use(session.id)
    async with anyio.create_task_group() as group:
        group.start_soon(block.__aenter__)
    await block.__aexit__(None, None, None)
    assert world.resources.statistics().in_use == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_open": 0, "idle": 1}, ValueError),
        ({"max_open": 1, "idle": 0}, ValueError),
        ({"max_open": "1", "idle": 1}, TypeError),
        ({"max_open": 1, "idle": "1"}, TypeError),
    ],
)
def test_wrong_arguments_are_refused(options: Any, error: type[Exception]) -> None:
    """Counts and durations are positive."""
    world = World(near=True)
    with pytest.raises(error):
        SessionResources(world.sessions, world.open, world.close, **options)


async def test_task_cancelled_before_its_first_step_is_replaced() -> None:
    """An application may cancel all tasks that it does not know."""
    async with World(near=False) as world:
        session = await _created(world)
        first = asyncio.create_task(_used(world, session.id))
        while not world.resources.statistics().open:  # noqa: ASYNC110 - the turn matters
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {first, asyncio.current_task()}:
            task.cancel()
        with suppress(StorageClosed):
            await first
        await _used(world, session.id)
