"""Storages beneath a near cache, whose calls tests hold or fail."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from aiosessions import (
    Codec,
    JsonCodec,
    LocalStorage,
    NearCache,
    Session,
    StorageListener,
    new_session_id,
)
from aiosessions.testing import FakeClock
from tests.support.storages import InterceptedIndexedStorage


class RemoteStorage(InterceptedIndexedStorage):
    """A storage of another maker, which announces nothing.

    Attributes:
        clock: The clock of the storage and its caches.
        ttl: The TTL, in seconds.
        closed: Whether `aclose` was called.
    """

    def __init__(self, *, codec: Codec[Any] | None = None, clock: FakeClock | None = None) -> None:
        self.clock = clock or FakeClock()
        inner = LocalStorage[Any](ttl=60, codec=codec or JsonCodec(), clock=self.clock)
        super().__init__(inner)
        self.ttl = inner.ttl

    def cache(self, **options: Any) -> NearCache[Any]:
        """A cache with a staleness of ten seconds."""
        return NearCache(self, max_staleness=10, clock=self.clock, **options)

    def intercept_nothing(self) -> None:
        """Intercept no call from now on, and keep the counts."""
        self._intercept = None

    @property
    def closed(self) -> bool:
        """See above."""
        return "aclose" in self.calls

    @asynccontextmanager
    async def held(self, name: str) -> AsyncIterator["Gate"]:
        """Hold the calls that reach a point, such as "before load", until the block ends."""
        gate = Gate(name)
        self.intercept(gate)
        try:
            yield gate
        finally:
            self.intercept_nothing()
            gate.open.set()


class Gate:
    """Holds the calls that reach a point.

    Attributes:
        reached: Set when a call has reached it.
        open: Set when the calls may go on.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.reached = anyio.Event()
        self.open = anyio.Event()

    async def __call__(self, _: int, name: str) -> None:
        """Wait, if this is the point."""
        if name == self._name:
            self.reached.set()
            await self.open.wait()


class AnnouncingRemoteStorage(RemoteStorage):
    """The same, with a channel that a test controls through `listener`."""

    listener: StorageListener

    def listen(self, listener: StorageListener) -> Callable[[], None]:
        """See `AnnouncingStorage.listen`."""
        self.listener = listener
        listener.resumed()
        return self.calls.clear


class Heard(StorageListener):
    """A listener, with the events and the number of copies that the cache had at each."""

    def __init__(self, cache: NearCache[Any]) -> None:
        self._cache = cache
        self.events: list[tuple[Any, ...]] = []

    def changed(self, digest: str, revision: str) -> None:
        """See `StorageListener`, as for the next two."""
        self.events.append((digest, revision, self._cache.statistics().sessions))

    def interrupted(self) -> None:  # noqa: D102
        self.events.append(("interrupted",))

    def resumed(self) -> None:  # noqa: D102
        self.events.append(("resumed",))


def loads(storage: RemoteStorage) -> int:
    """The number of remote loads."""
    return storage.calls.count("load")


async def stored(storage: RemoteStorage, **fields: Any) -> Session[Any]:
    """A session that another replica has stored."""
    fields.setdefault("data", {"n": [1]})
    session = Session[Any](id=new_session_id(), **fields)
    session.created_at = session.updated_at = storage.clock.now()
    await storage.inner.store(session)
    return session
