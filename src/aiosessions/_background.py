"""Tasks that belong to an object instead of a caller, on asyncio or trio.

A task group would not do: the task that entered it must leave it. The objects that start these
tasks are often made in one task and closed in another, for example by test fixtures and by the
lifespan of an application.

Invariants:

- A task starts with an empty context, so it does not keep the context variables of its creator.
- A task never raises: its function handles every exception except cancellation.
- `wait` returns at once for a task of another event loop or process: it may never end.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Protocol

Run = Callable[[], Coroutine[Any, Any, None]]
"""The function of a task."""


class BackgroundTask(Protocol):
    """A task that was started by `spawn`."""

    def cancel(self) -> None:
        """Cancel the task, if it has not ended."""
        ...

    def is_here(self) -> bool:
        """Whether the task belongs to the event loop that runs."""
        ...

    async def wait(self) -> None:
        """Wait for the end of the task, if `is_here`."""
        ...


def _nothing() -> None:
    pass


def spawn(run: Run, name: str, ended: Callable[[], object] = _nothing) -> BackgroundTask:
    """Start a task on the event loop that runs.

    Args:
        run: The function of the task.
        name: The name of the task.
        ended: Called at its end.
    """
    try:
        # There is no current task if trio runs as a guest of asyncio's event loop.
        on_asyncio = asyncio.current_task() is not None
    except RuntimeError:
        on_asyncio = False
    kind = _AsyncioTask if on_asyncio else _TrioTask
    return kind(run, name, ended)


class _AsyncioTask:
    def __init__(self, run: Run, name: str, ended: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(run(), name=name, context=Context())
        if self._task.done():  # it was eager
            ended()
        else:
            self._task.add_done_callback(lambda _: ended(), context=Context())

    def cancel(self) -> None:
        # A closed loop has ended its tasks.
        if not self._loop.is_closed():
            self._task.cancel()

    def is_here(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    async def wait(self) -> None:
        if not self._task.done() and self.is_here():
            await asyncio.wait([self._task])


class _TrioTask:
    def __init__(self, run: Run, name: str, ended: Callable[[], object]) -> None:
        import trio  # noqa: PLC0415 - optional, and loaded already: its event loop is running

        self._current_token = trio.lowlevel.current_trio_token
        self._token = self._current_token()
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

        async def to_the_end() -> None:
            try:
                with self._scope:
                    await run()
            finally:
                ended()
                self._ended.set()

        # A system task starts in a context of trio's own.
        trio.lowlevel.spawn_system_task(to_the_end, name=name)

    def cancel(self) -> None:
        self._scope.cancel()

    def is_here(self) -> bool:
        try:
            return self._current_token() is self._token
        except RuntimeError:
            return False

    async def wait(self) -> None:
        if not self._ended.is_set() and self.is_here():
            await self._ended.wait()
