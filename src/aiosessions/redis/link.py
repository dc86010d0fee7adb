"""One connection to one server, shared by every caller, and replaced when it fails.

Callers never touch the socket. They queue a command and await its future; a writer task sends what
was queued in one turn of the event loop in one write, and a reader task hands each reply to the
command that it is for. So cancelling a caller disturbs nobody, and hundreds of callers cost one
connection and a few system calls.

Invariants:

- A connection object is used for one generation: connected once, and never again once anything is
  wrong with it. Replies of one generation can therefore not reach the commands of another.
- While there is anything to do, or a connection is up, there is one keeper task, which owns the
  connection, its reader and its writer, and closes them. `aclose` ends it.
- No more than one attempt to connect is under way, and failed attempts are spaced by a growing,
  jittered pause. A failed attempt fails what was waiting when it began; what has come since is
  worth another one.
"""

import asyncio
import contextlib
import functools
import logging
import random
from collections.abc import Callable
from typing import Any, Final

import hiredis
from redis._parsers.hiredis import NOT_ENOUGH_DATA
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError

from ..errors import StorageClosed
from .lane import Command, Lane

_log = logging.getLogger("aiosessions")

_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.25
_STALL: Final = 0.02
# Half of the replies are handed out, and their callers have a turn, before the other half is: so
# the server works for one half while the other runs here, not for all and then for none. That makes
# a fifth more loads with 32 callers. With fewer than these it would not pay for the turn.
_SHARE: Final = 16


class Link:
    """A shared connection to one server.

    Args:
        make_connection: Makes a connection that is not connected yet.
        timeout: Seconds that connecting may take.
    """

    def __init__(self, make_connection: Callable[[], AbstractConnection], timeout: float) -> None:
        self._make_connection = make_connection
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._lane = Lane()
        self._keeper: asyncio.Task[None] | None = None
        self._doom: asyncio.Future[Exception] | None = None
        self._work: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._failures = 0  # generations in a row that never got a reply
        self._not_before = 0.0
        self._closed = False

    def send(
        self,
        payload: bytes,
        accepts: frozenset[type],
        deadline: float,
        *,
        overdue: float | None = None,
        repeatable: bool = False,
        preludes: int = 0,
    ) -> Command:
        """Queue a packed command; `Command` has the arguments. It is overdue at its deadline.

        Its future resolves to a reply, or an exception, in time.
        """
        loop = self._loop
        future = loop.create_future()
        command = Command(
            payload, accepts, deadline, future, overdue or deadline, repeatable, preludes
        )
        if self._closed:
            command.resolve(StorageClosed("the storage is closed"))
            return command
        self._lane.add(command)
        if self._timer is None or deadline < self._timer.when():
            self._watch(deadline)
        if self._keeper is None or self._keeper.done():
            self._keeper = loop.create_task(self._keep(), name="aiosessions: connection")
        else:
            self._wake()
        return command

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything here."""
        return not len(self._lane)

    def close(self) -> None:
        """Have the connection closed. Whoever still waits for a reply gets `StorageClosed`."""
        self._closed = True
        self._lane.fail(StorageClosed("the storage was closed"))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._keeper is not None:
            self._keeper.cancel()

    async def aclose(self) -> None:
        """Close the connection, and wait until it is. It will be, even if that is cancelled."""
        self.close()
        if self._keeper is not None:
            await asyncio.wait([self._keeper])

    async def _keep(self) -> None:
        """Connect, and stay connected, while there is something to do."""
        while len(self._lane):
            await asyncio.sleep(self._not_before - self._loop.time())
            waiting = self._lane.waiting()
            try:
                connection = await self._connect()
            except Exception as error:  # noqa: BLE001 - whatever it is, nobody can be served
                self._failed(error)
                self._lane.fail(error, waiting)
            else:
                if self._closed:  # up to Python 3.11, asyncio.wait_for can swallow a cancellation
                    _abort(_transport(connection))
                    await _disconnect(connection)
                    break
                await self._serve(connection)

    def _failed(self, error: Exception) -> None:
        """Space the next attempt, the longer the more have failed in a row; tell it once.

        The jitter keeps the replicas of a service from all coming back at once.
        """
        if self._failures == 0 and len(self._lane):
            _log.warning("no connection to the server: %s", type(error).__name__)
        longest = min(_FIRST_PAUSE * 2 ** min(self._failures, 10), _LONGEST_PAUSE)
        pause = random.uniform(longest / 2, longest)  # noqa: S311 - only jitter
        self._not_before = self._loop.time() + pause
        self._failures += 1

    async def _connect(self) -> AbstractConnection:
        connection = self._make_connection()
        try:
            async with asyncio.timeout(self._timeout):
                await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            _abort(_transport(connection))
            await _disconnect(connection)
            raise
        return connection

    async def _serve(self, connection: AbstractConnection) -> None:
        """Exchange commands and replies until something is wrong."""
        self._doom = self._loop.create_future()
        transport = _transport(connection)
        tasks = [
            self._loop.create_task(self._read(connection), name="aiosessions: reader"),
            self._loop.create_task(self._write(connection), name="aiosessions: writer"),
        ]
        reason: Exception = RedisConnectionError("the task that keeps the connection was cancelled")
        try:
            reason = await self._doom
        finally:
            self._doom = None
            _abort(transport)
            for task in tasks:
                task.cancel()
            # From here on nothing is read or written, so nothing may stay under way.
            self._failed(reason)
            self._lane.disconnected(reason)
            self._watch(self._lane.deadline())
            try:
                await asyncio.wait(tasks)
            finally:
                await _disconnect(connection)

    async def _read(self, connection: AbstractConnection) -> None:
        """Give each reply to the command that it is for."""
        lane = self._lane
        parsed = _parsed(connection)
        try:
            while True:
                try:
                    # No timeout: deadlines are the lane's, and one for every single reply costs a
                    # third more. Nor any value of that argument: with one, redis-py takes ETIMEDOUT
                    # for its own timeout and returns None, which would pass for "not found".
                    reply: Any = await connection.read_response(disable_decoding=True)
                except RedisConnectionError as error:
                    # What Sentinel's connections make of a ReadOnlyError.
                    if isinstance(error.__context__, ReadOnlyError):
                        raise error.__context__ from None
                    raise
                except ResponseError as error:
                    reply = error.with_traceback(None)
                handed_out, share = 0, max(_SHARE, lane.under_way // 2)
                while reply is not NOT_ENOUGH_DATA:
                    if isinstance(reply, ReadOnlyError | RedisConnectionError):
                        self._give_up(reply)
                        return
                    if handed_out == share:
                        handed_out = 0
                        await asyncio.sleep(0)
                    lane.answer(reply)
                    handed_out += 1
                    reply = parsed()
                self._failures = 0
                if lane.queued:
                    self._wake()
        except Exception as error:  # noqa: BLE001 - drivers raise AttributeError and the like, too
            self._give_up(error)

    async def _write(self, connection: AbstractConnection) -> None:
        """Write whatever is queued, as much as there is room for; then wait for more of either."""
        lane = self._lane
        try:
            while connection.is_connected:  # else redis-py would connect it again, unasked
                if batch := lane.next_batch():
                    await connection.send_packed_command(batch, check_health=False)
                else:
                    self._work = self._loop.create_future()
                    await self._work
            self._give_up(RedisConnectionError("the connection has been closed"))
        except Exception as error:  # noqa: BLE001 - drivers raise AttributeError and the like, too
            self._give_up(error)

    def _wake(self) -> None:
        """There is something to write, or room for it."""
        if self._work is not None and not self._work.done():
            self._work.set_result(None)

    def _give_up(self, error: Exception) -> None:
        """End this generation of the connection."""
        if self._doom is not None and not self._doom.done():
            self._doom.set_result(error)

    def _watch(self, deadline: float | None) -> None:
        """Look again at the earliest deadline: one timer, however many commands there are."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer = self._loop.call_at(deadline, self._check_deadlines)

    def _check_deadlines(self, *, stalled: bool = False) -> None:
        """Fail what is late, and replace a connection that is stuck."""
        now = self._loop.time()
        if not stalled and self._timer is not None and now - self._timer.when() > _STALL:
            # It is the event loop that was stuck: replies may be waiting to be read.
            check = functools.partial(self._check_deadlines, stalled=True)
            self._timer = self._loop.call_later(_STALL, check)
            return
        self._timer = None
        error = TimeoutError()
        if self._lane.expire(now, error):
            self._give_up(error)  # and `_keep` watches on, when it has taken the connection down
        else:
            self._watch(self._lane.deadline())


