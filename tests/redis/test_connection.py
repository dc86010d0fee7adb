"""The shared connection: batches, cancelled callers, bounds, contexts and closing.

The proxy between the storage and the server counts, holds and spoils messages.
"""

import asyncio
import contextvars
import functools
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from aiosessions import (
    CorruptSession,
    SessionNotFound,
    StorageClosed,
    StorageUnavailable,
)
from aiosessions.redis import _connection
from aiosessions.redis._channel import Channel
from aiosessions.redis._commands import INFO, Command
from aiosessions.redis._connection import Connection
from aiosessions.redis._driver import connection_factory
from aiosessions.redis._errors import reason
from aiosessions.redis._pipeline import Pipeline
from tests.support.clients import (
    LONG,
    Storage,
    load_all,
    many,
    our_tasks,
    outcome,
    storage_at,
    stored,
    turns,
)
from tests.support.proxy import FaultProxy, hold, replace, swallow, until
from tests.support.servers import refused_port

pytestmark = pytest.mark.every_loop


# Batches.


async def test_second_connection_passes_a_held_reply(proxy: FaultProxy) -> None:
    """With two connections, a load does not wait behind the reply to another load."""
    released = asyncio.Event()
    async with storage_at(proxy.url, connections=2) as storage:
        first, second = await many(storage, 2)
        order = proxy.on_reply("GETEX", hold(released))
        held = asyncio.create_task(storage.load(first.id))
        await order.hit.wait()

        assert await storage.load(second.id) == second
        assert not held.done()
        released.set()
        assert await held == first


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


async def test_full_buffer_is_not_an_outage(channels: list[Channel]) -> None:
    """After an outage, commands wait for room in the transport of the new connection."""
    async with storage_at("redis://localhost") as storage:
        load = asyncio.create_task(outcome(storage.load("absent")))
        await until(lambda: channels and commands_written(channels[0]) == 1)
        connection: Any = channels[0]._owner
        connection.outage.begin(TimeoutError(), asyncio.get_running_loop().time() - LONG)
        channels[0].pause_writing()

        later = asyncio.create_task(outcome(storage.load("absent")))
        await turns(3)
        assert not later.done()
        channels[0].resume_writing()
        await until(lambda: commands_written(channels[0]) == 2)
        channels[0].data_received(b"$-1\r\n" * 2)
        assert [await load, await later] == [SessionNotFound] * 2


async def test_burst_leaves_in_two_writes(channels: list[Channel]) -> None:
    """On an idle connection the first command leaves at once, and the others together.

    After a batch of replies, half of the next commands leave at once, and the others together.
    """
    async with storage_at("redis://localhost") as storage:

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
    async with storage_at("redis://localhost") as storage:
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
    async with storage_at("redis://localhost") as storage:
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


async def test_command_cancelled_while_connecting_is_not_sent(proxy: FaultProxy) -> None:
    """The connection serves the other callers, and the server never sees the command."""
    released = asyncio.Event()
    handshake = proxy.on_request("*", hold(released))
    async with storage_at(proxy.url) as storage:
        tasks = [asyncio.create_task(outcome(storage.load(f"id{n}"))) for n in range(10)]
        await handshake.hit.wait()
        for task in tasks[::2]:
            task.cancel()
        released.set()

        assert await asyncio.gather(*tasks[1::2]) == [SessionNotFound] * 5
    assert proxy.counts.connections == 1
    assert proxy.counts.requests["GETEX"] == 5


def cancel_our_tasks() -> None:
    """Cancel the tasks of the storage, as a shutdown helper that cancels every task does."""
    for task in asyncio.all_tasks():
        if task.get_name().startswith("aiosessions"):
            task.cancel()


async def test_storage_survives_cancelled_tasks(proxy: FaultProxy, storage: Storage) -> None:
    """Commands in flight are sent again, and the clean-up of an application can go on."""
    first, second = await many(storage, 2)
    order = proxy.on_reply("GETEX", hold(asyncio.Event()))
    loading = asyncio.create_task(storage.load(first.id))
    await order.hit.wait()
    cancel_our_tasks()

    assert await loading == first
    assert await storage.delete(second.id) is True


@pytest.mark.parametrize("after", range(4))
async def test_storage_survives_cancelled_connecting(proxy: FaultProxy, after: int) -> None:
    """The task that connects may be cancelled at any turn."""
    async with storage_at(proxy.url) as storage:
        loading = asyncio.create_task(outcome(storage.load("absent")))
        await turns(1)
        assert our_tasks() == ["aiosessions: connection"]
        await turns(after)
        cancel_our_tasks()

        assert await loading is SessionNotFound


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

    async with storage_at(proxy.url) as storage:
        for _ in range(2):  # the first caller connects
            request = await asyncio.create_task(serve(storage))
            await turns(1)
            gc.collect()
            assert request() is None
        assert storage.statistics().connected == 1


# Bounds.


async def test_full_queue_refuses_commands_at_once(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command beyond the bound fails without a doubt; the others are served."""
    few = functools.partial(Pipeline, max_queued=10, max_in_flight=5)
    monkeypatch.setattr(_connection, "Pipeline", few)
    async with storage_at(proxy.url) as storage:
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
    storage = storage_at(proxy.url)
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
    proxy: FaultProxy, new_connections: Callable[[], set[str]], after: int
) -> None:
    """The storage may be closed at any turn in which a connection is replaced."""
    storage = storage_at(proxy.url)
    await stored(storage)
    waiting = [asyncio.create_task(outcome(storage.load(f"id{n}"))) for n in range(3)]
    order = proxy.on_reply("GETEX", replace(b"garbage\r\n"))
    await order.hit.wait()
    await turns(after)

    await storage.aclose()

    assert our_tasks() == []
    assert set(await asyncio.gather(*waiting)) <= {StorageClosed, SessionNotFound}
    await until(lambda: not new_connections() and not proxy.tunnels)


async def test_concurrent_closing_is_fine(storage: Storage) -> None:
    """Both calls of `aclose` return when the storage is closed."""
    await asyncio.gather(storage.aclose(), storage.aclose())
    assert our_tasks() == []


async def test_closed_storage_leaves_no_objects(proxy: FaultProxy) -> None:
    """After `aclose`, no timer, callback or task holds a part of the connection."""
    parts = (_connection.Connection, Channel, Pipeline, Command)
    before = {id(each) for each in gc.get_objects() if isinstance(each, parts)}
    storage = storage_at(proxy.url)
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
        connection = Connection(factory, LONG, on_outage, ("127.0.0.1", port), on_outage)
        first = INFO.fill(loop.time() + 0.05)
        connection.send(first)
        await first.future
        await until(lambda: scheduled)
        await asyncio.sleep(0)
        await late.future
        await connection.aclose()

    assert reasons == {"cannot connect: Connection refused"}
