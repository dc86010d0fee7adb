"""A TCP relay that counts and delays bytes, or ends TLS.

Invariants:

- Each direction is a delay line: every chunk leaves a fixed time after it arrived, in order.
  Pipelined commands travel together, as on a real network.
- The relay counts on the client's side. A round trip is a turn: the client sends, then receives.
  All commands that it sends before it receives a reply belong to the same turn.
- Benchmarks run the relay in a separate process, outside the client's event loop. It still
  competes for the cores of the machine.
"""

import asyncio
import ctypes
import json
import selectors
import ssl
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, cast

import hiredis
import msgspec

_READY_WITHIN: Final = 10.0


class Counts(msgspec.Struct):
    """The traffic since counting began.

    Attributes:
        turns: Round trips.
        commands: Commands by name, without sub-commands and arguments.
        replies: Replies, errors included.
        bytes_sent: From the client to the server.
        bytes_received: From the server to the client.
    """

    turns: int = 0
    commands: dict[str, int] = {}
    replies: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


class _Tally:
    """Counts the traffic of all connections together: a load may use several."""

    def __init__(self) -> None:
        self.commands: Counter[str] = Counter()
        self.turns = self.replies = self.bytes_sent = self.bytes_received = 0
        self._client_spoke_last = False

    def sent(self, data: bytes, commands: list[str]) -> None:
        if not self._client_spoke_last:
            self.turns += 1
            self._client_spoke_last = True
        self.bytes_sent += len(data)
        self.commands.update(commands)

    def received(self, data: bytes, replies: int) -> None:
        self._client_spoke_last = False
        self.bytes_received += len(data)
        self.replies += replies

    def counts(self) -> Counts:
        return Counts(
            self.turns, dict(self.commands), self.replies, self.bytes_sent, self.bytes_received
        )


