"""The shared connection when servers hang, go away, or talk nonsense.

The proxy spoils what passes; `fragile` is a server that a test may pause, end and start again.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from aiosessions import (
    CorruptSession,
    Session,
    SessionNotFound,
    StorageUnavailable,
    When,
)
from aiosessions.redis import link
from tests.calls import (
    LONG,
    SHORT,
    SLACK,
    Storage,
    load_all,
    many,
    now,
    our_tasks,
    outcome,
    stored,
    turns,
)
from tests.fault_proxy import (
    Counts,
    Exchange,
    Fault,
    FaultProxy,
    cut,
    hold,
    replace,
    swallow,
    truncate,
    until,
)
from tests.leaks import said_by
from tests.servers import Server, binaries, deaf_port, running


@pytest.fixture
async def proxy(valkey: Server) -> AsyncIterator[FaultProxy]:
    """A proxy for an empty server."""
    valkey.flush()
    async with FaultProxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
async def storage(proxy: FaultProxy) -> AsyncIterator[Storage]:
    """A storage behind the proxy, connected, with everything counted from now on."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        await stored(storage)
        proxy.counts = Counts(connections=1)
        yield storage


@pytest.fixture(scope="module")
def fragile_server() -> Iterator[Server]:
    """A server for this module alone."""
    with running(binaries()["valkey"]) as server:
        yield server


@pytest.fixture
def fragile(fragile_server: Server) -> Iterator[Server]:
    """A server that may be paused or killed; the next test finds it in order."""
    yield fragile_server
    fragile_server.kill()
    fragile_server.start()


# Servers that hang, or are gone.


async def test_a_hanging_server_fails_every_caller_in_time(fragile: Server) -> None:
    """Each within its timeout, whenever it came; and they are served again when it goes on."""
    async with Storage.from_url(fragile.url, ttl=60, timeout=SHORT) as storage:
        sessions = await many(storage, 10)
        fragile.pause()

        async def fail(verb: Awaitable[object]) -> None:
            start = now()
            assert await outcome(verb) is StorageUnavailable
            assert now() - start < SHORT + SLACK

        async with asyncio.TaskGroup() as callers:
            for _ in range(5):
                for session in sessions:
                    callers.create_task(fail(storage.load(session.id)))
                callers.create_task(fail(storage.store(Session(id="new"), when=When.ABSENT)))
                callers.create_task(fail(storage.delete(sessions[0].id)))
                await asyncio.sleep(SHORT / 3)

        fragile.resume()
        await storage.load(sessions[1].id)


async def test_a_server_that_does_not_take_part_in_the_handshake_is_unavailable(
    fragile: Server,
) -> None:
    """From the very first call on; and it is available when it does."""
    fragile.pause()
    async with Storage.from_url(fragile.url, ttl=60, timeout=SHORT) as storage:
        start = now()
        outcomes = await asyncio.gather(*(outcome(storage.load(f"id{n}")) for n in range(10)))
        assert outcomes == [StorageUnavailable] * 10
        assert now() - start < SHORT + SLACK

        fragile.resume()
        assert await outcome(storage.load("nobody")) is SessionNotFound


async def test_an_attempt_to_connect_does_not_hang_for_ever(proxy: FaultProxy) -> None:
    """It ends with the timeout, and the next one may find another server."""
    order = proxy.on_request("*", hold(asyncio.Event()))
    async with Storage.from_url(proxy.url, ttl=60, timeout=SHORT) as storage:
        assert await outcome(storage.load("nobody")) is StorageUnavailable
        assert await outcome(storage.load("nobody")) is SessionNotFound
    assert (order.hits, proxy.counts.connections) == (1, 2)


async def test_a_timeout_ends_the_connection_and_the_next_call_is_served(
    proxy: FaultProxy, storage: Storage
) -> None:
    """Late replies come to nobody: what is late was sent on another connection."""
    del storage
    async with Storage.from_url(proxy.url, ttl=60, timeout=SHORT) as hurried:
        sessions = await many(hurried, 10)
        proxy.stall()
        outcomes = await asyncio.gather(*(outcome(hurried.load(each.id)) for each in sessions))
        assert outcomes == [StorageUnavailable] * 10
        proxy.resume()
        await load_all(hurried, sessions[::-1])


