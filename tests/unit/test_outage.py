"""The rules of an outage, with plain numbers as time."""

import logging

import pytest

from aiosessions.redis._errors import ConnectError, ConnectionLost
from aiosessions.redis._outage import BRIDGE, Outage

LOST = ConnectionLost("the server closed the connection")
REFUSED = ConnectError("cannot connect: Connection refused", transient=True)
WRONG_PASSWORD = ConnectError("the server refuses the password", transient=False)


@pytest.fixture
def outage() -> Outage:
    """The state of a server that has answered so far."""
    return Outage("127.0.0.1:6379")


def test_outage_begins_with_failure_and_ends_with_reply(outage: Outage) -> None:
    """A failure begins the outage, and only a reply ends it."""
    assert not outage.active
    outage.begin(LOST, 10.0)
    assert (outage.active, outage.error) == (True, LOST)
    outage.failed(REFUSED, 10.1)
    assert (outage.active, outage.error) == (True, REFUSED)
    outage.end(10.2)
    assert not outage.active


def test_commands_wait_for_first_second(outage: Outage) -> None:
    """The first second counts from the first failure, however many follow."""
    outage.begin(LOST, 10.0)
    assert outage.lets_wait(10.0)
    for tenths in range(1, 10):
        now = 10 + tenths / 10
        outage.failed(REFUSED, now)
        assert outage.lets_wait(now)

    outage.failed(REFUSED, 10.0 + BRIDGE)
    assert not outage.lets_wait(10.0 + BRIDGE)


def test_waiting_is_renewed_after_quiet_second(outage: Outage) -> None:
    """Commands wait again if the last failure is older than a second."""
    outage.begin(LOST, 10.0)
    outage.failed(REFUSED, 12.0)
    assert not outage.renew(13.0)
    assert not outage.lets_wait(13.0)

    assert outage.renew(13.1)
    assert outage.lets_wait(13.1)
    assert outage.lets_wait(14.0)
    assert not outage.lets_wait(14.1)
    assert not outage.renew(14.1)


@pytest.mark.parametrize(
    ("error", "final"), [(LOST, False), (REFUSED, False), (WRONG_PASSWORD, True)], ids=str
)
def test_wrong_settings_are_final(outage: Outage, error: Exception, *, final: bool) -> None:
    """Waiting does not help if the settings are wrong, as far as the last attempt tells."""
    outage.failed(REFUSED if final else WRONG_PASSWORD, 9.9)
    outage.failed(error, 10.0)

    assert outage.final is final


def test_pauses_grow_and_are_bounded(outage: Outage) -> None:
    """The pause between attempts grows up to a quarter of a second; a reply resets it."""
    pauses = []
    for now in range(1_100):
        outage.failed(REFUSED, float(now))
        pauses.append(outage.not_before - now)

    assert 0.005 <= pauses[0] <= 0.01
    assert all(0.125 <= pause <= 0.25 for pause in pauses[10:])
    assert len(set(pauses)) > 1_000  # the jitter keeps replicas apart
    outage.end(2_000.0)
    outage.failed(REFUSED, 2_000.0)
    assert outage.not_before <= 2_000.01
    # The first second of this outage counts from its beginning.
    assert outage.lets_wait(2_000.9)
    assert not outage.lets_wait(2_001.0)


def test_log_tells_beginning_and_end_once(outage: Outage, caplog: pytest.LogCaptureFixture) -> None:
    """Each outage is two warnings with the address: the reason, and the duration."""
    with caplog.at_level(logging.DEBUG):
        for start in (10.0, 20.0):
            outage.begin(LOST, start)
            outage.failed(REFUSED, start + 0.5)
            outage.renew(start + 3)
            outage.failed(REFUSED, start + 3.5)
            outage.end(start + 4.0)
            outage.end(start + 5.0)

    began = "no connection to 127.0.0.1:6379: the server closed the connection"
    ended = "connected to 127.0.0.1:6379 again after 4.0 s"
    assert [each.getMessage() for each in caplog.records] == [began, ended] * 2
    assert {(each.name, each.levelname) for each in caplog.records} == {("aiosessions", "WARNING")}
