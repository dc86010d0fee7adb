"""Changes of a session that are redone on a fresh copy after a conflict."""

import inspect
import random
from collections.abc import Callable
from datetime import timedelta

import anyio

from .errors import InvalidSession
from .session import D, Session

Change = Callable[[Session[D]], object]
"""A plain or an async function that changes the session it gets, in place. The result is unused."""


class Retry:
    """The attempts that are left, with growing random pauses between them.

    Args:
        attempts: The maximum number of attempts.
        timeout: The time after which no further attempt begins: seconds or a timedelta.

    Raises:
        ValueError: `attempts` is not positive.
    """

    def __init__(self, attempts: int = 100, timeout: float | timedelta = 10.0) -> None:
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, not {attempts}")
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        self._deadline = anyio.current_time() + seconds
        self._attempts = attempts
        self._attempt = 1

    async def wait(self) -> bool:
        """Wait before the next attempt, or return False if there is none."""
        pause = random.uniform(0, 0.001 * 2 ** min(self._attempt, 6))  # noqa: S311 - only jitter
        if self._attempt >= self._attempts or anyio.current_time() + pause >= self._deadline:
            return False
        self._attempt += 1
        await anyio.sleep(pause)
        return True


async def apply(change: Change[D], session: Session[D]) -> None:
    """Run a change.

    Raises:
        InvalidSession: It has changed the id.
    """
    id = session.id
    result = change(session)
    if inspect.isawaitable(result):
        await result
    if session.id != id:
        raise InvalidSession("a change must leave the id alone; `rotate` gives a new one")
