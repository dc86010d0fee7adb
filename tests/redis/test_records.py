"""Records that no caller may read: past their deadline, rotated away, or unreadable.

The keys are inspected on a real server, because such a record must not stay there. Time passes for
keys by ageing them, and for deadlines by a fake clock.
"""

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
import redis

from aiosessions import (
    CorruptSession,
    JsonCodec,
    Session,
    SessionConflict,
    SessionExists,
    SessionManager,
    SessionNotFound,
    StorageUnavailable,
    When,
    new_session_id,
    session_digest,
)
from aiosessions.testing import FakeClock
from tests.support.clients import Storage, key_of, outcome, storage_at, stored
from tests.support.proxy import Exchange, FaultProxy, cut, replace
from tests.support.secrets import HEADER, ID, READS, SECRET, WRITES, contents, refused
from tests.support.servers import Server

TTL = 60
GONE = -2
"""The PTTL of a key that does not exist."""


@pytest.fixture
def clock() -> FakeClock:
    """The clock of the storages."""
    return FakeClock()


@pytest.fixture
async def storage(server: Server, clock: FakeClock) -> AsyncIterator[Storage]:
    """A storage on a fake clock."""
    async with storage_at(server.url, ttl=TTL, clock=clock) as storage:
        yield storage


@pytest.fixture
async def dying(storage: Storage, clock: FakeClock) -> Session[Any]:
    """A session past its deadline, with a record that a load has prolonged."""
    session = await stored(storage, expires_at=clock.now() + timedelta(seconds=TTL / 2))
    await storage.load(session.id)
    clock.advance(TTL / 2)
    return session


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[FaultProxy]:
    """A proxy for each server in turn."""
    async with FaultProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
async def behind(proxy: FaultProxy, clock: FakeClock) -> AsyncIterator[Storage]:
    """A storage on the fake clock, behind the proxy."""
    async with storage_at(proxy.url, ttl=TTL, clock=clock) as storage:
        yield storage


def left(observer: "redis.Redis", id: str) -> int:
    """The PTTL of the key of a session."""
    milliseconds: Any = observer.pttl(key_of(id))
    return int(milliseconds)


# Records past their deadline.


async def test_load_removes_record_past_its_deadline(
    storage: Storage, dying: Session[Any], observer: "redis.Redis"
) -> None:
    """A load before the deadline may prolong the key; the first load after it deletes the key."""
    assert left(observer, dying.id) > TTL * 500

    assert await outcome(storage.load(dying.id)) is SessionNotFound

    assert left(observer, dying.id) == GONE


async def test_load_removes_rotated_record_past_its_deadline(
    storage: Storage, clock: FakeClock, observer: "redis.Redis"
) -> None:
    """A client that polls its old id does not keep the record after the grace."""
    sessions = SessionManager(storage, grace=2 * TTL, clock=clock)
    session = await sessions.create()
    new = await sessions.rotate(session)

    for _ in range(3):
        await sessions.get(session.id)
        clock.advance(TTL * 2 / 3)
    assert await outcome(sessions.get(session.id)) is SessionNotFound

    assert left(observer, session.id) == GONE
    assert left(observer, new.id) > 0


async def test_session_stored_after_the_deadline_is_loaded(
    storage: Storage, dying: Session[Any], proxy: FaultProxy, behind: Storage
) -> None:
    """A load that found a dead record does not delete the session that replaced it."""

    async def replace_record(exchange: Exchange) -> bytes:
        await storage.store(Session(id=dying.id, data="new"), when=When.ABSENT)
        return exchange.message

    proxy.on_request("EVALSHA", replace_record)

    assert (await behind.load(dying.id)).data == "new"


@pytest.mark.parametrize(
    ("losses", "result"), [(1, SessionNotFound), (100, StorageUnavailable)], ids=["once", "always"]
)
async def test_failed_removal_is_not_in_doubt(
    observer: "redis.Redis",
    dying: Session[Any],
    proxy: FaultProxy,
    behind: Storage,
    losses: int,
    result: type[Exception],
) -> None:
    """The removal is sent again after a lost reply. If it fails, the load failed, and no write."""
    proxy.on_reply("EVALSHA", cut, times=losses)
    proxy.on_reply("EVAL", cut, times=losses)

    with pytest.raises(result) as caught:
        await behind.load(dying.id)

    assert not getattr(caught.value, "in_doubt", False)
    assert left(observer, dying.id) == GONE


