"""`LocalStorage` beyond the contract: atomic verbs, bounded memory, cheap sweeps, two clocks.

Its verbs do not yield to the event loop, so most tests here run without one, with `done`.
"""

import sys
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from aiosessions import (
    LocalStorage,
    Session,
    SessionConflict,
    SessionExists,
    SessionNotFound,
    When,
)
from aiosessions.testing import FakeClock
from tests.backends import done, on_both


def store(
    storage: LocalStorage[Any], *ids: str, lasting: float | None = None, clock: FakeClock
) -> None:
    """Store a session under each id, with a deadline in so many seconds."""
    end = None if lasting is None else clock.now() + timedelta(seconds=lasting)
    for id in ids:
        done(storage.store(Session[Any](id=id, expires_at=end)))


def left(storage: LocalStorage[Any], *ids: str) -> str:
    """Those of the ids under which there is a session. Looks without loading, in any order."""
    found: list[str] = []
    for id in ids:
        try:  # a write that is refused renews nothing
            done(storage.store(Session[Any](id=id, revision="none"), when=When.UNCHANGED))
        except SessionConflict:
            found.append(id)
        except SessionNotFound:
            continue
    return "".join(found)


@pytest.fixture
def clock() -> FakeClock:
    """A clock that stands still."""
    return FakeClock()


def test_no_verb_yields(clock: FakeClock) -> None:
    """Each verb decides and acts in one go: no other task can come in between."""
    storage = LocalStorage[Any](ttl=60, clock=clock)
    session = Session[Any](id="x")

    for when in (When.ABSENT, When.UNCHANGED, When.PRESENT, When.ALWAYS):
        done(storage.store(session, when=when))
    assert done(storage.load("x")) == session
    assert done(storage.delete("x")) is True
    done(storage.store(session))
    clock.advance(60)
    assert done(storage.delete_expired()) == 1
    assert done(storage.delete_expired(clock.now())) == 0
    done(storage.aclose())


def test_the_least_recently_used_goes_first(clock: FakeClock) -> None:
    """Beyond `max_sessions`; storing and loading are use, failing to is not."""
    storage = LocalStorage[Any](ttl=60, max_sessions=4, clock=clock)
    store(storage, *"abcd", clock=clock)
    done(storage.load("a"))
    store(storage, "c", clock=clock)
    with pytest.raises(SessionExists):
        done(storage.store(Session(id="b"), when=When.ABSENT))

    order = ""
    for new in "efgh":
        store(storage, new, clock=clock)
        order += "".join(sorted(set("abcd") - set(left(storage, *"abcd")) - set(order)))

    assert order == "bdac"
    assert left(storage, *"efgh") == "efgh"


def test_overwriting_evicts_nothing(clock: FakeClock) -> None:
    """A full storage has room for what it holds already."""
    storage = LocalStorage[Any](ttl=60, max_sessions=2, clock=clock)
    store(storage, *"ab", clock=clock)

    for _ in range(5):
        store(storage, *"ba", clock=clock)

    assert left(storage, *"ab") == "ab"


def test_a_refused_store_evicts_nothing(clock: FakeClock) -> None:
    """What is not stored needs no room."""
    storage = LocalStorage[Any](ttl=60, max_sessions=2, clock=clock)
    store(storage, *"ab", clock=clock)

    for when in (When.PRESENT, When.UNCHANGED):
        with pytest.raises(SessionNotFound):
            done(storage.store(Session(id="c"), when=when))

    assert left(storage, *"ab") == "ab"


def test_one_session_is_enough_room(clock: FakeClock) -> None:
    """`max_sessions=1` keeps the last one."""
    storage = LocalStorage[Any](ttl=60, max_sessions=1, clock=clock)

    store(storage, *"abc", clock=clock)

    assert left(storage, *"abc") == "c"


