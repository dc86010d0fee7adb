"""Sessions in Redis or Valkey.

Invariants:

- A load is one GETEX: it reads the record and renews its TTL in one round trip.
- No write is applied twice. When a connection is lost, a compare-and-set is sent again, as it can
  succeed only once. Any other write is not: it looks on the server for its own revision, which is
  there if only the reply was lost.
- When that does not tell, since someone else may have written or deleted the session meanwhile,
  the outcome is unknown, and said to be.
"""

import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Generic, cast

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import NoScriptError

from ..codec import Codec, JsonCodec
from ..errors import (
    CorruptSession,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionNotFound,
    StorageClosed,
    StorageUnavailable,
)
from ..record import CHANGED, EXISTS, NOT_FOUND, VERSION, seal, unseal
from ..session import D, Session, as_utc, check_id
from ..storage import Clock, Storage, When, check_when, milliseconds
from . import scripts
from .cluster import Cluster
from .connect import client_from_url, maker
from .faults import translated
from .health import ServerHealth, health_from_info
from .home import Home
from .server import Server, SingleServer
from .wire import command, filled

if TYPE_CHECKING:  # as for D; `from_url` is called on the bare class, which has no D yet
    from typing_extensions import TypeVar

    E = TypeVar("E", default=Any)
else:
    from typing import TypeVar

    E = TypeVar("E")


