"""Short forms of the fault suite's scenarios, and tests of its checker.

`nox -s faults` runs every scenario, and each for longer.
"""

from typing import Any

import msgspec
import pytest

from tests.faults import report
from tests.faults.__main__ import main
from tests.faults.checker import LATE, Verdict, cause, check, early, unbridged
from tests.faults.history import (
    ABSENT,
    ALWAYS,
    DELETE,
    LOAD,
    OK,
    PRESENT,
    UNAVAILABLE,
    UNCHANGED,
    Event,
    Found,
)
from tests.faults.run import SHORT, execute
from tests.faults.scenarios import SCENARIOS, WITHOUT_AOF
from tests.faults.soaking import judge

NOT_FOUND = "SessionNotFound"
CONFLICT = "SessionConflict"


# The scenarios. Each has a process on every event loop of tests/support/loops.py.


@pytest.mark.parametrize(
    "name", ["kill", "hang-staggered", "reset", "out-of-memory", "password", "clock"]
)
async def test_fault_breaks_no_promise(name: str) -> None:
    """No reply is wrong, no write is lost, errors name the cause, and the recovery is quick."""
    result = await execute(SCENARIOS[name], SHORT)

    assert result.problems == []
    assert result.calls > 100
    assert result.recovery


async def test_suite_finds_lost_writes() -> None:
    """A server without an append-only file loses acknowledged writes, and the suite reports it."""
    result = await execute(WITHOUT_AOF, SHORT)

    assert result.lost > 0
    assert result.wrong > 0
    assert any("lost" in problem for problem in result.problems)


def test_unknown_scenario_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the scenarios that exist."""
    with pytest.raises(SystemExit):
        main(["nonsense"])

    assert "there is no scenario nonsense" in capsys.readouterr().err


# The checker. Events are one second long and one second apart.


class Recorder:
    """Makes a history of events that follow each other."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, verb: str, token: str = "", outcome: str = OK, **more: Any) -> Event:
        """Add an event after the others."""
        start = 2.0 * len(self.events)
        fields: dict[str, Any] = {"id": "id", "start": start, "end": start + 1} | more
        event = Event(verb=verb, token=token, outcome=outcome, **fields)
        self.events.append(event)
        return event

    def doubt(self, verb: str, token: str = "", *, in_doubt: bool = True, **more: Any) -> Event:
        """Add a `StorageUnavailable`."""
        return self.add(verb, token, UNAVAILABLE, in_doubt=in_doubt, message=LATE, **more)


def saved(*, in_doubt: bool = True) -> Recorder:
    """A session that was created and changed; one change failed, but was applied."""
    history = Recorder()
    history.add(ABSENT, "a")
    history.add(LOAD, "a")
    history.add(UNCHANGED, "b", before="a", count=1)
    history.doubt(UNCHANGED, "c", before="b", count=2, in_doubt=in_doubt)
    history.add(LOAD, "c", count=2)
    history.add(UNCHANGED, "d", CONFLICT, before="b", count=2)
    history.add(UNCHANGED, "e", before="c", count=3)
    return history


def deleted() -> Recorder:
    """The same session, deleted."""
    history = saved()
    history.add(DELETE, existed=True)
    history.add(LOAD, outcome=NOT_FOUND)
    history.add(UNCHANGED, "f", NOT_FOUND, before="e", count=4)
    history.add(DELETE)
    return history


def overwritten(*, in_doubt: bool = True) -> Recorder:
    """A session that its only writer overwrote; one write failed, but was applied."""
    history = Recorder()
    history.add(ALWAYS, "a")
    history.add(PRESENT, "b", count=1)
    history.doubt(ALWAYS, "c", count=2, in_doubt=in_doubt)
    history.add(LOAD, "b", count=1)
    history.add(LOAD, "c", count=2)
    history.add(ALWAYS, "d", count=3)
    history.add(LOAD, "d", count=3)
    return history


def verdict_on(history: Recorder, token: str = "", count: int = 0) -> Verdict:
    """The verdict if this is stored at the end, or nothing."""
    return check(history.events, {"id": Found(token, count)} if token else {})


