"""A TCP proxy between clients and one server that injects faults, counts commands and adds delay.

    async with FaultProxy(server.port) as proxy:
        lost = proxy.on_reply("EVALSHA", cut)
        async with RedisStorage.from_url(proxy.url, ttl=60) as storage:
            await storage.store(session, when=When.ABSENT)  # applied; its reply never arrived
        assert lost.hits == 1

Rules:

- Messages without a fault pass unchanged and in order, as soon as they are complete. Messages that
  arrived together leave together.
- A fault is ordered for the n-th request of a name, counted from the order on, over all
  connections. It hits before the server sees the request (`on_request`), or after the server has
  answered, and so has applied it (`on_reply`).
- A fault is a coroutine function. It gets the `Exchange` and returns the bytes to pass on in place
  of the message, or raises `Cut` or `Reset`. Until then, later messages in that direction wait.
- When `async with` ends, every connection is closed and every task has ended.

A push message belongs to no request. SUBSCRIBE, MONITOR and CLIENT REPLY are not supported.
`proxy_process` runs a proxy in a separate process.
"""

import asyncio
import contextlib
import socket
import ssl
import struct
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from tests.support.resp import Framer

_CHUNK = 64 * 1024
_PATIENCE = 10.0
_GOODBYE = 1.0  # seconds until a peer that does not read is cut off


class Cut(Exception):
    """Raised by a fault: close the connection, after the bytes that were passed on already."""


class Reset(Exception):
    """Raised by a fault: reset the connection (RST)."""


@dataclass(eq=False)
class Exchange:
    """A request on a connection and, once the server has answered, its reply."""

    tunnel: "Tunnel"
    request: bytes
    reply: bytes | None = None
    faults: list["Fault"] = field(default_factory=list)

    @property
    def message(self) -> bytes:
        """The message that passes now: the request, or the reply."""
        return self.request if self.reply is None else self.reply

    @property
    def name(self) -> str:
        """The name of the command, in upper case."""
        return self.request.split(b"\r\n", 3)[2].decode("ascii", "replace").upper()

    @property
    def arguments(self) -> list[bytes]:
        """The name of the command and its arguments."""
        arguments: list[bytes] = []
        at = self.request.index(b"\r\n") + 2
        while at < len(self.request):
            start = self.request.index(b"\r\n", at) + 2
            end = start + int(self.request[at + 1 : start - 2])
            arguments.append(self.request[start:end])
            at = end + 2
        return arguments


Fault = Callable[[Exchange], Awaitable[bytes]]


async def cut(_: Exchange) -> bytes:
    """Close the connection instead of passing the message on."""
    raise Cut


async def reset(_: Exchange) -> bytes:
    """Reset the connection instead of passing the message on."""
    raise Reset


async def swallow(_: Exchange) -> bytes:
    """Pass nothing on, and leave the connection open."""
    return b""


