"""Two releases of an application with different data types, side by side in one storage."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from aiosessions import (
    Codec,
    JsonCodec,
    LocalStorage,
    MsgpackCodec,
    RedisStorage,
    Session,
    SessionManager,
    StorageUnavailable,
)
from tests.support.data_types import both_codecs
from tests.support.servers import Server
from tests.support.storages import Replicas, unavailable_at


class Line1(msgspec.Struct):
    """A line of a cart in the old release."""

    sku: str
    count: int = 0


class Line2(Line1):
    """The new release has a note."""

    note: str = ""


class Cart1(msgspec.Struct):
    """The cart of the old release."""

    lines: list[Line1] = []
    old_visits: int = 0


class Cart2(msgspec.Struct):
    """The new release does not have `old_visits` any more."""

    lines: list[Line2] = []
    new_visits: int = 0


Releases = Callable[[type, Callable[..., Codec[Any]]], SessionManager[Any]]


@pytest.fixture(params=["local", "valkey"])
async def release(request: pytest.FixtureRequest, valkey: Server) -> AsyncIterator[Releases]:
    """A function that makes the manager of a release, over a storage that all share."""
    local = LocalStorage[Any](ttl=60)
    async with AsyncExitStack() as stack:

        def make(data_type: type, codec: Callable[..., Codec[Any]]) -> SessionManager[Any]:
            storage: LocalStorage[Any] | RedisStorage[Any]
            if request.param == "local":
                storage = LocalStorage(ttl=60, codec=codec(data_type))
                storage._table = local._table
            else:
                storage = RedisStorage.from_url(valkey.url, ttl=60, codec=codec(data_type))
                stack.push_async_callback(storage.aclose)
            return SessionManager(storage)

        yield make


def visit_old(session: Session[Any]) -> None:
    """Change both a field and a line."""
    session.data.old_visits += 1
    session.data.lines[0].count += 1


def visit_new(session: Session[Any]) -> None:
    """Change a field that the old release does not know."""
    session.data.new_visits += 1
    session.data.lines[1].note += "!"


Step = Callable[[SessionManager[Any], str, Callable[[Session[Any]], None]], Awaitable[Session[Any]]]


async def save(sessions: SessionManager[Any], id: str, change: Any) -> Session[Any]:
    """Load, change, save twice."""
    session = await sessions.get(id)
    await sessions.save(session)
    change(session)
    await sessions.save(session)
    return session


async def mutate(sessions: SessionManager[Any], id: str, change: Any) -> Session[Any]:
    """Change in one call."""
    return await sessions.mutate(id, change)


async def rotate(sessions: SessionManager[Any], id: str, change: Any) -> Session[Any]:
    """Change and move in one call."""
    return await sessions.rotate(id, change)


async def rotate_draft(sessions: SessionManager[Any], id: str, change: Any) -> Session[Any]:
    """Move an object with changes that were not saved."""
    session = await sessions.get(id)
    change(session)
    return await sessions.rotate(session)


@both_codecs
@pytest.mark.parametrize("step", [save, mutate, rotate, rotate_draft])
async def test_alternating_releases_lose_nothing(
    release: Releases, make: Callable[..., Codec[Any]], step: Step
) -> None:
    """Each release finds its own fields after the other one has written."""
    old, new = release(Cart1, make), release(Cart2, make)
    session = await new.create(data=Cart2([Line2("a", note="x"), Line2("b", note="y")]))

    for _ in range(3):
        session = await step(old, session.id, visit_old)
        session = await step(new, session.id, visit_new)

    assert (await old.get(session.id)).data == Cart1([Line1("a", 3), Line1("b")], 3)
    lines = [Line2("a", 3, "x"), Line2("b", note="y!!!")]
    assert (await new.get(session.id)).data == Cart2(lines, 3)


async def test_concurrent_releases_lose_nothing(release: Releases) -> None:
    """Conflicts of both releases are resolved as those of one."""
    old, new = release(Cart1, MsgpackCodec), release(Cart2, MsgpackCodec)
    session = await new.create(data=Cart2([Line2("a", note="x"), Line2("b")]))

    await asyncio.gather(
        *(old.mutate(session, visit_old) for _ in range(10)),
        *(new.mutate(session, visit_new) for _ in range(10)),
    )

    assert (await old.get(session.id)).data.old_visits == 10
    lines = [Line2("a", 10, "x"), Line2("b", note="!" * 10)]
    assert (await new.get(session.id)).data == Cart2(lines, 10)


async def test_undone_rotation_keeps_unknown_fields() -> None:
    """A rotation that fails restores the old session as it was stored."""
    replicas = Replicas(codec=JsonCodec(Cart1), grace=0)
    new = JsonCodec(Cart2)
    stored = Session(id="x", data=Cart2([Line2("a", note="x")], 7))
    table = replicas.storage.inner
    table._codec = new
    await table.store(stored)
    table._codec = replicas.storage.codec = JsonCodec(Cart1)
    replicas.storage.intercept(unavailable_at(6))

    with pytest.raises(StorageUnavailable):
        await replicas.sessions.rotate("x", visit_old)

    replicas.storage.intercept()
    table._codec = new
    assert "rotated" not in str((await table.load("x")).metadata)
    assert (await table.load("x")).data == stored.data
