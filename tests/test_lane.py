"""The lane's rules, without a server, a socket or a clock: see its module's docstring."""

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoScriptError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from aiosessions.redis.lane import MAX_BYTES, MAX_COMMANDS, Command, Lane, OutOfStep

_STRINGS: frozenset[type] = frozenset({bytes, type(None)})
_INTEGERS: frozenset[type] = frozenset({int})
_GONE = RedisConnectionError("gone")


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """What futures belong to. It never runs."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def lane() -> Lane:
    """A lane of the usual size."""
    return Lane()


class Callers:
    """Makes commands, as callers do, and adds them to a lane."""

    def __init__(self, loop: asyncio.AbstractEventLoop, lane: Lane) -> None:
        self._loop = loop
        self._lane = lane

    def __call__(
        self,
        *payloads: bytes,
        accepts: frozenset[type] = _STRINGS,
        deadline: float = math.inf,
        overdue: float | None = None,
        repeatable: bool = True,
        preludes: int = 0,
    ) -> list[Command]:
        """Queue a command for each payload."""
        commands = [
            Command(
                payload,
                accepts,
                deadline,
                self._loop.create_future(),
                overdue or deadline,
                repeatable,
                preludes,
            )
            for payload in payloads
        ]
        for command in commands:
            self._lane.add(command)
        return commands


@pytest.fixture
def call(loop: asyncio.AbstractEventLoop, lane: Lane) -> Callers:
    """The callers of the lane."""
    return Callers(loop, lane)


def results(*commands: Command) -> list[Any]:
    """What each command's caller has got; None for one who still waits."""
    return [command.future.result() if command.future.done() else None for command in commands]


def test_replies_go_to_commands_in_the_order_they_were_written(lane: Lane, call: Callers) -> None:
    """The oldest gets the next reply, over all batches."""
    first = call(b"a", b"b")
    assert lane.next_batch() == [b"a", b"b"]
    second = call(b"c")
    lane.answer(b"reply to a")
    assert lane.next_batch() == [b"c"]
    lane.answer(b"reply to b")
    lane.answer(b"reply to c")

    assert results(*first, *second) == [b"reply to a", b"reply to b", b"reply to c"]
    assert len(lane) == 0


def test_a_reply_to_a_caller_who_is_gone_is_dropped(lane: Lane, call: Callers) -> None:
    """It is for nobody else."""
    commands = call(b"a", b"b", b"c")
    lane.next_batch()
    commands[1].future.cancel()

    for reply in (b"1", b"2", b"3"):
        lane.answer(reply)

    assert commands[1].future.cancelled()
    assert results(commands[0], commands[2]) == [b"1", b"3"]


def test_what_a_caller_gave_up_before_it_was_written_is_never_written(
    lane: Lane, call: Callers
) -> None:
    """It takes no room and no reply."""
    commands = call(b"a", b"b", b"c")
    commands[0].future.cancel()
    commands[2].future.cancel()

    assert lane.next_batch() == [b"b"]
    assert lane.next_batch() == []
    lane.answer(b"reply")
    assert results(commands[1]) == [b"reply"]
    assert len(lane) == 0


def test_what_a_caller_gave_up_is_not_written_again(lane: Lane, call: Callers) -> None:
    """Not after a lost connection either."""
    commands = call(b"a", b"b")
    lane.next_batch()
    commands[0].future.cancel()
    lane.disconnected(_GONE)

    assert lane.next_batch() == [b"b"]


def test_a_reply_that_nobody_asked_for_is_out_of_step(lane: Lane, call: Callers) -> None:
    """Queued commands, which have not been written, do not get it."""
    with pytest.raises(OutOfStep):
        lane.answer(b"early")
    (command,) = call(b"a")
    with pytest.raises(OutOfStep):
        lane.answer(b"early")
    assert not command.future.done()


@pytest.mark.parametrize(
    ("accepts", "reply"),
    [
        (_STRINGS, 1),
        (_STRINGS, []),
        (_STRINGS, True),
        (_STRINGS, "text"),
        (_INTEGERS, b"OK"),
        (_INTEGERS, None),
        (_INTEGERS, True),
        (_INTEGERS, 1.0),
    ],
    ids=repr,
)
def test_a_reply_of_another_type_is_out_of_step(
    lane: Lane, call: Callers, accepts: frozenset[type], reply: Any
) -> None:
    """The command that it was due for fails, and nobody gets it."""
    commands = call(b"a", b"b", accepts=accepts)
    lane.next_batch()

    with pytest.raises(OutOfStep) as raised:
        lane.answer(reply)

    assert results(*commands) == [raised.value, None]


