"""The decision, over every combination of its signals."""

import dataclasses
import itertools

from aiosessions.asgi._decision import Outcome, Signals, decide

NAMES = [field.name for field in dataclasses.fields(Signals)]
ALL = [
    Signals(**dict(zip(NAMES, bits, strict=True)))
    for bits in itertools.product((False, True), repeat=len(NAMES))
]
# A status from 500 on is also one from 400 on.
POSSIBLE = [each for each in ALL if each.failed or not each.broken]
NO_WRITE = {Outcome.NOTHING, Outcome.ISSUE, Outcome.CLEAR}
NEW_ID = {Outcome.CREATE, Outcome.ROTATE, Outcome.REPLACE}


def without(signals: Signals, *names: str) -> Signals:
    """The same signals, except for some."""
    return dataclasses.replace(signals, **dict.fromkeys(names, False))


def test_every_combination_has_an_outcome() -> None:
    """The function is total, and each outcome occurs."""
    assert {decide(each) for each in ALL} == set(Outcome)


def test_rules_hold_for_every_combination() -> None:
    """The rules of docs/web.md hold, without exceptions."""
    for signals in POSSIBLE:
        check(signals, decide(signals))


def check(signals: Signals, outcome: Outcome) -> None:
    """Check the rules."""
    rights = signals.new_rights or signals.lost_rights
    if signals.failed:  # no new rights
        assert outcome is decide(without(signals, "new_rights"))
    if signals.broken:  # no data
        assert outcome is decide(without(signals, "new_rights", "changed"))
        assert outcome not in {Outcome.CREATE, Outcome.SAVE, Outcome.REPLACE}
    if signals.deleted:
        assert outcome in {Outcome.DELETE, Outcome.REPLACE}
    elif signals.loaded:
        assert outcome not in {Outcome.CREATE, Outcome.CLEAR}
        assert (outcome is Outcome.ROTATE) >= signals.lost_rights
    else:
        assert outcome in {Outcome.CREATE, Outcome.CLEAR, Outcome.NOTHING}
    if not (rights or signals.changed or signals.deleted):
        assert outcome in NO_WRITE
    if not (signals.failed or signals.deleted):
        assert (outcome in NO_WRITE) is not (
            signals.changed or signals.new_rights or (signals.loaded and signals.lost_rights)
        )
    if rights and signals.loaded and not signals.failed:  # another principal means another id
        assert outcome in NEW_ID | {Outcome.DELETE}
    if not signals.due:
        assert outcome is not Outcome.ISSUE
