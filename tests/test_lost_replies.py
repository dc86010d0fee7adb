"""Replies that are lost on their way: what was written is recognised, or said to be unknown.

The proxy in front of the server loses them; `other` is a second client, past the proxy.
"""

import asyncio
import math
import time
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
from tests.fault_proxy import (
    Cut,
    Exchange,
    Fault,
    FaultProxy,
    cut,
    delay,
    hold,
    replace,
    reset,
    swallow,
    truncate,
)
from tests.servers import Server

_TIMEOUT = 2.0
_SHORT = 0.25  # where it has to run out
_SLACK = 1.0  # what a slow machine may take beyond a timeout

Storage = RedisStorage[Any]
Verb = Callable[[Storage, Session[Any]], Awaitable[Any]]

BEFORE = [cut, reset]
AFTER = [cut, reset, truncate]
each_when = pytest.mark.parametrize("when", When, ids=lambda when: when.name)
each_loss = pytest.mark.parametrize(
    ("where", "fault"),
    [*(("on_request", fault) for fault in BEFORE), *(("on_reply", fault) for fault in AFTER)],
    ids=lambda each: getattr(each, "__name__", each),
)


@pytest.fixture
async def proxy(valkey: Server) -> AsyncIterator[FaultProxy]:
    """A proxy for an empty server, which knows no script."""
    with valkey.client() as direct:
        direct.flushall()
        direct.script_flush()
    async with FaultProxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
async def other(valkey: Server) -> AsyncIterator[Storage]:
    """A storage with a connection of its own, past the proxy."""
    async with Storage.from_url(valkey.url, ttl=60) as storage:
        yield storage


@pytest.fixture
async def storage(proxy: FaultProxy, other: Storage) -> AsyncIterator[Storage]:
    """A storage behind the proxy, connected; the server knows its scripts."""
    await teach(other)
    async with Storage.from_url(proxy.url, ttl=60, timeout=_TIMEOUT) as storage:
        with pytest.raises(SessionNotFound):
            await storage.load("nobody")
        yield storage


async def teach(storage: Storage) -> None:
    """Have the server know both scripts."""
    session = Session[Any](id=new_session_id())
    await storage.store(session, when=When.ABSENT)
    assert await storage.delete(session.id) is True


async def session_for(when: When, storage: Storage) -> Session[Any]:
    """A session that this can be true of: a new one, or one that is stored."""
    session = Session[Any](id=new_session_id(), data="old")
    if when is not When.ABSENT:
        await storage.store(session)
    session.data = "new"
    return session


def command(when: When) -> str:
    """The command that such a write is."""
    return "SET" if when is When.ALWAYS else "EVALSHA"


def meanwhile(what: Callable[[], Awaitable[object]]) -> Fault:
    """The reply is lost, and before anybody can notice, something happens."""

    async def fault(_: Exchange) -> bytes:
        await what()
        raise Cut

    return fault


def writes(server: Server) -> int:
    """How often the server has written a record, by whatever command."""
    with server.client() as direct:
        stats: Any = direct.info("commandstats")
    return int(stats.get("cmdstat_set", {"calls": 0})["calls"])


# Writes.


@each_when
@each_loss
async def test_a_write_is_recognised_when_it_is_sent_again(
    proxy: FaultProxy,
    storage: Storage,
    other: Storage,
    valkey: Server,
    when: When,
    where: str,
    fault: Fault,
) -> None:
    """It is applied once. What no revision guards is not sent again, in case it was applied."""
    session = await session_for(when, other)
    old, before = session.revision, writes(valkey)
    order = getattr(proxy, where)(command(when), fault)

    if where == "on_request" and when is not When.UNCHANGED:
        with pytest.raises(StorageUnavailable, match="reply was lost"):
            await storage.store(session, when=when)
        assert (writes(valkey), session.revision) == (before, old)
        return
    await storage.store(session, when=when)

    assert order.hits == 1
    assert len(session.revision) == 16
    assert session.revision != old
    stored = await other.load(session.id)
    assert (stored.revision, stored.data) == (session.revision, "new")
    assert writes(valkey) == before + 1
    await storage.store(session, when=When.UNCHANGED)
    with pytest.raises(SessionError):
        await other.store(stored, when=When.UNCHANGED)


