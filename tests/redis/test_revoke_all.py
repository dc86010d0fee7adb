"""`revoke_all` beside rotations at the worst moments, and beside values that are not records."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis

from aiosessions import CorruptSession, SessionManager
from aiosessions.redis._index import Index
from tests.support.clients import key_of, many, storage_at
from tests.support.servers import Server

Step = Callable[[], Awaitable[None]]


def after_each_look(monkeypatch: pytest.MonkeyPatch, step: Step) -> None:
    """Run a step after each reading of an index, before anything else."""
    entries = Index[Any]._entries

    async def look(self: Index[Any], *args: Any) -> list[tuple[bytes, bytes]]:
        found = await entries(self, *args)
        await step()
        return found

    monkeypatch.setattr(Index, "_entries", look)


@pytest.mark.parametrize("grace", [10, 0])
async def test_rotation_after_the_look_does_not_survive(
    server: Server, monkeypatch: pytest.MonkeyPatch, grace: int
) -> None:
    """The new session is gone, even if the old id was removed before it could be revoked."""
    async with storage_at(server.url) as storage, storage_at(server.url) as other:
        sessions = SessionManager[Any](other, grace=grace)
        session = await sessions.create(principal="alice")
        left = 3

        async def rotate() -> None:
            nonlocal session, left
            if left:
                left -= 1
                session = await sessions.rotate(session)

        after_each_look(monkeypatch, rotate)
        await storage.revoke_all("alice")
        monkeypatch.undo()

        assert await storage.list("alice") == []
        assert await storage.delete(session.id) is False


@pytest.mark.parametrize("value", ["junk", "2" + "0" * 40, "9" * 100])
async def test_foreign_value_stops_no_revocation(
    server: Server, observer: "redis.Redis", value: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It stays, is not listed, and leads to `CorruptSession` after the others are deleted."""
    async with storage_at(server.url) as storage:
        first, spoiled, last = await many(storage, 3, principal="alice")
        observer.set(key_of(spoiled.id), value)

        infos = await storage.list("alice")
        with pytest.raises(CorruptSession):
            await storage.revoke("alice", spoiled.digest)
        with pytest.raises(CorruptSession):
            await storage.revoke_all("alice")

        assert {info.digest for info in infos} == {first.digest, last.digest}
        assert spoiled.digest[:8] in caplog.text
        assert [await storage.delete(each.id) for each in (first, last)] == [False, False]
        assert observer.get(key_of(spoiled.id)) == value.encode()
