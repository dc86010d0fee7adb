"""Callers of a storage: verbs, their outcomes, and callers that know every right result."""

import asyncio
import itertools
import time
from binascii import crc_hqx
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

from redis.asyncio import RedisCluster
from redis.crc import key_slot

from aiosessions import (
    RedisStorage,
    Session,
    SessionConflict,
    SessionExists,
    SessionNotFound,
    StorageUnavailable,
    When,
    new_session_id,
    session_digest,
)
from aiosessions.record import principal_digest
from tests.support.servers import Server
from tests.support.topologies import Cluster

Storage = RedisStorage[Any]

SHORT = 0.3
"""A timeout, in seconds, that the test lets run out."""
LONG = 20.0
"""A timeout, in seconds, that must not run out."""


def storage_at(url: str, **settings: Any) -> Storage:
    """A storage with a timeout that does not run out."""
    return Storage.from_url(url, **{"ttl": 60, "timeout": LONG, **settings})


async def stored(storage: Storage, **fields: Any) -> Session[Any]:
    """Store a new session."""
    session = Session[Any](id=new_session_id(), **fields)
    await storage.store(session)
    return session


async def many(storage: Storage, number: int, **fields: Any) -> list[Session[Any]]:
    """Store new sessions concurrently."""
    return await asyncio.gather(*(stored(storage, **fields) for _ in range(number)))


async def load_all(storage: Storage, sessions: list[Session[Any]]) -> None:
    """Load sessions concurrently, and check that each load returns the session it asked for."""
    loaded = await asyncio.gather(*(storage.load(session.id) for session in sessions))
    assert [(each.id, each.data) for each in loaded] == [(each.id, each.data) for each in sessions]


async def outcome(verb: Awaitable[Any]) -> type:
    """The type of the result or of the exception of a verb."""
    try:
        return type(await verb)
    except Exception as error:  # noqa: BLE001 - the caller compares the type
        return type(error)


async def recovered(storage: Storage, *sessions: Session[Any]) -> None:
    """Wait until the storage serves calls, then load sessions with the same patience."""
    absent = Session[Any](id="absent")
    async with asyncio.timeout(LONG):
        for session in (absent, *sessions):
            while True:
                result, _ = await timed_outcome(storage.load(session.id))
                if not isinstance(result, StorageUnavailable):
                    break
                await asyncio.sleep(0.01)
            assert isinstance(result, SessionNotFound) if session is absent else result == session


async def use(storage: Storage, callers: int = 1) -> None:
    """Use every verb, with success and with refusal, and principals; check each result."""
    crowd = [Caller(storage, new_session_id) for _ in range(callers)]
    await asyncio.gather(*(each.use_everything() for each in crowd))
    assert [problem for each in crowd for problem in (*each.wrong, *each.unavailable)] == []


def our_tasks() -> list[str]:
    """The names of the tasks of all storages."""
    names = (task.get_name() for task in asyncio.all_tasks())
    return sorted(name for name in names if name.startswith("aiosessions"))


async def turns(number: int) -> None:
    """Let the event loop run for some turns."""
    for _ in range(number):
        await asyncio.sleep(0)


NAME = "callers"
"""The client name of the connections that are made here."""


@asynccontextmanager
async def cluster_client(port: int, **settings: Any) -> AsyncIterator[RedisCluster]:
    """A client to borrow, not used yet."""
    client = RedisCluster(host="127.0.0.1", port=port, client_name=NAME, **settings)
    try:
        yield client
    finally:
        await client.aclose()


@asynccontextmanager
async def cluster_storage(
    nodes: Cluster, *, timeout: float = 5.0, **settings: Any
) -> AsyncIterator[RedisStorage[Any]]:
    """A storage that borrows a client of the cluster."""
    async with (
        cluster_client(nodes.nodes[0].port, **settings) as client,
        RedisStorage[Any](client, ttl=600, timeout=timeout) as storage,
    ):
        yield storage


def key_of(id: str, prefix: str = "session:") -> str:
    """The key of a session."""
    return prefix + session_digest(id)


def index_slot_of(principal: str) -> int:
    """The slot of the index of a principal."""
    return key_slot(f"session:principal:{principal_digest(principal)}".encode())


def slot_of(id: str) -> int:
    """The slot of a session."""
    return key_slot(key_of(id).encode())


def ids_in(slot: int) -> Iterator[str]:
    """New session ids in a slot. One of 16,384 candidates is."""
    prefix = new_session_id()
    for number in itertools.count():
        id = f"{prefix}{number}"
        digest = sha256(id.encode()).hexdigest()[:32]
        if crc_hqx(f"session:{digest}".encode(), 0) % 16_384 == slot:
            yield id


