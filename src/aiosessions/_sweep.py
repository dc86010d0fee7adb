"""Sweeps of a storage, in a task that runs in the background.

Invariants:

- An error of the storage does not end the sweeps.
- Stopping waits for the end of the task, and hides neither an error nor a cancellation.
"""

import asyncio
import logging
from typing import Any

import anyio

from ._background import BackgroundTask, spawn
from .errors import SessionError
from .storage import Storage

_log = logging.getLogger("aiosessions")
# The longest time to wait for a sweep that is slow to end, in seconds.
_STOP_TIMEOUT = 5.0


class Sweeper:
    """Calls `delete_expired` on a storage every `interval` seconds, from `start` to `stop`."""

    def __init__(self, storage: Storage[Any], interval: float) -> None:
        self._storage = storage
        self._interval = interval
        self._task: BackgroundTask | None = None

    def start(self) -> None:
        """Start the task."""
        self._task = spawn(self._run, "aiosessions: sweep")

    async def stop(self, *, failing: bool) -> None:
        """Cancel the task and wait for its end, in any task. Not cancellable.

        Args:
            failing: True while an exception propagates. It must not be replaced by another one.
        """
        if self._task is None:
            return
        task, self._task = self._task, None
        task.cancel()
        try:
            with anyio.move_on_after(_STOP_TIMEOUT, shield=True):
                await task.wait()
        except asyncio.CancelledError:  # `asyncio.Task.cancel` passes the shield
            if not failing:
                raise

    async def _run(self) -> None:
        failing = False
        while True:
            await anyio.sleep(self._interval)
            try:
                await self._storage.delete_expired()
            except Exception as error:  # noqa: BLE001 - an outage must not end the application
                if not failing:
                    # The text of an error that is not a SessionError may quote an id.
                    text = str(error) if isinstance(error, SessionError) else ""
                    _log.warning("sweeps fail: %s", text or type(error).__name__)
                failing = True
            else:
                if failing:
                    _log.info("sweeps succeed again")
                failing = False