async def test_what_has_not_been_sent_to_a_stuck_server_never_is(proxy: FaultProxy) -> None:
    """Not long after it has failed; nor does it keep the connection open."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=SHORT) as storage:
        await stored(storage)
        proxy.stall()
        large = [Session[Any](id=f"large{n}", data="x" * 1_000_000) for n in range(60)]
        outcomes = await asyncio.gather(*(outcome(storage.store(each)) for each in large))
        assert outcomes == [StorageUnavailable] * 60

    loop: Any = asyncio.get_running_loop()
    await turns(3)
    assert not any(  # the proxy only reads what it does not pass on
        key.data[1] for key in loop._selector.get_map().values()
    )
    proxy.counts = Counts()
    proxy.resume()
    await until(lambda: not proxy.tunnels)
    assert proxy.counts.requests["SET"] <= 8


async def test_what_was_sent_on_a_stuck_connection_is_not_sent_again(proxy: FaultProxy) -> None:
    """Nor acknowledged: its first copy may still arrive, and undo what is written after it."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=SHORT) as storage:
        session = await stored(storage)
        proxy.counts = Counts()
        order = proxy.on_request("GETEX", hold(asyncio.Event()))
        loading = asyncio.create_task(outcome(storage.load(session.id)))
        await order.hit.wait()
        storing = asyncio.create_task(outcome(storage.store(session)))

        assert [await loading, await storing] == [StorageUnavailable] * 2
        await storage.load(session.id)
        assert proxy.counts.requests["SET"] == 0  # the proxy still holds the first copy


async def test_a_dead_server_fails_fast_and_recovers(fragile: Server) -> None:
    """Long before the timeout, also those under way when it died; a restart is noticed."""
    async with Storage.from_url(fragile.url, ttl=60, timeout=LONG) as storage:
        await stored(storage)
        fragile.pause()
        under_way = [asyncio.create_task(outcome(storage.load(f"id{n}"))) for n in range(10)]
        await turns(5)
        start = now()
        fragile.kill()
        assert await asyncio.gather(*under_way) == [StorageUnavailable] * 10
        for _ in range(5):
            assert await outcome(storage.load("nobody")) is StorageUnavailable
        assert now() - start < LONG / 4

        fragile.start()
        assert await outcome(storage.load("nobody")) is SessionNotFound


