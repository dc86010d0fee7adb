"""The rules of the pipeline, without a server, a socket or a clock.

test_pipeline_in_any_order.py covers the bounds, refusals and deadlines under random events.
"""

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import hiredis
import pytest

from aiosessions.redis._commands import Command, Template
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


def write(pipeline: Pipeline) -> list[bytes]:
    """Take the next batch."""
    return pipeline.next_batch(0.0, TIMEOUT)


def cancel(pipeline: Pipeline, command: Command) -> None:
    """Cancel the caller of a command."""
    command.future.cancel()
    pipeline.discard(command)


def results(*commands: Command) -> list[Any]:
    """The result of each command; None for one without a result."""
    return [command.future.result() if command.future.done() else None for command in commands]


# Replies


def test_reply_to_cancelled_command_is_dropped(pipeline: Pipeline, add: Adder) -> None:
    """The oldest command in flight gets the next reply, even if its caller is gone."""
    commands = add(b"a", b"b", b"c")
    assert write(pipeline) == [b"a", b"b", b"c"]
    cancel(pipeline, commands[1])

    for reply in (b"1", b"2", b"3"):
        pipeline.answer(reply)

    assert results(commands[0], commands[2]) == [b"1", b"3"]
    assert (pipeline.queued, len(pipeline.in_flight)) == (0, 0)


def test_unsolicited_reply_is_protocol_error(pipeline: Pipeline, add: Adder) -> None:
    """A reply without a command in flight goes to no queued command. Pushes are dropped."""
    commands = add(b"a")

    with pytest.raises(ProtocolError):
        pipeline.answer(b"early")
    pipeline.answer(hiredis.PushNotification([b"invalidate"]))

    assert results(*commands) == [None]


@pytest.mark.parametrize(
    ("template", "reply"),
    [(READ, 1), (READ, []), (NUMBER, b"OK"), (NUMBER, None), (NUMBER, True), (NUMBER, 1.0)],
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


@pytest.mark.parametrize("reply", [b"", b"x", None, ErrorReply("OOM command not allowed")])
def test_reply_of_accepted_type_is_result(pipeline: Pipeline, add: Adder, reply: Any) -> None:
    """A reply of each accepted type is the result, empty, null and error replies included."""
    command, other = add(b"a", b"b")
    write(pipeline)
    pipeline.answer(reply)
    pipeline.answer(b"other")

    assert command.future.done()
    assert results(command, other) == [reply, b"other"]
    assert not command.in_doubt


# Lost connections and refusals


def test_lost_commands_are_in_doubt(pipeline: Pipeline, add: Adder) -> None:
    """Retryable ones return to the front of the queue; a command without a caller does not."""
    answered, lost, cancelled = add(b"a", b"b", b"c")
    (lost_write,) = add(b"d", template=WRITE)
    write(pipeline)
    pipeline.answer(b"1")
    cancel(pipeline, cancelled)
    (queued,) = add(b"e", template=WRITE)
    pipeline.disconnected(LOST)

    assert results(answered, lost, lost_write, queued) == [b"1", None, LOST, None]
    assert [lost.in_doubt, lost_write.in_doubt, queued.in_doubt] == [True, True, False]
    assert write(pipeline) == [b"b", b"e"]


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


def test_refused_command_is_sent_until_its_deadline(pipeline: Pipeline, add: Adder) -> None:
    """Refusals do not count as attempts, and cause no doubt."""
    (command,) = add(b"a", template=WRITE, deadline=1.0)
    for _ in range(5):
        assert write(pipeline) == [b"a"]
        pipeline.answer(READONLY)
        pipeline.disconnected(READONLY)
    write(pipeline)
    pipeline.answer(READONLY)
    pipeline.expire(1.0, READONLY)

    assert (results(command), command.in_doubt) == ([READONLY], False)


# Cancelled and late commands


def test_cancelled_commands_leave_the_queue(pipeline: Pipeline, add: Adder) -> None:
    """Thousands of cancelled commands leave no trace while the writer is blocked."""
    in_flight = add(bytes(MAX_BYTES_IN_FLIGHT), deadline=TIMEOUT)
    write(pipeline)
    for _ in range(2_000):
        (command,) = add(bytes(100), deadline=TIMEOUT)
        assert write(pipeline) == []
        cancel(pipeline, command)

    assert (pipeline.queued, results(*in_flight)) == (0, [None])
    assert len(pipeline._queue) < 200
    assert len(pipeline._by_deadline) < 200


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


# The estimate of replies


@pytest.mark.parametrize(("size", "width"), [(800, 1_024), (1_000_000, 4)])
def test_replies_count_in_flight(pipeline: Pipeline, add: Adder, size: int, width: int) -> None:
    """The first records are loaded few at a time, until their size is known."""
    add(*[b"x"] * 2_000, template=RECORD)
    assert 1 < len(write(pipeline)) < 20

    while pipeline.in_flight:
        pipeline.answer(bytes(size))

    assert len(write(pipeline)) == width


def test_estimate_follows_sizes_of_records(pipeline: Pipeline, add: Adder) -> None:
    """One large record raises the estimate at once, and small ones lower it little by little."""
    widths = []
    for size in (1_000, 1_000_000, *[1_000] * 20):
        add(*[b"x"] * 1_024, template=RECORD)
        widths.append(len(write(pipeline)))
        while pipeline.in_flight:
            pipeline.answer(bytes(size))
        pipeline.fail_queued(LOST)

    assert widths[1:3] == [1_024, 4]
    assert widths[2:] == sorted(widths[2:])
    assert 4 < widths[5] < widths[10] < widths[-1] == 1_024