class RedisStorage(Storage[D], Generic[D]):
    """Sessions in Redis (6.2 or later) or Valkey, shared by every replica that connects to it.

    Borrows any `redis.asyncio` client, and leaves it open; `from_url` makes a storage that owns its
    client. asyncio only, as that client is.

    Args:
        client: `Redis` or `RedisCluster`.
        ttl: How long a session lives without being loaded or stored: seconds or a timedelta, to the
            millisecond.
        key_prefix: What goes in front of the id to make the key. Ends with ":".
        codec: How sessions are encoded.
        timeout: The longest that any verb may take: seconds or a timedelta.
        clock: Where the time comes from that `expires_at` is held against.

    Raises:
        ValueError: `ttl` or `timeout` is not positive, or `key_prefix` does not end with ":".
        TypeError: An argument is of another type.
    """

    def __init__(
        self,
        client: "Redis | RedisCluster",
        *,
        ttl: float | timedelta,
        key_prefix: str = "session:",
        codec: Codec[D] = JsonCodec(),  # noqa: B008 - it has no state
        timeout: float | timedelta = 5.0,
        clock: Clock = time,
    ) -> None:
        if not isinstance(key_prefix, str):
            message = f"key_prefix is a str, not {type(key_prefix).__name__}"
            raise TypeError(message)
        if not key_prefix.endswith(":"):
            message = f"key_prefix must end with ':', and {key_prefix!r} does not"
            raise ValueError(message)
        self._ttl = milliseconds(ttl, "ttl")
        self._getex = command(b"GETEX", None, b"PX", b"%d" % self._ttl)
        self._key_prefix = key_prefix.encode()
        self._codec = codec
        self._clock = clock
        self._client = client
        self._owns_client = False
        self._timeout = milliseconds(timeout, "timeout") / 1000
        self._server = _server_of(client, self._timeout)
        self._home = Home()
        self._closed = False

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        ttl: float | timedelta,
        key_prefix: str = "session:",
        codec: Codec[E] = JsonCodec(),  # noqa: B008 - it has no state
        timeout: float | timedelta = 5.0,
        clock: Clock = time,
    ) -> "RedisStorage[E]":
        """A storage with a client of its own, which `aclose` closes. Nothing connects yet.

        Args:
            url: `redis://[user:password@]host[:port][/db]` or `valkey://...`, `rediss://` or
                `valkeys://` for TLS, or
                `unix://[user:password@]/path[?db=n]`. Options of redis-py's connections can follow
                as a query.
            ttl: As for the class; so are the rest.
            key_prefix: As for the class.
            codec: As for the class.
            timeout: As for the class.
            clock: As for the class.

        Raises:
            ValueError: As for the class, or the URL is not understood.
        """
        client = client_from_url(url)
        storage = cast("type[RedisStorage[E]]", cls)(
            client, ttl=ttl, key_prefix=key_prefix, codec=codec, timeout=timeout, clock=clock
        )
        storage._owns_client = True  # noqa: SLF001 - it is our own
        return storage

    def __repr__(self) -> str:
        return f"RedisStorage(ttl={self._ttl / 1000}, key_prefix={self._key_prefix.decode()!r})"

    async def store(self, session: Session[D], *, when: When = When.ALWAYS) -> None:
        """See `Storage.store`."""
        deadline = self._begin()
        check_when(when)
        revision, expires_at, record = seal(session, self._codec)
        key = self._key(session.id)
        now = self._time()
        ttl = max(1, min(self._ttl, expires_at - now))
        if when is When.ALWAYS:
            payload = filled(_SET, key, record, b"%d" % ttl)
            reply, unsure = await self._server.call(key, payload, _STRING, deadline)
            applied = reply == b"OK"
        else:
            expected = VERSION + session.revision.encode("ascii", "replace")
            words = (_CONDITIONS[when], record, b"%d" % ttl, b"%015d" % now, expected)
            repeatable = when is When.UNCHANGED
            reply, unsure = await self._run(deadline, _STORE, key, *words, repeatable=repeatable)
            applied = reply == scripts.WRITTEN
        # After a timeout there is no time left to look.
        unsure = unsure and not isinstance(reply, TimeoutError)
        if not applied and not (unsure and await self._is_in_place(key, revision, deadline)):
            raise _refusal(reply, unsure=unsure)
        session.revision = revision

    async def load(self, id: str) -> Session[D]:
        """See `Storage.load`."""
        deadline = self._begin()
        key = self._key(id)
        payload = filled(self._getex, key)
        record, _ = await self._server.call(key, payload, _STRING_OR_NIL, deadline, repeatable=True)
        if _checked(record) is None:
            raise SessionNotFound(NOT_FOUND)
        return unseal(record, id, self._codec, self._time)

    async def delete(self, id: str) -> bool:
        """See `Storage.delete`.

        Raises:
            StorageUnavailable: Also when the reply was lost: whether there was a session, and
                whether there still is, is unknown. Deleting again is safe.
        """
        deadline = self._begin()
        key = self._key(id)
        reply, unsure = await self._run(deadline, _DELETE, key, b"%d" % self._time())
        if reply not in (0, 1):
            raise _failure(reply, unsure=unsure)
        return bool(reply)

    async def delete_expired(self, before: datetime | None = None) -> int:
        """0, without asking the server, which expires sessions by itself."""
        self._begin()
        if before is not None:
            as_utc(before, "before")
        return 0

    async def ping(self) -> tuple[ServerHealth, ...]:
        """Ask every server that sessions live on how it is: a readiness check, not a sixth verb.

        Returns:
            One for each master of a cluster, else one. Look at its `warnings`: they tell what
            endangers sessions although the server answers.

        Raises:
            StorageUnavailable: A server cannot be reached, or the user may not run INFO.
            StorageClosed: The storage is closed.
        """
        deadline = self._begin()
        began = time.perf_counter()
        replies = await self._server.call_each(command(b"INFO"), _STRING, deadline)
        round_trip = time.perf_counter() - began
        return tuple(health_from_info(_checked(reply), round_trip) for reply in replies)

    async def aclose(self) -> None:
        """See `Storage.aclose`. Closes the client if `from_url` made it; a borrowed one is not.

        Whoever is waiting for a reply gets `StorageClosed`.

        Raises:
            StorageUnavailable: The storage is in use by another event loop.
        """
        if not self._closed:
            is_here = self._home.is_here()
            self._closed = True
            if is_here:
                await self._server.aclose()
                if self._owns_client:
                    await self._client.aclose()

    def _begin(self) -> float:
        """Begin a verb: see that the storage can be used, here and now, and set a deadline."""
        if self._closed:
            message = "the storage is closed"
            raise StorageClosed(message)
        return self._home.check().time() + self._timeout

    def _key(self, id: str) -> bytes:
        check_id(id)
        return self._key_prefix + id.encode()

    def _time(self) -> int:
        return max(0, round(self._clock.time() * 1000))

    async def _run(
        self,
        deadline: float,
        script: "_Prepared",
        key: bytes,
        *words: bytes,
        repeatable: bool = False,
    ) -> tuple[Any, bool]:
        """Run a script, which the server may have to be told first; the reply is as from `call`."""
        payload = filled(script.by_digest, key, *words)
        reply, unsure = await self._server.call(
            key, payload, _INTEGER, deadline, repeatable=repeatable
        )
        if isinstance(reply, NoScriptError):
            payload = filled(script.by_source, key, *words)
            reply, again = await self._server.call(
                key, payload, _INTEGER, deadline, repeatable=repeatable
            )
            unsure = unsure or again
        return reply, unsure

    async def _is_in_place(self, key: bytes, revision: str, deadline: float) -> bool:
        """Whether the record under the key has this revision: whether a write was applied."""
        payload = filled(_REVISION, key)
        reply, _ = await self._server.call(key, payload, _STRING, deadline, repeatable=True)
        return bool(reply == revision.encode())


