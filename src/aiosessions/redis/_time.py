"""The clock of a storage, and its offset from the clock of the server."""

import time

from ..storage import Clock, whole_milliseconds


class ServerTime:
    """The time, as scripts on the server judge it.

    Args:
        clock: The standard module `time`, or the clock of a test.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def now(self) -> int:
        """Milliseconds since the epoch."""
        return whole_milliseconds(self._clock.time())

    def offset(self) -> bytes:
        """Microseconds by which the clock of a test is ahead of the system's; 0 otherwise."""
        if self._clock is time:
            return b"0"
        return b"%d" % round((self._clock.time() - time.time()) * 1_000_000)