async def test_a_long_outage_is_no_worse_than_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of failed attempts, callers are told at once."""
    monkeypatch.setattr(link, "_FIRST_PAUSE", 1e-9)
    monkeypatch.setattr(link, "_LONGEST_PAUSE", 1e-9)
    with deaf_port() as port:
        url = f"redis://127.0.0.1:{port}"
        async with Storage.from_url(url, ttl=60, timeout=1.0) as storage:
            for _ in range(1_100):
                start = now()
                assert await outcome(storage.load("nobody")) is StorageUnavailable
                assert now() - start < 0.9


async def test_callers_of_a_dead_server_share_the_attempts(proxy: FaultProxy) -> None:
    """A herd of them causes no more connections than one of them."""
    with deaf_port() as nobody:
        proxy.target = nobody
        async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:

            async def persist() -> None:
                for _ in range(5):
                    assert await outcome(storage.load("nobody")) is StorageUnavailable

            await asyncio.gather(*(persist() for _ in range(200)))
    assert proxy.counts.connections <= 10


async def test_attempts_are_spaced(proxy: FaultProxy) -> None:
    """Whoever tries without pause for half a second connects a few times."""
    with deaf_port() as nobody:
        proxy.target = nobody
        async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
            end = now() + 0.5
            while now() < end:
                assert await outcome(storage.load("nobody")) is StorageUnavailable
    assert 2 <= proxy.counts.connections <= 20


async def test_a_lost_connection_is_replaced_once(proxy: FaultProxy, storage: Storage) -> None:
    """Whatever was under way, and whoever comes while it is being replaced."""
    sessions = await many(storage, 50)
    proxy.on_reply("GETEX", cut, first=20)

    await load_all(storage, sessions)

    assert proxy.counts.connections == 2


@pytest.mark.parametrize("how", ["cut", "reset"])
@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "unnoticed"])
async def test_losing_an_idle_connection_is_no_error(
    proxy: FaultProxy, storage: Storage, how: str, *, noticed: bool
) -> None:
    """The next call gets another one, whether or not it is known by then."""
    sessions = await many(storage, 5)
    for _ in range(3):
        getattr(proxy, how)()
        if noticed:
            await until(lambda: not our_tasks())
        await load_all(storage, sessions)
    assert proxy.counts.connections == 4


async def test_a_connection_that_the_server_kills_is_no_error(valkey: Server) -> None:
    """Idle or busy: CLIENT KILL is survived."""
    async with Storage.from_url(valkey.url, ttl=60) as storage:
        sessions = await many(storage, 20)
        with valkey.client() as direct:
            for _ in range(5):
                (own,) = [each for each in direct.client_list() if each["name"] == "aiosessions"]
                direct.client_kill_filter(_id=own["id"])
                await load_all(storage, sessions)


async def test_an_outage_is_logged_once(fragile: Server, caplog: pytest.LogCaptureFixture) -> None:
    """As one warning that holds no id, however many callers fail; and the next one again."""
    caplog.set_level(logging.DEBUG)
    async with Storage.from_url(fragile.url, ttl=60, timeout=LONG) as storage:
        for outages in (1, 2):
            session = await stored(storage, principal="someone", data="payload")
            fragile.kill()
            for _ in range(4):
                results = await asyncio.gather(*(outcome(storage.load(session.id)) for _ in "abc"))
                assert results == [StorageUnavailable] * 3
            warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
            assert [each.name for each in warnings] == ["aiosessions"] * outages
            assert not any(
                secret in caplog.text for secret in (session.id, "someone", "payload", "GETEX")
            )
            fragile.start()
            await storage.store(session)


# Servers that talk nonsense.


@pytest.mark.parametrize(
    "said", [b"$5\r\nhello\r\n", b"+OK\r\n", b":1\r\n", b"$-1\r\n", b"-ERR no\r\n", b"?\r\n"]
)
async def test_an_unsolicited_reply_reaches_nobody(
    proxy: FaultProxy, storage: Storage, said: bytes
) -> None:
    """It ends the connection; the next call is served by another one."""
    session = await stored(storage)
    proxy.tunnels[0].say(said)
    await until(lambda: not our_tasks())

    assert (await storage.load(session.id)).id == session.id
    assert await storage.delete("nobody") is False
    assert proxy.counts.connections == 2


@pytest.mark.parametrize("reply", [b":1\r\n", b"*0\r\n", b"*1\r\n$1\r\na\r\n", b"#t\r\n"])
async def test_a_reply_of_another_type_reaches_nobody(
    proxy: FaultProxy, storage: Storage, reply: bytes
) -> None:
    """Whoever it was for is told; the others are served, each with its own."""
    sessions = await many(storage, 10)
    proxy.on_reply("GETEX", replace(reply), first=4)

    outcomes = await asyncio.gather(*(outcome(storage.load(each.id)) for each in sessions))

    assert outcomes == [Session] * 3 + [StorageUnavailable] + [Session] * 6
    await load_all(storage, sessions)


@pytest.mark.parametrize(
    "fault",
    [
        truncate,
        replace(b"garbage\r\n"),
        replace(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        replace(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        replace(b"$-5\r\n"),
        replace(b"$99999999999999999999\r\n"),
    ],
    ids=["truncated", "garbage", "tls", "http", "negative", "huge"],
)
@pytest.mark.parametrize("times", [1, math.inf], ids=["once", "always"])
async def test_garbage_is_never_a_session(
    proxy: FaultProxy, storage: Storage, fault: Fault, times: float
) -> None:
    """Once, it is as if the connection had been lost; always, the server is unavailable."""
    sessions = await many(storage, 10)
    proxy.on_reply("GETEX", fault, first=4, times=times)

    loaded = await asyncio.gather(
        *(storage.load(each.id) for each in sessions), return_exceptions=True
    )

    assert [each.id for each in loaded if isinstance(each, Session)] == [
        each.id for each in sessions[: 3 if times > 1 else 10]
    ]
    failed = [each for each in loaded if isinstance(each, BaseException)]
    assert {type(error) for error in failed} == ({StorageUnavailable} if times > 1 else set())
    assert not any(each.id in said_by(error) for each in sessions for error in failed)
    proxy.forgive()
    await load_all(storage, sessions)


async def double(exchange: Exchange) -> bytes:
    """Pass a reply on twice."""
    return exchange.message * 2


@pytest.mark.parametrize("fault", [swallow, double])
async def test_replies_that_are_one_off_are_nobody_elses_session(
    proxy: FaultProxy, fault: Fault
) -> None:
    """Should the network lose or repeat one and go on, sessions are checked against their ids."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=SHORT) as storage:
        sessions = await many(storage, 10)
        proxy.on_reply("GETEX", fault, first=4)

        outcomes = await asyncio.gather(*(outcome(storage.load(each.id)) for each in sessions))

        assert outcomes[:3] == [Session] * 3
        assert outcomes[9] in (CorruptSession, StorageUnavailable)
        assert set(outcomes[3:]) <= {Session, CorruptSession, StorageUnavailable}
        # When no more replies come, it shows, and the connection ends.
        await until(lambda: not our_tasks())
        await load_all(storage, sessions)