class _Prepared:
    """A script, prepared to be run on one key with so many arguments."""

    def __init__(self, script: scripts.Script, arguments: int) -> None:
        slots = [None] * (1 + arguments)
        self.by_digest = command(b"EVALSHA", script.digest, b"1", *slots)
        self.by_source = command(b"EVAL", script.source, b"1", *slots)


def _server_of(client: "Redis | RedisCluster", timeout: float) -> Server:
    if isinstance(client, RedisCluster):
        return Cluster(client, timeout)
    if isinstance(client, Redis):
        return SingleServer(maker(client), timeout)
    message = f"the client is a redis.asyncio.Redis or RedisCluster, not {type(client).__name__}"
    raise TypeError(message)


_STRING_OR_NIL: Final[frozenset[type]] = frozenset({bytes, type(None)})
_STRING: Final[frozenset[type]] = frozenset({bytes})
_INTEGER: Final[frozenset[type]] = frozenset({int})
_NONSENSE = "the server answered with what is no answer to the command"
_UNKNOWN = "a reply was lost, and it cannot be told whether the write was applied"


_REVISION: Final = command(b"GETRANGE", None, b"1", b"16")
_SET: Final = command(b"SET", None, None, b"PX", None)
_STORE: Final = _Prepared(scripts.STORE, 5)
_DELETE: Final = _Prepared(scripts.DELETE, 1)
_CONDITIONS: Final = {
    When.ABSENT: b"absent",
    When.PRESENT: b"present",
    When.UNCHANGED: b"unchanged",
}


def _checked(reply: Any) -> Any:
    """The reply, if it is one, and not an exception that stands in its place."""
    if isinstance(reply, Exception):
        raise translated(reply)
    return reply


def _refusal(status: Any, *, unsure: bool) -> SessionError:
    """Why a conditional write was not applied, or why that is unknown."""
    if status == scripts.UNREADABLE:
        return CorruptSession("what is stored under this id is no session of this format")
    if unsure or status not in _REFUSALS:
        return _failure(status, unsure=unsure)
    kind, message = _REFUSALS[status]
    return kind(message)


def _failure(reply: Any, *, unsure: bool) -> SessionError:
    """What to raise for an exception in a write's place, or for an answer that is none."""
    if isinstance(reply, Exception):
        error = translated(reply)
        if not unsure or isinstance(reply, TimeoutError):
            return error
        cause = error.__cause__
    else:
        cause = None
    unknown = StorageUnavailable(_UNKNOWN if unsure else _NONSENSE)
    unknown.__cause__ = cause
    return unknown


_REFUSALS: Final[dict[int, tuple[type[SessionError], str]]] = {
    scripts.ABSENT: (SessionNotFound, NOT_FOUND),
    scripts.EXISTS: (SessionExists, EXISTS),
    scripts.CHANGED: (SessionConflict, CHANGED),
}
