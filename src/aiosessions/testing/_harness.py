"""The base of every contract: it runs tests, opens storages and tells the time.

Invariants:

- To pytest every test is a plain function: the class wraps each `async def test_...` of a subclass
  of `Harness`. No pytest plugin has to know about these tests, and no two plugins can claim them.
- Each test has its own event loop. The storages that it opened are closed before the loop ends.
- A test that takes longer than `patience` fails.
"""

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any, ClassVar, Protocol

import anyio
import msgspec
import pytest

from ..codec import Codec
from ..errors import SessionNotFound
from ..session import Session, new_session_id
from ..storage import Storage
from ._clock import FakeClock


class StorageFactory(Protocol):
    """The fixture `make_storage`: a function that makes a storage to test."""

    def __call__(
        self, *, ttl: float = 60.0, codec: Codec[Any] | None = None
    ) -> AbstractAsyncContextManager[Storage[Any]]:
        """Make a storage.

        Args:
            ttl: The storage's time to live, in seconds.
            codec: The storage's codec; the storage's default codec if None.
        """
        ...


class Harness:
    """The base of every contract.

    Attributes:
        backend: The event loop that tests run on, as `anyio.run` takes it.
        patience: The time in seconds after which a test that has not ended fails.
        unit: The unit, in seconds, of the time that tests let pass. A TTL has three units.
        tick: The time in seconds, before the end of a TTL, at which a session must still be there.
            This is the precision of the expiry; in real time it is also the delay that a slow
            machine may cause.
    """

    backend: ClassVar[str] = "asyncio"
    patience: ClassVar[float] = 60.0
    unit: ClassVar[float] = 0.25
    tick: ClassVar[float] = 0.25

    _make: StorageFactory
    _opened: AsyncExitStack

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, attribute in list(vars(cls).items()):
            if name.startswith("test") and inspect.iscoroutinefunction(attribute):
                setattr(cls, name, _synchronous(attribute))

    @pytest.fixture(autouse=True)
    def _given(self, make_storage: StorageFactory) -> None:
        self._make = make_storage

    def now(self) -> datetime:
        """Return the time of the storages' clock."""
        return datetime.now(UTC)

    async def advance(self, seconds: float) -> None:
        """Let time pass. Override this for storages with an injected clock, to save the waiting."""
        # A little longer, because timers may fire early by their resolution.
        await anyio.sleep(seconds + 0.02)

    @property
    def ttl(self) -> float:
        """The time to live, in seconds, in tests that let time pass: three units."""
        return 3 * self.unit

    def run(self, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a test in a new event loop, and close the storages that it opened."""

        async def main() -> None:
            with anyio.fail_after(self.patience):
                async with AsyncExitStack() as opened:
                    self._opened = opened
                    await test()

        anyio.run(main, backend=self.backend)

    async def open(self, *, ttl: float = 60.0, codec: Codec[Any] | None = None) -> Storage[Any]:
        """Make a storage that is closed when the test ends."""
        return await self._opened.enter_async_context(self._make(ttl=ttl, codec=codec))

    async def _views(
        self, *, ttl: float = 60.0, codec: Codec[Any] | None = None
    ) -> list[Storage[Any]]:
        """Open the storages that a test uses side by side, which are views of one backend."""
        return [await self.open(ttl=ttl, codec=codec)]


def _synchronous(
    test: Callable[..., Coroutine[Any, Any, None]],
) -> Callable[..., None]:
    """Wrap a coroutine test in a function that runs it. Pytest still sees its parameters."""

    @functools.wraps(test)
    def run(self: Harness, *args: Any, **kwargs: Any) -> None:
        self.run(functools.partial(test, self, *args, **kwargs))

    return run


class FakeTime(Harness):
    """A mixin, placed before the contract, for storages that take a `Clock`.

    Give the storages `self.clock`. The tests then take no time, and find an error of one
    millisecond.
    """

    unit: ClassVar[float] = 1000.0
    tick: ClassVar[float] = 0.001

    @functools.cached_property
    def clock(self) -> FakeClock:
        """The clock of every storage that this test makes."""
        return FakeClock()

    def now(self) -> datetime:
        """Return the time of the fake clock."""
        return self.clock.now()

    async def advance(self, seconds: float) -> None:
        """Move the fake clock."""
        self.clock.advance(seconds)


def new_session(**fields: Any) -> Session[Any]:
    """Make a session with a new id."""
    return Session(id=new_session_id(), **fields)


def content(session: Session[Any]) -> dict[str, Any]:
    """Return the fields that an application fills, without the dates and the revision."""
    return {
        name: getattr(session, name) for name in ("id", "kind", "principal", "metadata", "data")
    }


async def is_gone(storage: Storage[Any], session: Session[Any]) -> bool:
    """Return whether loading a session raises `SessionNotFound`."""
    try:
        await storage.load(session.id)
    except SessionNotFound:
        return True
    return False


@contextmanager
def unchanged(*sessions: Session[Any]) -> Iterator[None]:
    """Check that the block changes no field of the caller's objects."""

    def snapshot() -> list[dict[str, Any]]:
        return [
            msgspec.structs.asdict(session) | {"metadata": dict(session.metadata)}
            for session in sessions
        ]

    before = snapshot()
    yield
    assert snapshot() == before