@pytest.mark.parametrize("reply", [b"", b"x", None])
def test_every_accepted_type_is_a_reply(lane: Lane, call: Callers, reply: Any) -> None:
    """Empty and null ones, too."""
    (command,) = call(b"a")
    lane.next_batch()
    lane.answer(reply)

    assert command.future.done()
    assert command.future.result() == reply


@pytest.mark.parametrize("error", [ResponseError("ERR"), NoScriptError("x")], ids=repr)
def test_an_error_reply_is_a_reply_to_any_command(
    lane: Lane, call: Callers, error: Exception
) -> None:
    """As a value, and to that command alone."""
    commands = call(b"a", b"b", accepts=_INTEGERS)
    lane.next_batch()
    lane.answer(error)
    lane.answer(7)

    assert results(*commands) == [error, 7]


def test_what_was_under_way_is_sent_again(lane: Lane, call: Callers) -> None:
    """In the old order, before what was queued, and is unsure from then on."""
    answered, *under_way = call(b"a", b"b", b"c")
    lane.next_batch()
    lane.answer(b"1")
    queued = call(b"d")
    lane.disconnected(_GONE)

    assert lane.next_batch() == [b"b", b"c", b"d"]
    for reply in (b"2", b"3", b"4"):
        lane.answer(reply)
    assert results(answered, *under_way, *queued) == [b"1", b"2", b"3", b"4"]
    assert [each.unsure for each in (answered, *under_way, *queued)] == [False, True, True, False]


def test_what_was_under_way_twice_fails(lane: Lane, call: Callers) -> None:
    """With the reason; what was under way once is sent again."""
    twice = call(b"a")
    lane.next_batch()
    lane.disconnected(_GONE)
    lane.next_batch()
    once = call(b"b")
    lane.next_batch()
    again = RedisConnectionError("again")
    lane.disconnected(again)

    assert results(*twice, *once) == [again, None]
    assert lane.next_batch() == [b"b"]


def test_what_may_not_be_applied_twice_fails(lane: Lane, call: Callers) -> None:
    """When it was under way on a connection that went; what has not been written is sent."""
    (under_way,) = call(b"a", repeatable=False)
    (repeatable,) = call(b"b")
    lane.next_batch()
    (queued,) = call(b"c", repeatable=False)
    lane.disconnected(_GONE)

    assert results(under_way, repeatable, queued) == [_GONE, None, None]
    assert [under_way.unsure, repeatable.unsure, queued.unsure] == [True, True, False]
    assert lane.next_batch() == [b"b", b"c"]


def test_what_was_never_written_is_sure_and_has_both_tries(lane: Lane, call: Callers) -> None:
    """However many connections go while it waits."""
    (command,) = call(b"a")
    for _ in range(3):
        lane.disconnected(_GONE)

    assert (command.unsure, command.future.done()) == (False, False)
    assert lane.next_batch() == [b"a"]
    lane.disconnected(_GONE)
    assert lane.next_batch() == [b"a"]


def test_what_was_under_way_on_a_stuck_connection_fails(lane: Lane, call: Callers) -> None:
    """It is not sent again, as its first copy may still be applied, at any time."""
    under_way = call(b"a", b"b")
    lane.next_batch()
    queued = call(b"c")
    stuck = TimeoutError()
    lane.disconnected(stuck)

    assert results(*under_way, *queued) == [stuck, stuck, None]
    assert lane.next_batch() == [b"c"]
    assert not queued[0].unsure


def test_what_a_replica_refused_is_sent_again_and_sure(lane: Lane, call: Callers) -> None:
    """It has not been applied; of what followed it nobody knows."""
    refused, other = call(b"a", b"b")
    lane.next_batch()
    lane.disconnected(ReadOnlyError("x"))

    assert lane.next_batch() == [b"a", b"b"]
    assert [refused.unsure, other.unsure] == [False, True]


@pytest.mark.parametrize("kind", [ReadOnlyError, BusyLoadingError, AuthenticationError])
def test_what_was_refused_is_sent_again_whatever_it_is(
    lane: Lane, call: Callers, kind: type[Exception]
) -> None:
    """It will be applied once, at most."""
    refused, other = call(b"a", b"b", repeatable=False)
    lane.next_batch()
    refusal = kind("x")
    lane.disconnected(refusal)

    assert results(refused, other) == [None, refusal]
    assert [refused.unsure, other.unsure] == [False, True]
    assert lane.next_batch() == [b"a"]


