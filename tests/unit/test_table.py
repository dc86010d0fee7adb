"""The bounded table: expiry on two clocks, eviction, groups, sweeps, and removed keys."""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

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


def make(clock: FakeClock, *, max_entries: int = 100, max_bytes: float = math.inf) -> Table[bytes]:
    """A table with a TTL of 60 seconds."""
    return Table(ttl=60 * SECOND, clock=clock, max_entries=max_entries, max_bytes=max_bytes)


def after(clock: FakeClock, milliseconds: float) -> float:
    """The time so many milliseconds from now, in milliseconds since the epoch."""
    return round(clock.time() * 1000) + milliseconds


def fill(table: Table[bytes], keys: str, deadline: float = math.inf) -> None:
    """Put a value of one byte under each key."""
    for key in keys:
        table.put(key, key.encode(), deadline)


def live(table: Table[bytes], keys: str) -> str:
    """Those of the keys that have a live entry."""
    return "".join(key for key in keys if table.get(key) is not None)


def sweep(table: Table[bytes], before: int | None = None) -> int:
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


class GroupModel:
    """What the groups of a table hold: every entry, the least recently used first.

    An entry is a group and a deadline in seconds, and no entry goes idle.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.now = 0
        self.entries: dict[str, tuple[str | None, float]] = {}

    def put(self, key: str, group: str | None, deadline: float) -> None:
        """Write an entry, and make room for it."""
        self.entries.pop(key, None)
        if deadline > self.now:
            self.entries[key] = group, deadline
        while len(self.entries) > self.room:
            past = [key for key, entry in self.entries.items() if entry[1] <= self.now]
            oldest = next(iter(self.entries))
            self.entries.pop(min(past, key=lambda key: self.entries[key][1], default=oldest))

    def touch(self, key: str) -> None:
        """Use an entry."""
        self.entries[key] = self.entries.pop(key)

    def group(self, name: str) -> list[str]:
        """Return the live entries of a group."""
        return [k for k, (group, end) in self.entries.items() if group == name and end > self.now]


# A key, its group, and the seconds to its deadline; without seconds, an event that writes nothing.
group_events = st.tuples(
    st.sampled_from("abcdef"),
    st.sampled_from(["g", "h", None]),
    st.sampled_from([1, 2, 3, math.inf, 0, "touch", "remove", "advance", "sweep", "clear"]),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(group_events, max_size=60))
def test_groups_hold_their_live_entries(history: list[tuple[str, str | None, Any]]) -> None:
    """A group has them in the order of last use, after writes, moves, evictions and removals."""
    clock = FakeClock()
    table, model = make(clock, max_entries=4), GroupModel(4)
    for key, group, event in history:
        if event == "touch":
            if key in model.entries:
                table.touch(key)
                model.touch(key)
        elif event == "remove":
            table.remove(key)
            model.entries.pop(key, None)
        elif event == "advance":
            clock.advance(1)
            model.now += 1
        elif event == "sweep":
            sweep(table)
            live_now = {k: entry for k, entry in model.entries.items() if entry[1] > model.now}
            model.entries = live_now
        elif event == "clear":
            table.clear()
            model.entries.clear()
        else:
            # Deadlines at different times differ, so that their order is certain.
            table.put(key, b"", after(clock, event * SECOND), group)
            model.put(key, group, model.now + event)

        for name in "gh":
            assert table.group(name) == model.group(name)
        assert len(table) == len(model.entries)


def test_idle_entries_leave_their_group(clock: FakeClock) -> None:
    """At the TTL, and before any sweep."""
    table = make(clock)
    table.put("a", b"", group="g")
    clock.advance(59.999)
    table.put("b", b"", group="g")

    assert table.group("g") == ["a", "b"]
    clock.advance(0.001)
    assert table.group("g") == ["b"]
    table.put("a", b"", group="g")
    assert table.group("g") == ["b", "a"]
    assert table.group("h") == []


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


REMOVALS = [
    pytest.param(lambda table, key: table.remove(key), id="remove"),
    pytest.param(lambda table, key: table.put(key, b"", 0), id="put-past-the-deadline"),
    pytest.param(lambda table, _: fill(table, "wxyz"), id="evict"),
    pytest.param(lambda table, _: sweep(table, 10**15), id="sweep"),
    pytest.param(lambda table, _: table.clear(), id="clear"),
]


@pytest.mark.parametrize("remove", REMOVALS)
def test_removed_key_is_forgotten(
    clock: FakeClock, remove: Callable[[Table[bytes], str], object]
) -> None:
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


@pytest.mark.parametrize(
    "leave",
    [
        *REMOVALS,
        pytest.param(lambda table, key: table.put(key, b"", group="other"), id="other-group"),
        pytest.param(lambda table, key: table.put(key, b""), id="no-group"),
    ],
)
def test_empty_group_is_forgotten(
    clock: FakeClock, leave: Callable[[Table[bytes], str], object]
) -> None:
    """A group takes no memory after its last entry has left it."""
    table = make(clock, max_entries=4)
    name = Key("alice")
    for key in "xyx":
        table.put(key, b"", after(clock, SECOND), name)
    table.remove("y")
    leave(table, "x")
    reference = weakref.ref(name)

    del name
    gc.collect()

    assert reference() is None


def test_promotion_starts_no_ttl(clock: FakeClock) -> None:
    """The entry is evicted later, but expires as before."""
    table = make(clock, max_entries=2)
    fill(table, "ab")
    clock.advance(59.999)
    table.promote("a")
    fill(table, "c")

    assert live(table, "abc") == "ac"
    clock.advance(0.001)
    assert live(table, "abc") == "c"


def test_value_may_be_put_late(clock: FakeClock) -> None:
    """The time that has passed of its TTL counts."""
    table = make(clock)
    table.put("a", b"", age=59 * SECOND)
    table.put("b", b"", age=60 * SECOND)

    assert live(table, "ab") == "a"
    clock.advance(1)
    assert live(table, "ab") == ""
