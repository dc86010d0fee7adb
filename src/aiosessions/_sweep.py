"""Sweeps of a storage, in a task that runs in the background of asyncio or trio.

A task group would not do: the task that entered it must leave it. A manager is often entered in one
task and left in another, for example by test fixtures and by the lifespan of an application.

Invariants:

- The task starts with an empty context, so it does not keep the context variables of its creator.
- An error of the storage does not end the sweeps.
- Stopping waits for the end of the task, and hides neither an error nor a cancellation.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any

import anyio

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
        self._stop: Callable[[], Awaitable[None]] | None = None

    def start(self) -> None:
        """Start the task."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._stop = self._start_on_trio()
        else:
            self._stop = self._start_on_asyncio(loop)

    async def stop(self, *, failing: bool) -> None:
        """Cancel the task and wait for its end, in any task. Not cancellable.

        Args:
            failing: True while an exception propagates. It must not be replaced by another one.
        """
        if self._stop is None:
            return
        stop, self._stop = self._stop, None
        try:
            with anyio.move_on_after(_STOP_TIMEOUT, shield=True):
                await stop()
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

    def _start_on_asyncio(self, loop: asyncio.AbstractEventLoop) -> Callable[[], Awaitable[None]]:
        task = loop.create_task(self._run(), name="aiosessions sweep", context=Context())

        async def stop() -> None:
            # A closed loop has ended its tasks. That happens if enter and exit use two loops.
            if not task.done() and not loop.is_closed():
                task.cancel()
                await asyncio.wait([task])

        return stop

    def _start_on_trio(self) -> Callable[[], Awaitable[None]]:
        import trio  # noqa: PLC0415 - optional, and loaded already: its event loop is running

        scope = trio.CancelScope()
        ended = trio.Event()

        async def run() -> None:
            try:
                with scope:
                    await self._run()
            finally:
                ended.set()

        # A system task starts in a context of trio's own.
        trio.lowlevel.spawn_system_task(run, name="aiosessions sweep")

        async def stop() -> None:
            scope.cancel()
            await ended.wait()

        return stop
