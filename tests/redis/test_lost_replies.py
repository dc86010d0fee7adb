"""Lost replies: a write is recognised by its revision, or its error says that it is in doubt.

A proxy in front of the server loses requests and replies. `other` is a storage without the proxy.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from aiosessions import (
    RedisStorage,
    Session,
    SessionError,
    SessionExists,
    SessionNotFound,
    StorageUnavailable,
    When,
    new_session_id,
)
from tests.support.proxy import (
    Cut,
    Exchange,
    Fault,
    FaultProxy,
    cut,
    delay,
    replace,
    reset,
    swallow,
    truncate,
)
from tests.support.servers import Server

_TIMEOUT = 2.0
_SHORT = 0.25  # a timeout that the test lets run out
_ATTEMPTS = 3  # of a retryable command

Storage = RedisStorage[Any]
Verb = Callable[[Storage, Session[Any]], Awaitable[Any]]

each_when = pytest.mark.parametrize("when", When, ids=lambda when: when.name)
LOSSES: list[tuple[str, Fault]] = [
    *(("on_request", fault) for fault in (cut, reset)),
    *(("on_reply", fault) for fault in (cut, reset, truncate)),
]
each_loss = pytest.mark.parametrize(
    ("where", "fault"), LOSSES, ids=lambda each: getattr(each, "__name__", each)
)


@pytest.fixture
async def proxy(valkey: Server) -> AsyncIterator[FaultProxy]:
    """A proxy for an empty server without scripts."""
    forget_scripts(valkey)
    valkey.flush()
    async with FaultProxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
async def other(valkey: Server) -> AsyncIterator[Storage]:
    """A storage without the proxy."""
    async with Storage.from_url(valkey.url, ttl=60) as storage:
        yield storage


@pytest.fixture
async def storage(proxy: FaultProxy, other: Storage) -> AsyncIterator[Storage]:
    """A storage behind the proxy, connected to a server that knows the scripts."""
    await send_scripts(other)
    async with Storage.from_url(proxy.url, ttl=60, timeout=_TIMEOUT) as storage:
        with pytest.raises(SessionNotFound):
            await storage.load("absent")
        yield storage


def forget_scripts(server: Server) -> None:
    """Empty the script cache of a server, as a failover does."""
    with server.client() as client:
        client.script_flush()


async def send_scripts(storage: Storage) -> None:
    """Make the server know the scripts of stores and deletes."""
    session = Session[Any](id=new_session_id())
    await storage.store(session, when=When.ABSENT)
    await storage.store(session, when=When.UNCHANGED)
    assert await storage.delete(session.id) is True


async def session_for(when: When, storage: Storage) -> Session[Any]:
    """A session with new data, for which the condition holds."""
    session = Session[Any](id=new_session_id(), data="old")
    if when is not When.ABSENT:
        await storage.store(session)
    session.data = "new"
    return session


def command(when: When) -> str:
    """The command of a store."""
    return "SET" if when is When.ALWAYS else "EVALSHA"


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
@pytest.mark.parametrize("forgets", [False, True], ids=["", "without-scripts"])
async def test_lost_store_is_recognised_or_in_doubt(
    proxy: FaultProxy,
    storage: Storage,
    other: Storage,
    valkey: Server,
    when: When,
    where: str,
    fault: Fault,
    forgets: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """A store is applied once. Only a compare-and-set is sent again, by its source if needed."""
    session = await session_for(when, other)
    old, before = session.revision, writes(valkey)

    async def lose(exchange: Exchange) -> bytes:
        if forgets:
            forget_scripts(valkey)
        return await fault(exchange)

    order = getattr(proxy, where)(command(when), lose)

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
async def test_lost_reply_disturbs_no_other_call(
    proxy: FaultProxy, storage: Storage, other: Storage, when: When
) -> None:
    """The other commands in flight succeed, each with its own reply."""
    sessions = [await session_for(when, other) for _ in range(20)]
    loaded = [await session_for(When.ALWAYS, other) for _ in range(20)]
    proxy.on_reply(command(when), cut, first=7)

    results: list[Any] = await asyncio.gather(
        *(storage.store(session, when=when) for session in sessions),
        *(storage.load(session.id) for session in loaded),
    )

    assert [each.id for each in results[20:]] == [each.id for each in loaded]
    for session in sessions:
        assert (await other.load(session.id)).revision == session.revision


@each_when
@pytest.mark.parametrize("where", ["on_request", "on_reply"])
async def test_store_that_cannot_be_recognised_is_in_doubt(
    proxy: FaultProxy, storage: Storage, other: Storage, when: When, where: str
) -> None:
    """If looking for the revision fails, too, the session is unchanged and the storage works on."""
    session = await session_for(when, other)
    revision = session.revision
    order = getattr(proxy, where)(command(when), cut, times=math.inf)
    looking = proxy.on_reply("GETRANGE", cut, times=math.inf)

    await is_in_doubt(storage.store(session, when=when))

    assert order.hits == (_ATTEMPTS if when is When.UNCHANGED else 1)
    assert looking.hits == _ATTEMPTS
    proxy.forgive()
    assert (session.revision, session.data) == (revision, "new")
    await storage.store(session)
    assert (await other.load(session.id)).data == "new"


# Each store is applied, and its reply is lost; another client acts before it could be sent again.
ACTS: dict[str, Callable[[Storage, Session[Any]], Awaitable[object]]] = {
    "store": lambda other, theirs: other.store(theirs),
    "delete": lambda other, theirs: other.delete(theirs.id),
}


@each_when
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("where", ["on_request", "on_reply"])
async def test_store_is_in_doubt_after_a_write_of_another_client(
    proxy: FaultProxy, storage: Storage, other: Storage, when: When, act: str, where: str
) -> None:
    """The error is neither a conflict nor "exists"; the write of the other client stands."""
    session = await session_for(when, other)
    revision = session.revision
    theirs = Session[Any](id=session.id, data="theirs")
    getattr(proxy, where)(command(when), lost_after(lambda: ACTS[act](other, theirs)))

    await is_in_doubt(storage.store(session, when=when))

    assert session.revision == revision
    if act == "store":
        assert (await other.load(session.id)).data == "theirs"
    else:
        with pytest.raises(SessionNotFound):
            await other.load(session.id)


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


@pytest.mark.parametrize("lost", [False, True], ids=["", "lost-before"])
async def test_refusal_is_in_doubt_only_after_a_lost_reply(
    proxy: FaultProxy,
    storage: Storage,
    other: Storage,
    valkey: Server,
    lost: bool,  # noqa: FBT001 - a parameter of the test
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
@pytest.mark.parametrize("forgets", [False, True], ids=["", "without-scripts"])
async def test_lost_delete_is_in_doubt(
    proxy: FaultProxy,
    storage: Storage,
    other: Storage,
    valkey: Server,
    where: str,
    fault: Fault,
    forgets: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """A delete is sent once, because the session may have been created anew; that is not False."""
    session = await session_for(When.ALWAYS, other)

    async def lose(exchange: Exchange) -> bytes:
        if forgets:
            forget_scripts(valkey)
        return await fault(exchange)

    order = getattr(proxy, where)("EVALSHA", lose)

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


@each_loss
async def test_lost_load_of_absent_session_is_not_found(
    proxy: FaultProxy, storage: Storage, where: str, fault: Fault
) -> None:
    """The second attempt has the same result as the first one would have had."""
    getattr(proxy, where)("GETEX", fault)

    with pytest.raises(SessionNotFound):
        await storage.load("absent")


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
    assert (await storage.load(session.id)).data == "old"


# Replies that never come.


async def _load(storage: Storage, session: Session[Any]) -> None:
    await storage.load(session.id)


async def _store(storage: Storage, session: Session[Any]) -> None:
    await storage.store(session)


async def _save(storage: Storage, session: Session[Any]) -> None:
    await storage.store(session, when=When.UNCHANGED)


async def _delete(storage: Storage, session: Session[Any]) -> None:
    await storage.delete(session.id)


@pytest.mark.parametrize("verb", [_load, _store, _save, _delete])
async def test_swallowed_reply_ends_with_the_timeout(
    proxy: FaultProxy, other: Storage, verb: Verb
) -> None:
    """Only this verb fails, although the connection stays open; a write is in doubt."""
    await send_scripts(other)
    session = await session_for(When.UNCHANGED, other)
    revision = session.revision
    async with Storage.from_url(proxy.url, ttl=60, timeout=_SHORT) as storage:
        await storage.load(session.id)
        proxy.on_reply("*", swallow)

        with pytest.raises(StorageUnavailable, match="did not answer in time") as caught:
            await verb(storage, session)

        assert caught.value.in_doubt is (verb is not _load)
        assert session.revision == revision
        if verb is _delete:
            assert await storage.delete(session.id) is False
        else:
            loaded = await storage.load(session.id)
            assert loaded.data == ("old" if verb is _load else "new")
        assert proxy.counts.connections == 2


# Servers that have forgotten the scripts.

each_script = pytest.mark.parametrize("verb", [_save, _delete])


@each_script
async def test_unknown_script_is_sent_once(
    proxy: FaultProxy, storage: Storage, other: Storage, valkey: Server, verb: Verb
) -> None:
    """Afterwards, the digest of the script is enough."""
    sessions = [await session_for(When.UNCHANGED, other) for _ in range(2)]
    forget_scripts(valkey)

    for session in sessions:
        await verb(storage, session)

    assert proxy.counts.requests["EVALSHA"] == 2
    assert proxy.counts.requests["EVAL"] == 1


@each_script
@each_loss
async def test_lost_source_of_a_script_is_handled_alike(
    proxy: FaultProxy,
    storage: Storage,
    other: Storage,
    valkey: Server,
    where: str,
    fault: Fault,
    verb: Verb,
) -> None:
    """A compare-and-set is sent again, and a delete is in doubt, as with the digest."""
    session = await session_for(When.UNCHANGED, other)
    forget_scripts(valkey)
    order = getattr(proxy, where)("EVAL", fault)

    if verb is _delete:
        await is_in_doubt(verb(storage, session))
    else:
        await verb(storage, session)

    assert order.hits == 1


async def test_source_of_a_script_has_the_deadline_of_the_verb(
    proxy: FaultProxy, other: Storage
) -> None:
    """A verb with two commands has one timeout for both."""
    session = await session_for(When.UNCHANGED, other)
    unknown = replace(b"-NOSCRIPT No matching script.\r\n")

    async def late_refusal(exchange: Exchange) -> bytes:
        await delay(0.8)(exchange)
        return await unknown(exchange)

    async with Storage.from_url(proxy.url, ttl=60, timeout=1.0) as storage:
        await storage.load(session.id)
        proxy.on_reply("EVALSHA", late_refusal)
        proxy.on_reply("EVAL", delay(0.8))
        with pytest.raises(StorageUnavailable, match="did not answer in time"):
            await storage.store(session, when=When.UNCHANGED)
