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
    MsgpackCodec,
    RedisStorage,
    Session,
    SessionConflict,
    SessionExists,
    SessionManager,
    SessionNotFound,
    StorageUnavailable,
    When,
    new_session_id,
)
from aiosessions.testing import FakeClock
from tests.support.proxy import Exchange, FaultProxy, cut, replace
from tests.support.secrets import HEADER, ID, READS, SECRET, VERBS, contents, refused
from tests.support.servers import Server

TTL = 60
GONE = -2
"""The PTTL of a key that does not exist."""


@pytest.fixture
def server(redis_or_valkey: Server) -> Server:
    """An empty server of each kind."""
    redis_or_valkey.flush()
    return redis_or_valkey


@pytest.fixture
def observer(server: Server) -> Iterator["redis.Redis"]:
    """A client of the test."""
    with server.client() as client:
        yield client


@pytest.fixture
def clock() -> FakeClock:
    """The clock of the storages."""
    return FakeClock()


@pytest.fixture
async def storage(server: Server, clock: FakeClock) -> AsyncIterator[RedisStorage[Any]]:
    """A storage on a fake clock."""
    async with RedisStorage[Any].from_url(server.url, ttl=TTL, clock=clock) as storage:
        yield storage


def left(observer: "redis.Redis", id: str) -> int:
    """The PTTL of the key of a session."""
    milliseconds: Any = observer.pttl(f"session:{id}")
    return int(milliseconds)


async def stored(storage: RedisStorage[Any], **fields: Any) -> Session[Any]:
    """Store a session."""
    session = Session[Any](id=new_session_id(), **fields)
    await storage.store(session)
    return session


# Records past their deadline.


async def test_load_removes_record_past_its_deadline(
    storage: RedisStorage[Any], clock: FakeClock, observer: "redis.Redis"
) -> None:
    """A load before the deadline may prolong the key; the first load after it deletes the key."""
    session = await stored(storage, expires_at=clock.now() + timedelta(seconds=TTL / 2))
    await storage.load(session.id)
    assert left(observer, session.id) > TTL * 900

    clock.advance(TTL / 2)
    with pytest.raises(SessionNotFound):
        await storage.load(session.id)

    assert left(observer, session.id) == GONE


async def test_load_removes_rotated_record_past_its_deadline(
    storage: RedisStorage[Any], clock: FakeClock, observer: "redis.Redis"
) -> None:
    """A client that polls its old id does not keep the record after the grace."""
    sessions = SessionManager(storage, grace=2 * TTL, clock=clock)
    session = await sessions.create()
    new = await sessions.rotate(session)

    for _ in range(3):
        await sessions.get(session.id)
        clock.advance(TTL * 2 / 3)
    with pytest.raises(SessionNotFound):
        await sessions.get(session.id)

    assert left(observer, session.id) == GONE
    assert left(observer, new.id) > 0


async def test_session_stored_after_the_deadline_is_loaded(
    server: Server, clock: FakeClock, storage: RedisStorage[Any]
) -> None:
    """A load that found a dead record does not delete the session that replaced it."""
    session = await stored(storage, expires_at=clock.now() + timedelta(seconds=1))
    await storage.load(session.id)
    clock.advance(1)

    async def replace_record(exchange: Exchange) -> bytes:
        await storage.store(Session(id=session.id, data="new"), when=When.ABSENT)
        return exchange.message

    async with FaultProxy(server.port) as proxy:
        proxy.on_request("EVALSHA", replace_record)
        async with RedisStorage[Any].from_url(proxy.url, ttl=TTL, clock=clock) as other:
            assert (await other.load(session.id)).data == "new"


@pytest.mark.parametrize("losses", [1, 100])
async def test_failed_removal_is_not_in_doubt(
    server: Server,
    observer: "redis.Redis",
    clock: FakeClock,
    storage: RedisStorage[Any],
    losses: int,
) -> None:
    """The removal is sent again after a lost reply. If it fails, the load failed, and no write."""
    session = await stored(storage, expires_at=clock.now() + timedelta(seconds=1))
    await storage.load(session.id)
    clock.advance(1)
    async with FaultProxy(server.port) as proxy:
        proxy.on_reply("EVALSHA", cut, times=losses)
        proxy.on_reply("EVAL", cut, times=losses)
        async with RedisStorage[Any].from_url(proxy.url, ttl=TTL, clock=clock) as other:
            with pytest.raises((SessionNotFound, StorageUnavailable)) as caught:
                await other.load(session.id)

    assert type(caught.value) is (SessionNotFound if losses == 1 else StorageUnavailable)
    assert not getattr(caught.value, "in_doubt", False)
    assert left(observer, session.id) == GONE


async def test_impossible_answer_to_the_removal_is_not_in_doubt(
    server: Server, clock: FakeClock, storage: RedisStorage[Any]
) -> None:
    """A load that gets a status no script returns fails, and has written nothing."""
    session = await stored(storage, expires_at=clock.now() + timedelta(seconds=1))
    clock.advance(1)
    async with FaultProxy(server.port) as proxy:
        for name in ("EVALSHA", "EVAL"):
            proxy.on_reply(name, replace(b":7\r\n"))
        async with RedisStorage[Any].from_url(proxy.url, ttl=TTL, clock=clock) as other:
            with pytest.raises(StorageUnavailable, match="does not fit") as caught:
                await other.load(session.id)

    assert not caught.value.in_doubt


