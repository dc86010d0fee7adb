"""A TCP proxy that lets the faults of a network happen exactly where a test wants them.

    async with FaultProxy(server.port) as proxy:
        lost = proxy.on_reply("EVALSHA", cut)
        async with RedisStorage.from_url(proxy.url, ttl=60) as storage:
            await storage.store(session, when=When.ABSENT)  # applied; its reply never arrived
        assert lost.hits == 1

Rules:

- What no fault has been ordered for passes unchanged and in order, as soon as it is whole, and what
  arrived together leaves together.
- A fault is ordered for the n-th request of a name, counted from the order on, over all
  connections. It hits before the server sees the request (`on_request`), or when the server has
  answered, and so has applied it (`on_reply`).
- A fault is a coroutine function. It gets the `Exchange` and returns what is passed on in place of
  the message, or raises `Cut` or `Reset`. Until it does, whatever follows in that direction waits,
  as on a network. Some are ready-made; a test writes its own where more has to happen.
- When `async with` ends, every connection is closed and every task has ended.

It follows the framing of https://redis.io/docs/latest/develop/reference/protocol-spec/: requests
are arrays of bulk strings; replies are any type of RESP2 and RESP3, other than streamed ones. What
is pushed belongs to no request. So it does not understand SUBSCRIBE, MONITOR or CLIENT REPLY.
"""

import asyncio
import contextlib
import socket
import struct
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

_CHUNK = 64 * 1024
_PATIENCE = 10.0
_GOODBYE = 1.0  # seconds that a peer who does not read has until it is cut off


class Cut(Exception):
    """Raised by a fault: close the connection, after what has been passed on already."""


class Reset(Exception):
    """Raised by a fault: reset the connection (RST)."""


@dataclass(eq=False)
class Exchange:
    """A request and, once the server has answered, its reply.

    Attributes:
        tunnel: Where it passes.
        request: The request, as it came.
        reply: The reply, as it came; None until then.
    """

    tunnel: "Tunnel"
    request: bytes
    reply: bytes | None = None
    faults: list["Fault"] = field(default_factory=list)

    @property
    def message(self) -> bytes:
        """What is passing now: the request, or the reply."""
        return self.request if self.reply is None else self.reply

    @property
    def name(self) -> str:
        """The command's name, in upper case."""
        return _name(self.request)

    @property
    def arguments(self) -> list[bytes]:
        """The command's name and arguments."""
        return _arguments(self.request)


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
    """Pass this on instead: another reply, or garbage."""

    async def fault(_: Exchange) -> bytes:
        return message

    return fault


def hold(until: asyncio.Event) -> Fault:
    """Pass the message on when something has happened."""

    async def fault(exchange: Exchange) -> bytes:
        await until.wait()
        return exchange.message

    return fault


def delay(seconds: float) -> Fault:
    """Pass the message on that much later."""

    async def fault(exchange: Exchange) -> bytes:
        await asyncio.sleep(seconds)
        return exchange.message

    return fault


async def until(condition: Callable[[], object]) -> None:
    """Wait until something can be seen that no event tells; fail if it takes too long."""
    async with asyncio.timeout(_PATIENCE):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.001)


@dataclass(eq=False)
class Order:
    """A fault that was ordered.

    Attributes:
        hits: How often it has hit.
        hit: Set when it hits for the first time.
    """

    name: str
    fault: Fault
    at_reply: bool
    first: int
    times: float
    seen: int = 0
    hits: int = 0
    hit: asyncio.Event = field(default_factory=asyncio.Event)

    def takes(self, name: str) -> bool:
        """Count a request; whether it is one that this is to happen to."""
        if self.name not in (name, "*"):
            return False
        self.seen += 1
        return self.first <= self.seen < self.first + self.times

    async def __call__(self, exchange: Exchange) -> bytes:
        """Let it hit."""
        self.hits += 1
        self.hit.set()
        return await self.fault(exchange)


@dataclass
class Counts:
    """What has passed so far.

    Attributes:
        connections: Accepted from clients.
        requests: From clients, by name.
        replies: From the server, without what it pushed.
        round_trips: How often a client sent something, alone or many at once, after a reply or as
            the first: how often it had to wait for the network.
        chunks: Reads that brought something from a client. What a client sends in one write of
            less than 64 kB is one.
        bytes_in: From clients.
        bytes_out: From the server.
        most_under_way: The most requests that were under way at a time on one connection.
    """

    connections: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    replies: int = 0
    round_trips: int = 0
    chunks: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    most_under_way: int = 0


