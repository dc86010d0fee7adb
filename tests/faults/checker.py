"""Judges the history of a load and the sessions stored at its end. Does no I/O.

It checks the history of each session for linearizability (Herlihy and Wing, "Linearizability: a
correctness condition for concurrent objects", 1990). Each write has its own token, and each
compare-and-set names the write that it replaces, so the check needs no search.

Rules:

- A load finds the data of an attempt that may have been applied: one that was acknowledged, or one
  that is in doubt. Data of a refused attempt is wrong. So is data of an attempt that failed with
  `StorageUnavailable` and `in_doubt` False.
- The writes that were applied form a chain: each replaces the one before. Two writes that replace
  the same one are a lost update. An acknowledged write that is not on the chain of the data stored
  at the end is a lost write.
- Time does not go back: a call that begins after another one ended sees the same data or newer.
- A deleted session stays deleted. "Not found" needs a deletion that was attempted, and a conflict
  needs a write of another client.
- The count of changes is the length of the chain. It lies between the number of acknowledged writes
  and the number of acknowledged writes and writes in doubt.
- If a fault may lose writes, it may lose those acknowledged during the fault, or so shortly before
  it that they may not have been replicated. They are counted. Such a fault may also explain a
  contradiction between a call before and a call after it, but never between two calls that were
  both before it or both after it.
- A write that was known to be replicated is never lost.
"""

import bisect
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from aiosessions.session import id_digest

from .history import ABSENT, ALWAYS, DELETE, LOAD, PRESENT, UNCHANGED, Event, Found

LATE = "the server did not answer in time"

_REFUSALS = ("SessionNotFound", "SessionConflict", "SessionExists")
_MAX_REPLICATION_LAG = 0.5
_BRIDGE = 0.9  # a little less than the second for which commands wait in an outage
# The address, and the remark about doubt, which both differ between errors of one cause.
_TAIL = re.compile(r" \([^()]*\)(; the write may have been applied)?$")


@dataclass
class Verdict:
    """The findings of the checker.

    Attributes:
        calls: The number of calls.
        acknowledged: The number of writes and deletes that succeeded.
        errors: `StorageUnavailable` without doubt, by cause.
        doubts: `StorageUnavailable` in doubt, by cause.
        applied: The number of writes in doubt that turned out to be applied.
        wrong: Contradictions of a promise, in words.
        lost: Acknowledged writes and deletes that were lost, in words.
        latest: The longest time from a deadline to the end of its call, in seconds.
    """

    calls: int = 0
    acknowledged: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    doubts: Counter[str] = field(default_factory=Counter)
    applied: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    latest: float = 0.0


def check(
    events: Iterable[Event],
    final: Mapping[str, Found],
    *,
    loses: tuple[float, float] | None = None,
    replicated: Mapping[str, Found] | None = None,
) -> Verdict:
    """Judge a load.

    Args:
        events: The calls of all clients, in any order.
        final: The data stored at the end, by id.
        loses: The begin and the end of a fault that may lose writes; None if none may be lost.
        replicated: The data that had been replicated before the fault, by id.
    """
    verdict = Verdict()
    by_id: defaultdict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_id[event.id].append(event)
        verdict.calls += 1
        verdict.latest = max(verdict.latest, event.late)
        verdict.wrong += [f"{event.verb}: {flaw}" for flaw in event.flaws]
        if event.verb != LOAD:
            verdict.acknowledged += event.ok
        if event.unavailable:
            (verdict.doubts if event.in_doubt else verdict.errors)[cause(event.message)] += 1
        elif not event.ok and event.outcome not in _REFUSALS:
            verdict.wrong.append(f"{event.verb}: {event.outcome}")
    verdict.wrong += [f"{id_digest(id)}: no client stored it" for id in final if id not in by_id]
    for id, history in by_id.items():
        overwritten = any(event.verb in (ALWAYS, PRESENT) for event in history)
        judge = _Register if overwritten else _Chain
        survivor = (replicated or {}).get(id)
        judge(verdict, id, history, final.get(id), loses, survivor).judge()
    return verdict


