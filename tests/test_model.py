"""A small model of what storages do, and random histories in which they must do the same.

Hypothesis writes the histories: writes under every condition, loads, deletes, sweeps and the
passing of time, over a few ids, with and without deadlines. After each step the storage has to
answer as the model does, error for error and count for count.
"""

import asyncio
from collections.abc import Awaitable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)

from aiosessions import (
    JsonCodec,
    LocalStorage,
    RedisStorage,
    Session,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionNotFound,
    Storage,
    When,
)
from aiosessions.testing import FakeClock
from tests import broken_storages as broken
from tests.honest_storage import Backend, HonestStorage
from tests.servers import Server

# Multiples of one unit, so that histories often meet the very end of a TTL or a deadline. It is
# long, since a server's own clock runs on: that must not end what the model takes to be alive.
UNIT = 1000.0
TTL = 3

# Few, and chosen so that sessions are often met alive, more than once, near an end of theirs.
IDS = ("a", "a", "a", "A")
LEFT = (None, None, None, None, 0, 1, 2, 4)
WHENS = (*When, When.UNCHANGED)


@dataclass
class Stored:
    """A session in the model. Times are in units."""

    session: Session[int]
    used_at: int
    deadline: int | None


class Model:
    """What every storage does, in the plainest words."""

    def __init__(self) -> None:
        self.now = 0
        self.stored: dict[str, Stored] = {}

    def is_dead(self, stored: Stored) -> bool:
        """Idle for its TTL, or at its deadline."""
        is_past = stored.deadline is not None and stored.deadline <= self.now
        return stored.used_at + TTL <= self.now or is_past

    def find(self, id: str) -> Stored | None:
        """What can be loaded."""
        stored = self.stored.get(id)
        return None if stored is None or self.is_dead(stored) else stored

    def verdict(self, session: Session[int], when: When) -> type[SessionError] | None:
        """What storing a session raises."""
        stored = self.find(session.id)
        if when is When.ALWAYS:
            return None
        if when is When.ABSENT:
            return SessionExists if stored else None
        if stored is None:
            return SessionNotFound
        is_changed = when is When.UNCHANGED and stored.session.revision != session.revision
        return SessionConflict if is_changed else None

    def store(self, session: Session[int], deadline: int | None) -> None:
        """Keep a copy, used now."""
        self.stored[session.id] = Stored(msgspec.structs.replace(session), self.now, deadline)

    def load(self, id: str) -> Session[int] | None:
        """What loading gives, and that it was used now."""
        stored = self.find(id)
        if stored is None:
            return None
        stored.used_at = self.now
        return stored.session

    def delete(self, id: str) -> bool:
        """Whether there was one; gone it is either way."""
        existed = self.find(id) is not None
        self.stored.pop(id, None)
        return existed

    def sweep(self, before: int | None) -> int:
        """How many a sweep removes."""
        swept = [
            id
            for id, stored in self.stored.items()
            if (self.is_dead(stored) if before is None else stored.used_at < before)
        ]
        for id in swept:
            del self.stored[id]
        return len(swept)


ids = st.sampled_from(IDS)
# A part of every step, so that no history goes without: Hypothesis leaves out whole rules.
waits = st.sampled_from((0, 0, 0, 1, 1, 2))


class StorageMachine(RuleBasedStateMachine):
    """Any storage beside the model. Subclasses make it, and say how its sweeps count."""

    sessions = Bundle[Session[int]]("sessions")  # copies that callers hold, most of them outdated

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.start = self.clock.now()
        self.model = Model()
        self.writes = 0
        self.revisions = {""}
        self.runner = asyncio.Runner()
        self.storage = self.make()

    def make(self) -> Storage[int]:
        """An empty storage."""
        raise NotImplementedError

    def age(self, seconds: float) -> None:
        """Let time pass for a backend that has a clock of its own."""

    def teardown(self) -> None:
        """Close everything, however the history ended."""
        with self.runner:
            self.outcome(self.storage.aclose())

    def outcome(self, verb: Awaitable[Any]) -> Any:
        """What a verb returns, or the class of the error that it raises."""

        async def attempt() -> Any:
            try:
                return await verb
            except SessionError as error:
                return type(error)

        return self.runner.run(attempt())

    def wait(self, units: int) -> None:
        """Let time pass."""
        self.model.now += units
        self.clock.advance(units * UNIT)
        if units:
            self.age(units * UNIT)

    def moment(self, unit: int) -> datetime:
        """The date of a time of the model."""
        return self.start + timedelta(seconds=unit * UNIT)

    @initialize(target=sessions)
    def create(self) -> MultipleResults[Session[int]]:
        """Callers make new sessions, which are not stored yet."""
        return multiple(*(Session[int](id=id) for id in IDS))

    @rule(wait=waits, session=sessions, when=st.sampled_from(WHENS), left=st.sampled_from(LEFT))
    def store(self, wait: int, session: Session[int], when: When, left: int | None) -> None:
        """Write a caller's copy, with or without a deadline so many units from now."""
        self.wait(wait)
        deadline = None if left is None else self.model.now + left
        session.data = self.writes = self.writes + 1
        session.expires_at = None if deadline is None else self.moment(deadline)
        expected = self.model.verdict(session, when)
        before = msgspec.structs.asdict(session)

        assert self.outcome(self.storage.store(session, when=when)) is expected

        after = msgspec.structs.asdict(session)
        if expected is None:
            assert session.revision not in self.revisions
            self.revisions.add(session.revision)
            self.model.store(session, deadline)
            before["revision"] = session.revision
        assert after == before

    @rule(target=sessions, wait=waits, id=ids)
    def load(self, wait: int, id: str) -> Session[int] | MultipleResults[Session[int]]:
        """Load a session, and keep the copy if there is one."""
        self.wait(wait)
        expected = self.model.load(id)

        loaded = self.outcome(self.storage.load(id))

        if expected is None:
            assert loaded is SessionNotFound
            return multiple()
        assert isinstance(loaded, Session)
        assert loaded == expected
        return loaded

    @rule(wait=waits, id=ids)
    def read(self, wait: int, id: str) -> None:
        """Load a session twice: what one copy goes through is nothing to the other."""
        copy = self.load(wait, id)
        if isinstance(copy, Session):
            copy.data = copy.expires_at = None
            self.load(0, id)

    @rule(wait=waits, id=ids, when=st.sampled_from(WHENS), left=st.sampled_from(LEFT))
    def update(self, wait: int, id: str, when: When, left: int | None) -> None:
        """Load a session, or make one, and write it: what applications do all day."""
        copy = self.load(wait, id)
        self.store(0, copy if isinstance(copy, Session) else Session(id=id), when, left)

    @rule(wait=waits, id=ids)
    def delete(self, wait: int, id: str) -> None:
        """Delete a session, or none."""
        self.wait(wait)
        assert self.outcome(self.storage.delete(id)) is self.model.delete(id)


