"""The shared connection: batches, cancelled callers, bounds, contexts and closing.

The proxy between the storage and the server counts, holds and spoils messages.
"""

import asyncio
import contextvars
import functools
import gc
import math
import random
import weakref
from typing import Any

import pytest
from redis.asyncio import Redis

from aiosessions import (
    CorruptSession,
    Session,
    SessionNotFound,
    StorageClosed,
    StorageUnavailable,
    When,
    new_session_id,
)
from aiosessions.redis import _connection
from aiosessions.redis._channel import Channel
from aiosessions.redis._commands import INFO, Command
from aiosessions.redis._connection import Connection
from aiosessions.redis._driver import connection_factory
from aiosessions.redis._errors import reason
from aiosessions.redis._pipeline import Pipeline
from tests.support.clients import LONG, Storage, load_all, many, our_tasks, outcome, stored, turns
from tests.support.proxy import Counts, FaultProxy, hold, replace, swallow, until
from tests.support.servers import Server, refused_port

pytestmark = pytest.mark.every_loop


def bound(monkeypatch: pytest.MonkeyPatch, **bounds: int) -> None:
    """Let the next connections have other bounds."""
    monkeypatch.setattr(_connection, "Pipeline", functools.partial(Pipeline, **bounds))


def bytes_in_memory() -> int:
    """The bytes of the payloads of all commands that exist."""
    return sum(len(each.payload) for each in gc.get_objects() if isinstance(each, Command))


# Batches.


async def test_concurrent_commands_leave_in_few_writes(proxy: FaultProxy, storage: Storage) -> None:
    """Commands of any kind that come in one turn of the event loop are written together."""
    sessions = await many(storage, 90)
    await storage.store(sessions[0], when=When.UNCHANGED)  # so that the server knows the script
    proxy.counts = Counts()

    await asyncio.gather(
        *(storage.load(each.id) for each in sessions[:30]),
        *(storage.store(each) for each in sessions[30:60]),
        *(storage.store(each, when=When.UNCHANGED) for each in sessions[60:]),
    )

    assert proxy.counts.requests == {"GETEX": 30, "SET": 30, "EVALSHA": 30}
    assert proxy.counts.chunks <= 5


async def test_second_connection_passes_a_held_reply(proxy: FaultProxy) -> None:
    """With two connections, a load does not wait behind the reply to another load."""
    released = asyncio.Event()
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG, connections=2) as storage:
        first, second = await many(storage, 2)
        order = proxy.on_reply("GETEX", hold(released))
        held = asyncio.create_task(storage.load(first.id))
        await order.hit.wait()

        assert await storage.load(second.id) == second
        assert not held.done()
        released.set()
        assert await held == first


async def test_large_and_small_records_mix(storage: Storage) -> None:
    """Concurrent loads of large and small records return the right sessions."""
    large = await many(storage, 3, data="x" * 1_000_000)
    small = await many(storage, 200, data="y")
    sessions = [*large, *small, *large]
    random.Random(1).shuffle(sessions)  # noqa: S311 - the same order in every run
    await load_all(storage, sessions)


async def test_statistics_count_commands_and_bytes(proxy: FaultProxy, storage: Storage) -> None:
    """`statistics` counts connections, commands, and bytes in both directions."""
    before = storage.statistics()
    released = asyncio.Event()
    order = proxy.on_reply("GETEX", hold(released))
    first = asyncio.create_task(outcome(storage.load("first")))
    await order.hit.wait()
    during = storage.statistics()
    assert (during.connected, during.queued, during.in_flight) == (1, 0, 1)
    released.set()
    assert await first is SessionNotFound

    after = storage.statistics()
    assert (after.connected, after.queued, after.in_flight, after.reconnects) == (1, 0, 0, 0)
    assert after.bytes_sent - before.bytes_sent == proxy.counts.bytes_in
    assert after.bytes_received - before.bytes_received == proxy.counts.bytes_out


# Sockets, in the place of which a fake transport stands.


class FakeTransport:
    """A transport that keeps its data."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Keep the data."""
        self.written.append(data)

    def abort(self) -> None:
        """Do nothing."""


@pytest.fixture
def channels(monkeypatch: pytest.MonkeyPatch) -> list[Channel]:
    """The sockets that connections open from now on, each with a fake transport."""
    channels: list[Channel] = []

    async def open_connection(_connection: object, channel: Channel, _: float) -> FakeTransport:
        channels.append(channel)
        return FakeTransport()

    monkeypatch.setattr(_connection, "open_connection", open_connection)
    return channels


def commands_written(channel: Channel) -> int:
    """The number of commands that were written to a socket."""
    assert isinstance(channel.transport, FakeTransport)
    return b"".join(channel.transport.written).count(b"GETEX")


