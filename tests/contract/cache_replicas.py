"""Random schedules of several near caches over one storage, and the rules that they keep.

A schedule is the seed of a random generator. It starts calls, cancels them, holds and fails calls
of the storage before and after they are applied, delays announcements, interrupts subscriptions and
lets time pass on a fake clock.

The storage numbers the states of each session. Each cache has a floor for each session: the oldest
state that a load may return. These events raise it for the loads that start afterwards:

- The cache hears of a state.
- A write or delete through the cache ends, with or without success, and was applied.
- The cache hears `interrupted` or `resumed`: no earlier state may be returned.
- A state is replaced, and `max_staleness` passes.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

from aiosessions import (
    IndexedStorage,
    LocalStorage,
    NearCache,
    Session,
    SessionExists,
    SessionNotFound,
    StorageListener,
    StorageUnavailable,
    When,
    session_digest,
)
from aiosessions.errors import SessionConflict
from aiosessions.testing import FakeClock

TTL: Final = 20.0
STALENESS: Final = 4.0
IDS: Final = ("one", "two")
STEPS: Final = 120
T = TypeVar("T")


def is_over(session: Session[Any], clock: FakeClock) -> bool:
    """Whether a session is past its deadline."""
    return session.expires_at is not None and session.expires_at <= clock.now()


class State:
    """One state of a session in the storage; `revision` is empty if there is none."""

    def __init__(self, revision: str, began: float) -> None:
        self.revision = revision
        self.began = began


class World(StorageListener):
    """The storage, its states and its replicas.

    Attributes:
        states: The states of each session, the oldest first, by digest.
        written: The sessions that were written, by revision.
        used_at: The start of the last successful use, by digest.
        holds: The calls of the storage that wait.
        problems: The rules that were broken.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - replayed
        self.clock = FakeClock()
        self.storage = LocalStorage[Any](ttl=TTL, clock=self.clock)
        self.states = {session_digest(id): [State("", self.clock.time())] for id in IDS}
        self.written: dict[str, Session[Any]] = {}
        self.used_at = dict.fromkeys(self.states, -TTL)
        self.problems: list[str] = []
        self.holds: list[asyncio.Future[None]] = []
        self.replicas = [Replica(self) for _ in range(2)]
        self.storage.listen(self)

    def changed(self, digest: str, revision: str) -> None:
        """The storage has applied a change."""
        self.states[digest].append(State(revision, self.clock.time()))
        for each in self.replicas:
            if each.link.subscribed:
                each.link.announcements.append((digest, len(self.states[digest]) - 1, revision))

    def interrupted(self) -> None:
        """Unused."""

    def resumed(self) -> None:
        """Unused."""

    def check(self, kept: bool, rule: str) -> None:  # noqa: FBT001 - as `assert`
        """Note that a rule is broken."""
        if not kept:
            self.problems.append(rule)

    def lapsed(self, digest: str) -> None:
        """The storage has no such session, perhaps because it was not used."""
        last, now = self.states[digest][-1], self.clock.time()
        if last.revision:
            session = self.written[last.revision]
            if not is_over(session, self.clock):
                unused_for = now - self.used_at[digest]
                self.check(unused_for > TTL - STALENESS - 0.001, "lapsed while in use")
            self.states[digest].append(State("", now))

    def latest(self) -> dict[str, int]:
        """The number of the latest state of each session."""
        return {digest: len(states) - 1 for digest, states in self.states.items()}

    async def hold(self) -> None:
        """Wait for the schedule, mostly."""
        if self.rng.random() < 0.7:
            self.holds.append(future := asyncio.get_running_loop().create_future())
            await future

    async def run(self) -> None:
        """Take random steps, let all calls end, and close the caches."""
        for _ in range(STEPS):
            self.step()
            for _ in range(self.rng.choice((0, 1, 2, 6))):
                await asyncio.sleep(0)
        while calls := [call for each in self.replicas for call in each.calls if not call.done()]:
            for hold in self.holds:
                if not hold.done():
                    hold.set_result(None)
            await asyncio.wait(calls, timeout=0)
        for each in self.replicas:
            self.check(not each.cache._copies._pending, "left: pending")
            await each.cache.aclose()
            self.check(not each.cache._loads._latest, "left: latest")
            self.check(not each.cache._loads._all, "left: load")
            self.check(each.cache.statistics().sessions == 0, "left: copy")
        self.check(asyncio.all_tasks() == {asyncio.current_task()}, "left: task")

    def step(self) -> None:
        """Do one thing."""
        rng, replica, id = self.rng, self.rng.choice(self.replicas), self.rng.choice(IDS)
        link, kind = replica.link, self.rng.random()
        self.holds = [hold for hold in self.holds if not hold.done()]
        if kind < 0.3:
            replica.start(partial(replica.load, id))
        elif kind < 0.45:
            write = rng.choice((replica.save, replica.create, replica.create, replica.delete))
            replica.start(partial(write, id))
        elif kind < 0.47:
            replica.start(partial(replica.revoke_all, rng.choice((None, id))))
        elif kind < 0.5 and replica.calls:
            rng.choice(replica.calls).cancel()
        elif kind < 0.75 and self.holds:
            rng.choice(self.holds).set_result(None)
        elif kind < 0.79 and self.holds:
            rng.choice(self.holds).set_exception(StorageUnavailable("lost", in_doubt=True))
        elif kind < 0.87:
            link.deliver()
        elif kind < 0.9:
            link.interrupt() if link.subscribed else link.resume()
        else:
            self.clock.advance(rng.choice((0.001, 0.5, STALENESS / 2, STALENESS - 0.001, 9)))