@each_when
async def test_a_lost_reply_disturbs_nobody_else(
    proxy: FaultProxy, storage: Storage, other: Storage, when: When
) -> None:
    """What was under way beside it succeeds, too, each with its own reply."""
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
async def test_a_write_that_is_lost_twice_is_unavailable(
    proxy: FaultProxy, storage: Storage, other: Storage, when: When, where: str
) -> None:
    """The caller's object is as it was, and the storage works on."""
    session = await session_for(when, other)
    revision = session.revision
    order = getattr(proxy, where)(command(when), cut, times=2 if when is When.UNCHANGED else 1)
    looking = proxy.on_reply("GETRANGE", cut, times=math.inf)

    with pytest.raises(StorageUnavailable, match="reply was lost"):
        await storage.store(session, when=when)

    assert order.hits == (2 if when is When.UNCHANGED else 1)
    assert looking.hits == 2
    proxy.forgive()
    assert (session.revision, session.data) == (revision, "new")
    await storage.store(session)
    assert (await other.load(session.id)).data == "new"


@each_when
async def test_a_write_whose_reply_never_comes_ends_in_time(
    proxy: FaultProxy, other: Storage, when: When
) -> None:
    """Although the connection stays open: unavailable, and the object is as it was."""
    await teach(other)
    session = await session_for(when, other)
    revision = session.revision
    order = proxy.on_reply(command(when), swallow)
    async with Storage.from_url(proxy.url, ttl=60, timeout=_SHORT) as storage:
        start = asyncio.get_running_loop().time()
        with pytest.raises(StorageUnavailable):
            await storage.store(session, when=when)
        assert asyncio.get_running_loop().time() - start < _SHORT + _SLACK

        assert order.hits == 1
        assert session.revision == revision
        assert (await storage.load(session.id)).data == "new"  # by another connection
        assert proxy.counts.connections == 2


@pytest.mark.parametrize("when", [When.PRESENT, When.UNCHANGED], ids=lambda when: when.name)
async def test_it_is_unknown_whether_a_deleted_session_had_been_written(
    proxy: FaultProxy, storage: Storage, other: Storage, when: When
) -> None:
    """Unavailable, not "not found"; and it is not brought back."""
    session = await session_for(when, other)
    revision = session.revision
    proxy.on_reply("EVALSHA", meanwhile(lambda: other.delete(session.id)))

    with pytest.raises(StorageUnavailable, match="reply was lost"):
        await storage.store(session, when=when)

    assert session.revision == revision
    with pytest.raises(SessionNotFound):
        await other.load(session.id)


@pytest.mark.parametrize("where", ["on_request", "on_reply"])
async def test_it_is_unknown_whether_a_session_was_saved_that_has_been_saved_since(
    proxy: FaultProxy, storage: Storage, other: Storage, where: str
) -> None:
    """Unavailable, not a conflict; and what was written since is left alone."""
    session = await session_for(When.UNCHANGED, other)

    async def save() -> None:
        theirs = await other.load(session.id)
        theirs.data = "theirs"
        await other.store(theirs, when=When.UNCHANGED)

    getattr(proxy, where)("EVALSHA", meanwhile(save))

    with pytest.raises(StorageUnavailable, match="reply was lost"):
        await storage.store(session, when=When.UNCHANGED)

    assert (await other.load(session.id)).data == "theirs"


@pytest.mark.parametrize("where", ["on_request", "on_reply"])
async def test_it_is_unknown_whether_a_session_was_created_that_is_someone_elses_now(
    proxy: FaultProxy, storage: Storage, other: Storage, where: str
) -> None:
    """Unavailable, not "exists"; and theirs is left alone."""
    session = await session_for(When.ABSENT, other)
    theirs = Session[Any](id=session.id, data="theirs")
    getattr(proxy, where)("EVALSHA", meanwhile(lambda: other.store(theirs)))

    with pytest.raises(StorageUnavailable, match="reply was lost"):
        await storage.store(session, when=When.ABSENT)

    assert session.revision == ""
    assert (await other.load(session.id)).data == "theirs"


