"""The event loop and the process that a storage's connections belong to."""

import asyncio
import os

from ..errors import StorageUnavailable


class Home:
    """Where connections were first used, and the only place where they can be.

    Elsewhere a future would never be resolved, and a forked process would share its parent's
    sockets: both must be told rather than hang or corrupt.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = -1

    def check(self) -> asyncio.AbstractEventLoop:
        """Make this the home if there is none yet.

        Returns:
            The event loop.

        Raises:
            StorageUnavailable: It is another event loop, none of asyncio's, or another process.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError as error:
            message = "RedisStorage runs under asyncio, and there is no asyncio event loop here"
            raise StorageUnavailable(message) from error
        if self._loop is None:
            self._loop = loop
            self._process = _process
        elif self._process != _process:
            message = "the storage was in use before this process was forked; make one in each"
            raise StorageUnavailable(message)
        elif self._loop is not loop:
            message = "the storage is in use by another event loop; make one for each"
            raise StorageUnavailable(message)
        return loop

    def is_here(self) -> bool:
        """Whether connections, if there are any, may be touched; in a forked process never.

        Raises:
            StorageUnavailable: They belong to another event loop, which is still there.
        """
        if self._process != _process or self._loop is None or self._loop.is_closed():
            return False
        return self.check() is self._loop


# Counted up in every forked child: asking the system for the pid at every call would cost more.
_process = 0


def _forked() -> None:
    global _process  # noqa: PLW0603 - there is one process
    _process += 1


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_forked)