def cause(message: str) -> str:
    """The message of a `StorageUnavailable` without the parts that differ from server to server."""
    return _TAIL.sub("", message)


def unbridged(events: Sequence[Event]) -> Iterator[str]:
    """The errors that do not occur if commands wait for a server that soon returns.

    A load is sent again, and so is a save. A save can be in doubt only if another client has
    written the session. Other writes fail only if they were in flight, and then in doubt.
    """
    writers: defaultdict[str, set[int]] = defaultdict(set)
    for event in events:
        if event.verb != LOAD:
            writers[event.id].add(event.client)
    for event in events:
        saved_alone = event.verb == UNCHANGED and len(writers[event.id]) == 1
        if event.unavailable and (event.verb == LOAD or saved_alone or not event.in_doubt):
            yield f"not bridged: {event.verb}: {cause(event.message)}"


def early(events: Iterable[Event], faults: Sequence[float], timeout: float) -> Iterator[str]:
    """The timeouts before the deadline of the call, in the first second of an outage.

    Only a write in doubt may fail early. Its connection was replaced, so no reply can come.

    Args:
        events: The calls of all clients.
        faults: The begin of each fault.
        timeout: The timeout of the storage, in seconds.
    """
    began: dict[tuple[int, int], float] = {}  # the first timeout by process and fault
    for event in sorted(events, key=lambda event: event.end):
        if not event.unavailable or cause(event.message) != LATE:
            continue
        fault = event.client // 1_000, sum(event.end > begin for begin in faults)
        outage = event.end - began.setdefault(fault, event.end)
        retried = event.verb in (LOAD, UNCHANGED) or not event.in_doubt
        if retried and outage < _BRIDGE and event.end - event.start < timeout * 0.9:
            yield f"{event.verb}: failed before its deadline"


class _Judge:
    """The judgement of one session; the common part of both kinds."""

    def __init__(
        self,
        verdict: Verdict,
        id: str,
        events: list[Event],
        final: Found | None,
        loses: tuple[float, float] | None,
        survivor: Found | None,
    ) -> None:
        self._verdict = verdict
        self._id = id
        self._events = sorted(events, key=lambda event: event.start)
        self._final = final
        self._loses = loses
        self._survivor = survivor
        self._attempts = {e.token: e for e in self._events if e.verb not in (LOAD, DELETE)}
        self._acknowledged = {token for token, event in self._attempts.items() if event.ok}
        self._doubted = {token for token, event in self._attempts.items() if event.in_doubt}
        # The tokens that were found and can be explained.
        self._found = {each.token for each in self._events if each.verb == LOAD and each.ok}
        if final:
            self._found.add(final.token)
        self._found = {token for token in self._found if self._is_explained(token)}

    def judge(self) -> None:
        """Add to the verdict."""
        raise NotImplementedError

    def _wrong(self, what: str) -> None:
        self._verdict.wrong.append(f"{id_digest(self._id)}: {what}")

    def _lost(self, event: Event, what: str) -> None:
        """Count a lost write. It is also wrong, unless it was acknowledged during the fault."""
        self._verdict.lost.append(f"{id_digest(self._id)}: {what}")
        if self._loses:
            begin, end = self._loses
            if not begin - _MAX_REPLICATION_LAG <= event.end <= end:
                self._wrong(f"{what}, and lost without a reason")

    def _unexplained(self, what: str, event: Event, contradicted: Event | None) -> None:
        """Report a contradiction, unless a fault between the events may have lost a write."""
        both = (event, contradicted or event)
        if self._loses is None or (
            max(each.end for each in both) < self._loses[0]
            or min(each.start for each in both) > self._loses[1]
        ):
            self._wrong(f"{event.verb}: {what}")

    def _last_before(self, event: Event, matches: Callable[[Event], bool]) -> Event | None:
        """The last event that ended before this one began, of those that match."""
        past = (each for each in self._events if each.end < event.start and matches(each))
        return max(past, key=lambda each: each.start, default=None)

    def _is_explained(self, token: str) -> bool:
        """Whether an attempt that may have been applied explains a token that was found."""
        if token in self._acknowledged or token in self._doubted:
            return True
        attempt = self._attempts.get(token)
        if attempt is None:
            writer = "no client wrote it"
        elif attempt.unavailable:
            writer = f"its write failed without doubt: {cause(attempt.message)}"
        else:
            writer = "its write was refused"
        self._wrong(f"{token!r} was found, but {writer}")
        return False


