"""The bounded table: expiry on two clocks, eviction, sweeps, and costs that do not grow."""

import gc
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from aiosessions._table import Table
from aiosessions.testing import FakeClock

TTL = 60_000
SECOND = 1_000


@pytest.fixture
def clock() -> FakeClock:
    """A clock that stands still."""
    return FakeClock()


def make(clock: FakeClock, *, max_entries: int = 100, max_bytes: float = math.inf) -> Table:
    """A table with a TTL of 60 seconds."""
    return Table(ttl=TTL, clock=clock, max_entries=max_entries, max_bytes=max_bytes)


def after(clock: FakeClock, milliseconds: int) -> int:
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


def test_put_creates_and_overwrites(clock: FakeClock) -> None:
    """The last value of a key is returned, and its size counted."""
    table = make(clock)

    table.put("a", b"12345")
    table.put("b", b"")
    table.put("a", b"123")

    assert (table.get("a"), table.get("b"), table.get("c")) == (b"123", b"", None)
    assert (len(table), table.bytes) == (2, 3)


def test_entry_expires_after_its_ttl(clock: FakeClock) -> None:
    """A put or a touch starts a full TTL, exact to the millisecond; a get does not."""
    table = make(clock)
    fill(table, "ab")
    clock.advance(30)
    table.touch("a")
    table.get("b")

    clock.advance(29.999)
    assert live(table, "ab") == "ab"
    clock.advance(0.001)
    assert live(table, "ab") == "a"
    clock.advance(29.999)
    assert live(table, "ab") == "a"
    clock.advance(0.001)
    assert live(table, "ab") == ""


def test_entry_expires_at_its_deadline(clock: FakeClock) -> None:
    """A touch does not carry it past its deadline."""
    table = make(clock)
    fill(table, "a", after(clock, SECOND))

    clock.advance(0.999)
    table.touch("a")
    assert live(table, "a") == "a"
    clock.advance(0.001)
    assert live(table, "a") == ""


@pytest.mark.parametrize("step", [-100_000.0, 100_000.0], ids=["forward", "back"])
def test_steps_of_the_wall_clock_leave_the_ttl_alone(clock: FakeClock, step: float) -> None:
    """Idle time is measured on the monotonic clock."""
    table = make(clock)
    fill(table, "a")

    clock.set_back(step)
    clock.advance(59.999)
    assert (live(table, "a"), sweep(table)) == ("a", 0)
    clock.set_back(-2 * step)
    clock.advance(0.001)

    assert (live(table, "a"), sweep(table)) == ("", 1)


def test_steps_of_the_wall_clock_move_deadlines(clock: FakeClock) -> None:
    """A deadline is a date, so it is compared with the wall clock."""
    table = make(clock)
    fill(table, "a", after(clock, 100 * SECOND))

    clock.set_back(-100)
    assert live(table, "a") == ""
    clock.set_back(1)
    assert live(table, "a") == "a"


@pytest.mark.parametrize("deadline", [0, 1_900_000_000_456], ids=["1970", "now"])
def test_put_past_the_deadline_removes_the_key(clock: FakeClock, deadline: int) -> None:
    """An expired value leaves no entry, nor an earlier one in its place."""
    table = make(clock)
    fill(table, "ab")

    fill(table, "ac", deadline)

    assert (live(table, "abc"), len(table), table.bytes) == ("b", 1, 1)


def test_remove_returns_whether_the_entry_was_live(clock: FakeClock) -> None:
    """An expired entry is removed too, but counts as absent."""
    table = make(clock)
    fill(table, "a")
    fill(table, "b", after(clock, 1))
    clock.advance(0.001)

    assert [table.remove(key) for key in "aabc"] == [True, False, False, False]
    assert (len(table), table.bytes) == (0, 0)


