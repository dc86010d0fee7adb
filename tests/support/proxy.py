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

A push message, or a message of a channel, belongs to no request. MONITOR, CLIENT REPLY and
SUBSCRIBE to several channels are not supported.
`proxy_process` runs a proxy in a separate process.
"""

import asyncio
import contextlib
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from tests.support.tunnel import Cut, Exchange, Fault, Reset, Tunnel

__all__ = [
    "Counts",
    "Cut",
    "Exchange",
    "Fault",
    "FaultProxy",
    "Order",
    "Reset",
    "cut",
    "delay",
    "hold",
    "replace",
    "reset",
    "swallow",
    "truncate",
    "until",
]

_PATIENCE = 10.0
_GOODBYE = 1.0  # seconds until a peer that does not read is cut off


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