@pytest.mark.parametrize(
    ("history", "token", "count"),
    [(saved(), "e", 3), (deleted(), "", 0), (overwritten(), "d", 3), (overwritten(), "c", 2)],
    ids=["saved", "deleted", "overwritten", "overwritten-late"],
)
def test_explained_history_passes(history: Recorder, token: str, count: int) -> None:
    """Writes in doubt may be applied, even long after their errors."""
    verdict = verdict_on(history, token, count)

    assert (verdict.wrong, verdict.lost) == ([], [])
    assert (verdict.doubts.total(), verdict.applied) == (1, 1)
    assert verdict.calls == len(history.events)


def test_write_in_doubt_may_not_be_applied() -> None:
    """Then it does not count as applied."""
    history = saved()
    del history.events[4:]
    history.add(UNCHANGED, "e", before="b", count=2)

    verdict = verdict_on(history, "e", 2)

    assert (verdict.wrong, verdict.lost, verdict.applied) == ([], [], 0)


@pytest.mark.parametrize(
    ("history", "token", "count"),
    [(saved(in_doubt=False), "e", 3), (overwritten(in_doubt=False), "d", 3)],
    ids=["saved", "overwritten"],
)
def test_write_without_doubt_is_not_applied(history: Recorder, token: str, count: int) -> None:
    """`in_doubt` False promises that; data of such a write is wrong wherever it is found."""
    assert any("without doubt" in each for each in verdict_on(history, token, count).wrong)

    write = next(event for event in history.events if event.unavailable)
    final = {"id": Found(write.token, write.count)}
    history.events = [event for event in history.events if event.end <= write.end]
    assert any("without doubt" in each for each in check(history.events, final).wrong)


@pytest.mark.parametrize("in_doubt", [True, False])
def test_delete_without_doubt_is_not_applied(*, in_doubt: bool) -> None:
    """Only a delete in doubt explains that the session is gone."""
    history = saved()
    history.doubt(DELETE, in_doubt=in_doubt)
    history.add(LOAD, outcome=NOT_FOUND)

    verdict = verdict_on(history)

    assert bool(verdict.wrong) is bool(verdict.lost) is not in_doubt


def test_write_without_doubt_explains_no_conflict() -> None:
    """It was not applied, so it cannot be the rival."""
    history = saved()
    history.doubt(UNCHANGED, "f", before="e", count=4, in_doubt=False)
    history.add(UNCHANGED, "g", CONFLICT, before="e", count=4)

    assert any("no other client wrote" in each for each in verdict_on(history, "e", 3).wrong)


def test_missing_writes_are_lost() -> None:
    """The data stored at the end has every acknowledged write."""
    assert len(verdict_on(saved(), "a", 0).lost) == 2
    assert len(verdict_on(saved(), "c", 2).lost) == 1
    assert len(verdict_on(saved()).lost) == 3
    assert len(verdict_on(deleted(), "e", 3).lost) == 1
    assert len(verdict_on(overwritten(), "b", 1).lost) == 1
    assert len(verdict_on(overwritten()).lost) == 3


@pytest.mark.parametrize(
    ("verb", "token", "more", "what"),
    [
        (LOAD, "x", {}, "no client wrote it"),
        (LOAD, "d", {"count": 2}, "was refused"),
        (LOAD, "b", {"count": 1}, "older"),
        (LOAD, "e", {"count": 4}, "changed 4 times"),
        (LOAD, "", {"outcome": NOT_FOUND}, "no client deleted"),
        (LOAD, "", {"outcome": "CorruptSession"}, "CorruptSession"),
        (LOAD, "e", {"count": 3, "flaws": ["another session"]}, "another session"),
        (UNCHANGED, "x", {"before": "c", "count": 3}, "2 writes over"),
        (UNCHANGED, "x", {"before": "?", "count": 4}, "no client wrote"),
        (UNCHANGED, "x", {"before": "e", "count": 4, "outcome": CONFLICT}, "no other client"),
        (UNCHANGED, "x", {"before": "e", "count": 4, "outcome": NOT_FOUND}, "no client deleted"),
        (ABSENT, "x", {"outcome": "SessionExists"}, "exists"),
        (DELETE, "", {}, "no client deleted"),
    ],
)
def test_unexplained_event_is_wrong(verb: str, token: str, more: dict[str, Any], what: str) -> None:
    """It follows the creation and the changes of a session."""
    history = saved()
    history.add(verb, token, **more)

    verdict = verdict_on(history, "e", 3)

    assert any(what in each for each in verdict.wrong), verdict.wrong


