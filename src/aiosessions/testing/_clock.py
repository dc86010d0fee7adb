"""A clock that stands still until a test moves it."""

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class FakeClock:
    """A `Clock` that moves only in calls of its methods, in whole milliseconds.

    The two readings start far apart, so code that confuses them fails. They start at odd
    milliseconds, so code that counts in seconds fails too.
    """

    def __init__(self) -> None:
        self._monotonic = 1_000_123
        self._time = 1_900_000_000_456  # in March 2030

    def monotonic(self) -> float:
        """Return the seconds of a clock that never steps."""
        return self._monotonic / 1000

    def time(self) -> float:
        """Return the seconds since the epoch."""
        return self._time / 1000

    def now(self) -> datetime:
        """Return the reading of `time` as a datetime in UTC, without the rounding of a float."""
        return _EPOCH + timedelta(milliseconds=self._time)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._monotonic += round(seconds * 1000)
        self._time += round(seconds * 1000)

    def set_back(self, seconds: float) -> None:
        """Step the wall clock back, as an operator or NTP does. `monotonic` does not change."""
        self._time -= round(seconds * 1000)
