"""How contract tests run, and what they have in common.

Invariants:

- To pytest every test is a plain function: `async def test_...` in a subclass of `Harness` is
  wrapped as the class is made, so that no plugin has to know about it, nor can two claim it.
- One test is one event loop; the storages it opened are closed before the loop ends.
- A test that hangs fails: nothing waits longer than `patience`.
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

from ..codec import Codec, JsonCodec
from ..errors import SessionNotFound
from ..session import Session, new_session_id
from ..storage import Storage
from ._clock import FakeClock


class StorageFactory(Protocol):
    """What the fixture `make_storage` gives: a function that makes a storage to test."""

    def __call__(
        self, *, ttl: float = 60.0, codec: Codec[Any] | None = None
    ) -> AbstractAsyncContextManager[Storage[Any]]:
        """Make a storage.

        Args:
            ttl: The storage's time to live, in seconds.
            codec: The storage's codec; its default one if None.
        """
        ...


class Harness:
    """The base of every contract: runs its tests, opens storages, and tells the time.

    Attributes:
        backend: The event loop that tests run on: what `anyio.run` takes.
        patience: Seconds until a test that does not end counts as hanging.
        unit: Seconds in one unit of the time that tests let pass; a few of them are one TTL.
        tick: Seconds before the end of a TTL at which a session must still be there. Expiry has to
            be this exact, so in real time it is what a slow machine may lose.
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
        """The time by the storages' clock."""
        return datetime.now(UTC)

    async def advance(self, seconds: float) -> None:
        """Let time pass. Storages with a clock of their own override this, to save the waiting."""
        # A little more, as timers may fire early by their resolution, and to outlast all rounding.
        await anyio.sleep(seconds + 0.02)

    @property
    def ttl(self) -> float:
        """The time to live, in seconds, in tests that let time pass: three units."""
        return 3 * self.unit

    def run(self, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a test in an event loop of its own, and close what it opened."""

        async def main() -> None:
            with anyio.fail_after(self.patience):
                async with AsyncExitStack() as opened:
                    self._opened = opened
                    await test()

        anyio.run(main, backend=self.backend)

    async def open(self, *, ttl: float = 60.0, codec: Codec[Any] | None = None) -> Storage[Any]:
        """A new storage, which is closed when the test ends."""
        return await self._opened.enter_async_context(self._make(ttl=ttl, codec=codec))


def _synchronous(
    test: Callable[..., Coroutine[Any, Any, None]],
) -> Callable[..., None]:
    """Wrap a coroutine test in a function that runs it; pytest still sees its parameters."""

    @functools.wraps(test)
    def run(self: Harness, *args: Any, **kwargs: Any) -> None:
        self.run(functools.partial(test, self, *args, **kwargs))

    return run


class FakeTime(Harness):
    """Mix in, before the contract, where storages take a `Clock`: give them `self.clock`.

    Tests then take no time, and find an error of one millisecond.
    """

    unit: ClassVar[float] = 1000.0
    tick: ClassVar[float] = 0.001

    @functools.cached_property
    def clock(self) -> FakeClock:
        """The clock of every storage that this test makes."""
        return FakeClock()

    def now(self) -> datetime:
        """The time by the fake clock."""
        return self.clock.now()

    async def advance(self, seconds: float) -> None:
        """Move the fake clock."""
        self.clock.advance(seconds)


def new_session(**fields: Any) -> Session[Any]:
    """A session with an id of its own."""
    return Session(id=new_session_id(), **fields)


def content(session: Session[Any]) -> dict[str, Any]:
    """What an application puts into a session, without the dates and the revision."""
    return {
        name: getattr(session, name) for name in ("id", "kind", "principal", "metadata", "data")
    }


async def is_gone(storage: Storage[Any], session: Session[Any]) -> bool:
    """Whether a session cannot be loaded any more."""
    try:
        await storage.load(session.id)
    except SessionNotFound:
        return True
    return False


@contextmanager
def unchanged(*sessions: Session[Any]) -> Iterator[None]:
    """Check that what happens inside changes nothing about the caller's objects."""

    def snapshot() -> list[dict[str, Any]]:
        return [
            msgspec.structs.asdict(session) | {"metadata": dict(session.metadata)}
            for session in sessions
        ]

    before = snapshot()
    yield
    assert snapshot() == before


class SpoilingCodec:
    """A codec that misbehaves when told to: how a contract gets at what is stored.

    Attributes:
        spoil: If set, makes what is written instead of a session's own payload.
        refusal: If set, what both methods raise.

    Args:
        spoil: See above.
        reader: The codec that reads, if it is not the one that writes.
    """

    def __init__(
        self,
        spoil: Callable[[Session[Any]], bytes] | None = None,
        reader: Codec[Any] | None = None,
    ) -> None:
        self.spoil = spoil
        self.refusal: Exception | None = None
        self._writer: Codec[Any] = JsonCodec()
        self._reader = reader or self._writer

    def encode(self, session: Session[Any]) -> bytes:
        """The session as bytes, or what `spoil` makes of it."""
        if self.refusal:
            raise self.refusal
        return (self.spoil or self._writer.encode)(session)

    def decode(self, payload: bytes) -> Session[Any]:
        """The session, if the payload is in order."""
        if self.refusal:
            raise self.refusal
        return self._reader.decode(payload)
