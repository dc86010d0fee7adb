"""The shared connection when servers hang, end, or send nonsense.

`proxy` spoils messages. `fragile` is a server that a test may pause and end.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from aiosessions import CorruptSession, Session, SessionNotFound, StorageUnavailable, When
from aiosessions.redis import _outage
from tests.support.clients import (
    LONG,
    SHORT,
    Storage,
    load_all,
    many,
    now,
    our_tasks,
    outcome,
    stored,
    turns,
)
from tests.support.proxy import (
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
from tests.support.secrets import said_by
from tests.support.servers import Server, refused_port

pytestmark = pytest.mark.every_loop

HANGS = 20.0
"""Seconds after which a call counts as endless."""
EARLY = 0.01
"""Seconds by which a timer may be early."""


async def recovered(storage: Storage) -> None:
    """Wait until the storage serves a call."""
    async with asyncio.timeout(HANGS):
        while await outcome(storage.load("absent")) is not SessionNotFound:  # noqa: ASYNC110 - it sets no event
            await asyncio.sleep(0.01)


def in_pieces(number: int, pause: float) -> Fault:
    """Make a fault that passes a message on in pieces, with pauses in between."""

    async def fault(exchange: Exchange) -> bytes:
        step = max(1, len(exchange.message) // number)
        for start in range(0, len(exchange.message), step):
            exchange.tunnel.say(exchange.message[start : start + step])
            await asyncio.sleep(pause)
        return b""

    return fault


# Servers that hang.


async def test_staggered_callers_end_in_a_long_hang(fragile: Server) -> None:
    """In a hang of several timeouts every call ends with its own; later ones are served."""
    async with (
        Storage.from_url(fragile.url, ttl=60, timeout=SHORT) as storage,
        asyncio.timeout(HANGS),
    ):
        session = await stored(storage)
        fragile.pause()

        async def fail(verb: Awaitable[object]) -> None:
            start = now()
            with pytest.raises(StorageUnavailable):
                await verb
            assert now() - start < SHORT + HANGS / 2

        async with asyncio.TaskGroup() as callers:
            for _ in range(40):
                callers.create_task(fail(storage.load(session.id)))
                callers.create_task(fail(storage.store(Session(id="new"), when=When.ABSENT)))
                callers.create_task(fail(storage.delete(session.id)))
                await asyncio.sleep(3 * SHORT / 40)

        fragile.resume()
        await recovered(storage)
        assert await storage.load(session.id) == session


async def test_slow_server_fails_only_late_calls(proxy: FaultProxy) -> None:
    """In a pause a little longer than the timeout, only calls past their own deadline fail."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=SHORT) as storage:
        sessions = await many(storage, 60)

        async def load(session: Session[Any]) -> float:
            """Return 0 for a load that succeeds, else the seconds until it failed."""
            start = now()
            try:
                assert await storage.load(session.id) == session
            except StorageUnavailable:
                return now() - start
            return 0

        proxy.stall()
        start = now()
        tasks = []
        for session in sessions:
            tasks.append(asyncio.create_task(load(session)))
            await asyncio.sleep(1.2 * SHORT / len(sessions))
        assert now() - start >= 1.2 * SHORT - EARLY
        proxy.resume()
        failed = [each for each in await asyncio.gather(*tasks) if each]

    assert 0 < len(failed) < len(sessions)
    assert min(failed) >= SHORT - EARLY


async def test_call_with_little_time_fails_alone(proxy: FaultProxy, storage: Storage) -> None:
    """A caller that cancels soon, such as `asyncio.timeout`, costs the others nothing."""
    sessions = await many(storage, 10)
    released = asyncio.Event()
    order = proxy.on_reply("GETEX", hold(released))
    tasks = [asyncio.create_task(storage.load(each.id)) for each in sessions]
    await order.hit.wait()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.005):
            await storage.load(sessions[0].id)
    released.set()

    assert await asyncio.gather(*tasks) == sessions
    assert proxy.counts.connections == 1


