"""Reads what a load has done and what is stored in the end: what was wrong, and what was lost.

It judges the history of each session for linearizability (Herlihy and Wing, "Linearizability: a
correctness condition for concurrent objects", 1990). As each write has a token of its own, and each
conditional one names the write it goes over, that takes no search.

Rules:

- What is found was written by an attempt that may have been applied: one that was acknowledged, or
  whose outcome is unknown.
- Writes that were applied are a chain, each over the one before. Two over the same one are a lost
  update, and a write that was acknowledged and is not on the chain that ends with what is stored
  in the end is a lost write.
- Nobody goes back: who begins when another has ended sees what that one saw, or something newer.
- What was deleted stays deleted. "Not found" needs a deletion that was attempted, and a conflict
  somebody else's write.
- How often a session was changed is how long its chain is: between the writes that were
  acknowledged, and those and the unknown ones.
- Where a fault may lose writes, it is those that were acknowledged while it lasted, or so shortly
  before that they may not have been replicated. These are counted. It may also explain why what
  was seen before it contradicts what is seen after it; but nothing that was all before it, or all
  after.
- What is known to have been replicated is not lost.
"""

import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from aiosessions.session import id_digest

from .journal import ABSENT, ALWAYS, DELETE, LOAD, PRESENT, UNCHANGED, Event, Found

_REFUSALS = ("SessionNotFound", "SessionConflict", "SessionExists")
_LAG = 0.5  # how many seconds a replica may be behind at most