class _Chain(_Judge):
    """A session that is only changed by compare-and-set."""

    def judge(self) -> None:
        """See `_Judge.judge`."""
        self._deletes = [event for event in self._events if event.verb == DELETE]
        self._creations = [event for event in self._events if event.verb == ABSENT]
        self._deleted = min(
            (event.end for event in self._deletes if event.existed), default=float("inf")
        )
        self._depths = self._measure()
        self._verdict.applied += len(self._doubted.intersection(self._depths))
        self._judge_updates()
        self._judge_answers()
        self._judge_order()
        self._judge_end()

    def _path(self, token: str) -> list[str]:
        """The writes from this one back to the first."""
        path: dict[str, None] = {}
        while token in self._attempts and token not in path:
            path[token] = None
            token = self._attempts[token].before
        return list(path)

    def _measure(self) -> dict[str, int]:
        """The length of the chain up to each write that was applied."""
        depths: dict[str, int] = {}
        for token in self._found | self._acknowledged:
            new: dict[str, None] = {}
            at = token
            while at in self._attempts and at not in depths and at not in new:
                new[at] = None
                at = self._attempts[at].before
            if new and at not in depths and self._attempts[[*new][-1]].verb != ABSENT:
                self._wrong("a write replaced data that no client wrote")
            for each in reversed(new):
                depths[each] = depths.get(self._attempts[each].before, 0) + 1
        return depths

    def _judge_updates(self) -> None:
        """Report two writes that replace the same one."""
        over: defaultdict[str, list[Event]] = defaultdict(list)
        for token in self._depths:
            over[self._attempts[token].before].append(self._attempts[token])
        for before, writes in over.items():
            in_order = sorted(writes, key=lambda event: event.start)
            for one, other in pairwise(in_order):
                self._unexplained(f"{len(writes)} writes over the same one, {before!r}", other, one)

    def _judge_answers(self) -> None:
        """Report refusals, and results of deletes, without a reason."""
        for event in self._events:
            if event.outcome == "SessionNotFound" or (
                event.verb == DELETE and event.ok and not event.existed
            ):
                if self._must_exist(event):
                    seen = self._last_before(event, lambda each: each.ok and each.verb != DELETE)
                    self._unexplained("not found, but no client deleted it", event, seen)
            elif event.outcome == "SessionConflict":
                if not self._has_rival(event):
                    token = event.before
                    seen = self._last_before(event, lambda each: each.ok and each.token == token)  # noqa: B023
                    self._unexplained("a conflict, but no other client wrote", event, seen)
            elif event.outcome == "SessionExists":
                self._wrong(f"{event.verb}: exists, but no other client created it")
            elif event.ok and event.start > self._deleted and not self._may_be_created_late():
                deletion = self._last_before(event, lambda each: each.existed)
                self._unexplained("deleted, and back", event, deletion)

    def _must_exist(self, event: Event) -> bool:
        created = any(each.ok and each.end < event.start for each in self._creations)
        removed = any(
            each is not event and each.start < event.end and (each.existed or each.in_doubt)
            for each in self._deletes
        )
        return created and not removed

    def _has_rival(self, event: Event) -> bool:
        """Whether another write may have replaced the data that this one expected."""
        return any(
            each.before == event.before and each.start < event.end and (each.ok or each.in_doubt)
            for each in self._attempts.values()
            if each is not event
        )

    def _may_be_created_late(self) -> bool:
        """Whether a creation is in doubt, which a slow server may still apply."""
        return any(each.in_doubt for each in self._creations)

    def _judge_order(self) -> None:
        """Report a step back in time, separately before and after a fault that may lose writes."""
        depths = self._depths
        seen = [event for event in self._events if event.ok and event.token in depths]
        if self._loses is None:
            self._judge_order_of(seen)
        else:
            self._judge_order_of([event for event in seen if event.end < self._loses[0]])
            self._judge_order_of([event for event in seen if event.start > self._loses[1]])
        for event in seen:
            if event.count != depths[event.token] - 1:
                self._wrong(f"{event.verb}: changed {event.count} times, not once by each write")

    def _judge_order_of(self, events: list[Event]) -> None:
        depths = self._depths
        seen = sorted((event.end, depths[event.token]) for event in events)
        ends = [end for end, _ in seen]
        deepest = list(accumulate((reached for _, reached in seen), max))
        for event in events:
            before = bisect.bisect_left(ends, event.start)
            # A write, unlike a load, must be newer than everything seen before.
            reached = depths[event.token] - (event.verb != LOAD)
            if before and reached < deepest[before - 1]:
                self._wrong(f"{event.verb}: older than the data seen before")

    def _judge_end(self) -> None:
        if self._final is None:
            if not any(event.existed or event.in_doubt for event in self._deletes):
                for token in sorted(self._acknowledged):
                    self._lost(self._attempts[token], f"{token} is gone")
                if self._survivor:
                    self._wrong("replicated, and gone")
        elif self._deleted < float("inf"):
            if not self._may_be_created_late():
                first = min((e for e in self._deletes if e.existed), key=lambda event: event.end)
                self._lost(first, "a deletion")
        else:
            path = self._path(self._final.token)
            for token in sorted(self._acknowledged.difference(path)):
                self._lost(self._attempts[token], f"{token} was overwritten or undone")
            if self._survivor and self._survivor.token not in path:
                self._wrong("replicated, and lost")
            acknowledged = sum(event.verb == UNCHANGED and event.ok for event in self._events)
            doubted = sum(event.verb == UNCHANGED and event.in_doubt for event in self._events)
            least = acknowledged if self._loses is None else 0
            if not least <= self._final.count <= acknowledged + doubted:
                self._wrong(
                    f"changed {self._final.count} times in the end, by {acknowledged} "
                    f"acknowledged changes and {doubted} in doubt"
                )


