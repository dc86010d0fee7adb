"""What is waiting for, and under way on, one connection to a server: bookkeeping without I/O.

A lane is a queue of commands that have not been written yet, and a second one of commands that
were written and whose replies are due, in that order. Whoever does the I/O (see link.py) takes
batches from the first and hands in replies for the second.

Rules:

- Replies come in the order in which commands were written: the oldest command under way gets the
  next reply, also when its caller is gone, whose reply is then dropped.
- Any doubt about that order, which is a reply that nobody asked for or one of a type that the
  command never has, is `OutOfStep`: the connection has to go, and all that was under way on it.
- When a connection goes, what was under way may have been applied or not. If it is `repeatable`,
  which means that applying it twice does no harm, it is sent once more on the next connection, at
  the front of the queue, and is from then on `unsure`. Otherwise, and the second time, it fails.
- Unless the connection went because it was stuck: then what was under way fails. The server may
  still apply the first copy at any time, and a second one must not be acknowledged before that.
- A command that the server refused in a way that ends the connection, too, because it is a
  read-only replica, is loading its data or asks for a password, is sent once more whatever it is,
  and not `unsure`: it has not been applied.
- Every command has a deadline, at which it fails. When the oldest one under way is `overdue`, it is
  not waiting its turn: the connection is stuck. That may be later, for one that came here late.
- What is under way is bounded, in commands and in bytes of commands and of expected replies.
  Whatever is beyond waits in the queue.
- A command whose caller has gone away is never written.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

MAX_COMMANDS: Final = 1024
MAX_BYTES: Final = 4 * 1024 * 1024
# Enough to amortise a system call, small enough that a large record is soon followed by others.
BATCH_BYTES: Final = 128 * 1024

# Error replies that end the connection.
_FINAL_REPLIES: Final = (ReadOnlyError, BusyLoadingError, AuthenticationError)
_TRIES: Final = 2


class OutOfStep(RedisError):
    """A reply cannot belong to the command that it is due for."""


class Command:
    """A command, packed, and the future that its caller awaits.

    The future's result is the reply, or an exception that says why there is none: the caller
    raises it, in its own words.

    Attributes:
        payload: What to write.
        accepts: The types that its reply can have. An error reply is always accepted.
        deadline: When to give up, on the event loop's clock.
        future: What the caller awaits.
        overdue: When it has been waited for so long that its connection must be stuck.
        repeatable: It may be applied twice.
        preludes: How many replies come before its own, because its payload begins with other
            commands, such as ASKING.
        unsure: It was under way on a connection that went, so it may have been applied before the
            reply that has come now.
        tries: How often it has been written.
        due: How many of the preludes' replies are still to come.
        weight: The bytes that it counts for, while it is under way.
    """

    unsure: bool = False
    tries: int = 0
    due: int = 0
    weight: int = 0

    def __init__(  # noqa: PLR0917 - one is made for every call, and keywords cost time
        self,
        payload: bytes,
        accepts: frozenset[type],
        deadline: float,
        future: asyncio.Future[Any],
        overdue: float,
        repeatable: bool = False,  # noqa: FBT001, FBT002
        preludes: int = 0,
    ) -> None:
        self.payload = payload
        self.accepts = accepts
        self.deadline = deadline
        self.future = future
        self.overdue = overdue
        self.repeatable = repeatable
        self.preludes = preludes

    def resolve(self, result: Any) -> None:
        """Hand the caller a reply or an exception, if it is still there."""
        if not self.future.done():
            self.future.set_result(result)


class Lane:
    """The commands of one connection after the other; the module says by which rules."""

    def __init__(
        self,
        *,
        max_commands: int = MAX_COMMANDS,
        max_bytes: int = MAX_BYTES,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        self._max_commands = max_commands
        self._max_bytes = max_bytes
        self._batch_bytes = batch_bytes
        self._queue: deque[Command] = deque()
        self._under_way: deque[Command] = deque()
        self._weight = 0
        self._reply_bytes = 0  # what replies have weighed of late

    def __len__(self) -> int:
        return len(self._queue) + len(self._under_way)

    @property
    def under_way(self) -> int:
        """How many commands have been written whose replies are due."""
        return len(self._under_way)

    @property
    def queued(self) -> bool:
        """Whether a command waits to be written."""
        return bool(self._queue)

    def add(self, command: Command) -> None:
        """Queue a command."""
        self._queue.append(command)

    def next_batch(self) -> list[bytes]:
        """Take what is to be written now; nothing if there is nothing, or no room under way.

        One command always has room, whatever it weighs.
        """
        batch: list[bytes] = []
        size = 0
        queue, under_way = self._queue, self._under_way
        while queue and size < self._batch_bytes:
            command = queue[0]
            if command.future.done():
                queue.popleft()
                continue
            weight = len(command.payload) + self._reply_bytes
            if under_way and (
                len(under_way) >= self._max_commands or self._weight + weight > self._max_bytes
            ):
                break
            queue.popleft()
            command.weight = weight
            command.tries += 1
            command.due = command.preludes
            self._weight += weight
            under_way.append(command)
            batch.append(command.payload)
            size += len(command.payload)
        return batch

    def answer(self, reply: Any) -> None:
        """Give the next reply, or error reply, to the oldest command under way.

        Raises:
            OutOfStep: It cannot be that command's reply.
        """
        if not self._under_way:
            message = "the server sent a reply that nobody asked for"
            raise OutOfStep(message)
        command = self._under_way[0]
        if command.due:
            command.due -= 1
            return
        self._under_way.popleft()
        self._weight -= command.weight
        kind = type(reply)
        if kind is bytes:
            self._reply_bytes += (len(reply) - self._reply_bytes) >> 3
        if kind not in command.accepts and not isinstance(reply, ResponseError):
            error = OutOfStep(f"the server sent a reply of an unexpected type, {kind.__name__}")
            command.resolve(error)
            raise error
        if not command.future.done():
            command.future.set_result(reply)

    def disconnected(self, error: Exception) -> None:
        """The connection has gone, and why: send again, or fail, what was under way on it."""
        again: list[Command] = []
        stuck = isinstance(error, TimeoutError)
        for command in self._under_way:
            if command.future.done():
                continue
            # It is the first whose reply was the refusal, if it was one.
            refused = isinstance(error, _FINAL_REPLIES) and command is self._under_way[0]
            command.unsure = command.unsure or not refused
            if command.tries < _TRIES and not stuck and (command.repeatable or refused):
                again.append(command)
            else:
                command.resolve(error)
        self._under_way.clear()
        self._weight = 0
        self._queue.extendleft(reversed(again))

    def waiting(self) -> tuple[Command, ...]:
        """The commands that have not been written."""
        return tuple(self._queue)

    def fail(self, error: Exception, commands: Iterable[Command] | None = None) -> None:
        """Give up on these commands; on all by default, also on those under way."""
        if commands is None:
            commands = (*self._under_way, *self._queue)
            self._under_way.clear()
            self._weight = 0
        for command in commands:
            command.resolve(error)
        self._drop_resolved()

    def _drop_resolved(self) -> None:
        self._queue = deque(command for command in self._queue if not command.future.done())

    def deadline(self) -> float | None:
        """The earliest deadline that matters; None if there is none.

        That is a waiting caller's, or when the oldest command under way, whose caller may be gone,
        is overdue.
        """
        deadlines = [
            command.deadline
            for command in (*self._under_way, *self._queue)
            if not command.future.done()
        ]
        if self._under_way:
            deadlines.append(self._under_way[0].overdue)
        return min(deadlines, default=None)

    def expire(self, now: float, error: Exception) -> bool:
        """Fail every command that is past its deadline.

        Returns:
            Whether the connection is stuck, and has to go.
        """
        stuck = bool(self._under_way) and self._under_way[0].overdue <= now
        for command in (*self._under_way, *self._queue):
            if command.deadline <= now:
                # One under way stays where it is: its reply, if it comes after all, is its own.
                command.resolve(error)
        self._drop_resolved()
        return stuck
