"""Bounded table in memory: least-recently-used order, TTL, absolute deadlines.

The table is synchronous. It knows neither event loops nor codecs nor sessions: `LocalStorage` and
`NearCache` add those.

Invariants:

- An entry expires when its TTL has passed since it was put or touched, or at its deadline. `get`
  never returns an expired entry. It stays in memory until it is swept, removed, overwritten or
  evicted.
- `_entries` is in the order of last use. Unless `promote` is called, that is the order in which
  they expire, as all entries have one TTL.
- `_groups` holds the entries of each group in the order of last use, and no empty group.
- `_deadlines` is a heap of the same entries. Each entry knows its place in the heap, so a changed
  deadline moves the entry, and a removed entry leaves nothing behind.
- Each operation, and each step of a sweep, takes O(log n) time.
- Times are whole milliseconds: of the monotonic clock for use, of the wall clock for deadlines.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Generic, TypeVar

from .storage import Clock, whole_milliseconds

V = TypeVar("V", bound=Sized)


@dataclass(slots=True, eq=False)
class _Entry(Generic[V]):
    key: str
    value: V
    used_at: int = 0
    deadline: float = math.inf
    group: str | None = None
    place: int = 0  # the index in the heap


class Table(Generic[V]):
    """A bounded mapping from strings to values, such as bytes, whose `len` is their size.

    Args:
        ttl: The time after which an unused entry expires, in milliseconds.
        clock: The source of time.
        max_entries: The most entries to keep.
        max_bytes: The most bytes that all values together may have.
        on_drop: Called with each value that leaves the table.

    Attributes:
        bytes: The size of all values together.
        evictions: The number of live entries that were removed to make room.
    """

    def __init__(
        self,
        *,
        ttl: int,
        clock: Clock,
        max_entries: int,
        max_bytes: float = math.inf,
        on_drop: Callable[[V], object] = lambda _: None,
    ) -> None:
        self._ttl = ttl
        self._clock = clock
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._on_drop = on_drop
        self._entries: OrderedDict[str, _Entry[V]] = OrderedDict()
        self._deadlines = _Deadlines[V]()
        self._groups: dict[str, OrderedDict[str, _Entry[V]]] = {}
        self.bytes = 0
        self.evictions = 0

    def __len__(self) -> int:
        """Return the number of entries in memory, expired ones included."""
        return len(self._entries)

    def get(self, key: str) -> V | None:
        """Return the value of a live entry, or None. This does not count as use."""
        entry = self._entries.get(key)
        return None if entry is None or self._is_expired(entry) else entry.value

    def promote(self, key: str) -> V | None:
        """As `get`, but make the entry the most recently used, without a new TTL."""
        entry = self._entries.get(key)
        if entry is None or self._is_expired(entry):
            return None
        self._entries.move_to_end(key)
        return entry.value

    def touch(self, key: str) -> None:
        """Start a full TTL for an entry, and make it the most recently used.

        Raises:
            KeyError: There is no such entry.
        """
        entry = self._entries[key]
        entry.used_at = self._now()
        self._entries.move_to_end(key)
        if entry.group is not None:
            self._groups[entry.group].move_to_end(key)

    def group(self, name: str) -> list[str]:
        """Return the keys of the live entries of a group, the least recently used first."""
        group = self._groups.get(name)
        if group is None:
            return []
        return [entry.key for entry in group.values() if not self._is_expired(entry)]

    def put(
        self,
        key: str,
        value: V,
        deadline: float = math.inf,
        group: str | None = None,
        age: int = 0,
    ) -> None:
        """Create or overwrite an entry, and start its TTL.

        A full table evicts entries past their deadline first, then the least recently used. A value
        that is past its deadline or larger than `max_bytes` is not kept; the key is then removed.

        Args:
            key: The key.
            value: The value.
            deadline: The time at which the entry expires, in milliseconds since the epoch.
            group: The name of the group that the entry belongs to, or None.
            age: The time that has passed of its TTL already, in milliseconds.
        """
        if deadline <= self._time() or len(value) > self._max_bytes:
            self.remove(key)
            return
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(key, value)
            self._deadlines.add(entry)
            self.bytes += len(value)
        else:
            self.bytes += len(value) - len(entry.value)
            entry.value = value
        if entry.deadline != deadline:
            entry.deadline = deadline
            self._deadlines.move(entry)
        if entry.group != group:
            self._leave_group(entry)
            entry.group = group
            if group is not None:
                self._groups.setdefault(group, OrderedDict())[key] = entry
        self.touch(key)
        entry.used_at -= age
        while len(self._entries) > self._max_entries or self.bytes > self._max_bytes:
            self._evict()

    def remove(self, key: str) -> bool:
        """Remove an entry, and return whether it was live."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        was_live = not self._is_expired(entry)
        self._drop(entry)
        return was_live

    def sweep(self, before: int | None = None) -> Iterator[None]:
        """Remove the expired entries, one at each step.

        The table may change between two steps. Entries that expire or are used after the first step
        stay.

        Args:
            before: Remove the entries that were last used before this time instead, in milliseconds
                since the epoch.
        """
        now, time = self._now(), self._time()
        if before is None:
            while self._deadlines and self._deadlines[0].deadline <= time:
                self._drop(self._deadlines[0])
                yield
            age = self._ttl - 1
        else:
            age = max(-1, time - before)
        while self._entries and now - self._oldest().used_at > age:
            self._drop(self._oldest())
            yield

    def clear(self) -> None:
        """Remove every entry."""
        for entry in self._entries.values():
            self._on_drop(entry.value)
        self._entries.clear()
        self._deadlines.clear()
        self._groups.clear()
        self.bytes = 0

    def _now(self) -> int:
        return whole_milliseconds(self._clock.monotonic())

    def _time(self) -> int:
        return whole_milliseconds(self._clock.time())

    def _is_expired(self, entry: _Entry[V]) -> bool:
        if self._now() - entry.used_at >= self._ttl:
            return True
        return entry.deadline != math.inf and entry.deadline <= self._time()

    def _oldest(self) -> _Entry[V]:
        return next(iter(self._entries.values()))

    def _evict(self) -> None:
        victim = self._deadlines[0]
        if victim.deadline > self._time():
            victim = self._oldest()
            self.evictions += not self._is_expired(victim)
        self._drop(victim)

    def _drop(self, entry: _Entry[V]) -> None:
        del self._entries[entry.key]
        self._deadlines.discard(entry)
        self._leave_group(entry)
        self.bytes -= len(entry.value)
        self._on_drop(entry.value)

    def _leave_group(self, entry: _Entry[V]) -> None:
        if entry.group is None:
            return
        group = self._groups[entry.group]
        del group[entry.key]
        if not group:
            del self._groups[entry.group]


class _Deadlines(list[_Entry[V]], Generic[V]):
    """A binary heap of entries, the nearest deadline first. An entry's `place` is its index."""

    def add(self, entry: _Entry[V]) -> None:
        """Add an entry."""
        entry.place = len(self)
        self.append(entry)
        self.move(entry)

    def discard(self, entry: _Entry[V]) -> None:
        """Remove an entry. The last one takes its place."""
        last = self.pop()
        if last is not entry:
            self[entry.place] = last
            last.place = entry.place
            self.move(last)

    def move(self, entry: _Entry[V]) -> None:
        """Restore the order after the deadline of an entry has changed."""
        while (place := entry.place) and entry.deadline < self[(place - 1) // 2].deadline:
            self._swap(place, (place - 1) // 2)
        while (place := 2 * entry.place + 1) < len(self):
            if place + 1 < len(self) and self[place + 1].deadline < self[place].deadline:
                place += 1
            if entry.deadline <= self[place].deadline:
                break
            self._swap(place, entry.place)

    def _swap(self, one: int, other: int) -> None:
        self[one], self[other] = self[other], self[one]
        self[one].place, self[other].place = one, other
