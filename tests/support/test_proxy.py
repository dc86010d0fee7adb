"""The fault proxy, on which tests of faults rely."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse

from tests.support.proxy import (
    Counts,
    Exchange,
    FaultProxy,
    Framer,
    cut,
    delay,
    hold,
    replace,
    reset,
    swallow,
    truncate,
    until,
)
from tests.support.servers import Server, refused_port

# Every type: nested, empty, null, and with attributes.
_VALUES = [
    b"+OK\r\n",
    b"-ERR no\r\n",
    b":-12\r\n",
    b"$5\r\nh\r\nlo\r\n",
    b"$0\r\n\r\n",
    b"$-1\r\n",
    b"*-1\r\n",
    b"*0\r\n",
    b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$2\r\n\r\n\r\n",
    b"*2\r\n*2\r\n:1\r\n*0\r\n*1\r\n*1\r\n$1\r\n*\r\n",
    b"_\r\n",
    b"#t\r\n",
    b",1.5e3\r\n",
    b"(3492890328409238509324850943850943825024385\r\n",
    b"!5\r\nERR x\r\n",
    b"=7\r\ntxt:abc\r\n",
    b"%2\r\n+a\r\n*1\r\n:1\r\n+b\r\n%1\r\n:1\r\n_\r\n",
    b"~2\r\n+a\r\n%0\r\n",
    b">2\r\n+invalidate\r\n*1\r\n$1\r\na\r\n",
    b"|1\r\n+ttl\r\n:3600\r\n*1\r\n|1\r\n+a\r\n:1\r\n$1\r\nx\r\n",
]


def connect(proxy: FaultProxy, *, protocol: int = 3) -> Any:  # parts of redis-py are untyped
    """A client that connects at its first command."""
    return Redis.from_url(proxy.url, max_connections=1, protocol=protocol)


@asynccontextmanager
async def client(proxy: FaultProxy) -> AsyncIterator[Any]:
    """A client with one open connection through the proxy. Its handshake is not counted."""
    async with connect(proxy, protocol=2) as redis:
        await redis.ping()
        proxy.counts = Counts()
        yield redis


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, math.inf], ids=str)
def test_framer_cuts_stream_into_values(step: float) -> None:
    """The framer finds values of every type, in chunks of any size."""
    stream = b"".join(_VALUES)
    size = min(len(stream), int(min(step, 10_000)))
    framer = Framer()

    values = [
        value
        for start in range(0, len(stream), size)
        for value in framer.feed(stream[start : start + size])
    ]

    assert values == _VALUES


@pytest.mark.parametrize("value", _VALUES)
def test_framer_waits_for_last_byte(value: bytes) -> None:
    """The framer returns a value only when its last byte has come."""
    framer = Framer()

    assert framer.feed(value[:-1]) == []
    assert framer.feed(value[-1:]) == [value]


def test_framer_refuses_other_protocols() -> None:
    """A stream that is not RESP is an error, because faults would hit at random."""
    with pytest.raises(ValueError, match="no type"):
        Framer().feed(b"GET key\r\n")


async def test_messages_pass_unchanged(proxy: FaultProxy) -> None:
    """Single, pipelined, large and nested messages pass, in RESP2 and RESP3."""
    for protocol in (2, 3):
        async with connect(proxy, protocol=protocol) as redis:
            large = b"x\r\n" * 400_000
            assert await redis.set("large", large) is True
            assert await redis.get("large") == large
            assert await redis.eval("return {1,{2,{'three',false}},{}}", 0) == [
                1,
                [2, [b"three", None]],
                [],
            ]
            assert (await redis.config_get("maxmemory")) == {"maxmemory": "0"}
            async with redis.pipeline(transaction=False) as pipe:
                for number in range(100):
                    pipe.set(f"key{number}", number).get(f"key{number}")
                replies = await pipe.execute()
            assert replies[1::2] == [str(number).encode() for number in range(100)]
    assert proxy.counts.requests["GET"] == 2 * 101


async def test_proxy_counts_messages(proxy: FaultProxy) -> None:
    """The proxy counts requests by name, replies, bytes and round trips."""
    async with client(proxy) as redis:
        await redis.set("a", 1)
        await redis.set("b", 2)
        async with redis.pipeline(transaction=False) as pipe:
            await pipe.get("a").get("b").get("c").execute()

        counts = proxy.counts

    assert counts.requests == {"SET": 2, "GET": 3}
    assert counts.replies == 5
    assert (counts.round_trips, counts.chunks, counts.most_in_flight) == (3, 3, 3)
    assert counts.bytes_in == 2 * len(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\n1\r\n") + 3 * len(
        b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n"
    )
    assert counts.bytes_out == len(b"+OK\r\n" * 2 + b"$1\r\n1\r\n" * 2 + b"$-1\r\n")


async def test_proxy_counts_connections(proxy: FaultProxy) -> None:
    """The proxy counts all connections, and lists the open ones."""
    for _ in range(2):
        async with client(proxy):
            assert len(proxy.tunnels) == 1
    async with client(proxy), client(proxy):
        proxy.counts.connections += 3  # `client` has reset the counts
        assert len(proxy.tunnels) == 2
    assert proxy.counts.connections == 3


async def test_cut_request_never_arrives(proxy: FaultProxy, valkey: Server) -> None:
    """The server does not see a cut request; earlier requests of the same write arrive."""
    order = proxy.on_request("SET", cut, first=2)
    async with client(proxy) as redis:
        with pytest.raises(RedisConnectionError):
            async with redis.pipeline(transaction=False) as pipe:
                await pipe.set("a", 1).set("b", 2).set("c", 3).execute()

    assert order.hits == 1
    with valkey.client() as direct:
        assert direct.keys() == [b"a"]


@pytest.mark.parametrize("fault", [cut, reset, truncate])
async def test_command_with_cut_reply_was_applied(
    proxy: FaultProxy, valkey: Server, fault: Any
) -> None:
    """The server has applied a command whose reply is lost."""
    proxy.on_reply("SET", fault, first=2)
    async with client(proxy) as redis:
        await redis.set("a", 1)
        with pytest.raises(RedisConnectionError):
            await redis.set("b", 2)

    with valkey.client() as direct:
        assert sorted(direct.keys()) == [b"a", b"b"]


@pytest.mark.every_loop
async def test_reset_sends_rst(proxy: FaultProxy) -> None:
    """After `reset`, the client sees a reset instead of an orderly end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    proxy.on_reply("PING", reset)
    writer.write(b"*1\r\n$4\r\nPING\r\n")

    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_swallow_drops_reply(proxy: FaultProxy) -> None:
    """After `swallow`, the connection stays open, and the next reply comes in its place."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    proxy.on_reply("ECHO", swallow)
    for word in (b"a", b"b"):
        writer.write(b"*2\r\n$4\r\nECHO\r\n$1\r\n%b\r\n" % word)

    assert await reader.readexactly(7) == b"$1\r\nb\r\n"
    writer.close()


async def test_replace_changes_ordered_replies(proxy: FaultProxy) -> None:
    """`replace` puts a reply or garbage in the place of as many replies as ordered."""
    proxy.on_reply("GET", replace(b"$5\r\nother\r\n"), times=2)
    proxy.on_reply("GET", replace(b"garbage\r\n"), first=3)
    async with client(proxy) as redis:
        await redis.set("a", 1)
        assert [await redis.get("a") for _ in range(2)] == [b"other"] * 2
        with pytest.raises(InvalidResponse):
            await redis.get("a")
        assert await redis.get("a") == b"1"


async def test_say_sends_unsolicited_reply(proxy: FaultProxy) -> None:
    """`Tunnel.say` sends a reply without a request."""
    async with client(proxy) as redis:
        proxy.tunnels[0].say(b"$3\r\nodd\r\n")
        assert await redis.get("a") == b"odd"


@pytest.mark.parametrize("where", ["on_request", "on_reply"])
async def test_hold_waits_for_event(proxy: FaultProxy, valkey: Server, where: str) -> None:
    """`hold` keeps a request or a reply until an event is set."""
    released = asyncio.Event()
    order = getattr(proxy, where)("SET", hold(released))
    async with client(proxy) as redis:
        task = asyncio.create_task(redis.set("a", 1))
        await order.hit.wait()
        assert not task.done()
        with valkey.client() as direct:
            assert direct.exists("a") == (where == "on_reply")

        released.set()
        assert await task is True


async def test_delay_holds_reply_for_seconds(proxy: FaultProxy) -> None:
    """`delay` passes a reply on after the given time."""
    proxy.on_reply("PING", delay(0.05), first=2)
    async with client(proxy) as redis:
        start = asyncio.get_running_loop().time()
        await redis.ping()
        assert asyncio.get_running_loop().time() - start >= 0.049


async def test_fault_sees_request_and_reply(proxy: FaultProxy) -> None:
    """A fault sees the command with its arguments, and the reply."""
    seen: list[Any] = []

    async def look(exchange: Exchange) -> bytes:
        seen.append((exchange.name, exchange.arguments, exchange.reply))
        return exchange.message

    async with client(proxy) as redis:
        proxy.on_request("*", look)
        proxy.on_reply("*", look)
        assert await redis.set("a", b"x\r\n", px=5) is True

    arguments = [b"SET", b"a", b"x\r\n", b"PX", b"5"]
    assert seen == [("SET", arguments, None), ("SET", arguments, b"+OK\r\n")]


async def test_push_message_is_not_counted_as_reply(proxy: FaultProxy, valkey: Server) -> None:
    """A push message passes, and later replies still belong to their requests."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    replaced = proxy.on_reply("PING", replace(b"+mine\r\n"))
    writer.write(b"*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n")
    writer.write(b"*3\r\n$6\r\nCLIENT\r\n$8\r\nTRACKING\r\n$2\r\nON\r\n")
    writer.write(b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n")
    await reader.readuntil(b"+OK\r\n_\r\n")
    with valkey.client() as direct:
        direct.set("a", 1)
    assert (await reader.readuntil(b"a\r\n")).startswith(b">2\r\n")

    writer.write(b"*1\r\n$4\r\nPING\r\n")
    assert await reader.readline() == b"+mine\r\n"
    assert replaced.hits == 1
    writer.close()


async def test_stall_holds_everything(proxy: FaultProxy, valkey: Server) -> None:
    """`stall` holds all messages and loses none, even if their client has closed."""
    async with client(proxy) as redis:
        proxy.stall()
        task = asyncio.create_task(redis.set("a", 1))
        _, gone = await asyncio.open_connection("127.0.0.1", proxy.port)
        gone.write(b"*3\r\n$3\r\nSET\r\n$1\r\nb\r\n$1\r\n1\r\n")
        gone.close()
        await gone.wait_closed()
        with valkey.client() as direct:
            assert direct.keys() == []

            proxy.resume()
            assert await task is True
            await until(lambda: direct.exists("b") and len(proxy.tunnels) == 1)


async def test_cut_closes_every_connection(proxy: FaultProxy) -> None:
    """`FaultProxy.cut` closes all connections in an orderly way, and accepts new ones."""
    peers = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(2)]
    await until(lambda: len(proxy.tunnels) == 2)

    proxy.cut()

    for reader, writer in peers:
        assert await reader.read() == b""
        writer.close()
    async with connect(proxy) as redis:
        assert await redis.ping()


