"""A client of the storage under test: it connects, and records and judges each of its calls.

It judges everything that one call shows by itself: the type of an error, its message and its cause,
the deadline, and the identity of a loaded session. The checker judges the whole history.
"""

import asyncio
import builtins
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider

from aiosessions import (
    IndexedStorage,
    NearCache,
    RedisStorage,
    Session,
    SessionError,
    SessionInfo,
    StorageUnavailable,
    When,
    session_digest,
)
from aiosessions.errors import InvalidSession, StorageClosed, StorageMisused
from aiosessions.record import ROTATED_KEY
from tests.support.secrets import said_by
from tests.support.topologies import SENTINEL_NAME

from .history import DELETE, LIST, LOAD, REVOKE_ALL, Event, secret_of

USER = "app"
"""The name of the user with a password file."""

# Seconds that a busy machine may add to a timeout, apart from the measured delays of the loop.
_SLACK = 0.1
_MEASURE_EVERY = 0.01
_MAX_TOKENS = 1_000
# The storage itself gives these reasons, so there is nothing to chain.
_WITHOUT_CAUSE = re.compile(r"a reply was lost|no node of the cluster")


class Endpoint(msgspec.Struct, omit_defaults=True):
    """The address of the storage; one of the first three fields is set."""

    url: str = ""
    sentinels: list[int] = []  # ports
    nodes: list[int] = []  # ports of a cluster
    password_file: str = ""  # of `USER`, with a URL