def _parsed(connection: AbstractConnection) -> Callable[[], Any]:
    """What gives the replies that have arrived besides, or `NOT_ENOUGH_DATA`.

    A reply that is there already needs no coroutine to read it, which would cost as much as all the
    rest of the bookkeeping. There is no public way to hiredis' reader; where there is none, as in
    fakeredis, each reply is read for itself.
    """
    reader = getattr(getattr(connection, "_parser", None), "_reader", None)
    gets: Callable[[bool], Any] | None = getattr(reader, "gets", None)
    if gets is None:
        return lambda: NOT_ENOUGH_DATA

    def parsed() -> Any:
        reply = gets(False)  # noqa: FBT003 - its only argument: do not decode
        while type(reply) is hiredis.PushNotification:  # nobody here has asked for any
            reply = gets(False)  # noqa: FBT003
        return reply

    return parsed


def _transport(connection: AbstractConnection) -> asyncio.WriteTransport | None:
    """The transport of a connection that is up. There is no public way to it."""
    return getattr(getattr(connection, "_writer", None), "transport", None)


def _abort(transport: asyncio.WriteTransport | None) -> None:
    """Drop what a transport has not sent yet.

    Closing, as redis-py does, has it sent later, when a stuck server reads again: commands that
    have failed by then, or were sent again elsewhere.
    """
    if transport is not None:
        transport.abort()


async def _disconnect(connection: AbstractConnection) -> None:
    """Have a connection, which has gone already, let go of its streams."""
    with contextlib.suppress(Exception):
        await connection.disconnect(nowait=True)