class FaultProxy:
    """A proxy for one server, on a port of its own.

    Args:
        target: The port that the server has at 127.0.0.1. It can be changed, as a failover does;
            connections that there are stay where they are.

    Attributes:
        counts: What has passed so far. Replace it to count from zero.
        tunnels: The connections that are open.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.counts = Counts()
        self.tunnels: list[Tunnel] = []
        self._orders: list[Order] = []
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """What a client connects to."""
        return f"redis://127.0.0.1:{self.port}/0"

    def on_request(self, name: str, fault: Fault, *, first: int = 1, times: float = 1) -> Order:
        """Order a fault that hits before the server sees a request.

        Args:
            name: The command's name in upper case, or "*" for any.
            fault: What happens.
            first: Which of the requests of that name, from now on, is the first it happens to.
            times: To how many in a row; `math.inf` for all that follow.
        """
        return self._order(Order(name, fault, at_reply=False, first=first, times=times))

    def on_reply(self, name: str, fault: Fault, *, first: int = 1, times: float = 1) -> Order:
        """Order a fault that hits when the server has answered. See `on_request`."""
        return self._order(Order(name, fault, at_reply=True, first=first, times=times))

    def _order(self, order: Order) -> Order:
        self._orders.append(order)
        return order

    def forgive(self) -> None:
        """Forget every order. What a fault holds at the moment stays held."""
        self._orders.clear()

    def stall(self) -> None:
        """Let nothing pass, and nothing be lost, in either direction until `resume`."""
        self._flowing.clear()

    def resume(self) -> None:
        """Let pass what was stalled, and what follows."""
        self._flowing.set()

    def cut(self) -> None:
        """Close every connection."""
        for tunnel in self.tunnels:
            tunnel.end()

    def reset(self) -> None:
        """Reset every connection."""
        for tunnel in self.tunnels:
            tunnel.end(reset=True)

    async def flowing(self) -> None:
        """Wait until things may pass."""
        await self._flowing.wait()

    def exchange(self, tunnel: "Tunnel", request: bytes) -> tuple[Exchange, list[Order]]:
        """Look up what is to happen to a request, before it passes."""
        exchange = Exchange(tunnel, request)
        name = exchange.name
        self.counts.requests[name] += 1
        due = [order for order in self._orders if order.takes(name)]
        exchange.faults += [order for order in due if order.at_reply]
        return exchange, [order for order in due if not order.at_reply]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
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
                there = await asyncio.open_connection("127.0.0.1", self.target)
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
    """One client's connection, and the one to the server that belongs to it."""

    def __init__(self, proxy: FaultProxy, client: Streams, server: Streams) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self._under_way: deque[Exchange] = deque()
        self._asking = False
        self._reset = False
        self._pumps: asyncio.Future[list[None]] | None = None

    def say(self, message: bytes) -> None:
        """Send something to the client that the server has not said."""
        self._to_client.write(message)

    def end(self, *, reset: bool = False) -> None:
        """Close this connection, or reset it."""
        self._reset = reset
        if self._pumps is not None:
            self._pumps.cancel()

    async def run(self) -> None:
        """Pass messages on until either side, or a fault, ends the connection."""
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
            if _being_cancelled():  # and not just `end`
                self._reset = True
                raise
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.wait(pumps)
            if self._reset:
                _reset(self._to_client)

    async def _pass_requests(self) -> None:
        framer = Framer()
        while chunk := await self._from_client.read(_CHUNK):
            await self._proxy.flowing()
            counts = self._proxy.counts
            counts.bytes_in += len(chunk)
            counts.chunks += 1
            for request in framer.feed(chunk):
                if not self._asking:
                    self._asking = True
                    counts.round_trips += 1
                exchange, faults = self._proxy.exchange(self, request)
                if faults:
                    request = await _suffer(faults, exchange)  # noqa: PLW2901 - passed on instead
                if request:
                    self._under_way.append(exchange)
                    self._to_server.write(request)
            counts.most_under_way = max(counts.most_under_way, len(self._under_way))
            await self._to_server.drain()
        # The client has gone, but what it has sent is on its way, and arrives.
        self._to_server.write_eof()

    async def _pass_replies(self) -> None:
        framer = Framer()
        while chunk := await self._from_server.read(_CHUNK):
            await self._proxy.flowing()
            counts = self._proxy.counts
            counts.bytes_out += len(chunk)
            for reply in framer.feed(chunk):
                if not reply.startswith(b">"):
                    self._asking = False
                    counts.replies += 1
                    exchange = self._under_way.popleft()
                    if exchange.faults:
                        exchange.reply = reply
                        reply = await _suffer(exchange.faults, exchange)  # noqa: PLW2901 - as above
                self.say(reply)
            await self._to_client.drain()
        raise Cut


async def _suffer(faults: Iterable[Fault], exchange: Exchange) -> bytes:
    message = exchange.message
    for fault in faults:
        message = await fault(exchange)
    return message


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with a RST, and without what has not been sent yet."""
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Close a connection at the end, when all that was written has been sent."""
    try:
        yield
    finally:
        writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_GOODBYE):
                await writer.wait_closed()
        writer.transport.abort()


class Framer:
    """Cuts a stream of bytes, however it arrives, into RESP values.

    Attributes of a value come with it, as one.
    """

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take more of the stream; the values that are whole now.

        Raises:
            ValueError: It is no RESP.
        """
        self._rest += chunk
        values: list[bytes] = []
        start = 0
        while (end := _end(self._rest, start)) is not None:
            values.append(bytes(self._rest[start:end]))
            start = end
        del self._rest[:start]
        return values


def _end(stream: bytearray, at: int) -> int | None:
    """Where the value ends that begins at `at`; None if that is still to come."""
    missing = 1  # values, however deeply they are nested
    while missing:
        line_end = stream.find(b"\r\n", at)
        if line_end < 0:
            return None
        kind, line = bytes(stream[at : at + 1]), stream[at + 1 : line_end]
        at = line_end + 2
        missing -= 1
        if kind in (b"$", b"=", b"!"):
            if int(line) >= 0:  # -1 is RESP2's null
                at += int(line) + 2
        elif kind in (b"*", b"~", b">"):
            missing += max(0, int(line))
        elif kind == b"%":
            missing += 2 * int(line)
        elif kind == b"|":
            missing += 2 * int(line) + 1  # and what they are attributes of
        elif kind not in (b"+", b"-", b":", b"_", b"#", b",", b"("):
            raise ValueError(f"RESP has no type {kind!r}")
    return at if at <= len(stream) else None


def _name(request: bytes) -> str:
    return request.split(b"\r\n", 3)[2].decode("ascii", "replace").upper()


def _arguments(request: bytes) -> list[bytes]:
    arguments: list[bytes] = []
    at = request.index(b"\r\n") + 2
    while at < len(request):
        start = request.index(b"\r\n", at) + 2
        end = start + int(request[at + 1 : start - 2])
        arguments.append(request[start:end])
        at = end + 2
    return arguments
