"""Helpers of tests that use the shared connection of a `RedisStorage`."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from aiosessions import RedisStorage, Session, new_session_id

Storage = RedisStorage[Any]

SHORT = 0.3
"""A timeout, in seconds, that the test lets run out."""
LONG = 20.0
"""A timeout, in seconds, that must not run out."""


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


def our_tasks() -> list[str]:
    """The names of the tasks of all storages."""
    names = (task.get_name() for task in asyncio.all_tasks())
    return sorted(name for name in names if name.startswith("aiosessions"))


def now() -> float:
    """The time of the event loop."""
    return asyncio.get_running_loop().time()


async def turns(number: int) -> None:
    """Let the event loop run for some turns."""
    for _ in range(number):
        await asyncio.sleep(0)
