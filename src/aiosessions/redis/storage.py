"""Sessions in Redis or Valkey.

Invariants:

- A load is one GETEX: it reads the record and renews its TTL in one round trip. A record that turns
  out to be dead is removed by a second command; one that is unreadable is not renewed again. At
  most once per TTL, the load of a principal's session also extends its lease (_index.py).
- No command holds a session id: the server sees its digest.
"""

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final, Generic, cast

from redis.asyncio import Redis, RedisCluster

from ..codec import Codec, JsonCodec
from ..errors import CorruptSession, SessionError, SessionNotFound
from ..record import NOT_FOUND, PLAIN, read, seal
from ..session import D, E, Session, SessionInfo, session_digest
from ..storage import (
    Clock,
    IndexedStorage,
    StorageListener,
    When,
    check_codec,
    check_count,
    check_digest,
    check_moment,
    check_principal,
    check_when,
    milliseconds,
)
from . import _commands as commands
from . import _scripts as scripts
from ._cluster import ClusterRouter
from ._driver import client_from_url
from ._index import Index
from ._routing import Router
from ._time import ServerTime
from ._writing import Writer
from .health import RedisStatistics, ServerHealth, health

_MAX_UNREADABLE: Final = 1024


class RedisStorage(IndexedStorage[D], Generic[D]):
    """Sessions in Redis (6.2 or later) or Valkey, shared by all replicas that connect to it.

    Borrows any `redis.asyncio` client and leaves it open; `from_url` makes a storage that owns its
    client. Runs under asyncio, as the client does. Make one per process, and share it.

    Args:
        client: `Redis` or `RedisCluster`. Its settings are read, its connections are not used.
        ttl: The time that a session lives without being loaded or stored: seconds or a timedelta,
            with a resolution of one millisecond.
        key_prefix: The part of the key before the digest of the id. It ends with ":".
        codec: Encodes sessions.
        timeout: The longest time that any verb may take: seconds or a timedelta.
        connections: How many connections to share per server. More than one keeps small loads fast
            beside large records.
        clock: A source of time for tests: `expires_at` is compared with it.

    Raises:
        ValueError: `ttl`, `timeout` or `connections` is not positive, or `key_prefix` does not end
            with ":".
        TypeError: An argument has another type.
    """

    def __init__(
        self,
        client: "Redis | RedisCluster",
        *,
        ttl: float | timedelta,
        key_prefix: str = "session:",
        codec: Codec[D] = JsonCodec(),  # noqa: B008 - it has no state
        timeout: float | timedelta = 5.0,
        connections: int = 1,
        clock: Clock = time,
    ) -> None:
        if not isinstance(key_prefix, str):
            message = f"key_prefix is a str, not {type(key_prefix).__name__}"
            raise TypeError(message)
        if not key_prefix.endswith(":"):
            message = f"key_prefix must end with ':', and {key_prefix!r} does not"
            raise ValueError(message)
        check_count(connections, "connections")
        check_codec(codec)
        self._ttl = milliseconds(ttl, "ttl")
        self._getex = commands.getex(self._ttl)
        self._key_prefix = key_prefix.encode()
        self._codec = codec
        self._time = ServerTime(clock)
        self._client, self._owns_client = client, False
        # Keys of records that could not be read: asking for them again must not renew them.
        self._unreadable: OrderedDict[bytes, None] = OrderedDict()
        wait = milliseconds(timeout, "timeout")
        channel = self._key_prefix + b"changes"
        self._router = _router(client, wait / 1000, connections, channel)
        self._index = Index(
            self._router,
            key_prefix=self._key_prefix,
            ttl=self._ttl,
            codec=codec,
            time=self._time,
            window=2 * wait if isinstance(client, RedisCluster) else 0,
        )
        self._writer = Writer(self._router, self._index, ttl=self._ttl, time=self._time)

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        ttl: float | timedelta,
        key_prefix: str = "session:",
        codec: Codec[E] = JsonCodec(),  # noqa: B008 - it has no state
        timeout: float | timedelta = 5.0,
        connections: int = 1,
        clock: Clock = time,
    ) -> "RedisStorage[E]":
        """Make a storage that owns its client: `aclose` closes it. Nothing connects yet.

        Args:
            url: `redis://[user:password@]host[:port][/db]` or `valkey://...`; `rediss://` or
                `valkeys://` for TLS; or `unix://[user:password@]/path[?db=n]`. A query may hold
                options of redis-py's connections.
            ttl: As for the class.
            key_prefix: As for the class.
            codec: As for the class.
            timeout: As for the class.
            connections: As for the class.
            clock: As for the class.

        Raises:
            ValueError: As for the class, or a part of the URL is wrong.
            TypeError: As for the class.
        """
        storage = cast("type[RedisStorage[E]]", cls)(
            client_from_url(url),
            ttl=ttl,
            key_prefix=key_prefix,
            codec=codec,
            timeout=timeout,
            connections=connections,
            clock=clock,
        )
        storage._owns_client = True  # noqa: SLF001 - our own
        return storage

    def __repr__(self) -> str:
        return f"RedisStorage(ttl={self.ttl}, key_prefix={self._key_prefix.decode()!r})"

    def __del__(self) -> None:
        router = getattr(self, "_router", None)
        if router is not None and router.in_use:
            message = f"{self!r} was not closed: use `async with`, or `await storage.aclose()`"
            warnings.warn(message, ResourceWarning, source=self, stacklevel=2)
            router.abandon()

    @property
    def codec(self) -> Codec[D]:
        """The codec of the sessions."""
        return self._codec

    @property
    def ttl(self) -> float:
        """The TTL in seconds."""
        return self._ttl / 1000

    def statistics(self) -> RedisStatistics:
        """Count connections, commands and bytes."""
        return self._router.statistics()

    async def store(self, session: Session[D], *, when: When = When.ALWAYS) -> None:
        """See `Storage.store`."""
        deadline = self._router.deadline()
        check_when(when)
        revision, _, record = seal(session, self._codec)
        key = self._key_prefix + session.digest.encode()
        await self._writer.write(deadline, key, record, session.revision, when)
        session.revision = revision
        if self._unreadable:
            self._unreadable.pop(key, None)

    async def load(self, id: str) -> Session[D]:
        """See `Storage.load`."""
        deadline = self._router.deadline()
        digest = session_digest(id)
        key = self._key_prefix + digest.encode()
        if self._unreadable and key in self._unreadable:
            await self._peek(deadline, key, digest)
        while True:
            record = await self._router.call(self._getex.fill(deadline, key))
            if record is None:
                raise SessionNotFound(NOT_FOUND)
            try:
                session = read(record, digest, self._codec, self._time.now)
            except SessionNotFound:
                if not await self._bury(deadline, key, record):
                    continue
                session = read(record, digest, self._codec, now=lambda: 0)
            except CorruptSession:
                record = None  # error trackers record the locals of this frame
                self._unreadable[key] = None
                if len(self._unreadable) > _MAX_UNREADABLE:
                    self._unreadable.popitem(last=False)
                raise
            break
        if record[:1] != PLAIN and self._index.needs_renewal(record):
            await self._index.renew(deadline, key, record)
        session.id = id
        return session

    async def delete(self, id: str) -> bool:
        """See `Storage.delete`.

        Raises:
            StorageUnavailable: Also when the reply was lost. Deleting again is safe.
        """
        deadline = self._router.deadline()
        key = self._key_prefix + session_digest(id).encode()
        words = self._time.offset(), b"%d" % self._index.on_one_server
        reply = await self._router.call(scripts.DELETE.fill(deadline, key, *words))
        if reply not in (scripts.ABSENT, scripts.DONE):
            raise scripts.unfit(in_doubt=True)
        self._unreadable.pop(key, None)
        return bool(reply)

    async def delete_expired(self, before: datetime | None = None) -> int:
        """Return 0 without asking the server, which expires sessions by itself."""
        self._router.deadline()
        if before is not None:
            check_moment(before, "before")
        return 0

    def listen(self, listener: StorageListener) -> Callable[[], None]:
        """See `AnnouncingStorage.listen`. The first verb after this subscribes to the server.

        Writes and deletes through any `RedisStorage` with the same key prefix are announced, in
        the round trip of the write. A listener hears `interrupted` when the subscription is lost,
        the server does not answer for a `timeout`, or the connection for commands is made anew.
        """
        return self._router.listen(listener)

    async def list(self, principal: str) -> list[SessionInfo[D]]:
        """See `IndexedStorage.list`."""
        deadline = self._router.deadline()
        check_principal(principal)
        return await self._index.infos(deadline, principal)

    async def count(self, principal: str) -> int:
        """See `IndexedStorage.count`."""
        deadline = self._router.deadline()
        check_principal(principal)
        return await self._index.count(deadline, principal)

    async def revoke(self, principal: str, digest: str) -> bool:
        """See `IndexedStorage.revoke`.

        Raises:
            StorageUnavailable: Also when the reply was lost. Revoking again is safe.
        """
        deadline = self._router.deadline()
        check_principal(principal)
        return check_digest(digest) and await self._index.revoke(deadline, principal, digest)

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        """See `IndexedStorage.revoke_all`.

        Raises:
            StorageUnavailable: Also when a reply was lost. Revoking again is safe.
        """
        deadline = self._router.deadline()
        check_principal(principal)
        kept = b"" if keep is None else session_digest(keep).encode()
        return await self._index.revoke_all(deadline, principal, kept)

    async def trim(self, principal: str, most: int, *, keep: str) -> int:
        """See `IndexedStorage.trim`."""
        deadline = self._router.deadline()
        check_principal(principal)
        check_count(most, "most")
        return await self._index.trim(deadline, principal, most, session_digest(keep).encode())

    async def ping(self) -> tuple[ServerHealth, ...]:
        """Ask every server that has sessions for its health: a readiness check.

        Returns:
            The health of each master of a cluster, or of the one server. A master that does not
            answer is not `available`; `warnings` name the dangers to sessions on the others.

        Raises:
            StorageUnavailable: No server can be reached, or the user may not run INFO.
            StorageClosed: The storage is closed.
        """
        answers = await self._router.call_each(commands.INFO, self._router.deadline())
        errors = [reply for reply, _ in answers.values() if isinstance(reply, SessionError)]
        if len(errors) == len(answers):
            raise errors[0]
        return tuple(health(address, *answer) for address, answer in answers.items())

    async def aclose(self) -> None:
        """See `Storage.aclose`. Closes the client if `from_url` made it, and no borrowed one.

        Waiting callers get `StorageClosed`.

        Raises:
            StorageMisused: The storage is in use by another event loop.
        """
        if await self._router.aclose() and self._owns_client:
            await self._client.aclose()

    async def _bury(self, deadline: float, key: bytes, record: bytes) -> bool:
        """Remove a record that seems to be past its deadline, and that GETEX has renewed.

        Returns:
            True if the record is alive by the clock of the server; False if there is another one.

        Raises:
            SessionNotFound: The record is gone.
        """
        words = record[:32], self._time.offset()
        status = await self._router.call(scripts.BURY.fill(deadline, key, *words))
        if status == scripts.ABSENT:
            raise SessionNotFound(NOT_FOUND)
        if status not in (scripts.DONE, scripts.CHANGED):
            raise scripts.unfit(in_doubt=False)
        return bool(status == scripts.DONE)

    async def _peek(self, deadline: float, key: bytes, digest: str) -> None:
        """Read a record that was unreadable, without renewing it.

        Raises:
            SessionNotFound: It is gone.
            CorruptSession: It is still unreadable.
        """
        record = await self._router.call(commands.PEEK.fill(deadline, key))
        if record is not None:
            read(record, digest, self._codec, now=lambda: 0)
        self._unreadable.pop(key, None)
        if record is None:
            raise SessionNotFound(NOT_FOUND)


def _router(
    client: "Redis | RedisCluster", timeout: float, connections: int, channel: bytes
) -> Router:
    if isinstance(client, RedisCluster):
        return ClusterRouter(client, timeout, connections, channel)
    if isinstance(client, Redis):
        return Router(client, timeout, connections, channel)
    message = f"client is a redis.asyncio.Redis or RedisCluster, not {type(client).__name__}"
    raise TypeError(message)