async def test_burst_leaves_in_two_writes(channels: list[Channel]) -> None:
    """On an idle connection the first command leaves at once, and the others together.

    After a batch of replies, half of the next commands leave at once, and the others together.
    """
    async with Storage.from_url("redis://localhost", ttl=60, timeout=LONG) as storage:

        async def load(number: int) -> list[int]:
            """Load so many sessions at once; return the commands of each write."""
            tasks = [asyncio.create_task(outcome(storage.load("absent"))) for _ in range(number)]
            await until(lambda: channels and commands_written(channels[0]) == number)
            transport = channels[0].transport
            assert isinstance(transport, FakeTransport)
            sizes = [each.count(b"GETEX") for each in transport.written]
            transport.written.clear()
            channels[0].data_received(b"$-1\r\n" * number)
            assert await asyncio.gather(*tasks) == [SessionNotFound] * number
            return sizes

        small = asyncio.create_task(outcome(storage.load("small")))
        await until(lambda: channels and commands_written(channels[0]) == 1)
        channels[0].data_received(b"$5\r\nsmall\r\n")  # from now on, many fit into flight
        assert await small is CorruptSession
        assert isinstance(channels[0].transport, FakeTransport)
        channels[0].transport.written.clear()

        assert await load(100) == [1, 99]
        assert await load(100) == [50, 50]
        assert await load(1) == [1]
        assert await load(100) == [1, 99]


async def test_full_socket_holds_back_commands(channels: list[Channel]) -> None:
    """While the transport's buffer is full, commands wait in the queue."""
    async with Storage.from_url("redis://localhost", ttl=60, timeout=LONG) as storage:
        tasks = [asyncio.create_task(outcome(storage.load("first")))]
        await until(lambda: channels and commands_written(channels[0]) == 1)
        channels[0].pause_writing()
        tasks += [asyncio.create_task(outcome(storage.load("second")))]
        await turns(5)
        assert (commands_written(channels[0]), storage.statistics().queued) == (1, 1)
        channels[0].data_received(b"$-1\r\n")
        await turns(5)
        assert (commands_written(channels[0]), storage.statistics().queued) == (1, 1)

        channels[0].resume_writing()
        assert commands_written(channels[0]) == 2
        channels[0].data_received(b"$-1\r\n")
        assert await asyncio.gather(*tasks) == [SessionNotFound] * 2


async def test_replaced_socket_is_ignored(channels: list[Channel]) -> None:
    """After a socket was replaced, its replies and its end do not matter."""
    async with Storage.from_url("redis://localhost", ttl=60, timeout=LONG) as storage:
        loading = asyncio.create_task(outcome(storage.load("absent")))
        await until(lambda: channels and commands_written(channels[0]) == 1)
        channels[0].connection_lost(None)
        await until(lambda: len(channels) == 2 and commands_written(channels[1]) == 1)
        channels[0].data_received(b"$5\r\nstale\r\n")
        channels[0].pause_writing()
        channels[0].connection_lost(ConnectionResetError())
        more = asyncio.create_task(outcome(storage.load("absent")))
        await until(lambda: commands_written(channels[1]) == 2)
        assert not loading.done()

        channels[1].data_received(b"$-1\r\n$-1\r\n")
        assert set(await asyncio.gather(loading, more)) == {SessionNotFound}
        assert storage.statistics().reconnects == 1


# Cancelled callers.


