"""The parts of `simulation`: an event loop in virtual time, a server, and a copy of the library."""

import asyncio
import heapq
import importlib
import inspect
import logging
import random
from collections import Counter, deque
from types import ModuleType
from typing import Any, NamedTuple

import hiredis
from redis.exceptions import AuthenticationError

from aiosessions.redis._scripts import CONDITIONS
from aiosessions.storage import When


class Patch(NamedTuple):
    """A bug for a copy of the library: another text for one that a module has once."""

    module: str
    old: str
    new: str


class Library:
    """A copy of the modules under test, with bugs or without.

    Raises:
        LookupError: A patch does not fit the source.
    """

    def __init__(self, *patches: Patch) -> None:
        self.parts: dict[str, Any] = {}
        for name in ("_outage", "_pipeline", "_channel", "_connection"):
            original = importlib.import_module(f"aiosessions.redis.{name}")
            source = inspect.getsource(original)
            for patch in patches:
                if patch.module == name:
                    if source.count(patch.old) != 1:
                        raise LookupError(f"{name} does not have this text once: {patch.old}")
                    source = source.replace(patch.old, patch.new)
            copy = ModuleType(original.__name__)
            copy.__package__ = original.__package__
            exec(compile(source, str(original.__file__), "exec"), vars(copy))  # noqa: S102 - ours
            vars(copy).update(self.parts)
            part = name[1:].title()  # the class
            self.parts[part] = vars(copy)[part]
            if name == "_outage":
                self.outage = vars(copy)  # with the generator of the jitter
                self.outage["_log"] = logging.Logger("", logging.CRITICAL)  # noqa: LOG001 - silent


class Loop(asyncio.BaseEventLoop):
    """An event loop; its owner sets the time and runs each turn.

    Timers of one moment run in any order.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.now = 0.0
        self.futures: list[asyncio.Future[Any]] = []
        self.errors: list[str] = []
        self.set_exception_handler(lambda _, context: self.errors.append(str(context)))
        self._rng = rng
        self._queue: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, float, asyncio.TimerHandle]] = []

    def time(self) -> float:
        """See `asyncio`, as for the next four."""
        return self.now

    def create_future(self) -> asyncio.Future[Any]:  # noqa: D102
        self.futures.append(future := super().create_future())
        return future

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override] # noqa: D102
        self._queue.append(handle := asyncio.Handle(callback, args, self, context))
        return handle

    def call_at(  # type: ignore[override] # noqa: D102
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, self._rng.random(), handle))
        return handle

    def call_later(  # type: ignore[override] # noqa: D102
        self, delay: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def next_timer(self) -> float:
        """The time of the next timer; infinite if there is none."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else float("inf")

    def turn(self) -> None:
        """Run the callbacks that are ready now."""
        while self.next_timer() <= self.now:
            self._queue.append(heapq.heappop(self._timers)[2])
        for _ in range(len(self._queue)):
            handle = self._queue.popleft()
            if not handle.cancelled():
                handle._run()

    def settle(self) -> None:
        """Run turns until nothing more happens without the passage of time."""
        for _ in range(1000):
            self.turn()
            if not self._queue and self.next_timer() > self.now:
                return
        raise RuntimeError("the event loop never becomes idle")


