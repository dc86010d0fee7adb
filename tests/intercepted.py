"""A storage that lets a test act between any two steps of its user, and managers over it."""

import functools
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, TypeVar

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

T = TypeVar("T")
Intercept = Callable[[int, str], Awaitable[None]]


class InterceptedStorage(Storage[Any]):
    """Passes each verb on to `inner`, and calls a function before and after it.

    The function gets the number of the point and its name: 0 is before the first verb, 1 after it,
    2 before the second one. An exception that the function raises leaves the verb. After a verb,
    that is a lost reply: it also replaces an error of the verb.

    Attributes:
        calls: The verbs so far, such as "load" and "store absent".
        codec: The codec of `inner`, as storages of this package publish it.
    """

    def __init__(self, inner: LocalStorage[Any]) -> None:
        self.inner = inner
        self.codec: Codec[Any] | None = inner.codec
        self.calls: list[str] = []
        self._intercept: Intercept | None = None
        self._points = 0

    def intercept(self, function: Intercept | None = None) -> None:
        """Call another function from now on, and start both counts again."""
        self.calls.clear()
        self._points = 0
        self._intercept = function

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        """Pass a store on. A lost reply leaves the session unchanged, as with a real server."""
        stored = msgspec.structs.replace(session)
        await self._call(
            f"store {when.value}", functools.partial(self.inner.store, stored, when=when)
        )
        session.revision = stored.revision

    async def load(self, id: str) -> Session[Any]:
        """Pass a load on."""
        return await self._call("load", functools.partial(self.inner.load, id))

    async def delete(self, id: str) -> bool:
        """Pass a delete on."""
        return await self._call("delete", functools.partial(self.inner.delete, id))

    async def delete_expired(self, before: datetime | None = None) -> int:
        """Pass a sweep on."""
        return await self._call(
            "delete_expired", functools.partial(self.inner.delete_expired, before)
        )

    async def aclose(self) -> None:
        """Close without interception."""
        self.calls.append("aclose")
        await self.inner.aclose()

    async def _call(self, name: str, verb: Callable[[], Awaitable[T]]) -> T:
        self.calls.append(name)
        await self._point(f"before {name}")
        try:
            return await verb()
        finally:
            await self._point(f"after {name}")

    async def _point(self, name: str) -> None:
        number = self._points
        self._points += 1
        if self._intercept is not None:
            await self._intercept(number, name)


class Replicas:
    """Two replicas of a service: managers over one storage, on a clock that stands still.

    Attributes:
        clock: The clock of all.
        storage: The intercepted storage.
        sessions: The manager of the first replica, over `storage`.
        rival: The manager of the second replica. Its calls are not intercepted.
    """

    def __init__(
        self, *, ttl: float = 600, codec: Codec[Any] | None = None, **options: Any
    ) -> None:
        self.clock = FakeClock()
        inner = LocalStorage[Any](ttl=ttl, clock=self.clock, codec=codec or JsonCodec())
        self.storage = InterceptedStorage(inner)
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
        """Whether there is a session under this id that accepts writes."""
        try:
            await self.rival.mutate(id, lambda _: None)
        except (SessionNotFound, SessionConflict):
            return False
        return True

    async def count(self) -> int:
        """The number of sessions in the storage, under any id."""
        await self.storage.inner.delete_expired()
        return self.storage.inner.statistics().sessions


def fields(session: Session[Any]) -> dict[str, Any]:
    """A copy of the fields of a session, to compare it with a later state."""
    return msgspec.structs.asdict(session) | {"metadata": dict(session.metadata)}


def unavailable_at(*points: int, in_doubt: bool = False) -> Intercept:
    """The storage cannot be reached at these points, or at every point if none is given."""

    async def intercept(point: int, _: str) -> None:
        if not points or point in points:
            raise StorageUnavailable("the server did not answer in time", in_doubt=in_doubt)

    return intercept
