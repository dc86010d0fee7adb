"""One connection to a server, shared by all callers, and replaced when it fails.

Callers never touch the socket. `Connection.send` puts a command into the pipeline. A command that
finds nothing in flight is written at once. The others of one turn of the event loop leave in one
write, or in two after a batch of replies. Replies resolve the futures of the commands as they
arrive. So cancelling a caller disturbs no other, and hundreds of callers cost one connection.

Invariants:

- A `Channel` is one socket. Once anything is wrong with it, it is closed and never used again, so a
  reply of one socket cannot reach a command of another.
- While there is a channel, or commands wait, one task supervises the connection: it connects, and
  replaces a lost channel. It runs in an empty context, because it outlives its first caller.
- A channel *stalls* when a reply has been due for a `timeout` and nothing arrives: nothing more is
  written to it, and the task makes another one. If the stalled channel answers first, it stays.
  Otherwise the new one replaces it. A slow server therefore fails only commands past their own
  deadline.
- Commands wait for a new connection as long as the outage lets them (see _outage.py).
"""

import asyncio
import contextvars
from collections.abc import Callable
from typing import Final

from ..errors import StorageClosed, StorageUnavailable
from ._channel import Channel
from ._commands import Command
from ._driver import Address, ConnectionFactory, address_of, open_connection
from ._errors import ConnectError, ConnectionLost
from ._outage import Outage
from ._pipeline import Pipeline

# If a timer is late by this much, the event loop was blocked, and replies may wait in the socket.
_LAG: Final = 0.02
# Connecting fails before the commands that wait for it do, so that these get the reason.
_CONNECT_SHARE: Final = 0.9
_NEVER: Final = float("inf")