async def test_what_is_known_is_told(proxy: FaultProxy, storage: Storage, other: Storage) -> None:
    """A "no" to what was sent once is a "no", also on a connection that replaced another."""
    session = await session_for(When.UNCHANGED, other)
    proxy.on_reply("GETEX", cut)
    await storage.load(session.id)

    with pytest.raises(SessionExists):
        await storage.store(Session[Any](id=session.id), when=When.ABSENT)
    assert await storage.delete("nobody") is False


# Deletes.


@pytest.mark.parametrize("fault", BEFORE)
async def test_a_delete_that_did_not_arrive_is_not_sent_again(
    proxy: FaultProxy, storage: Storage, other: Storage, fault: Fault
) -> None:
    """It may have arrived, and someone may have created the session anew: that is theirs."""
    session = await session_for(When.ALWAYS, other)
    order = proxy.on_request("EVALSHA", fault)

    with pytest.raises(StorageUnavailable, match="reply was lost"):
        await storage.delete(session.id)

    assert order.hits == 1
    assert (await other.load(session.id)).revision == session.revision
    assert await storage.delete(session.id) is True


# Each was applied; then its reply was lost, and someone else acted before it was sent again.
_INTERLOPERS: list[tuple[When, Callable[[Storage, Session[Any]], Awaitable[object]], bool]] = [
    (When.ALWAYS, lambda other, theirs: other.store(theirs), True),
    (When.ALWAYS, lambda other, theirs: other.delete(theirs.id), False),
    (When.ABSENT, lambda other, theirs: other.delete(theirs.id), False),
    (When.PRESENT, lambda other, theirs: other.store(theirs), True),
    (When.UNCHANGED, lambda other, theirs: other.store(theirs), True),
]