def test_least_recently_used_entry_is_evicted(clock: FakeClock) -> None:
    """A put and a touch are use; a get is not."""
    table = make(clock, max_entries=4)
    fill(table, "abcd")
    table.touch("a")
    table.put("c", b"again")
    table.get("b")

    order = ""
    for new in "efgh":
        table.put(new, b"")
        order += "".join(set("abcd") - set(live(table, "abcd")) - set(order))

    assert order == "bdac"
    assert (live(table, "efgh"), table.evictions) == ("efgh", 4)


def test_overwriting_evicts_nothing(clock: FakeClock) -> None:
    """A full table has room for new values of its keys."""
    table = make(clock, max_entries=2)

    fill(table, "abbaba")

    assert (live(table, "ab"), table.evictions) == ("ab", 0)


def test_table_of_one_entry_keeps_the_last(clock: FakeClock) -> None:
    """The new entry is not the one that is evicted."""
    table = make(clock, max_entries=1)

    fill(table, "abc")

    assert live(table, "abc") == "c"


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
    """The least recently used entries make room for a larger value."""
    table = make(clock, max_bytes=10)
    for key in "abc":
        table.put(key, b"123")

    table.put("b", b"123456")

    assert (live(table, "abc"), table.bytes, table.evictions) == ("bc", 9, 1)


def test_value_beyond_max_bytes_is_not_kept(clock: FakeClock) -> None:
    """It evicts no other entry, and an earlier value of its key is removed."""
    table = make(clock, max_bytes=10)
    fill(table, "ab")

    table.put("b", b"x" * 11)

    assert (live(table, "ab"), table.bytes, table.evictions) == ("a", 1, 0)


def test_sweep_before_a_moment_removes_unused_entries(clock: FakeClock) -> None:
    """Entries that were last used before it are removed, live ones too."""
    table = make(clock)
    fill(table, "a")
    clock.advance(10)
    fill(table, "b")
    moment = after(clock, 0)
    clock.advance(10)

    assert (sweep(table, moment), live(table, "ab")) == (1, "b")
    assert (sweep(table, moment + 1), live(table, "ab")) == (1, "")


def test_sweep_skips_entries_used_after_its_start(clock: FakeClock) -> None:
    """It ends, however many entries are put during the sweep."""
    table = make(clock)
    fill(table, "ab")
    removed = 0

    for _ in table.sweep(after(clock, 999 * SECOND)):
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


class Pair:
    """A table, and a dictionary that is searched for the same answers."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.table = Table(ttl=5, clock=self.clock, max_entries=100)
        self.now = 0
        self.stored: dict[str, tuple[int, float, bytes]] = {}  # time of use, deadline, value

    def is_live(self, key: str) -> bool:
        """Return whether the dictionary has a live value."""
        used_at, deadline, _ = self.stored.get(key, (0, 0, b""))
        return self.now < min(used_at + 5, deadline)

    def put(self, key: str, number: int) -> None:
        """Put a value of this size, with a deadline unless the number is 6."""
        value, lasting = b"x" * number, math.inf if number == 6 else 2 * number
        self.table.put(key, value, after(self.clock, 0) + lasting)
        self.stored[key] = (self.now, self.now + lasting, value)
        if not lasting:
            del self.stored[key]

    def touch(self, key: str, _: int) -> None:
        """Touch a key that is there."""
        if key in self.stored:
            self.table.touch(key)
            self.stored[key] = (self.now, *self.stored[key][1:])

    def remove(self, key: str, _: int) -> None:
        """Remove a key."""
        assert self.table.remove(key) is self.is_live(key)
        self.stored.pop(key, None)

    def wait(self, _: str, number: int) -> None:
        """Let time pass, in milliseconds."""
        self.clock.advance(number / 1000)
        self.now += number

    def sweep(self, _: str, __: int) -> None:
        """Remove the expired entries."""
        self.sweep_where(None, lambda key: not self.is_live(key))

    def sweep_unused(self, _: str, number: int) -> None:
        """Remove the entries unused for longer than this."""
        moment = after(self.clock, -number)
        self.sweep_where(moment, lambda key: self.stored[key][0] < self.now - number)

    def sweep_where(self, before: int | None, is_removed: Callable[[str], bool]) -> None:
        """Sweep both, and compare the numbers of removed entries."""
        removed = [key for key in self.stored if is_removed(key)]
        assert sweep(self.table, before) == len(removed)
        for key in removed:
            del self.stored[key]

    def check(self, keys: str) -> None:
        """Compare the values under the keys, their number and their size."""
        expected = {key: self.stored[key][2] if self.is_live(key) else None for key in keys}
        assert {key: self.table.get(key) for key in keys} == expected
        assert len(self.table) == len(self.stored)
        assert self.table.bytes == sum(len(value) for _, _, value in self.stored.values())


KEYS = "abcdefghijklmno"
STEPS = (*[Pair.put] * 3, Pair.touch, Pair.remove, Pair.wait, Pair.sweep, Pair.sweep_unused)
steps = st.tuples(st.sampled_from(STEPS), st.sampled_from(KEYS), st.integers(0, 6))


@settings(deadline=None, max_examples=200)
@given(st.lists(steps, min_size=20, max_size=80))
def test_table_does_as_a_plain_dictionary(
    history: list[tuple[Callable[[Pair, str, int], None], str, int]],
) -> None:
    """After each step of any history, it has the same entries, and has removed as many."""
    pair = Pair()

    for step, key, number in history:
        step(pair, key, number)
        pair.check(KEYS)


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


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the lines that the interpreter runs in the block. The count depends on no clock."""
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