class Connection:
    """A shared connection to one server.

    Args:
        factory: Makes a connection of the driver, not connected yet.
        timeout: Seconds after which connecting fails and a silent channel stalls.
        on_outage: Called when a connection cannot be made, is lost or stalls.
        server: The address under which the router knows the server.
        on_reconnect: Called when a connection was made anew, before any command is sent on it.

    Attributes:
        server: See above.
        outage: The outage of the server, if there is one.
        pipeline: The commands.
        channel: The socket in use, or None.
        connects: How many channels were made.
        bytes_sent: Bytes of commands that were written.
        bytes_received: Bytes of replies.
    """

    def __init__(
        self,
        factory: ConnectionFactory,
        timeout: float,
        on_outage: Callable[[], None],
        server: Address,
        on_reconnect: Callable[[], None],
    ) -> None:
        self._factory = factory
        self._timeout = timeout
        self._on_outage = on_outage
        self._on_reconnect = on_reconnect
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.Context()
        self._task: asyncio.Task[None] | None = None
        self._changed: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._wake_at = _NEVER  # of the timer; uvloop's handles do not always know it
        self._ready = False  # commands may be written now
        self._flush_due = False
        self._flush_at: float = 1  # so many queued commands leave before the end of the turn
        self._paused = self._stalled = False
        self._received_at = 0.0
        self._closed: Exception | None = None  # the reason
        self._wanted = False  # a command that did not wait asks for an attempt to connect
        self.outage = Outage("the server")  # until its address is known
        self.server = server
        self.pipeline = Pipeline()
        self.channel: Channel | None = None
        self.connects = self.bytes_sent = self.bytes_received = 0

    def send(self, command: Command) -> None:
        """Queue a command and give it a future, which gets the reply or an exception in time."""
        command.future = self._loop.create_future()
        pipeline = self.pipeline
        if self._closed is not None:
            command.resolve(self._closed)
            return
        if self.outage.active and self._fails_at_once():
            command.resolve(self.outage.error)
            return
        try:
            pipeline.add(command)
        except StorageUnavailable as error:
            command.resolve(error)
            return
        if command.deadline < self._wake_at:
            self._watch(command.deadline)
        if self._ready:
            if pipeline.queued >= self._flush_at:
                self._flush()
            elif not self._flush_due:
                self._flush_due = True
                self._loop.call_soon(self._flush, context=self._context)
        else:
            self._supervise()

    def close(self, error: Exception | None = None) -> None:
        """Close the connection. Commands that wait fail with the error, or `StorageClosed`."""
        if self._closed is not None:
            return
        self._closed = error or StorageClosed("the storage was closed")
        self._drop(self._closed)
        self.pipeline.fail_queued(self._closed)
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    async def aclose(self) -> None:
        """Close the connection and wait until its task has ended."""
        self.close()
        if self._task is not None:
            await asyncio.wait([self._task])

    # Reports of the channel.

    def received(self, size: int, replies: int) -> None:
        """Go on after a batch of replies."""
        pipeline = self.pipeline
        pending = replies + len(pipeline.in_flight)
        # Callers probably send again. Half of that leaves before the end of the turn, so that the
        # server works on it while this process prepares the other half.
        self._flush_at = (pending + 1) // 2
        pipeline.forget_answered()
        self.bytes_received += size
        self._received_at = self._loop.time()
        if pipeline.refusal is not None:
            if not pipeline.in_flight:
                self._fail(pipeline.refusal)
            return
        if replies and self.outage.active:
            self._recovered()
        if pipeline.queued and self._ready:
            self._flush()

    def lose(self, channel: Channel, error: Exception) -> None:
        """Replace a channel that has ended."""
        if channel is self.channel:
            self._fail(error)

    def pause(self, channel: Channel, *, paused: bool) -> None:
        """Hold back the queue while the transport's buffer is full."""
        if channel is self.channel:
            self._paused = paused
            self._ready = not paused and not self._stalled
            if self._ready:
                self._flush()

    # Writing.

    def _flush(self) -> None:
        """Write the queue, as far as there is room in flight and in the transport."""
        self._flush_due = False
        channel = self.channel
        while self._ready and channel is not None and channel.transport is not None:
            batch = self.pipeline.next_batch(self._loop.time(), self._timeout)
            if not batch:
                break
            data = batch[0] if len(batch) == 1 else b"".join(batch)
            self.bytes_sent += len(data)
            channel.transport.write(data)
            self._flush_at = _NEVER  # once in a turn: the rest leaves at its end

    # Connecting.

    def _supervise(self) -> None:
        """See that a task connects."""
        if self._task is None and self._closed is None:
            # A new context, because an eager task cannot enter one that is in use.
            task = self._loop.create_task(
                self._run(), name="aiosessions: connection", context=contextvars.Context()
            )
            if not task.done():  # an eager task may have ended already
                self._task = task
                task.add_done_callback(self._ended, context=self._context)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """Go on after the task has failed; anyone may have cancelled it."""
        if self._task is task:
            self._task = None
            if self._closed is None and (self.channel is not None or self.pipeline.waiting):
                self._fail(ConnectionLost("the task that keeps the connection was cancelled"))

    async def _run(self) -> None:
        """Connect while commands wait, and watch the channel until it is lost or stalls."""
        while self.channel is not None or self.pipeline.waiting or self._wanted:
            if self.channel is None or self._stalled:
                if self._stalled and not (self.pipeline.waiting or self._wanted):
                    break
                await self._connect()
            else:
                self._changed = self._loop.create_future()
                await self._changed
        if self.channel is not None:
            self._drop(TimeoutError())
        self._task = None  # now, because a command may come before `_ended`

    async def _connect(self) -> None:
        """Make one attempt, after the pause that is due."""
        await asyncio.sleep(self.outage.not_before - self._loop.time())
        self._wanted = False
        channel = Channel(self)
        try:
            connection = self._factory()
            self.outage.address = address_of(connection)
            limit = _CONNECT_SHARE * self._timeout
            channel.transport = await open_connection(connection, channel, limit)
            self.outage.address = address_of(connection)  # which Sentinel has told
        except ConnectError as error:
            if self.channel is None or self._stalled:  # else the stalled channel has answered
                self._failed(error.with_traceback(None))
            return
        if self._closed is not None or (self.channel is not None and not self._stalled):
            channel.close()  # the stalled channel has answered in between
            return
        if self.channel is not None:
            self._drop(TimeoutError())
        self.channel = channel
        self.connects += 1
        if self.connects > 1:
            self._on_reconnect()
        self._received_at = self._loop.time()
        self._paused = self._stalled = False
        self._ready = True
        self._flush_at = 1
        self._flush()

    def _fail(self, error: Exception) -> None:
        """End the channel, and count that as a failure if a caller waits."""
        self._drop(error)
        if self.pipeline.waiting:
            self._failed(error)
            self._supervise()

    def _drop(self, error: Exception) -> None:
        """Close the channel; commands in flight return to the queue or fail."""
        channel, self.channel = self.channel, None
        self._ready = self._stalled = False
        if channel is not None:
            channel.close()
        self.pipeline.disconnected(error)
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    # Outages.

    def _failed(self, error: Exception) -> None:
        """Record a failure; fail the commands that wait if it lasts too long."""
        now = self._loop.time()
        self.outage.failed(error, now)
        if self.outage.final or not self.outage.lets_wait(now):
            self.pipeline.fail_queued(error)
        self._on_outage()

    def _fails_at_once(self) -> bool:
        """Whether a new command fails at once, because the outage has lasted for too long."""
        now = self._loop.time()
        connected = self.channel is not None and not self._stalled
        if connected or self.outage.final or self.outage.lets_wait(now):
            return False
        if self._task is None and self.outage.renew(now):
            return False
        self._wanted = True
        self._supervise()
        self._on_outage()
        return True

    def _recovered(self) -> None:
        """End the outage, because a proper reply has come."""
        self.outage.end(self._loop.time())
        if self._stalled:
            self._stalled = False
            self._ready = not self._paused
            if self.pipeline.in_flight:  # these may stall again
                self._watch(min(self._wake_at, self._received_at + self._timeout / 2))

    def _stall(self, now: float) -> None:
        """Write nothing more to a channel that has been silent for too long, and replace it."""
        self._stalled = True
        self._ready = False
        self.outage.begin(TimeoutError(), now)
        self._wake()
        self._on_outage()

    def _watch(self, moment: float) -> None:
        """Look at the deadlines at a moment: one timer, however many commands there are."""
        if self._timer is not None:
            self._timer.cancel()
        self._wake_at = moment
        self._timer = self._loop.call_at(moment, self._on_timer, context=self._context)

    def _on_timer(self) -> None:
        if self._loop.time() - self._wake_at <= _LAG:
            self._check_deadlines()
            return
        # The event loop was blocked, and replies may wait in the socket: let it read them.
        self._timer = self._loop.call_later(_LAG / 2, self._check_deadlines, context=self._context)

    def _check_deadlines(self) -> None:
        """Fail commands past their deadline, and notice a channel that stalls."""
        now = self._loop.time()
        self._timer, self._wake_at = None, _NEVER
        pipeline, outage = self.pipeline, self.outage
        pipeline.expire(now, outage.error if outage.active else TimeoutError())
        moments = [pipeline.next_deadline()]
        stall_at = pipeline.stall_at
        if stall_at is not None and not self._stalled:
            stall_at = max(stall_at, self._received_at + self._timeout / 2)
            if stall_at <= now:
                self._stall(now)
            else:
                moments.append(stall_at)
        next_moment = min((each for each in moments if each is not None), default=None)
        if next_moment is not None:
            self._watch(next_moment)
