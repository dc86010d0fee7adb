"""The index of principals under random histories, compared with a model.

The histories are those of test_model.py, with owners: sessions get another owner in the hands of a
caller, are rotated, listed and revoked. After each step every live session has to be in the index
of its principal, and a list has to be that of the model.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import MultipleResults, initialize, invariant, multiple, rule
from redis.asyncio import RedisCluster
from redis.crc import key_slot

from aiosessions import (
    IndexedStorage,
    LocalStorage,
    Session,
    SessionError,
    SessionExists,
    SessionManager,
    SessionNotFound,
    SessionRotated,
    When,
    session_digest,
)
from aiosessions.record import ROTATED_KEY
from aiosessions.redis import RedisStorage
from tests.contract.test_model import (
    TTL,
    UNIT,
    LocalMachine,
    Model,
    RedisMachine,
    StorageMachine,
    Stored,
    check,
    waits,
)
from tests.support.servers import Server, binaries
from tests.support.steps import index_key
from tests.support.topologies import QUIET, Cluster, ask, cluster

# More ids than in test_model.py, so that `trim` has a choice.
IDS = ("a", "A", "b", "c")
ids = st.sampled_from(IDS)
OWNERS = ("alice", "alice", "alice", "bob", "")
owners = st.sampled_from(OWNERS)


class Owners(StorageMachine):
    """The rules of principals. To be mixed with a machine of one kind of storage."""

    storage: IndexedStorage[int]

    def last_use(self, id: str) -> int:
        """The order in which `trim` deletes sessions."""
        return self.model.stored[id].used_at

    def live(self, owner: str, *, rotated: bool = False) -> dict[str, Stored]:
        """The live sessions of a principal in the model, by id."""
        found = {id: self.model.find(id) for id in IDS}
        return {
            id: stored
            for id, stored in found.items()
            if stored is not None
            and stored.session.principal == owner
            and (rotated or ROTATED_KEY not in stored.session.metadata)
        }

    def digests(self, owner: str) -> list[str]:
        """The digests in the list of a principal."""
        infos = self.outcome(self.storage.list(owner))
        updates = [info.updated_at for info in infos]
        assert updates == sorted(updates, reverse=True)
        return sorted(info.digest for info in infos)

    def compare(self, owner: str) -> None:
        """Compare a list with the model."""
        live = sorted(map(session_digest, self.live(owner)))
        assert self.digests(owner) == live
        assert self.outcome(self.storage.count(owner)) == len(live)

    @initialize(target=StorageMachine.sessions)
    def create(self) -> MultipleResults[Session[int]]:
        """Create sessions with and without owners, without storing them."""
        return multiple(
            *(Session[int](id=id, principal=owner) for id in IDS for owner in (None, *OWNERS))
        )

    @rule(target=StorageMachine.sessions, wait=waits, id=ids)
    def use(self, wait: int, id: str) -> Session[int] | MultipleResults[Session[int]]:
        """Load a session."""
        return self.load(wait, id)

    @rule(session=StorageMachine.sessions, owner=st.none() | owners)
    def give(self, session: Session[int], owner: str | None) -> None:
        """Change the owner of a copy, which may be stored later."""
        session.principal = owner

    @rule(wait=waits, owner=owners)
    def look(self, wait: int, owner: str) -> None:
        """List and count the sessions of a principal."""
        self.wait(wait)
        self.compare(owner)

    @rule(wait=waits, id=ids, new_id=ids)
    def rotate(self, wait: int, id: str, new_id: str) -> None:
        """Move a session to another id. The old one answers for one unit of time."""
        self.wait(wait)
        old = self.model.load(id)
        expected: type[SessionError] | None = None
        if old is None:
            expected = SessionNotFound
        elif ROTATED_KEY in old.metadata:
            expected = SessionRotated
        elif self.model.find(new_id) is not None:
            expected = SessionExists
        manager = SessionManager(self.storage, grace=UNIT, clock=self.clock)

        result = self.outcome(manager.rotate(id, new_id=new_id))

        if expected is not None or old is None:
            assert result is expected
            return
        now, end = self.model.now, self.model.stored[id].deadline
        self.model.store(result, end)
        marked = self.outcome(self.storage.load(id))
        assert ROTATED_KEY in marked.metadata
        self.model.store(marked, min(now + 1, now + 1 if end is None else end))

    @rule(wait=waits, owner=owners, id=ids)
    def revoke(self, wait: int, owner: str, id: str) -> None:
        """Revoke one session."""
        self.wait(wait)
        expected = id in self.live(owner)
        if id in self.live(owner, rotated=True):
            self.model.delete(id)

        assert self.outcome(self.storage.revoke(owner, session_digest(id))) is expected

    @rule(wait=waits, owner=owners, keep=st.none() | ids)
    def revoke_all(self, wait: int, owner: str, keep: str | None) -> None:
        """Revoke every session, or every other one."""
        self.wait(wait)
        expected = len(self.live(owner).keys() - {keep})
        for id in self.live(owner, rotated=True).keys() - {keep}:
            self.model.delete(id)

        assert self.outcome(self.storage.revoke_all(owner, keep=keep)) == expected
        self.compare(owner)

    @rule(wait=waits, owner=owners, most=st.integers(1, 3), keep=ids)
    def trim(self, wait: int, owner: str, most: int, keep: str) -> None:
        """Leave some sessions, those that were used last."""
        self.wait(wait)
        live = self.live(owner)
        others = live.keys() - {keep}
        excess = max(0, len(live) - most)

        number = self.outcome(self.storage.trim(owner, most, keep=keep))
        assert number in (excess, max(0, excess - (keep in live)))  # `keep` may be unused for long

        left = self.digests(owner)
        gone = [id for id in live if session_digest(id) not in left]
        assert len(gone) == number
        assert keep not in gone
        # Which of those that were used in one unit of time goes is open.
        uses = sorted(map(self.last_use, others))
        assert sorted(map(self.last_use, gone)) == uses[:number]
        for id in gone:
            self.model.delete(id)

    @rule(owner=owners, used=st.permutations(IDS), most=st.integers(1, 3), keep=ids)
    def fill_and_trim(self, owner: str, used: list[str], most: int, keep: str) -> None:
        """Create sessions, use two of them later, and leave some."""
        for id in IDS:
            self.store(0, Session[int](id=id, principal=owner), When.ALWAYS, None)
        for id in used[:2]:
            self.load(1, id)
        self.trim(0, owner, most, keep)


class LocalOwners(Owners, LocalMachine):
    """`LocalStorage`: every step lists and counts the sessions of each principal."""

    storage: LocalStorage[int]

    @invariant()
    def lists_are_those_of_the_model(self) -> None:
        """Compare the lists of all principals."""
        for owner in set(OWNERS):
            self.compare(owner)


class ModelOfKeys(Model):
    """The model of a server, with the end of each key.

    A load starts a full TTL, but a key that was just stored ends with the deadline of its session.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[str, int] = {}

    def store(self, session: Session[int], deadline: int | None) -> None:
        """See `Model.store`."""
        super().store(session, deadline)
        end = self.now + TTL
        self.ends[session.id] = end if deadline is None else min(end, deadline)

    def load(self, id: str) -> Session[int] | None:
        """See `Model.load`."""
        self.ends[id] = self.now + TTL
        return super().load(id)


