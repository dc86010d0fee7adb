"""Sans-I/O implementation of an outage: how long commands wait, and when to connect again.

Rules:

- An outage begins when a connection cannot be made, or is lost or stalls while commands wait. It
  ends with the next proper reply.
- Commands that are safe to send, or to send again, wait for the first second of an outage,
  `BRIDGE`. So a restart of a server costs loads and saves no errors.
- After that, commands fail at once, while attempts to connect go on for as long as commands come.
- A failure that waiting cannot mend, such as a wrong password, fails the commands that wait. Later
  commands wait for the next attempt.
- When nothing was tried for a second, the server may be back: the next command waits again.
- Attempts are spaced by a pause that grows with the failures. Its jitter keeps the replicas of a
  service apart.
- The log tells the beginning and the end of an outage, once each, with the address.
"""

import logging
import random
from typing import Final

from ._errors import ConnectError, reason

BRIDGE: Final = 1.0
"""Seconds for which commands wait in an outage, as long as their deadlines allow it."""

_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.25

_log = logging.getLogger("aiosessions")


class Outage:
    """The outage of one server, or the fact that there is none; times are the event loop's.

    Args:
        address: The address of the server, for the log.

    Attributes:
        address: See above.
        active: Whether there is an outage.
        error: The reason of the last failure.
        not_before: The earliest time of the next attempt to connect.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.active = False
        self.error: Exception = TimeoutError()
        self.not_before = 0.0
        self._began_at = 0.0
        self._waiting_since = 0.0
        self._failed_at = 0.0
        self._failures = 0
        self._logged = False

    def begin(self, error: Exception, now: float) -> None:
        """Record that there is no usable connection, and why."""
        if not self.active:
            self.active = True
            self._began_at = self._waiting_since = now
        self.error = error
        self._failed_at = now
        if not self._logged:
            self._logged = True
            _log.warning("no connection to %s: %s", self.address, reason(error))

    def failed(self, error: Exception, now: float) -> None:
        """Record a failure, and space the next attempt to connect."""
        self.begin(error, now)
        longest = min(_FIRST_PAUSE * 2 ** min(self._failures, 10), _LONGEST_PAUSE)
        self.not_before = now + random.uniform(longest / 2, longest)  # noqa: S311 - only jitter
        self._failures += 1

    def end(self, now: float) -> None:
        """Record a proper reply."""
        self.active = False
        self._failures = 0
        if self._logged:
            self._logged = False
            _log.warning("connected to %s again after %.1f s", self.address, now - self._began_at)

    def lets_wait(self, now: float) -> bool:
        """Whether commands may wait for the end of the outage."""
        return now - self._waiting_since < BRIDGE

    @property
    def final(self) -> bool:
        """Whether waiting cannot help: the settings are wrong, as far as one attempt tells."""
        return isinstance(self.error, ConnectError) and not self.error.transient

    def renew(self, now: float) -> bool:
        """Let commands wait anew if nothing was tried for a second; return whether they may."""
        if now - self._failed_at <= BRIDGE:
            return False
        self._waiting_since = self._failed_at = now
        return True
