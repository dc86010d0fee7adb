"""The subscription to the announcements of one server.

Invariants:

- A subscription counts as confirmed until it is lost. A server that answers no PING for a `timeout`
  counts as lost. Messages are no sign of life: the buffer of the server may hold seconds of them,
  and the answer comes after those.
- A message that is not understood ends the subscription: it may have been an announcement.
"""

import asyncio
import logging
import random
import re
from collections.abc import Coroutine
from typing import Any, Final, Protocol

import hiredis

from . import _commands as commands
from ._driver import ConnectionFactory, Receiver, Transport, address_of, open_connection
from ._errors import ConnectError, ConnectionLost, ErrorReply, ProtocolError, lost, reason

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_MORE: Final = object()
_is_announcement = re.compile(rb"([0-9a-f]{32})([!-~]*)").fullmatch

_log = logging.getLogger("aiosessions")


class Owner(Protocol):
    """The part of `Announcements` that a subscription needs."""

    def check(self) -> None:
        """Tell the listeners if the subscription was confirmed or lost."""
        ...

    def heard(self, digest: str, revision: str) -> None:
        """Pass an announcement on."""
        ...

    def spawn(self, run: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        """Start a task."""
        ...


class Follower:
    """The subscription to one server, which is made again whenever it is lost.

    Attributes:
        confirmed: Whether the subscription is confirmed; None until it was confirmed or has failed.
        task: The task, once `start` was called.
    """

    task: "asyncio.Task[None]"

    def __init__(
        self, owner: Owner, factory: ConnectionFactory, channel: bytes, timeout: float
    ) -> None:
        self._owner = owner
        self._factory = factory
        self._channel = channel
        self._timeout = timeout
        self._address = "the server"
        self._failures = 0
        self._socket: Socket | None = None
        self.heard = owner.heard
        self.confirmed: bool | None = None

    def start(self) -> None:
        """Subscribe."""
        self.task = self._owner.spawn(self._run(), "aiosessions: subscription")

    def confirm(self) -> None:
        """Take the server's confirmation."""
        if not self.confirmed:
            self.confirmed = True
            self._failures = 0
            self._owner.check()

    def lose(self) -> None:
        """Note that announcements may be missing from now on."""
        self.confirmed = False
        self._owner.check()

    def renew(self) -> None:
        """Subscribe again."""
        if self._socket is not None:
            self._socket.end(ConnectionLost("the server may be another one now"))

    async def _run(self) -> None:
        await asyncio.sleep(0)  # an eager task would run before `start` has noted it
        while True:
            error = await self._subscribed()
            if not self._failures:
                _log.warning("no announcements of %s: %s", self._address, reason(error))
            pause = min(_FIRST_PAUSE * 2 ** min(self._failures, 10), _LONGEST_PAUSE)
            self._failures += 1
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - only jitter

    async def _subscribed(self) -> Exception:
        """Subscribe, and return the reason for the end of the subscription."""
        socket = self._socket = Socket(self)
        transport: Transport | None = None
        try:
            connection = self._factory()
            self._address = address_of(connection)
            transport = await open_connection(connection, socket, self._timeout)
            self._address = address_of(connection)  # known only now behind Sentinel
            transport.write(commands.subscribe(self._channel))
            while True:
                socket.silent = True
                # The first answer shows that the user may run PING, too.
                transport.write(commands.PING)
                await asyncio.wait([socket.ended], timeout=self._timeout / 2)
                if socket.ended.done():
                    return socket.ended.result()
                if socket.silent:
                    return TimeoutError()
        except ConnectError as error:
            return error.with_traceback(None)
        finally:
            self._socket = None
            socket.end(TimeoutError())
            if transport is not None:
                transport.abort()


class Socket(Receiver):
    """One socket with a subscription.

    Attributes:
        ended: Gets the reason when the socket is lost.
        silent: Whether no answer to PING has arrived since this was set.
    """

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._subscribed = False
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
        if self.ended.done():
            return
        match reply:
            case [b"message", _, bytes(text)] if found := _is_announcement(text):
                self._follower.heard(found[1].decode(), found[2].decode())
            case [b"subscribe", _, _]:
                self._subscribed = True
            case b"PONG" | [b"pong", b""] if self._subscribed:
                self.silent = False
                self._follower.confirm()
            case ErrorReply():
                self.end(reply)
            case _:
                self.end(ProtocolError("the server sent a message that is not an announcement"))

    def eof_received(self) -> None:
        """Called by the transport, some turns of the event loop before `connection_lost`."""
        self.end(lost(None))

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport."""
        self.end(lost(exc))

    def end(self, error: Exception) -> None:
        """Note that the socket is lost."""
        if not self.ended.done():
            self.ended.set_result(error)
            self._follower.lose()
