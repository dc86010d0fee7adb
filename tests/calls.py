"""What tests of the shared connection do again and again."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from aiosessions import RedisStorage, Session, new_session_id

Storage = RedisStorage[Any]

SHORT = 0.3
"""A timeout, in seconds, that has to run out."""
SLACK = 1.0
"""What a slow machine may take beyond a timeout."""
LONG = 20.0
"""A timeout that must not run out."""


async def stored(storage: Storage, **fields: Any) -> Session[Any]:
    """A session that is there."""
    session = Session[Any](id=new_session_id(), **fields)
    await storage.store(session)
    return session


async def many(storage: Storage, number: int, **fields: Any) -> list[Session[Any]]:
    """Sessions that are there."""
    return await asyncio.gather(*(stored(storage, **fields) for _ in range(number)))


async def load_all(storage: Storage, sessions: list[Session[Any]]) -> None:
    """Load sessions at once, and see that each is the one that was asked for."""
    loaded = await asyncio.gather(*(storage.load(session.id) for session in sessions))
    assert [(each.id, each.data) for each in loaded] == [(each.id, each.data) for each in sessions]


async def outcome(verb: Awaitable[Any]) -> type:
    """The type of what it returns or raises."""
    try:
        return type(await verb)
    except Exception as error:  # noqa: BLE001 - that is the question
        return type(error)


def our_tasks() -> list[str]:
    """Names of the tasks of every storage."""
    names = (task.get_name() for task in asyncio.all_tasks())
    return sorted(name for name in names if name.startswith("aiosessions"))


def now() -> float:
    """The event loop's time."""
    return asyncio.get_running_loop().time()


async def turns(number: int) -> None:
    """Let the event loop turn."""
    for _ in range(number):
        await asyncio.sleep(0)