@pytest.mark.every_loop
async def test_reset_resets_every_connection(proxy: FaultProxy) -> None:
    """`FaultProxy.reset` resets all connections, and accepts new ones."""
    peers = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(2)]
    await until(lambda: len(proxy.tunnels) == 2)

    proxy.reset()

    for reader, writer in peers:
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
    async with connect(proxy) as redis:
        assert await redis.ping()


async def test_forgive_cancels_orders(proxy: FaultProxy) -> None:
    """After `forgive`, all messages pass again."""
    proxy.on_reply("PING", cut, times=math.inf)
    async with connect(proxy) as redis:
        with pytest.raises(RedisConnectionError):
            await redis.ping()
        proxy.forgive()
        assert await redis.ping()


async def test_target_can_change(proxy: FaultProxy) -> None:
    """New connections go to the new target; without a server there, the proxy closes them."""
    with refused_port() as refused:
        there, proxy.target = proxy.target, refused
        async with connect(proxy) as redis:
            with pytest.raises(RedisConnectionError):
                await redis.ping()
            proxy.target = there
            assert await redis.ping()


@pytest.mark.every_loop
async def test_closed_proxy_leaves_nothing(valkey: Server) -> None:
    """A closed proxy leaves no task and no connection, even if it held messages."""
    before = asyncio.all_tasks()
    async with FaultProxy(valkey.port) as proxy:
        held = proxy.on_reply("PING", hold(asyncio.Event()))
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"*1\r\n$4\r\nPING\r\n")
        await held.hit.wait()
        proxy.stall()
        _, idle = await asyncio.open_connection("127.0.0.1", proxy.port)
        await until(lambda: proxy.counts.connections == 2)

    assert asyncio.all_tasks() == before
    assert proxy.tunnels == []
    with pytest.raises(ConnectionResetError):
        await reader.read()
    for each in (writer, idle):
        each.close()