async def test_replies_in_pieces_are_whole_in_the_end(proxy: FaultProxy, storage: Storage) -> None:
    """However the network cuts them up."""
    sessions = [*await many(storage, 3, data="x"), *await many(storage, 1, data="x" * 100_000)]

    async def piecemeal(exchange: Exchange) -> bytes:
        step = max(1, len(exchange.message) // 10)
        for start in range(0, len(exchange.message), step):
            exchange.tunnel.say(exchange.message[start : start + step])
            await asyncio.sleep(0.001)
        return b""

    order = proxy.on_reply("GETEX", piecemeal, times=math.inf)
    await load_all(storage, sessions)
    assert (order.hits, proxy.counts.connections) == (4, 1)


@pytest.mark.parametrize(
    "verb",
    [
        lambda storage, session: storage.load(session.id),
        lambda storage, session: storage.store(session),
        lambda storage, session: storage.store(session, when=When.UNCHANGED),
        lambda storage, session: storage.delete(session.id),
    ],
    ids=["load", "store", "save", "delete"],
)
async def test_a_server_that_became_a_replica_is_left(
    fragile: Server, verb: Callable[[Storage, Session[Any]], Awaitable[object]]
) -> None:
    """Its refusal ends the connection, as a failover has moved the master; the verb succeeds."""
    async with FaultProxy(fragile.port) as proxy:
        async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
            session = await stored(storage)
            await storage.store(session, when=When.UNCHANGED)  # so that the scripts are known
            await storage.delete("nobody")
            with fragile.client() as direct, deaf_port() as nobody:
                direct.replicaof("127.0.0.1", nobody)

                async def promote(exchange: Exchange) -> bytes:
                    direct.replicaof("NO", "ONE")
                    return exchange.message

                order = proxy.on_reply("*", promote)
                await verb(storage, session)
        assert order.hits == 1
        assert proxy.counts.connections == 2


async def test_a_replica_is_unavailable(fragile: Server) -> None:
    """And said to be one."""
    async with Storage.from_url(fragile.url, ttl=60, timeout=LONG) as storage:
        session = await stored(storage)
        with fragile.client() as direct, deaf_port() as nobody:
            direct.replicaof("127.0.0.1", nobody)
            for verb in (storage.load(session.id), storage.store(session)):
                with pytest.raises(StorageUnavailable, match="read-only replica"):
                    await verb
            direct.replicaof("NO", "ONE")
            await storage.load(session.id)
