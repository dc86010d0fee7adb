"""Judges the lists and the revocations of principals. Does no I/O.

A session is seen by each load and each write of it that succeeds. It was also seen if it is stored
at the end. As an id is created once, a session exists from the first time that it is seen to the
last.

Rules:

- A list has each session that was seen before the list began, and that nothing may have ended
  before the list ended, or that is seen after the list. A session that may have been marked as
  rotated away before the list ended may be missing.
- A list has no session that was deleted, marked or revoked before the list began, and no session
  twice.
- A session that was seen before an acknowledged revocation began is not seen after the revocation.
  Neither is a session that a rotation has made of it.
- "Not found" needs a call that may have ended the session.
- Each session that is stored at the end is in the index.
- A load through a cache may see a session late, as `checker` says.
- If a fault may lose writes, those that `checker` would count as lost may also be missing here:
  entries of the index, and revocations. In a cluster, an entry may be lost and its session not.
  A fault may also restore a session.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from .history import DELETE, LIST, LOAD, MAX_REPLICATION_LAG, REVOKE_ALL, Event, Found

# The session, the description, and the end of the call that was contradicted.
_Finding = tuple[str, str, float]
_NEVER = Event("", "", inf, inf)
_AT_THE_END = Event("stored", "", inf, inf)


@dataclass
class OwnersVerdict:
    """The findings, and the sessions whose principal revokes or rotates sessions."""

    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    sessions: set[str] = field(default_factory=set)


def judge_owners(
    by_id: Mapping[str, list[Event]],
    of_principals: Iterable[Event],
    final: Mapping[str, Found],
    loses: tuple[float, float] | None,
) -> OwnersVerdict:
    """Judge the sessions of all principals.

    Args:
        by_id: The calls for each session.
        of_principals: The lists and the revocations.
        final: See `checker.check`.
        loses: See `checker.check`.
    """
    verdict = OwnersVerdict()
    calls: defaultdict[str, list[Event]] = defaultdict(list)
    for event in of_principals:
        calls[event.principal].append(event)
    lives: defaultdict[str, dict[str, _Life]] = defaultdict(dict)
    for id, events in by_id.items():
        principal = next((event.principal for event in events if event.principal), "")
        if principal:
            revocations = [each for each in calls[principal] if each.verb == REVOKE_ALL]
            lives[principal][id] = _Life(id, events, revocations, final.get(id))
    for principal in calls.keys() | lives.keys():
        owned = lives[principal]
        if any(each.verb == REVOKE_ALL for each in calls[principal]) or any(
            life.marks for life in owned.values()
        ):
            verdict.sessions.update(owned)
        lists = [each for each in calls[principal] if each.verb == LIST and each.ok]
        owner = _Owner(owned, lists, loses)
        findings = dict.fromkeys(owner.findings())  # each once
        for id, what, ended in findings:
            if loses and loses[0] - MAX_REPLICATION_LAG <= ended <= loses[1]:
                verdict.lost.append(f"{id[:8]}: {what}")
            else:
                verdict.wrong.append(f"{id[:8]}: {what}")
    return verdict


class _Life:
    """The times of one session."""

    def __init__(
        self, id: str, events: Sequence[Event], revocations: Sequence[Event], final: Found | None
    ) -> None:
        self.id = id
        self.final = final
        self.seen = [event for event in events if event.ok and event.verb != DELETE]
        if final:
            self.seen.append(_AT_THE_END)
        self.first = min(self.seen, key=lambda event: event.end, default=_NEVER)
        self.missing = [event for event in events if event.outcome == "SessionNotFound"]
        self.attempted = any(e.may_be_applied for e in events if e.verb not in (LOAD, DELETE))
        self.origin = next((event.origin for event in events if event.origin), "")
        self.marks = [event for event in events if event.marked and event.may_be_applied]
        self.first_mark = min((event.start for event in self.marks), default=inf)
        # Calls that may have ended it, and those that have.
        self.revocations = [each for each in revocations if id not in each.digests]
        deletes = [event for event in events if event.verb == DELETE]
        doubted = [event for event in deletes if event.existed or event.in_doubt]
        endings = [*self.marks, *doubted, *self.revocations]
        self.fragile = min((event.start for event in endings), default=inf)
        restored = max((e.start for e in events if not e.marked and e.verb != LOAD), default=-inf)
        self.ended = [
            *(event for event in deletes if event.existed),
            *(event for event in self.marks if event.ok and event.since > restored),
            *self.revoking(self.first),
        ]
        self.end = min(self.ended, key=lambda event: event.end, default=_NEVER)

    def revoking(self, seen: Event) -> Iterator[Event]:
        """The acknowledged revocations that began after a session of this principal was seen."""
        return (each for each in self.revocations if each.ok and each.start > seen.end)


@dataclass
class _Owner:
    """The sessions of one principal, and its lists."""

    lives: Mapping[str, _Life]
    lists: Sequence[Event]
    loses: tuple[float, float] | None

    def findings(self) -> Iterator[_Finding]:
        """The contradictions."""
        for listed in self.lists:
            yield from self._judge_list(listed)
        for life in self.lives.values():
            yield from self._judge_life(life)

    def _judge_list(self, listed: Event) -> Iterator[_Finding]:
        digests = set(listed.digests)
        if len(digests) < len(listed.digests):
            yield "", "a list has a session twice", listed.end
        for id in digests:
            life = self.lives.get(id)
            if life is None or not life.attempted:
                yield id, "listed, but no client stored it", listed.end
            elif life.end.end < listed.start:
                yield id, f"listed after its end by {life.end.verb}", life.end.end
        for id, life in self.lives.items():
            if id in digests or life.first.end >= listed.start:
                continue
            if life.fragile > listed.end or self._survived(life, listed):
                yield id, "alive, but missing in a list", life.first.end

    def _survived(self, life: _Life, listed: Event) -> bool:
        """Whether a session is seen after a list, and no fault between may have restored it."""
        if life.first_mark < listed.end:
            return False
        limit = self.loses[0] if self.loses and listed.end <= self.loses[1] else inf
        return any(listed.end < event.since and event.end <= limit for event in life.seen)

    def _judge_life(self, life: _Life) -> Iterator[_Finding]:
        for event in life.missing:
            if event.follows(life.first) and life.fragile > event.end:
                yield life.id, "not found, but nothing ended it", life.first.end
        origin = self.lives.get(life.origin)
        for each in (life, origin):
            for revocation in life.revoking(each.first if each else _NEVER):
                if each and each.id in revocation.digests:
                    continue
                after = (event for event in life.seen if event.follows(revocation))
                # Only a rotation that succeeded tells the new id to a client, who then loads it.
                if any(each is life or event.verb == LOAD for event in after):
                    yield life.id, "alive after its revocation", revocation.end
        if life.final and not life.final.indexed:
            yield life.id, "stored, but not in the index", life.first.end
