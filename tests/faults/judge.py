"""The findings of the checker, and the part of it that all kinds of sessions share."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from .history import DELETE, LOAD, MAX_REPLICATION_LAG, Event, Found, cause


@dataclass
class Verdict:
    """The findings of the checker."""

    calls: int = 0
    acknowledged: int = 0  # writes and deletes
    errors: Counter[str] = field(default_factory=Counter)  # unavailable without doubt, by cause
    doubts: Counter[str] = field(default_factory=Counter)  # unavailable in doubt, by cause
    applied: int = 0  # writes in doubt that turned out to be applied
    wrong: list[str] = field(default_factory=list)  # contradictions of a promise
    lost: list[str] = field(default_factory=list)  # acknowledged writes and deletes
    latest: float = 0.0  # the longest time from a deadline to the end of its call, in seconds
    # The longest time from a deletion to the begin of a load that still found the session in the
    # cache of another process: with announcements, and without.
    outlived: float = 0.0
    outlived_unannounced: float = 0.0


@dataclass
class Judge:
    """The judgement of one session, without the rules of a kind of session."""

    verdict: Verdict
    id: str
    events: list[Event]
    final: Found | None
    loses: tuple[float, float] | None
    survivor: Found | None

    def __post_init__(self) -> None:
        self.events = sorted(self.events, key=lambda event: event.start)
        self.attempts = {e.token: e for e in self.events if e.verb not in (LOAD, DELETE)}
        self.acknowledged = {token for token, event in self.attempts.items() if event.ok}
        self.doubted = {token for token, event in self.attempts.items() if event.in_doubt}
        found = {event.token for event in self.events if event.verb == LOAD and event.ok}
        if self.final:
            found.add(self.final.token)
        self.found = {token for token in found if self._is_explained(token)}

    def _wrong(self, what: str) -> None:
        self.verdict.wrong.append(f"{self.id[:8]}: {what}")

    def _lost(self, event: Event, what: str) -> None:
        """Count a lost write. It is also wrong, unless it was acknowledged during the fault."""
        self.verdict.lost.append(f"{self.id[:8]}: {what}")
        if self.loses:
            begin, end = self.loses
            if not begin - MAX_REPLICATION_LAG <= event.end <= end:
                self._wrong(f"{what}, and lost without a reason")

    def _unexplained(self, what: str, event: Event, contradicted: Event | None) -> None:
        """Report a contradiction, unless a fault between the events may have lost a write."""
        if not self._may_be_undone(contradicted or event, event):
            self._wrong(f"{event.verb}: {what}")

    def _may_be_undone(self, *events: Event) -> bool:
        """Whether a fault between the events may have lost a write."""
        return self.loses is not None and (
            max(each.end for each in events) >= self.loses[0]
            and min(each.since for each in events) <= self.loses[1]
        )

    def _last_before(self, event: Event, matches: Callable[[Event], bool]) -> Event | None:
        """The last event that ended before this one began, of those that match."""
        past = (each for each in self.events if event.follows(each) and matches(each))
        return max(past, key=lambda each: each.start, default=None)

    def _is_explained(self, token: str) -> bool:
        """Whether an attempt that may have been applied explains a token that was found."""
        if token in self.acknowledged or token in self.doubted:
            return True
        attempt = self.attempts.get(token)
        if attempt is None:
            writer = "no client wrote it"
        elif attempt.unavailable:
            writer = f"its write failed without doubt: {cause(attempt.message)}"
        else:
            writer = "its write was refused"
        self._wrong(f"{token!r} was found, but {writer}")
        return False