@pytest.mark.parametrize("after", range(8))
async def test_cancelled_callers_disturb_no_other(proxy: FaultProxy, after: int) -> None:
    """Callers may be cancelled in any turn of the event loop, also before the connection."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        for _ in range(2):  # without a connection, and with one
            sessions = [Session[Any](id=new_session_id(), data=number) for number in range(10)]
            tasks = [asyncio.create_task(storage.store(session)) for session in sessions]
            await turns(after)
            for task in tasks[1::2]:
                task.cancel()
            await asyncio.gather(*tasks[::2])

            await load_all(storage, sessions[::2])

            loads = [asyncio.create_task(storage.load(each.id)) for each in sessions[::2]]
            await turns(after)
            for load in loads[1::2]:
                load.cancel()
            assert await asyncio.gather(*loads[::2]) == sessions[::4]


async def test_command_cancelled_while_connecting_is_not_sent(proxy: FaultProxy) -> None:
    """The connection serves the other callers, and the server never sees the command."""
    released = asyncio.Event()
    handshake = proxy.on_request("*", hold(released))
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        tasks = [asyncio.create_task(outcome(storage.load(f"id{n}"))) for n in range(10)]
        await handshake.hit.wait()
        for task in tasks[::2]:
            task.cancel()
        released.set()

        assert await asyncio.gather(*tasks[1::2]) == [SessionNotFound] * 5
    assert proxy.counts.connections == 1
    assert proxy.counts.requests["GETEX"] == 5


async def test_reply_to_cancelled_caller_is_dropped(proxy: FaultProxy, storage: Storage) -> None:
    """The replies after it go to their own callers, on the same connection."""
    sessions = await many(storage, 10)
    released = asyncio.Event()
    order = proxy.on_reply("GETEX", hold(released))
    tasks = [asyncio.create_task(storage.load(each.id)) for each in sessions]
    await order.hit.wait()
    for task in tasks[::2]:
        task.cancel()
    await asyncio.wait(tasks[::2])
    more = asyncio.create_task(load_all(storage, sessions))
    released.set()

    assert await asyncio.gather(*tasks[1::2]) == sessions[1::2]
    await more
    assert proxy.counts.connections == 1


@pytest.mark.parametrize("after", range(4))
async def test_storage_survives_cancelled_tasks(
    proxy: FaultProxy, storage: Storage, after: int
) -> None:
    """A shutdown helper may cancel every task; the clean-up afterwards still uses the storage."""
    first, second, third = await many(storage, 3)
    released = asyncio.Event()
    order = proxy.on_reply("GETEX", hold(released))
    loading = asyncio.create_task(storage.load(first.id))
    if after:
        await order.hit.wait()
        await turns(after)
    cancel_tasks(loading)
    await asyncio.wait([loading])
    await turns(after)
    released.set()

    loaded, existed = await asyncio.gather(storage.load(second.id), storage.delete(third.id))

    assert (loaded, existed) == (second, True)


@pytest.mark.parametrize("after", range(4))
async def test_storage_survives_cancelled_connecting(proxy: FaultProxy, after: int) -> None:
    """A shutdown helper may cancel the task that connects, at any turn."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        loading = asyncio.create_task(outcome(storage.load("absent")))
        await turns(1)
        assert our_tasks() == ["aiosessions: connection"]
        await turns(after)
        cancel_tasks()

        assert await loading is SessionNotFound


def cancel_tasks(*others: asyncio.Task[Any]) -> None:
    """Cancel the tasks of the storage and others, as a shutdown helper does."""
    for task in asyncio.all_tasks():
        if task in others or task.get_name().startswith("aiosessions"):
            task.cancel()


# Contexts.


class Request:
    """An object of one caller, such as the request that it serves."""


REQUEST: contextvars.ContextVar[Request] = contextvars.ContextVar("request")


async def test_connection_keeps_no_context_of_a_caller(proxy: FaultProxy) -> None:
    """The task, timers and transport of the connection run in an empty context."""

    async def serve(storage: Storage) -> "weakref.ref[Request]":
        request = Request()
        REQUEST.set(request)
        await stored(storage)
        return weakref.ref(request)

    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        for _ in range(2):  # the first caller connects
            request = await asyncio.create_task(serve(storage))
            await turns(1)
            gc.collect()
            assert request() is None
        assert storage.statistics().connected == 1


# Bounds.


async def test_commands_in_flight_are_bounded(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of callers share the room in flight, and all are served."""
    bound(monkeypatch, max_in_flight=16, batch_bytes=2_000)
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        await load_all(storage, await many(storage, 1_000))
    assert 8 <= proxy.counts.most_in_flight <= 16


async def test_bytes_of_replies_in_flight_are_bounded(proxy: FaultProxy, valkey: Server) -> None:
    """The replies that a server holds for the client stay small, even of the first loads."""
    async with Storage.from_url(valkey.url, ttl=60, timeout=LONG) as direct:
        large = await many(direct, 40, data="x" * 1_000_000)
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        await load_all(storage, large)
        assert proxy.counts.most_in_flight <= 16  # nothing is known of the sizes
        proxy.counts = Counts()
        await load_all(storage, large)
        assert proxy.counts.most_in_flight <= 4


async def test_full_queue_refuses_commands_at_once(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command beyond the bound fails without a doubt; the others are served."""
    bound(monkeypatch, max_queued=10, max_in_flight=5)
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        await stored(storage)
        proxy.stall()
        tasks = [asyncio.create_task(stored(storage)) for _ in range(30)]
        refused, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        proxy.resume()
        await load_all(storage, await asyncio.gather(*waiting))

    assert 10 <= len(waiting) <= 15
    for task in refused:
        with pytest.raises(StorageUnavailable, match="too many commands wait") as raised:
            task.result()
        assert not raised.value.in_doubt


async def test_cancelled_commands_release_their_payloads(
    proxy: FaultProxy, storage: Storage
) -> None:
    """Impatient callers fill no memory while the socket takes nothing."""
    before = bytes_in_memory()
    proxy.stall()
    for _ in range(3):
        sessions = [Session[Any](id=new_session_id(), data="x" * 50_000) for _ in range(300)]
        tasks = [asyncio.create_task(storage.store(session)) for session in sessions]
        await turns(3)
        assert storage.statistics().queued > 100
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

        assert storage.statistics().queued == 0
        assert bytes_in_memory() <= before
    proxy.resume()
    await load_all(storage, await many(storage, 3))


# Closing.


async def test_closing_fails_waiting_callers(proxy: FaultProxy, storage: Storage) -> None:
    """Callers of queued commands and of those in flight get `StorageClosed` at once."""
    order = proxy.on_reply("GETEX", swallow, times=math.inf)
    tasks = [asyncio.create_task(storage.load(f"id{n}")) for n in range(5)]
    await order.hit.wait()
    tasks += [asyncio.create_task(storage.load(f"id{n}")) for n in range(5)]
    await turns(1)

    await storage.aclose()

    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(error) for error in errors} == {StorageClosed}
    assert len({id(error) for error in errors}) == 10
    assert our_tasks() == []


