"""One connection for all callers: shared by them, and closed.

The proxy is between storage and server, to see or to spoil what passes.
"""

import asyncio
import functools
import math
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from aiosessions import (
    Session,
    SessionNotFound,
    StorageClosed,
    StorageUnavailable,
    When,
    new_session_id,
)
from aiosessions.redis import link
from aiosessions.redis.lane import Lane
from tests.calls import (
    LONG,
    SHORT,
    SLACK,
    Storage,
    load_all,
    many,
    our_tasks,
    outcome,
    stored,
    turns,
)
from tests.fault_proxy import (
    Counts,
    Exchange,
    FaultProxy,
    hold,
    replace,
    swallow,
    until,
)
from tests.servers import Server, deaf_port


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


# Sharing.


async def test_a_load_is_one_round_trip(proxy: FaultProxy, storage: Storage) -> None:
    """One command and nothing else, for a caller who is alone."""
    session = await stored(storage)
    proxy.counts = Counts()

    for number in range(1, 4):
        await storage.load(session.id)
        assert proxy.counts.requests == {"GETEX": number}
        assert proxy.counts.round_trips == proxy.counts.chunks == proxy.counts.replies == number


async def test_what_is_asked_for_in_one_turn_leaves_in_one_write(
    proxy: FaultProxy, storage: Storage
) -> None:
    """However many ask, and whatever they ask for."""
    sessions = await many(storage, 100)
    proxy.counts = Counts()

    await load_all(storage, sessions)

    assert proxy.counts.requests == {"GETEX": 100}
    assert proxy.counts.chunks == 1

    await asyncio.gather(*(storage.store(each, when=When.UNCHANGED) for each in sessions))
    proxy.counts = Counts()
    await asyncio.gather(
        *(storage.load(each.id) for each in sessions[:30]),
        *(storage.store(each) for each in sessions[30:60]),
        *(storage.store(each, when=When.UNCHANGED) for each in sessions[60:90]),
    )
    assert proxy.counts.requests == {"GETEX": 30, "SET": 30, "EVALSHA": 30}
    assert proxy.counts.chunks == 1


