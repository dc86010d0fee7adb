"""The rules of the pipeline, without a server, a socket or a clock."""

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest

from aiosessions import StorageUnavailable
from aiosessions.redis._commands import ASKING, Command, Template
from aiosessions.redis._errors import ConnectionLost, ErrorReply, ProtocolError
from aiosessions.redis._pipeline import MAX_BYTES_IN_FLIGHT, Pipeline

TIMEOUT = 10.0
LOST = ConnectionLost("lost")
READONLY = ErrorReply("READONLY You can't write against a read only replica.")

READ = Template(b"GET", None, replies=(bytes, type(None)), retryable=True, writes=False)
RECORD = Template(b"GETEX", None, replies=(bytes, type(None)), retryable=True, bulky=True)
WRITE = Template(b"SET", None, replies=(bytes,))
NUMBER = Template(b"DEL", None, replies=(int,))


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The event loop of the futures. It never runs."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def pipeline() -> Pipeline:
    """A pipeline with the usual bounds."""
    return Pipeline()


class Adder:
    """Adds commands to a pipeline, as callers do."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pipeline: Pipeline) -> None:
        self._loop = loop
        self._pipeline = pipeline

    def __call__(
        self, *payloads: bytes, template: Template = READ, deadline: float = math.inf
    ) -> list[Command]:
        """Add a command for each payload."""
        commands = [Command(template, payload, b"key", deadline) for payload in payloads]
        for command in commands:
            command.future = self._loop.create_future()
            self._pipeline.add(command)
        return commands


@pytest.fixture
def add(loop: asyncio.AbstractEventLoop, pipeline: Pipeline) -> Adder:
    """Adds commands to `pipeline`."""
    return Adder(loop, pipeline)


def write(pipeline: Pipeline, now: float = 0.0) -> list[bytes]:
    """Take the next batch."""
    return pipeline.next_batch(now, TIMEOUT)


def cancel(pipeline: Pipeline, command: Command) -> None:
    """Cancel the caller of a command."""
    command.future.cancel()
    pipeline.discard(command)


def results(*commands: Command) -> list[Any]:
    """The result of each command; None for one without a result."""
    return [command.future.result() if command.future.done() else None for command in commands]


# Replies.


def test_replies_resolve_commands_in_order(pipeline: Pipeline, add: Adder) -> None:
    """The oldest command in flight gets the next reply, over all batches."""
    first = add(b"a", b"b")
    assert write(pipeline) == [b"a", b"b"]
    second = add(b"c")
    pipeline.answer(b"reply to a")
    assert write(pipeline) == [b"c"]
    pipeline.answer(b"reply to b")
    pipeline.answer(b"reply to c")

    assert results(*first, *second) == [b"reply to a", b"reply to b", b"reply to c"]
    assert (pipeline.queued, len(pipeline.in_flight)) == (0, 0)


def test_reply_to_cancelled_command_is_dropped(pipeline: Pipeline, add: Adder) -> None:
    """The reply to a cancelled command goes to no other command."""
    commands = add(b"a", b"b", b"c")
    write(pipeline)
    cancel(pipeline, commands[1])

    for reply in (b"1", b"2", b"3"):
        pipeline.answer(reply)

    assert results(commands[0], commands[2]) == [b"1", b"3"]


@pytest.mark.parametrize("queued", [0, 1])
def test_unsolicited_reply_is_protocol_error(pipeline: Pipeline, add: Adder, queued: int) -> None:
    """A reply without a command in flight goes to no queued command."""
    commands = add(*[b"a"] * queued)

    with pytest.raises(ProtocolError):
        pipeline.answer(b"early")

    assert results(*commands) == [None] * queued


@pytest.mark.parametrize(
    ("template", "reply"),
    [
        (READ, 1),
        (READ, []),
        (READ, True),
        (NUMBER, b"OK"),
        (NUMBER, None),
        (NUMBER, True),
        (NUMBER, 1.0),
    ],
)
def test_reply_of_wrong_type_is_protocol_error(
    pipeline: Pipeline, add: Adder, template: Template, reply: Any
) -> None:
    """A reply of a type that the command never has goes to no command."""
    commands = add(b"a", b"b", template=template)
    write(pipeline)

    with pytest.raises(ProtocolError):
        pipeline.answer(reply)

    assert results(*commands) == [None, None]


@pytest.mark.parametrize("reply", [b"", b"x", None])
def test_reply_of_accepted_type_is_result(pipeline: Pipeline, add: Adder, reply: Any) -> None:
    """A reply of each accepted type is the result, empty and null ones included."""
    (command,) = add(b"a")
    write(pipeline)
    pipeline.answer(reply)

    assert command.future.done()
    assert command.future.result() == reply


def test_error_reply_is_result_of_one_command(pipeline: Pipeline, add: Adder) -> None:
    """An error reply is the result of its command, and later replies keep their commands."""
    commands = add(b"a", b"b", template=NUMBER)
    write(pipeline)
    error = ErrorReply("OOM command not allowed")
    pipeline.answer(error)
    pipeline.answer(7)

    assert results(*commands) == [error, 7]
    assert not commands[0].in_doubt


def test_extra_replies_are_skipped(pipeline: Pipeline, add: Adder) -> None:
    """Replies to ASKING are skipped, on the second attempt as well."""
    (before,) = add(b"a")
    (asking,) = add(b"b")
    asking.ask()
    (after,) = add(b"c")
    write(pipeline)
    pipeline.answer(b"1")
    pipeline.answer(b"extra")
    pipeline.disconnected(LOST)
    assert write(pipeline) == [ASKING + b"b", b"c"]
    for reply in (ErrorReply("ERR extra"), b"2", b"3"):
        pipeline.answer(reply)

    assert results(before, asking, after) == [b"1", b"2", b"3"]


# Lost connections.


def test_lost_retryable_command_is_sent_again(pipeline: Pipeline, add: Adder) -> None:
    """Retryable commands in flight return to the front of the queue, in order and in doubt."""
    answered, *lost = add(b"a", b"b", b"c")
    write(pipeline)
    pipeline.answer(b"1")
    queued = add(b"d")
    pipeline.disconnected(LOST)

    assert write(pipeline) == [b"b", b"c", b"d"]
    for reply in (b"2", b"3", b"4"):
        pipeline.answer(reply)
    assert results(answered, *lost, *queued) == [b"1", b"2", b"3", b"4"]
    assert [each.in_doubt for each in (answered, *lost, *queued)] == [False, True, True, False]


def test_retryable_command_fails_after_three_attempts(pipeline: Pipeline, add: Adder) -> None:
    """A command that is lost three times fails with the reason of the last loss."""
    (command,) = add(b"a")
    for _ in range(2):
        write(pipeline)
        pipeline.disconnected(ConnectionLost("earlier"))
    assert write(pipeline) == [b"a"]
    pipeline.disconnected(LOST)

    assert results(command) == [LOST]
    assert write(pipeline) == []


def test_lost_write_fails_in_doubt(pipeline: Pipeline, add: Adder) -> None:
    """A command that must not be applied twice fails in doubt; a queued one is sent."""
    (in_flight,) = add(b"a", template=WRITE)
    (retryable,) = add(b"b")
    write(pipeline)
    (queued,) = add(b"c", template=WRITE)
    pipeline.disconnected(LOST)

    assert results(in_flight, retryable, queued) == [LOST, None, None]
    assert [in_flight.in_doubt, queued.in_doubt] == [True, False]
    assert write(pipeline) == [b"b", b"c"]


def test_queued_command_survives_lost_connections(pipeline: Pipeline, add: Adder) -> None:
    """A command that was never written is not in doubt, and no attempt is counted."""
    (command,) = add(b"a", template=WRITE)
    for _ in range(5):
        pipeline.disconnected(LOST)

    assert (command.in_doubt, command.attempts) == (False, 0)
    assert write(pipeline) == [b"a"]


def test_failing_the_queue_spares_commands_in_flight(pipeline: Pipeline, add: Adder) -> None:
    """`fail_queued` fails the commands in the queue and no others."""
    in_flight = add(b"a")
    write(pipeline)
    queued = add(b"b", b"c")
    pipeline.fail_queued(LOST)
    pipeline.answer(b"1")

    assert results(*in_flight, *queued) == [b"1", LOST, LOST]
    assert not any(each.in_doubt for each in queued)
    assert not pipeline.waiting


# Refusals.


def test_refused_batch_is_sent_again_without_doubt(pipeline: Pipeline, add: Adder) -> None:
    """All commands of a batch that a replica refuses are sent again, and none is in doubt."""
    commands = add(*[b"a"] * 20, template=WRITE)
    write(pipeline)
    for _ in commands:
        pipeline.answer(READONLY)
    assert (pipeline.refusal, len(pipeline.in_flight)) == (READONLY, 0)
    assert results(*commands) == [None] * 20

    pipeline.disconnected(READONLY)

    assert not any(each.in_doubt for each in commands)
    assert write(pipeline) == [b"a"] * 20


@pytest.mark.parametrize("code", ["READONLY", "LOADING", "MASTERDOWN", "NOAUTH"])
def test_refusal_stops_writing(pipeline: Pipeline, add: Adder, code: str) -> None:
    """After a refusal nothing more is written on the connection; replies still come."""
    refused, other = add(b"a", template=WRITE) + add(b"b")
    write(pipeline)
    (queued,) = add(b"c")
    pipeline.answer(ErrorReply(f"{code} no"))
    assert write(pipeline) == []
    pipeline.answer(b"2")
    pipeline.disconnected(LOST)

    assert results(refused, other, queued) == [None, b"2", None]
    assert write(pipeline) == [b"a", b"c"]


def test_lost_command_beside_refused_one_is_in_doubt(pipeline: Pipeline, add: Adder) -> None:
    """A refusal tells about its own command only, and keeps an older doubt."""
    (lost_before,) = add(b"a")
    write(pipeline)
    pipeline.disconnected(LOST)
    refused, in_flight = add(b"b", b"c")
    write(pipeline)
    for _ in range(2):
        pipeline.answer(READONLY)
    pipeline.disconnected(LOST)

    assert [each.in_doubt for each in (lost_before, refused, in_flight)] == [True, False, True]
    assert write(pipeline) == [b"a", b"b", b"c"]


def test_refusals_do_not_count_as_attempts(pipeline: Pipeline, add: Adder) -> None:
    """A refused command is sent again until its deadline."""
    (command,) = add(b"a", template=WRITE)
    for _ in range(5):
        assert write(pipeline) == [b"a"]
        pipeline.answer(READONLY)
        pipeline.disconnected(READONLY)

    assert results(command) == [None]


def test_expired_refused_command_is_not_in_doubt(pipeline: Pipeline, add: Adder) -> None:
    """A refused command may expire before the connection is replaced; it was not applied."""
    refused, in_flight = add(b"a", b"b", template=WRITE, deadline=1.0)
    write(pipeline)
    pipeline.answer(READONLY)
    pipeline.expire(1.0, READONLY)

    assert results(refused) == [READONLY]
    assert [refused.in_doubt, in_flight.in_doubt] == [False, True]
    pipeline.disconnected(LOST)
    assert write(pipeline) == []


def test_refusal_for_cancelled_command_is_dropped(pipeline: Pipeline, add: Adder) -> None:
    """The pipeline goes on if the caller of the refused command has gone."""
    cancelled, other = add(b"a", b"b")
    write(pipeline)
    cancel(pipeline, cancelled)
    pipeline.answer(READONLY)
    pipeline.answer(b"2")

    assert (pipeline.refusal, results(other)) == (None, [b"2"])


# Cancelled commands.


def test_cancelled_queued_command_is_not_sent(pipeline: Pipeline, add: Adder) -> None:
    """A cancelled command leaves the queue, and its payload is released."""
    first, second, third = add(b"a", b"b", b"c")
    cancel(pipeline, first)
    cancel(pipeline, third)

    assert (pipeline.queued, first.payload, third.payload) == (1, b"", b"")
    assert write(pipeline) == [b"b"]
    assert write(pipeline) == []
    pipeline.answer(b"reply")
    assert results(second) == [b"reply"]


def test_cancelled_command_is_not_sent_again(pipeline: Pipeline, add: Adder) -> None:
    """A command that was cancelled in flight is not retried after a lost connection."""
    cancelled, other = add(b"a", b"b")
    write(pipeline)
    cancel(pipeline, cancelled)
    pipeline.disconnected(LOST)

    assert (cancelled.payload, write(pipeline)) == (b"", [b"b"])
    assert results(other) == [None]


def test_cancelled_commands_leave_the_queue(pipeline: Pipeline, add: Adder) -> None:
    """Thousands of cancelled commands leave no trace while the writer is blocked."""
    in_flight = add(bytes(MAX_BYTES_IN_FLIGHT), deadline=TIMEOUT)
    write(pipeline)
    for _ in range(10_000):
        (command,) = add(bytes(100), deadline=TIMEOUT)
        assert write(pipeline) == []
        cancel(pipeline, command)

    assert (pipeline.queued, results(*in_flight)) == (0, [None])
    assert len(pipeline._queue) < 200
    assert len(pipeline._by_deadline) < 200


# Deadlines.


def test_late_command_fails_alone(pipeline: Pipeline, add: Adder) -> None:
    """A command fails at its deadline, and the other commands go on."""
    late = add(b"a", deadline=1.0)
    in_time = add(b"b", deadline=2.0)
    assert pipeline.next_deadline() == 1.0

    pipeline.expire(0.999, LOST)
    assert results(*late, *in_time) == [None, None]
    pipeline.expire(1.0, LOST)
    assert results(*late, *in_time) == [LOST, None]
    assert pipeline.next_deadline() == 2.0
    assert write(pipeline) == [b"b"]


def test_late_command_in_flight_keeps_its_place(pipeline: Pipeline, add: Adder) -> None:
    """A late reply is dropped, and the next reply goes to the next command."""
    (late,) = add(b"a", deadline=1.0, template=WRITE)
    (in_time,) = add(b"b", deadline=2.0)
    write(pipeline)
    pipeline.expire(1.0, LOST)
    assert isinstance(results(late)[0], TimeoutError)
    assert late.in_doubt
    pipeline.answer(b"late")
    pipeline.answer(b"in time")

    assert results(in_time) == [b"in time"]


def test_commands_expire_in_order_of_deadlines(pipeline: Pipeline, add: Adder) -> None:
    """Deadlines may come in any order."""
    commands = [add(b"x", deadline=deadline)[0] for deadline in (3.0, 2.0, 3.0, 1.0, 2.5)]

    for now, left in ((1.0, 4), (2.0, 3), (2.5, 2), (3.0, 0)):
        assert pipeline.next_deadline() == now
        pipeline.expire(now, LOST)
        assert results(*commands).count(None) == left
    assert pipeline.next_deadline() is None


def test_deadlines_of_answered_commands_are_dropped(pipeline: Pipeline, add: Adder) -> None:
    """A deadline counts only while its caller waits."""
    add(b"a", deadline=2.0)
    add(b"b", deadline=1.0)
    write(pipeline)
    assert (pipeline.next_deadline(), pipeline.waiting) == (1.0, True)
    pipeline.answer(b"1")
    pipeline.answer(b"2")

    assert (pipeline.next_deadline(), pipeline.waiting) == (None, False)


def test_stall_is_due_at_oldest_deadline(pipeline: Pipeline, add: Adder) -> None:
    """The connection stalls at the deadline of the oldest command, even of a cancelled one."""
    assert pipeline.stall_at is None
    (oldest,) = add(b"a", deadline=8.0)
    add(b"b", deadline=9.0)
    write(pipeline)
    cancel(pipeline, oldest)
    assert pipeline.stall_at == 8.0
    pipeline.answer(b"1")

    assert pipeline.stall_at == 9.0


def test_stall_waits_for_command_written_late(pipeline: Pipeline, add: Adder) -> None:
    """A command that has waited elsewhere gets a whole timeout before the connection stalls."""
    add(b"a", deadline=8.0)
    write(pipeline, now=7.0)

    assert pipeline.stall_at == 7.0 + TIMEOUT


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("number", [2_000, 20_000])
def test_deadlines_take_constant_time(
    pipeline: Pipeline, loop: asyncio.AbstractEventLoop, number: int, *, cancelled: bool
) -> None:
    """In a hang, the work for a command does not grow with the number of commands."""
    looks = 0

    class CountedFuture(asyncio.Future[Any]):
        def done(self) -> bool:
            nonlocal looks
            looks += 1
            return super().done()

    for now in range(number + int(TIMEOUT)):
        if now < number:
            command = Command(READ, b"a", b"key", now + TIMEOUT * 100)
            command.future = CountedFuture(loop=loop)
            pipeline.add(command)
            write(pipeline, now)
            if cancelled and now % 2:
                cancel(pipeline, command)
        pipeline.expire(now, LOST)
        pipeline.next_deadline()

    assert looks < 20 * number


# Bounds.


def test_commands_in_flight_are_bounded(loop: asyncio.AbstractEventLoop) -> None:
    """Commands beyond the bound wait until a reply makes room."""
    pipeline = Pipeline(max_in_flight=2)
    commands = Adder(loop, pipeline)(b"a", b"b", b"c", b"d")

    assert write(pipeline) == [b"a", b"b"]
    assert (write(pipeline), pipeline.queued) == ([], 2)
    pipeline.answer(b"1")
    assert write(pipeline) == [b"c"]
    pipeline.disconnected(LOST)
    assert write(pipeline) == [b"b", b"c"]
    for reply in (b"2", b"3"):
        pipeline.answer(reply)
    assert write(pipeline) == [b"d"]
    pipeline.answer(b"4")
    assert results(*commands) == [b"1", b"2", b"3", b"4"]


def test_bytes_in_flight_are_bounded(loop: asyncio.AbstractEventLoop) -> None:
    """Commands beyond the bound wait; a command that exceeds the bound goes alone."""
    pipeline = Pipeline(max_bytes_in_flight=10)
    Adder(loop, pipeline)(b"aaaa", b"bbbb", b"cccc", b"d" * 20, b"e")

    batches = []
    for _ in range(4):
        batches.append(write(pipeline))
        assert write(pipeline) == []
        while pipeline.in_flight:
            pipeline.answer(None)

    assert batches == [[b"aaaa", b"bbbb"], [b"cccc"], [b"d" * 20], [b"e"]]


def test_first_records_are_loaded_few_at_a_time(pipeline: Pipeline, add: Adder) -> None:
    """Before the size of the records is known, and after, their replies count in flight."""
    add(*[b"x"] * 150, template=RECORD)
    assert len(write(pipeline)) < 20

    while pipeline.in_flight:
        pipeline.answer(bytes(1_000_000))

    assert len(write(pipeline)) == 4


def test_small_records_are_loaded_many_at_a_time(pipeline: Pipeline, add: Adder) -> None:
    """The first reply shows that records are small, and the bound is that of the commands."""
    add(*[b"x"] * 2_000, template=RECORD)
    write(pipeline)
    while pipeline.in_flight:
        pipeline.answer(bytes(800))

    assert len(write(pipeline)) == 1_024


def test_estimate_follows_sizes_of_records(pipeline: Pipeline, add: Adder) -> None:
    """One large record raises the estimate at once, and small ones lower it little by little."""
    records = [1_000, 1_000_000, *[1_000] * 50]
    widths = []
    for size in records:
        add(*[b"x"] * 1_024, template=RECORD)
        widths.append(len(write(pipeline)))
        while pipeline.in_flight:
            pipeline.answer(bytes(size))
        pipeline.fail_queued(LOST)

    assert widths[1] == 1_024
    assert widths[2] == 4
    assert widths[3:] == sorted(widths[3:])
    assert widths[-1] == 1_024


def test_writes_are_bounded(loop: asyncio.AbstractEventLoop) -> None:
    """A batch ends when it is large enough, so that others soon follow a large record."""
    pipeline = Pipeline(batch_bytes=10)
    Adder(loop, pipeline)(b"aaaa", b"b" * 50, b"cccc", b"dddd", b"eeee", b"f")

    assert write(pipeline) == [b"aaaa", b"b" * 50]
    assert write(pipeline) == [b"cccc", b"dddd", b"eeee"]
    assert write(pipeline) == [b"f"]


def test_queue_is_bounded_in_commands(loop: asyncio.AbstractEventLoop) -> None:
    """A command beyond the bound is refused at once; cancelled ones make room."""
    pipeline = Pipeline(max_queued=2)
    add = Adder(loop, pipeline)
    first, _ = add(b"a", b"b")
    with pytest.raises(StorageUnavailable, match="too many commands") as raised:
        add(b"c")
    assert not raised.value.in_doubt

    cancel(pipeline, first)
    add(b"d")
    assert write(pipeline) == [b"b", b"d"]


def test_queue_is_bounded_in_bytes(loop: asyncio.AbstractEventLoop) -> None:
    """A command beyond the bound is refused at once; an empty queue takes any command."""
    pipeline = Pipeline(max_bytes_queued=10)
    add = Adder(loop, pipeline)
    (large,) = add(b"a" * 20)
    with pytest.raises(StorageUnavailable, match="too many commands"):
        add(b"b")
    cancel(pipeline, large)
    add(b"cccc", b"dddd")
    with pytest.raises(StorageUnavailable):
        add(b"eeee")

    assert write(pipeline) == [b"cccc", b"dddd"]
    add(b"f" * 10)


@pytest.mark.parametrize("bounds", [{"max_queued": 2}, {"max_bytes_queued": 2}], ids=str)
def test_retried_commands_count_in_the_queue(
    loop: asyncio.AbstractEventLoop, bounds: dict[str, int]
) -> None:
    """Commands that return to the queue count towards its bounds, and are never refused."""
    pipeline = Pipeline(**bounds)
    add = Adder(loop, pipeline)
    add(b"a", b"b")
    write(pipeline)
    add(b"c")
    pipeline.disconnected(LOST)
    assert pipeline.queued == 3
    with pytest.raises(StorageUnavailable):
        add(b"d")

    assert write(pipeline) == [b"a", b"b", b"c"]
    add(b"d")