async def test_impossible_answer_to_the_removal_is_not_in_doubt(
    dying: Session[Any], proxy: FaultProxy, behind: Storage
) -> None:
    """A load that gets a status no script returns fails, and has written nothing."""
    for name in ("EVALSHA", "EVAL"):
        proxy.on_reply(name, replace(b":7\r\n"))

    with pytest.raises(StorageUnavailable, match="does not fit") as caught:
        await behind.load(dying.id)

    assert not caught.value.in_doubt


@pytest.mark.parametrize("when", When, ids=lambda when: when.name)
async def test_deadline_bounds_the_key(
    storage: Storage, clock: FakeClock, observer: "redis.Redis", when: When
) -> None:
    """The TTL of the key is cut at `expires_at`, and a store past it removes the key."""
    session = Session[Any](id=new_session_id())
    if when is not When.ABSENT:
        await storage.store(session)
    session.expires_at = clock.now() + timedelta(seconds=TTL / 2)
    await storage.store(session, when=when)
    assert 0 < left(observer, session.id) <= TTL * 500

    for past in (timedelta(milliseconds=2), timedelta(days=40_000)):
        if when is When.ABSENT:
            await storage.delete(session.id)
        else:
            session.expires_at = None
            await storage.store(session)
        revision = session.revision
        session.expires_at = clock.now() - past
        await storage.store(session, when=when)

        assert session.revision != revision
        assert left(observer, session.id) == GONE
        assert await outcome(storage.load(session.id)) is SessionNotFound


# Replicas of the service with wrong clocks.


@contextmanager
def wrong_clock(ahead: float) -> Iterator[None]:
    """The clock of this process, but not of the server, is ahead by so many seconds."""
    right = time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: right() + ahead)
        yield


every_wrong_clock = pytest.mark.parametrize("ahead", [50, -50], ids=["ahead", "behind"])


@every_wrong_clock
async def test_wrong_clock_does_not_harm_a_live_session(
    server: Server, observer: "redis.Redis", ahead: float
) -> None:
    """A clock 50 s ahead or behind does not deny, overwrite or end a session with 30 s left."""
    async with storage_at(server.url, ttl=10 * TTL) as storage:
        end = datetime.now(UTC) + timedelta(seconds=30)
        session = await stored(storage, principal="alice", expires_at=end)
        stale = msgspec.structs.replace(session, revision="another-revision")
        with wrong_clock(ahead):
            assert [each.digest for each in await storage.list("alice")] == [session.digest]
            assert (await storage.load(session.id)).revision == session.revision
            with pytest.raises(SessionExists):
                await storage.store(stale, when=When.ABSENT)
            with pytest.raises(SessionConflict):
                await storage.store(stale, when=When.UNCHANGED)
            for when in (When.UNCHANGED, When.PRESENT, When.ALWAYS):
                await storage.store(session, when=when)
                assert 0 < left(observer, session.id) <= 30_000
            assert (await storage.load(session.id)).revision == session.revision
            assert await storage.delete(session.id) is True


@every_wrong_clock
async def test_wrong_clock_does_not_revive_a_dead_session(
    server: Server, observer: "redis.Redis", ahead: float
) -> None:
    """Writes judge the deadline of a record by the clock of the server."""
    payload = JsonCodec[Any]().encode(Session(id=DIGEST))
    async with storage_at(server.url, ttl=TTL) as storage:
        deadline = round((time.time() - 2) * 1000)
        record = HEADER[:17] + b"%015d" % deadline + payload
        dead = Session[Any](id=ID, revision="AbCd-_01234.MdOG")
        with wrong_clock(ahead):
            for when in (When.PRESENT, When.UNCHANGED):
                observer.set(key_of(ID), record, px=TTL * 1000)
                with pytest.raises(SessionNotFound):
                    await storage.store(dead, when=when)
            assert await storage.delete(ID) is False
            observer.set(key_of(ID), record, px=TTL * 1000)
            await storage.store(dead, when=When.ABSENT)
            dead.expires_at = datetime.fromtimestamp(deadline / 1000, UTC)
            await storage.store(dead)
            assert left(observer, ID) == GONE


