"""A storm of cancellations while connections are lost: nobody gets what is not theirs.

AIOSESSIONS_STORM says how many loads it has; 20,000 take some seconds.
"""

import asyncio
import logging
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import redis

from aiosessions import RedisStorage, Session, StorageUnavailable, When, new_session_id
from tests.fault_proxy import FaultProxy, until
from tests.servers import Server

_LOADS = int(os.environ.get("AIOSESSIONS_STORM", "20000"))
_SESSIONS = 300
_AT_ONCE = 200
_DATABASE = 3


class Storm:
    """Callers who load and store sessions that name their owners, half of whom are cancelled.

    Attributes:
        ends: How calls ended, and how often.
    """

    def __init__(self, storage: RedisStorage[Any]) -> None:
        self._storage = storage
        self._dice = random.Random(7)  # noqa: S311 - the same every time
        self._secrets = {new_session_id(): new_session_id() for _ in range(_SESSIONS)}
        self.ends: Counter[str] = Counter()

    def session(self, id: str, number: int = 0) -> Session[Any]:
        """A session whose data says whose it is; sizes differ."""
        data = {"id": id, "secret": self._secrets[id], "filler": "x" * (number % 10) ** 5}
        return Session(id=id, principal=self._secrets[id], data=data)

    async def begin(self) -> None:
        """Store every session."""
        await asyncio.gather(*(self._storage.store(self.session(id)) for id in self._secrets))

    async def rage(self, loads: int, disturb: Callable[[], Awaitable[int]]) -> None:
        """Let so many loads begin, and a third as many stores, and disturb them all the time.

        Args:
            loads: How many.
            disturb: Does something to the connection; says how many it ended.
        """
        while self.ends["loads"] < loads:
            victims: list[asyncio.Task[None]] = []
            async with asyncio.TaskGroup() as tasks:
                for number, id in enumerate(self._dice.choices([*self._secrets], k=_AT_ONCE)):
                    task = tasks.create_task(self._call(id, number))
                    if self._dice.random() < 0.6:
                        victims.append(task)
                self._dice.shuffle(victims)
                tasks.create_task(self._cancel(victims))
                await self._turns(12)
                self.ends["connections lost"] += await disturb()

    async def _turns(self, most: int) -> None:
        for _ in range(self._dice.randint(0, most)):
            await asyncio.sleep(0)

    async def _cancel(self, victims: list[asyncio.Task[None]]) -> None:
        """Cancel them, some at a time, over as many turns of the event loop as it takes."""
        while victims:
            for _ in range(self._dice.randrange(50)):
                if victims and not victims[-1].cancel():
                    self.ends["too late to cancel"] += 1
                del victims[-1:]
            await self._turns(2)

    async def _call(self, id: str, number: int) -> None:
        try:
            await (self._load(id) if number % 4 else self._store(id, number))
        except asyncio.CancelledError:
            self.ends["cancelled"] += 1
            raise
        except StorageUnavailable:
            self.ends["unavailable"] += 1
        else:
            self.ends["served"] += 1

    async def _load(self, id: str) -> None:
        self.ends["loads"] += 1
        self.check(id, await self._storage.load(id))

    async def _store(self, id: str, number: int) -> None:
        self.ends["stores"] += 1
        session = self.session(id, number)
        await self._storage.store(session, when=self._dice.choice([When.ALWAYS, When.PRESENT]))

    def check(self, id: str, loaded: Session[Any]) -> None:
        """A session is the one that was asked for, inside and out."""
        data: Any = loaded.data
        assert (loaded.id, data["id"]) == (id, id)
        assert loaded.principal == data["secret"] == self._secrets[id]

    async def end(self) -> None:
        """When it is over, every session is there and its own."""
        for id in self._secrets:
            self.check(id, await self._storage.load(id))


async def weather(storm: Storm, server: Server, disturb: Callable[[], Awaitable[int]]) -> None:
    """A storm from beginning to end, with what has to be true of every storm."""
    await storm.begin()
    await storm.rage(_LOADS // 2, disturb)
    await storm.end()
    ends = storm.ends
    logging.getLogger("storm").info("%s", dict(ends))
    calls = ends["loads"] + ends["stores"]
    assert ends["cancelled"] > calls // 4
    assert ends["served"] > calls // 4
    assert ends["connections lost"] > calls / _AT_ONCE / 4
    assert ends["unavailable"] < calls // 10  # who was under way on two connections that were lost
    with redis.Redis(port=server.port, db=_DATABASE) as direct:
        assert direct.dbsize() == _SESSIONS  # no other database was written to
        assert direct.info("keyspace").keys() == {f"db{_DATABASE}"}


def url(port: int) -> str:
    """The storm's database at that port."""
    return f"redis://127.0.0.1:{port}/{_DATABASE}"


async def test_a_storm_over_killed_connections(valkey: Server) -> None:
    """CLIENT KILL, again and again: every reply is its caller's, and nothing is left in the end."""
    valkey.flush()
    tasks = asyncio.all_tasks()
    with valkey.client() as direct:
        others = {each["id"] for each in direct.client_list()}

        async def kill() -> int:
            return int(direct.client_kill_filter(_type="normal", skipme=True))

        async with RedisStorage[Any].from_url(url(valkey.port), ttl=600, timeout=30) as storage:
            await weather(Storm(storage), valkey, kill)
            assert len({each["id"] for each in direct.client_list()} - others) == 1
        assert asyncio.all_tasks() == tasks
        await until(lambda: {each["id"] for each in direct.client_list()} <= others)


async def test_a_storm_over_resets_and_halts(valkey: Server) -> None:
    """On a network that resets and cuts connections, and that stands still at times."""
    valkey.flush()
    dice = random.Random(8)  # noqa: S311 - the same every time
    tasks = asyncio.all_tasks()
    async with FaultProxy(valkey.port) as proxy:

        async def spoil() -> int:
            proxy.stall()
            await asyncio.sleep(0.001)
            ended = 0
            if dice.random() < 0.7:
                ended = len(proxy.tunnels)
                dice.choice([proxy.cut, proxy.reset])()
            proxy.resume()
            return ended

        async with RedisStorage[Any].from_url(url(proxy.port), ttl=600, timeout=30) as storage:
            await weather(Storm(storage), valkey, spoil)
        await until(lambda: not proxy.tunnels)
    assert asyncio.all_tasks() == tasks