def test_what_replicas_refused_twice_fails(lane: Lane, call: Callers) -> None:
    """With the refusal."""
    (command,) = call(b"a")
    refusal = ReadOnlyError("x")
    for _ in range(2):
        lane.next_batch()
        lane.disconnected(refusal)

    assert results(command) == [refusal]
    assert lane.next_batch() == []


def test_a_refusal_does_not_make_sure_what_was_unsure(lane: Lane, call: Callers) -> None:
    """The first connection may have applied it."""
    unsure, other = call(b"a", b"b")
    lane.next_batch()
    lane.disconnected(_GONE)
    lane.next_batch()
    lane.disconnected(ReadOnlyError("x"))

    assert [unsure.unsure, other.unsure] == [True, True]


def test_a_refused_command_whose_caller_is_gone_makes_no_other_sure(
    lane: Lane, call: Callers
) -> None:
    """The refusal was for that one alone."""
    refused, other = call(b"a", b"b")
    lane.next_batch()
    refused.future.cancel()
    lane.disconnected(ReadOnlyError("x"))

    assert lane.next_batch() == [b"b"]
    assert other.unsure


def test_what_is_late_fails(lane: Lane, call: Callers) -> None:
    """At its deadline, queued or not; what is not late goes on."""
    late = call(b"a", deadline=1.0)
    in_time = call(b"b", deadline=2.0)
    assert lane.deadline() == 1.0
    timeout = TimeoutError()

    assert lane.expire(0.999, timeout) is False
    assert results(*late, *in_time) == [None, None]
    assert lane.expire(1.0, timeout) is False
    assert results(*late, *in_time) == [timeout, None]
    assert lane.deadline() == 2.0
    assert lane.next_batch() == [b"b"]


def test_what_is_late_under_way_means_a_stuck_connection(lane: Lane, call: Callers) -> None:
    """Also when its caller is gone: no reply has come for as long as any may take."""
    commands = call(b"a", deadline=1.0)
    lane.next_batch()
    commands += call(b"b", deadline=1.0)

    assert lane.expire(0.5, TimeoutError()) is False
    commands[0].future.cancel()
    assert lane.expire(1.0, TimeoutError()) is True
    assert isinstance(results(commands[1])[0], TimeoutError)


def test_a_command_with_less_time_than_older_ones_fails_in_time(lane: Lane, call: Callers) -> None:
    """As the second command of a verb has; the connection is not stuck because of it."""
    commands = call(b"a", deadline=3.0) + call(b"b", deadline=2.0)
    lane.next_batch()
    commands += call(b"c", deadline=3.0) + call(b"d", deadline=2.0)
    assert lane.deadline() == 2.0
    timeout = TimeoutError()

    assert lane.expire(2.0, timeout) is False
    assert results(*commands) == [None, timeout, None, timeout]
    assert lane.deadline() == 3.0
    lane.answer(b"1")
    lane.answer(b"late")
    assert lane.next_batch() == [b"c"]
    assert results(*commands) == [b"1", timeout, None, timeout]


def test_a_connection_is_stuck_when_what_has_failed_becomes_the_oldest(
    lane: Lane, call: Callers
) -> None:
    """It has waited long enough, and somebody looks when the others have, at the latest."""
    call(b"a", deadline=3.0)
    call(b"b", deadline=2.0)
    lane.next_batch()
    assert lane.expire(2.0, TimeoutError()) is False
    lane.answer(b"1")

    assert lane.expire(3.0, TimeoutError()) is True


def test_what_came_late_has_its_time_before_a_connection_is_stuck(
    lane: Lane, call: Callers
) -> None:
    """It fails at its deadline, but is not overdue, as it has hardly been waited for."""
    (late,) = call(b"a", deadline=1.0, overdue=3.0)
    lane.next_batch()
    timeout = TimeoutError()

    assert lane.expire(1.0, timeout) is False
    assert results(late) == [timeout]
    assert lane.deadline() == 3.0
    assert lane.expire(3.0, timeout) is True


