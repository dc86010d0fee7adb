"""Judges the history of a load and the sessions stored at its end. Does no I/O.

It checks the history of each session for linearizability (Herlihy and Wing, "Linearizability: a
correctness condition for concurrent objects", 1990). Each write has its own token, and each
compare-and-set names the write that it replaces, so the check needs no search.

Rules:

- A load finds the data of a write that was acknowledged, or of a write in doubt. Data of a refused
  write is wrong. So is data of a `StorageUnavailable` with `in_doubt` False.
- The writes that were applied form a chain: each replaces the one before. Two writes that replace
  the same one are a lost update. An acknowledged write that is not on the chain of the data stored
  at the end is a lost write.
- Time does not go back: a call that begins after another one ended sees the same data or newer.
- A deleted session stays deleted. "Not found" needs an attempt to delete, and a conflict needs a
  write of another client.
- The count of changes is the length of the chain. It lies between the number of acknowledged writes
  and the number of acknowledged writes and writes in doubt.
- If a fault may lose writes, it may lose those acknowledged during the fault, or so shortly before
  it that they may not have been replicated. They are counted. Such a fault may also explain a
  contradiction between a call before and a call after it, but never between two calls that were
  both before it or both after it.
- A write that was known to be replicated is never lost.
- A load through a cache may find data that was current at some time within `max_staleness` before
  the load began, but never less than the writes of its own process.
"""

import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate, pairwise

from .history import (
    ABSENT,
    ALWAYS,
    DELETE,
    LIST,
    LOAD,
    PRESENT,
    UNCHANGED,
    Event,
    Found,
    cause,
)
from .judge import Judge, Verdict
from .owners import judge_owners