@pytest.mark.parametrize(
    ("verb", "token", "more"),
    [
        (LOAD, "e", {"count": 3}),
        (UNCHANGED, "x", {"before": "e", "count": 4}),
        (DELETE, "", {"existed": True}),
    ],
)
def test_deleted_session_does_not_return(verb: str, token: str, more: dict[str, Any]) -> None:
    """No client may load it, save it, or delete it again."""
    history = deleted()
    history.add(verb, token, **more)

    assert any("back" in each for each in verdict_on(history).wrong)


def test_later_deletion_explains_nothing() -> None:
    """A load before it must find the session."""
    history = saved()
    history.add(LOAD, outcome=NOT_FOUND)
    history.add(DELETE, existed=True)

    assert len(verdict_on(history).wrong) == 1


def test_overlapping_calls_may_see_either() -> None:
    """Only a call that begins after another one ended must see the same data or newer."""
    history = saved()
    late = history.add(LOAD, "c", count=2)
    assert len(verdict_on(history, "e", 3).wrong) == 1

    late.start = history.events[-2].end - 0.5
    assert verdict_on(history, "e", 3).wrong == []


def test_overwritten_data_does_not_return() -> None:
    """A later acknowledged write replaced it."""
    history = overwritten()
    history.add(LOAD, "b", count=1)

    verdict = verdict_on(history, "d", 3)

    assert any("older" in each for each in verdict.wrong)
    assert len(verdict.lost) == 1


def test_losses_of_a_fault_are_counted() -> None:
    """They are wrong only if they were replicated, or acknowledged long before the fault."""
    history = saved()
    history.add(LOAD, "b", count=1)
    history.add(UNCHANGED, "f", before="b", count=2)
    final = {"id": Found("f", 2)}
    fault = history.events[6].end

    span = fault, fault + 0.5

    verdict = check(history.events, final, loses=span)
    assert verdict.wrong == []
    (lost,) = verdict.lost
    assert "e was overwritten" in lost

    assert check(history.events, final, loses=(fault + 9.0, fault + 10.0)).wrong
    for token, lost_too in (("b", False), ("e", True)):
        replicated = {"id": Found(token, 0)}
        verdict = check(history.events, final, loses=span, replicated=replicated)
        assert any("replicated" in each for each in verdict.wrong) is lost_too


def test_distant_fault_explains_no_loss() -> None:
    """A write acknowledged long before it, or after it, must not be lost."""
    history = saved()
    end = history.events[-1].end
    final = {"id": Found("c", 2)}

    for span in ((end + 5, end + 6), (0.0, end - 1)):
        verdict = check(history.events, final, loses=span)
        assert len(verdict.lost) == 1
        assert any("without a reason" in each for each in verdict.wrong)
    assert check(history.events, final, loses=(end - 0.1, end + 1)).wrong == []


@pytest.mark.parametrize(
    ("verb", "token", "more"),
    [
        (LOAD, "c", {"count": 2}),
        (LOAD, "", {"outcome": NOT_FOUND}),
        (UNCHANGED, "x", {"before": "e", "count": 4, "outcome": CONFLICT}),
    ],
)
def test_past_fault_explains_no_contradiction(verb: str, token: str, more: dict[str, Any]) -> None:
    """A fault explains only a contradiction between a call before it and a call after it."""
    history = saved()
    history.add(verb, token, **more)
    past, between = (-2.0, -1.0), (history.events[-2].end, history.events[-1].start)

    assert check(history.events, {"id": Found("e", 3)}, loses=past).wrong
    assert not check(history.events, {"id": Found("e", 3)}, loses=between).wrong


