"""The bounded table: expiry on two clocks, eviction, sweeps, and removed keys."""

import gc
import math
import weakref
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from aiosessions._table import Table
from aiosessions.testing import FakeClock

SECOND = 1_000


@pytest.fixture
def clock() -> FakeClock:
    """A clock that stands still."""
    return FakeClock()


def make(clock: FakeClock, *, max_entries: int = 100, max_bytes: float = math.inf) -> Table:
    """A table with a TTL of 60 seconds."""
    return Table(ttl=60 * SECOND, clock=clock, max_entries=max_entries, max_bytes=max_bytes)


def after(clock: FakeClock, milliseconds: float) -> float:
    """The time so many milliseconds from now, in milliseconds since the epoch."""
    return round(clock.time() * 1000) + milliseconds


def fill(table: Table, keys: str, deadline: float = math.inf) -> None:
    """Put a value of one byte under each key."""
    for key in keys:
        table.put(key, key.encode(), deadline)


def live(table: Table, keys: str) -> str:
    """Those of the keys that have a live entry."""
    return "".join(key for key in keys if table.get(key) is not None)


def sweep(table: Table, before: int | None = None) -> int:
    """Sweep to the end, and count the removed entries."""
    return sum(1 for _ in table.sweep(before))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from("abcdefghijkl"), st.integers(0, 9)), max_size=80))
def test_deadlines_end_entries_in_any_order(history: list[tuple[str, int]]) -> None:
    """Entries are put, moved to another deadline and removed; each then ends at its deadline."""
    clock = FakeClock()
    table = make(clock)
    ends: dict[str, int] = {}
    for key, seconds in history:
        was_there = ends.pop(key, None) is not None
        if seconds:
            ends[key] = seconds
            table.put(key, b"x" * seconds, after(clock, seconds * SECOND))
        else:
            assert table.remove(key) is was_there

    for now in range(10):
        left = {key: seconds for key, seconds in ends.items() if seconds > now}
        assert live(table, "".join(ends)) == "".join(left)
        assert sweep(table) == sum(seconds == now for seconds in ends.values())
        assert (len(table), table.bytes) == (len(left), sum(left.values()))
        clock.advance(1)


def test_steps_of_the_wall_clock_move_deadlines_only(clock: FakeClock) -> None:
    """A deadline is a date. Idle time is measured on the monotonic clock."""
    table = make(clock)
    fill(table, "a")
    fill(table, "b", after(clock, 100 * SECOND))

    for step, expected in ((-100, "a"), (1, "ab"), (999, "ab")):
        clock.set_back(step)
        assert live(table, "ab") == expected
    clock.advance(59.999)
    assert (live(table, "ab"), sweep(table)) == ("ab", 0)
    clock.advance(0.001)

    assert (live(table, "ab"), sweep(table)) == ("", 2)


def test_least_recently_used_entry_is_evicted(clock: FakeClock) -> None:
    """A put and a touch are use; a get is not. Overwriting needs no room."""
    table = make(clock, max_entries=4)
    fill(table, "abcdd")
    table.touch("a")
    table.put("c", b"again")
    table.get("b")

    order = ""
    for new in "efgh":
        table.put(new, b"")
        order += "".join(set("abcd") - set(live(table, "abcd")) - set(order))

    assert order == "bdac"
    assert (live(table, "efgh"), table.evictions) == ("efgh", 4)


def test_expired_entries_are_removed_before_live_ones(clock: FakeClock) -> None:
    """Past the deadline or idle, they make room, and do not count as evicted."""
    table = make(clock, max_entries=4)
    fill(table, "i")
    clock.advance(30)
    fill(table, "ab")
    fill(table, "x", after(clock, SECOND))
    clock.advance(30)

    fill(table, "cd")
    assert (live(table, "iabxcd"), table.evictions) == ("abcd", 0)
    fill(table, "e")
    assert (live(table, "abcde"), table.evictions) == ("bcde", 1)


def test_values_fit_into_max_bytes(clock: FakeClock) -> None:
    """Old entries make room for a larger value. One beyond the bound evicts no other entry."""
    table = make(clock, max_bytes=10)
    for key in "abc":
        table.put(key, b"123")

    table.put("b", b"1234567")
    assert (live(table, "abc"), table.bytes, table.evictions) == ("bc", 10, 1)
    table.put("b", b"x" * 11)
    assert (live(table, "abc"), table.bytes, table.evictions) == ("c", 3, 1)


def test_sweep_skips_entries_used_after_its_start(clock: FakeClock) -> None:
    """It ends, however many entries are put during the sweep."""
    table = make(clock)
    fill(table, "ab")
    removed = 0

    for _ in table.sweep(round(after(clock, 999 * SECOND))):
        removed += 1
        clock.advance(0.001)
        fill(table, "c")

    assert (removed, live(table, "abc")) == (2, "c")


def test_table_may_change_during_a_sweep(clock: FakeClock) -> None:
    """Each step looks at the table as it is then."""
    table = make(clock)
    fill(table, "abcdef", after(clock, SECOND))
    clock.advance(1)

    steps = table.sweep()
    next(steps)
    fill(table, "abcdef")
    table.remove("f")

    assert (list(steps), live(table, "abcdef")) == ([], "abcde")


class Key(str):
    """A string that can be referred to weakly."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize(
    "remove",
    [
        pytest.param(lambda table, key: table.remove(key), id="remove"),
        pytest.param(lambda table, key: table.put(key, b"", 0), id="put-past-the-deadline"),
        pytest.param(lambda table, _: fill(table, "wxyz"), id="evict"),
        pytest.param(lambda table, _: sweep(table, 10**15), id="sweep"),
        pytest.param(lambda table, _: table.clear(), id="clear"),
    ],
)
def test_removed_key_is_forgotten(clock: FakeClock, remove: Callable[[Table, str], object]) -> None:
    """No reference to a removed key stays in memory: keys are credentials."""
    table = make(clock, max_entries=4)
    key = Key("secret")
    for deadline in (9, 5, 7):
        table.put(key, b"1", after(clock, deadline * SECOND))
        fill(table, "abc", after(clock, 6 * SECOND))
    remove(table, key)
    reference = weakref.ref(key)

    del key
    gc.collect()

    assert reference() is None
