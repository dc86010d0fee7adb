"""Storages with one mistake each, in closing, between replicas, or with replies."""
# ruff: noqa: D102 - each class explains its methods

import asyncio
import socket
from collections import deque
from typing import Any

from anyio.lowlevel import checkpoint

from aiosessions import CorruptSession, Session, When
from aiosessions.record import unseal
from tests.contract.broken_storages import Broken
from tests.support.storages import Backend, Entry


class NeverCloses(
    Broken,
    found_by="""
        closed_storage_refuses_every_verb
        unused_storage_can_be_closed
        leaving_the_context_closes
    """,
):
    """`aclose` does nothing."""

    async def aclose(self) -> None:
        """Do nothing."""


class ClosesOnce(Broken, found_by="closing_twice_is_fine"):
    """A second `aclose` raises."""

    async def aclose(self) -> None:
        self.check_open()
        await super().aclose()


class ClosingBreaksLoads(Broken, found_by="closing_ends_verbs_in_flight"):
    """A load in flight takes the end of its connection for an unreadable record."""

    async def load(self, id: str) -> Session[Any]:
        await checkpoint()
        await checkpoint()
        if self.is_closed:
            raise CorruptSession
        return await super().load(id)


class LeavesATaskBehind(Broken, found_by="closing_leaves_no_task_behind"):
    """A task outlives the storage."""

    sweeper: asyncio.Future[None] | None = None

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        await super().store(session, when=when)
        self.sweeper = self.sweeper or asyncio.ensure_future(asyncio.sleep(3600))


class LeaksItsConnection(Broken, found_by="closing_during_verbs_leaks_nothing"):
    """A connection stays open."""

    connection: socket.socket

    async def load(self, id: str) -> Session[Any]:
        self.connection = socket.socket()
        return await super().load(id)


class CachesForEver(Broken, found_by="replicas_see_each_others_writes"):
    """A cache of records that the writes of other replicas do not reach."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cache: dict[str, bytes] = {}

    def write(self, id: str, entry: Entry, when: When) -> None:
        super().write(id, entry, when)
        self.cache[id] = entry.record

    def unseal(self, entry: Entry, id: str) -> Session[Any]:
        record = self.cache.setdefault(id, entry.record)
        return unseal(record, id, self.codec, now=lambda: 0)


class SeesOnlyItsOwnSessions(
    Broken, found_by="replicas_see_each_others_deletes closing_one_replica_leaves_the_others"
):
    """Each replica has its own backend."""

    def __init__(self, backend: Backend, *args: Any) -> None:
        super().__init__(Backend(is_down=backend.is_down), *args)


class RepliesGetOutOfStep(
    Broken,
    found_by="cancelled_verb_mixes_up_no_replies cancelling_a_caller_cancels_that_caller_only",
):
    """A caller takes the next reply, also after an earlier caller was cancelled."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.replies: deque[str] = deque()

    async def load(self, id: str) -> Session[Any]:
        self.check_open()
        self.check_id(id)
        self.replies.append(id)
        await checkpoint()
        return await super().load(self.next_reply())

    def next_reply(self) -> str:
        """Return the oldest reply."""
        return self.replies.popleft()


class RepliesComeBackwards(
    RepliesGetOutOfStep, found_by="concurrent_callers_get_their_own_sessions"
):
    """A caller takes the newest reply."""

    def next_reply(self) -> str:
        return self.replies.pop()
