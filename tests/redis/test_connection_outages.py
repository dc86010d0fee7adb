"""The shared connection when servers hang, end, or send nonsense.

`proxy` spoils messages. `fragile` is a server that a test may pause and end.
"""

import asyncio
import math
from collections.abc import Callable
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
    our_tasks,
    outcome,
    recovered,
    storage_at,
    stored,
    turns,
)
from tests.support.proxy import (
    Exchange,
    Fault,
    FaultProxy,
    Order,
    cut,
    hold,
    replace,
    swallow,
    truncate,
    until,
)
from tests.support.secrets import VERBS, said_by
from tests.support.servers import Server, refused_port

pytestmark = pytest.mark.every_loop

Jump = Callable[[float], None]


# Servers that hang.


async def test_every_call_ends_in_a_long_hang(fragile: Server) -> None:
    """In a hang of several timeouts, each call ends with its own; later calls are served."""
    async with storage_at(fragile.url, timeout=SHORT) as storage:
        await recovered(storage)
        fragile.pause()
        async with asyncio.timeout(LONG):
            for _ in range(2):
                calls = [verb(storage, Session(id="x")) for verb in 5 * [*VERBS.values()]]
                ends = await asyncio.gather(*map(outcome, calls))
                assert set(ends) == {StorageUnavailable}

        fragile.resume()
        await recovered(storage)


async def test_slow_server_fails_only_late_calls(
    proxy: FaultProxy, storage: Storage, jump: Jump
) -> None:
    """A call fails at its own deadline, not at that of an earlier call."""
    first, second = await many(storage, 2)
    proxy.stall()
    late = asyncio.create_task(outcome(storage.load(first.id)))
    await turns(3)
    jump(0.6 * LONG)
    in_time = asyncio.create_task(storage.load(second.id))
    await turns(3)
    assert not late.done()
    jump(0.6 * LONG)

    assert await late is StorageUnavailable
    proxy.resume()
    assert await in_time == second


async def test_attempt_to_connect_ends_with_timeout(proxy: FaultProxy, jump: Jump) -> None:
    """An attempt that hangs ends before the deadline of the call, which the next one serves."""
    order = proxy.on_request("*", hold(asyncio.Event()))
    async with storage_at(proxy.url, timeout=5 * LONG) as storage:
        loading = asyncio.create_task(outcome(storage.load("absent")))
        await order.hit.wait()
        jump(4.51 * LONG)

        assert await loading is SessionNotFound
    assert (order.hits, proxy.counts.connections) == (1, 2)


async def late_and_in_time(
    storage: Storage, order: Order, jump: Jump
) -> "tuple[asyncio.Task[Any], asyncio.Task[Any]]":
    """Two loads on a connection, of which the first, hit by a fault, is nearly out of time."""
    late = asyncio.create_task(outcome(storage.load("late")))
    await order.hit.wait()
    jump(0.8 * LONG)
    in_time = asyncio.create_task(outcome(storage.load("in-time")))
    await turns(3)
    return late, in_time


@pytest.mark.parametrize("end_attempt", [replace(b"+OK\r\n"), cut], ids=["made", "fails"])
async def test_stalled_connection_may_answer(
    proxy: FaultProxy,
    storage: Storage,
    jump: Jump,
    caplog: pytest.LogCaptureFixture,
    end_attempt: Fault,
) -> None:
    """If the stalled connection answers before an attempt ends, it serves its callers."""
    released, connected = asyncio.Event(), asyncio.Event()

    async def attempt(exchange: Exchange) -> bytes:
        await connected.wait()
        return await end_attempt(exchange)

    order = proxy.on_reply("GETEX", hold(released))
    late, in_time = await late_and_in_time(storage, order, jump)
    connecting = proxy.on_reply("CLIENT", attempt)
    jump(0.3 * LONG)
    await connecting.hit.wait()
    assert await late is StorageUnavailable
    released.set()

    assert await in_time is SessionNotFound
    connected.set()
    await until(lambda: len(proxy.tunnels) == 1)
    assert await outcome(storage.load("absent")) is SessionNotFound
    assert storage.statistics().reconnects == 0
    assert len(caplog.messages) == 2  # the outage began, and ended with the answer


async def test_stalled_connection_is_replaced(
    proxy: FaultProxy, storage: Storage, jump: Jump
) -> None:
    """If the stalled connection stays silent, a new one serves the commands that wait."""
    order = proxy.on_reply("GETEX", hold(asyncio.Event()))
    late, in_time = await late_and_in_time(storage, order, jump)
    jump(0.3 * LONG)

    assert await late is StorageUnavailable
    assert await in_time is SessionNotFound
    assert storage.statistics().reconnects == 1


async def test_slow_reply_is_not_a_stall(proxy: FaultProxy, storage: Storage, jump: Jump) -> None:
    """While the bytes of a reply arrive, the connection stays, and later replies can follow."""
    more, released = asyncio.Event(), asyncio.Event()

    async def slowly(exchange: Exchange) -> bytes:
        await more.wait()
        exchange.tunnel.say(exchange.message[:1])
        await released.wait()
        return exchange.message[1:]

    late, in_time = await late_and_in_time(storage, proxy.on_reply("GETEX", slowly), jump)
    received = storage.statistics().bytes_received
    more.set()
    await until(lambda: storage.statistics().bytes_received > received)
    jump(0.3 * LONG)
    assert await late is StorageUnavailable
    released.set()

    assert await in_time is SessionNotFound
    assert storage.statistics().reconnects == 0
    assert proxy.counts.connections == 1


