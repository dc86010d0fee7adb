"""Sessions in Redis or Valkey.

Invariants:

- A load is one GETEX: it reads the record and renews its TTL in one round trip. A record that turns
  out to be dead is removed by a second command; one that is unreadable is not renewed again.
- No write is applied twice. After a lost connection, a compare-and-set is sent again, because it
  cannot succeed twice. Any other write is not: the storage looks for its revision on the server,
  which is there if only the reply was lost.
- If the revision is not there, because another client may have written or deleted the session
  since, the error says that the write is in doubt.
"""

import asyncio
import time
import warnings
from collections import OrderedDict
from datetime import datetime, timedelta
from typing import Final, Generic, cast

from redis.asyncio import Redis, RedisCluster

from ..codec import Codec, JsonCodec
from ..errors import CorruptSession, SessionError, SessionNotFound, StorageUnavailable
from ..record import HEADER_BYTES, NOT_FOUND, VERSION, seal, unseal
from ..session import D, E, Session, check_id
from ..storage import (
    Clock,
    Storage,
    When,
    check_codec,
    check_count,
    check_moment,
    check_when,
    milliseconds,
    whole_milliseconds,
)
from . import _commands as commands
from . import _scripts as scripts
from ._cluster import ClusterRouter
from ._driver import client_from_url
from ._routing import Router
from .health import RedisStatistics, ServerHealth, health

_MAX_UNREADABLE: Final = 1024


class RedisStorage(Storage[D], Generic[D]):
    """Sessions in Redis (6.2 or later) or Valkey, shared by all replicas that connect to it.

    Borrows any `redis.asyncio` client and leaves it open; `from_url` makes a storage that owns its
    client. Runs under asyncio, as the client does. Make one per process, and share it.

    Args:
        client: `Redis` or `RedisCluster`. Its settings are read, its connections are not used.
        ttl: The time that a session lives without being loaded or stored: seconds or a timedelta,
            with a resolution of one millisecond.
        key_prefix: The part of the key before the id. It ends with ":".
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
        self._clock = clock
        self._client, self._owns_client = client, False
        # Keys of records that could not be read: asking for them again must not renew them.
        self._unreadable: OrderedDict[bytes, None] = OrderedDict()
        self._router = _router(client, milliseconds(timeout, "timeout") / 1000, connections)

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
            ttl: See the class, as for the others.
            key_prefix: The part of the key before the id.
            codec: Encodes sessions.
            timeout: The longest time that any verb may take.
            connections: How many connections to share.
            clock: A source of time for tests.

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
        revision, expires_at, record = seal(session, self._codec)
        key = self._key_prefix + session.id.encode()
        if when is When.ALWAYS:
            command = self._set(deadline, key, record, expires_at)
        else:
            script = scripts.STORE_UNCHANGED if when is When.UNCHANGED else scripts.STORE
            expected = VERSION + session.revision.encode("ascii", "replace")
            words = (scripts.CONDITIONS[when], record, b"%d" % self._ttl, self._offset(), expected)
            command = script.fill(deadline, key, *words)
        try:
            reply = await self._router.call(command)
        except StorageUnavailable as error:
            if not error.in_doubt or not await self._is_in_place(key, revision, deadline):
                raise
        else:
            # The write may have been applied before, and overwritten or deleted since.
            if reply not in (b"OK", scripts.DONE):
                if command.in_doubt:
                    text = "a reply was lost; the write may have been applied"
                    raise StorageUnavailable(text, in_doubt=True)
                raise scripts.refusal(reply)
        session.revision = revision
        if self._unreadable:
            self._unreadable.pop(key, None)

    async def load(self, id: str) -> Session[D]:
        """See `Storage.load`."""
        deadline = self._router.deadline()
        check_id(id)
        key = self._key_prefix + id.encode()
        if self._unreadable and key in self._unreadable:
            await self._peek(deadline, key, id)
        while True:
            record = await self._router.call(self._getex.fill(deadline, key))
            if record is None:
                raise SessionNotFound(NOT_FOUND)
            try:
                return unseal(record, id, self._codec, self._now)
            except SessionNotFound:
                status = await self._bury(deadline, key, record)
            except CorruptSession:
                self._unreadable[key] = None
                if len(self._unreadable) > _MAX_UNREADABLE:
                    self._unreadable.popitem(last=False)
                raise
            if status == scripts.DONE:  # alive, by the server's clock
                return unseal(record, id, self._codec, now=lambda: 0)
            if status == scripts.ABSENT:
                raise SessionNotFound(NOT_FOUND)
            if status != scripts.CHANGED:
                raise scripts.unfit(in_doubt=False)

    async def delete(self, id: str) -> bool:
        """See `Storage.delete`.

        Raises:
            StorageUnavailable: Also when the reply was lost. Deleting again is safe.
        """
        deadline = self._router.deadline()
        check_id(id)
        key = self._key_prefix + id.encode()
        reply = await self._router.call(scripts.DELETE.fill(deadline, key, self._offset()))
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

    def _set(self, deadline: float, key: bytes, record: bytes, expires_at: int) -> commands.Command:
        """A write without a condition; the key ends with the TTL or at the session's deadline."""
        if expires_at - self._now() > self._ttl:
            return commands.SET.fill(deadline, key, record, b"%d" % self._ttl)
        # In the server's time: a wrong clock here must not end a live session. The past removes it.
        moment = max(1, (expires_at * 1000 - int(self._offset())) // 1000)
        return commands.SET_UNTIL.fill(deadline, key, record, b"%d" % moment)

    async def _is_in_place(self, key: bytes, revision: str, deadline: float) -> bool:
        """Whether a write without a reply has been applied, as far as its revision tells."""
        if asyncio.get_running_loop().time() >= deadline:
            return False
        try:
            found = await self._router.call(commands.REVISION.fill(deadline, key))
        except SessionError:
            return False
        return bool(found == revision.encode())

    async def _bury(self, deadline: float, key: bytes, record: bytes) -> int:
        """Remove a record past its deadline, which GETEX has renewed; return a script's status."""
        header = record[:HEADER_BYTES]
        return int(
            await self._router.call(scripts.BURY.fill(deadline, key, header, self._offset()))
        )

    async def _peek(self, deadline: float, key: bytes, id: str) -> None:
        """Read a record that was unreadable, without renewing it.

        Raises:
            SessionNotFound: It is gone.
            CorruptSession: It is still unreadable.
        """
        record = await self._router.call(commands.PEEK.fill(deadline, key))
        if record is not None:
            unseal(record, id, self._codec, now=lambda: 0)
        self._unreadable.pop(key, None)
        if record is None:
            raise SessionNotFound(NOT_FOUND)

    def _now(self) -> int:
        return whole_milliseconds(self._clock.time())

    def _offset(self) -> bytes:
        """Microseconds by which the clock of a test is ahead of the system's; 0 otherwise."""
        if self._clock is time:
            return b"0"
        return b"%d" % round((self._clock.time() - time.time()) * 1_000_000)


def _router(client: "Redis | RedisCluster", timeout: float, connections: int) -> Router:
    if isinstance(client, RedisCluster):
        return ClusterRouter(client, timeout, connections)
    if isinstance(client, Redis):
        return Router(client, timeout, connections)
    message = f"client is a redis.asyncio.Redis or RedisCluster, not {type(client).__name__}"
    raise TypeError(message)
