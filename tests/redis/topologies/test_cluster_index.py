"""The index of a principal in a cluster, where sessions and their index are on several servers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from aiosessions import Session, When, new_session_id
from aiosessions.testing import FakeClock
from tests.support.clients import SHORT, Storage, id_on, key_of
from tests.support.servers import Server
from tests.support.steps import Send, counted, index_key, intercepted, listed, replicas_of
from tests.support.topologies import Cluster, ask, mended

pytestmark = pytest.mark.slow

TTL = 60.0
TIMEOUT = 10.0
WINDOW = 2 * TIMEOUT


@pytest.fixture
def clock() -> FakeClock:
    """The clock of the storage."""
    return FakeClock()


@pytest.fixture
async def storage(nodes: Cluster, clock: FakeClock) -> AsyncIterator[Storage]:
    """A storage in the cluster."""
    async with replicas_of(nodes, 1, ttl=TTL, timeout=TIMEOUT, clock=clock) as (storage,):
        yield storage


def principal_on(nodes: Cluster, node: Server) -> str:
    """A principal with an index on this master."""
    while True:
        principal = new_session_id()
        if nodes.owner(ask(node, "CLUSTER", "KEYSLOT", index_key(principal))) is node:
            return principal


def entries(nodes: Cluster, principal: str) -> set[str]:
    """The digests in the index of a principal."""
    key = index_key(principal)
    node = nodes.owner(ask(nodes.nodes[0], "CLUSTER", "KEYSLOT", key))
    return set(ask(node, "ZRANGE", key, 0, -1))


def new(principal: str = "alice", id: str | None = None) -> Session[Any]:
    """A session that is not stored."""
    return Session(id=id or new_session_id(), principal=principal)


async def test_calls_send_few_commands(storage: Storage) -> None:
    """A first session takes two commands, its use one, and a list one more than sessions."""
    session = new()
    for number, call in (
        (2, storage.store(session, when=When.ABSENT)),
        (1, storage.load(session.id)),
        (1, storage.store(session, when=When.UNCHANGED)),
        (1, storage.store(session, when=When.PRESENT)),
        (2, storage.list("alice")),
        (2, storage.count("alice")),
        (1, storage.revoke("alice", session.digest)),
    ):
        with counted(storage) as sent:
            await call
        assert len(sent) == number


async def test_lease_is_extended_once_per_ttl(
    storage: Storage, nodes: Cluster, clock: FakeClock
) -> None:
    """Loads alone keep a session listed, at two more commands per TTL."""
    session = new()
    await storage.store(session)
    renewals, ttls = 0, 10
    for _ in range(4 * ttls):
        clock.advance(TTL / 4)
        nodes.age(TTL / 4)
        with counted(storage) as sent:
            await storage.load(session.id)
        assert len(sent) in (1, 3)
        if len(sent) > 1:
            renewals += 1
            assert sent[1].deadline < sent[0].deadline  # a hanging index delays no load for long
        assert entries(nodes, "alice") == {session.digest}
    assert ttls / 2 < renewals <= ttls


@pytest.mark.parametrize("end", ["deleted", "moved"])
@pytest.mark.parametrize("heal", ["list", "revoke_all", "write"])
async def test_entries_of_dead_sessions_disappear(
    storage: Storage, nodes: Cluster, clock: FakeClock, end: str, heal: str
) -> None:
    """Lists and writes remove them once no session can follow them any more."""
    dead = [new() for _ in range(10)]
    for session in dead:
        await storage.store(session)
        if end == "deleted":
            await storage.delete(session.id)
        else:
            session.principal = "bob"
            await storage.store(session)
    live = new()

    async def use() -> None:
        if heal == "list":
            await storage.list("alice")
        elif heal == "revoke_all":
            await storage.revoke_all("alice", keep=live.id)
        else:
            for _ in range(4):  # three dead ones at least in each sample of four
                await storage.store(live)

    await use()
    assert entries(nodes, "alice") >= {session.digest for session in dead}
    clock.advance(WINDOW + 1)
    await use()
    assert entries(nodes, "alice") <= {live.digest}


async def test_late_write_does_not_lack_an_entry(nodes: Cluster) -> None:
    """A write that a server gets after a list removed its entry is not applied."""
    async with replicas_of(nodes, 2, ttl=TTL, timeout=SHORT) as (late, other):
        session, sent = new(), 0

        async def delay(send: Send, command: Any) -> Any:
            nonlocal sent
            sent += 1
            if sent == 2:
                while entries(nodes, "alice"):
                    assert await other.list("alice") == []
                command.deadline = asyncio.get_running_loop().time() + TIMEOUT
            return await send(command)

        with intercepted(late, delay):
            (error,) = await asyncio.gather(late.store(session), return_exceptions=True)

        assert sent >= 2
        is_stored = ask(nodes.owner(slot(nodes, session)), "EXISTS", key_of(session.id))
        assert await listed(other, "alice") == ({session.digest} if is_stored else set()), error


def slot(nodes: Cluster, session: Session[Any]) -> int:
    """The slot of a session."""
    return int(ask(nodes.nodes[0], "CLUSTER", "KEYSLOT", key_of(session.id)))


async def test_hanging_node_fails_only_its_sessions(nodes: Cluster) -> None:
    """A principal gets new sessions while the server of another session of hers hangs."""
    up, hanging = nodes.masters()[:2]
    principal = principal_on(nodes, up)
    async with replicas_of(nodes, 1, ttl=TTL, timeout=2.0) as (storage,):
        await storage.store(new(principal, id_on(nodes, hanging)))
        ids = [id_on(nodes, up) for _ in range(2)]
        with mended(hanging):
            hanging.pause()
            for id in ids:
                await storage.store(new(principal, id))
        assert await storage.count(principal) == 3