@pytest.mark.parametrize("after", range(4))
async def test_closing_while_connecting_leaves_nothing(proxy: FaultProxy, after: int) -> None:
    """The storage may be closed at any turn of the handshake."""
    handshake = proxy.on_request("*", hold(asyncio.Event()))
    storage = Storage.from_url(proxy.url, ttl=60, timeout=LONG)
    waiting = asyncio.create_task(outcome(storage.load("absent")))
    await handshake.hit.wait() if after == 3 else await turns(after)

    await storage.aclose()

    assert await waiting is StorageClosed
    assert our_tasks() == []
    proxy.forgive()
    proxy.cut()
    await until(lambda: not proxy.tunnels)


@pytest.mark.parametrize("after", range(8))
async def test_closing_while_reconnecting_leaves_nothing(
    proxy: FaultProxy, valkey: Server, after: int
) -> None:
    """The storage may be closed at any turn in which a connection is replaced."""
    with valkey.client() as direct:
        before = {each["id"] for each in direct.client_list()}
        storage = Storage.from_url(proxy.url, ttl=60, timeout=LONG)
        await stored(storage)
        waiting = [asyncio.create_task(outcome(storage.load(f"id{n}"))) for n in range(3)]
        order = proxy.on_reply("GETEX", replace(b"garbage\r\n"))
        await order.hit.wait()
        await turns(after)

        await storage.aclose()

        assert our_tasks() == []
        assert set(await asyncio.gather(*waiting)) <= {StorageClosed, SessionNotFound}
        await until(lambda: {each["id"] for each in direct.client_list()} <= before)
    await until(lambda: not proxy.tunnels)


async def test_concurrent_closing_is_fine(storage: Storage) -> None:
    """Both calls of `aclose` return when the storage is closed."""
    await asyncio.gather(storage.aclose(), storage.aclose())
    assert our_tasks() == []


async def test_closed_storage_leaves_no_objects(proxy: FaultProxy) -> None:
    """After `aclose`, no timer, callback or task holds a part of the connection."""
    parts = (_connection.Connection, Channel, Pipeline, Command)
    before = {id(each) for each in gc.get_objects() if isinstance(each, parts)}
    storage = Storage.from_url(proxy.url, ttl=60, timeout=LONG)
    order = proxy.on_reply("GETEX", swallow)
    session = await stored(storage)
    waiting = asyncio.create_task(outcome(storage.load(session.id)))
    await order.hit.wait()
    await storage.aclose()
    assert await waiting is StorageClosed
    del storage, waiting
    await turns(3)
    gc.collect()

    after = [each for each in gc.get_objects() if isinstance(each, parts)]
    assert [each for each in after if id(each) not in before] == []


# The supervising task.


async def test_command_at_the_end_of_the_task_waits() -> None:
    """The task was not cancelled, so the reason of the outage stays the same."""
    loop = asyncio.get_running_loop()
    with refused_port() as port:
        late = INFO.fill(loop.time() + 0.3)
        reasons: set[str] = set()
        scheduled: list[asyncio.Handle] = []

        def on_outage() -> None:
            reasons.add(reason(connection.outage.error))
            if not connection.pipeline.waiting and not scheduled:
                # Runs after the task has ended, and before its callbacks.
                scheduled.append(loop.call_soon(connection.send, late))

        factory = connection_factory(Redis(port=port))
        connection = Connection(factory, 0.3, on_outage, ("127.0.0.1", port))
        first = INFO.fill(loop.time() + 0.05)
        connection.send(first)
        await first.future
        await until(lambda: scheduled)
        await asyncio.sleep(0)
        await late.future
        await connection.aclose()

    assert reasons == {"cannot connect: Connection refused"}