class _DelayLine:
    """Delivers chunks in order, each after a fixed time."""

    def __init__(self, deliver: Callable[[bytes | None], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._chunks: deque[tuple[float, bytes | None]] = deque()

    def put(self, chunk: bytes | None, delay: float) -> None:
        """Put in a chunk, or None for the end."""
        if not delay and not self._chunks:
            self._deliver(chunk)
            return
        due = self._loop.time() + delay
        self._chunks.append((due, chunk))
        if len(self._chunks) == 1:
            self._loop.call_at(due, self._flush)

    def _flush(self) -> None:
        # Chunks that are due within the next few microseconds leave in the same write.
        now = self._loop.time() + 5e-6
        ready: list[bytes] = []
        end = False
        while self._chunks and self._chunks[0][0] <= now:
            chunk = self._chunks.popleft()[1]
            if chunk is None:
                end = True
            else:
                ready.append(chunk)
        if ready:
            self._deliver(b"".join(ready))
        if end:
            self._deliver(None)
        if self._chunks:
            self._loop.call_at(self._chunks[0][0], self._flush)


class _Side(asyncio.Protocol):
    """One end of a relayed connection: the client's, or the server's."""

    def __init__(self, on_data: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        self._on_data = on_data
        self._on_end = on_end
        self.transport: asyncio.Transport | None = None
        self.other: _Side | None = None
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        for chunk in self._early:
            self.transport.write(chunk)
        self._early.clear()

    def data_received(self, data: bytes) -> None:
        self._on_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._on_end()

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def deliver(self, chunk: bytes | None) -> None:
        """Write a chunk, or close at the end."""
        if self.transport is None:
            if chunk is not None:
                self._early.append(chunk)
        elif chunk is None:
            self.transport.close()
        else:
            self.transport.write(chunk)


class Relay:
    """Listens for clients of one server. An async context manager.

    Args:
        host: The server's host.
        port: The server's port.
        tls: A server context, if clients speak TLS to the relay.

    Attributes:
        port: The port for clients, at 127.0.0.1.
        delay: Seconds that each direction takes. It may change at any time.
    """

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._upstream = (host, port)
        self._tls = tls
        self.port = 0
        self.delay = 0.0
        self._tally: _Tally | None = None
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._transports: set[asyncio.Transport] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        for transport in self._transports:
            transport.abort()
        await asyncio.sleep(0)  # the transports close in their next turn

    def count(self) -> None:
        """Begin to count, from zero."""
        self._tally = _Tally()

    def counts(self) -> Counts:
        """The traffic since `count`."""
        return Counts() if self._tally is None else self._tally.counts()

    def _accept(self) -> _Side:
        requests, replies = hiredis.Reader(), hiredis.Reader()

        def from_client(data: bytes) -> None:
            if self._tally is not None:
                self._tally.sent(data, [_name(frame) for frame in _frames(requests, data)])
            to_server.put(data, self.delay)

        def reply(data: bytes | None) -> None:
            if data is not None and self._tally is not None:
                self._tally.received(data, len(_frames(replies, data)))
            client.deliver(data)

        client = _Side(from_client, lambda: to_server.put(None, self.delay))
        server = _Side(
            lambda data: to_client.put(data, self.delay), lambda: to_client.put(None, self.delay)
        )
        client.other, server.other = server, client
        to_server, to_client = _DelayLine(server.deliver), _DelayLine(reply)
        task = asyncio.get_running_loop().create_task(self._connect(server, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return client

    async def _connect(self, server: _Side, client: _Side) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: server, *self._upstream)
        except OSError:
            client.deliver(None)
        self._transports = {each for each in self._transports if not each.is_closing()}
        self._transports.update(
            side.transport for side in (server, client) if side.transport is not None
        )


def _frames(reader: "hiredis.Reader", data: bytes) -> list[Any]:
    """The complete commands or replies that end in these bytes."""
    reader.feed(data)
    frames: list[Any] = []
    while (frame := reader.gets()) is not False:
        frames.append(frame)
    return frames


def _name(command: Any) -> str:
    return str(command[0].decode("ascii", "replace").upper())


class RelayProcess:
    """A relay in a separate process. `relaying` starts one."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._requests = cast("IO[str]", process.stdin)
        self._replies = cast("IO[str]", process.stdout)
        self.port: int = self._ask("port")

    def delay(self, round_trip: float) -> None:
        """Set the least duration of a round trip, in seconds."""
        self._ask("delay", round_trip / 2)

    def count(self) -> None:
        """See `Relay.count`."""
        self._ask("count")

    def counts(self) -> Counts:
        """See `Relay.counts`."""
        return msgspec.convert(self._ask("counts"), Counts)

    def _ask(self, request: str, value: float | None = None) -> Any:
        print(json.dumps([request, value]), file=self._requests, flush=True)
        return json.loads(self._replies.readline())


@contextmanager
def relaying(host: str, port: int, certificate: Path | None = None) -> Iterator[RelayProcess]:
    """Start a relay in a separate process; end it with the block.

    Args:
        host: The server's host.
        port: The server's port.
        certificate: A PEM file with a key and a certificate, if clients speak TLS to the relay.
    """
    process = subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-m", __name__, host, str(port), str(certificate or "")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield RelayProcess(process)
    finally:
        process.communicate()  # closes its input, which ends it


async def _serve(host: str, port: int, tls: ssl.SSLContext | None) -> None:
    """Relay and answer the questions on the input until the input ends."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    async with Relay(host, port, tls) as relay:

        def answer() -> None:
            line = sys.stdin.readline()
            if not line:
                if not ended.done():
                    ended.set_result(None)
                return
            request, value = json.loads(line)
            reply: Any = None
            match request:
                case "port":
                    reply = relay.port
                case "delay":
                    relay.delay = value
                case "count":
                    relay.count()
                case "counts":
                    reply = msgspec.to_builtins(relay.counts())
            print(json.dumps(reply), flush=True)

        loop.add_reader(sys.stdin, answer)
        await ended
        loop.remove_reader(sys.stdin)


def be_punctual() -> None:
    """Ask Linux not to delay timers by 50 microseconds to group them."""
    set_timer_slack = 29
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_timer_slack, ctypes.c_ulong(1_000))


def _main() -> None:
    be_punctual()
    tls = None
    if certificate := sys.argv[3]:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate)
    # epoll, the default, counts in milliseconds, which are coarser than the delays.
    with asyncio.Runner(
        loop_factory=lambda: asyncio.SelectorEventLoop(None if tls else selectors.SelectSelector())
    ) as runner:
        runner.run(_serve(sys.argv[1], int(sys.argv[2]), tls))


if __name__ == "__main__":
    _main()
