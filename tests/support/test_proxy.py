"""The behaviour of the fault proxy on which other tests rely."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.support.proxy import Counts, FaultProxy, cut, hold, replace, reset, truncate, until
from tests.support.proxy_process import proxy_process
from tests.support.resp import Framer
from tests.support.servers import Server

# Every type: nested, empty, null, and with attributes.
_VALUES = [
    *(b"+OK\r\n", b"-ERR no\r\n", b":-12\r\n", b"$5\r\nh\r\nlo\r\n", b"$0\r\n\r\n", b"$-1\r\n"),
    *(
        b"*-1\r\n",
        b"*0\r\n",
        b"*2\r\n*2\r\n:1\r\n*0\r\n*1\r\n*1\r\n$1\r\n*\r\n",
        b"_\r\n",
        b"#t\r\n",
    ),
    *(b",1.5e3\r\n", b"(3492890328409238509324850943850943825024385\r\n", b"!5\r\nERR x\r\n"),
    *(b"=7\r\ntxt:abc\r\n", b"%2\r\n+a\r\n*1\r\n:1\r\n+b\r\n%1\r\n:1\r\n_\r\n", b"~1\r\n%0\r\n"),
    *(
        b">2\r\n+invalidate\r\n*1\r\n$1\r\na\r\n",
        b"|1\r\n+ttl\r\n:3600\r\n*1\r\n|1\r\n+a\r\n:1\r\n:2\r\n",
    ),
]


@asynccontextmanager
async def client(proxy: FaultProxy) -> AsyncIterator[Any]:
    """A client with one open connection through the proxy. Its handshake is not counted."""
    async with Redis.from_url(proxy.url, max_connections=1, protocol=2) as redis:
        await redis.ping()
        proxy.counts = Counts()
        yield redis


@pytest.mark.parametrize("step", [1, 2, 3, 7, 10_000])
def test_framer_cuts_stream_into_values(step: int) -> None:
    """The framer returns each value with its last byte, in chunks of any size."""
    stream, framer = b"".join(_VALUES), Framer()

    chunks = [stream[start : start + step] for start in range(0, len(stream), step)]

    assert [value for chunk in chunks for value in framer.feed(chunk)] == _VALUES


async def test_proxy_counts_traffic(proxy: FaultProxy) -> None:
    """The proxy counts requests by name, replies, bytes and round trips."""
    async with client(proxy) as redis:
        await redis.set("a", 1)
        async with redis.pipeline(transaction=False) as pipe:
            assert await pipe.get("a").get("b").execute() == [b"1", None]

        counts = proxy.counts

    assert counts.requests == {"SET": 1, "GET": 2}
    assert (counts.replies, counts.round_trips, counts.chunks, counts.most_in_flight) == (
        3,
        2,
        2,
        2,
    )
    assert counts.bytes_in == 27 + 2 * len(b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n")
    assert counts.bytes_out == len(b"+OK\r\n$1\r\n1\r\n$-1\r\n")


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
    """The server has applied a command whose reply is lost; after `forgive`, replies pass."""
    proxy.on_reply("SET", fault, times=math.inf)
    async with client(proxy) as redis:
        with pytest.raises(RedisConnectionError):
            await redis.set("a", 1)
        with valkey.client() as direct:
            assert direct.keys() == [b"a"]
        proxy.forgive()
        assert await redis.set("a", 1) is True


@pytest.mark.every_loop
async def test_reset_sends_rst(proxy: FaultProxy) -> None:
    """`FaultProxy.reset` resets connections instead of closing them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    await until(lambda: proxy.tunnels)

    proxy.reset()

    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


@pytest.mark.parametrize("where", ["on_request", "on_reply"])
async def test_hold_waits_for_event(proxy: FaultProxy, valkey: Server, where: str) -> None:
    """`hold` keeps a request or a reply until an event is set."""
    released = asyncio.Event()
    order = getattr(proxy, where)("SET", hold(released))
    async with client(proxy) as redis:
        task = asyncio.create_task(redis.set("a", 1))
        await order.hit.wait()
        with valkey.client() as direct:
            assert direct.exists("a") == (where == "on_reply")

        released.set()
        assert await task is True


async def test_push_message_is_not_a_reply(proxy: FaultProxy, valkey: Server) -> None:
    """A push message passes, and later replies still belong to their requests."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    proxy.on_reply("PING", replace(b"+mine\r\n"))
    writer.write(b"*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n")
    writer.write(b"*3\r\n$6\r\nCLIENT\r\n$8\r\nTRACKING\r\n$2\r\nON\r\n")
    writer.write(b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n")
    await reader.readuntil(b"+OK\r\n_\r\n")
    with valkey.client() as direct:
        direct.set("a", 1)
    assert (await reader.readuntil(b"a\r\n")).startswith(b">2\r\n")

    writer.write(b"*1\r\n$4\r\nPING\r\n")
    assert await reader.readline() == b"+mine\r\n"
    writer.close()


async def test_silent_subscription_loses_announcements(proxy: FaultProxy, valkey: Server) -> None:
    """Announcements pass, as no reply to a request, unless their connection is silent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"*2\r\n$9\r\nSUBSCRIBE\r\n$4\r\nnews\r\n")
    await reader.readuntil(b":1\r\n")
    (tunnel,) = proxy.tunnels
    with valkey.client() as direct:
        for tunnel.silent, message in ((False, "first"), (True, "second"), (False, "third")):
            before = proxy.counts.bytes_out
            direct.publish("news", message)
            await until(lambda: proxy.counts.bytes_out > before)  # noqa: B023
    heard = await reader.readuntil(b"third\r\n")
    writer.close()

    assert tunnel.subscribed
    assert b"first" in heard
    assert b"second" not in heard


async def test_stall_holds_and_loses_nothing(proxy: FaultProxy, valkey: Server) -> None:
    """`stall` holds all messages, and they pass after `resume`."""
    async with client(proxy) as redis:
        proxy.stall()
        task = asyncio.create_task(redis.set("a", 1))
        with valkey.client() as direct:
            assert direct.keys() == []
        proxy.resume()
        assert await task is True


@pytest.mark.every_loop
async def test_closed_proxy_leaves_nothing(valkey: Server) -> None:
    """A closed proxy leaves neither tasks nor connections, even if it held messages."""
    before = asyncio.all_tasks()
    async with FaultProxy(valkey.port) as proxy:
        held = proxy.on_reply("PING", hold(asyncio.Event()))
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"*1\r\n$4\r\nPING\r\n")
        await held.hit.wait()

    assert asyncio.all_tasks() == before
    assert proxy.tunnels == []
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


def test_proxy_process_counts_commands(valkey: Server) -> None:
    """A proxy in another process passes commands on and counts them."""
    with proxy_process(valkey.port) as proxy, valkey.client() as direct:
        proxy.set(inspects=True)
        direct.connection_pool.connection_kwargs["port"] = proxy.port
        assert direct.ping() is True
        assert proxy.counts().requests["PING"] == 1
