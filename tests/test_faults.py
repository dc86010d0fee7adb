"""The fault suite in short, and its checker: what it must not find, and what it must.

`nox -s faults` runs every scenario, and each for longer.
"""

import msgspec
import pytest

from tests.faults import journal, report
from tests.faults.__main__ import main
from tests.faults.checker import Verdict, check
from tests.faults.journal import (
    ABSENT,
    ALWAYS,
    DELETE,
    LOAD,
    PRESENT,
    UNAVAILABLE,
    UNCHANGED,
    Event,
    Found,
)
from tests.faults.scenarios import FORGETFUL, SCENARIOS
from tests.faults.soaking import judge
from tests.faults.stage import SHORT, play

NOT_FOUND = "SessionNotFound"
CONFLICT = "SessionConflict"


# The scenarios.


@pytest.mark.parametrize("name", ["kill", "hang", "reset", "out-of-memory", "password"])
async def test_a_fault_is_survived(name: str) -> None:
    """Without a wrong reply or a lost write, told as it should be, and not for long."""
    result = await play(SCENARIOS[name], SHORT)

    assert result.problems == []
    assert result.operations > 100
    assert result.recovery


async def test_a_server_that_forgets_is_found_out() -> None:
    """Where acknowledged writes are lost, the suite says so: it would notice."""
    result = await play(FORGETFUL, SHORT)

    assert result.lost > 0
    assert result.wrong > 0
    assert any("lost" in problem for problem in result.problems)


def test_a_scenario_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With the names of those that are."""
    with pytest.raises(SystemExit):
        main(["nonsense"])

    assert "sentinel" in main.__module__ or "nonsense" in capsys.readouterr().err


# The checker. A second goes by between two events.


class History:
    """Events, one after the other."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, verb: str, token: str = "", outcome: str = journal.OK, **more: object) -> Event:
        """One more event."""
        start = 2.0 * len(self.events)
        fields = {"verb": verb, "id": "id", "token": token, "outcome": outcome} | more
        event = msgspec.convert({"start": start, "end": start + 1, **fields}, _Named)
        self.events.append(Event(**msgspec.structs.asdict(event)))
        return self.events[-1]


class _Named(msgspec.Struct):
    """An `Event` by the names of its fields."""

    verb: str
    id: str
    start: float
    end: float
    token: str
    outcome: str
    before: str = ""
    count: int = 0
    existed: bool = False
    late: float = 0.0
    flaws: list[str] = []


def saved() -> History:
    """A session that was created and changed; of one change it was unknown whether it was."""
    history = History()
    history.add(ABSENT, "a")
    history.add(LOAD, "a")
    history.add(UNCHANGED, "b", before="a", count=1)
    history.add(UNCHANGED, "c", UNAVAILABLE, before="b", count=2)
    history.add(LOAD, "c", count=2)
    history.add(UNCHANGED, "d", CONFLICT, before="b", count=2)
    history.add(UNCHANGED, "e", before="c", count=3)
    return history


def deleted() -> History:
    """The same, deleted."""
    history = saved()
    history.add(DELETE, existed=True)
    history.add(LOAD, outcome=NOT_FOUND)
    history.add(UNCHANGED, "f", NOT_FOUND, before="e", count=4)
    history.add(DELETE)
    return history


def overwritten() -> History:
    """A session that its only writer overwrote; one write was given up."""
    history = History()
    history.add(ALWAYS, "a")
    history.add(PRESENT, "b", count=1)
    history.add(ALWAYS, "c", UNAVAILABLE, count=2)
    history.add(LOAD, "b", count=1)
    history.add(LOAD, "c", count=2)
    history.add(ALWAYS, "d", count=3)
    history.add(LOAD, "d", count=3)
    return history


def verdict_on(history: History, token: str = "", count: int = 0) -> Verdict:
    """The verdict, when this is stored in the end, or nothing."""
    return check(history.events, {"id": Found(token, count)} if token else {})


