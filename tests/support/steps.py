"""Runs calls of storages one command at a time: crashes between commands, and interleavings.

Invariants:

- The commands go to real servers. Only the moment at which they are sent is chosen here.
- The end of a process is the end of its commands: from there on, each command fails before it is
  sent, so neither the call nor its clean-up has a further effect.
- In an interleaving, one command runs at a time, and each storage belongs to one call.
"""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiosessions import StorageUnavailable, session_digest
from aiosessions.record import PLAIN, is_rotated, owner_of, principal_digest
from aiosessions.redis import _commands as commands
from aiosessions.redis._commands import Command
from tests.support.clients import Storage, cluster_client, storage_at
from tests.support.servers import Server
from tests.support.topologies import Cluster

Send = Callable[[Command], Awaitable[Any]]
Around = Callable[[Send, Command], Awaitable[Any]]
Choose = Callable[[int], int]
"""Chooses one of so many calls."""


@asynccontextmanager
async def replicas_of(
    backend: Server | Cluster, number: int, **settings: Any
) -> AsyncIterator[list[Storage]]:
    """Storages on one server or in a cluster, as replicas of a service have them."""
    async with AsyncExitStack() as stack:
        storages = []
        for _ in range(number):
            if isinstance(backend, Server):
                storage = storage_at(backend.url, **settings)
            else:
                client = await stack.enter_async_context(cluster_client(backend.nodes[0].port))
                storage = Storage(client, **{"ttl": 60, **settings})
            storages.append(await stack.enter_async_context(storage))
        yield storages


@contextmanager
def intercepted(storage: Storage, around: Around) -> Iterator[None]:
    """Let a function send the commands of a storage."""
    router: Any = storage._router
    send = router.call
    router.call = lambda command: around(send, command)
    try:
        yield
    finally:
        del router.call


@contextmanager
def counted(storage: Storage) -> Iterator[list[Command]]:
    """A list of the commands that a storage sends during the block."""
    sent: list[Command] = []

    async def around(send: Send, command: Command) -> Any:
        sent.append(command)
        return await send(command)

    with intercepted(storage, around):
        yield sent


async def ends_after(storage: Storage, number: int, call: Coroutine[Any, Any, Any]) -> bool:
    """Run a call in a process that ends after so many commands; return whether it came to that."""
    sent, ended = 0, False

    async def around(send: Send, command: Command) -> Any:
        nonlocal sent, ended
        if sent == number:
            ended = True
            raise StorageUnavailable("the process has ended", in_doubt=True)
        sent += 1
        return await send(command)

    with intercepted(storage, around):
        try:
            await call
        except Exception:
            if not ended:
                raise
    return ended


@dataclass(eq=False)
class _Call:
    """A call, and its commands that wait to be sent."""

    task: "asyncio.Task[Any] | None" = None
    waiting: "deque[asyncio.Future[None]]" = field(default_factory=deque)
    in_flight: int = 0

    @property
    def is_done(self) -> bool:
        return self.task is not None and self.task.done()

    @property
    def is_still(self) -> bool:
        """Whether nothing happens until the next command is sent."""
        return not self.in_flight and (bool(self.waiting) or self.is_done)


async def interleave(choose: Choose, *calls: tuple[Storage, Coroutine[Any, Any, Any]]) -> list[Any]:
    """Run calls at once, and choose before each command which of them may send one.

    Returns:
        The results of the calls, or their exceptions.
    """
    changed = asyncio.Event()
    states = [_Call() for _ in calls]

    def around(state: _Call) -> Around:
        async def wait_and_send(send: Send, command: Command) -> Any:
            turn = asyncio.get_running_loop().create_future()
            state.waiting.append(turn)
            changed.set()
            try:
                await turn
                return await send(command)
            finally:
                if turn in state.waiting:
                    state.waiting.remove(turn)
                else:
                    state.in_flight -= 1
                changed.set()

        return wait_and_send

    with ExitStack() as stack:
        for state, (storage, call) in zip(states, calls, strict=True):
            stack.enter_context(intercepted(storage, around(state)))
            state.task = asyncio.create_task(call)
            state.task.add_done_callback(lambda _: changed.set())
        while True:
            while not all(state.is_still for state in states):
                changed.clear()
                await changed.wait()
            ready = [state for state in states if state.waiting]
            if not ready:
                break
            chosen = ready[choose(len(ready))]
            chosen.in_flight += 1
            chosen.waiting.popleft().set_result(None)
        tasks = [state.task for state in states if state.task]
        return await asyncio.gather(*tasks, return_exceptions=True)


def every_order() -> Iterator[Choose]:
    """Choices for one run after another, until all orders have been run."""
    path: list[list[int]] = []
    while True:
        yield _replay(path)
        while path and path[-1][0] + 1 >= path[-1][1]:
            path.pop()
        if not path:
            return
        path[-1][0] += 1


def random_orders(number: int, seed: int = 0) -> Iterator[Choose]:
    """Choices for so many runs."""
    for run in range(number):
        yield random.Random(f"{seed} {run}").randrange  # noqa: S311 - replayed


def _replay(path: list[list[int]]) -> Choose:
    """Follow a path of choices, each with the number of alternatives; then take the first."""
    depth = 0

    def choose(number: int) -> int:
        nonlocal depth
        if depth == len(path):
            path.append([0, number])
        path[depth][1] = number
        depth += 1
        return min(path[depth - 1][0], number - 1)

    return choose


async def record_of(storage: Storage, id: str) -> bytes | None:
    """The record of a session, which this does not renew."""
    key = storage._key_prefix + session_digest(id).encode()
    record: bytes | None = await storage._router.call(
        commands.PEEK.fill(storage._router.deadline(), key)
    )
    return record


async def is_live(storage: Storage, id: str, principal: str) -> bool:
    """Whether a principal has a session under an id, which was not rotated away."""
    record = await record_of(storage, id)
    if record is None or record[:1] == PLAIN or is_rotated(record):
        return False
    return owner_of(record) == principal_digest(principal).encode()


async def listed(storage: Storage, principal: str) -> set[str]:
    """The digests in the list of a principal."""
    return {info.digest for info in await storage.list(principal)}


def index_key(principal: str) -> str:
    """The key of an index."""
    return f"session:principal:{principal_digest(principal)}"
