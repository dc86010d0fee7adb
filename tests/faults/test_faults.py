"""Short forms of the fault suite's scenarios, and tests of its checker on written histories."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.faults import report
from tests.faults.checker import check
from tests.faults.history import (
    ABSENT,
    ALWAYS,
    CLIENTS,
    DELETE,
    LATE,
    LOAD,
    PRESENT,
    UNCHANGED,
    Event,
    Found,
)
from tests.faults.judge import Verdict
from tests.faults.run import SHORT, early, execute, unbridged
from tests.faults.scenarios import SCENARIOS, WITHOUT_AOF
from tests.faults.soak import judge

MISSING: dict[str, Any] = {"outcome": "SessionNotFound"}
CONFLICT: dict[str, Any] = {"outcome": "SessionConflict"}
IN_DOUBT: dict[str, Any] = {"outcome": "StorageUnavailable", "message": LATE, "in_doubt": True}
COUNTS = {"b": 1, "c": 2, "d": 3, "e": 3, "f": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["kill", "hang-staggered", "reset", "out-of-memory", "password", "clock", "cache-partition"],
)
async def test_fault_breaks_no_promise(name: str) -> None:
    """No reply is wrong, no write is lost, errors name the cause, and the recovery is quick."""
    result = await execute(name, SCENARIOS[name], SHORT)

    assert result.problems == []
    assert result.acknowledged > 100
    assert result.recovery


@pytest.mark.slow
async def test_suite_finds_lost_writes() -> None:
    """A server without an append-only file loses acknowledged writes."""
    result = await execute("without-aof", WITHOUT_AOF, SHORT)

    assert result.lost > 0
    assert any("lost" in problem for problem in result.problems)


class History(list[Event]):
    """Events of one session. They are one second long and one second apart."""

    def add(self, verb: str, token: str = "", before: str = "", **more: Any) -> "History":
        """Add an event after the others."""
        start, count = 2.0 * len(self), COUNTS.get(token, 0)
        fields: dict[str, Any] = {
            "start": start,
            "end": start + 1,
            "count": count,
            "before": before,
        } | more
        self.append(Event(verb, "id", token=token, **fields))
        return self

    def judge(self, token: str = "", **more: Any) -> Verdict:
        """The verdict if this is stored at the end, or nothing."""
        return check(self, {"id": Found(token, COUNTS.get(token, 0))} if token else {}, **more)


def changed(**more: Any) -> History:
    """A session that was created and changed; one change failed, but was applied."""
    history = History().add(ABSENT, "a").add(LOAD, "a").add(UNCHANGED, "b", "a")
    history.add(UNCHANGED, "c", "b", **IN_DOUBT | more).add(LOAD, "c")
    return history.add(UNCHANGED, "d", "b", **CONFLICT).add(UNCHANGED, "e", "c")


def created() -> History:
    """A new session."""
    return History().add(ABSENT, "a")


def deleted() -> History:
    """The same session, deleted."""
    history = changed().add(DELETE, existed=True).add(LOAD, **MISSING)
    return history.add(UNCHANGED, "f", "e", **MISSING).add(DELETE)


def overwritten(**more: Any) -> History:
    """A session that its only writer overwrote; one write failed, but was applied."""
    history = History().add(ALWAYS, "a").add(PRESENT, "b").add(ALWAYS, "c", **IN_DOUBT | more)
    return history.add(LOAD, "b").add(LOAD, "c").add(ALWAYS, "d").add(LOAD, "d")


Make = Callable[..., History]
ENDS: dict[Make, str] = {changed: "e", deleted: "", overwritten: "d"}


@pytest.mark.parametrize(("make", "end"), [*ENDS.items(), (overwritten, "c")])
def test_explained_history_passes(make: Make, end: str) -> None:
    """Writes in doubt may be applied, even long after their errors."""
    verdict = make().judge(end)

    assert (verdict.wrong, verdict.lost) == ([], [])
    assert (verdict.doubts, verdict.applied) == ({LATE: 1}, 1)


def test_write_in_doubt_may_not_be_applied() -> None:
    """Then it does not count as applied."""
    verdict = History(changed()[:4]).add(UNCHANGED, "e", "b", count=2).judge()

    assert (verdict.wrong, verdict.applied, verdict.acknowledged) == ([], 0, 3)


@pytest.mark.parametrize(("make", "length"), [(changed, 4), (overwritten, 3)])
def test_write_without_doubt_is_not_applied(make: Make, length: int) -> None:
    """Data of a write that failed with `in_doubt` False is wrong, in a load and at the end."""
    history = make(in_doubt=False)

    assert any("without doubt" in each for each in history.judge(ENDS[make]).wrong)
    assert any("without doubt" in each for each in History(history[:length]).judge("c").wrong)


def test_missing_writes_are_lost() -> None:
    """The data stored at the end has every acknowledged write."""
    assert [len(changed().judge(end).lost) for end in ("a", "c", "")] == [2, 1, 3]
    assert [len(overwritten().judge(end).lost) for end in ("b", "")] == [1, 3]
    assert len(deleted().judge("e").lost) == 1


@pytest.mark.parametrize(
    ("make", "event", "more", "what"),
    [
        (changed, (LOAD, "x"), {}, "no client wrote it"),
        (changed, (LOAD, "d"), {}, "was refused"),
        (changed, (LOAD, "b"), {}, "older"),
        (changed, (LOAD, "e"), {"count": 4}, "changed 4 times"),
        (changed, (LOAD,), MISSING, "no client deleted"),
        (changed, (LOAD,), {"outcome": "CorruptSession"}, "CorruptSession"),
        (changed, (LOAD, "e"), {"flaws": ["another session"]}, "another session"),
        (changed, (UNCHANGED, "x", "c"), {}, "2 writes over"),
        (changed, (UNCHANGED, "x", "?"), {}, "no client wrote"),
        (changed, (UNCHANGED, "x", "e"), CONFLICT, "no other client"),
        (changed, (UNCHANGED, "x", "e"), MISSING, "no client deleted"),
        (changed, (ABSENT, "x"), {"outcome": "SessionExists"}, "exists"),
        (changed, (DELETE,), {}, "no client deleted"),
        (deleted, (LOAD, "e"), {}, "back"),
        (deleted, (UNCHANGED, "x", "e"), {}, "back"),
        (deleted, (DELETE,), {"existed": True}, "back"),
        (overwritten, (LOAD, "b"), {}, "older"),
        (overwritten, (LOAD,), MISSING, "no client deleted"),
    ],
)
def test_seeded_anomaly_is_wrong(
    make: Make, event: tuple[str, ...], more: dict[str, Any], what: str
) -> None:
    """An event that the rules of the checker exclude follows a right history."""
    wrong = make().add(*event, **more).judge(ENDS[make]).wrong

    assert any(what in each for each in wrong), wrong


@pytest.mark.parametrize(
    ("make", "event", "more", "least", "what"),
    [
        (changed, (LOAD, "c"), {}, 1, "older"),  # "e" was acknowledged a second ago
        (deleted, (LOAD, "e"), {}, 7, "back"),  # the session was deleted seven seconds ago
        (created, (LOAD,), MISSING, 1, "no client deleted"),
    ],
)
def test_cache_is_late_within_its_bound(
    make: Make, event: tuple[str, ...], more: dict[str, Any], least: int, what: str
) -> None:
    """A load finds the past of other processes, up to `max_staleness`, and none of its own."""
    for client, staleness, right in (
        (CLIENTS, least + 0.5, True),
        (CLIENTS, least - 0.5, False),
        (0, least + 0.5, False),
    ):
        late: dict[str, Any] = more | {"client": client, "staleness": staleness}
        wrong = make().add(*event, **late).judge(ENDS.get(make, "a")).wrong
        assert any(what in each for each in wrong) is not right
        assert right is not bool(wrong)


@pytest.mark.parametrize(
    ("event", "what"),
    [
        ((LOAD, "x"), "no client wrote it"),
        ((LOAD, "d"), "was refused"),
        ((UNCHANGED, "x", "c"), "2 writes over"),
    ],
)
def test_staleness_explains_nothing_else(event: tuple[str, ...], what: str) -> None:
    """A cache shows nothing but writes, and a save over a stale copy is a lost update."""
    history = changed().add(*event, client=CLIENTS, staleness=100)

    assert any(what in each for each in history.judge("e").wrong)


def test_loads_after_deletion_are_timed() -> None:
    """The longest time counts, separately with announcements and without."""
    history = deleted()
    for announced in (False, True, True):
        history.add(LOAD, "e", client=CLIENTS, staleness=100, announced=announced)
    verdict = history.judge()

    assert (verdict.outlived, verdict.outlived_unannounced) == (11, 7)
    assert deleted().judge().outlived == 0


@pytest.mark.parametrize("in_doubt", [True, False])
def test_only_writes_in_doubt_explain(*, in_doubt: bool) -> None:
    """A delete in doubt explains a missing session, and a change in doubt a conflict."""
    doubt = IN_DOUBT | {"in_doubt": in_doubt}
    gone = changed().add(DELETE, **doubt).add(LOAD, **MISSING).judge()
    assert bool(gone.wrong) is bool(gone.lost) is not in_doubt

    history = changed().add(UNCHANGED, "f", "e", **doubt).add(UNCHANGED, "g", "e", **CONFLICT)
    assert bool(history.judge("e").wrong) is not in_doubt


def test_only_overlapping_calls_explain() -> None:
    """A later deletion explains nothing, and a load sees the last write that ended before it."""
    assert len(changed().add(LOAD, **MISSING).add(DELETE, existed=True).judge().wrong) == 1

    history = changed().add(LOAD, "c")
    assert len(history.judge("e").wrong) == 1
    history[-1].start = history[-2].end - 0.5
    assert history.judge("e").wrong == []


def test_late_overwrite_replaces_older_data() -> None:
    """Once a load has found a write in doubt, the older data does not return."""
    history = overwritten().add(ALWAYS, "f", **IN_DOUBT).add(LOAD, "d").add(LOAD, "f")
    assert history.judge("f").wrong == []
    assert any("older" in each for each in history.add(LOAD, "d").judge("f").wrong)


def test_losses_of_a_fault_are_counted() -> None:
    """They are wrong only if they were replicated, or acknowledged long before or after it."""
    history = changed().add(LOAD, "b").add(UNCHANGED, "f", "b", count=2)
    end = history[6].end
    verdict = check(history, {"id": Found("f", 2)}, loses=(end, end + 0.5))
    assert (verdict.wrong, len(verdict.lost)) == ([], 1)

    for token, lost_too in (("b", False), ("e", True)):
        wrong = history.judge("f", loses=(end, end + 0.5), replicated={"id": Found(token, 0)}).wrong
        assert any("replicated" in each for each in wrong) is lost_too
    for span, explained in (((end + 5, end + 6), 0), ((0, end - 1), 0), ((end - 0.1, end + 1), 1)):
        assert bool(changed().judge("c", loses=span).wrong) is not bool(explained)


@pytest.mark.parametrize(
    ("make", "event", "more", "end"),
    [
        (changed, (LOAD, "c"), {}, "e"),
        (changed, (LOAD,), MISSING, "e"),
        (changed, (UNCHANGED, "x", "e"), CONFLICT, "e"),
        (changed, (UNCHANGED, "d", "c"), {}, "d"),
        (deleted, (LOAD, "e"), {}, ""),
    ],
)
def test_fault_explains_only_contradictions_across_it(
    make: Make, event: tuple[str, ...], more: dict[str, Any], end: str
) -> None:
    """A fault before both calls explains nothing."""
    history = make().add(*event, **more)

    assert history.judge(end, loses=(-2.0, -1.0)).wrong
    assert not history.judge(end, loses=(history[-2].end, history[-1].start)).wrong


@pytest.mark.parametrize(("verb", "allowed"), [(LOAD, ()), (ABSENT, (1, 2)), (UNCHANGED, (2,))])
def test_bridged_outage_allows_only_doubts(verb: str, allowed: tuple[int, ...]) -> None:
    """A save can be in doubt only if another client has written the session."""
    doubts = [(False, 0), (True, 0), (True, 1)]
    for number, (in_doubt, client) in enumerate(doubts):
        doubt = IN_DOUBT | {"in_doubt": in_doubt, "client": client}
        history = History(changed()[:3]).add(verb, "x", **doubt)
        assert bool([*unbridged(history)]) is (number not in allowed)


def test_timeout_before_the_deadline_is_wrong() -> None:
    """It is right for a write in doubt, after a second of outage, and if a load joined another."""

    def is_early(verb: str, start: float, end: float, *, in_doubt: bool, **more: Any) -> bool:
        history = History().add(ABSENT, start=10.0, end=10.5, **IN_DOUBT)
        history.add(verb, start=start, end=end, **IN_DOUBT | more | {"in_doubt": in_doubt})
        return bool([*early(history, [10.0], timeout=0.5)])

    assert is_early(LOAD, 10.4, 10.6, in_doubt=False)
    assert not is_early(LOAD, 10.0, 10.5, in_doubt=False)
    assert not is_early(LOAD, 10.4, 10.6, in_doubt=False, staleness=0.3)
    assert not is_early(LOAD, 11.4, 11.41, in_doubt=False)
    assert not is_early(ABSENT, 10.4, 10.6, in_doubt=True)


def test_page_is_up_to_date() -> None:
    """The page shows the committed results."""
    text = report.PAGE.read_text("utf-8")

    assert report.rewritten(text) == text


@pytest.mark.parametrize(("name", "grows"), [("memory", 1e6), ("objects", 1e3), ("tasks", 1)])
def test_soak_finds_growth(name: str, grows: float) -> None:
    """A soak passes if nothing grows from the first third to the last."""
    flat = [report.Moment(minute, 3e7, 5e4, 9, 12, 2, 0, 0, 0) for minute in range(30)]
    growing = [
        msgspec.structs.replace(each, **{name: getattr(each, name) + grows * each.minutes})
        for each in flat
    ]

    assert judge(flat, warm_up=10.0, connections=2)[1] == []
    assert judge(flat, warm_up=10.0, connections=1)[1]
    assert len(judge(growing, warm_up=10.0, connections=2)[1]) == 1