class RedisOwners(Owners, RedisMachine):
    """`RedisStorage`: every step reads the indexes, because a list would change them."""

    storage: RedisStorage[int]
    model: ModelOfKeys

    def __init__(self) -> None:
        super().__init__()
        self.model = ModelOfKeys()

    def last_use(self, id: str) -> int:
        """A server compares the ends of the keys."""
        return self.model.ends[id]

    def server_of(self, key: str) -> Server:
        """The server with a key."""
        del key
        return self.server

    @invariant()
    def indexes_hold_every_live_session(self) -> None:
        """Look for the entries of all live sessions, and at the TTL of each index."""
        for owner in set(OWNERS):
            key = index_key(owner)
            members: Any = ask(self.server_of(key), "ZRANGE", key, 0, -1)
            assert {*members} >= set(map(session_digest, self.live(owner, rotated=True)))
            ttl = ask(self.server_of(key), "PTTL", key)
            assert 0 < ttl <= 3 * TTL * UNIT * 1000 + 20_000 if members else ttl == -2

    @rule(owner=owners)
    def tidy(self, owner: str) -> None:
        """After a list on one server, each entry has a session."""
        self.compare(owner)
        key = index_key(owner)
        for digest in ask(self.server_of(key), "ZRANGE", key, 0, -1):
            assert ask(self.server_of(key), "EXISTS", f"session:{digest}") == 1


class ClusterOwners(RedisOwners):
    """`RedisStorage` in a cluster: entries without sessions stay for a while."""

    nodes: ClassVar[Cluster]

    def make(self) -> RedisStorage[int]:
        """Make a storage in an empty cluster and on the fake clock."""
        self.nodes.flush()
        self.client = RedisCluster(host="127.0.0.1", port=self.nodes.nodes[0].port)
        return RedisStorage(self.client, ttl=TTL * UNIT, clock=self.clock)

    def teardown(self) -> None:
        """Close the client, too."""
        self.outcome(self.client.aclose())
        super().teardown()

    def age(self, seconds: float) -> None:
        """Let the keys of all servers age."""
        self.nodes.age(seconds)

    def server_of(self, key: str) -> Server:
        """The master with a key."""
        return self.nodes.owner(key_slot(key.encode()))

    @rule(owner=owners)
    def tidy(self, owner: str) -> None:
        """After two lists with time in between, no entry is left without a session."""
        self.wait(1)
        self.compare(owner)
        key = index_key(owner)
        for digest in ask(self.server_of(key), "ZRANGE", key, 0, -1):
            session = f"session:{digest}"
            assert ask(self.server_of(session), "EXISTS", session) == 1


@pytest.mark.slow
def test_local_index_does_as_the_model() -> None:
    """Each list, count and result in one process is that of the model."""
    check(LocalOwners)


@pytest.mark.slow
def test_redis_index_does_as_the_model(valkey: Server) -> None:
    """Each list, count and result on a real server is that of the model."""

    class Machine(RedisOwners):
        server = valkey

    check(Machine, 15)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Three masters."""
    with cluster(binaries()["valkey"], node_timeout=QUIET) as nodes:
        yield nodes


@pytest.mark.slow
def test_index_in_a_cluster_does_as_the_model(nodes: Cluster) -> None:
    """Each list, count and result in a cluster is that of the model."""
    served = nodes

    class Machine(ClusterOwners):
        nodes = served

    check(Machine, 6)