class Link(IndexedStorage[Any]):
    """The storage as one replica reaches it."""

    def __init__(self, world: World, replica: "Replica") -> None:
        self.world, self.replica = world, replica
        self.codec, self.ttl = world.storage.codec, TTL
        self.subscribed = True
        self.announcements: list[tuple[str, int, str]] = []
        self.applied: dict[Any, dict[str, int]] = {}  # the states after a call, by its task

    def listen(self, listener: StorageListener) -> Callable[[], None]:
        """See `AnnouncingStorage.listen`."""
        self.listener = listener
        listener.resumed()
        return lambda: None

    def deliver(self) -> None:
        """Deliver the oldest announcement, if there is one."""
        if self.announcements:
            digest, number, revision = self.announcements.pop(0)
            self.listener.changed(digest, revision)
            self.replica.raise_floor({digest: number})

    def interrupt(self) -> None:
        """Lose the announcements that were not delivered, and those to come."""
        self.subscribed = False
        self.announcements.clear()
        self.listener.interrupted()
        self.replica.raise_floor(self.world.latest())

    def resume(self) -> None:
        """Deliver announcements again."""
        self.subscribed = True
        self.listener.resumed()
        self.replica.raise_floor(self.world.latest())

    async def call(self, verb: Callable[[], Awaitable[T]]) -> T:
        """Apply a verb, late, and answer later."""
        await self.world.hold()
        try:
            return await verb()
        finally:
            self.applied[asyncio.current_task()] = self.world.latest()
            await self.world.hold()

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        """See `Storage.store`."""
        written = self.codec.decode(self.codec.encode(session))
        written.revision = session.revision

        async def store() -> None:
            await self.world.storage.store(written, when=when)
            self.world.written[written.revision] = written
            if when is When.UNCHANGED:
                before = self.world.written[self.world.states[written.digest][-2].revision]
                kept = written.data["count"] == before.data["count"] + 1
                self.world.check(kept, "lost update")

        await self.call(store)
        session.revision = written.revision

    async def load(self, id: str) -> Session[Any]:
        """See `Storage.load`."""

        async def load() -> Session[Any]:
            try:
                return await self.world.storage.load(id)
            except SessionNotFound:
                self.world.lapsed(session_digest(id))
                raise

        return await self.call(load)

    async def delete(self, id: str) -> bool:
        """See `Storage.delete`."""
        return await self.call(partial(self.world.storage.delete, id))

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        """See `IndexedStorage.revoke_all`."""
        return await self.call(partial(self.world.storage.revoke_all, principal, keep=keep))

    async def _unused(self, *_: object, **__: object) -> Any:
        raise NotImplementedError

    list = count = revoke = trim = delete_expired = _unused

    async def aclose(self) -> None:
        """See `Storage.aclose`."""