def test_past_fault_explains_no_lost_update() -> None:
    """Two writes over the same one need a fault between them."""
    history = saved()
    history.add(UNCHANGED, "x", before="c", count=3)
    between = (history.events[-2].end, history.events[-1].start)

    assert check(history.events, {"id": Found("x", 3)}, loses=(-2.0, -1.0)).wrong
    assert not check(history.events, {"id": Found("x", 3)}, loses=between).wrong


def test_fault_may_lose_a_deletion() -> None:
    """A fault before the deletion may not."""
    history = deleted()
    history.add(LOAD, "e", count=3)

    assert check(history.events, {}, loses=(-2.0, -1.0)).wrong
    end = history.events[-2].end
    assert not check(history.events, {}, loses=(end, end + 0.5)).wrong


def test_write_in_doubt_replaces_older_data() -> None:
    """Once a load has found it, the older data does not return."""
    history = overwritten()
    history.doubt(ALWAYS, "e", count=4)
    history.add(LOAD, "d", count=3)
    history.add(LOAD, "e", count=4)
    assert verdict_on(history, "e", 4).wrong == []

    history.add(LOAD, "d", count=3)
    assert any("older" in each for each in verdict_on(history, "e", 4).wrong)


def test_errors_are_counted_by_cause() -> None:
    """The address and the remark about doubt do not count; errors are not acknowledged."""
    messages = f"{LATE} (127.0.0.1:1)", f"{LATE} (127.0.0.1:2); the write may have been applied"
    assert {cause(message) for message in messages} == {LATE}

    verdict = verdict_on(saved(), "e", 3)

    assert verdict.doubts == {LATE: 1}
    assert verdict.acknowledged == 3


@pytest.mark.parametrize(
    ("verb", "in_doubt", "client", "allowed"),
    [
        (LOAD, False, 0, False),
        (ABSENT, False, 0, False),
        (ABSENT, True, 0, True),
        (DELETE, True, 0, True),
        (UNCHANGED, True, 0, False),
        (UNCHANGED, True, 1, True),
    ],
)
def test_bridged_outage_allows_only_doubts(
    verb: str, client: int, *, in_doubt: bool, allowed: bool
) -> None:
    """A save can be in doubt only if another client has written the session."""
    history = saved()
    history.doubt(verb, "x", in_doubt=in_doubt, client=client)
    del history.events[3]  # the error of the history itself

    assert bool([*unbridged(history.events)]) is not allowed


def test_timeout_before_the_deadline_is_wrong() -> None:
    """It is right for a write in doubt, and after the first second of an outage."""
    history = Recorder()

    def timed_out(verb: str, start: float, end: float, *, in_doubt: bool = False) -> list[str]:
        history.doubt(verb, in_doubt=in_doubt, start=start, end=end)
        return [*early(history.events, [10.0], timeout=0.5)]

    assert not timed_out(LOAD, 10.0, 10.5)
    assert not timed_out(ABSENT, 10.4, 10.6, in_doubt=True)
    assert not timed_out(LOAD, 11.4, 11.41)
    assert timed_out(LOAD, 10.4, 10.6)


# The report.


def test_page_is_up_to_date() -> None:
    """It shows the committed results; `nox -s faults -- --save` updates both."""
    text = report.PAGE.read_text("utf-8")

    assert report.rewritten(text) == text


def test_soak_finds_growth() -> None:
    """A soak passes if nothing grows from the first third to the last."""
    flat = [
        report.Moment(minute, 3e7, 5e4, 9, 12, 2, 1000 * minute, minute, 10**6)
        for minute in range(30)
    ]
    assert judge(flat, warm_up=10.0, connections=2)[1] == []

    for name, growth in (("memory", 1e6), ("objects", 1e3), ("tasks", 1), ("files", 1)):
        growing = [
            msgspec.structs.replace(each, **{name: getattr(each, name) + growth * each.minutes})
            for each in flat
        ]
        _, problems = judge(growing, warm_up=10.0, connections=2)
        assert len(problems) == 1, problems
    assert judge(flat, warm_up=10.0, connections=1)[1]