def test_what_is_past_its_deadline_goes_before_the_living(clock: FakeClock) -> None:
    """Even if it was the last to be used; so nobody loses a session while a dead one is kept."""
    storage = LocalStorage[Any](ttl=60, max_sessions=4, clock=clock)
    store(storage, *"ab", clock=clock)
    store(storage, *"xy", lasting=1, clock=clock)
    clock.advance(1)

    store(storage, *"cd", clock=clock)
    assert left(storage, *"abcdxy") == "abcd"
    store(storage, "e", clock=clock)
    assert left(storage, *"abcde") == "bcde"


def test_what_is_idle_goes_before_the_living(clock: FakeClock) -> None:
    """A session past its TTL makes room for a new one."""
    storage = LocalStorage[Any](ttl=60, max_sessions=3, clock=clock)
    store(storage, "x", clock=clock)
    clock.advance(30)
    store(storage, *"ab", clock=clock)
    clock.advance(30)

    store(storage, "c", clock=clock)

    assert left(storage, *"abcx") == "abc"


def test_a_deadline_that_was_put_off_is_no_reason_to_go(clock: FakeClock) -> None:
    """The deadline that counts is the last one that was stored."""
    storage = LocalStorage[Any](ttl=600, max_sessions=2, clock=clock)
    store(storage, "a", lasting=1, clock=clock)
    store(storage, "a", lasting=100, clock=clock)
    store(storage, "b", lasting=1, clock=clock)
    store(storage, "b", clock=clock)
    clock.advance(2)

    assert done(storage.delete_expired()) == 0
    store(storage, "c", clock=clock)

    assert left(storage, *"abc") == "bc"


def test_a_load_starts_a_full_ttl(clock: FakeClock) -> None:
    """A session that is used lives on; one that is idle does not come back by being asked for."""
    storage = LocalStorage[Any](ttl=60, clock=clock)
    store(storage, *"ab", clock=clock)

    for _ in range(3):
        clock.advance(59.999)
        done(storage.load("a"))
    for id in "aab":
        clock.advance(60 if id == "a" else 0)
        with pytest.raises(SessionNotFound):
            done(storage.load(id))


def test_a_deadline_that_was_brought_forward_counts(clock: FakeClock) -> None:
    """A sweep, and whoever needs room, find a session that got its deadline, or a nearer one."""
    storage = LocalStorage[Any](ttl=600, max_sessions=3, clock=clock)
    store(storage, "a", clock=clock)
    store(storage, "b", lasting=100, clock=clock)
    store(storage, *"abc", lasting=1, clock=clock)
    store(storage, "c", clock=clock)
    clock.advance(1)

    assert done(storage.delete_expired()) == 2
    assert left(storage, *"abc") == "c"


def test_a_deleted_sessions_deadline_is_not_its_successors(clock: FakeClock) -> None:
    """A session that was deleted and created again does not inherit the old deadline."""
    storage = LocalStorage[Any](ttl=600, clock=clock)
    store(storage, "a", lasting=1, clock=clock)
    done(storage.delete("a"))
    store(storage, "a", lasting=100, clock=clock)
    clock.advance(2)

    assert done(storage.delete_expired()) == 0
    assert left(storage, "a") == "a"


@pytest.mark.parametrize("step", [-100_000.0, 100_000.0], ids=["forward", "back"])
def test_steps_of_the_wall_clock_do_not_change_a_ttl(clock: FakeClock, step: float) -> None:
    """Idle time is counted on the clock that never steps: exact to the millisecond."""
    storage = LocalStorage[Any](ttl=60, clock=clock)
    store(storage, "a", clock=clock)

    clock.set_back(step)
    clock.advance(59.999)
    assert done(storage.delete_expired()) == 0
    assert left(storage, "a") == "a"
    clock.set_back(-2 * step)
    clock.advance(0.001)

    assert left(storage, "a") == ""
    assert done(storage.delete_expired()) == 1