async def test_queued_commands_never_reach_a_hanging_server(
    proxy: FaultProxy, storage: Storage, jump: Jump
) -> None:
    """Commands that fail in the queue are not written later, nor do they keep the socket open."""
    proxy.stall()
    large = [Session[Any](id=f"large{n}", data="x" * 1_000_000) for n in range(40)]
    tasks = [asyncio.create_task(outcome(storage.store(each))) for each in large]
    await turns(3)
    jump(LONG)
    assert await asyncio.gather(*tasks) == [StorageUnavailable] * len(large)
    await storage.aclose()

    proxy.resume()
    await until(lambda: not proxy.tunnels)
    assert proxy.counts.requests["EVALSHA"] <= len(large) / 4


# Servers that are down.


@pytest.mark.usefixtures("long_bridge")
async def test_callers_share_spaced_attempts_to_connect(
    proxy: FaultProxy,
    other: Storage,
    jump: Jump,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Hundreds of callers connect as often as one caller would, with a pause each time."""
    for name in ("_FIRST_PAUSE", "_LONGEST_PAUSE"):
        monkeypatch.setattr(_outage, name, LONG / 2)
    there = proxy.target
    with refused_port() as refused:
        proxy.target = refused
        async with storage_at(proxy.url) as storage:
            loads = [asyncio.create_task(outcome(storage.load("absent"))) for _ in range(200)]
            await until(lambda: caplog.messages)
            for _ in range(20):  # takes longer than another attempt would
                await other.ping()
            assert proxy.counts.connections == 1
            proxy.target = there
            jump(LONG / 2)

            assert await asyncio.gather(*loads) == [SessionNotFound] * 200
    assert proxy.counts.connections == 2


@pytest.mark.usefixtures("long_bridge")
async def test_short_outage_is_bridged(proxy: FaultProxy, storage: Storage) -> None:
    """Commands that come in a short outage wait for the next connection, writes included."""
    session, there = await stored(storage), proxy.target
    with refused_port() as refused:
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
    assert storage.statistics().reconnects == 3


async def test_killed_connection_fails_no_call(valkey: Server) -> None:
    """CLIENT KILL of a busy connection is followed by a new one."""
    async with storage_at(valkey.url) as storage:
        sessions = await many(storage, 20)
        with valkey.client() as direct:
            for _ in range(3):
                (own,) = [each for each in direct.client_list() if each["name"] == "aiosessions"]
                direct.client_kill_filter(_id=own["id"])
                await load_all(storage, sessions)


# Servers that send nonsense.


@pytest.mark.parametrize("reply", [b"$5\r\nhello\r\n", b"$-1\r\n", b"-ERR no\r\n", b"?\r\n"])
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


NONSENSE: dict[str, Fault] = {
    "truncated": truncate,
    "garbage": replace(b"garbage\r\n"),
    "negative": replace(b"$-5\r\n"),
    "huge": replace(b"$99999999999999999999\r\n"),
    "wrong-type": replace(b":1\r\n"),
}


@pytest.mark.parametrize("fault", NONSENSE.values(), ids=NONSENSE)
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
    for error in errors:
        assert isinstance(error, StorageUnavailable)
        assert not any(each.id in said_by(error) for each in sessions)
    proxy.forgive()
    await recovered(storage, *sessions)


async def double(exchange: Exchange) -> bytes:
    """Pass a reply on twice."""
    return exchange.message * 2


@pytest.mark.parametrize(
    ("fault", "right", "corrupt"), [(swallow, 3, 6), (double, 4, 6)], ids=["lost", "repeated"]
)
async def test_shifted_replies_are_not_other_sessions(
    proxy: FaultProxy, storage: Storage, jump: Jump, fault: Fault, right: int, corrupt: int
) -> None:
    """If the network loses or repeats a reply, the id inside each record is the last defence."""
    sessions = await many(storage, 10)
    proxy.on_reply("GETEX", fault, first=4)
    loads = [asyncio.create_task(outcome(storage.load(each.id))) for each in sessions]
    shifted = [Session] * right + [CorruptSession] * corrupt

    assert await asyncio.gather(*loads[: len(shifted)]) == shifted
    jump(LONG)
    assert await asyncio.gather(*loads[len(shifted) :]) == [StorageUnavailable] * (
        10 - len(shifted)
    )
    if fault is double:  # the next call must not get the reply that is left over
        while storage.statistics().connected:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.001)
    await recovered(storage, *sessions[:3])


# Servers that refuse.


@pytest.mark.usefixtures("long_bridge")
@pytest.mark.parametrize("name", ["load", "store-always", "store-unchanged", "delete"])
async def test_connection_to_a_replica_is_replaced(fragile: Server, name: str) -> None:
    """After a failover the old master is a replica; its refusal ends the connection only."""
    async with FaultProxy(fragile.port) as proxy:
        async with storage_at(proxy.url) as storage:
            session = await stored(storage)
            await storage.store(session, when=When.UNCHANGED)  # so that the scripts are known
            await storage.delete("absent")
            with fragile.client() as direct, refused_port() as refused:
                direct.replicaof("127.0.0.1", refused)

                async def promote(exchange: Exchange) -> bytes:
                    direct.replicaof("NO", "ONE")
                    return exchange.message

                order = proxy.on_reply("*", promote)
                await VERBS[name](storage, session)
        assert order.hits == 1
        assert proxy.counts.connections == 2
