"""The announcements of changes: one subscription to each server that has sessions.

The scripts that change or delete a session publish its digest, with the new revision, on a channel
under the key prefix (https://redis.io/docs/latest/develop/pubsub/). In a cluster, the nodes pass
messages on to each other. That can fail without notice, so there is a subscription to each master.

Invariants:

- Listeners hear `resumed` only while every server has confirmed the subscription. They hear
  `interrupted` as soon as one is lost: pub/sub repeats no message.
- When the connection for commands is made anew, so is the subscription, because the address may
  name another server now.
- The tasks end with the storage, or with the last listener. They run in empty contexts.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress
from typing import Any, Final

from .._listeners import Listeners
from ..errors import SessionError
from ..storage import StorageListener
from ._driver import Address, ConnectionFactory
from ._subscription import Follower

_REMEMBERED: Final = 1000


class Announcements:
    """The subscriptions of one storage, and the listeners of its announcements.

    Args:
        channel: The name of the channel.
        timeout: Seconds after which connecting fails and a silent server is lost.
        servers: Finds the servers that have sessions, before a deadline.
        factory: Tells how to connect to a server.
    """

    def __init__(
        self,
        channel: bytes,
        timeout: float,
        servers: Callable[[float], Awaitable[Collection[Address]]],
        factory: Callable[[Address], ConnectionFactory],
    ) -> None:
        self._channel = channel
        self._timeout = timeout
        self._servers = servers
        self._factory = factory
        self._listeners = Listeners()
        self._followers: dict[Address, Follower] = {}
        self._task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # with those that are ending
        self._restart: asyncio.TimerHandle | None = None
        self._lost = asyncio.Event()
        self._complete: bool | None = None  # None until the listeners know
        self._heard: dict[tuple[str, str], None] = {}  # the latest writes
        self._closed = False

    def listen(self, listener: StorageListener) -> Callable[[], None]:
        """See `AnnouncingStorage.listen`."""
        forget = self._listeners.add(listener, complete=self._complete)

        def stop() -> None:
            forget()
            if not self._listeners:
                self._stop()

        return stop

    @property
    def active(self) -> bool:
        """Whether the servers are followed."""
        return self._task is not None

    def start(self) -> None:
        """Follow the servers, from the event loop that runs, if anyone listens."""
        if self._listeners and self._task is None and not self._closed:
            self._lost = asyncio.Event()
            self._task = self.spawn(self._run(), "aiosessions: announcements")
            self._task.add_done_callback(self._ended, context=contextvars.Context())

    def abandon(self) -> None:
        """Forget the tasks of an event loop that was closed."""
        self._task = self._restart = None
        self._tasks.clear()
        self._followers.clear()
        self.check()

    def close(self) -> None:
        """Stop following for good."""
        self._closed = True
        self._stop()

    async def aclose(self) -> None:
        """Stop following for good, and wait until the tasks have ended."""
        self.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def follow(self, servers: Collection[Address]) -> None:
        """Follow these servers, and no others."""
        if self._task is None:
            return
        for address in self._followers.keys() - set(servers):
            self._followers.pop(address).task.cancel()
        for address in servers:
            known = self._followers.get(address)
            if known is None or known.task.done():
                follower = Follower(self, self._factory(address), self._channel, self._timeout)
                self._followers[address] = follower
                follower.start()
        self.check()

    def add(self, server: Address) -> None:
        """Follow one more server, until all are found again."""
        if server not in self._followers:
            self.follow([*self._followers, server])

    def renew(self, address: Address) -> None:
        """Subscribe again, because the address may name another server now."""
        if follower := self._followers.get(address):
            follower.renew()

    def check(self) -> None:
        """Tell the listeners if the announcements have become complete, or incomplete."""
        states = [each.confirmed for each in self._followers.values()]
        if self._complete is None and None in states and False not in states:
            return  # at the beginning, the last confirmation or the first failure tells
        complete = bool(states) and all(states)
        if complete is not self._complete:
            self._complete = complete
            (self._listeners.resumed if complete else self._listeners.interrupted)()
            if not complete:
                self._lost.set()

    def heard(self, digest: str, revision: str) -> None:
        """Pass an announcement on.

        In a cluster, each master sends it. A late repetition of a write would end newer copies.
        """
        if revision and len(self._followers) > 1:
            if (digest, revision) in self._heard:
                return
            self._heard[digest, revision] = None
            if len(self._heard) > _REMEMBERED:
                del self._heard[next(iter(self._heard))]
        self._listeners.changed(digest, revision)

    def spawn(self, run: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
        """Start a task that `aclose` waits for."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(run, name=name, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard, context=contextvars.Context())
        return task

    async def _run(self) -> None:
        """Find the servers, and find them again while one of them is lost."""
        await asyncio.sleep(0)  # an eager task would run before `start` has noted it
        loop = asyncio.get_running_loop()
        while True:
            try:
                self.follow(await self._servers(loop.time() + self._timeout))
            except SessionError:
                self.check()
            self._lost.clear()
            # While a server is lost, another one may have taken its place.
            with suppress(TimeoutError):
                async with asyncio.timeout(None if self._complete else self._timeout / 4):
                    await self._lost.wait()

    def _stop(self) -> None:
        """Follow nothing. The listeners know when this returns."""
        tasks = [each.task for each in self._followers.values()]
        if self._task is not None:
            tasks.append(self._task)
        self._task = None
        self._followers.clear()
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        for task in tasks:
            if not task.get_loop().is_closed():
                task.cancel()
        if self._complete:
            self.check()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """Start again later if the application has cancelled the task."""
        if self._task is task:
            self._stop()
            self._restart = task.get_loop().call_later(
                self._timeout / 4, self.start, context=contextvars.Context()
            )