class Replica:
    """One cache, its calls and its floors."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.link = Link(world, self)
        self.calls: list[asyncio.Task[None]] = []
        self.floors = dict.fromkeys(map(session_digest, IDS), 0)
        self.seen: dict[str, Session[Any]] = {}  # the last one that was loaded, by id
        self.cache = NearCache[Any](self.link, max_staleness=STALENESS, clock=world.clock)

    def raise_floor(self, numbers: dict[str, int]) -> None:
        """No load that starts from now on may return an older state."""
        for digest, number in numbers.items():
            self.floors[digest] = max(self.floors[digest], number)

    def start(self, call: Callable[[], Awaitable[None]]) -> None:
        """Start a call in a task of its own."""
        self.calls = [each for each in self.calls if not each.done()]
        self.calls.append(asyncio.ensure_future(self.ended(call)))

    async def ended(self, call: Callable[[], Awaitable[None]]) -> None:
        """Make a call, which may fail for a good reason."""
        try:
            await call()
        except (StorageUnavailable, SessionConflict, SessionNotFound, SessionExists):
            pass
        finally:
            self.link.applied.pop(asyncio.current_task(), None)

    async def load(self, id: str) -> None:
        """Load a session, and judge the result."""
        world, digest = self.world, session_digest(id)
        started, states, floor = world.clock.time(), world.states[digest], self.floors[digest]
        replaced = [n for n, state in enumerate(states) if state.began <= started - STALENESS]
        try:
            session = await self.cache.load(id)
        except SessionNotFound:
            revision = ""
        else:
            revision = session.revision
        found = [n for n, state in enumerate(states) if state.revision == revision]
        dead = not revision and any(
            is_over(world.written[s.revision], world.clock) for s in states[floor:] if s.revision
        )
        world.check(dead or found[-1] >= floor, "older than the floor")
        world.check(dead or found[-1] >= max(replaced, default=0), "stale")
        if revision:
            written = world.written[revision]
            world.check(session == written, "not as written")
            world.check(not is_over(session, world.clock), "past its deadline")
            session.data["marks"].append(1)  # seen by others if they share it
            world.used_at[digest] = max(world.used_at[digest], started)
            self.seen[id] = session

    async def write(self, verb: Callable[[], Awaitable[Any]], ids: set[str]) -> None:
        """Write sessions through the cache, and raise their floors if it was applied."""
        try:
            await verb()
        finally:
            numbers = self.link.applied.get(asyncio.current_task())
            if numbers:
                self.raise_floor({each: numbers[each] for each in map(session_digest, ids)})

    async def create(self, id: str) -> None:
        """Create a session, with a deadline or without."""
        now, lifetime = self.world.clock.now(), self.world.rng.choice((None, None, 3, 30))
        session = Session[Any](id=id, principal="alice", data={"count": 0, "marks": []})
        session.created_at = session.updated_at = now
        session.expires_at = now + timedelta(seconds=lifetime) if lifetime else None
        await self.write(partial(self.cache.store, session, when=When.ABSENT), {id})

    async def save(self, id: str) -> None:
        """Add 1 to a session that was loaded before."""
        session = self.seen.pop(id, None)
        if session is not None:
            session.data["count"] += 1
            session.data["marks"].clear()
            await self.write(partial(self.cache.store, session, when=When.UNCHANGED), {id})

    async def delete(self, id: str) -> None:
        """Delete a session."""
        await self.write(partial(self.cache.delete, id), {id})

    async def revoke_all(self, keep: str | None) -> None:
        """Delete all sessions, or all but one."""
        cache: Any = self.cache
        await self.write(partial(cache.revoke_all, "alice", keep=keep), {*IDS} - {keep})