@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize("past", [timedelta(milliseconds=2), timedelta(days=40_000)])
async def test_store_past_the_deadline_deletes_the_key(
    storage: RedisStorage[Any],
    clock: FakeClock,
    observer: "redis.Redis",
    when: When,
    past: timedelta,
) -> None:
    """The store succeeds, and a load at the same time cannot revive the session."""
    session = Session[Any](id=new_session_id())
    if when is not When.ABSENT:
        await storage.store(session)
    revision = session.revision
    session.expires_at = clock.now() - past

    await storage.store(session, when=when)

    assert session.revision != revision
    assert left(observer, session.id) == GONE
    with pytest.raises(SessionNotFound):
        await storage.load(session.id)
    assert left(observer, session.id) == GONE


@pytest.mark.parametrize("when", When)
async def test_store_ends_the_key_at_the_deadline(
    storage: RedisStorage[Any], clock: FakeClock, observer: "redis.Redis", when: When
) -> None:
    """The TTL of the key is cut at `expires_at`."""
    session = Session[Any](id=new_session_id())
    if when is not When.ABSENT:
        await storage.store(session)
    session.expires_at = clock.now() + timedelta(seconds=TTL / 2)

    await storage.store(session, when=when)

    assert TTL * 400 < left(observer, session.id) <= TTL * 500


# Replicas of the service with wrong clocks.


@contextmanager
def wrong_clock(ahead: float) -> Iterator[None]:
    """The clock of this process, but not of the server, is ahead by so many seconds."""
    right = time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: right() + ahead)
        yield


every_wrong_clock = pytest.mark.parametrize("ahead", [5, -5], ids=["ahead", "behind"])


@every_wrong_clock
async def test_wrong_clock_does_not_harm_a_live_session(
    server: Server, observer: "redis.Redis", ahead: float
) -> None:
    """A replica 5 s ahead or behind neither denies, overwrites nor ends a session with 3 s left."""
    async with RedisStorage[Any].from_url(server.url, ttl=TTL) as storage:
        session = await stored(storage, expires_at=datetime.now(UTC) + timedelta(seconds=3))
        stale = msgspec.structs.replace(session, revision="another-revision")
        with wrong_clock(ahead):
            assert (await storage.load(session.id)).revision == session.revision
            with pytest.raises(SessionExists):
                await storage.store(stale, when=When.ABSENT)
            with pytest.raises(SessionConflict):
                await storage.store(stale, when=When.UNCHANGED)
            for when in (When.UNCHANGED, When.PRESENT, When.ALWAYS):
                await storage.store(session, when=when)
                assert 0 < left(observer, session.id) <= 3_000
            assert (await storage.load(session.id)).revision == session.revision
            assert await storage.delete(session.id) is True


@every_wrong_clock
async def test_wrong_clock_does_not_revive_a_dead_session(
    server: Server, observer: "redis.Redis", ahead: float
) -> None:
    """Writes judge the deadline of a record by the clock of the server."""
    async with RedisStorage[Any].from_url(server.url, ttl=TTL) as storage:
        deadline = round((time.time() - 2) * 1000)
        record = HEADER[:17] + b"%015d" % deadline + JsonCodec[Any]().encode(Session(id=ID))
        dead = Session[Any](id=ID, revision="AbCd-_0123456789")
        with wrong_clock(ahead):
            for when in (When.PRESENT, When.UNCHANGED):
                observer.set(f"session:{ID}", record, px=TTL * 1000)
                with pytest.raises(SessionNotFound):
                    await storage.store(dead, when=when)
            assert await storage.delete(ID) is False
            observer.set(f"session:{ID}", record, px=TTL * 1000)
            await storage.store(dead, when=When.ABSENT)
            dead.expires_at = datetime.fromtimestamp(deadline / 1000, UTC)
            await storage.store(dead)
            assert left(observer, ID) == GONE


# Unreadable records.

OWN = f'{{"id":"{ID}","principal":"{SECRET}"}}'.encode()
BAD_HEADER: dict[str, bytes] = {
    "empty": b"",
    "byte": b"1",
    "text": SECRET.encode() * 10,
    "json": OWN,
    "newer": b"2" + HEADER[1:] + OWN,
    "newest": b"9" + HEADER[1:] + OWN,
    "no-version": b"x" + HEADER[1:] + OWN,
    "truncated-header": HEADER[:31],
    "deadline": HEADER[:17] + b"fifteen-letters" + OWN,
}
BAD_PAYLOAD: dict[str, bytes] = {
    "no-payload": HEADER,
    "truncated": HEADER + OWN[:-1],
    "garbage": HEADER + b"\x80\x00\xff" + SECRET.encode(),
    "list": HEADER + b"[]",
    "empty-object": HEADER + b"{}",
    "another-codec": HEADER + MsgpackCodec[Any]().encode(Session(id=ID)),
    "swapped": HEADER + b'{"id":"another-id"}',
    "longer-id": HEADER + f'{{"id":"{ID}x"}}'.encode(),
    "another-type": HEADER + f'{{"id":"{ID}","data":"{SECRET}"}}'.encode(),
}
RECORDS = BAD_HEADER | BAD_PAYLOAD
every_record = pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
every_value = pytest.mark.parametrize("record", [*RECORDS.values(), None], ids=[*RECORDS, "a-list"])