@pytest.mark.parametrize(("when", "act", "left"), _INTERLOPERS)
async def test_what_others_did_meanwhile_stands(
    proxy: FaultProxy,
    storage: Storage,
    other: Storage,
    when: When,
    act: Callable[[Storage, Session[Any]], Awaitable[object]],
    left: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """No write is applied a second time over what someone else wrote or deleted since."""
    session = await session_for(when, other)
    theirs = Session[Any](id=session.id, data="theirs")
    proxy.on_reply(command(when), meanwhile(lambda: act(other, theirs)))

    with pytest.raises(StorageUnavailable, match="reply was lost"):
        await storage.store(session, when=when)

    if left:
        assert (await other.load(session.id)).data == "theirs"
    else:
        with pytest.raises(SessionNotFound):
            await other.load(session.id)


async def test_a_session_created_after_a_lost_delete_stands(
    proxy: FaultProxy, storage: Storage, other: Storage
) -> None:
    """The delete was applied; it is not applied again to what was created since."""
    session = await session_for(When.ALWAYS, other)
    theirs = Session[Any](id=session.id, data="theirs")
    proxy.on_reply("EVALSHA", meanwhile(lambda: other.store(theirs, when=When.ABSENT)))

    with pytest.raises(StorageUnavailable, match="reply was lost"):
        await storage.delete(session.id)

    assert (await other.load(session.id)).data == "theirs"


@pytest.mark.parametrize("fault", AFTER)
async def test_a_delete_whose_reply_was_lost_is_unknown(
    proxy: FaultProxy, storage: Storage, other: Storage, fault: Fault
) -> None:
    """The session is gone, but whether there was one cannot be told: that is not False."""
    session = await session_for(When.ALWAYS, other)
    proxy.on_reply("EVALSHA", fault)

    with pytest.raises(StorageUnavailable, match="reply was lost"):
        await storage.delete(session.id)

    with pytest.raises(SessionNotFound):
        await other.load(session.id)
    assert await storage.delete(session.id) is False


async def test_a_delete_whose_reply_never_comes_ends_in_time(
    proxy: FaultProxy, other: Storage
) -> None:
    """Although the connection stays open."""
    await teach(other)
    session = await session_for(When.ALWAYS, other)
    proxy.on_reply("EVALSHA", swallow)
    async with Storage.from_url(proxy.url, ttl=60, timeout=_SHORT) as storage:
        start = asyncio.get_running_loop().time()
        with pytest.raises(StorageUnavailable):
            await storage.delete(session.id)
        assert asyncio.get_running_loop().time() - start < _SHORT + _SLACK
        assert await storage.delete(session.id) is False


# Loads.


@each_loss
async def test_a_load_is_sent_again(
    proxy: FaultProxy, storage: Storage, other: Storage, where: str, fault: Fault
) -> None:
    """Nobody notices."""
    session = await session_for(When.ALWAYS, other)
    order = getattr(proxy, where)("GETEX", fault)

    loaded = await storage.load(session.id)

    assert order.hits == 1
    assert (loaded.id, loaded.data, loaded.revision) == (session.id, "old", session.revision)


@each_loss
async def test_a_load_of_nothing_is_sent_again(
    proxy: FaultProxy, storage: Storage, where: str, fault: Fault
) -> None:
    """There being no session is then known, as loading changes nothing about that."""
    getattr(proxy, where)("GETEX", fault)

    with pytest.raises(SessionNotFound):
        await storage.load("nobody")


async def test_a_load_that_is_lost_twice_is_unavailable(
    proxy: FaultProxy, storage: Storage, other: Storage
) -> None:
    """Not "not found"."""
    session = await session_for(When.ALWAYS, other)
    order = proxy.on_reply("GETEX", cut, times=math.inf)

    with pytest.raises(StorageUnavailable):
        await storage.load(session.id)

    assert order.hits == 2
    proxy.forgive()
    assert (await storage.load(session.id)).data == "old"


async def test_a_load_whose_reply_never_comes_ends_in_time(
    proxy: FaultProxy, other: Storage
) -> None:
    """Although the connection stays open."""
    session = await session_for(When.ALWAYS, other)
    proxy.on_reply("GETEX", swallow)
    async with Storage.from_url(proxy.url, ttl=60, timeout=_SHORT) as storage:
        start = asyncio.get_running_loop().time()
        with pytest.raises(StorageUnavailable):
            await storage.load(session.id)
        assert asyncio.get_running_loop().time() - start < _SHORT + _SLACK
        assert (await storage.load(session.id)).data == "old"


# A server that has forgotten the scripts.


async def _store(storage: Storage, session: Session[Any]) -> None:
    await storage.store(session, when=When.UNCHANGED)


async def _delete(storage: Storage, session: Session[Any]) -> None:
    assert await storage.delete(session.id) is True


each_script = pytest.mark.parametrize("verb", [_store, _delete])


@each_script
async def test_a_script_that_the_server_does_not_know_is_told(
    proxy: FaultProxy, storage: Storage, other: Storage, valkey: Server, verb: Verb
) -> None:
    """Once: the next time, its name will do."""
    sessions = [await session_for(When.UNCHANGED, other) for _ in range(2)]
    with valkey.client() as direct:
        direct.script_flush()

    for session in sessions:
        await verb(storage, session)

    assert proxy.counts.requests["EVALSHA"] == 2
    assert proxy.counts.requests["EVAL"] == 1


@each_when
@each_loss
async def test_a_write_that_was_lost_is_recognised_by_a_server_without_scripts(
    proxy: FaultProxy,
    storage: Storage,
    other: Storage,
    valkey: Server,
    when: When,
    where: str,
    fault: Fault,
) -> None:
    """As after a failover: the first reply is lost, and the script is unknown then."""
    session = await session_for(when, other)
    before = writes(valkey)

    async def forgetful(exchange: Exchange) -> bytes:
        with valkey.client() as direct:
            direct.script_flush()
        return await fault(exchange)

    getattr(proxy, where)(command(when), forgetful)

    if where == "on_request" and when is not When.UNCHANGED:
        with pytest.raises(StorageUnavailable, match="reply was lost"):
            await storage.store(session, when=when)
        assert writes(valkey) == before
        return
    await storage.store(session, when=when)

    assert (await other.load(session.id)).revision == session.revision
    assert writes(valkey) == before + 1
    assert proxy.counts.requests["EVAL"] == (1 if when is When.UNCHANGED else 0)


@each_script
@each_loss
async def test_a_script_that_is_lost_while_it_is_told_is_sent_again(
    proxy: FaultProxy,
    storage: Storage,
    other: Storage,
    valkey: Server,
    where: str,
    fault: Fault,
    verb: Verb,
) -> None:
    """What was lost is known to be a write, or said to be unknown."""
    session = await session_for(When.UNCHANGED, other)
    with valkey.client() as direct:
        direct.script_flush()
    order = getattr(proxy, where)("EVAL", fault)

    if verb is _delete:
        with pytest.raises(StorageUnavailable, match="reply was lost"):
            await verb(storage, session)
    else:
        await verb(storage, session)

    assert order.hits == 1


async def test_a_lost_save_stays_unknown_on_a_server_without_scripts(
    proxy: FaultProxy, storage: Storage, other: Storage, valkey: Server
) -> None:
    """That the script had to be told again does not make a conflict of it."""
    session = await session_for(When.UNCHANGED, other)

    async def fail_over() -> None:
        theirs = await other.load(session.id)
        assert theirs.data == "new"  # ours: it has been applied
        theirs.data = "theirs"
        await other.store(theirs, when=When.UNCHANGED)
        with valkey.client() as direct:
            direct.script_flush()

    proxy.on_reply("EVALSHA", meanwhile(fail_over))

    with pytest.raises(StorageUnavailable, match="reply was lost"):
        await storage.store(session, when=When.UNCHANGED)


async def test_a_lost_delete_stays_unknown_on_a_server_without_scripts(
    proxy: FaultProxy, storage: Storage, other: Storage, valkey: Server
) -> None:
    """It is not False: this very delete may have removed it."""
    session = await session_for(When.ALWAYS, other)

    async def fail_over() -> None:
        with valkey.client() as direct:
            direct.script_flush()

    proxy.on_reply("EVALSHA", meanwhile(fail_over))

    with pytest.raises(StorageUnavailable, match="reply was lost"):
        await storage.delete(session.id)


async def test_telling_a_script_takes_no_extra_time(
    proxy: FaultProxy, storage: Storage, other: Storage
) -> None:
    """A verb that needs two commands has one timeout for both, also beside younger commands."""
    del storage  # this one has a timeout that is short
    session = await session_for(When.UNCHANGED, other)
    younger = await session_for(When.ALWAYS, other)
    loop = asyncio.get_running_loop()
    never = asyncio.Event()

    async with Storage.from_url(proxy.url, ttl=60, timeout=1.0) as hurried:
        await hurried.load(younger.id)
        told = replace(b"-NOSCRIPT No matching script.\r\n")

        async def unknown(exchange: Exchange) -> bytes:
            await delay(0.8)(exchange)
            return await told(exchange)

        order = proxy.on_reply("EVALSHA", unknown)
        proxy.on_reply("GETEX", hold(never))
        start = loop.time()
        saving = asyncio.create_task(hurried.store(session, when=When.UNCHANGED))
        await order.hit.wait()
        await asyncio.sleep(0.7)
        loading = asyncio.create_task(hurried.load(younger.id))

        with pytest.raises(StorageUnavailable):
            await saving
        assert loop.time() - start < 1.0 + 0.6
        busy = time.process_time()
        with pytest.raises(StorageUnavailable):
            await loading
        assert time.process_time() - busy < 0.2  # nobody looks at the clock all the time
