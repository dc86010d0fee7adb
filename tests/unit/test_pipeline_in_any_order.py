"""The pipeline under random events, compared with a simple model."""

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiosessions import StorageUnavailable
from aiosessions.redis._commands import ASKING, Command, Template
from aiosessions.redis._errors import ConnectionLost, ErrorReply, ProtocolError
from aiosessions.redis._pipeline import Pipeline

TIMEOUT = 10.0
READ = Template(b"GET", None, replies=(bytes, type(None)), retryable=True, writes=False)
WRITE = Template(b"SET", None, replies=(bytes,))

# The template of a command, the size of its payload, its time until the deadline, and the number of
# extra replies.
Drawn = tuple[Template, int, float, int]
drawn_commands = st.tuples(
    st.sampled_from([READ, WRITE]),
    st.sampled_from([0, 10, 60]),
    st.sampled_from([TIMEOUT, TIMEOUT, 6.0, 1.0]),
    st.sampled_from([0, 0, 1]),
)


class AnyOrder(RuleBasedStateMachine):
    """Events in any order. Lists model the pipeline, and every outcome has to be as predicted.

    Attributes:
        queue: The commands that wait to be written.
        wire: The commands in flight.
        refused: The commands that the server refused on this connection.
        outcomes: The results that are known, by command.
        in_doubt: The commands that may have been applied.
        attempts: How often each command was written, and not refused.
        owed: How many extra replies the server still owes, by command.
        stalls: The time at which the connection stalls, by command.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.pipeline = Pipeline()
        self.now = 0.0
        self.commands: list[Command] = []
        self.sizes: dict[Command, int] = {}
        self.queue: list[Command] = []
        self.wire: list[Command] = []
        self.refused: list[Command] = []
        self.outcomes: dict[Command, Any] = {}
        self.in_doubt: set[Command] = set()
        self.attempts: dict[Command, int] = {}
        self.owed: dict[Command, int] = {}
        self.stalls: dict[Command, float] = {}
        self.refusing = False
        self.bounds: dict[str, int] = {}

    @initialize(
        max_in_flight=st.sampled_from([100, 3, 1]),
        max_bytes_in_flight=st.sampled_from([1_000, 100, 1]),
        max_queued=st.sampled_from([100, 3]),
        max_bytes_queued=st.sampled_from([1_000, 100]),
        batch_bytes=st.sampled_from([1_000, 50]),
    )
    def begin(self, **bounds: int) -> None:
        """Make a pipeline with bounds of any size."""
        self.bounds = bounds
        self.pipeline = Pipeline(**bounds)

    def weight(self, commands: list[Command]) -> int:
        """The bytes of commands."""
        return sum(self.sizes[each] for each in commands)

    def live(self, commands: list[Command]) -> list[Command]:
        """The commands without an outcome."""
        return [each for each in commands if each not in self.outcomes]

    @rule(drawn=st.lists(drawn_commands, min_size=1, max_size=4))
    def add(self, drawn: list[Drawn]) -> None:
        """Callers send commands."""
        for template, size, time_left, extra_replies in drawn:
            payload = b"%d:%b" % (len(self.commands), b"x" * size)
            command = Command(template, payload, b"key", self.now + time_left)
            command.extra_replies = extra_replies
            command.future = self.loop.create_future()
            self.sizes[command] = len(payload)
            full = self.weight([*self.queue, command]) > self.bounds["max_bytes_queued"]
            if len(self.queue) >= self.bounds["max_queued"] or (self.queue and full):
                with pytest.raises(StorageUnavailable):
                    self.pipeline.add(command)
                continue
            self.pipeline.add(command)
            self.commands.append(command)
            self.queue.append(command)
            self.attempts[command] = 0

    @rule()
    def write(self) -> None:
        """The owner writes a batch."""
        batch: list[Command] = []
        while self.queue and not self.refusing and self.weight(batch) < self.bounds["batch_bytes"]:
            more = [*self.wire, self.queue[0]]
            if self.wire and (
                len(more) > self.bounds["max_in_flight"]
                or self.weight(more) > self.bounds["max_bytes_in_flight"]
            ):
                break
            command = self.queue.pop(0)
            batch.append(command)
            self.wire.append(command)
            self.attempts[command] += 1
            self.owed[command] = command.extra_replies
            # A command that has spent most of its time elsewhere gets a whole timeout.
            spent = command.deadline <= self.now + TIMEOUT / 2
            self.stalls[command] = self.now + TIMEOUT if spent else command.deadline
        payloads = [ASKING * each.extra_replies + each.payload for each in batch]
        assert self.pipeline.next_batch(self.now, TIMEOUT) == payloads

    @rule(times=st.integers(1, 3), error=st.booleans())
    def answer(self, times: int, *, error: bool) -> None:
        """The server answers, with a reply or an error reply."""
        for command in self.wire[:times]:
            self.answer_extras()
            reply = ErrorReply("OOM no") if error else b"reply to %d" % id(command)
            self.pipeline.answer(reply)
            del self.wire[0]
            self.outcomes.setdefault(command, reply)

    @rule()
    def answer_extras(self) -> None:
        """The server answers the commands that precede the oldest command in flight."""
        for command in self.wire[:1]:
            for _ in range(self.owed[command]):
                self.pipeline.answer(b"OK")
            self.owed[command] = 0

    @precondition(lambda self: self.wire)
    @rule()
    def refuse(self) -> None:
        """The server refuses a command because of its role."""
        self.answer_extras()
        self.pipeline.answer(ErrorReply("READONLY no"))
        command = self.wire.pop(0)
        if command not in self.outcomes:
            self.refusing = True
            self.refused.append(command)
            self.attempts[command] -= 1

    @rule()
    def answer_nonsense(self) -> None:
        """The server sends a reply that no command can have, and the owner disconnects."""
        self.answer_extras()
        with pytest.raises(ProtocolError):
            self.pipeline.answer([] if self.wire else b"reply without a command")
        self.disconnect()

    @rule()
    def disconnect(self) -> None:
        """The connection ends."""
        error = ConnectionLost("lost")
        self.pipeline.disconnected(error)
        retries = self.live(self.refused)
        for command in self.live(self.wire):
            self.in_doubt.add(command)
            if command.template.retryable and self.attempts[command] < 3:
                retries.append(command)
            else:
                self.outcomes[command] = error
        self.queue = retries + self.queue
        self.wire, self.refused, self.refusing = [], [], False

    @rule()
    def fail_queued(self) -> None:
        """The outage has lasted too long."""
        error = ConnectionLost("outage")
        self.pipeline.fail_queued(error)
        self.outcomes |= dict.fromkeys(self.queue, error)
        self.queue = []

    @rule(seconds=st.sampled_from([0.5, 2.0, 10.0]))
    def let_time_pass(self, seconds: float) -> None:
        """Time passes, and the timer of the owner runs."""
        self.now += seconds
        error = ConnectionLost("late")
        self.pipeline.expire(self.now, error)
        for command in self.live(self.commands):
            if command.deadline > self.now:
                continue
            if command in self.queue or not self.attempts[command]:
                self.outcomes[command] = error
            else:
                self.in_doubt.add(command)
                self.outcomes[command] = TimeoutError
        self.queue = self.live(self.queue)

    @rule(index=st.integers(0, 6))
    def cancel(self, index: int) -> None:
        """One of the latest callers is cancelled."""
        for command in self.live(self.commands[-index:][:1]):
            command.future.cancel()
            self.pipeline.discard(command)
            self.outcomes[command] = asyncio.CancelledError
            self.queue = self.live(self.queue)
            assert command.payload == b""

    @invariant()
    def outcomes_are_as_predicted(self) -> None:
        """Every command has exactly the outcome of the model, and no other one is in doubt."""
        for command in self.commands:
            if not command.future.done():
                outcome = None
            elif command.future.cancelled():
                outcome = asyncio.CancelledError
            else:
                outcome = command.future.result()
            expected = self.outcomes.get(command)
            assert outcome is expected or type(outcome) is expected or outcome == expected
        assert {each for each in self.commands if each.in_doubt} == self.in_doubt

    @invariant()
    def lists_are_as_predicted(self) -> None:
        """The queue, the commands in flight and the deadlines are those of the model."""
        pipeline = self.pipeline
        assert pipeline.queued == len(self.queue)
        assert [*pipeline.in_flight] == self.wire
        assert (pipeline.refusal is not None) == self.refusing
        assert pipeline.stall_at == (self.stalls[self.wire[0]] if self.wire else None)
        orphans = [each for each in self.wire if each.template.writes and each in self.outcomes]
        assert pipeline.orphans == len(orphans)
        deadlines = [each.deadline for each in self.live(self.commands)]
        assert pipeline.next_deadline() == min(deadlines, default=None)
        assert pipeline.waiting == bool(deadlines)

    def teardown(self) -> None:
        """After the end of the connection and of the outage, no caller waits."""
        self.loop.close()
        self.disconnect()
        self.fail_queued()
        self.outcomes_are_as_predicted()
        assert all(each.future.done() for each in self.commands)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