async def test_attempt_to_connect_ends_with_timeout(proxy: FaultProxy) -> None:
    """An attempt that hangs is given up, and the next one serves the calls."""
    order = proxy.on_request("*", hold(asyncio.Event()))
    async with Storage.from_url(proxy.url, ttl=60, timeout=SHORT) as storage:
        await recovered(storage)
    assert order.hits == 1
    assert proxy.counts.connections >= 2


async def test_stalled_connection_may_answer(proxy: FaultProxy) -> None:
    """If the stalled connection answers before a new one is made, it serves its callers."""
    timeout = 2 * SHORT
    async with Storage.from_url(proxy.url, ttl=60, timeout=timeout) as storage:
        session = await stored(storage)
        released = asyncio.Event()
        order = proxy.on_reply("GETEX", hold(released))
        late = asyncio.create_task(outcome(storage.load(session.id)))
        await order.hit.wait()
        connecting = proxy.on_request("*", hold(asyncio.Event()), first=2)
        await asyncio.sleep(timeout * 0.8)
        in_time = asyncio.create_task(storage.load(session.id))
        await connecting.hit.wait()
        assert await late is StorageUnavailable
        released.set()

        assert await in_time == session
        assert await storage.load(session.id) == session
        assert storage.statistics().reconnects == 0


async def test_stalled_connection_is_replaced(proxy: FaultProxy) -> None:
    """If the stalled connection stays silent, a new one serves the commands that wait."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=SHORT) as storage:
        sessions = await many(storage, 10)
        proxy.on_reply("GETEX", swallow)
        assert await outcome(storage.load(sessions[0].id)) is StorageUnavailable
        await recovered(storage)
        await load_all(storage, sessions)

        assert storage.statistics().reconnects >= 1


async def test_slow_reply_is_not_a_stall(proxy: FaultProxy) -> None:
    """While the bytes of a reply arrive, the connection stays, and later replies can follow."""
    timeout = 2 * SHORT
    async with Storage.from_url(proxy.url, ttl=60, timeout=timeout) as storage:
        slow, session = await stored(storage, data="x" * 1_000), await stored(storage)
        order = proxy.on_reply("GETEX", in_pieces(12, timeout / 10))
        late = asyncio.create_task(outcome(storage.load(slow.id)))
        await order.hit.wait()
        await asyncio.sleep(timeout * 0.9)
        in_time = asyncio.create_task(storage.load(session.id))

        assert await late is StorageUnavailable
        assert await in_time == session
        assert storage.statistics().reconnects == 0


async def test_queued_commands_never_reach_a_hanging_server(proxy: FaultProxy) -> None:
    """Commands that fail in the queue are not written later, nor do they keep the socket open."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=SHORT) as storage:
        await stored(storage)
        proxy.counts = Counts()
        proxy.stall()
        large = [Session[Any](id=f"large{n}", data="x" * 1_000_000) for n in range(60)]
        outcomes = await asyncio.gather(*(outcome(storage.store(each)) for each in large))
        assert outcomes == [StorageUnavailable] * 60

    proxy.resume()
    await until(lambda: not proxy.tunnels)
    assert proxy.counts.requests["SET"] <= 8


# Servers that are down.


async def test_server_that_dies_and_restarts_is_used_again(fragile: Server) -> None:
    """Calls in flight fail once the bridge has ended, later ones at once, and then none."""
    async with Storage.from_url(fragile.url, ttl=60, timeout=LONG) as storage:
        await stored(storage)
        fragile.pause()
        in_flight = [asyncio.create_task(outcome(storage.load(f"id{n}"))) for n in range(10)]
        await turns(5)
        fragile.kill()
        async with asyncio.timeout(LONG / 2):
            assert await asyncio.gather(*in_flight) == [StorageUnavailable] * 10
            for _ in range(50):
                assert await outcome(storage.load("absent")) is StorageUnavailable

        await asyncio.to_thread(fragile.start)
        await recovered(storage)


