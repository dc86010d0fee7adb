"""The promises of live resources on random schedules, with a clock that the schedule moves."""

import random
from contextlib import suppress
from typing import Any

import anyio
import pytest

from aiosessions import Session, SessionError
from tests.support.resources import IDLE, World, in_a_world

_SESSIONS, _STEPS = 5, 60


class Schedule:
    """Random uses of a few sessions, whose resources take time to open and close, or fail."""

    def __init__(self, world: World, seed: int, group: anyio.abc.TaskGroup) -> None:
        self.world = world
        self.rng = random.Random(seed)  # noqa: S311 - repeatable
        self.group = group
        self.sessions: list[Session[Any]] = []
        self.scopes: list[anyio.CancelScope] = []

    async def run(self) -> None:
        """Take all steps, and then let open and close end."""
        rng, world = self.rng, self.world
        world.before_open = world.before_close = self.pause
        self.sessions += [await world.sessions.create() for _ in range(_SESSIONS)]
        for _ in range(_STEPS):
            index = rng.randrange(_SESSIONS)
            step = rng.choice([self.use] * 5 + [self.cancel, self.end, self.rotate, self.wait])
            with suppress(SessionError):
                await step(index)
            await self.turns()
        if rng.random() < 0.3:
            self.group.start_soon(world.resources.aclose)
            await self.turns()
        self.group.cancel_scope.cancel()

    async def turns(self) -> None:
        """Let the tasks run for a few turns."""
        for _ in range(self.rng.randrange(8)):
            await anyio.lowlevel.checkpoint()

    async def pause(self) -> None:
        """Take no time, a few turns, or some seconds; and fail at times."""
        if self.rng.random() < 0.5:
            await self.turns()
        if self.rng.random() < 0.3:
            await anyio.sleep(self.rng.randrange(1, 9))
        if self.rng.random() < 0.2:
            raise OSError

    async def use(self, index: int) -> None:
        """Let a new task use a session."""

        async def user() -> None:
            with anyio.CancelScope() as scope, suppress(SessionError, OSError):
                self.scopes.append(scope)
                async with self.world.use(self.sessions[index].id, cancel=self.rng.random() < 0.5):
                    await self.pause()

        self.group.start_soon(user)

    async def cancel(self, _: int) -> None:
        """Cancel a user."""
        if self.scopes:
            self.rng.choice(self.scopes).cancel()

    async def end(self, index: int) -> None:
        """Delete a session here or elsewhere, and perhaps create another one under its id."""
        id = self.sessions[index].id
        here, elsewhere = self.world.sessions.delete, self.world.shared.inner.delete
        await self.rng.choice([here, elsewhere])(id)
        await self.turns()
        again = id if self.rng.random() < 0.5 else None
        self.sessions[index] = await self.world.sessions.create(id=again)

    async def rotate(self, index: int) -> None:
        """Give a session a new id, which replaces the old one half of the time."""
        rotated = await self.world.sessions.rotate(self.sessions[index])
        if self.rng.random() < 0.5:
            self.sessions[index] = rotated

    async def wait(self, _: int) -> None:
        """Let time pass."""
        await self.world.advance(self.rng.choice([1, 2, IDLE]), step=self.rng.choice([1, 5]))


@in_a_world
@pytest.mark.parametrize("seed", range(12))
async def test_promises_hold_on_random_schedules(world: World, seed: int) -> None:
    """The world checks them: closed once, not in use, one for each session, never too many."""
    async with anyio.create_task_group() as group:
        await Schedule(world, seed, group).run()
    world.before_open = world.before_close = anyio.lowlevel.checkpoint
    await world.advance(10)
    assert world.resources.statistics().in_use == 0