async def truncate(exchange: Exchange) -> bytes:
    """Pass half a reply on, and close the connection."""
    exchange.tunnel.say(exchange.message[: len(exchange.message) // 2])
    raise Cut


def replace(message: bytes) -> Fault:
    """Make a fault that passes other bytes on: another reply, or garbage."""

    async def fault(_: Exchange) -> bytes:
        return message

    return fault


def hold(until: asyncio.Event) -> Fault:
    """Make a fault that holds the message until an event is set."""

    async def fault(exchange: Exchange) -> bytes:
        await until.wait()
        return exchange.message

    return fault


def delay(seconds: float) -> Fault:
    """Make a fault that passes the message on later."""

    async def fault(exchange: Exchange) -> bytes:
        await asyncio.sleep(seconds)
        return exchange.message

    return fault


async def until(condition: Callable[[], object]) -> None:
    """Wait for a state that sets no event; fail if it does not come."""
    async with asyncio.timeout(_PATIENCE):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)


@dataclass(eq=False)
class Order:
    """A fault, and the requests that it hits; `hit` is set at the first of them."""

    name: str
    fault: Fault
    at_reply: bool
    first: int
    times: float
    seen: int = 0
    hits: int = 0
    hit: asyncio.Event = field(default_factory=asyncio.Event)

    def takes(self, name: str) -> bool:
        """Count a request, and return whether the fault hits it."""
        if self.name not in (name, "*"):
            return False
        self.seen += 1
        return self.first <= self.seen < self.first + self.times

    async def __call__(self, exchange: Exchange) -> bytes:
        """Run the fault."""
        self.hits += 1
        self.hit.set()
        return await self.fault(exchange)


@dataclass
class Counts:
    """The traffic so far.

    Attributes:
        connections: Connections that clients have made.
        requests: Requests of clients, by name.
        replies: Replies of the server, without push messages.
        round_trips: How often a client waited for the network: it sent something, one message or
            many, at the beginning or after a reply.
        chunks: Reads that brought bytes from a client. One write of less than 64 kB is one chunk.
        bytes_in: Bytes from clients.
        bytes_out: Bytes from the server.
        most_in_flight: The largest number of requests without a reply at a time, on one connection.
    """

    connections: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    replies: int = 0
    round_trips: int = 0
    chunks: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    most_in_flight: int = 0


class FaultProxy:
    """A proxy for one server.

    Args:
        target: The port of the server. A test can change it, as a failover does; open connections
            stay with the old server.
        host: The host of the server.
        tls: A server context, if clients speak TLS to the proxy.

    Attributes:
        port: The port of the proxy at 127.0.0.1.
        counts: The traffic so far. A test can replace it to count from zero.
        delay: Seconds that bytes travel in each direction. Bytes in flight do not hold up others.
        inspects: Whether the proxy looks at messages, for faults and counts; without, it is faster.
            Change it only while nothing is in flight.
        tunnels: The open connections.
    """

    def __init__(
        self, target: int, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
    ) -> None:
        self.target, self.host = target, host
        self.port = 0
        self.counts = Counts()
        self.delay = 0.0
        self.inspects = True
        self.tunnels: list[Tunnel] = []
        self._tls = tls
        self._orders: list[Order] = []
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The URL of the proxy."""
        return f"redis://127.0.0.1:{self.port}/0"

    def on_request(self, name: str, fault: Fault, *, first: int = 1, times: float = 1) -> Order:
        """Order a fault that hits before the server sees a request.

        Args:
            name: The name of the command in upper case, or "*" for any.
            fault: The fault.
            first: The first request of that name that it hits, counted from now on.
            times: The number of requests in a row that it hits; `math.inf` for all that follow.
        """
        self._orders.append(Order(name, fault, at_reply=False, first=first, times=times))
        return self._orders[-1]

    def on_reply(self, name: str, fault: Fault, *, first: int = 1, times: float = 1) -> Order:
        """Order a fault that hits after the server has answered. See `on_request`."""
        self._orders.append(Order(name, fault, at_reply=True, first=first, times=times))
        return self._orders[-1]

    def forgive(self) -> None:
        """Forget every order. A message that a fault holds at the moment stays where it is."""
        self._orders.clear()

    def stall(self) -> None:
        """Hold all messages in both directions until `resume`; none is lost."""
        self._flowing.clear()

    def resume(self) -> None:
        """Pass on the messages that were held, and all later ones."""
        self._flowing.set()

    def cut(self, *, reset: bool = False) -> None:
        """Close, or reset, every connection."""
        for tunnel in self.tunnels:
            tunnel.end(reset=reset)

    def reset(self) -> None:
        """Reset every connection."""
        self.cut(reset=True)

    async def flowing(self) -> None:
        """Wait until messages may pass."""
        await self._flowing.wait()

    def exchange(self, tunnel: "Tunnel", request: bytes) -> tuple[Exchange, list[Order]]:
        """Count a request, and look up its faults."""
        exchange = Exchange(tunnel, request)
        name = exchange.name
        self.counts.requests[name] += 1
        due = [order for order in self._orders if order.takes(name)]
        exchange.faults += [order for order in due if order.at_reply]
        return exchange, [order for order in due if not order.at_reply]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts.connections += 1
        task = asyncio.create_task(self._tunnel(reader, writer), name="fault proxy: tunnel")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with _closing(writer):
            await self.flowing()
            try:
                there = await asyncio.open_connection(self.host, self.target)
            except OSError:
                return
            async with _closing(there[1]):
                tunnel = Tunnel(self, (reader, writer), there)
                self.tunnels.append(tunnel)
                try:
                    await tunnel.run()
                finally:
                    self.tunnels.remove(tunnel)


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Tunnel:
    """A connection of a client, with its connection to the server."""

    def __init__(self, proxy: FaultProxy, client: Streams, server: Streams) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self._in_flight: deque[Exchange] = deque()
        self._client_waits = False
        self._reset = False
        self._pumps: asyncio.Future[list[None]] | None = None

    def say(self, message: bytes) -> None:
        """Send bytes to the client, in front of anything that the server still sends."""
        self._to_client.write(message)

    def end(self, *, reset: bool = False) -> None:
        """Close this connection, or reset it."""
        self._reset = reset
        if self._pumps is not None:
            self._pumps.cancel()

    async def run(self) -> None:
        """Pass messages on until one side, or a fault, ends the connection."""
        pumps = [
            asyncio.create_task(self._pass_requests(), name="fault proxy: requests"),
            asyncio.create_task(self._pass_replies(), name="fault proxy: replies"),
        ]
        self._pumps = asyncio.gather(*pumps)
        try:
            await self._pumps
        except Reset:
            self._reset = True
        except (Cut, OSError):
            pass
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # and not just `end`
                self._reset = True
                raise
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)
            if self._reset:
                _send_rst(self._to_client)

    async def _pass_requests(self) -> None:
        framer = Framer()
        while chunk := await self._from_client.read(_CHUNK):
            await self._proxy.flowing()
            counts = self._proxy.counts
            counts.bytes_in += len(chunk)
            counts.chunks += 1
            if not self._proxy.inspects:
                self._send(self._to_server, chunk)
            for request in framer.feed(chunk) if self._proxy.inspects else ():
                if not self._client_waits:
                    self._client_waits = True
                    counts.round_trips += 1
                exchange, faults = self._proxy.exchange(self, request)
                message = await _apply(faults, exchange)
                if message:
                    self._in_flight.append(exchange)
                    self._send(self._to_server, message)
            counts.most_in_flight = max(counts.most_in_flight, len(self._in_flight))
            await self._to_server.drain()
        # The client has gone, but its last requests still arrive at the server.
        self._to_server.write_eof()

    async def _pass_replies(self) -> None:
        framer = Framer()
        while chunk := await self._from_server.read(_CHUNK):
            await self._proxy.flowing()
            self._proxy.counts.bytes_out += len(chunk)
            if not self._proxy.inspects:
                self._send(self._to_client, chunk)
            for reply in framer.feed(chunk) if self._proxy.inspects else ():
                message = reply
                if not reply.startswith(b">"):
                    self._client_waits = False
                    self._proxy.counts.replies += 1
                    exchange = self._in_flight.popleft()
                    exchange.reply = reply
                    message = await _apply(exchange.faults, exchange)
                self._send(self._to_client, message)
            await self._to_client.drain()
        raise Cut

    def _send(self, writer: asyncio.StreamWriter, message: bytes) -> None:
        if self._proxy.delay:
            asyncio.get_running_loop().call_later(self._proxy.delay, writer.write, message)
        else:
            writer.write(message)


async def _apply(faults: Iterable[Fault], exchange: Exchange) -> bytes:
    message = exchange.message
    for fault in faults:
        message = await fault(exchange)
    return message


def _send_rst(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a RST, and drop the bytes that were not sent yet."""
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Close a connection at the end, once the written bytes have been sent."""
    try:
        yield
    finally:
        writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_GOODBYE):
                await writer.wait_closed()
        writer.transport.abort()