class LocalMachine(StorageMachine):
    """`LocalStorage`: whatever is dead is there until it is swept up, and counted then."""

    def make(self) -> Storage[int]:
        """A storage on the fake clock."""
        return LocalStorage(ttl=TTL * UNIT, clock=self.clock)

    @rule(wait=waits, ago=st.none() | st.integers(-1, TTL + 1))
    def sweep(self, wait: int, ago: int | None) -> None:
        """Remove the dead, or what was not used since so many units ago."""
        self.wait(wait)
        before = None if ago is None else self.model.now - ago
        moment = None if before is None else self.moment(before)

        assert self.outcome(self.storage.delete_expired(moment)) == self.model.sweep(before)


class RedisMachine(StorageMachine):
    """`RedisStorage`: the server removes the dead, so a sweep does nothing and counts nothing."""

    server: ClassVar[Server]

    def make(self) -> Storage[int]:
        """A storage of an empty server, on the fake clock."""
        self.server.flush()
        return RedisStorage.from_url(self.server.url, ttl=TTL * UNIT, clock=self.clock)

    def age(self, seconds: float) -> None:
        """Let the server's keys age."""
        self.server.age(seconds)

    @rule(ago=st.none() | st.integers(-1, TTL + 1))
    def sweep(self, ago: int | None) -> None:
        """Remove nothing."""
        before = None if ago is None else self.moment(self.model.now - ago)
        assert self.outcome(self.storage.delete_expired(before)) == 0


class BrokenMachine(LocalMachine):
    """A storage that is broken on purpose, for the histories to find that out."""

    kind: ClassVar[type[HonestStorage]]

    def make(self) -> Storage[int]:
        """Such a storage, on the fake clock."""
        return self.kind(Backend(), TTL * UNIT, JsonCodec(), self.clock)


def check(
    machine: type[StorageMachine], examples: int, phases: Collection[Phase] = tuple(Phase)
) -> None:
    """Run histories of a machine: the same ones every time, so that a failure can be met again."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            derandomize=True,
            database=None,
            deadline=None,
            phases=phases,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_local_storage_does_as_the_model_does() -> None:
    """In process, whatever the history, and every sweep counts right."""
    check(LocalMachine, 200)


def test_redis_storage_does_as_the_model_does(valkey: Server) -> None:
    """On a real server, whatever the history."""

    class Machine(RedisMachine):
        server = valkey

    check(Machine, 100)


@pytest.mark.parametrize(
    "broken_storage",
    [
        broken.AbsentCollidesWithTheDead,
        broken.AbsentOverwrites,
        broken.DeleteFindsTheDead,
        broken.EndsTooLate,
        broken.EndsWhenSwept,
        broken.HandsOutOneObject,
        broken.LoadDoesNotRenew,
        broken.LoadRenewsPastTheDeadline,
        broken.PresentComparesRevisions,
        broken.PresentResurrects,
        broken.RefusedWritesRenew,
        broken.StampsBeforeItChecks,
        broken.StoreKeepsTheAge,
        broken.SweepMissesDeadlines,
        broken.SweepOnlyCounts,
        broken.UnchangedIgnoresTheRevision,
    ],
)
def test_the_histories_find_what_is_broken(broken_storage: type[HonestStorage]) -> None:
    """They are long and varied enough to meet each of these faults."""

    class Machine(BrokenMachine):
        kind = broken_storage

    with pytest.raises(AssertionError):
        check(Machine, 500, phases=[Phase.generate])


def test_the_histories_find_no_fault_where_there_is_none() -> None:
    """The storage that those are made from does as the model does."""

    class Machine(BrokenMachine):
        kind = HonestStorage

    check(Machine, 50)