# Unreadable records.

DIGEST = session_digest(ID)
OWN = f'{{"id":"{DIGEST}","principal":"{SECRET}"}}'.encode()
BAD_HEADER: dict[str, bytes] = {
    "empty": b"",
    "byte": b"1",
    "text": SECRET.encode() * 10,
    "newer": b"4" + HEADER[1:] + OWN,
    "no-version": b"x" + HEADER[1:] + OWN,
    "truncated": HEADER[:31],
    "deadline": HEADER[:17] + b"fifteen-letters" + OWN,
}
RECORDS = BAD_HEADER | {
    "no-payload": HEADER,
    "swapped": HEADER + b'{"id":"another-id"}',
    "another-type": HEADER + f'{{"id":"{DIGEST}","data":"{SECRET}"}}'.encode(),
}


@asynccontextmanager
async def spoilt(server: Server, record: bytes | None) -> AsyncIterator[Storage]:
    """A storage of sessions with integers, and a server with this record, or a list for None."""
    with server.client() as client:
        client.flushall()
        if record is None:
            client.rpush(key_of(ID), SECRET)
        else:
            client.set(key_of(ID), record, px=TTL * 1000)
    async with storage_at(server.url, ttl=TTL, codec=JsonCodec(int)) as storage:
        yield storage


@contextmanager
def nothing_changes(server: Server) -> Iterator[None]:
    """Check that the block does not change the values of a server."""
    with server.client() as client:
        before = contents(client)
        yield
        assert contents(client) == before


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
async def test_unreadable_record_is_corrupt(
    server: Server, observer: "redis.Redis", record: bytes
) -> None:
    """It is neither an empty session nor "not found", and loads renew it at most once."""
    async with spoilt(server, record) as storage:
        for _ in range(2):
            with nothing_changes(server):
                await refused(READS["load"], storage, Session(id=ID), CorruptSession, "")
            server.age(TTL * 0.6)

        assert left(observer, ID) == GONE
        assert await outcome(storage.load(ID)) is SessionNotFound


@pytest.mark.parametrize("record", [*RECORDS.values(), None], ids=[*RECORDS, "a-list"])
async def test_unreadable_value_can_be_replaced_or_deleted(
    server: Server, record: bytes | None
) -> None:
    """`When.ALWAYS` replaces any value, and `delete` removes it as a session that existed."""
    async with spoilt(server, record) as storage:
        session = Session[int](id=ID, data=1)
        await storage.store(session)
        assert await storage.load(ID) == session
    async with spoilt(server, record) as storage:
        assert await storage.delete(ID) is True
        assert await storage.delete(ID) is False


@pytest.mark.parametrize("record", [*BAD_HEADER.values(), None], ids=[*BAD_HEADER, "a-list"])
async def test_condition_on_unreadable_value_is_corrupt(
    server: Server, record: bytes | None
) -> None:
    """A conditional write cannot judge the value, so it refuses to overwrite it."""
    hint = "another type of" if record is None else ""
    verbs = {name: verb for name, verb in WRITES.items() if name != "store-always"}
    async with spoilt(server, record) as storage:
        with nothing_changes(server):
            for verb in (verbs if record is not None else verbs | READS).values():
                session = Session(id=ID, data=0, revision="AbCd-_01234.MdOG")
                await refused(verb, storage, session, CorruptSession, hint)


async def test_mended_record_is_loaded_and_renewed(server: Server, observer: "redis.Redis") -> None:
    """A session that another replica stores over an unreadable record is as good as any other."""
    async with spoilt(server, b"unreadable") as storage, storage_at(server.url, ttl=TTL) as other:
        for _ in range(2):
            assert await outcome(storage.load(ID)) is CorruptSession
        await other.store(Session(id=ID, data=1))

        server.age(TTL * 0.6)
        assert (await storage.load(ID)).data == 1

        assert left(observer, ID) > TTL * 500
