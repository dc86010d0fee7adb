"""Tests of the judgement of lists and revocations, on written histories."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.checker import check
from tests.faults.history import (
    ABSENT,
    CLIENTS,
    DELETE,
    LATE,
    LIST,
    LOAD,
    REVOKE_ALL,
    UNCHANGED,
    Event,
    Found,
)
from tests.faults.judge import Verdict
from tests.faults.run import exposed_ids

MISSING: dict[str, Any] = {"outcome": "SessionNotFound"}
IN_DOUBT: dict[str, Any] = {"outcome": "StorageUnavailable", "message": LATE, "in_doubt": True}


class History(list[Event]):
    """Events of the sessions of one principal. They are one second long and one second apart."""

    def add(self, verb: str, id: str = "", **more: Any) -> "History":
        """Add an event after the others."""
        start = 2.0 * len(self)
        fields: dict[str, Any] = {"start": start, "end": start + 1, "principal": "alice"} | more
        self.append(Event(verb, id, **fields))
        return self

    def listing(self, *digests: str, **more: Any) -> "History":
        """Add a list."""
        return self.add(LIST, digests=[*digests], **more)

    def judge(self, *stored: str, **more: Any) -> Verdict:
        """The verdict if these sessions are stored at the end."""
        return check(self, {id: Found("", 0) for id in stored}, **more)


def rotated(**more: Any) -> History:
    """Two sessions were created and listed, and the second one was rotated to a third id."""
    history = History().add(ABSENT, "a").add(ABSENT, "b").listing("b", "a")
    return history.add(ABSENT, "c", origin="b").add(UNCHANGED, "b", marked=True, **more)


def revoked(**more: Any) -> History:
    """The same sessions, revoked except for the first one."""
    history = rotated().listing("c", "a").add(REVOKE_ALL, digests=["a"], **more)
    return history.listing("a").add(LOAD, "b", **MISSING).add(LOAD, "a")


ENDS: dict[Callable[..., History], tuple[str, ...]] = {rotated: ("a", "b", "c"), revoked: ("a",)}


@pytest.mark.parametrize("make", ENDS)
def test_explained_history_passes(make: Callable[..., History]) -> None:
    """Rotated and revoked sessions are neither listed nor found."""
    verdict = make().judge(*ENDS[make])

    assert (verdict.wrong, verdict.lost) == ([], [])


@pytest.mark.parametrize(
    ("make", "event", "more", "what"),
    [
        (rotated, (LIST,), {"digests": ["a"]}, "missing"),
        (rotated, (LIST,), {"digests": ["a", "b", "c"]}, "listed after its end by unchanged"),
        (rotated, (LIST,), {"digests": ["a", "c", "c"]}, "twice"),
        (rotated, (LIST,), {"digests": ["a", "c", "x"]}, "no client stored it"),
        (rotated, (LOAD, "a"), MISSING, "nothing ended it"),
        (revoked, (LIST,), {"digests": []}, "missing"),
        (revoked, (LIST,), {"digests": ["a", "c"]}, "listed after its end by revoke_all"),
        (revoked, (LOAD, "b"), {"marked": True}, "alive after its revocation"),
        (revoked, (LOAD, "c"), {}, "alive after its revocation"),
        (revoked, (UNCHANGED, "c"), {}, "alive after its revocation"),
        (revoked, (LOAD, "a"), MISSING, "nothing ended it"),
    ],
)
def test_seeded_anomaly_is_wrong(
    make: Callable[..., History], event: tuple[str, ...], more: dict[str, Any], what: str
) -> None:
    """An event that the rules exclude follows a right history."""
    wrong = make().add(*event, **more).judge(*ENDS[make]).wrong

    assert any(what in each for each in wrong), wrong


def test_sessions_at_the_end_are_judged() -> None:
    """A revoked session is stored, or a session that was kept is not in the index."""
    assert any("after its revocation" in each for each in revoked().judge("a", "c").wrong)
    final = {"a": Found("", 0, indexed=False)}
    assert any("not in the index" in each for each in check(revoked(), final).wrong)


def test_deleted_session_is_not_listed() -> None:
    """A delete during the list, or a delete in doubt, allows both results."""
    gone = rotated().add(DELETE, "a", existed=True, principal="")
    assert gone.listing("c").judge("c").wrong == []
    assert gone.listing("a", "c").judge("c").wrong
    gone[-1].start = 9.5
    assert gone.judge("c").wrong == []

    doubted = rotated().add(DELETE, "a", principal="", **IN_DOUBT)
    assert doubted.listing("c").judge("c").wrong == []
    assert doubted.listing("a", "c").judge("c", "b").wrong == []


@pytest.mark.parametrize("late", [True, False])
def test_survivor_was_alive_all_the_time(*, late: bool) -> None:
    """A revocation in doubt explains a missing session, unless the session is seen later."""
    history = rotated().add(REVOKE_ALL, **IN_DOUBT).listing("c")
    if late:
        history.add(LOAD, "a")

    assert bool(history.judge("c").wrong) is late


def test_undone_mark_ends_nothing() -> None:
    """A failed rotation restores the old session, which then is listed again."""
    history = rotated().listing("a", "c").add(UNCHANGED, "b").add(DELETE, "c", existed=True)

    assert history.listing("a", "b").judge("a", "b").wrong == []


@pytest.mark.parametrize("overlaps", [True, False])
def test_rotation_does_not_escape_a_revocation(*, overlaps: bool) -> None:
    """A new session that a rotation in flight makes is not alive after the revocation."""
    history = History().add(ABSENT, "a").add(REVOKE_ALL).add(ABSENT, "b", origin="a")
    history.add(UNCHANGED, "a", marked=True).add(LOAD, "b")
    if overlaps:
        history[1].end = 9.5  # the load begins before its end

    assert any("alive" in each for each in history.judge().wrong) is not overlaps


@pytest.mark.parametrize(("begin", "excused"), [(1.0, True), (5.0, False)])
def test_fault_may_lose_an_entry(begin: float, *, excused: bool) -> None:
    """It is counted as lost if it was written during the fault or shortly before."""
    history = History().add(ABSENT, "a").listing().add(LOAD, "a")
    verdict = history.judge("a", loses=(begin, begin + 0.5))

    assert (verdict.wrong == [], len(verdict.lost)) == (excused, int(excused))


@pytest.mark.parametrize(("begin", "excused"), [(5.5, True), (9.0, False)])
def test_fault_may_restore_a_session(begin: float, *, excused: bool) -> None:
    """Nothing is wrong if the delete of a session is lost, and a list has shown the delete."""
    history = History().add(ABSENT, "a").add(REVOKE_ALL, **IN_DOUBT).listing().add(LOAD, "a")

    assert (history.judge("a", loses=(begin, begin + 0.4)).wrong == []) is excused


def test_scan_finds_ids() -> None:
    """An id is found inside of a longer text."""
    one, other = (f"{number}" * 40 for number in (1, 2))

    assert exposed_ids({"", one, other}, f"0{one}0".encode()) == {one}


@pytest.mark.parametrize(
    ("client", "staleness", "right"), [(CLIENTS, 7.5, True), (CLIENTS, 6.5, False), (0, 7.5, False)]
)
def test_revoked_session_leaves_caches(client: int, staleness: float, *, right: bool) -> None:
    """A cache of another process may show it for `max_staleness`."""
    history = revoked().add(LOAD, "c", client=client, staleness=staleness)

    assert bool(history.judge("a").wrong) is not right