@dataclass
class Verdict:
    """What the checker has found.

    Attributes:
        verbs: How many there were.
        acknowledged: Writes and deletions that were.
        unknown: Those whose outcome the caller does not know.
        applied: Of these writes, those that turned out to have been applied.
        errors: `StorageUnavailable` by its message.
        wrong: What contradicts a promise, in words.
        lost: Acknowledged writes and deletions that were lost, in words.
        latest: The most seconds by which any verb missed its deadline.
    """

    verbs: int = 0
    acknowledged: int = 0
    unknown: int = 0
    applied: int = 0
    errors: Counter[str] = field(default_factory=Counter)
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
        events: Everything that any caller has done, in any order.
        final: What is stored in the end, by id.
        loses: From when to when a fault may lose writes; None if nothing may be lost.
        replicated: What had outlived the fault in any case, by id.
    """
    verdict = Verdict()
    by_id: defaultdict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_id[event.id].append(event)
        verdict.verbs += 1
        verdict.latest = max(verdict.latest, event.late)
        verdict.wrong += [f"{event.verb}: {flaw}" for flaw in event.flaws]
        if event.verb != LOAD:
            verdict.acknowledged += event.ok
            verdict.unknown += event.unknown
        if event.unknown:
            verdict.errors[cause(event.message)] += 1
        elif not event.ok and event.outcome not in _REFUSALS:
            verdict.wrong.append(f"{event.verb}: {event.outcome}")
    verdict.wrong += [f"{id_digest(id)}: nobody stored it" for id in final if id not in by_id]
    for id, history in by_id.items():
        overwritten = any(event.verb in (ALWAYS, PRESENT) for event in history)
        judge = _Register if overwritten else _Chain
        survivor = (replicated or {}).get(id)
        judge(verdict, id, history, final.get(id), loses, survivor).judge()
    return verdict


def cause(message: str) -> str:
    """What `StorageUnavailable` says, without what the driver has said, which names addresses."""
    known = "the connection to the server failed"
    return known if message.startswith(known) else message


class _Judge:
    """What both ways of judging a session have in common."""

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
        self._unknown = {token for token, event in self._attempts.items() if event.unknown}
        # The tokens of all that was found, and can be explained.
        self._found = {each.token for each in self._events if each.verb == LOAD and each.ok}
        if final:
            self._found.add(final.token)
        self._found = {token for token in self._found if self._is_known(token)}

    def judge(self) -> None:
        """Add to the verdict."""
        raise NotImplementedError

    def _wrong(self, what: str) -> None:
        self._verdict.wrong.append(f"{id_digest(self._id)}: {what}")

    def _lost(self, event: Event, what: str) -> None:
        """It is wrong, too, unless the fault was there when it was acknowledged."""
        self._verdict.lost.append(f"{id_digest(self._id)}: {what}")
        if self._loses and not self._loses[0] - _LAG <= event.end <= self._loses[1]:
            self._wrong(f"{what}, and lost without a reason")

    def _unexplained(self, what: str, event: Event, contradicted: Event | None) -> None:
        """It is wrong, unless the fault came between, and may have lost what would explain it."""
        both = (event, contradicted or event)
        if self._loses is None or (
            max(each.end for each in both) < self._loses[0]
            or min(each.start for each in both) > self._loses[1]
        ):
            self._wrong(f"{event.verb}: {what}")

    def _last_before(self, event: Event, matches: Callable[[Event], bool]) -> Event | None:
        """The last that had ended before this one began."""
        past = (each for each in self._events if each.end < event.start and matches(each))
        return max(past, key=lambda each: each.start, default=None)

    def _is_known(self, token: str) -> bool:
        """Whether an attempt to write explains what was found."""
        if token in self._acknowledged or token in self._unknown:
            return True
        whose = "by a write that was refused" if token in self._attempts else "by nobody"
        self._wrong(f"{token!r} was found, and written {whose}")
        return False


class _Chain(_Judge):
    """A session that is only written over what is known: with compare-and-set."""

    def judge(self) -> None:
        """See above."""
        self._deletes = [event for event in self._events if event.verb == DELETE]
        self._creations = [event for event in self._events if event.verb == ABSENT]
        self._deleted = min(
            (event.end for event in self._deletes if event.existed), default=float("inf")
        )
        self._depths = self._measure()
        self._verdict.applied += len(self._unknown.intersection(self._depths))
        self._judge_updates()
        self._judge_answers()
        self._judge_order()
        self._judge_end()

    def _path(self, token: str) -> list[str]:
        """From this write back to the first."""
        path: dict[str, None] = {}
        while token in self._attempts and token not in path:
            path[token] = None
            token = self._attempts[token].before
        return list(path)

    def _measure(self) -> dict[str, int]:
        """How long the chain is up to each write that was applied."""
        depths: dict[str, int] = {}
        for token in self._found | self._acknowledged:
            new: dict[str, None] = {}
            at = token
            while at in self._attempts and at not in depths and at not in new:
                new[at] = None
                at = self._attempts[at].before
            if new and at not in depths and self._attempts[[*new][-1]].verb != ABSENT:
                self._wrong("a write over something that nobody wrote")
            for each in reversed(new):
                depths[each] = depths.get(self._attempts[each].before, 0) + 1
        return depths

    def _judge_updates(self) -> None:
        """No two writes go over the same one."""
        over: defaultdict[str, list[Event]] = defaultdict(list)
        for token in self._depths:
            over[self._attempts[token].before].append(self._attempts[token])
        for before, writes in over.items():
            in_order = sorted(writes, key=lambda event: event.start)
            for one, other in pairwise(in_order):
                self._unexplained(f"{len(writes)} writes over the same one, {before!r}", other, one)

    def _judge_answers(self) -> None:
        """Refusals, and what deletions say, have a reason."""
        for event in self._events:
            if event.outcome == "SessionNotFound" or (
                event.verb == DELETE and event.ok and not event.existed
            ):
                if self._must_exist(event):
                    seen = self._last_before(event, lambda each: each.ok and each.verb != DELETE)
                    self._unexplained("not found, and nobody has deleted it", event, seen)
            elif event.outcome == "SessionConflict":
                if not self._somebody_else_wrote(event):
                    token = event.before
                    seen = self._last_before(event, lambda each: each.ok and each.token == token)  # noqa: B023
                    self._unexplained("a conflict, and nobody else has written", event, seen)
            elif event.outcome == "SessionExists":
                self._wrong(f"{event.verb}: exists, and nobody else has created it")
            elif event.ok and event.start > self._deleted and not self._may_be_created_late():
                deletion = self._last_before(event, lambda each: each.existed)
                self._unexplained("deleted, and back", event, deletion)

    def _must_exist(self, event: Event) -> bool:
        created = any(each.ok and each.end < event.start for each in self._creations)
        removed = any(
            each is not event and each.start < event.end and (each.existed or each.unknown)
            for each in self._deletes
        )
        return created and not removed

    def _somebody_else_wrote(self, event: Event) -> bool:
        return any(
            each.before == event.before and each.start < event.end and (each.ok or each.unknown)
            for each in self._attempts.values()
            if each is not event
        )

    def _may_be_created_late(self) -> bool:
        """Whether an attempt to create it was given up, and may yet have been applied."""
        return any(each.unknown for each in self._creations)

    def _judge_order(self) -> None:
        """Nobody goes back; where a fault may lose writes, neither before nor after it."""
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
            # A write, unlike a load, has to be newer than what was seen.
            reached = depths[event.token] - (event.verb != LOAD)
            if before and reached < deepest[before - 1]:
                self._wrong(f"{event.verb}: older than what had been seen before")

    def _judge_end(self) -> None:
        if self._final is None:
            if not any(event.existed or event.unknown for event in self._deletes):
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
                self._lost(self._attempts[token], f"{token} was overwritten, or undone")
            if self._survivor and self._survivor.token not in path:
                self._wrong("replicated, and lost")
            acknowledged = sum(event.verb == UNCHANGED and event.ok for event in self._events)
            unknown = sum(event.verb == UNCHANGED and event.unknown for event in self._events)
            least = acknowledged if self._loses is None else 0
            if not least <= self._final.count <= acknowledged + unknown:
                self._wrong(
                    f"changed {self._final.count} times in the end, by {acknowledged} "
                    f"acknowledged and {unknown} unknown changes"
                )


class _Register(_Judge):
    """A session that one caller overwrites without looking, one write after the other.

    A write that was given up may be applied at any later time: a server that hung may do what it
    was told before it hung.
    """

    def judge(self) -> None:
        """See above."""
        self._verdict.applied += len(self._found & self._unknown)
        self._order = {token: number for number, token in enumerate(self._attempts)}
        self._current = ""  # what was acknowledged last
        possible: set[str] = set()
        for event in self._events:
            if event.outcome == "SessionNotFound":
                if self._current:
                    last = self._attempts.get(self._current)
                    self._unexplained("not found, and nobody has deleted it", event, last)
            elif event.verb == LOAD:
                if event.ok and event.token not in possible:
                    last = self._attempts.get(self._current)
                    self._unexplained("older than what was written last", event, last)
                    self._undone(event.token)
                if event.ok:
                    # Of others, only what was given up can still come.
                    possible = {event.token} | (possible & self._unknown)
            elif event.unknown:
                possible.add(event.token)
            elif event.ok:
                self._current = event.token
                possible = {event.token} | (possible & self._unknown)
        self._judge_end(possible)

    def _undone(self, back_to: str) -> None:
        """What was acknowledged after a certain write, and is no more, is lost."""
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
