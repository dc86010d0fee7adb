"""`LocalStorage` against a model of it: any order of verbs and waiting gives the same answers."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosessions import (
    LocalStorage,
    Session,
    SessionConflict,
    SessionExists,
    SessionNotFound,
    When,
)
from aiosessions.testing import FakeClock
from tests.backends import done

TTL = 10  # milliseconds
IDS = "abcd"


@dataclass
class Kept:
    """What the model knows of a session that was stored."""

    value: int
    revision: str
    used: int  # when, in milliseconds
    deadline: int | None


class Model:
    """A storage with room for `room` sessions, as a plain list of what happened last to each."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.now = 0
        self.kept: dict[str, Kept] = {}  # in the order of use
        self.exact = True  # the number of dead ones is known: none was evicted

    def alive(self, id: str) -> Kept | None:
        """The session, if it can be loaded."""
        kept = self.kept.get(id)
        if kept is None or self.now >= kept.used + TTL:
            return None
        return None if kept.deadline is not None and self.now >= kept.deadline else kept

    def use(self, id: str, kept: Kept) -> None:
        """Note that a session was used now."""
        if id not in self.kept and len(self.kept) >= self.room:
            dead = [other for other in self.kept if self.alive(other) is None]
            self.exact = self.exact and not dead
            del self.kept[dead[0] if dead else next(iter(self.kept))]
        self.kept.pop(id, None)
        self.kept[id] = kept

    def sweep(self) -> int:
        """Remove the dead."""
        dead = [id for id in self.kept if self.alive(id) is None]
        for id in dead:
            del self.kept[id]
        return len(dead)

    def sweep_before(self, moment: int) -> int:
        """Remove what was last used before the moment."""
        old = [id for id, kept in self.kept.items() if kept.used < moment]
        for id in old:
            del self.kept[id]
        return len(old)


@dataclass
class Step:
    """What to do: one of `KINDS`, and with what."""

    kind: int
    id: str
    when: When
    lasting: int | None
    fresh: bool
    wait: int


# What is seldom drawn lets sessions get old, and a storage full, before it is.
KINDS = ["wait"] * 3 + ["load"] * 3 + ["store"] * 8 + ["delete", "sweep", "sweep before"]
steps = st.builds(
    Step,
    kind=st.integers(0, len(KINDS) - 1),
    id=st.sampled_from(IDS),
    when=st.sampled_from(When),
    lasting=st.none() | st.integers(-2, TTL // 2),
    fresh=st.booleans(),
    wait=st.integers(0, 3) | st.integers(0, TTL),
)


class Pair:
    """A storage and the model of it, on one clock; `take` has both take a step."""

    def __init__(self, room: int) -> None:
        self.clock = FakeClock()
        self.start = self.clock.now()
        self.model = Model(room)
        self.storage = LocalStorage[Any](ttl=TTL / 1_000, max_sessions=room, clock=self.clock)

    def moment(self, milliseconds: int) -> datetime:
        """The model's time as a date."""
        return self.start + timedelta(milliseconds=milliseconds)

    def take(self, step: Step, value: int) -> None:
        """Check that both give the same answer."""
        model, storage = self.model, self.storage
        kind = KINDS[step.kind]
        if kind == "wait":
            self.clock.advance(step.wait / 1_000)
            model.now += step.wait
        elif kind == "store":
            self.store(step, value)
        elif kind == "load":
            self.load(step.id)
        elif kind == "delete":
            assert done(storage.delete(step.id)) is (model.alive(step.id) is not None)
            model.kept.pop(step.id, None)
        elif kind == "sweep":
            self.removed(model.sweep(), done(storage.delete_expired()))
        else:
            before = model.now - step.wait
            removed = done(storage.delete_expired(self.moment(before)))
            self.removed(model.sweep_before(before), removed)

    def removed(self, expected: int, removed: int) -> None:
        """Compare what sweeps have removed."""
        assert removed == expected or not self.model.exact

    def load(self, id: str) -> None:
        """Load from both."""
        kept = self.model.alive(id)
        if kept is None:
            with pytest.raises(SessionNotFound):
                done(self.storage.load(id))
            return
        session = done(self.storage.load(id))
        assert (session.data, session.revision) == (kept.value, kept.revision)
        kept.used = self.model.now
        self.model.use(id, kept)

    def store(self, step: Step, value: int) -> None:
        """Store in both."""
        model = self.model
        kept = model.alive(step.id)
        deadline = None if step.lasting is None else model.now + step.lasting
        session = Session[Any](
            id=step.id,
            data=value,
            expires_at=None if deadline is None else self.moment(deadline),
            revision=kept.revision if kept and step.fresh else "stale",
        )
        refusal = refused(step, exists=kept is not None)
        if refusal is not None:
            with pytest.raises(refusal):
                done(self.storage.store(session, when=step.when))
            return
        done(self.storage.store(session, when=step.when))
        model.use(step.id, Kept(value, session.revision, model.now, deadline))


def refused(step: Step, *, exists: bool) -> type[Exception] | None:
    """How a store is refused, if it is."""
    if step.when is When.ABSENT and exists:
        return SessionExists
    if step.when in (When.PRESENT, When.UNCHANGED) and not exists:
        return SessionNotFound
    if step.when is When.UNCHANGED and not step.fresh:
        return SessionConflict
    return None


@settings(deadline=None, max_examples=200)
@given(room=st.integers(1, len(IDS)), taken=st.lists(steps, min_size=30, max_size=60))
def test_it_does_what_the_model_does(room: int, taken: list[Step]) -> None:
    """In what it answers, what it keeps when there is no room, and when: to the millisecond."""
    pair = Pair(room)

    for number, step in enumerate(taken):
        pair.take(step, number)
    for id in IDS:
        pair.load(id)
