"""The lane under whatever happens in whatever order, against a model of what is on the wire."""

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError

from aiosessions.redis.lane import Command, Lane, OutOfStep

_TIMEOUT = 3.0
_STRINGS: frozenset[type] = frozenset({bytes, type(None)})

# How large the command is, how long its caller waits, whether it may be applied twice, and how many
# commands have to precede it.
_Caller = tuple[int, float, bool, int]
_callers = st.tuples(
    st.sampled_from([0, 10, 60]),
    st.sampled_from([_TIMEOUT, _TIMEOUT, 0.5]),
    st.booleans(),
    st.sampled_from([0, 0, 1]),
)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Whatever happens in whatever order, against a model of what is on the wire.

    Each payload names its command, and each reply its payload, so a reply that reaches another
    command's future is seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self.now = 0.0
        self.commands: list[Command] = []
        self.wire: list[Command] = []
        self.waiting: list[Command] = []
        self.sends: dict[Command, int] = {}
        self.owed: dict[Command, int] = {}
        self.unsure: set[Command] = set()
        self.expired: set[Command] = set()
        self.outcomes: dict[Command, Any] = {}
        self.lane = Lane()
        self.max_commands = self.max_bytes = self.batch_bytes = 0

    @initialize(
        max_commands=st.sampled_from([100, 3, 1]),
        max_bytes=st.sampled_from([1_000, 100, 1]),
        batch_bytes=st.sampled_from([1_000, 50]),
    )
    def begin(self, max_commands: int, max_bytes: int, batch_bytes: int) -> None:
        """Make a lane of any size."""
        self.max_commands, self.max_bytes = max_commands, max_bytes
        self.batch_bytes = batch_bytes
        self.lane = Lane(max_commands=max_commands, max_bytes=max_bytes, batch_bytes=batch_bytes)

    @rule(callers=st.lists(_callers, min_size=1, max_size=4), busy=st.booleans())
    def call(self, callers: list[_Caller], busy: bool) -> None:  # noqa: FBT001 - drawn
        """Callers come, some of whom have used up most of their time for something else."""
        for size, patience, repeatable, preludes in callers:
            payload = b"%d:%b" % (len(self.commands), b"x" * size)
            command = Command(
                payload,
                _STRINGS,
                self.now + patience,
                self._loop.create_future(),
                self.now + _TIMEOUT,
                repeatable,
                preludes,
            )
            self.commands.append(command)
            self.waiting.append(command)
            self.sends[command] = 0
            self.lane.add(command)
        if not busy:
            self.write()

    @rule()
    def write(self) -> None:
        """The writer takes a batch."""
        batch = self.lane.next_batch()
        self.waiting = [each for each in self.waiting if not each.future.done()]
        written = self.waiting[: len(batch)]
        assert batch == [each.payload for each in written]  # in order, and none of who is gone
        del self.waiting[: len(batch)]
        self.wire += written
        for command in written:
            self.sends[command] += 1
            self.owed[command] = command.preludes + 1
        size = sum(map(len, batch))
        assert not batch or size - len(batch[-1]) < self.batch_bytes
        assert len(self.wire) <= self.max_commands
        assert len(self.wire) == 1 or self.weight() <= self.max_bytes
        if not batch and self.waiting:  # for no other reason than that there is no room
            lane: Any = self.lane
            expected = lane._reply_bytes
            full = self.weight() + len(self.waiting[0].payload) + expected * (1 + len(self.wire))
            assert self.wire
            assert len(self.wire) == self.max_commands or full > self.max_bytes

    def weight(self) -> int:
        """How many bytes of commands are under way."""
        return sum(len(each.payload) for each in self.wire)

    @rule(times=st.integers(1, 3), null=st.booleans())
    def answer(self, times: int, null: bool) -> None:  # noqa: FBT001 - drawn
        """The server answers; a reply that nobody asked for reaches nobody."""
        if not self.wire:
            with pytest.raises(OutOfStep):
                self.lane.answer(b"reply to nothing")
        for command in self.wire[:times]:
            self.answer_preludes(command)
            self.lane.answer(None if null else b"reply to " + command.payload)
        del self.wire[:times]

    def answer_preludes(self, command: Command) -> None:
        """The server answers what precedes a command, which is of no interest to anybody."""
        while self.owed[command] > 1:
            self.owed[command] -= 1
            self.lane.answer(b"reply to a prelude")

    @rule()
    def answer_a_prelude(self) -> None:
        """The server answers what precedes the oldest command, and no more for now."""
        for command in self.wire[:1]:
            self.answer_preludes(command)

    @rule()
    def answer_nonsense(self) -> None:
        """The server answers with what no command ever has, and the connection goes."""
        self.answer_a_prelude()
        with pytest.raises(OutOfStep) as raised:
            self.lane.answer([])
        assert all(each.future.done() for each in self.wire[:1])
        del self.wire[:1]
        self.disconnect(raised.value)

    @rule(refused=st.booleans())
    def lose(self, refused: bool) -> None:  # noqa: FBT001 - drawn
        """The connection goes; or the server turns out to be a replica, and so it goes."""
        if not refused:
            self.disconnect(RedisConnectionError("gone"))
        elif self.wire:
            self.disconnect(ReadOnlyError("refused"))

    def disconnect(self, error: Exception) -> None:
        """Tell the lane, and see what becomes of what was on the wire."""
        lost, self.wire = self.wire, []
        alive = [each for each in lost if not each.future.done()]
        self.lane.disconnected(error)
        stuck = isinstance(error, TimeoutError)
        refused = lost[:1] if isinstance(error, ReadOnlyError) else []
        again = [
            each
            for each in alive
            if self.sends[each] < 2 and not stuck and (each.repeatable or each in refused)
        ]
        for command in alive:
            assert command.future.done() == (command not in again)
        self.unsure |= {each for each in alive if each not in refused}
        self.waiting = again + self.waiting

    @rule(passes=st.sampled_from([0.5, 1.0, 3.0]))
    def let_time_pass(self, passes: float) -> None:
        """The timer looks; a stuck connection goes."""
        self.now += passes
        due = [each for each in self.commands if each.deadline <= self.now]
        error = TimeoutError()
        stuck = self.lane.expire(self.now, error)
        assert stuck == (bool(self.wire) and self.wire[0].overdue <= self.now)
        assert all(each.future.done() for each in due)
        self.expired |= set(due)
        if stuck:
            self.disconnect(error)
        deadline = self.lane.deadline()
        assert deadline is None or deadline > self.now  # or the timer would never rest

    @rule(latest=st.integers(1, 6))
    def cancel(self, latest: int) -> None:
        """A caller gives up: one of the latest."""
        for command in self.commands[-latest:][:1]:
            command.future.cancel()

    @invariant()
    def nobody_gets_what_is_not_theirs(self) -> None:
        """A reply is to the command whose future has it, and an outcome is final."""
        for command in self.commands:
            if not command.future.done():
                assert command not in self.expired
                continue
            cancelled = command.future.cancelled()
            outcome = "cancelled" if cancelled else command.future.result()
            assert self.outcomes.setdefault(command, outcome) is outcome
            if isinstance(outcome, bytes):
                assert outcome == b"reply to " + command.payload

    @invariant()
    def nothing_is_sent_a_third_time(self) -> None:
        """Nor is anything unsure but what was under way on a connection that went."""
        assert all(sends <= 2 for sends in self.sends.values())
        assert {each for each in self.commands if each.unsure} == self.unsure

    @invariant()
    def what_is_waited_for_is_known(self) -> None:
        """Somebody looks at every deadline; an empty lane has none."""
        alive = [each for each in self.commands if not each.future.done()]
        deadline = self.lane.deadline()
        assert deadline is not None or not alive
        assert all(deadline <= each.deadline for each in alive if deadline is not None)
        assert len(self.lane) >= len(alive)

    def teardown(self) -> None:
        """Nobody waits for ever."""
        self.lane.fail(RedisConnectionError("end"))
        assert len(self.lane) == 0
        assert all(each.future.done() for each in self.commands)
        self._loop.close()


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
