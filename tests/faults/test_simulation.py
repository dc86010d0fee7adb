"""The simulation passes with the library, and finds bugs in a copy of it."""

from typing import Final

import pytest

from tests.faults.schedules import draw
from tests.faults.simulation import find, main, run, shrink
from tests.faults.virtual import Library, Patch

# By name: the rule that each bug breaks, and the bug.
BUGS: Final[dict[str, tuple[str, Patch]]] = {
    "cancelled command leaves its place in flight": (
        "wrong reply",
        Patch(
            "_pipeline",
            "command.orphan = True\n            self.orphans += 1\n",
            "self.in_flight.remove(command)\n",
        ),
    ),
    "expired command stays in the queue": (
        "left",
        Patch("_pipeline", "else error)\n            self.discard(command)\n", "else error)\n"),
    ),
    "lost write is not in doubt": (
        "applied without doubt",
        Patch(
            "_pipeline",
            "command.in_doubt = True\n            if command.template.retryable",
            "command.in_doubt = False\n            if command.template.retryable",
        ),
    ),
    "expired write is not in doubt": (
        "applied without doubt",
        Patch(
            "_pipeline",
            "if written:\n                command.in_doubt = True",
            "if written:\n                command.in_doubt = False",
        ),
    ),
    "lost write is sent again": (
        "applied twice",
        Patch(
            "_pipeline", "if command.template.retryable and command.attempts", "if command.attempts"
        ),
    ),
    "later deadline delays the earlier one": (
        "late",
        Patch("_connection", "if command.deadline < self._wake_at", "if self._timer is None"),
    ),
    "queue waits after the buffer has room": (
        "idle",
        Patch(
            "_connection", "self._ready = not paused and not self._stalled", "self._ready = False"
        ),
    ),
    "outage gives commands no time": (
        "no cause",
        Patch("_outage", "return now - self._waiting_since < BRIDGE", "return False"),
    ),
    "commands after a stall are not watched": (
        "left",
        Patch("_connection", "if self.pipeline.in_flight:  # these", "if False:  # these"),
    ),
    "any reply passes for that of ASKING": (
        "wrong reply",
        Patch("_pipeline", ' and (reply == b"OK" or isinstance(reply, ErrorReply))', ""),
    ),
    "rejected socket stays open": (
        "leak",
        Patch("_connection", "channel.close()  # the stalled", "pass  # the stalled"),
    ),
}


def test_random_schedules_break_no_rule() -> None:
    """`nox -s faults` runs far more of them."""
    assert find(range(500), Library()) is None


@pytest.mark.parametrize(("rule", "bug"), BUGS.values(), ids=BUGS)
def test_bug_is_found_shrunk_and_replayed(rule: str, bug: Patch) -> None:
    """A schedule of a few steps breaks the rule, each time with the same events."""
    library = Library(bug)
    found = find(range(1000), library) or find(range(4000, 5000), library)
    assert found is not None

    short = shrink(found, library)
    assert len(short.steps) <= 8
    first, second = run(short, library), run(short, Library(bug))
    assert first.rule == rule
    assert (first.problems, first.server.trace) == (second.problems, second.server.trace)
    assert run(short, Library()).problems == []


def test_seed_gives_one_schedule() -> None:
    """So that the number of a seed is enough to repeat a failure."""
    assert draw(7) == draw(7) != draw(8)


def test_outdated_patch_is_refused() -> None:
    """A bug that no longer fits the source must not pass as one that is not found."""
    with pytest.raises(LookupError, match="no such text"):
        Library(Patch("_pipeline", "no such text", ""))


def test_command_prints_a_short_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    """The output of a failure begins with its seed, and ends with the broken rules."""
    assert main(["--schedules", "20"]) == 0
    assert "20 schedules passed" in capsys.readouterr().out

    _, bug = BUGS["lost write is sent again"]
    assert main(["--schedules", "1000"], Library(bug)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("seed ")
    assert lines[-1].startswith("applied twice")