async def test_callers_share_attempts_to_connect(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of callers connect as often as one caller would, with a pause each time."""
    monkeypatch.setattr(_outage, "BRIDGE", 0.2)
    with refused_port() as refused:
        proxy.target = refused
        async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:

            async def persist() -> None:
                for _ in range(5):
                    assert await outcome(storage.load("absent")) is StorageUnavailable

            await asyncio.gather(*(persist() for _ in range(200)))
    assert 2 <= proxy.counts.connections <= 20


async def test_first_second_is_bridged(proxy: FaultProxy) -> None:
    """Commands that come in a short outage wait for the next connection, writes included."""
    there = proxy.target
    with refused_port() as refused:
        async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
            session = await stored(storage)
            proxy.target = refused
            proxy.cut()
            await until(lambda: not our_tasks())
            tasks = [asyncio.create_task(storage.load(session.id)) for _ in range(10)]
            tasks += [asyncio.create_task(stored(storage)) for _ in range(10)]
            await until(lambda: proxy.counts.connections >= 4)
            proxy.target = there

            loaded = await asyncio.gather(*tasks)
            assert loaded[:10] == [session] * 10
            await load_all(storage, loaded)


# Lost connections.


async def test_lost_connection_is_replaced_once(proxy: FaultProxy, storage: Storage) -> None:
    """All commands in flight are sent again on one new connection."""
    sessions = await many(storage, 50)
    proxy.on_reply("GETEX", cut, first=20)

    await load_all(storage, sessions)

    assert proxy.counts.connections == 2


@pytest.mark.parametrize("how", ["cut", "reset"])
@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "unnoticed"])
async def test_lost_idle_connection_fails_no_call(
    proxy: FaultProxy, storage: Storage, how: str, *, noticed: bool
) -> None:
    """The next call is served, whether or not the storage has seen the end."""
    sessions = await many(storage, 5)
    for _ in range(3):
        getattr(proxy, how)()
        if noticed:
            await until(lambda: not our_tasks())
        await load_all(storage, sessions)
    assert proxy.counts.connections == 4


async def test_killed_connection_fails_no_call(valkey: Server) -> None:
    """CLIENT KILL of a busy connection is followed by a new one."""
    async with Storage.from_url(valkey.url, ttl=60) as storage:
        sessions = await many(storage, 20)
        with valkey.client() as direct:
            for _ in range(5):
                (own,) = [each for each in direct.client_list() if each["name"] == "aiosessions"]
                direct.client_kill_filter(_id=own["id"])
                await load_all(storage, sessions)


# Servers that send nonsense.


@pytest.mark.parametrize(
    "reply", [b"$5\r\nhello\r\n", b"+OK\r\n", b":1\r\n", b"$-1\r\n", b"-ERR no\r\n", b"?\r\n"]
)
async def test_unsolicited_reply_ends_the_connection(
    proxy: FaultProxy, storage: Storage, reply: bytes
) -> None:
    """A reply without a command reaches no caller; the next calls use another connection."""
    session = await stored(storage)
    proxy.tunnels[0].say(reply)
    await until(lambda: not our_tasks())

    assert await storage.load(session.id) == session
    assert await storage.delete("absent") is False
    assert proxy.counts.connections == 2


@pytest.mark.parametrize(
    "fault",
    [
        truncate,
        replace(b"garbage\r\n"),
        replace(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        replace(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        replace(b"$-5\r\n"),
        replace(b"$99999999999999999999\r\n"),
        replace(b":1\r\n"),
        replace(b"*1\r\n$1\r\na\r\n"),
        replace(b"#t\r\n"),
    ],
    ids=["truncated", "garbage", "tls", "http", "negative", "huge", "integer", "array", "boolean"],
)
@pytest.mark.parametrize("times", [1, math.inf], ids=["once", "always"])
async def test_nonsense_is_not_a_reply(
    proxy: FaultProxy, storage: Storage, fault: Fault, times: float
) -> None:
    """Nonsense is like a lost connection: loads are sent again, and fail if it does not end."""
    sessions = await many(storage, 10)
    proxy.on_reply("GETEX", fault, first=4, times=times)

    loaded = await asyncio.gather(
        *(storage.load(each.id) for each in sessions), return_exceptions=True
    )

    errors = loaded[3:] if times > 1 else []
    assert loaded == [*sessions[: 10 - len(errors)], *errors]
    assert {type(error) for error in errors} <= {StorageUnavailable}
    assert not any(each.id in said_by(error) for each in sessions for error in errors)  # type: ignore[arg-type] # results are sessions or exceptions
    proxy.forgive()
    await recovered(storage)
    await load_all(storage, sessions)


async def double(exchange: Exchange) -> bytes:
    """Pass a reply on twice."""
    return exchange.message * 2


@pytest.mark.parametrize("fault", [swallow, double])
async def test_shifted_replies_are_not_other_sessions(proxy: FaultProxy, fault: Fault) -> None:
    """If the network loses or repeats a reply, the id inside each record is the last defence."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=SHORT) as storage:
        sessions = await many(storage, 10)
        proxy.on_reply("GETEX", fault, first=4)

        outcomes = await asyncio.gather(*(outcome(storage.load(each.id)) for each in sessions))

        assert outcomes[:3] == [Session] * 3
        assert outcomes[9] in (CorruptSession, StorageUnavailable)
        assert set(outcomes[3:]) <= {Session, CorruptSession, StorageUnavailable}
        await recovered(storage)
        await load_all(storage, sessions)


async def test_replies_in_pieces_are_put_together(proxy: FaultProxy, storage: Storage) -> None:
    """Replies may arrive in pieces of any size."""
    sessions = [*await many(storage, 3, data="x"), *await many(storage, 1, data="x" * 100_000)]
    order = proxy.on_reply("GETEX", in_pieces(10, 0.001), times=math.inf)
    await load_all(storage, sessions)
    assert (order.hits, proxy.counts.connections) == (4, 1)


# Servers that refuse.


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
async def test_connection_to_a_replica_is_replaced(
    fragile: Server, verb: Callable[[Storage, Session[Any]], Awaitable[object]]
) -> None:
    """After a failover the old master is a replica; its refusal ends the connection only."""
    async with FaultProxy(fragile.port) as proxy:
        async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
            session = await stored(storage)
            await storage.store(session, when=When.UNCHANGED)  # so that the scripts are known
            await storage.delete("absent")
            with fragile.client() as direct, refused_port() as refused:
                direct.replicaof("127.0.0.1", refused)

                async def promote(exchange: Exchange) -> bytes:
                    direct.replicaof("NO", "ONE")
                    return exchange.message

                order = proxy.on_reply("*", promote)
                await verb(storage, session)
        assert order.hits == 1
        assert proxy.counts.connections == 2


async def test_refused_writes_are_not_in_doubt(
    fragile: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of writes that a replica refuses fails without a doubt, and says why."""
    monkeypatch.setattr(_outage, "BRIDGE", 0.1)
    async with Storage.from_url(fragile.url, ttl=60, timeout=LONG) as storage:
        sessions = await many(storage, 20)
        with fragile.client() as direct, refused_port() as refused:
            direct.replicaof("127.0.0.1", refused)
            errors = await asyncio.gather(
                *(storage.store(each) for each in sessions), return_exceptions=True
            )
            direct.replicaof("NO", "ONE")
        for error in errors:
            assert isinstance(error, StorageUnavailable)
            assert "read-only replica" in str(error)
            assert not error.in_doubt
        await recovered(storage)
        await load_all(storage, sessions)
