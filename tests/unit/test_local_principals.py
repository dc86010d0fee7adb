"""`LocalStorage`: the sessions of a principal, through evictions, expiry and sweeps."""

import logging
from datetime import timedelta
from typing import Any

import pytest

from aiosessions import CorruptSession, JsonCodec, LocalStorage, Session, session_digest
from aiosessions.testing import FakeClock
from tests.support.loops import on_both

Storage = LocalStorage[Any]


async def listed(storage: Storage, principal: str = "alice") -> list[Any]:
    """The data of a principal's sessions, as listed; the count is checked."""
    infos = await storage.list(principal)
    assert await storage.count(principal) == len(infos)
    return [info.data for info in infos]


@on_both
async def test_evicted_and_expired_sessions_are_not_listed() -> None:
    """Nor are those past their deadline, before a sweep and after it."""
    clock = FakeClock()
    storage = LocalStorage[Any](ttl=60, max_sessions=4, clock=clock)
    for data, seconds in (("a", 0), ("b", 0), ("c", 10), ("d", 0), ("e", 0)):
        end = clock.now() + timedelta(seconds=seconds) if seconds else None
        await storage.store(
            Session(id=data, principal="alice", data=data, expires_at=end, updated_at=clock.now())
        )

    assert await listed(storage) == ["e", "d", "c", "b"]
    clock.advance(10)
    assert await listed(storage) == ["e", "d", "b"]
    assert await storage.delete_expired() == 1
    assert await listed(storage) == ["e", "d", "b"]
    await storage.load("b")
    clock.advance(50)
    assert await listed(storage) == ["b"]
    assert await storage.delete_expired() == 2
    assert await listed(storage) == ["b"]
    assert await storage.delete_expired(clock.now()) == 1
    assert await listed(storage) == []


@on_both
async def test_overwritten_session_changes_its_owner() -> None:
    """A session is in the list of the owner with which it was stored last."""
    storage = Storage(ttl=60, clock=FakeClock())

    for principal, data in (("alice", 1), ("bob", 2), (None, 3), ("", 4), ("bob", 5)):
        await storage.store(Session(id="x", principal=principal, data=data))
        for name in ("alice", "bob", ""):
            assert await listed(storage, name) == ([data] if name == principal else [])


@on_both
async def test_latest_update_is_listed_first() -> None:
    """Of sessions that were updated at once, the last one used is first."""
    clock = FakeClock()
    storage = LocalStorage[Any](ttl=60, clock=clock)
    for data, seconds in (("a", 2), ("b", 1), ("c", 1), ("d", 3)):
        moment = clock.now() + timedelta(seconds=seconds)
        await storage.store(Session(id=data, principal="alice", data=data, updated_at=moment))
    await storage.load("b")

    assert await listed(storage) == ["d", "a", "b", "c"]


@on_both
async def test_listed_data_is_a_copy() -> None:
    """A caller that changes it changes no stored session."""
    storage = Storage(ttl=60, clock=FakeClock())
    await storage.store(Session(id="x", principal="alice", data=["tea"]))

    for _ in range(2):
        (info,) = await storage.list("alice")
        assert info.data == ["tea"]
        info.data.append("milk")


@on_both
async def test_trim_removes_the_longest_unused() -> None:
    """Except for the session to keep, which counts only if it exists."""
    clock = FakeClock()
    storage = Storage(ttl=60, clock=clock)
    for id in "abcde":
        session = Session[Any](id=id, principal="alice", data=id, updated_at=clock.now())
        await storage.store(session)
    await storage.load("b")

    assert await storage.trim("alice", 5, keep="a") == 0
    assert await storage.trim("alice", 4, keep="a") == 1
    assert await listed(storage) == ["b", "e", "d", "a"]
    assert await storage.trim("alice", 2, keep="gone") == 2
    assert await storage.trim("bob", 1, keep="a") == 0
    for most, error in ((0, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="most"):
            await storage.trim("alice", most, keep="a")  # type: ignore[arg-type]
    assert await listed(storage) == ["b", "e"]


class Upgraded(JsonCodec[Any]):
    """A codec that no longer reads one kind of session."""

    def decode(self, payload: bytes) -> Session[Any]:
        """Refuse the sessions of this kind."""
        session = super().decode(payload)
        if session.kind == "old":
            raise CorruptSession("the kind is unknown")
        return session


@on_both
async def test_unreadable_session_is_logged_and_revoked(caplog: pytest.LogCaptureFixture) -> None:
    """It hides no other session from the list, and the warning reveals nothing."""
    storage = LocalStorage[Any](ttl=60, codec=Upgraded())
    for id, kind in (("one-id", "old"), ("other-id", "new")):
        await storage.store(Session(id=id, kind=kind, principal="alice", data="secret"))
    caplog.clear()

    with caplog.at_level(logging.WARNING, "aiosessions"):
        infos = await storage.list("alice")

    assert [info.kind for info in infos] == ["new"]
    digest = session_digest("one-id")
    assert caplog.messages == [f"session {digest[:8]} is not listed: the kind is unknown"]
    assert await storage.revoke("bob", digest) is False
    assert await storage.revoke("alice", digest) is True
    assert await storage.count("alice") == 1