async def test_half_of_the_callers_go_on_before_the_other_half_is_served(
    valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the server has something to do meanwhile, though all replies came at once."""
    handed_out = 0
    answer = Lane.answer

    def counted(lane: Lane, reply: object) -> None:
        nonlocal handed_out
        handed_out += 1
        answer(lane, reply)

    monkeypatch.setattr(Lane, "answer", counted)
    async with Storage.from_url(valkey.url, ttl=60, timeout=LONG) as storage:
        sessions = await many(storage, 100)
        handed_out = 0

        async def load(session: Session[Any]) -> int:
            await storage.load(session.id)
            return handed_out

        before = await asyncio.gather(*map(load, sessions))

    assert before[0] <= 50
    assert before[-1] == 100


async def test_a_storage_has_one_connection(valkey: Server) -> None:
    """However many callers there are, from the first moment on."""
    with valkey.client() as direct:
        before = {each["id"] for each in direct.client_list()}
        async with Storage.from_url(valkey.url, ttl=60) as storage:
            await load_all(storage, await many(storage, 300))

            new = [each for each in direct.client_list() if each["id"] not in before]
            assert [each["name"] for each in new] == ["aiosessions"]

        await until(lambda: {each["id"] for each in direct.client_list()} <= before)


async def test_nothing_connects_before_it_is_needed(proxy: FaultProxy) -> None:
    """Nor ever, if it is not."""
    async with Storage.from_url(proxy.url, ttl=60):
        await turns(5)
        assert our_tasks() == []
    assert proxy.counts.connections == 0


# Cancelling.


@pytest.mark.parametrize("after", range(12))
async def test_cancelling_a_caller_disturbs_nobody(proxy: FaultProxy, after: int) -> None:
    """At whichever turn of the event loop, from before there is a connection on."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        for _ in range(2):  # on a new connection, and on that one
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
            assert [each.id for each in await asyncio.gather(*loads[::2])] == [
                each.id for each in sessions[::4]
            ]


async def test_a_caller_who_is_cancelled_while_connecting_is_never_heard_of(
    proxy: FaultProxy,
) -> None:
    """The others are served by that very connection."""
    handshake, released = asyncio.Event(), asyncio.Event()

    async def slowly(exchange: Exchange) -> bytes:
        handshake.set()
        return await hold(released)(exchange)

    proxy.on_request("*", slowly)
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        tasks = [asyncio.create_task(outcome(storage.load(f"id{n}"))) for n in range(10)]
        await handshake.wait()
        for task in tasks[::2]:
            task.cancel()
        released.set()

        assert await asyncio.gather(*tasks[1::2]) == [SessionNotFound] * 5
    assert proxy.counts.connections == 1
    assert proxy.counts.requests["GETEX"] == 5


async def test_a_caller_who_is_cancelled_under_way_takes_no_reply_with_it(
    proxy: FaultProxy, storage: Storage
) -> None:
    """Its reply is dropped when it comes; the next ones are the others'."""
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

    assert [each.id for each in await asyncio.gather(*tasks[1::2])] == [
        each.id for each in sessions[1::2]
    ]
    await more
    assert proxy.counts.connections == 1


@pytest.mark.parametrize("after", range(4))
async def test_cancelling_every_task_crosses_no_replies(
    proxy: FaultProxy, storage: Storage, after: int
) -> None:
    """As an application does that ends in a hurry, and then still cleans up its sessions."""
    first, second, third = await many(storage, 3)
    released = asyncio.Event()
    order = proxy.on_reply("GETEX", hold(released))
    loading = asyncio.create_task(storage.load(first.id))
    if after:
        await order.hit.wait()
        await turns(after)
    for task in asyncio.all_tasks():
        if task is loading or task.get_name().startswith("aiosessions"):
            task.cancel()
    await asyncio.wait([loading])
    await turns(after)
    released.set()

    cleaning = asyncio.gather(storage.load(second.id), storage.delete(third.id))
    loaded, existed = await asyncio.wait_for(cleaning, SHORT + SLACK)

    assert (loaded.id, existed) == (second.id, True)


async def test_cancelling_every_task_before_the_first_connection_is_survived(
    proxy: FaultProxy,
) -> None:
    """Also when the task that was to connect had not even begun."""
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        loading = asyncio.create_task(storage.load("nobody"))
        await turns(1)
        assert our_tasks() == ["aiosessions: connection"]
        for task in asyncio.all_tasks():
            if task is loading or task.get_name().startswith("aiosessions"):
                task.cancel()
        await asyncio.wait([loading])

        again = asyncio.wait_for(storage.load("nobody"), SHORT + SLACK)
        assert await outcome(again) is SessionNotFound


# Room.


async def test_what_is_under_way_is_bounded(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In number, whatever thousands of callers want; they wait, and all are served."""
    monkeypatch.setattr(link, "Lane", functools.partial(Lane, max_commands=16, batch_bytes=2_000))
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        sessions = await many(storage, 3_000)
        await load_all(storage, sessions)
    assert 8 <= proxy.counts.most_under_way <= 16


async def test_large_records_are_under_way_a_few_at_a_time(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their bytes, to the server and back; small ones pass between them."""
    monkeypatch.setattr(link, "Lane", functools.partial(Lane, max_bytes=500_000))
    async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
        large = await many(storage, 60, data="x" * 100_000)
        assert proxy.counts.most_under_way <= 5
        await load_all(storage, large)  # by now it is known how large replies are
        proxy.counts = Counts()
        small = await many(storage, 200)
        await load_all(storage, [*large, *small])
        assert proxy.counts.connections == 0


async def test_a_large_record_passes_among_small_ones(storage: Storage) -> None:
    """And they among its like."""
    large = await many(storage, 3, data="x" * 1_000_000)
    small = await many(storage, 200, data="y")
    sessions = [*large, *small, *large]
    random.Random(1).shuffle(sessions)  # noqa: S311 - the same every time
    await load_all(storage, sessions)


# Closing.


async def test_closing_fails_whoever_waits(proxy: FaultProxy, storage: Storage) -> None:
    """With `StorageClosed`, queued or under way, each with an error of its own; at once."""
    order = proxy.on_reply("GETEX", swallow, times=math.inf)
    under_way = [asyncio.create_task(storage.load(f"id{n}")) for n in range(5)]
    await order.hit.wait()
    queued = [asyncio.create_task(storage.load(f"id{n}")) for n in range(5)]
    await turns(1)

    await storage.aclose()

    errors = await asyncio.gather(*under_way, *queued, return_exceptions=True)
    assert {type(error) for error in errors} == {StorageClosed}
    assert len({id(error) for error in errors}) == 10
    assert not any(error.__cause__ is error for error in errors if isinstance(error, StorageClosed))
    assert our_tasks() == []
    with pytest.raises(StorageClosed):
        await storage.load("nobody")


async def test_closing_while_it_connects_leaves_nothing(proxy: FaultProxy) -> None:
    """No task, no connection."""
    order = proxy.on_request("*", hold(asyncio.Event()))
    storage = Storage.from_url(proxy.url, ttl=60, timeout=LONG)
    waiting = asyncio.create_task(outcome(storage.load("nobody")))
    await order.hit.wait()

    await storage.aclose()

    assert await waiting is StorageClosed
    assert our_tasks() == []
    proxy.stall()
    proxy.cut()
    await until(lambda: not proxy.tunnels)


@pytest.mark.parametrize("after", range(10))
async def test_closing_while_a_connection_is_replaced_leaves_nothing(
    proxy: FaultProxy, valkey: Server, after: int
) -> None:
    """At whichever turn of the event loop: no task, no connection, no warning about either."""
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
        for each in await asyncio.gather(*waiting):
            assert each in (StorageClosed, SessionNotFound)
        await until(lambda: {each["id"] for each in direct.client_list()} <= before)
    await until(lambda: not proxy.tunnels)


async def test_closing_twice_at_once_is_fine(storage: Storage) -> None:
    """Both return when it is closed."""
    await asyncio.gather(storage.aclose(), storage.aclose())
    assert our_tasks() == []


async def test_errors_of_the_driver_are_chained(proxy: FaultProxy) -> None:
    """So that whoever looks for the cause finds it."""
    with deaf_port() as nobody:
        proxy.target = nobody
        async with Storage.from_url(proxy.url, ttl=60, timeout=LONG) as storage:
            with pytest.raises(StorageUnavailable) as raised:
                await storage.load("nobody")
    assert isinstance(raised.value.__cause__, RedisConnectionError)
