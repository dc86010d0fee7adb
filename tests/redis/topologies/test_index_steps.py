"""The index of a principal between two commands: crashes, and calls of two replicas at once.

On one server, every interleaving of the commands runs. A cluster has more, and random ones run.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import pytest

from aiosessions import (
    Session,
    SessionError,
    SessionManager,
    When,
    new_session_id,
    session_digest,
)
from aiosessions.testing import FakeClock
from tests.support.clients import Storage
from tests.support.servers import Server
from tests.support.steps import (
    ends_after,
    every_order,
    interleave,
    is_live,
    listed,
    random_orders,
    replicas_of,
)
from tests.support.topologies import Cluster

pytestmark = pytest.mark.slow

TTL = 60.0
RUNS = 40  # of each pair of calls in a cluster
Call = Coroutine[Any, Any, Any]


@dataclass
class Case:
    """Two replicas and an observer, and the sessions of one principal.

    Attributes:
        one: The storage of the first replica.
        other: The storage of the second replica.
        observer: A storage that runs its calls without interruption.
        clock: The clock of the storages.
        backend: The server or the cluster.
        principal: The owner.
        ids: The ids of all sessions that the case may store.
    """

    one: Storage
    other: Storage
    observer: Storage
    clock: FakeClock
    backend: Server | Cluster
    principal: str = field(default_factory=new_session_id)
    ids: list[str] = field(default_factory=list)

    def renewed(self) -> "Case":
        """The same storages with another principal, and without sessions."""
        return Case(self.one, self.other, self.observer, self.clock, self.backend)

    def new(self, **fields: Any) -> Session[Any]:
        """A session of the principal that is not stored."""
        self.ids.append(new_session_id())
        return Session(id=self.ids[-1], principal=self.principal, **fields)

    async def stored(self, number: int = 1) -> list[Session[Any]]:
        """Store new sessions."""
        sessions = [self.new() for _ in range(number)]
        for session in sessions:
            await self.observer.store(session)
        return sessions

    async def dead(self) -> Session[Any]:
        """A session that is gone, with an entry that is not new."""
        (session,) = await self.stored()
        await self.observer.delete(session.id)
        self.age(0.4 * TTL)
        return session

    def age(self, seconds: float) -> None:
        """Let time pass for the storages and the servers."""
        self.clock.advance(seconds)
        self.backend.age(seconds)

    async def live(self) -> set[str]:
        """The digests of the sessions that are alive."""
        each_is_live = [await is_live(self.observer, id, self.principal) for id in self.ids]
        return set(map(session_digest, compress(self.ids, each_is_live)))

    async def check(self) -> None:
        """Check that the list is complete, and that signing out leaves nothing alive."""
        assert await listed(self.observer, self.principal) == await self.live()
        await self.observer.revoke_all(self.principal)
        assert await self.live() == set()
        assert await listed(self.observer, self.principal) == set()


@pytest.fixture(params=["one-server", "cluster"])
def backend(request: pytest.FixtureRequest) -> Server | Cluster:
    """An empty server or cluster."""
    name = {"one-server": "valkey", "cluster": "shared_cluster"}[request.param]
    backend: Server | Cluster = request.getfixturevalue(name)
    backend.flush()
    return backend


@pytest.fixture
async def case(backend: Server | Cluster) -> AsyncIterator[Case]:
    """Replicas with one clock."""
    clock = FakeClock()
    async with replicas_of(backend, 3, ttl=TTL, timeout=10.0, clock=clock) as storages:
        one, other, observer = storages
        yield Case(one, other, observer, clock, backend)


# Calls that consist of several commands. Each prepares the sessions, and returns the call.


def manager(case: Case, storage: Storage, **settings: Any) -> SessionManager[Any]:
    """The manager of a replica."""
    return SessionManager(storage, clock=case.clock, **settings)


async def create(case: Case) -> Call:
    """Create a session beside dead ones."""
    await case.dead()
    return case.one.store(case.new(), when=When.ABSENT)


async def create_over_limit(case: Case) -> Call:
    """Create a session where the principal has the most that it may have."""
    await case.stored(3)
    case.ids.append(new_session_id())
    limited = manager(case, case.one, max_per_principal=2)
    return limited.create(id=case.ids[-1], principal=case.principal)


async def move_here(case: Case) -> Call:
    """Give the session of another principal to this one."""
    session = case.new()
    other = Session[Any](id=session.id, principal="another")
    await case.observer.store(other)
    session.revision = other.revision
    return case.one.store(session, when=When.UNCHANGED)


async def rotate(case: Case, grace: float = 10.0) -> Call:
    """Rotate a session."""
    (session,) = await case.stored()
    case.ids.append(new_session_id())
    return manager(case, case.one, grace=grace).rotate(session, new_id=case.ids[-1])


async def rotate_without_grace(case: Case) -> Call:
    """Rotate a session so that its old id is gone at the end."""
    return await rotate(case, grace=0)


async def revoke_all(case: Case) -> Call:
    """Sign out everywhere."""
    await case.dead()
    await case.stored(3)
    return case.one.revoke_all(case.principal)


async def trim(case: Case) -> Call:
    """Delete all sessions but one."""
    (session, *_) = await case.stored(3)
    return case.one.trim(case.principal, 1, keep=session.id)


async def renew(case: Case) -> Call:
    """Load a session, and extend its lease."""
    (session,) = await case.stored()
    case.age(0.7 * TTL)
    await case.observer.load(session.id)
    case.age(0.7 * TTL)
    return case.one.load(session.id)


async def list_all(case: Case) -> Call:
    """List live sessions and dead ones."""
    await case.stored(2)
    await case.dead()
    return case.one.list(case.principal)


@pytest.mark.parametrize(
    "prepare",
    [
        create,
        create_over_limit,
        move_here,
        rotate,
        rotate_without_grace,
        revoke_all,
        trim,
        renew,
        list_all,
    ],
)
async def test_crash_leaves_lists_complete(
    case: Case, prepare: Callable[[Case], Awaitable[Call]]
) -> None:
    """A process may end after any command. Each live session is listed and can be revoked."""
    number, ended = 0, True
    while ended:
        run = case.renewed()
        call = await prepare(run)
        ended = await ends_after(run.one, number, call)
        await run.check()
        number += 1
    assert number > 1


# Two calls at once. Each case prepares the sessions, and returns the calls.

Pair = Callable[[Case], Awaitable[tuple[Call, Call]]]


async def rotate_and_revoke(case: Case) -> tuple[Call, Call]:
    """Rotate a session, and sign out everywhere."""
    return await rotate(case), case.other.revoke_all(case.principal)


async def rotate_without_grace_and_revoke(case: Case) -> tuple[Call, Call]:
    """Rotate a session so that its old id is gone at the end, and sign out everywhere."""
    return await rotate(case, grace=0), case.other.revoke_all(case.principal)


async def mutate_and_revoke(case: Case) -> tuple[Call, Call]:
    """Load and save a session, and sign out everywhere."""
    (session,) = await case.stored()
    return manager(case, case.one).mutate(session, str), case.other.revoke_all(case.principal)


async def renew_and_revoke(case: Case) -> tuple[Call, Call]:
    """Extend a lease, and sign out everywhere."""
    return await renew(case), case.other.revoke_all(case.principal)


async def create_and_revoke(case: Case) -> tuple[Call, Call]:
    """Create a session, and sign out everywhere."""
    await case.stored()
    call = case.one.store(case.new(), when=When.ABSENT)
    return call, case.other.revoke_all(case.principal)


async def create_again_and_list(case: Case) -> tuple[Call, Call]:
    """Create a session under the id of a dead one, and list."""
    session = await case.dead()
    return case.one.store(session, when=When.ABSENT), case.other.list(case.principal)


async def create_again_and_create(case: Case) -> tuple[Call, Call]:
    """Create a session under the id of a dead one, and another session."""
    session = await case.dead()
    return case.one.store(session, when=When.ABSENT), case.other.store(case.new())


async def delete_and_create(case: Case) -> tuple[Call, Call]:
    """Delete a session, and create one under its id."""
    (session,) = await case.stored()
    again = Session[Any](id=session.id, principal=case.principal)
    return case.one.delete(session.id), case.other.store(again, when=When.ABSENT)


async def move_back_and_create(case: Case) -> tuple[Call, Call]:
    """Give a session back to the principal, and create another one."""
    (session,) = await case.stored()
    other = Session[Any](id=session.id, principal="another")
    await case.observer.store(other)
    case.age(0.4 * TTL)
    session.revision = other.revision
    return case.one.store(session, when=When.UNCHANGED), case.other.store(case.new())


async def rotate_twice(case: Case) -> tuple[Call, Call]:
    """Rotate a session on two replicas."""
    (session,) = await case.stored()
    case.ids += new_session_id(), new_session_id()
    one, other = (manager(case, each) for each in (case.one, case.other))
    return one.rotate(session, new_id=case.ids[-1]), other.rotate(session, new_id=case.ids[-2])


async def run_all_orders(case: Case, prepare: Pair, *, leaves_none: bool = False) -> None:
    """Run the interleavings of two calls, and check the index after each."""
    on_one_server = isinstance(case.backend, Server)
    for choose in every_order() if on_one_server else random_orders(RUNS):
        run = case.renewed()
        calls = await prepare(run)
        results = await interleave(choose, *zip((run.one, run.other), calls, strict=True))
        errors = [each for each in results if isinstance(each, BaseException)]
        assert all(isinstance(each, SessionError) for each in errors)
        if leaves_none:
            assert await run.live() == set()
        await run.check()


@pytest.mark.parametrize(
    "prepare",
    [rotate_and_revoke, rotate_without_grace_and_revoke, mutate_and_revoke, renew_and_revoke],
)
async def test_no_session_escapes_revocation(case: Case, prepare: Pair) -> None:
    """Neither a session that existed before `revoke_all` nor one that a rotation made of it."""
    await run_all_orders(case, prepare, leaves_none=True)


@pytest.mark.parametrize(
    "prepare",
    [
        create_and_revoke,
        create_again_and_list,
        create_again_and_create,
        delete_and_create,
        move_back_and_create,
        rotate_twice,
    ],
)
async def test_calls_at_once_leave_lists_complete(case: Case, prepare: Pair) -> None:
    """Each session that is alive after the calls is listed, and can be revoked."""
    await run_all_orders(case, prepare)
