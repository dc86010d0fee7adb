"""Lost replies: a write is recognised by its revision, or its error says that it is in doubt.

A proxy in front of the server loses requests and replies. `other` is a storage without the proxy.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from aiosessions import (
    Session,
    SessionError,
    SessionExists,
    SessionNotFound,
    StorageUnavailable,
    When,
    new_session_id,
)
from tests.support.clients import LONG, Storage, outcome, recovered, storage_at
from tests.support.proxy import (
    Cut,
    Exchange,
    Fault,
    FaultProxy,
    cut,
    hold,
    replace,
    reset,
    swallow,
    truncate,
)
from tests.support.secrets import VERBS
from tests.support.servers import Server

pytestmark = pytest.mark.usefixtures("long_bridge")

_ATTEMPTS = 3  # of a retryable command

each_when = pytest.mark.parametrize("when", When, ids=lambda when: when.name)
each_place = pytest.mark.parametrize("where", ["on_request", "on_reply"])
each_loss = pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("on_request", cut),
        ("on_request", reset),
        ("on_reply", cut),
        ("on_reply", reset),
        ("on_reply", truncate),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
each_script = pytest.mark.parametrize("name", ["store-unchanged", "delete"])
with_and_without_scripts = pytest.mark.parametrize(
    "forgets", [False, True], ids=["with-scripts", "without-scripts"]
)


@pytest.fixture
async def storage(proxy: FaultProxy, other: Storage) -> AsyncIterator[Storage]:
    """A storage behind the proxy, connected to a server that knows the scripts."""
    session = Session[Any](id=new_session_id())
    await other.store(session, when=When.ABSENT)
    await other.store(session, when=When.UNCHANGED)
    assert await other.delete(session.id) is True
    async with storage_at(proxy.url) as storage:
        await recovered(storage)
        yield storage


def forget_scripts(server: Server) -> None:
    """Empty the script cache of a server, as a failover does."""
    with server.client() as client:
        client.script_flush()


def forgetting(server: Server, fault: Fault, *, forgets: bool) -> Fault:
    """A fault that comes with the loss of the script cache, or without it."""

    async def lose(exchange: Exchange) -> bytes:
        if forgets:
            forget_scripts(server)
        return await fault(exchange)

    return lose


async def session_for(when: When, storage: Storage) -> Session[Any]:
    """A session with new data, for which the condition holds."""
    session = Session[Any](id=new_session_id(), data="old")
    if when is not When.ABSENT:
        await storage.store(session)
    session.data = "new"
    return session


def lost_after(act: Callable[[], Awaitable[object]]) -> Fault:
    """The server answers, then another client acts, then the connection is lost."""

    async def fault(_: Exchange) -> bytes:
        await act()
        raise Cut

    return fault


async def is_in_doubt(verb: Awaitable[object]) -> None:
    """Check that a verb fails with an error that is in doubt."""
    with pytest.raises(StorageUnavailable, match="the write may have been applied") as caught:
        await verb
    assert caught.value.in_doubt


def writes(server: Server) -> int:
    """How often the server has written a record."""
    with server.client() as client:
        stats: Any = client.info("commandstats")
    return int(stats.get("cmdstat_set", {"calls": 0})["calls"])


# Stores.


@each_when
@each_loss
@with_and_without_scripts
async def test_lost_store_is_recognised_or_in_doubt(
    proxy: FaultProxy,
    storage: Storage,
    other: Storage,
    valkey: Server,
    when: When,
    where: str,
    fault: Fault,
    *,
    forgets: bool,
) -> None:
    """A store is applied once. Only a compare-and-set is sent again, by its source if needed."""
    session = await session_for(when, other)
    old, before = session.revision, writes(valkey)
    lose = forgetting(valkey, fault, forgets=forgets)
    order = getattr(proxy, where)("EVALSHA", lose)

    if where == "on_request" and when is not When.UNCHANGED:
        await is_in_doubt(storage.store(session, when=when))
        assert (writes(valkey), session.revision) == (before, old)
        return
    await storage.store(session, when=when)

    assert order.hits == 1
    assert session.revision != old
    stored = await other.load(session.id)
    assert (stored.revision, stored.data) == (session.revision, "new")
    assert writes(valkey) == before + 1
    await storage.store(session, when=When.UNCHANGED)
    with pytest.raises(SessionError):
        await other.store(stored, when=When.UNCHANGED)


@each_when
@each_place
async def test_store_that_cannot_be_recognised_is_in_doubt(
    proxy: FaultProxy, storage: Storage, other: Storage, when: When, where: str
) -> None:
    """If looking for the revision fails, too, the session is unchanged and the storage works on."""
    session = await session_for(when, other)
    revision = session.revision
    order = getattr(proxy, where)("EVALSHA", cut, times=math.inf)
    looking = proxy.on_reply("GETRANGE", cut, times=math.inf)

    await is_in_doubt(storage.store(session, when=when))

    assert order.hits == (_ATTEMPTS if when is When.UNCHANGED else 1)
    assert looking.hits == _ATTEMPTS
    proxy.forgive()
    assert (session.revision, session.data) == (revision, "new")
    await recovered(storage)
    await storage.store(session)
    assert (await other.load(session.id)).data == "new"


@each_when
@each_place
@pytest.mark.parametrize("act", ["store-always", "delete"])
async def test_store_is_in_doubt_after_a_write_of_another_client(
    proxy: FaultProxy, storage: Storage, other: Storage, when: When, where: str, act: str
) -> None:
    """The error is neither a conflict nor "exists"; the write of the other client stands."""
    session = await session_for(when, other)
    revision = session.revision
    theirs = Session[Any](id=session.id, data="theirs")
    getattr(proxy, where)("EVALSHA", lost_after(lambda: VERBS[act](other, theirs)))

    await is_in_doubt(storage.store(session, when=when))

    assert session.revision == revision
    if act == "delete":
        assert await outcome(other.load(session.id)) is SessionNotFound
    else:
        assert (await other.load(session.id)).data == "theirs"


async def test_lost_save_stays_in_doubt_on_server_without_scripts(
    proxy: FaultProxy, storage: Storage, other: Storage, valkey: Server
) -> None:
    """Sending the source of the script does not turn the doubt into a conflict."""
    session = await session_for(When.UNCHANGED, other)

    async def fail_over() -> None:
        theirs = await other.load(session.id)
        assert theirs.data == "new"  # our write has been applied
        theirs.data = "theirs"
        await other.store(theirs, when=When.UNCHANGED)
        forget_scripts(valkey)

    proxy.on_reply("EVALSHA", lost_after(fail_over))

    await is_in_doubt(storage.store(session, when=When.UNCHANGED))


async def test_refusal_after_reconnect_is_not_in_doubt(
    proxy: FaultProxy, storage: Storage, other: Storage
) -> None:
    """A command that was sent once gets its own result, also on a new connection."""
    session = await session_for(When.UNCHANGED, other)
    proxy.on_reply("GETEX", cut)
    await storage.load(session.id)

    with pytest.raises(SessionExists):
        await storage.store(Session[Any](id=session.id), when=When.ABSENT)
    assert await storage.delete("absent") is False


@pytest.mark.parametrize("lost", [False, True], ids=["first-attempt", "lost-before"])
async def test_refusal_is_in_doubt_only_after_a_lost_reply(
    proxy: FaultProxy, storage: Storage, other: Storage, valkey: Server, *, lost: bool
) -> None:
    """A refused write was not applied, but an earlier attempt of the same write may have been."""
    session = await session_for(When.UNCHANGED, other)
    if lost:
        proxy.on_request("EVALSHA", cut)
    with valkey.client() as client:
        client.config_set("maxmemory", "1")
        try:
            with pytest.raises(StorageUnavailable, match="out of memory") as caught:
                await storage.store(session, when=When.UNCHANGED)
        finally:
            client.config_set("maxmemory", "0")

    assert caught.value.in_doubt is lost


# Deletes.


@each_loss
@with_and_without_scripts
async def test_lost_delete_is_in_doubt(
    proxy: FaultProxy,
    storage: Storage,
    other: Storage,
    valkey: Server,
    where: str,
    fault: Fault,
    *,
    forgets: bool,
) -> None:
    """A delete is sent once, because the session may have been created anew; that is not False."""
    session = await session_for(When.ALWAYS, other)
    order = getattr(proxy, where)("EVALSHA", forgetting(valkey, fault, forgets=forgets))

    await is_in_doubt(storage.delete(session.id))

    assert order.hits == 1
    assert await storage.delete(session.id) is (where == "on_request")


async def test_session_created_after_a_lost_delete_stays(
    proxy: FaultProxy, storage: Storage, other: Storage
) -> None:
    """The lost delete was applied, and is not applied again to a newer session."""
    session = await session_for(When.ALWAYS, other)
    theirs = Session[Any](id=session.id, data="theirs")
    proxy.on_reply("EVALSHA", lost_after(lambda: other.store(theirs, when=When.ABSENT)))

    await is_in_doubt(storage.delete(session.id))

    assert (await other.load(session.id)).data == "theirs"


# Loads.


@each_loss
@pytest.mark.parametrize("losses", [1, _ATTEMPTS - 1])
async def test_lost_load_is_sent_again(
    proxy: FaultProxy, storage: Storage, other: Storage, where: str, fault: Fault, losses: int
) -> None:
    """The caller of a load does not notice a lost connection."""
    session = await session_for(When.ALWAYS, other)
    order = getattr(proxy, where)("GETEX", fault, times=losses)

    loaded = await storage.load(session.id)

    assert order.hits == losses
    assert (loaded.id, loaded.data, loaded.revision) == (session.id, "old", session.revision)
    getattr(proxy, where)("GETEX", fault)
    assert await outcome(storage.load("absent")) is SessionNotFound


async def test_load_that_is_always_lost_is_unavailable(
    proxy: FaultProxy, storage: Storage, other: Storage
) -> None:
    """After a few attempts the load fails, and not with "not found". A load is not in doubt."""
    session = await session_for(When.ALWAYS, other)
    order = proxy.on_reply("GETEX", cut, times=math.inf)

    with pytest.raises(StorageUnavailable) as caught:
        await storage.load(session.id)

    assert not caught.value.in_doubt
    assert order.hits == _ATTEMPTS
    proxy.forgive()
    await recovered(storage)


# Replies that never come.


@pytest.mark.parametrize("name", ["load", "store-always", "store-unchanged", "delete"])
async def test_swallowed_reply_ends_with_the_timeout(
    proxy: FaultProxy, storage: Storage, other: Storage, jump: Callable[[float], None], name: str
) -> None:
    """Only this verb fails, although the connection stays open; a write is in doubt."""
    session = await session_for(When.UNCHANGED, other)
    revision = session.revision
    order = proxy.on_reply("*", swallow)
    calling = asyncio.ensure_future(VERBS[name](storage, session))
    await order.hit.wait()
    jump(LONG)

    with pytest.raises(StorageUnavailable, match="did not answer in time") as caught:
        await calling

    assert caught.value.in_doubt is (name != "load")
    assert session.revision == revision
    if name == "delete":
        assert await storage.delete(session.id) is False
    else:
        assert (await storage.load(session.id)).data == ("old" if name == "load" else "new")
    assert proxy.counts.connections == 2


# Servers that have forgotten the scripts.


@each_script
@each_loss
async def test_lost_source_of_a_script_is_handled_alike(
    proxy: FaultProxy,
    storage: Storage,
    other: Storage,
    valkey: Server,
    where: str,
    fault: Fault,
    name: str,
) -> None:
    """A compare-and-set is sent again, and a delete is in doubt, as with the digest."""
    session = await session_for(When.UNCHANGED, other)
    forget_scripts(valkey)
    order = getattr(proxy, where)("EVAL", fault)

    if name == "delete":
        await is_in_doubt(storage.delete(session.id))
    else:
        await storage.store(session, when=When.UNCHANGED)

    assert order.hits == 1


async def test_source_of_a_script_has_the_deadline_of_the_verb(
    proxy: FaultProxy, storage: Storage, other: Storage, jump: Callable[[float], None]
) -> None:
    """A verb with two commands has one timeout for both."""
    session = await session_for(When.UNCHANGED, other)
    proxy.on_reply("EVALSHA", replace(b"-NOSCRIPT No matching script.\r\n"))
    source = proxy.on_reply("EVAL", hold(asyncio.Event()))
    first = proxy.on_request("EVALSHA", hold(released := asyncio.Event()))
    storing = asyncio.create_task(storage.store(session, when=When.UNCHANGED))
    await first.hit.wait()
    jump(0.6 * LONG)
    released.set()
    await source.hit.wait()
    jump(0.6 * LONG)

    with pytest.raises(StorageUnavailable, match="did not answer in time"):
        await storing
