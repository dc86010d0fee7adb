"""A model of a storage, and random histories in which every storage must answer as the model.

Hypothesis generates the histories: conditional writes, loads, deletes, sweeps and the passing of
time, over a few ids, with and without deadlines. After each step the test compares the results, the
errors and the counts.
"""

import asyncio
from collections.abc import Awaitable
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
from tests.contract import broken_writes as broken
from tests.support.servers import Server
from tests.support.storages import Backend, ReferenceStorage

# Times are multiples of one unit, so histories often meet the exact end of a TTL or a deadline. A
# unit is long, because a server's clock runs on and must not expire a session of the model.
UNIT = 1000.0
TTL = 3

# Few ids and short times, so that a history often meets one session again near its end.
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
    """The behaviour of every storage, over a dictionary."""

    def __init__(self) -> None:
        self.now = 0
        self.stored: dict[str, Stored] = {}

    def is_expired(self, stored: Stored) -> bool:
        """Return whether a session is idle or past its deadline."""
        is_past = stored.deadline is not None and stored.deadline <= self.now
        return stored.used_at + TTL <= self.now or is_past

    def find(self, id: str) -> Stored | None:
        """Return a live session."""
        stored = self.stored.get(id)
        return None if stored is None or self.is_expired(stored) else stored

    def verdict(self, session: Session[int], when: When) -> type[SessionError] | None:
        """Return the class of the error that storing a session raises, or None."""
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
        """Keep a copy, used now, unless it is past its deadline."""
        self.stored.pop(session.id, None)
        if deadline is None or deadline > self.now:
            self.stored[session.id] = Stored(msgspec.structs.replace(session), self.now, deadline)

    def load(self, id: str) -> Session[int] | None:
        """Return a live session, used now."""
        stored = self.find(id)
        if stored is None:
            return None
        stored.used_at = self.now
        return stored.session

    def delete(self, id: str) -> bool:
        """Remove a session, and return whether it was live."""
        existed = self.find(id) is not None
        self.stored.pop(id, None)
        return existed

    def sweep(self, before: int | None) -> int:
        """Remove the sessions that a sweep removes, and return how many."""
        swept = [
            id
            for id, stored in self.stored.items()
            if (self.is_expired(stored) if before is None else stored.used_at < before)
        ]
        for id in swept:
            del self.stored[id]
        return len(swept)


ids = st.sampled_from(IDS)
# Each step may wait. With a rule for it, Hypothesis would leave waiting out of some histories.
waits = st.sampled_from((0, 0, 0, 1, 1, 2))


class StorageMachine(RuleBasedStateMachine):
    """A storage beside the model. Subclasses make the storage and define its sweep."""

    # Copies in the hands of callers, most of them stale.
    sessions = Bundle[Session[int]]("sessions")

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
        """Make an empty storage."""
        raise NotImplementedError

    def age(self, seconds: float) -> None:
        """Let time pass for a backend with its own clock."""

    def teardown(self) -> None:
        """Close the storage and the event loop."""
        with self.runner:
            self.outcome(self.storage.aclose())

    def outcome(self, verb: Awaitable[Any]) -> Any:
        """Return the result of a verb, or the class of the error that it raises."""

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
        """Convert a time of the model to a date."""
        return self.start + timedelta(seconds=unit * UNIT)

    @initialize(target=sessions)
    def create(self) -> MultipleResults[Session[int]]:
        """Create new sessions, without storing them."""
        return multiple(*(Session[int](id=id) for id in IDS))

    @rule(wait=waits, session=sessions, when=st.sampled_from(WHENS), left=st.sampled_from(LEFT))
    def store(self, wait: int, session: Session[int], when: When, left: int | None) -> None:
        """Store a copy, with a deadline so many units from now, or without one."""
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
        """Load a session, and keep the copy."""
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
        """Load a session twice, with a change of the first copy in between."""
        copy = self.load(wait, id)
        if isinstance(copy, Session):
            copy.data, copy.expires_at = -1, None
            self.load(0, id)

    @rule(wait=waits, id=ids, when=st.sampled_from(WHENS), left=st.sampled_from(LEFT))
    def update(self, wait: int, id: str, when: When, left: int | None) -> None:
        """Load a session, or create one, and store it, as an application does."""
        copy = self.load(wait, id)
        self.store(0, copy if isinstance(copy, Session) else Session(id=id), when, left)

    @rule(wait=waits, id=ids)
    def delete(self, wait: int, id: str) -> None:
        """Delete a session."""
        self.wait(wait)
        assert self.outcome(self.storage.delete(id)) is self.model.delete(id)