def test_the_wall_clock_decides_about_deadlines(clock: FakeClock) -> None:
    """`expires_at` is a date, so it is held against the clock that tells the date."""
    storage = LocalStorage[Any](ttl=10_000_000, clock=clock)
    store(storage, "a", lasting=100, clock=clock)

    clock.set_back(-99.999)
    assert left(storage, "a") == "a"
    clock.set_back(-0.001)
    assert left(storage, "a") == ""
    clock.set_back(50)
    assert left(storage, "a") == "a"


def test_sweeping_before_a_moment_counts_idle_time(clock: FakeClock) -> None:
    """What was last used before the moment goes, to the millisecond, also if it is alive."""
    storage = LocalStorage[Any](ttl=600, clock=clock)
    store(storage, "a", clock=clock)
    clock.advance(10)
    store(storage, "b", clock=clock)
    moment = clock.now()
    clock.advance(10)

    assert done(storage.delete_expired(moment)) == 1
    assert left(storage, *"ab") == "b"
    assert done(storage.delete_expired(moment + timedelta(milliseconds=1))) == 1
    assert left(storage, "b") == ""


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the lines that the interpreter executes inside the block, which depend on no clock.

    Not its instructions: since Python 3.12, the first ones that are traced may go uncounted.
    """
    steps = [0]

    def trace(_frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        steps[0] += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield steps
    finally:
        sys.settrace(before)


def steps_of(verb: Callable[[], Coroutine[Any, Any, object]]) -> int:
    """What a verb costs."""
    with counted() as steps:
        done(verb())
    return steps[0]


@pytest.mark.parametrize("dying", ["idle", "past-deadline"])
def test_a_sweep_costs_what_has_expired(dying: str) -> None:
    """As much among 10,000 living sessions as among 100; and in proportion to the dead."""

    def cost(living: int, dead: int) -> int:
        clock = FakeClock()
        storage = LocalStorage[Any](ttl=600, clock=clock)
        dead_ids = [f"dead-{n}" for n in range(dead)]
        store(storage, *dead_ids, lasting=10 if dying == "past-deadline" else None, clock=clock)
        clock.advance(599)
        store(storage, *(f"living-{n}" for n in range(living // 2)), clock=clock)
        store(storage, *(f"ending-{n}" for n in range(living // 2)), lasting=60, clock=clock)
        clock.advance(1)
        return steps_of(storage.delete_expired)

    one = cost(100, 10)
    many = cost(10_000, 10)
    none = cost(10_000, 0)

    assert many < 1.2 * one
    assert none < one / 2
    assert cost(100, 80) < 1.2 * 8 * one


def test_verbs_cost_the_same_however_much_is_stored(clock: FakeClock) -> None:
    """Storing, loading, deleting and making room do not look through the sessions."""

    def costs(stored: int) -> list[int]:
        storage = LocalStorage[Any](ttl=600, max_sessions=stored, clock=clock)
        store(storage, *(f"{n:05}" for n in range(stored)), lasting=60, clock=clock)
        middle = f"{stored // 2:05}"
        return [
            steps_of(lambda: storage.load(middle)),
            steps_of(lambda: storage.store(Session[Any](id=middle))),
            steps_of(lambda: storage.delete(middle)),
            steps_of(lambda: storage.store(Session[Any](id="y" * 5))),
            steps_of(lambda: storage.store(Session[Any](id="z" * 5))),
        ]

    few, many = costs(10), costs(5_000)

    assert [more < 1.5 * less for less, more in zip(few, many, strict=True)] == [True] * 5


@contextmanager
def no_growth(allowed: int) -> Iterator[None]:
    """Check that what is done in the block leaves no more than so many bytes allocated."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < allowed


def test_rewriting_a_session_takes_no_memory(clock: FakeClock) -> None:
    """Each write may move the deadline; what was noted about the earlier ones is dropped."""
    storage = LocalStorage[Any](ttl=600, clock=clock)
    store(storage, *"abc", lasting=1_000, clock=clock)

    with no_growth(50_000):
        for n in range(3_000):
            store(storage, "a", lasting=1_000 + n, clock=clock)

    assert left(storage, *"abc") == "abc"


