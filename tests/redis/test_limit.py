"""`SessionManager(max_per_principal=...)` on one server."""

import asyncio
from typing import Any

import pytest

from aiosessions import CorruptSession, Session, SessionManager, SessionNotFound
from tests.support.clients import storage_at
from tests.support.servers import Server
from tests.support.topologies import ask


async def is_left(sessions: SessionManager[Any], session: Session[Any]) -> bool:
    """Whether a session is still there."""
    try:
        await sessions.get(session.id)
    except SessionNotFound:
        return False
    return True


@pytest.mark.parametrize("most", [1, 2, 5])
async def test_concurrent_sign_ins_end_at_the_limit(valkey: Server, most: int) -> None:
    """They do not delete the sessions of each other."""
    valkey.flush()
    async with storage_at(valkey.url) as one, storage_at(valkey.url) as other:
        managers = [SessionManager(each, max_per_principal=most) for each in (one, other)]
        for _ in range(20):
            calls = [managers[n % 2].create(principal="alice") for n in range(most + 3)]
            created = await asyncio.gather(*calls)

            left = [await is_left(managers[0], session) for session in created]
            assert left.count(True) == await managers[0].count("alice") == most


async def test_longest_unused_session_goes(valkey: Server) -> None:
    """A load is use. Rotated ids, other owners and unreadable records neither count nor go."""
    valkey.flush()
    async with storage_at(valkey.url) as storage:
        sessions = SessionManager(storage, max_per_principal=3)
        for id, idle in (("a", 50_000), ("b", 40_000), ("c", 30_000), ("f", 20_000)):
            session = Session[Any](id=id, principal="alice")
            await storage.store(session)
            ask(valkey, "PEXPIRE", f"session:{session.digest}", f"{60_000 - idle}")
        ask(valkey, "SET", f"session:{session.digest}", "garbage")
        for principal in ("bob", None):
            await sessions.create(id=f"{principal}", principal=principal)
        await sessions.rotate("b", new_id="d")
        await sessions.get("a")

        await sessions.create(id="e", principal="alice")

        ids = ["a", "b", "c", "d", "e", "bob", "None"]
        left = [id for id in ids if await is_left(sessions, Session(id=id))]
        assert left == ["a", "b", "d", "e", "bob", "None"]
        assert await sessions.count("alice") == 3
        with pytest.raises(CorruptSession):
            await storage.load("f")