@pytest.mark.parametrize(
    ("history", "token", "count"),
    [(saved(), "e", 3), (deleted(), "", 0), (overwritten(), "d", 3), (overwritten(), "c", 2)],
    ids=["saved", "deleted", "overwritten", "overwritten-late"],
)
def test_nothing_is_wrong_with_what_can_be_explained(
    history: History, token: str, count: int
) -> None:
    """Among this, writes that are applied although, or long after, nobody has been told so."""
    verdict = verdict_on(history, token, count)

    assert (verdict.wrong, verdict.lost) == ([], [])
    assert (verdict.unknown, verdict.applied) == (1, 1)
    assert verdict.verbs == len(history.events)


def test_an_unknown_write_may_never_have_been_applied() -> None:
    """It is then none of those that were."""
    history = saved()
    del history.events[4:]
    history.add(UNCHANGED, "e", before="b", count=2)

    verdict = verdict_on(history, "e", 2)

    assert (verdict.wrong, verdict.lost, verdict.applied) == ([], [], 0)


def test_what_is_stored_in_the_end_has_every_write() -> None:
    """Otherwise each one that it lacks is lost."""
    assert len(verdict_on(saved(), "a", 0).lost) == 2
    assert len(verdict_on(saved(), "c", 2).lost) == 1
    assert len(verdict_on(saved()).lost) == 3
    assert len(verdict_on(deleted(), "e", 3).lost) == 1
    assert len(verdict_on(overwritten(), "b", 1).lost) == 1
    assert len(verdict_on(overwritten()).lost) == 3


@pytest.mark.parametrize(
    ("verb", "token", "more", "what"),
    [
        (LOAD, "x", {}, "by nobody"),
        (LOAD, "d", {"count": 2}, "was refused"),
        (LOAD, "b", {"count": 1}, "older"),
        (LOAD, "e", {"count": 4}, "changed 4 times"),
        (LOAD, "", {"outcome": NOT_FOUND}, "nobody has deleted"),
        (LOAD, "", {"outcome": "CorruptSession"}, "CorruptSession"),
        (LOAD, "e", {"count": 3, "flaws": ["somebody else's session"]}, "somebody else's"),
        (UNCHANGED, "x", {"before": "c", "count": 3}, "2 writes over"),
        (UNCHANGED, "x", {"before": "?", "count": 4}, "nobody wrote"),
        (UNCHANGED, "x", {"before": "e", "count": 4, "outcome": CONFLICT}, "nobody else"),
        (UNCHANGED, "x", {"before": "e", "count": 4, "outcome": NOT_FOUND}, "nobody has deleted"),
        (ABSENT, "x", {"outcome": "SessionExists"}, "exists"),
        (DELETE, "", {}, "nobody has deleted"),
    ],
)
def test_what_cannot_be_explained_is_wrong(
    verb: str, token: str, more: dict[str, object], what: str
) -> None:
    """After a session was created and changed."""
    history = saved()
    history.add(verb, token, **more)  # type: ignore[arg-type]

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
def test_what_was_deleted_must_not_come_back(
    verb: str, token: str, more: dict[str, object]
) -> None:
    """Nobody may find it, or write over it, or delete it again."""
    history = deleted()
    history.add(verb, token, **more)  # type: ignore[arg-type]

    assert any("back" in each for each in verdict_on(history).wrong)


def test_a_deletion_explains_nothing_that_was_before_it() -> None:
    """That a session was not found, in particular."""
    history = saved()
    history.add(LOAD, outcome=NOT_FOUND)
    history.add(DELETE, existed=True)

    assert len(verdict_on(history).wrong) == 1


def test_two_who_overlap_may_see_either() -> None:
    """Only who begins after another has ended has to see what that one saw."""
    history = saved()
    late = history.add(LOAD, "c", count=2)
    assert len(verdict_on(history, "e", 3).wrong) == 1

    late.start = history.events[-2].end - 0.5
    assert verdict_on(history, "e", 3).wrong == []