class _PasswordFile(CredentialProvider):
    """Reads the password for each connection, as from a mounted secret."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def get_credentials(self) -> tuple[str, str]:
        return USER, self._path.read_text("utf-8")

    async def get_credentials_async(self) -> tuple[str, str]:
        return self.get_credentials()


@asynccontextmanager
async def open_storage(endpoint: Endpoint, **settings: Any) -> AsyncIterator[RedisStorage[Any]]:
    """Open the storage under test."""
    async with AsyncExitStack() as stack:
        client: Any
        if endpoint.nodes:
            client = RedisCluster(host="127.0.0.1", port=endpoint.nodes[0])
            stack.push_async_callback(client.aclose)
        elif endpoint.sentinels:
            addresses = [("127.0.0.1", port) for port in endpoint.sentinels]
            patience = {"socket_timeout": 0.3, "socket_connect_timeout": 0.3}
            options = {**patience, "retry": Retry(NoBackoff(), 0)}
            sentinel: Any = Sentinel(addresses, sentinel_kwargs=options)  # type: ignore[no-untyped-call]
            await stack.enter_async_context(sentinel)
            client = await stack.enter_async_context(sentinel.master_for(SENTINEL_NAME))
        elif endpoint.password_file:
            provider = _PasswordFile(endpoint.password_file)
            client = Redis.from_url(endpoint.url, credential_provider=provider)
            await stack.enter_async_context(client)
        else:
            owner = RedisStorage[Any].from_url(endpoint.url, **settings)
            yield await stack.enter_async_context(owner)
            return
        yield await stack.enter_async_context(RedisStorage[Any](client, **settings))


class LoopLag:
    """Measures for how long an event loop was blocked. A verb cannot end during this time."""

    def __init__(self) -> None:
        self._past = 0.0
        self._due = time.monotonic()

    async def measure(self) -> None:
        """Measure until cancelled."""
        while True:
            self._due = time.monotonic() + _MEASURE_EVERY
            await asyncio.sleep(_MEASURE_EVERY)
            now = time.monotonic()
            if now - self._due > _MEASURE_EVERY:
                self._past += now - self._due

    def total(self) -> float:
        """Seconds for which the loop has been blocked so far."""
        return self._past + max(0.0, time.monotonic() - self._due)


@dataclass
class RecordingStorage(IndexedStorage[Any]):
    """The storage of one client of the load."""

    storage: IndexedStorage[Any]  # under test
    record: Callable[[Event], None]
    number: int  # of the client, unique over all processes
    timeout: float  # of the storage
    lag: LoopLag
    secrets: Sequence[str] = ()  # that no error may contain, in addition to those of the session
    writes: int = 0
    token_of: dict[str, str] = field(default_factory=dict)  # by revision

    async def store(self, session: Session[Any], *, when: When = When.ALWAYS) -> None:
        """Store the session with a new token in its data."""
        data, revision = session.data, session.revision
        self.writes += 1
        data["token"] = f"{self.number}.{self.writes}"
        event = self._event(when.value, session.id)
        event.token, event.count = data["token"], data["count"]
        event.principal, event.origin = session.principal or "", data.get("origin", "")
        event.marked = ROTATED_KEY in session.metadata
        if when is When.UNCHANGED:
            event.before = self.token_of.get(revision, "?")
        try:
            await self._recorded(event, self.storage.store(session, when=when))
        except SessionError:
            if session.revision != revision:
                event.flaws.append("a write that failed has changed the session")
            raise
        self._remember(session)

    async def load(self, id: str) -> Session[Any]:
        """Load a session and check its identity."""
        session: Session[Any] = await self._recorded(self._event(LOAD, id), self.storage.load(id))
        return session

    async def delete(self, id: str) -> bool:
        """Delete a session."""
        existed: bool = await self._recorded(self._event(DELETE, id), self.storage.delete(id))
        return existed

    async def list(self, principal: str) -> builtins.list[SessionInfo[Any]]:
        """List the sessions of a principal."""
        event = self._event(LIST, "")
        event.principal = principal
        infos: list[SessionInfo[Any]] = await self._recorded(event, self.storage.list(principal))
        return infos

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        """Delete the sessions of a principal."""
        event = self._event(REVOKE_ALL, "")
        event.principal = principal
        event.digests = [] if keep is None else [session_digest(keep)]
        revoking = self.storage.revoke_all(principal, keep=keep)
        revoked: int = await self._recorded(event, revoking)
        return revoked

    async def count(self, principal: str) -> int:
        """Pass the call on, as for the other calls that the load does not make."""
        return await self.storage.count(principal)

    async def revoke(self, principal: str, digest: str) -> bool:
        """Pass the call on."""
        return await self.storage.revoke(principal, digest)

    async def trim(self, principal: str, most: int, *, keep: str) -> int:
        """Pass the call on."""
        return await self.storage.trim(principal, most, keep=keep)

    async def delete_expired(self, before: datetime | None = None) -> int:
        """Pass the call on."""
        return await self.storage.delete_expired(before)

    async def aclose(self) -> None:
        """Leave the storage open, because the clients of a process share it."""

    def _event(self, verb: str, id: str) -> Event:
        event = Event(verb=verb, id=id, client=self.number, start=time.monotonic(), end=0.0)
        if verb == LOAD and isinstance(self.storage, NearCache):
            event.staleness = self.storage.max_staleness
            event.announced = self.storage.statistics().announced
        return event

    async def _recorded(self, event: Event, verb: Awaitable[Any]) -> Any:
        blocked = self.lag.total()
        try:
            result = await verb
        except Exception as error:
            event.outcome, event.message = type(error).__name__, str(error)
            self._judge_error(event, error)
            self._end(event, blocked)
            raise
        if isinstance(result, Session):
            self._judge_session(event, result)
        elif event.verb == LIST:
            event.digests = [info.digest for info in result]
            if any(info.principal != event.principal for info in result):
                event.flaws.append("a session of another principal")
        elif event.verb == DELETE:
            event.existed = result
        self._end(event, blocked)
        return result

    def _end(self, event: Event, blocked: float) -> None:
        event.end = time.monotonic()
        if event.announced and isinstance(self.storage, NearCache):
            event.announced = self.storage.statistics().announced
        took = event.end - event.start - (self.lag.total() - blocked)
        event.late = round(max(0.0, took - self.timeout), 3)
        if event.late > _SLACK:
            event.flaws.append("late")
        self.record(event)

    def _judge_session(self, event: Event, session: Session[Any]) -> None:
        event.token, event.count = session.data["token"], session.data["count"]
        event.principal, event.marked = session.principal or "", ROTATED_KEY in session.metadata
        if session.id != event.id or session.data["secret"] != secret_of(event.id):
            event.flaws.append("a session of another client")
        self._remember(session)

    def _judge_error(self, event: Event, error: Exception) -> None:
        unexpected = InvalidSession | StorageClosed | StorageMisused
        if not isinstance(error, SessionError) or isinstance(error, unexpected):
            event.flaws.append(f"an unexpected error, {type(error).__name__}")
        if isinstance(error, StorageUnavailable):
            event.in_doubt = error.in_doubt
            if error.in_doubt and event.verb in (LOAD, LIST):
                event.flaws.append("a read in doubt")
            cause = error.__cause__
            if cause is None and not _WITHOUT_CAUSE.match(event.message):
                event.flaws.append("an error without a cause")
            if cause is not None and cause.__traceback__ is not None:
                event.flaws.append("a cause with a traceback")
        text = said_by(error)
        ours = [event.id, secret_of(event.id)] if event.id else [event.principal]
        if any(each in text for each in (*ours, *self.secrets)):
            event.flaws.append("an error with a secret")

    def _remember(self, session: Session[Any]) -> None:
        self.token_of[session.revision] = session.data["token"]
        if len(self.token_of) > _MAX_TOKENS:
            del self.token_of[next(iter(self.token_of))]