class Server:
    """A server; its reply to a call is the number of the call.

    Attributes:
        accepts: The answer to attempts to connect.
        sockets: All sockets, the oldest first.
        applied: How often each write was applied, by the number of its call.
        written: How often each command was written.
        trace: All events, with their times.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.accepts = "yes"
        self.sockets: list[Socket] = []
        self.applied: Counter[int] = Counter()
        self.written: Counter[int] = Counter()
        self.trace: list[tuple[Any, ...]] = []

    def note(self, *event: Any) -> None:
        """Append an event to the trace."""
        self.trace.append((round(self.loop.now, 6), *event))

    def count(self, commands: list[list[bytes]]) -> None:
        """Count commands that were written to a socket."""
        for command in commands:
            self.note("write", command[0], _number(command))
            self.written[_number(command)] += 1

    def apply(self, command: list[bytes]) -> bytes:
        """Apply a command, and return the reply."""
        name, number = command[0], _number(command)
        self.note("apply", name, number)
        if name == b"ASKING":
            return b"+OK\r\n"
        if name == b"GETEX":
            record = b"%d" % number + b" " * (number % 4 * 50)
            return b"$%d\r\n%b\r\n" % (len(record), record)
        # A compare-and-set cannot succeed a second time.
        again = CONDITIONS[When.UNCHANGED] not in command
        self.applied[number] = self.applied[number] + 1 if again else 1
        return b":%d\r\n" % number

    def answer(self) -> bool:
        """Serve and deliver everything; return whether there was anything."""
        return sum(each.serve(1000) | each.deliver(1_000_000) for each in self.sockets) > 0

    def latest(self) -> list["Socket"]:
        """The latest socket, if it is open."""
        return [each for each in self.sockets if each.open][-1:]


def _number(command: list[bytes]) -> int:
    """The number of the call that a command belongs to; -1 for ASKING."""
    return -1 if len(command) == 1 else int(command[3 if command[0].startswith(b"EVAL") else 1])


class Socket(asyncio.Transport):
    """A socket, with the commands that the server has to read and the replies to deliver.

    Attributes:
        open: Whether the transport is in use.
        full: Whether the transport keeps commands in its buffer.
        mute: Whether the server ignores the socket.
    """

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.commands: deque[list[bytes]] = deque()
        self.replies = b""
        self.open, self.full, self.mute = True, False, False
        self._server = server
        self._reader = hiredis.Reader()
        self._receiver: Any = None
        self._buffer: list[list[bytes]] = []

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """See `asyncio`, as for the next three."""
        self._receiver = protocol

    def is_closing(self) -> bool:  # noqa: D102
        return not self.open

    def write(self, data: Any) -> None:  # noqa: D102
        self._reader.feed(data)
        commands: list[Any] = list(iter(self._reader.gets, False))  # noqa: FBT003 - no more
        self._server.count(commands)
        if not self.full:
            self.commands.extend(commands)
            return
        if not self._buffer:
            self._receiver.pause_writing()
        self._buffer += commands

    def abort(self) -> None:  # noqa: D102
        if self.open:
            self.open = False
            self._server.loop.call_soon(self.lose, None)

    def lose(self, error: Exception | None) -> None:
        """Tell the receiver that the connection has ended."""
        self.open = False
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.connection_lost(error)

    def drain(self) -> None:
        """Empty the buffer."""
        self.full = False
        if self.open and self._buffer:
            self.commands.extend(self._buffer)
            self._buffer = []
            self._receiver.resume_writing()

    def serve(self, count: int, code: str = "") -> bool:
        """Apply commands, or refuse them with an error reply; return whether there were any."""
        count = 0 if self.mute else min(count, len(self.commands))
        for _ in range(count):
            command = self.commands.popleft()
            refusal = b"-%b \r\n" % code.encode() if code else b""
            self.replies += refusal or self._server.apply(command)
        return count > 0

    def deliver(self, size: int) -> bool:
        """Deliver bytes of the replies; return whether there were any.

        An aborted socket delivers until its receiver learns that it has ended.
        """
        data, self.replies = self.replies[:size], self.replies[size:]
        if data and self._receiver is not None:
            self._receiver.data_received(data)
            return True
        return False


class DriverConnection:
    """A connection of redis-py, as far as the driver uses it."""

    host, port = "server", 6379

    def __init__(self, server: Server) -> None:
        self._server = server
        self._reader = self._writer = None

    async def connect(self) -> None:
        """Connect, or fail, as the server wants it."""
        await asyncio.sleep(0.001)
        server, answer = self._server, self._server.accepts
        server.note("connect", answer)
        if answer == "no":
            raise ConnectionRefusedError
        if answer == "password":
            raise AuthenticationError
        if answer == "never":
            await server.loop.create_future()
        server.sockets.append(socket := Socket(server))
        self._writer = asyncio.StreamWriter(socket, None, None, server.loop)  # type: ignore[assignment, arg-type]

    async def can_read(self) -> bool:
        """Whether the server sent more than the handshake."""
        return False