class _Register(_Judge):
    """A session that one client overwrites without a condition, one write after the other.

    A write in doubt may be applied at any later time: a server that hung may execute commands that
    it received before.
    """

    def judge(self) -> None:
        """See `_Judge.judge`."""
        self._verdict.applied += len(self._found & self._doubted)
        self._order = {token: number for number, token in enumerate(self._attempts)}
        self._current = ""  # the token that was acknowledged last
        possible: set[str] = set()
        for event in self._events:
            if event.outcome == "SessionNotFound":
                if self._current:
                    last = self._attempts.get(self._current)
                    self._unexplained("not found, but no client deleted it", event, last)
            elif event.verb == LOAD:
                if event.ok and event.token not in possible:
                    last = self._attempts.get(self._current)
                    self._unexplained("older than the last write", event, last)
                    self._undone(event.token)
                if event.ok:
                    # Of the other writes, only those in doubt can still be applied.
                    possible = {event.token} | (possible & self._doubted)
            elif event.in_doubt:
                possible.add(event.token)
            elif event.ok:
                self._current = event.token
                possible = {event.token} | (possible & self._doubted)
        self._judge_end(possible)

    def _undone(self, back_to: str) -> None:
        """Count the writes that were acknowledged after this one, and are gone, as lost."""
        first = self._order.get(back_to, -1)
        last = self._order.get(self._current, -1)
        for token, number in self._order.items():
            if first < number <= last and token in self._acknowledged:
                self._lost(self._attempts[token], f"{token} was undone")
        self._current = back_to

    def _judge_end(self, possible: set[str]) -> None:
        if self._final is None:
            self._undone("")
        elif self._final.token not in possible:
            self._undone(self._final.token)
        if self._survivor:
            reached = self._order.get(self._final.token, -1) if self._final else -1
            if reached < self._order.get(self._survivor.token, 0):
                self._wrong("replicated, and lost")
