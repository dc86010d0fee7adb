"""Sans-I/O implementation of a pipeline: the commands of one connection to a server.

A pipeline holds a queue of commands that are not written yet, and the commands in flight: written,
with their replies to come. The owner does the I/O (see _connection.py): it takes batches to write
and hands in replies.

Rules:

- Replies come in the order of the commands. The oldest command in flight gets the next reply, even
  if its caller is gone; then the reply is dropped.
- A reply without a command, or of a type that the command never has, is a `ProtocolError`. The
  owner then has to close the connection.
- When a connection ends, each command in flight is in doubt: it may have been applied or not. A
  retryable command returns to the front of the queue, a few times. Any other one fails.
- A command that the server refuses because of its role or state (a read-only replica, loading) was
  not applied, so it is not in doubt. It returns to the queue, and the pipeline writes nothing more
  on this connection. The owner replaces the connection when nothing is in flight any more.
- A command that is past its deadline fails. If it is in flight, it keeps its place there, because
  its reply may still come. The other commands are not affected.
- A command without a waiting caller is never written, and its payload is released.
- The queue and the commands in flight are bounded in commands and bytes. The bytes in flight
  include an estimate of the replies: the size of recent large records.
- Each operation takes constant time, amortised, however many commands wait.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import hiredis

from ..errors import StorageUnavailable
from ._commands import ASKING, Command
from ._errors import CONNECTION_REFUSALS, ErrorReply, ProtocolError

MAX_IN_FLIGHT: Final = 1024
MAX_BYTES_IN_FLIGHT: Final = 4 * 1024 * 1024
MAX_QUEUED: Final = 65_536
MAX_BYTES_QUEUED: Final = 64 * 1024 * 1024
# Enough to amortise a system call, small enough that a large record is soon followed by others.
BATCH_BYTES: Final = 128 * 1024

_MAX_ATTEMPTS: Final = 3
_PushNotification: Final = hiredis.PushNotification
# Before the first record has come, a reply may have any size: a few commands find out.
_UNKNOWN_RECORD: Final = 256 * 1024


class Pipeline:
    """The commands of one connection and its successors; the module states the rules.

    Attributes:
        queued: The number of commands in the queue.
        in_flight: The commands in flight, the oldest first. Only the pipeline changes it.
        refusal: The error reply because of which nothing more is written, or None.
        orphans: The number of writes in flight without a waiting caller.
    """

    def __init__(
        self,
        *,
        max_in_flight: int = MAX_IN_FLIGHT,
        max_bytes_in_flight: int = MAX_BYTES_IN_FLIGHT,
        max_queued: int = MAX_QUEUED,
        max_bytes_queued: int = MAX_BYTES_QUEUED,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        self._max_in_flight = max_in_flight
        self._max_bytes_in_flight = max_bytes_in_flight
        self._max_queued = max_queued
        self._max_bytes_queued = max_bytes_queued
        self._batch_bytes = batch_bytes
        # May hold commands that were discarded; their flag `queued` is False.
        self._queue: deque[Command] = deque()
        self._refused: list[Command] = []
        self._bytes_queued = 0
        self._bytes_in_flight = 0
        self._record_bytes = _UNKNOWN_RECORD
        # Commands in the order of their deadlines. Commands come with one timeout, so most can be
        # appended; the others, such as redirected ones, are in a heap.
        self._by_deadline: deque[Command] = deque()
        self._early: list[tuple[float, int, Command]] = []
        self._numbers: Iterator[int] = itertools.count()
        self.queued = 0
        self.in_flight: deque[Command] = deque()
        self.refusal: ErrorReply | None = None
        self.orphans = 0

    @property
    def waiting(self) -> bool:
        """Whether a caller waits for a command here."""
        return self.next_deadline() is not None

    @property
    def stall_at(self) -> float | None:
        """The time from which the oldest command in flight has waited too long; None if none is."""
        return self.in_flight[0].stall_at if self.in_flight else None

    def add(self, command: Command) -> None:
        """Queue a command.

        Raises:
            StorageUnavailable: The queue is full.
        """
        size = len(command.payload)
        if self.queued >= self._max_queued or (
            self.queued and self._bytes_queued + size > self._max_bytes_queued
        ):
            message = "too many commands wait for the server"
            raise StorageUnavailable(message)
        command.queued = True
        self._queue.append(command)
        self.queued += 1
        self._bytes_queued += size
        by_deadline = self._by_deadline
        if by_deadline and command.deadline < by_deadline[-1].deadline:
            heapq.heappush(self._early, (command.deadline, next(self._numbers), command))
        else:
            by_deadline.append(command)

    def discard(self, command: Command) -> None:
        """Forget a command after its caller left. One in flight stays for its reply."""
        if command.queued:
            self._leave_queue(command)
            if len(self._queue) > 2 * self.queued + 64:
                self._queue = deque(each for each in self._queue if each.queued)
        elif command.weight and command.template.writes and not command.orphan:
            command.orphan = True
            self.orphans += 1
        command.payload = b""
        command.future.cancel()  # unless it has its result: a closed coroutine waits no more
        if len(self._by_deadline) > 2 * (self.queued + len(self.in_flight)) + 64:
            self._by_deadline = deque(each for each in self._by_deadline if not each.future.done())

    def next_batch(self, now: float, timeout: float) -> list[bytes]:
        """Take the payloads to write now; none if there is no command, or no room in flight.

        One command of any size always has room.

        Args:
            now: The time on the event loop's clock.
            timeout: Seconds after which a missing reply means that the connection stalls.
        """
        batch: list[bytes] = []
        if self.refusal is not None:
            return batch
        queue, in_flight, record_bytes = self._queue, self.in_flight, self._record_bytes
        late, half = now + timeout, now + timeout / 2
        bytes_in_flight, size = self._bytes_in_flight, 0
        while queue and size < self._batch_bytes:
            command = queue[0]
            if not command.queued:
                queue.popleft()
                continue
            payload = command.payload
            written = len(payload)
            weight = written + record_bytes if command.template.bulky else written
            if in_flight and (
                bytes_in_flight + weight > self._max_bytes_in_flight
                or len(in_flight) >= self._max_in_flight
            ):
                break
            queue.popleft()
            command.queued = False
            command.weight = weight
            # The deadline, unless the command has spent most of its time elsewhere.
            command.stall_at = command.deadline if command.deadline > half else late
            command.attempts += 1
            command.replies_due = command.extra_replies
            in_flight.append(command)
            batch.append(ASKING + payload if command.extra_replies else payload)
            bytes_in_flight += weight
            size += written
        self.queued -= len(batch)
        self._bytes_queued -= size
        self._bytes_in_flight = bytes_in_flight
        return batch

    def answer(self, reply: Any) -> None:
        """Give the next reply, or error reply, to the oldest command in flight.

        Raises:
            ProtocolError: The reply cannot belong to that command.
        """
        kind = type(reply)
        if self.in_flight:
            command = self.in_flight[0]
            template = command.template
            if kind in template.replies and not command.replies_due:
                self._land(command)
                if template.bulky and kind is bytes and len(reply) != self._record_bytes:
                    self._learn(len(reply))
                future = command.future
                if not future.done():
                    future.set_result(reply)
                return
        if kind is not _PushNotification:  # RESP3 delivers these out of band
            self._answer_otherwise(reply)

    def _answer_otherwise(self, reply: Any) -> None:
        """Take a reply that is not the reply proper of the oldest command in flight."""
        if not self.in_flight:
            message = "the server sent a reply without a command"
            raise ProtocolError(message)
        command = self.in_flight[0]
        if command.replies_due and (reply == b"OK" or isinstance(reply, ErrorReply)):
            command.replies_due -= 1
            return
        if not isinstance(reply, ErrorReply):
            message = f"the server sent a reply of an unexpected type, {type(reply).__name__}"
            raise ProtocolError(message)
        self._land(command)
        if reply.code in CONNECTION_REFUSALS and not command.future.done():
            self.refusal = reply
            self._refused.append(command)
            command.attempts -= 1  # it was not applied
        else:
            command.resolve(reply)

    def forget_answered(self) -> None:
        """Drop the deadlines of commands that are answered. Call it after a batch of replies."""
        by_deadline = self._by_deadline
        while by_deadline and by_deadline[0].future.done():
            by_deadline.popleft()

    def disconnected(self, error: Exception) -> None:
        """Take back or fail the commands in flight, because the connection has ended.

        Args:
            error: The reason.
        """
        retries = self._refused
        for command in self.in_flight:
            command.weight = 0
            if command.future.done():
                continue
            command.in_doubt = True
            if command.template.retryable and command.attempts < _MAX_ATTEMPTS:
                retries.append(command)
            else:
                command.resolve(error)
        self.in_flight.clear()
        self._refused = []
        self._bytes_in_flight = 0
        self.refusal = None
        self.orphans = 0
        for command in reversed(retries):
            if not command.future.done():
                command.queued = True
                self.queued += 1
                self._bytes_queued += len(command.payload)
                self._queue.appendleft(command)

    def fail_queued(self, error: Exception) -> None:
        """Fail every command in the queue."""
        queue, self._queue = self._queue, deque()
        self.queued = self._bytes_queued = 0
        for command in queue:
            command.queued = False
            command.resolve(error)

    def expire(self, now: float, error: Exception) -> None:
        """Fail every command past its deadline.

        Args:
            now: The time on the event loop's clock.
            error: The reason for commands that were never written. The others fail with
                `TimeoutError`.
        """
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            early = self._early and self._early[0][0] == deadline
            command = heapq.heappop(self._early)[2] if early else self._by_deadline.popleft()
            written = command.attempts and not command.queued
            if written:
                command.in_doubt = True
            command.resolve(TimeoutError() if written else error)
            self.discard(command)

    def next_deadline(self) -> float | None:
        """The earliest deadline of a command with a waiting caller, or None."""
        self.forget_answered()
        early = self._early
        while early and early[0][2].future.done():
            heapq.heappop(early)
        if not early:
            return self._by_deadline[0].deadline if self._by_deadline else None
        if not self._by_deadline:
            return early[0][0]
        return min(early[0][0], self._by_deadline[0].deadline)

    def _leave_queue(self, command: Command) -> None:
        command.queued = False
        self.queued -= 1
        self._bytes_queued -= len(command.payload)

    def _land(self, command: Command) -> None:
        self.in_flight.popleft()
        if command.orphan:
            self.orphans -= 1
        self._bytes_in_flight -= command.weight
        command.weight = 0

    def _learn(self, size: int) -> None:
        """Estimate the next record: at once a larger one, a smaller one by and by."""
        expected = self._record_bytes
        if size > expected or expected == _UNKNOWN_RECORD:
            self._record_bytes = size
        else:
            self._record_bytes = expected - ((expected - size) >> 6)
