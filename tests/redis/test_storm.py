"""A storm of cancelled callers and lost connections: every reply goes to its own caller.

The test makes thousands of loads, of which half are cancelled. The long form makes 200,000
loads on each event loop:

    AIOSESSIONS_STORM=100000 pytest tests/redis/test_storm.py
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis

from aiosessions import Session, StorageUnavailable, When, new_session_id, session_digest
from tests.support.clients import Storage, storage_at
from tests.support.proxy import FaultProxy, until
from tests.support.servers import Server

pytestmark = [pytest.mark.every_loop, pytest.mark.usefixtures("long_bridge")]

LOADS = int(os.environ.get("AIOSESSIONS_STORM", "2000"))
SESSIONS = 300
CALLERS = 200
GUESTS = [f"guest {number}" for number in range(10)]
"""Principals whose sessions callers create and revoke."""
DATABASE = 3


class Storm:
    """Callers that load, store, list and revoke sessions, of whom half are cancelled.

    Each session names its owner, so a caller notices the session of another one.

    Attributes:
        counts: How many calls began, and how they ended.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._random = random.Random(7)  # noqa: S311 - the same in every run
        self._secrets = {new_session_id(): new_session_id() for _ in range(SESSIONS)}
        self.counts: Counter[str] = Counter()

    def session(self, id: str, number: int = 0) -> Session[Any]:
        """A session with the name of its owner in its data. The number decides its size."""
        data = {"id": id, "secret": self._secrets[id], "filler": "x" * (number % 10) ** 5}
        return Session(id=id, principal=self._secrets[id], data=data)

    async def run(self, loads: int, disturb: Callable[[], Awaitable[int]]) -> None:
        """Make loads, and half as many other calls, while connections are lost.

        Args:
            loads: The number of loads.
            disturb: Ends connections, and returns how many.
        """
        await asyncio.gather(*(self._storage.store(self.session(id)) for id in self._secrets))
        while self.counts["loads"] < loads:
            victims: list[asyncio.Task[None]] = []
            async with asyncio.TaskGroup() as tasks:
                for number, id in enumerate(self._random.choices([*self._secrets], k=CALLERS)):
                    task = tasks.create_task(self._call(id, number))
                    if self._random.random() < 0.6:
                        victims.append(task)
                self._random.shuffle(victims)
                tasks.create_task(self._cancel(victims))
                await self._turns(12)
                self.counts["lost connections"] += await disturb()
        for id in self._secrets:
            self._check(id, await self._storage.load(id))

    async def listed(self) -> list[str]:
        """The digests of the sessions of all principals."""
        principals = [*self._secrets.values(), *GUESTS]
        lists = await asyncio.gather(*map(self._storage.list, principals))
        return [info.digest for each in lists for info in each]

    async def _turns(self, most: int) -> None:
        for _ in range(self._random.randint(0, most)):
            await asyncio.sleep(0)

    async def _cancel(self, victims: list[asyncio.Task[None]]) -> None:
        """Cancel some callers at a time, over several turns of the event loop."""
        while victims:
            for _ in range(self._random.randrange(50)):
                if victims:
                    victims.pop().cancel()
            await self._turns(2)

    async def _call(self, id: str, number: int) -> None:
        try:
            if number % 16 == 1:
                await self._list(id)
            elif number % 16 == 2:
                await self._revoke(self._random.choice(GUESTS))
            else:
                await (self._load(id) if number % 4 else self._store(id, number))
        except asyncio.CancelledError:
            self.counts["cancelled"] += 1
            raise
        except StorageUnavailable:
            self.counts["unavailable"] += 1
        else:
            self.counts["served"] += 1

    async def _load(self, id: str) -> None:
        self.counts["loads"] += 1
        self._check(id, await self._storage.load(id))

    async def _store(self, id: str, number: int) -> None:
        self.counts["stores"] += 1
        session = self.session(id, number)
        await self._storage.store(session, when=self._random.choice([When.ALWAYS, When.PRESENT]))

    async def _list(self, id: str) -> None:
        self.counts["lists"] += 1
        (info,) = await self._storage.list(self._secrets[id])
        self._check(id, Session(id=id, principal=info.principal, data=info.data))
        assert info.digest == session_digest(id)

    async def _revoke(self, principal: str) -> None:
        """Create a session of a guest and revoke all of them. A cancelled call leaves some."""
        self.counts["revocations"] += 1
        await self._storage.store(Session(id=new_session_id(), principal=principal))
        await self._storage.revoke_all(principal)

    def _check(self, id: str, loaded: Session[Any]) -> None:
        data: Any = loaded.data
        assert (loaded.id, data["id"]) == (id, id)
        assert loaded.principal == data["secret"] == self._secrets[id]


async def test_storm_over_resets_and_stalls(valkey: Server) -> None:
    """A network resets, closes and stalls connections; at the end nothing is left."""
    valkey.flush()
    rng = random.Random(8)  # noqa: S311 - the same in every run
    tasks = asyncio.all_tasks()
    async with FaultProxy(valkey.port) as proxy:

        async def disturb() -> int:
            proxy.stall()
            await asyncio.sleep(0.001)
            ended = 0
            if rng.random() < 0.7:
                ended = len(proxy.tunnels)
                rng.choice([proxy.cut, proxy.reset])()
            proxy.resume()
            return ended

        async with storage_at(proxy.url.replace("/0", f"/{DATABASE}"), ttl=600) as storage:
            storm = Storm(storage)
            await storm.run(LOADS, disturb)
            with redis.Redis(port=valkey.port, db=DATABASE) as direct:
                keys: Any = direct.keys("session:*")
            stored = {key.decode().removeprefix("session:") for key in keys if key.count(b":") == 1}
            assert sorted(await storm.listed()) == sorted(stored)
            for guest in GUESTS:
                await storage.revoke_all(guest)
        await until(lambda: not proxy.tunnels)
    assert asyncio.all_tasks() == tasks

    counts = storm.counts  # was it a storm?
    calls = sum(counts[each] for each in ("loads", "stores", "lists", "revocations"))
    assert counts["lists"] + counts["revocations"] > calls // 16, counts
    assert counts["cancelled"] > calls // 4, counts
    assert counts["served"] > calls // 4, counts
    assert counts["lost connections"] > calls / CALLERS / 4, counts
    assert counts["unavailable"] < calls // 10, counts  # commands that were lost too often
    with redis.Redis(port=valkey.port, db=DATABASE) as direct:
        indexes: Any = direct.keys("session:principal:*")
        assert direct.dbsize() - len(indexes) == SESSIONS
        assert direct.info("keyspace").keys() == {f"db{DATABASE}"}