def test_an_overwritten_session_never_goes_back() -> None:
    """To a write that was acknowledged, and overwritten by one that was."""
    history = overwritten()
    history.add(LOAD, "b", count=1)

    verdict = verdict_on(history, "d", 3)

    assert any("older" in each for each in verdict.wrong)
    assert len(verdict.lost) == 1


def test_what_a_fault_may_lose_is_counted() -> None:
    """It is not wrong then; but what was replicated before, and before the fault anything, is."""
    history = saved()
    history.add(LOAD, "b", count=1)
    history.add(UNCHANGED, "f", before="b", count=2)
    final = {"id": Found("f", 2)}
    fault = history.events[6].end

    span = fault, fault + 0.5

    verdict = check(history.events, final, loses=span)
    assert verdict.wrong == []
    (lost,) = verdict.lost
    assert "e was overwritten, or undone" in lost

    assert check(history.events, final, loses=(fault + 9.0, fault + 10.0)).wrong
    for token, lost_too in (("b", False), ("e", True)):
        replicated = {"id": Found(token, 0)}
        verdict = check(history.events, final, loses=span, replicated=replicated)
        assert any("replicated" in each for each in verdict.wrong) is lost_too


def test_a_fault_explains_no_loss_that_was_long_before_it() -> None:
    """Nor one of what was acknowledged when it was over."""
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
def test_a_fault_that_is_over_explains_nothing(
    verb: str, token: str, more: dict[str, object]
) -> None:
    """Neither a step back nor an answer without a reason."""
    history = saved()
    history.add(verb, token, **more)  # type: ignore[arg-type]
    early, late = (-2.0, -1.0), (history.events[-2].end, history.events[-1].start)

    assert check(history.events, {"id": Found("e", 3)}, loses=early).wrong
    assert not check(history.events, {"id": Found("e", 3)}, loses=late).wrong


def test_a_fault_that_is_over_allows_no_second_write_over_the_same_one() -> None:
    """One of them may be what it has lost."""
    history = saved()
    history.add(UNCHANGED, "x", before="c", count=3)
    late = (history.events[-2].end, history.events[-1].start)

    assert check(history.events, {"id": Found("x", 3)}, loses=(-2.0, -1.0)).wrong
    assert not check(history.events, {"id": Found("x", 3)}, loses=late).wrong


def test_what_was_deleted_when_a_fault_was_over_must_not_come_back() -> None:
    """Only a deletion that it may have lost."""
    history = deleted()
    history.add(LOAD, "e", count=3)

    assert check(history.events, {}, loses=(-2.0, -1.0)).wrong
    end = history.events[-2].end
    assert not check(history.events, {}, loses=(end, end + 0.5)).wrong


def test_what_was_replaced_by_a_write_that_was_given_up_does_not_come_back() -> None:
    """Once somebody has seen that it was applied."""
    history = overwritten()
    history.add(ALWAYS, "e", UNAVAILABLE, count=4)
    history.add(LOAD, "d", count=3)
    history.add(LOAD, "e", count=4)
    assert verdict_on(history, "e", 4).wrong == []

    history.add(LOAD, "d", count=3)
    assert any("older" in each for each in verdict_on(history, "e", 4).wrong)


def test_errors_are_counted_by_what_they_say() -> None:
    """And whoever was told one does not count as served."""
    history = saved()

    verdict = verdict_on(history, "e", 3)

    assert verdict.errors.total() == 1
    assert verdict.acknowledged == 3


# The report.


def test_the_page_is_up_to_date() -> None:
    """What it shows is what the committed results say: `nox -s faults -- --save` redoes it."""
    text = report.PAGE.read_text("utf-8")

    assert report.rewritten(text) == text


def test_growth_is_found() -> None:
    """A soak is flat if nothing grows from the first third to the last."""
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