_REFUSALS = ("SessionNotFound", "SessionConflict", "SessionExists")


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
        final: The data stored at the end, by the digest of the id.
        loses: The begin and the end of a fault that may lose writes; None if none may be lost.
        replicated: The data that had been replicated before the fault, by digest.
    """
    verdict = Verdict()
    by_id: defaultdict[str, list[Event]] = defaultdict(list)
    of_principals: list[Event] = []
    for event in events:
        (by_id[event.id] if event.id else of_principals).append(event)
        verdict.calls += 1
        verdict.acknowledged += event.ok and event.verb not in (LOAD, LIST)
        verdict.latest = max(verdict.latest, event.late)
        verdict.wrong += [f"{event.verb}: {flaw}" for flaw in event.flaws]
        if event.unavailable:
            (verdict.doubts if event.in_doubt else verdict.errors)[cause(event.message)] += 1
        elif not event.ok and event.outcome not in _REFUSALS:
            verdict.wrong.append(f"{event.verb}: {event.outcome}")
    verdict.wrong += [f"{id[:8]}: no client stored it" for id in final if id not in by_id]
    owners = judge_owners(by_id, of_principals, final, loses)
    verdict.wrong += owners.wrong
    verdict.lost += owners.lost
    for id, history in by_id.items():
        if id in owners.sessions:
            continue
        overwritten = any(event.verb in (ALWAYS, PRESENT) for event in history)
        judge = _Register if overwritten else _Chain
        survivor = (replicated or {}).get(id)
        judge(verdict, id, history, final.get(id), loses, survivor).judge()
    return verdict


class _Chain(Judge):
    """A session that is only changed by compare-and-set."""

    def judge(self) -> None:
        """Add to the verdict."""
        self.deletes = [event for event in self.events if event.verb == DELETE]
        self.creations = [event for event in self.events if event.verb == ABSENT]
        # A slow server may still apply a creation in doubt.
        self.created_late = any(each.in_doubt for each in self.creations)
        removals = [event for event in self.deletes if event.existed]
        self.removal = min(removals, key=lambda event: event.end, default=None)
        self.depths = self._measure()
        self.verdict.applied += len(self.doubted.intersection(self.depths))
        self._judge_updates()
        self._judge_answers()
        self._judge_order()
        self._judge_end()
        if self.removal and not self.created_late:
            self._measure_copies(self.removal)

    def _path(self, token: str) -> list[str]:
        """The writes from this one back to the first."""
        path: dict[str, None] = {}
        while token in self.attempts and token not in path:
            path[token] = None
            token = self.attempts[token].before
        return list(path)

    def _measure(self) -> dict[str, int]:
        """The length of the chain up to each write that was applied."""
        depths: dict[str, int] = {}
        for token in self.found | self.acknowledged:
            if token in depths:
                continue
            path = self._path(token)
            if path and self.attempts[path[-1]].verb != ABSENT:
                self._wrong("a write replaced data that no client wrote")
            depths.update((each, depth) for depth, each in enumerate(reversed(path), 1))
        return depths

    def _measure_copies(self, removal: Event) -> None:
        """Note for how long loads found copies of a session that was deleted."""
        for event in self.events:
            if event.staleness and event.ok and not self._may_be_undone(removal, event):
                name = "outlived" if event.announced else "outlived_unannounced"
                longest = max(getattr(self.verdict, name), event.start - removal.end)
                setattr(self.verdict, name, longest)

    def _judge_updates(self) -> None:
        """Report two writes that replace the same one."""
        over: defaultdict[str, list[Event]] = defaultdict(list)
        for token in self.depths:
            over[self.attempts[token].before].append(self.attempts[token])
        for before, writes in over.items():
            in_order = sorted(writes, key=lambda event: event.start)
            for one, other in pairwise(in_order):
                self._unexplained(f"{len(writes)} writes over the same one, {before!r}", other, one)

    def _judge_answers(self) -> None:
        """Report refusals, and results of deletes, without a reason."""
        for event in self.events:
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
            elif event.ok and self.removal and not self.created_late:
                deletion = self._last_before(event, lambda each: each.existed)
                if deletion:
                    self._unexplained("deleted, and back", event, deletion)

    def _must_exist(self, event: Event) -> bool:
        created = any(each.ok and event.follows(each) for each in self.creations)
        removed = any(
            each is not event and each.start < event.end and (each.existed or each.in_doubt)
            for each in self.deletes
        )
        return created and not removed

    def _has_rival(self, event: Event) -> bool:
        """Whether another write may have replaced the data that this one expected."""
        return any(
            each.before == event.before and each.start < event.end and (each.ok or each.in_doubt)
            for each in self.attempts.values()
            if each is not event
        )

    def _judge_order(self) -> None:
        """Report a step back in time, separately before and after a fault that may lose writes."""
        seen = [event for event in self.events if event.ok and event.token in self.depths]
        if self.loses is None:
            self._judge_order_of(seen)
        else:
            self._judge_order_of([event for event in seen if event.end < self.loses[0]])
            self._judge_order_of([event for event in seen if event.since > self.loses[1]])
        for event in seen:
            if event.count != self.depths[event.token] - 1:
                self._wrong(f"{event.verb}: changed {event.count} times, not once by each write")

    def _judge_order_of(self, events: list[Event]) -> None:
        everything = self._seen(events)
        own = {
            process: self._seen(e for e in events if e.process == process and e.verb != LOAD)
            for process in {event.process for event in events}
        }
        for event in events:
            # A write, unlike a load, must be newer than everything seen before.
            reached = self.depths[event.token] - (event.verb != LOAD)
            before = everything(event.since), own[event.process](event.start)
            if reached < max(before):
                self._wrong(f"{event.verb}: older than the data seen before")

    def _seen(self, events: Iterable[Event]) -> Callable[[float], int]:
        """A function that returns the depth of what these events had seen before a time."""
        seen = sorted((event.end, self.depths[event.token]) for event in events)
        ends = [end for end, _ in seen]
        deepest = [0, *accumulate((reached for _, reached in seen), max)]
        return lambda time: deepest[bisect.bisect_left(ends, time)]

    def _judge_end(self) -> None:
        if self.final is None:
            if not any(event.existed or event.in_doubt for event in self.deletes):
                for token in sorted(self.acknowledged):
                    self._lost(self.attempts[token], f"{token} is gone")
                if self.survivor:
                    self._wrong("replicated, and gone")
        elif self.removal:
            if not self.created_late:
                self._lost(self.removal, "a deletion")
        else:
            path = self._path(self.final.token)
            for token in sorted(self.acknowledged.difference(path)):
                self._lost(self.attempts[token], f"{token} was overwritten or undone")
            if self.survivor and self.survivor.token not in path:
                self._wrong("replicated, and lost")
            acknowledged = sum(event.verb == UNCHANGED and event.ok for event in self.events)
            doubted = sum(event.verb == UNCHANGED and event.in_doubt for event in self.events)
            least = acknowledged if self.loses is None else 0
            if not least <= self.final.count <= acknowledged + doubted:
                self._wrong(
                    f"changed {self.final.count} times in the end, by {acknowledged} "
                    f"acknowledged changes and {doubted} in doubt"
                )


class _Register(Judge):
    """A session that one client overwrites without a condition, one write after the other.

    A write in doubt may be applied at any later time: a server that hung may execute commands that
    it received before.
    """

    def judge(self) -> None:
        """Add to the verdict."""
        self.verdict.applied += len(self.found & self.doubted)
        self.order = {token: number for number, token in enumerate(self.attempts)}
        self.current = ""  # the token that was acknowledged last
        possible: set[str] = set()
        for event in self.events:
            last = self.attempts.get(self.current)
            if event.outcome == "SessionNotFound" and self.current:
                self._unexplained("not found, but no client deleted it", event, last)
            elif event.in_doubt:
                possible.add(event.token)
            elif event.ok:
                if event.verb != LOAD:
                    self.current = event.token
                elif event.token not in possible:
                    self._unexplained("older than the last write", event, last)
                    self._undone(event.token)
                # Of the other writes, only those in doubt can still be applied.
                possible = {event.token} | (possible & self.doubted)
        if self.final is None or self.final.token not in possible:
            self._undone(self.final.token if self.final else "")
        if self.survivor:
            reached = self.order.get(self.final.token, -1) if self.final else -1
            if reached < self.order.get(self.survivor.token, 0):
                self._wrong("replicated, and lost")

    def _undone(self, back_to: str) -> None:
        """Count the writes that were acknowledged after this one, and are gone, as lost."""
        first = self.order.get(back_to, -1)
        last = self.order.get(self.current, -1)
        for token, number in self.order.items():
            if first < number <= last and token in self.acknowledged:
                self._lost(self.attempts[token], f"{token} was undone")
        self.current = back_to