def cost(action: Callable[[], object]) -> int:
    """Return the number of lines that an action runs."""
    with counted() as steps:
        action()
    return steps[0]


def test_cost_grows_with_the_logarithm_of_the_size(clock: FakeClock) -> None:
    """Each operation looks at a few entries, however many there are."""

    def costs(size: int) -> list[int]:
        table = make(clock, max_entries=size)
        for number in range(size):
            table.put(f"{number}", b"", after(clock, SECOND + number))
        middle = f"{size // 2}"
        return [
            cost(lambda: table.get(middle)),
            cost(lambda: table.touch(middle)),
            cost(lambda: table.put(middle, b"", after(clock, 1))),
            cost(lambda: table.put(middle, b"")),
            cost(lambda: table.remove(middle)),
            cost(lambda: table.put("new", b"")),
            cost(lambda: table.put("newer", b"")),
        ]

    small, large = costs(2**4), costs(2**12)

    assert [more <= 3 * less for less, more in zip(small, large, strict=True)] == [True] * 7


@pytest.mark.parametrize("moved", [10**6, math.inf], ids=["put-off", "dropped"])
def test_sweep_after_moved_deadlines_costs_nothing(clock: FakeClock, moved: float) -> None:
    """A deadline that has moved is not looked at again at its old time."""
    table = make(clock, max_entries=2_000)
    for deadline in (10 * SECOND, 20 * SECOND):
        for number in range(2_000):
            table.put(f"{number}", b"", after(clock, deadline))
    for number in range(2_000):
        table.put(f"{number}", b"", after(clock, 0) + moved)
    clock.advance(30)

    assert cost(lambda: sweep(table)) < 50


@pytest.mark.parametrize("lasting", [math.inf, SECOND], ids=["idle", "past-deadline"])
def test_sweep_costs_as_much_as_it_removes(lasting: float) -> None:
    """Ten times as many expired entries cost ten times as much, and live ones little."""

    def cost_of(live: int, expired: int) -> int:
        clock = FakeClock()
        table = make(clock, max_entries=10_000)
        for number in range(expired):
            table.put(f"expired-{number}", b"", after(clock, 0) + lasting)
        clock.advance(59)
        for number in range(live):
            table.put(f"live-{number}", b"", after(clock, 60 * SECOND))
        clock.advance(1)
        return cost(lambda: sweep(table))

    assert cost_of(live=4_000, expired=0) < 50
    assert cost_of(live=4_000, expired=10) < 3 * cost_of(live=100, expired=10)
    assert cost_of(live=100, expired=100) < 20 * cost_of(live=100, expired=10)