def test_preludes_have_replies_of_their_own(lane: Lane, call: Callers) -> None:
    """Of any type, and of no interest; also when all is sent again."""
    before, asking, after = *call(b"a"), *call(b"b", preludes=2), *call(b"c")
    lane.next_batch()
    lane.answer(b"1")
    lane.answer(b"prelude")
    lane.disconnected(_GONE)
    assert lane.next_batch() == [b"b", b"c"]
    for reply in (ResponseError("prelude"), 7, b"2", b"3"):
        lane.answer(reply)

    assert results(before, asking, after) == [b"1", b"2", b"3"]


def test_a_late_reply_is_for_the_late_command(lane: Lane, call: Callers) -> None:
    """It is dropped, and the next reply goes to the next command."""
    late = call(b"a", deadline=1.0)
    in_time = call(b"b", deadline=2.0)
    lane.next_batch()
    timeout = TimeoutError()
    lane.expire(1.0, timeout)
    lane.answer(b"late")
    lane.answer(b"in time")

    assert results(*late, *in_time) == [timeout, b"in time"]


def test_there_is_no_deadline_without_a_command(lane: Lane, call: Callers) -> None:
    """None before, and none after."""
    assert lane.deadline() is None
    call(b"a", deadline=1.0)
    lane.next_batch()
    assert lane.deadline() == 1.0
    lane.answer(b"x")
    assert lane.deadline() is None


def test_giving_up_fails_everything(lane: Lane, call: Callers) -> None:
    """Queued or under way; replies that had been given stay, and the lane is empty."""
    answered, under_way = call(b"a", b"b")
    lane.next_batch()
    lane.answer(b"1")
    (queued,) = call(b"c")
    lane.fail(_GONE)

    assert results(answered, under_way, queued) == [b"1", _GONE, _GONE]
    assert (len(lane), lane.queued, lane.deadline()) == (0, False, None)
    with pytest.raises(OutOfStep):
        lane.answer(b"2")


def test_the_number_under_way_is_bounded(loop: asyncio.AbstractEventLoop) -> None:
    """What is beyond waits until a reply makes room."""
    lane = Lane(max_commands=2)
    commands = Callers(loop, lane)(b"a", b"b", b"c", b"d")

    assert lane.next_batch() == [b"a", b"b"]
    assert (lane.next_batch(), lane.queued) == ([], True)
    lane.answer(b"1")
    assert lane.next_batch() == [b"c"]
    lane.disconnected(_GONE)
    assert lane.next_batch() == [b"b", b"c"]
    for reply in (b"2", b"3"):
        lane.answer(reply)
    assert lane.next_batch() == [b"d"]
    lane.answer(b"4")
    assert results(*commands) == [b"1", b"2", b"3", b"4"]


def test_the_bytes_under_way_are_bounded(loop: asyncio.AbstractEventLoop) -> None:
    """What is beyond waits; what is larger than the bound goes alone."""
    lane = Lane(max_bytes=10)
    Callers(loop, lane)(b"aaaa", b"bbbb", b"cccc", b"d" * 20, b"e")

    assert lane.next_batch() == [b"aaaa", b"bbbb"]
    assert lane.next_batch() == []
    lane.answer(None)
    assert lane.next_batch() == [b"cccc"]
    lane.answer(None)
    assert lane.next_batch() == []
    lane.answer(None)
    assert lane.next_batch() == [b"d" * 20]
    assert lane.next_batch() == []
    lane.answer(None)
    assert lane.next_batch() == [b"e"]


def test_expected_replies_count(loop: asyncio.AbstractEventLoop) -> None:
    """Where replies are large, fewer small commands are under way."""
    lane = Lane(max_bytes=10_000)
    call = Callers(loop, lane)
    for _ in range(100):
        call(b"x")
        lane.next_batch()
        lane.answer(bytes(1_000))
    call(*[b"x"] * 100)

    assert 10 <= len(lane.next_batch()) <= 12


def test_one_write_is_bounded(loop: asyncio.AbstractEventLoop) -> None:
    """So that a large record is soon followed by others; a batch ends when it is large enough."""
    lane = Lane(batch_bytes=10)
    Callers(loop, lane)(b"aaaa", b"b" * 50, b"cccc", b"dddd", b"eeee", b"f")

    assert lane.next_batch() == [b"aaaa", b"b" * 50]
    assert lane.next_batch() == [b"cccc", b"dddd", b"eeee"]
    assert lane.next_batch() == [b"f"]


def test_the_usual_bounds_have_room_for_one_event_loop_turn() -> None:
    """Hundreds of callers and a few of the largest records, and no more."""
    assert 256 <= MAX_COMMANDS <= 10_000
    assert 2**20 < MAX_BYTES <= 64 * 2**20
