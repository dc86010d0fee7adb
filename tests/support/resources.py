"""Resources of sessions for tests, on event loops whose clocks a test moves."""

import asyncio
import functools
import inspect
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import anyio
import pytest
import trio.testing

from aiosessions import LocalStorage, NearCache, Session, SessionManager, SessionResources, Storage
from aiosessions.testing import FakeClock
from tests.support.storages import InterceptedStorage

TTL, STALENESS, IDLE, MAX_OPEN, GRACE = 60, 20, 30, 3, 10
_TIMEOUT = 10_000.0  # of the loop's own clock


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop of asyncio with a clock that can be advanced."""

    ahead = 0.0

    def time(self) -> float:
        """The time of the clock."""
        return super().time() + self.ahead


def _eager_loop() -> asyncio.AbstractEventLoop:
    loop = JumpingLoop()
    loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined,unused-ignore]
    return loop


async def settle() -> None:
    """Let all tasks run until they wait for something."""
    for _ in range(25):
        await anyio.lowlevel.checkpoint()


@dataclass(eq=False)
class Resource:
    """An open resource."""

    session: Session[Any]
    users: int = 0
    closed: bool = False


class World:
    """Sessions, and resources that check the promises to those who open and close them.

    Attributes:
        clock: The clock of the sessions.
        shared: The storage of all replicas.
        storage: This replica's own: `shared`, or a cache over it.
        opens: The number of calls of `open`.
        live: The resources that are open, opened or closed at present.
        before_open, before_close: Called by `open` and `close`.
        violations: Broken promises.
    """

    def __init__(
        self,
        *,
        near: bool,
        shared: InterceptedStorage | None = None,
        clock: FakeClock | None = None,
    ) -> None:
        self.clock = clock or FakeClock()
        self.near = near
        self.shared = shared or InterceptedStorage(LocalStorage(ttl=TTL, clock=self.clock))
        self.storage: Storage[Any] = self.shared.inner
        if near:
            self.storage = NearCache(self.shared.inner, max_staleness=STALENESS, clock=self.clock)
        self.sessions = SessionManager[Any](self.storage, grace=GRACE, clock=self.clock)
        self.resources = SessionResources[Resource, Any](
            self.sessions, self.open, self.close, max_open=MAX_OPEN, idle=IDLE
        )
        self.opens = 0
        self.live: list[Resource] = []
        self.violations: list[str] = []
        self.before_open: Callable[[], Awaitable[object]] = anyio.lowlevel.checkpoint
        self.before_close: Callable[[], Awaitable[object]] = anyio.lowlevel.checkpoint

    async def open(self, session: Session[Any]) -> Resource:
        """Open a resource."""
        self.opens += 1
        resource = Resource(session)
        if any(each.session.id == session.id for each in self.live):
            self.violations.append("two of one session")
        self.live.append(resource)
        if len(self.live) > MAX_OPEN:
            self.violations.append("too many")
        try:
            await self.before_open()
        except BaseException:
            self.live.remove(resource)
            raise
        return resource

    async def close(self, resource: Resource) -> None:
        """Close a resource."""
        if resource.users:
            self.violations.append("closed while in use")
        if resource.closed:
            self.violations.append("closed twice")
        resource.closed = True
        try:
            await self.before_close()
        finally:
            self.live.remove(resource)

    @asynccontextmanager
    async def use(self, id: str, **options: Any) -> AsyncIterator[Resource]:
        """Use a resource."""
        async with self.resources.use(id, **options) as resource:
            if resource.closed:
                self.violations.append("used after its end")
            resource.users += 1
            try:
                yield resource
            finally:
                resource.users -= 1

    async def hold(self, id: str, until: anyio.Event, **options: Any) -> None:
        """Use a resource until an event."""
        async with self.use(id, **options):
            await until.wait()

    async def advance(self, seconds: int, *, step: int = 1) -> None:
        """Let time pass, in steps, as timers start other timers."""
        for _ in range(0, seconds, step):
            self.clock.advance(step)
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                clock: Any = trio.lowlevel.current_clock()
                clock.jump(step)
            else:
                assert isinstance(loop, JumpingLoop)
                loop.ahead += step
            await settle()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.resources.aclose()
        await self.storage.aclose()
        assert not self.violations
        assert not self.live
        assert self.resources.statistics().open == 0


LOOPS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "asyncio": ("asyncio", lambda: {"loop_factory": JumpingLoop}),
    "trio": ("trio", lambda: {"clock": trio.testing.MockClock()}),
}
if sys.version_info >= (3, 12):
    LOOPS["eager"] = "asyncio", lambda: {"loop_factory": _eager_loop}
_CASES = [("asyncio", False), *((loop, True) for loop in LOOPS)]


def in_a_world(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a coroutine test, which gets a `World`, on each loop; on asyncio without a cache, too."""

    @functools.wraps(test)
    def run(*arguments: Any, loop: str, near: bool, **options: Any) -> None:
        async def main() -> None:
            with anyio.fail_after(_TIMEOUT):
                async with World(near=near) as world:
                    await test(world, *arguments, **options)
            names = {each.name or "" for each in anyio.get_running_tasks()}
            assert not [name for name in names if "aiosessions" in name]

        backend, settings = LOOPS[loop]
        anyio.run(main, backend=backend, backend_options=settings())

    signature = inspect.signature(test)
    own = list(signature.parameters.values())[1:]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("loop", "near")]
    # pytest reads the fixtures that a test needs from this attribute.
    vars(run)["__signature__"] = signature.replace(parameters=[*own, *added])
    ids = [f"{loop}-{'cache' if near else 'storage'}" for loop, near in _CASES]
    marked: Callable[..., None] = pytest.mark.parametrize(("loop", "near"), _CASES, ids=ids)(run)
    return marked
