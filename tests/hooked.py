"""A storage that lets a test do something between any two steps of what uses it, and a manager."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import msgspec

from aiosessions import (
    Codec,
    JsonCodec,
    LocalStorage,
    Session,
    SessionConflict,
    SessionManager,
    SessionNotFound,
    Storage,
    StorageUnavailable,
    When,
)
from aiosessions.testing import FakeClock

Hook = Callable[[int, str], Awaitable[None]]


class HookedStorage(Storage[Any]):
    """Passes every verb on, and calls `hook` before and after each.

    Attributes:
        calls: The verbs that were called: "load", "store absent", ...
        hook: Called with the number of the point, from 0, and "before load" or the like. Before
            the first verb is point 0, after it point 1, before the second point 2. What it raises
            is what the verb raises: at an odd point, that is a reply which was lost.
    """

    def __init__(self, inner: Storage[Any]) -> None:
        self.inner = inner
        self.calls: list[str] = []
        self.hook: Hook | None = None
        self._points = 0

    def watch(self, hook: Hook | None = None) -> None:
        """Begin to count again, with another hook."""
        self.calls.clear()
        self.hook = hook
        self._points = 0

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        """Store, with a hook before and after."""
        await self._before(f"store {when.value}")
        await self.inner.store(session, when=when)
        await self._point(f"after store {when.value}")

    async def load(self, id: str) -> Session[Any]:
        """Load, with a hook before and after."""
        await self._before("load")
        session = await self.inner.load(id)
        await self._point("after load")
        return session

    async def delete(self, id: str) -> bool:
        """Delete, with a hook before and after."""
        await self._before("delete")
        existed = await self.inner.delete(id)
        await self._point("after delete")
        return existed

    async def delete_expired(self, before: datetime | None = None) -> int:
        """Sweep, with a hook before and after."""
        await self._before("delete_expired")
        removed = await self.inner.delete_expired(before)
        await self._point("after delete_expired")
        return removed

    async def aclose(self) -> None:
        """Close, with no hook."""
        self.calls.append("aclose")
        await self.inner.aclose()

    async def _before(self, call: str) -> None:
        self.calls.append(call)
        await self._point(f"before {call}")

    async def _point(self, name: str) -> None:
        number = self._points
        self._points += 1
        if self.hook is not None:
            await self.hook(number, name)


class Setting:
    """A manager over a storage that can be hooked, both on a clock that stands still.

    Attributes:
        clock: The clock.
        storage: The hooked storage.
        sessions: The manager over it, made with `options`.
        rival: Somebody else, on another replica, whom no hook sees.
    """

    def __init__(
        self, *, ttl: float = 600, codec: Codec[Any] | None = None, **options: Any
    ) -> None:
        self.clock = FakeClock()
        inner = LocalStorage[Any](ttl=ttl, clock=self.clock, codec=codec or JsonCodec())
        self.storage = HookedStorage(inner)
        self.sessions = SessionManager[Any](self.storage, clock=self.clock, **options)
        self.rival = SessionManager[Any](inner, clock=self.clock, **options)

    async def lives(self, id: str) -> bool:
        """Whether there is a session under this id."""
        try:
            await self.rival.get(id)
        except SessionNotFound:
            return False
        return True

    async def writable(self, id: str) -> bool:
        """Whether there is a session under this id that can be written."""
        try:
            await self.rival.mutate(id, lambda _: None)
        except (SessionNotFound, SessionConflict):
            return False
        return True


def fields(session: Session[Any]) -> dict[str, Any]:
    """What a session is now, to compare it with what it is later."""
    return msgspec.structs.asdict(session) | {"metadata": dict(session.metadata)}


async def unavailable(_: int, __: str) -> None:
    """A hook: the storage is out of reach."""
    message = "the server did not answer in time"
    raise StorageUnavailable(message)
