"""Sends each command to the server that has its key, and raises every error.

Below this module, errors are passed as values, because an exception that is set on a future and
never awaited would be logged. `Router.call` is the one place that raises.

Invariants:

- Connections belong to one event loop and one process. Elsewhere their use is `StorageMisused`,
  except after the loop was closed: then the next loop begins with new connections.
- However often a command is redirected or sent again, its deadline stays the same.
- A command that is in doubt is sent again only if it is retryable.
"""

import asyncio
import os
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from redis.asyncio import Redis, RedisCluster

from ..errors import StorageClosed, StorageMisused
from ..storage import StorageListener
from ._announcements import Announcements
from ._commands import Command, Script, Template
from ._connection import Connection
from ._driver import Address, ConnectionFactory, connection_factory
from ._errors import ErrorReply, translate
from .health import RedisStatistics

# The client knows its address, and Sentinel may change it.
_THE_SERVER: Final[Address] = ("", 0)
_MAX_ATTEMPTS: Final = 32
_MANY_STORAGES: Final = 32


class Router:
    """The connections of one storage to one server, or to the master that Sentinel names.

    Args:
        client: The client; it is only read.
        timeout: Seconds that a verb may take.
        connections: How many connections to make to each server.
        channel: The channel of the announcements.

    Attributes:
        announcements: The announcements of the servers.
    """

    def __init__(
        self,
        client: "Redis | RedisCluster",
        timeout: float,
        connections: int,
        channel: bytes = b"session:changes",
    ) -> None:
        self._client: Any = client
        self._timeout = timeout
        self._count = connections
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = -1
        self._closed = False
        self.announcements = Announcements(channel, timeout, self._servers, self._factory)
        self._reset()

    def _reset(self) -> None:
        """Begin without connections."""
        self._connections: dict[Address, list[Connection]] = {}
        self._only: Connection | None = None  # if there is one server and one connection

    def deadline(self) -> float:
        """Check that the storage may be used here and now, and return the deadline of a verb.

        Raises:
            StorageClosed: The storage is closed.
            StorageMisused: The storage belongs to another event loop or to another process.
        """
        if self._closed:
            message = "the storage is closed"
            raise StorageClosed(message)
        loop = _running_loop()
        if loop is None:
            message = "RedisStorage runs under asyncio, and no asyncio event loop runs here"
            raise StorageMisused(message)
        if loop is not self._loop or self._process != _process:
            self._move_to(loop)
        return loop.time() + self._timeout

    async def call(self, command: Command) -> Any:
        """Send a command and return its reply, which has one of the types of its template.

        Raises:
            StorageUnavailable: There is no such reply. `command.in_doubt` and the error tell
                whether the command may have been applied.
            StorageClosed: The storage was closed during the call.
        """
        connection, attempt, attempts = self._route(command), command, 0
        while True:
            connection.send(attempt)
            try:
                reply = await attempt.future
            except BaseException:
                connection.pipeline.discard(attempt)
                raise
            command.in_doubt = attempt.in_doubt
            if type(reply) in attempt.template.replies:
                return reply
            if not attempt.payload:  # past its deadline
                break
            attempt, attempts = attempt.again(), attempts + 1
            successor = await self._successor(attempt, reply, connection)
            if successor is None or self._closed or attempts == _MAX_ATTEMPTS:
                break
            connection = successor
        in_doubt = attempt.in_doubt and attempt.template.writes
        raise translate(reply, connection.outage.address, in_doubt=in_doubt)

    async def call_all(self, commands: list[Command]) -> list[Any]:
        """Send commands at once, and return their replies in order. See `call`.

        An error of one command cancels the others.
        """
        # No TaskGroup: if an eager task fails at once, Python 3.12 also cancels its caller.
        tasks = [asyncio.ensure_future(self.call(command)) for command in commands]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            raise

    async def call_each(self, template: Template, deadline: float) -> dict[str, tuple[Any, float]]:
        """Send a command without a key to every server that has sessions.

        Returns:
            By the address of the server: the reply, or an error to raise; and the seconds it took.
        """

        async def ask(connection: Connection) -> tuple[Any, float]:
            began = self._now()
            reply = await self._value(connection, template, deadline)
            if type(reply) not in template.replies:
                reply = translate(reply, connection.outage.address)
            return reply, self._now() - began

        connections = [self._connection(each) for each in await self._servers(deadline)]
        answers = await asyncio.gather(*map(ask, connections))
        addresses = (each.outage.address for each in connections)
        return dict(zip(addresses, answers, strict=True))

    def listen(self, listener: StorageListener) -> Callable[[], None]:
        """See `AnnouncingStorage.listen`."""
        stop = self.announcements.listen(listener)
        if self._loop is not None and self._loop is _running_loop():
            self.announcements.start()
        return stop

    def statistics(self) -> RedisStatistics:
        """Count over all connections."""
        connections = self._all()
        return RedisStatistics(
            connected=sum(each.channel is not None for each in connections),
            queued=sum(each.pipeline.queued for each in connections),
            in_flight=sum(len(each.pipeline.in_flight) for each in connections),
            reconnects=sum(max(0, each.connects - 1) for each in connections),
            bytes_sent=sum(each.bytes_sent for each in connections),
            bytes_received=sum(each.bytes_received for each in connections),
        )

    # Where a command goes. A cluster overrides these.

    def _route(self, command: Command) -> Connection:
        """The connection for a command."""
        if self._only is not None:
            return self._only
        connection = self._connection(_THE_SERVER, command)
        self._only = connection if self._count == 1 else None
        return connection

    async def _successor(
        self, attempt: Command, reply: Any, connection: Connection
    ) -> Connection | None:
        """Where to send a command again that has got no proper reply; None if nowhere."""
        if isinstance(reply, ErrorReply) and reply.code == "NOSCRIPT":
            template = attempt.template
            if isinstance(template, Script):
                template.send_source(attempt)
                return connection
        return None

    async def _servers(self, deadline: float) -> list[Address]:
        """The servers that have sessions."""
        del deadline
        return [_THE_SERVER]

    def _factory(self, address: Address) -> ConnectionFactory:
        del address
        return connection_factory(self._client)

    def _on_outage(self) -> None:
        """Called when a connection fails."""

    def _connection(self, address: Address, command: Command | None = None) -> Connection:
        """The connection for the next command to a server."""
        connections = self._connections.get(address)
        if connections is None:
            factory = self._factory(address)
            on_reconnect = partial(self.announcements.renew, address)
            connections = self._connections[address] = [
                Connection(factory, self._timeout, self._on_outage, address, on_reconnect)
                for _ in range(self._count)
            ]
        if len(connections) == 1 or command is None:
            return connections[0]
        # A key has one connection for its writes, so that they keep their order even if a caller
        # has left one of them behind. A load goes where the oldest command in flight is the
        # youngest: a large record holds up few small ones.
        home = connections[hash(command.key) % len(connections)]
        if command.template.writes or home.pipeline.orphans:
            return home
        return max(home, *connections, key=_youth)

    async def _value(self, connection: Connection, template: Template, deadline: float) -> Any:
        """The reply to a command without a key, or an exception in its place."""
        command = template.fill(deadline)
        connection.send(command)
        try:
            return await command.future
        except BaseException:
            connection.pipeline.discard(command)
            raise

    def _all(self) -> list[Connection]:
        return [each for connections in self._connections.values() for each in connections]

    # The life of the connections.

    @property
    def in_use(self) -> bool:
        """Whether connections were made here and the storage was not closed."""
        connected = bool(self._connections) or self.announcements.active
        return not self._closed and self._process == _process and connected

    async def aclose(self) -> bool:
        """Close every connection, and wait until their tasks have ended.

        Returns:
            Whether objects of this event loop may be closed, too.

        Raises:
            StorageMisused: The connections belong to another event loop that is not closed.
        """
        if self._closed:
            return False
        if self._loop is None:
            self._closed = True
            return True
        if self._process != _process or self._loop.is_closed():
            self._closed = True
            return False
        if self._loop is not _running_loop():
            message = "the storage is in use by another event loop; close it there"
            raise StorageMisused(message)
        self.close()
        await asyncio.gather(self.announcements.aclose(), *(each.aclose() for each in self._all()))
        return True

    def close(self) -> None:
        """Close every connection without waiting."""
        self._closed = True
        _in_use.discard(self)
        self.announcements.close()
        for each in self._all():
            each.close()

    def abandon(self) -> None:
        """Close every connection of a storage that was not closed; call it from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.close)

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to this event loop, unless the storage belongs to another one that is open."""
        if self._loop is not None:
            if not self._loop.is_closed():
                if self._process != _process:
                    message = "the storage was used before this process forked; make one in each"
                else:
                    message = "the storage is in use by another event loop; make one for each"
                raise StorageMisused(message)
            self.announcements.abandon()
            self._reset()
        self._loop = loop
        self._process = _process
        self.announcements.start()
        _in_use.add(self)
        if len(_in_use) == _MANY_STORAGES:
            warnings.warn(
                f"{_MANY_STORAGES} RedisStorage objects are open in this process, each with "
                "connections of its own; make one per process and share it",
                RuntimeWarning,
                stacklevel=4,
            )

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _youth(connection: Connection) -> float:
    stall_at = connection.pipeline.stall_at
    return float("inf") if stall_at is None else stall_at


_in_use: "weakref.WeakSet[Router]" = weakref.WeakSet()
# Counted up in every forked child: asking the system for the pid at every call would cost more.
_process = 0


def _forked() -> None:
    global _process  # noqa: PLW0603 - there is one process
    _process += 1
    _in_use.clear()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_forked)