def test_sessions_that_come_and_go_take_no_memory(clock: FakeClock) -> None:
    """Nothing is left of a deleted session, nor of one that was evicted."""
    storage = LocalStorage[Any](ttl=600, max_sessions=5, clock=clock)
    store(storage, *"abc", lasting=1_000, clock=clock)

    with no_growth(50_000):
        for n in range(1_500):
            store(storage, f"deleted-{n}", lasting=1_000 + n, clock=clock)
            done(storage.delete(f"deleted-{n}"))
            store(storage, f"evicted-{n}", lasting=1_000 + n, clock=clock)


def test_closing_frees_what_was_stored(clock: FakeClock) -> None:
    """A closed storage that somebody still refers to holds no sessions."""
    storage = LocalStorage[Any](ttl=600, clock=clock)

    with no_growth(50_000):
        for n in range(100):
            done(storage.store(Session[Any](id=f"{n}", data="x" * 10_000)))
        done(storage.aclose())


DEAD = 3_000  # many more than a sweep removes in one go


@on_both
async def test_a_long_sweep_lets_others_run() -> None:
    """Other tasks get their turn before it is done, and what they store meanwhile is left alone."""
    clock = FakeClock()
    storage = LocalStorage[Any](ttl=60, clock=clock)
    store(storage, *(f"{n}" for n in range(DEAD)), clock=clock)
    clock.advance(60)
    finished = anyio.Event()
    turns = removed = 0

    async def others() -> None:
        nonlocal turns
        # The last of the dead comes back to life before the sweep has got there.
        await storage.store(Session[Any](id=f"{DEAD - 1}"), when=When.ABSENT)
        while not finished.is_set():
            turns += 1
            await storage.load(f"{DEAD - 1}")
            await checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(others)
        removed = await storage.delete_expired()
        finished.set()

    assert turns >= 3
    assert removed == DEAD - 1
    assert (await storage.load(f"{DEAD - 1}")).id == f"{DEAD - 1}"


@on_both
async def test_a_cancelled_sweep_can_be_taken_up_again() -> None:
    """A sweep that was cancelled half-way has removed some; the next removes the rest."""
    clock = FakeClock()
    storage = LocalStorage[Any](ttl=60, clock=clock)
    store(storage, *(f"{n}" for n in range(DEAD)), clock=clock)
    clock.advance(60)
    store(storage, "alive", clock=clock)

    with anyio.CancelScope() as scope:
        scope.cancel()
        await storage.delete_expired()

    assert scope.cancelled_caught
    assert 0 < await storage.delete_expired() < DEAD
    assert left(storage, "alive") == "alive"


@on_both
async def test_two_sweeps_at_once_count_each_session_once() -> None:
    """However they take turns, together they remove what has expired."""
    clock = FakeClock()
    storage = LocalStorage[Any](ttl=60, clock=clock)
    store(storage, *(f"{n}" for n in range(DEAD)), lasting=1, clock=clock)
    clock.advance(60)
    counts: list[int] = []

    async def sweep() -> None:
        counts.append(await storage.delete_expired())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sweep)
        tasks.start_soon(sweep)

    assert sum(counts) == DEAD
    assert min(counts) > 0


@on_both
async def test_closing_ends_a_sweep() -> None:
    """A storage that is closed while it is swept stays closed, and the sweep ends."""
    clock = FakeClock()
    storage = LocalStorage[Any](ttl=60, clock=clock)
    store(storage, *(f"{n}" for n in range(DEAD)), clock=clock)
    clock.advance(60)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(storage.aclose)
        assert await storage.delete_expired() < DEAD


@pytest.mark.parametrize("max_sessions", [0, -1])
def test_there_is_room_for_at_least_one(max_sessions: int) -> None:
    """A storage that could hold nothing cannot be made."""
    with pytest.raises(ValueError, match="max_sessions"):
        LocalStorage(ttl=1, max_sessions=max_sessions)
