"""What `SessionManager` does with a storage, on asyncio and on trio. Rotation has its own file."""

import logging
from collections.abc import Callable
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import anyio
import msgspec
import pytest
from anyio.lowlevel import checkpoint

from aiosessions import (
    CorruptSession,
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
from aiosessions.testing import FakeClock
from tests.backends import on_both
from tests.hooked import HookedStorage


class Setting:
    """A manager over a storage that can be hooked, both on a clock that stands still."""

    def __init__(self, *, ttl: float = 600, codec: Any = None, **options: Any) -> None:
        self.clock = FakeClock()
        inner = LocalStorage[Any](ttl=ttl, clock=self.clock, codec=codec or JsonCodec())
        self.storage = HookedStorage(inner)
        self.sessions = SessionManager[Any](self.storage, clock=self.clock, **options)
        # Somebody else, on another replica, whom no hook sees.
        self.rival = SessionManager[Any](inner, clock=self.clock)


def fields(session: Session[Any]) -> dict[str, Any]:
    """What a session is now, to compare it with what it is later."""
    return msgspec.structs.asdict(session) | {"metadata": dict(session.metadata)}


async def unavailable(_: int, __: str) -> None:
    """A hook: the storage is out of reach."""
    message = "the server did not answer in time"
    raise StorageUnavailable(message)


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


# mutate


def increment(session: Session[Any]) -> None:
    """Add one."""
    session.data = (session.data or 0) + 1


@on_both
async def test_mutate_changes_what_is_stored() -> None:
    """It loads, changes and saves, and returns the session as saved, with its dates stamped."""
    s = Setting()
    session = await s.sessions.create(data=1)
    s.clock.advance(1)
    s.storage.watch()

    changed = await s.sessions.mutate(session.id, increment)

    assert changed.data == 2
    assert changed.updated_at == s.clock.now()
    assert s.storage.calls == ["load", "store unchanged"]
    assert await s.sessions.get(session.id) == changed
    assert session.data == 1


@on_both
async def test_mutate_takes_an_async_change() -> None:
    """A coroutine function is awaited."""
    s = Setting()
    session = await s.sessions.create(data=1)

    async def change(session: Session[Any]) -> None:
        await checkpoint()
        increment(session)

    changed = await s.sessions.mutate(session.id, change)

    assert changed.data == 2
    assert await s.sessions.get(session.id) == changed


@pytest.mark.parametrize("value", [0, False, "", [], "tea"], ids=repr)
@on_both
async def test_mutate_returns_what_the_change_returned(value: object) -> None:
    """Anything but None comes back beside the session, however false it is."""
    s = Setting()
    session = await s.sessions.create(data=1)

    def change(session: Session[Any]) -> object:
        increment(session)
        return value

    async def change_slowly(session: Session[Any]) -> Any:
        await checkpoint()
        return change(session)

    first, returned = await s.sessions.mutate(session.id, change)
    mutate: Any = s.sessions.mutate  # checkers cannot tell an awaitable from any object
    second, awaited = await mutate(session.id, change_slowly)

    assert (first.data, returned) == (2, value)
    assert (second.data, awaited) == (3, value)


@on_both
async def test_a_change_that_raises_abandons_the_write() -> None:
    """Its exception comes out as it is, and nothing is stored; nor is it tried again."""
    s = Setting()
    session = await s.sessions.create(data=1)
    runs = 0

    def change(session: Session[Any]) -> None:
        nonlocal runs
        runs += 1
        session.data = 99
        raise ZeroDivisionError

    async def change_slowly(session: Session[Any]) -> None:
        await checkpoint()
        change(session)

    s.storage.watch()
    for each in (change, change_slowly):
        with pytest.raises(ZeroDivisionError):
            await s.sessions.mutate(session.id, each)

    assert runs == 2
    assert s.storage.calls == ["load", "load"]
    assert await s.sessions.get(session.id) == session


@on_both
async def test_a_conflict_of_the_changes_own_is_not_retried() -> None:
    """A `SessionConflict` that the change itself raises abandons the write, like any exception."""
    s = Setting()
    session = await s.sessions.create(data=1)
    runs = 0

    def change(_: Session[Any]) -> None:
        nonlocal runs
        runs += 1
        message = "two windows"
        raise SessionConflict(message)

    with pytest.raises(SessionConflict, match="two windows"):
        await s.sessions.mutate(session.id, change)

    assert runs == 1


def interfere(s: Setting, id: str, times: float) -> Callable[[int, str], Any]:
    """A hook: somebody else writes before we do, so many times."""

    async def hook(_: int, name: str) -> None:
        nonlocal times
        if name == "before store unchanged" and times > 0:
            times -= 1
            other = await s.rival.get(id)
            other.metadata["seen"] = f"{int(other.metadata.get('seen', 0)) + 1}"
            await s.rival.save(other)

    return hook


@on_both
async def test_after_a_conflict_the_change_is_redone() -> None:
    """On a fresh copy, so that neither change is lost; the last run's value is returned."""
    s = Setting()
    session = await s.sessions.create(data=1)
    seen: list[Session[Any]] = []

    def change(session: Session[Any]) -> int:
        seen.append(session)
        increment(session)
        return len(seen)

    s.storage.watch(interfere(s, session.id, 3))
    changed, value = await s.sessions.mutate(session.id, change)

    assert (changed.data, changed.metadata, value) == (2, {"seen": "3"}, 4)
    assert len({id(each) for each in seen}) == 4
    assert s.storage.calls == ["load", "store unchanged"] * 4
    assert await s.sessions.get(session.id) == changed


@pytest.mark.parametrize("attempts", [1, 2, 5])
@on_both
async def test_attempts_are_bounded(attempts: int) -> None:
    """After so many conflicts `SessionConflict` comes out; what others wrote is stored."""
    s = Setting()
    session = await s.sessions.create(data=1)
    s.storage.watch(interfere(s, session.id, float("inf")))

    with pytest.raises(SessionConflict):
        await s.sessions.mutate(session.id, increment, attempts=attempts)

    assert s.storage.calls == ["load", "store unchanged"] * attempts
    stored = await s.rival.get(session.id)
    assert (stored.data, stored.metadata) == (1, {"seen": str(attempts)})


@on_both
async def test_the_time_for_attempts_is_bounded() -> None:
    """However many are allowed: `SessionConflict` once the time is over."""
    s = Setting()
    session = await s.sessions.create(data=1)
    s.storage.watch(interfere(s, session.id, float("inf")))

    with pytest.raises(SessionConflict):
        await s.sessions.mutate(session.id, increment, attempts=10**9, timeout=0.02)
    tried = len(s.storage.calls)
    with pytest.raises(SessionConflict):
        await s.sessions.mutate(session.id, increment, timeout=0)

    assert tried >= 2
    assert len(s.storage.calls) == tried + 2


@on_both
async def test_thousands_of_attempts_end_like_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses between them do not grow without bound, nor out of what a float can hold."""
    monkeypatch.setattr("random.uniform", lambda low, _: low)
    s = Setting()
    session = await s.sessions.create(data=1)
    s.storage.watch(interfere(s, session.id, float("inf")))

    with pytest.raises(SessionConflict):
        await s.sessions.mutate(session.id, increment, attempts=1_100, timeout=600)


@on_both
async def test_concurrent_changes_all_count() -> None:
    """Many callers that change the same session at once lose nothing."""
    s = Setting()
    session = await s.sessions.create(data=0)

    async def change(session: Session[Any]) -> None:
        value = session.data or 0
        await checkpoint()
        session.data = value + 1

    async with anyio.create_task_group() as tasks:
        for _ in range(12):
            tasks.start_soon(s.sessions.mutate, session.id, change)

    assert (await s.sessions.get(session.id)).data == 12


@on_both
async def test_a_change_leaves_the_id_alone() -> None:
    """A change that sets another id is `InvalidSession`: nothing is stored under either."""
    s = Setting()
    session = await s.sessions.create(data=1)

    def change(session: Session[Any]) -> None:
        session.id = "another"

    with pytest.raises(InvalidSession):
        await s.sessions.mutate(session.id, change)

    assert await s.sessions.get(session.id) == session
    with pytest.raises(SessionNotFound):
        await s.sessions.get("another")


@on_both
async def test_a_change_to_what_cannot_be_stored_is_refused() -> None:
    """`InvalidSession`, at once, and the session is as it was."""
    s = Setting()
    session = await s.sessions.create(data=1)

    def change(session: Session[Any]) -> None:
        session.data = object()

    s.storage.watch()
    with pytest.raises(InvalidSession):
        await s.sessions.mutate(session.id, change)

    assert s.storage.calls == ["load", "store unchanged"]
    assert await s.sessions.get(session.id) == session


@on_both
async def test_a_session_that_goes_while_it_is_changed_stays_gone() -> None:
    """`SessionNotFound`, whether it was there at the beginning or not."""
    s = Setting()
    session = await s.sessions.create(data=1)

    async def change(session: Session[Any]) -> None:
        await s.rival.delete(session.id)

    for _ in range(2):
        with pytest.raises(SessionNotFound):
            await s.sessions.mutate(session.id, change)


@pytest.mark.parametrize("failing", range(4))
@on_both
async def test_an_outage_in_mutate_is_not_retried(failing: int) -> None:
    """At whatever step: the change might be applied twice, so the caller decides."""
    s = Setting()
    session = await s.sessions.create(data=1)

    async def fail(point: int, name: str) -> None:
        if point == failing:
            await unavailable(point, name)

    s.storage.watch(fail)
    with pytest.raises(StorageUnavailable):
        await s.sessions.mutate(session.id, increment)

    assert (await s.rival.get(session.id)).data == (2 if failing == 3 else 1)


@on_both
async def test_a_cancelled_mutate_stores_nothing() -> None:
    """A caller who gives up while the change runs has changed nothing."""
    s = Setting()
    session = await s.sessions.create(data=1)
    scope = anyio.CancelScope()

    async def change(session: Session[Any]) -> None:
        session.data = 99
        scope.cancel()
        await checkpoint()

    with scope:
        await s.sessions.mutate(session.id, change)

    assert scope.cancelled_caught
    assert await s.sessions.get(session.id) == session


# The sweep, and the manager's own life


class Sweeps:
    """A hook that counts sweeps, and lets the test wait for some."""

    def __init__(self, *, failing: Exception | None = None) -> None:
        self.count = 0
        self._failing = failing
        self._wanted = 0
        self._reached = anyio.Event()

    async def __call__(self, _: int, name: str) -> None:
        """Count it, if it is one."""
        if name == "before delete_expired":
            self.count += 1
            if self.count >= self._wanted:
                self._reached.set()
            if self._failing is not None:
                raise self._failing

    async def more(self, count: int) -> None:
        """Wait for so many more."""
        self._wanted = self.count + count
        self._reached = anyio.Event()
        await self._reached.wait()


@on_both
async def test_the_sweep_removes_what_has_expired() -> None:
    """Again and again while the manager is entered; what is alive stays."""
    s = Setting(ttl=60, sweep_interval=0.001)
    sweeps = Sweeps()
    s.storage.watch(sweeps)

    async with s.sessions:
        for _ in range(2):
            dead = await s.sessions.create()
            s.clock.advance(60)
            alive = await s.sessions.create()
            await sweeps.more(2)
            assert await s.storage.inner.delete_expired() == 0
            assert await s.sessions.get(alive.id) == alive
            with pytest.raises(SessionNotFound):
                await s.sessions.get(dead.id)


@on_both
async def test_the_sweep_ends_with_the_manager() -> None:
    """Leaving the manager leaves no task behind, and no sweep comes later."""
    s = Setting(sweep_interval=0.001)
    sweeps = Sweeps()
    s.storage.watch(sweeps)
    before = len(anyio.get_running_tasks())

    async with s.sessions:
        await sweeps.more(1)
    tasks, count = len(anyio.get_running_tasks()), sweeps.count
    for _ in range(20):
        await checkpoint()

    assert tasks == before
    assert sweeps.count == count


@on_both
async def test_a_sweep_that_hangs_is_ended_too() -> None:
    """Leaving the manager does not wait for a storage that does not answer."""
    s = Setting(sweep_interval=0.001)
    begun = anyio.Event()

    async def hang(_: int, __: str) -> None:
        begun.set()
        await anyio.sleep_forever()

    s.storage.watch(hang)
    async with s.sessions:
        await begun.wait()


@on_both
async def test_without_an_interval_nothing_runs() -> None:
    """A manager is then nothing but its methods, and may be used without being entered."""
    s = Setting()
    before = len(anyio.get_running_tasks())

    async with s.sessions as entered:
        assert entered is s.sessions
        assert len(anyio.get_running_tasks()) == before

    assert await s.sessions.get((await s.sessions.create()).id)
    assert "delete_expired" not in s.storage.calls


@pytest.mark.parametrize(
    "error", [StorageUnavailable, CorruptSession, OSError], ids=lambda error: error.__name__
)
@on_both
async def test_the_sweep_outlives_an_outage(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the next sweep is tried; the application goes on.

    The log says what was wrong, and no id: not even if what somebody's storage raised, which is
    no error of ours, quotes one.
    """
    caplog.set_level(logging.DEBUG)
    s = Setting(sweep_interval=0.001)
    session = await s.sessions.create(principal="alice", data="payload")
    reason = f"no answer for {session.id} of alice" if error is OSError else "no answer"
    sweeps = Sweeps(failing=error(reason))
    s.storage.watch(sweeps)

    async with s.sessions:
        await sweeps.more(3)
        assert await s.rival.get(session.id) == session

    records = [record for record in caplog.records if record.name.startswith("aiosessions")]
    assert len(records) >= 2
    assert all(record.levelno >= logging.WARNING for record in records)
    assert error.__name__ in caplog.text or reason in caplog.text
    for secret in (session.id, "alice", "payload"):
        assert secret not in caplog.text


async def fail_within(sessions: SessionManager[Any]) -> None:
    """Raise something while the manager is entered."""
    async with sessions:
        await checkpoint()
        raise ZeroDivisionError


@pytest.mark.parametrize("interval", [None, 0.001, 60])
@on_both
async def test_errors_pass_through_the_manager(interval: float | None) -> None:
    """What is raised inside comes out as it is, sweep or not: no group is wrapped around it."""
    s = Setting(sweep_interval=interval)

    with pytest.raises(ZeroDivisionError):
        await fail_within(s.sessions)


@pytest.mark.parametrize("interval", [None, 0.001, 60])
@on_both
async def test_cancellation_passes_through_the_manager(interval: float | None) -> None:
    """A manager inside a scope that is cancelled ends with it, and swallows nothing else."""
    s = Setting(sweep_interval=interval)
    before = len(anyio.get_running_tasks())
    after = False

    with anyio.CancelScope() as scope:
        async with s.sessions:
            scope.cancel()
            await checkpoint()
        after = True

    assert scope.cancelled_caught
    assert not after
    assert len(anyio.get_running_tasks()) == before


@pytest.mark.parametrize("interval", [None, 0.001])
@on_both
async def test_the_storage_is_borrowed(interval: float | None) -> None:
    """Leaving the manager leaves the storage open; a manager may be entered again."""
    s = Setting(sweep_interval=interval)
    session = await s.sessions.create()

    for _ in range(2):
        async with s.sessions:
            pass

    assert "aclose" not in s.storage.calls
    assert await s.sessions.get(session.id) == session


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
        await s.sessions.mutate(session.id, increment)
    with pytest.raises(StorageClosed):
        await s.sessions.rotate(session)


def test_a_manager_shows_no_secret() -> None:
    """Its `repr` is short, and says nothing of what it manages."""
    s = Setting()

    assert len(repr(s.sessions)) < 200
    assert When.ALWAYS.value not in repr(s.sessions)