class LocalMachine(StorageMachine):
    """`LocalStorage`: expired sessions stay until a sweep removes and counts them."""

    def make(self) -> Storage[int]:
        """Make a storage on the fake clock."""
        return LocalStorage(ttl=TTL * UNIT, clock=self.clock)

    @rule(wait=waits, ago=st.none() | st.integers(-1, TTL + 1))
    def sweep(self, wait: int, ago: int | None) -> None:
        """Remove the expired sessions, or those unused since so many units ago."""
        self.wait(wait)
        before = None if ago is None else self.model.now - ago
        moment = None if before is None else self.moment(before)

        assert self.outcome(self.storage.delete_expired(moment)) == self.model.sweep(before)


class RedisMachine(StorageMachine):
    """`RedisStorage`: the server removes expired sessions, so a sweep returns 0."""

    server: ClassVar[Server]

    def make(self) -> Storage[int]:
        """Make a storage on an empty server and the fake clock."""
        self.server.flush()
        return RedisStorage.from_url(self.server.url, ttl=TTL * UNIT, clock=self.clock)

    def age(self, seconds: float) -> None:
        """Let the server's keys age."""
        self.server.age(seconds)

    @rule(ago=st.none() | st.integers(-1, TTL + 1))
    def sweep(self, ago: int | None) -> None:
        """Sweep without an effect."""
        before = None if ago is None else self.moment(self.model.now - ago)
        assert self.outcome(self.storage.delete_expired(before)) == 0


class BrokenMachine(LocalMachine):
    """A broken storage. The histories must find its mistake."""

    kind: ClassVar[type[ReferenceStorage]]

    def make(self) -> Storage[int]:
        """Make a storage on the fake clock."""
        return self.kind(Backend(), TTL * UNIT, JsonCodec(), self.clock)


def check(machine: type[StorageMachine], examples: int = 60, **options: Any) -> None:
    """Run histories of a machine: the same ones each time, so that a failure can be repeated."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
            **options,
        ),
    )


@pytest.mark.slow
def test_local_storage_does_as_the_model() -> None:
    """Each result, error and count is that of the model, sweeps included."""
    check(LocalMachine)


@pytest.mark.slow
def test_redis_storage_does_as_the_model(valkey: Server) -> None:
    """Each result and error on a real server is that of the model."""

    class Machine(RedisMachine):
        server = valkey

    check(Machine, 30)


@pytest.mark.parametrize(
    "broken_storage",
    [
        broken.AbsentSeesExpiredSessions,
        broken.DeleteFindsExpiredSessions,
        broken.ExpiresTooLate,
        broken.LoadDoesNotRenew,
        broken.PresentComparesRevisions,
        broken.RefusedWritesRenew,
        broken.StampsBeforeTheCheck,
        broken.StorePastTheDeadlineDoesNothing,
        broken.SweepOnlyCounts,
        broken.UnchangedIgnoresTheRevision,
    ],
)
def test_histories_find_mistakes(broken_storage: type[ReferenceStorage]) -> None:
    """The histories are long and varied enough to find the mistake of each of these storages."""

    class Machine(BrokenMachine):
        kind = broken_storage

    with pytest.raises(AssertionError):
        check(Machine, phases=[Phase.generate])
