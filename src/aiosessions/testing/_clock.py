"""A clock that stands still until a test moves it."""

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class FakeClock:
    """A `Clock` that moves only when it is told to, in whole milliseconds.

    Its two readings start far apart, so that code which takes one for the other is found out, and
    at odd milliseconds, so that code which counts in seconds is.
    """

    def __init__(self) -> None:
        self._monotonic = 1_000_123
        self._time = 1_900_000_000_456  # in March 2030

    def monotonic(self) -> float:
        """Seconds that never step."""
        return self._monotonic / 1000

    def time(self) -> float:
        """Seconds since the epoch."""
        return self._time / 1000

    def now(self) -> datetime:
        """What `time` says, as an aware datetime in UTC; exact where a float would not be."""
        return _EPOCH + timedelta(milliseconds=self._time)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._monotonic += round(seconds * 1000)
        self._time += round(seconds * 1000)

    def set_back(self, seconds: float) -> None:
        """Step the wall clock back, as an operator or NTP may; `monotonic` stays as it is."""
        self._time -= round(seconds * 1000)
