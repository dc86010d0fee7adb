"""The announcements of changes: one subscription to each server that has sessions.

The scripts that write or delete a session publish its digest, with the new revision, on a channel
under the key prefix (https://redis.io/docs/latest/develop/pubsub/). In a cluster, each master is
followed, although the nodes pass messages on to each other: that can fail without a notice.

Invariants:

- Listeners hear `resumed` only while every server has confirmed the subscription. They hear
  `interrupted` as soon as one is lost: pub/sub repeats no message.
- A server that is silent for a `timeout` counts as lost, so PING asks for a sign of life.
- The tasks belong to the router, and end with it. They run in empty contexts.
"""

import asyncio
import contextvars
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

import hiredis

from ..errors import SessionError
from ..storage import StorageListener
from . import _commands as commands
from ._driver import Address, ConnectionFactory, Receiver, Transport, address_of, open_connection
from ._errors import ConnectError, ErrorReply, ProtocolError, lost, reason

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_DIGEST: Final = 32
_MORE: Final = object()

_log = logging.getLogger("aiosessions")


class Announcements:
    """The subscriptions of one storage, and the listeners of its announcements.

    Args:
        channel: The name of the channel.
        timeout: Seconds after which connecting fails and a silent server is lost.
        servers: Finds the servers that have sessions, before a deadline.
        factory: Tells how to connect to a server.
    """

    def __init__(
        self,
        channel: bytes,
        timeout: float,
        servers: Callable[[float], Awaitable[list[Address]]],
        factory: Callable[[Address], ConnectionFactory],
    ) -> None:
        self._channel = channel
        self._timeout = timeout
        self._servers = servers
        self._factory = factory
        self._listeners: list[StorageListener] = []
        self._followers: dict[Address, _Follower] = {}
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._complete: bool | None = None  # None until the listeners know

    def listen(self, listener: StorageListener) -> Callable[[], None]:
        """See `AnnouncingStorage.listen`."""
        self._listeners.append(listener)
        if self._complete is not None:
            (listener.resumed if self._complete else listener.interrupted)()
        return partial(self._listeners.remove, listener)

    def start(self) -> None:
        """Follow the servers, from the event loop that runs, if anyone listens."""
        if self._listeners and self._task is None:
            self._changed = asyncio.Event()
            self._task = asyncio.get_running_loop().create_task(
                self._run(), name="aiosessions: announcements", context=contextvars.Context()
            )

    def abandon(self) -> None:
        """Forget the tasks of an event loop that was closed."""
        self._task = None
        self._followers.clear()
        self.check()

    def look_again(self) -> None:
        """Find the servers anew: they may have changed."""
        self._changed.set()

    def close(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()

    async def aclose(self) -> None:
        """Stop following, and wait until the tasks have ended."""
        self.close()
        if self._task is not None:
            await asyncio.wait([self._task])

    def check(self) -> None:
        """Tell the listeners if the announcements have become complete, or incomplete."""
        followers = self._followers.values()
        complete = bool(followers) and all(each.confirmed for each in followers)
        if complete is not self._complete:
            self._complete = complete
            for listener in tuple(self._listeners):
                (listener.resumed if complete else listener.interrupted)()
            self.look_again()

    def heard(self, message: bytes) -> None:
        """Pass an announcement on."""
        text = message.decode("ascii", "replace")
        for listener in tuple(self._listeners):
            listener.changed(text[:_DIGEST], text[_DIGEST:])

    async def _run(self) -> None:
        """Follow each server, until the task is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._changed.clear()
                try:
                    self._follow(await self._servers(loop.time() + self._timeout))
                except SessionError:
                    self.check()
                # While a server is lost, another one may have taken its place.
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if self._complete else self._timeout / 4):
                        await self._changed.wait()
        finally:
            tasks = [each.task for each in self._followers.values()]
            self._followers.clear()
            for task in tasks:
                task.cancel()
            self.check()
            if tasks:
                await asyncio.wait(tasks)

    def _follow(self, servers: list[Address]) -> None:
        for address in self._followers.keys() - set(servers):
            self._followers.pop(address).task.cancel()
        for address in servers:
            known = self._followers.get(address)
            if known is None or known.task.done():
                factory = self._factory(address)
                follower = _Follower(self, factory, self._channel, self._timeout)
                self._followers[address] = follower
        if self._complete is not None:  # else the first confirmation, or failure, tells
            self.check()


class _Follower:
    """The subscription to one server, which is made again whenever it is lost.

    Attributes:
        confirmed: Whether the server sends each announcement.
        task: The task.
    """

    def __init__(
        self, owner: Announcements, factory: ConnectionFactory, channel: bytes, timeout: float
    ) -> None:
        self._owner = owner
        self._factory = factory
        self._channel = channel
        self._timeout = timeout
        self._address = "the server"
        self._failures = 0
        self.confirmed = False
        self.task = asyncio.get_running_loop().create_task(
            self._run(), name="aiosessions: subscription", context=contextvars.Context()
        )

    def confirm(self) -> None:
        """Take the server's confirmation."""
        self.confirmed = True
        self._failures = 0
        self._owner.check()

    def lose(self) -> None:
        """Note that announcements may be missing from now on."""
        self.confirmed = False
        self._owner.check()

    def heard(self, message: bytes) -> None:
        """Pass an announcement on."""
        self._owner.heard(message)

    async def _run(self) -> None:
        while True:
            error = await self._subscribed()
            if not self._failures:
                _log.warning("no announcements of %s: %s", self._address, reason(error))
            pause = min(_FIRST_PAUSE * 2 ** min(self._failures, 10), _LONGEST_PAUSE)
            self._failures += 1
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - only jitter

    async def _subscribed(self) -> Exception:
        """Subscribe, and return the reason for which the subscription has ended."""
        socket = _Socket(self)
        transport: Transport | None = None
        try:
            connection = self._factory()
            self._address = address_of(connection)
            transport = await open_connection(connection, socket, self._timeout)
            self._address = address_of(connection)  # which Sentinel has told
            transport.write(commands.subscribe(self._channel))
            while True:
                socket.silent = True
                await asyncio.wait([socket.ended], timeout=self._timeout / 2)
                if socket.ended.done():
                    return socket.ended.result()
                if socket.silent:
                    return TimeoutError()
                transport.write(commands.PING)
        except ConnectError as error:
            return error.with_traceback(None)
        finally:
            socket.end(TimeoutError())
            if transport is not None:
                transport.abort()


class _Socket(Receiver):
    """One socket with a subscription.

    Attributes:
        ended: Gets the reason when the socket is lost.
        silent: Whether nothing has arrived since this was set.
    """

    def __init__(self, follower: _Follower) -> None:
        self._follower = follower
        self._reader = hiredis.Reader(
            protocolError=ProtocolError, replyError=ErrorReply, notEnoughData=_MORE
        )
        self.ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.silent = False

    def data_received(self, data: bytes) -> None:
        """Called by the transport."""
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not _MORE:
                self.reply_received(reply)
        except ProtocolError as error:
            self.end(ProtocolError(*error.args))

    def reply_received(self, reply: Any) -> None:
        """See `Receiver.reply_received`."""
        self.silent = False
        if self.ended.done():
            return
        if isinstance(reply, ErrorReply):
            self.end(reply)
        elif isinstance(reply, list) and len(reply) == 3:
            kind, _, value = reply
            if kind == b"message":
                self._follower.heard(value)
            elif kind == b"subscribe":
                self._follower.confirm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport."""
        self.end(lost(exc))

    def end(self, error: Exception) -> None:
        """Note that the socket is lost."""
        if not self.ended.done():
            self.ended.set_result(error)
            self._follower.lose()
