"""A connection through the fault proxy, and the exchanges of requests and replies on it."""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.resp import Framer

if TYPE_CHECKING:
    from tests.support.proxy import FaultProxy

_CHUNK = 64 * 1024
# Messages without a request: in RESP3, and in RESP2. The answer to SUBSCRIBE only looks like one.
_PUSHES = b">", b"*3\r\n$7\r\nmessage\r\n"
_SUBSCRIBED = b">3\r\n$9\r\nsubscribe\r\n"


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


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Tunnel:
    """A connection of a client, with its connection to the server.

    Attributes:
        subscribed: Whether the client has subscribed to a channel.
        silent: Whether to drop everything that the server sends.
    """

    def __init__(self, proxy: "FaultProxy", client: Streams, server: Streams) -> None:
        self._proxy = proxy
        self._from_client, self._to_client = client
        self._from_server, self._to_server = server
        self._in_flight: deque[Exchange] = deque()
        self.subscribed = self.silent = False
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
                    self.subscribed = self.subscribed or exchange.name == "SUBSCRIBE"
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
            if self.silent:
                continue
            if not self._proxy.inspects:
                self._send(self._to_client, chunk)
            for reply in framer.feed(chunk) if self._proxy.inspects else ():
                message = reply
                if not reply.startswith(_PUSHES) or reply.startswith(_SUBSCRIBED):
                    self._client_waits = False
                    self._proxy.counts.replies += 1
                    exchange = self._in_flight.popleft()
                    exchange.reply = reply
                    message = await _apply(exchange.faults, exchange)
                self._send(self._to_client, message)
            await self._to_client.drain()
        raise Cut

    def _send(self, writer: asyncio.StreamWriter, message: bytes) -> None:
        if writer.is_closing():
            return
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