def id_on(nodes: Cluster, node: Server) -> str:
    """A new session id in a slot of this master."""
    ranges = [(low, high) for low, high, master, *_ in nodes.map() if master is node]
    for id in iter(new_session_id, ""):
        if any(low <= slot_of(id) <= high for low, high in ranges):
            return id
    raise AssertionError  # the iterator does not end


async def timed_outcome(verb: Coroutine[Any, Any, object]) -> tuple[object, float]:
    """The result or the exception of a verb, and the seconds it took."""
    start = time.monotonic()
    try:
        result = await verb
    except Exception as error:  # noqa: BLE001 - the caller judges it
        result = error
    return result, time.monotonic() - start


class Caller:
    """A caller with its own sessions, which knows the right result of every verb.

    Attributes:
        rounds: The number of complete rounds.
        unavailable: The times of `StorageUnavailable`, on the monotonic clock.
        wrong: The results and errors that were wrong, in words.
    """

    def __init__(self, storage: RedisStorage[Any], ids: Callable[[], str]) -> None:
        self._storage = storage
        self._ids = ids
        self.rounds = 0
        self.unavailable: list[float] = []
        self.wrong: list[str] = []

    async def use_all_verbs(self) -> None:
        """Create, change and delete a session with every kind of write, and check each step."""
        storage, session = self._storage, Session[Any](id=self._ids(), data=0)
        stale = Session[Any](id=session.id, data="stale", revision="0123456789abcdef")
        await self._expect(None, storage.store(session, when=When.ABSENT))
        await self._expect(SessionExists, storage.store(stale, when=When.ABSENT))
        for data, when in enumerate((When.UNCHANGED, When.PRESENT, When.ALWAYS), start=1):
            await self._expect(session, storage.load(session.id))
            session.data = data
            await self._expect(None, storage.store(session, when=when))
            await self._expect(SessionConflict, storage.store(stale, when=When.UNCHANGED))
        await self._expect(session, storage.load(session.id))
        for existed in (True, False):
            await self._expect(existed, storage.delete(session.id))
        await self._expect(SessionNotFound, storage.load(session.id))
        for when in (When.PRESENT, When.UNCHANGED):
            await self._expect(SessionNotFound, storage.store(stale, when=when))
        self.rounds += 1

    async def use_principal(self) -> None:
        """Create, list and revoke the sessions of a principal of this caller's own."""
        storage, principal = self._storage, self._ids()
        one, other, last = (Session[Any](id=self._ids(), principal=principal) for _ in range(3))
        for number, session in enumerate((one, other)):
            await self._expect(number, storage.count(principal))
            await self._expect(None, storage.store(session, when=When.ABSENT))
        await self._expect([other.digest, one.digest], self._listed(principal))
        for existed in (True, False):
            await self._expect(existed, storage.revoke(principal, one.digest))
        await self._expect(None, storage.store(last))
        await self._expect(1, storage.trim(principal, most=1, keep=last.id))
        await self._expect([last.digest], self._listed(principal))
        await self._expect(1, storage.revoke_all(principal))
        await self._expect(0, storage.count(principal))

    async def _listed(self, principal: str) -> list[str]:
        return [info.digest for info in await self._storage.list(principal)]

    async def use_everything(self) -> None:
        """Use all verbs, and the sessions of a principal."""
        await self.use_principal()
        await self.use_all_verbs()

    async def read_and_write(self, session: Session[Any]) -> None:
        """Load and overwrite a session, and create another; a lost write does not disturb that."""
        copy = Session[Any](id=session.id, data=session.data)
        await self._expect(session.data, self._data_of(session.id))
        await self._expect(None, self._storage.store(copy, when=When.PRESENT))
        await self._expect(None, self._storage.store(copy))
        new = Session[Any](id=self._ids())
        await self._expect(None, self._storage.store(new, when=When.ABSENT))
        self.rounds += 1

    async def _data_of(self, id: str) -> object:
        return (await self._storage.load(id)).data

    async def _expect(self, expected: object, verb: Coroutine[Any, Any, object], /) -> None:
        result, _ = await timed_outcome(verb)
        if isinstance(result, StorageUnavailable):
            self.unavailable.append(time.monotonic())
            # As a client of a web service does after a 503.
            await asyncio.sleep(0.01)
        elif result != expected and not (isinstance(expected, type) and type(result) is expected):
            self.wrong.append(f"{result!r} instead of {expected!r}")


@asynccontextmanager
async def busy(
    callers: Sequence[Caller], live: Callable[[Caller], Coroutine[Any, Any, None]]
) -> AsyncIterator[None]:
    """Let callers work during the block; each finishes its last round."""
    done = asyncio.Event()

    async def work(caller: Caller) -> None:
        while not done.is_set():
            await live(caller)

    async with asyncio.TaskGroup() as tasks:
        for caller in callers:
            tasks.create_task(work(caller))
        try:
            yield
        finally:
            done.set()
