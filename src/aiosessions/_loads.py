"""Loads from the storage of a near cache, which callers share.

Invariants:

- A load belongs to no caller, so cancelling one caller fails no other.
- A caller joins a load only if no change of its session was noted since the load began, and if the
  load began less than `max_staleness` ago.
- A load leaves a copy only if no later load of its session has begun.
- Callers share neither a session nor an error: each `raise` adds the frames of one caller.
"""

import copy
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Generic

from ._background import BackgroundTask, spawn
from ._copies import Copies, Copy, Pending
from .errors import CorruptSession, SessionError, SessionNotFound, StorageUnavailable
from .session import D, Session


class SharedLoad(Generic[D]):
    """A load, which any number of callers await.

    Attributes:
        pending: The load, for the copies.
        task: Its task.
        session: The session, once it is loaded. No caller gets this object.
        copy: The same, if it can be encoded.
        error: The error of the load, if it has failed.
    """

    task: BackgroundTask
    session: Session[D] | None = None
    copy: Copy | None = None

    def __init__(self, pending: Pending) -> None:
        self.pending = pending
        self.error: Exception = StorageUnavailable("the load was cancelled")

    def error_of_caller(self) -> Exception:
        """A copy of the error, for one caller."""
        error = self.error
        try:
            own = copy.copy(error)
        except Exception:  # noqa: BLE001 - errors of applications raise anything
            return error
        own.__cause__, own.__context__ = error.__cause__, error.__context__
        own.__suppress_context__ = error.__suppress_context__
        return own.with_traceback(error.__traceback__)


class Loads(Generic[D]):
    """The loads of one cache.

    Args:
        load: Loads a session from the storage.
        encode: Makes a copy of a session.
        copies: The copies of the cache.
        longest: The age from which a load is no longer joined, in milliseconds.
    """

    def __init__(
        self,
        load: Callable[[str], Awaitable[Session[D]]],
        encode: Callable[[Session[D]], Copy],
        copies: Copies,
        longest: int,
    ) -> None:
        self._load = load
        self._encode = encode
        self._copies = copies
        self._longest = longest
        self._latest: dict[str, SharedLoad[D]] = {}  # by digest
        self._all: set[SharedLoad[D]] = set()

    def join(self, id: str, digest: str) -> SharedLoad[D]:
        """Return a load that has not ended, or a new one."""
        load = self._latest.get(digest)
        if load is not None and self._can_join(load):
            self._copies.coalesced += 1
            return load
        self._copies.misses += 1
        load = self._latest[digest] = SharedLoad[D](self._copies.begin(digest))
        self._all.add(load)
        run, end = partial(self._run, load, id, digest), partial(self._end, load, digest)
        try:
            load.task = spawn(run, "aiosessions: load", end)
        except BaseException:
            end()
            raise
        return load

    def cancel(self) -> list[BackgroundTask]:
        """Cancel all loads, and return their tasks."""
        tasks = [load.task for load in self._all]
        for task in tasks:
            task.cancel()
        return tasks

    def _can_join(self, load: SharedLoad[D]) -> bool:
        age = self._copies.now() - load.pending.began
        return not load.pending.noted and age < self._longest and load.task.is_here()

    async def _run(self, load: SharedLoad[D], id: str, digest: str) -> None:
        """Load a session for all that wait for it, and keep a copy."""
        try:
            load.session = await self._load(id)
            with suppress(SessionError):  # then no copy stays
                load.copy = self._encode(load.session)
                if self._latest.get(digest) is load:
                    self._copies.keep(load.copy, load.pending)
        except Exception as error:  # noqa: BLE001 - storages of applications raise anything
            if isinstance(error, SessionNotFound | CorruptSession):
                self._copies.drop(digest)
            # Without this frame, which refers to the load.
            frames = error.__traceback__ and error.__traceback__.tb_next
            load.error = error.with_traceback(frames)

    def _end(self, load: SharedLoad[D], digest: str) -> None:
        self._all.discard(load)
        self._copies.end(digest, load.pending)
        if self._latest.get(digest) is load:
            del self._latest[digest]