@asynccontextmanager
async def spoilt(server: Server, record: bytes | None) -> AsyncIterator[RedisStorage[Any]]:
    """A storage of sessions with integers, and a server with this record, or a list for None."""
    with server.client() as client:
        if record is None:
            client.rpush(f"session:{ID}", SECRET)
        else:
            client.set(f"session:{ID}", record, px=TTL * 1000)
    async with RedisStorage.from_url(server.url, ttl=TTL, codec=JsonCodec(int)) as storage:
        yield storage


@contextmanager
def nothing_changes(server: Server) -> Iterator[None]:
    """Check that the block does not change the values of a server."""
    with server.client() as client:
        before = contents(client)
        yield
        assert contents(client) == before


@every_record
async def test_unreadable_record_is_corrupt(server: Server, record: bytes) -> None:
    """A bad record is neither an empty session nor "not found", and stays for inspection."""
    async with spoilt(server, record) as storage:
        with nothing_changes(server):
            for _ in range(2):
                await refused(READS["load"], storage, Session(id=ID), CorruptSession, "")


@every_record
async def test_polling_does_not_keep_an_unreadable_record(
    server: Server, observer: "redis.Redis", record: bytes
) -> None:
    """Loads of one storage renew an unreadable record at most once, so its TTL runs out."""
    async with spoilt(server, record) as storage:
        server.age(TTL * 0.6)
        for _ in range(2):
            with pytest.raises(CorruptSession):
                await storage.load(ID)
            server.age(TTL * 0.6)

        assert left(observer, ID) == GONE
        with pytest.raises(SessionNotFound):
            await storage.load(ID)


async def test_mended_record_is_loaded_and_renewed(server: Server, observer: "redis.Redis") -> None:
    """A session that another replica stores over an unreadable record is as good as any other."""
    async with (
        spoilt(server, b"unreadable") as storage,
        RedisStorage[Any].from_url(server.url, ttl=TTL) as other,
    ):
        for _ in range(2):
            with pytest.raises(CorruptSession):
                await storage.load(ID)
        await other.store(Session(id=ID, data=1))

        server.age(TTL * 0.6)
        assert (await storage.load(ID)).data == 1

        assert left(observer, ID) > TTL * 900


@pytest.mark.parametrize("record", BAD_HEADER.values(), ids=BAD_HEADER)
@pytest.mark.parametrize("when", [When.ABSENT, When.PRESENT, When.UNCHANGED])
async def test_condition_on_unreadable_record_is_corrupt(
    server: Server, record: bytes, when: When
) -> None:
    """A conditional write cannot judge the record, so it refuses to overwrite it."""
    async with spoilt(server, record) as storage:
        with nothing_changes(server):
            await refused(
                lambda storage, session: storage.store(session, when=when),
                storage,
                Session(id=ID, data=0, revision="AbCd-_0123456789"),
                CorruptSession,
                "",
            )


async def test_key_of_another_type_is_corrupt(server: Server) -> None:
    """A list under the key of a session belongs to another program, and stays."""
    async with spoilt(server, None) as storage:
        with nothing_changes(server):
            for name in ("load", "store-absent", "store-present", "store-unchanged"):
                session = Session(id=ID, data=0)
                await refused(VERBS[name], storage, session, CorruptSession, "another type of")


@every_value
async def test_unconditional_store_overwrites_bad_records(
    server: Server, record: bytes | None
) -> None:
    """`When.ALWAYS` replaces any value."""
    async with spoilt(server, record) as storage:
        session = Session[int](id=ID, data=1)
        await storage.store(session)

        assert await storage.load(ID) == session


@every_value
async def test_delete_removes_bad_records(server: Server, record: bytes | None) -> None:
    """A value that cannot be read counts as a session that existed."""
    async with spoilt(server, record) as storage:
        assert await storage.delete(ID) is True
        assert await storage.delete(ID) is False
        with pytest.raises(SessionNotFound):
            await storage.load(ID)


async def test_swapped_records_are_corrupt(server: Server, observer: "redis.Redis") -> None:
    """If two values change places, no client gets the session of another."""
    async with RedisStorage[Any].from_url(server.url, ttl=TTL) as storage:
        await storage.store(Session(id="mine", data=SECRET))
        await storage.store(Session(id="yours", data=SECRET))
        observer.rename("session:mine", "session:x")
        observer.rename("session:yours", "session:mine")
        observer.rename("session:x", "session:yours")

        for id in ("mine", "yours"):
            await refused(READS["load"], storage, Session(id=id), CorruptSession, "another session")
