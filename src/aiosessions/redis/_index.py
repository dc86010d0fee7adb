"""The sessions of a principal: the index, and the calls that read it.

Invariants:

- An entry precedes its session, so a crash leaves an entry without a session, and never a session
  without an entry. On one server, one script writes both.
- Loads and saves do not write the index. The index expires, so each record has a lease: the time
  until which its entry is sure to be there. A load or save that finds less than two TTLs of it left
  extends it to three. As a session lives for one TTL after its last use, no session outlives its
  lease.
- Each store that writes an index looks at some of its entries, and removes those of dead sessions.
  In a cluster, an entry without a session stays for the time in which the session may follow.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, Final, Generic

from ..codec import Codec
from ..errors import CorruptSession, StorageUnavailable
from ..record import (
    PLAIN,
    deadline_of,
    is_rotated,
    lease_of,
    owner_of,
    principal_digest,
    read_info,
    revision_of,
)
from ..session import D, SessionInfo
from . import _commands as commands
from . import _index_scripts as scripts
from ._routing import Router
from ._time import ServerTime

_log = logging.getLogger("aiosessions")
Entry = tuple[bytes, bytes]
"""The digest of a session, and the score of its entry."""

_REVOKED: Final = 1
_ABSENT: Final = 0
_ROTATED: Final = -1
_UNREADABLE: Final = -3
# Commands that one call has in flight at a time.
_BATCH: Final = 500


class Index(Generic[D]):
    """The indexes of one storage.

    Args:
        router: Sends the commands.
        key_prefix: The prefix of the sessions' keys.
        ttl: The TTL of the sessions in milliseconds.
        codec: Decodes sessions.
        time: The time.
        window: In a cluster, the milliseconds for which an entry without a session stays. On one
            server, 0: both are written at once.

    Attributes:
        fresh: The milliseconds that are left of a lease when its entry is half a window old. The
            session may follow until then: the clocks of two servers may differ by the other half.
    """

    def __init__(
        self,
        router: Router,
        *,
        key_prefix: bytes,
        ttl: int,
        codec: Codec[D],
        time: ServerTime,
        window: int,
    ) -> None:
        self._router = router
        self._key_prefix = key_prefix
        self._ttl = ttl
        self._codec = codec
        self._time = time
        self._window = window
        self._lifetime = b"%d" % (3 * ttl + window)
        self.fresh = b"%d" % (3 * ttl + window // 2)

    @property
    def on_one_server(self) -> bool:
        """Whether a script can write a session and its entry."""
        return not self._window

    def key(self, owner: bytes) -> bytes:
        """The key of the index of a principal, from the digest of the principal."""
        return self._key_prefix + b"principal:" + owner

    async def enter(self, deadline: float, key: bytes, record: bytes) -> bytes:
        """Add or confirm the entry of a session in a cluster, and return its lease."""
        index = self.key(owner_of(record))
        digest = key[-32:]
        command = scripts.ENTER.fill(deadline, index, digest, self._lifetime, self._time.offset())
        lease, sample = await self._router.call(command)
        entries = [each for each in _pairs(sample) if each[0] != digest]
        soon = _soon(deadline)
        with suppress(CorruptSession, StorageUnavailable):
            looks = await self._look_at(soon, owner_of(record), entries)
            dead = [each for each, left in zip(entries, looks, strict=True) if left == 0]
            await self._prune(soon, index, dead)
        return bytes(lease)

    def needs_renewal(self, record: bytes) -> bool:
        """Whether less than two TTLs of a lease are left, and the session may need them."""
        lease = lease_of(record)
        left = lease - self._time.now()
        # More than a new lease has: the clock of this process is behind.
        too_much = 3 * self._ttl + self._ttl // 4 + self._window
        return not 2 * self._ttl <= left <= too_much and deadline_of(record) > lease

    async def renew(self, deadline: float, key: bytes, record: bytes) -> None:
        """Extend the lease of a session that was loaded.

        Raises:
            StorageUnavailable, CorruptSession: The index cannot be written, and the lease may end
                before the session does.
        """
        left = lease_of(record) - self._time.now()
        revision = revision_of(record).encode()
        if left >= self._ttl:  # a later load can extend it
            deadline = _soon(deadline)
        try:
            if self.on_one_server:
                index = self.key(owner_of(record))
                words = index, revision, self._lifetime, self._time.offset()
                command = scripts.RENEW.fill(deadline, key, *words)
            else:
                lease = await self.enter(deadline, key, record)
                command = scripts.RENEW_LEASED.fill(deadline, key, revision, lease)
            await self._router.call(command)
        except (StorageUnavailable, CorruptSession):
            if left >= self._ttl:
                return
            # The load has renewed the session, which must not outlive its entry.
            rest = b"%d" % max(1, left)
            with suppress(StorageUnavailable):
                await self._router.call(commands.PEXPIRE.fill(deadline, key, rest))
            raise

    async def infos(self, deadline: float, principal: str) -> list[SessionInfo[D]]:
        """See `IndexedStorage.list`."""
        owner = principal_digest(principal).encode()
        infos: list[SessionInfo[D]] = []
        gone: list[Entry] = []
        async for entries, records in self._rounds(deadline, owner, self._peek_at):
            # The clock of the server decides, as for a load.
            late = [
                each for each, record in zip(entries, records, strict=True) if self._is_late(record)
            ]
            looks = await self._look_at(deadline, owner, late)
            dead = {entry for entry, left in zip(late, looks, strict=True) if left == 0}
            for entry, record in zip(entries, records, strict=True):
                if record is None or _is_of_another(record, owner):
                    gone.append(entry)
                elif entry not in dead and (info := self._info(record, entry[0].decode())):
                    infos.append(info)
        await self._prune(deadline, self.key(owner), gone)
        return sorted(infos, key=lambda info: info.updated_at, reverse=True)

    async def count(self, deadline: float, principal: str) -> int:
        """See `IndexedStorage.count`."""
        owner = principal_digest(principal).encode()
        number = 0
        async for _, looks in self._rounds(deadline, owner, self._look_at):
            number += sum(left > 0 for left in looks)
        return number

    async def revoke(self, deadline: float, principal: str, digest: str) -> bool:
        """See `IndexedStorage.revoke`."""
        owner = principal_digest(principal).encode()
        status = await self._router.call(self._revoke(deadline, owner, digest.encode()))
        if status == _UNREADABLE:
            raise CorruptSession("the record of this digest cannot be read")
        return bool(status == _REVOKED)

    async def revoke_all(self, deadline: float, principal: str, keep: bytes) -> int:
        """See `IndexedStorage.revoke_all`."""
        owner = principal_digest(principal).encode()
        moved: set[Entry] = set()
        revoked = 0
        # A rotation stores the new session, with its entry, before it marks or removes the old one.
        # If it finds the old one gone, it deletes the new one. So the session of an entry that is
        # deleted here has not moved. That of an entry that is marked or absent may have: to an
        # entry of the next reading.
        while True:
            entries = [each for each in await self._entries(deadline, owner) if each[0] != keep]
            # The newest first, to be faster than the next rotation.
            entries.reverse()
            statuses = await self._call_all(
                self._revoke(deadline, owner, digest) for digest, _ in entries
            )
            revoked += statuses.count(_REVOKED)
            pairs = zip(entries, statuses, strict=True)
            new = {entry for entry, status in pairs if status in (_ABSENT, _ROTATED)} - moved
            if not new:
                break
            moved |= new
        if _UNREADABLE in statuses:
            raise CorruptSession("a record of this principal cannot be read and was not revoked")
        await self._prune(deadline, self.key(owner), entries)
        return revoked

    async def trim(self, deadline: float, principal: str, most: int, keep: bytes) -> int:
        """See `IndexedStorage.trim`."""
        owner = principal_digest(principal).encode()
        if self.on_one_server:
            words = self._key_prefix, b"%d" % most, keep, self._time.offset()
            command = scripts.TRIM.fill(deadline, self.key(owner), owner, *words)
            return int(await self._router.call(command))
        entries = await self._entries(deadline, owner)
        if len(entries) <= most:
            return 0
        looks = await self._look_at(deadline, owner, entries)
        uses = {each[0]: use for each, use in zip(entries, looks, strict=True) if use > 0}
        # All callers see one order, so that of callers at one time none deletes the session that
        # another one has just made. If `keep` is among the first, no other one goes in its place.
        excess = sorted(uses, key=lambda each: uses[each])[: max(0, len(uses) - most)]
        statuses = await self._call_all(
            self._revoke(deadline, owner, each) for each in excess if each != keep
        )
        return statuses.count(_REVOKED)

    async def _rounds(
        self,
        deadline: float,
        owner: bytes,
        read: Callable[[float, bytes, list[Entry]], Awaitable[list[Any]]],
    ) -> AsyncIterator[tuple[list[Entry], list[Any]]]:
        """Read what the entries of an index name, and again the new entries if one has moved.

        A session that is rotated after the entries were read is under another entry.
        """
        seen: set[bytes] = set()
        while True:
            entries = [each for each in await self._entries(deadline, owner) if each[0] not in seen]
            if not entries:
                return
            seen.update(digest for digest, _ in entries)
            replies = await read(deadline, owner, entries)
            yield entries, replies
            if not any(map(_has_moved, replies)):
                return

    async def _peek_at(self, deadline: float, _: bytes, entries: list[Entry]) -> list[Any]:
        return await self._call_all(
            commands.PEEK.fill(deadline, self._key_prefix + digest) for digest, _ in entries
        )

    async def _entries(self, deadline: float, owner: bytes) -> list[Entry]:
        """The entries of an index, each with its score, in the order of their scores."""
        prefix = self._key_prefix if self.on_one_server else b""
        command = scripts.ENTRIES.fill(deadline, self.key(owner), owner, prefix)
        return _pairs(await self._router.call(command))

    async def _look_at(self, deadline: float, owner: bytes, entries: list[Entry]) -> list[int]:
        offset = self._time.offset()
        return await self._call_all(
            scripts.LOOK.fill(deadline, self._key_prefix + digest, owner, offset)
            for digest, _ in entries
        )

    async def _prune(self, deadline: float, index: bytes, dead: list[Entry]) -> None:
        """Remove the entries of dead sessions, in a cluster."""
        if self.on_one_server or not dead:  # there, a script has done it
            return
        entries = b" ".join(word for entry in dead for word in entry)
        words = entries, b"%d" % self._window, self._time.offset()
        with suppress(StorageUnavailable):
            await self._router.call(scripts.PRUNE.fill(deadline, index, *words))

    def _revoke(self, deadline: float, owner: bytes, digest: bytes) -> commands.Command:
        words = owner, self._time.offset(), b"%d" % self.on_one_server
        return scripts.REVOKE.fill(deadline, self._key_prefix + digest, *words)

    def _is_late(self, record: bytes | None) -> bool:
        """Whether a record is past its deadline by the clock of this process."""
        with suppress(CorruptSession):
            return record is not None and deadline_of(record) <= self._time.now()
        return False

    def _info(self, record: bytes, digest: str) -> SessionInfo[D] | None:
        """Read a record for a list; None if it does not belong there."""
        try:
            deadline_of(record)  # checks the header
            if is_rotated(record):
                return None
            return read_info(record, digest, self._codec)
        except CorruptSession as error:
            _log.warning("session %s is not listed: %s", digest[:8], error)
            return None

    async def _call_all(self, batch: Iterable[commands.Command]) -> list[Any]:
        every = list(batch)
        return [
            reply
            for start in range(0, len(every), _BATCH)
            for reply in await self._router.call_all(every[start : start + _BATCH])
        ]


def _soon(deadline: float) -> float:
    """The deadline of a command that a call can do without.

    A server that hangs must leave the time for the session, which may be on another server.
    """
    now = asyncio.get_running_loop().time()
    return now + (deadline - now) / 4


def _is_of_another(record: bytes, owner: bytes) -> bool:
    """Whether a record is that of a session of another principal, or of none."""
    try:
        deadline_of(record)
    except CorruptSession:  # the owner cannot be read
        return False
    return record[:1] == PLAIN or owner_of(record) != owner


def _has_moved(reply: Any) -> bool:
    """Whether a session may have another id by now, as its record or a look at it tells."""
    return is_rotated(reply) if isinstance(reply, bytes) else reply in (None, _ABSENT, _ROTATED)


def _pairs(flat: list[bytes]) -> list[Entry]:
    return list(zip(flat[::2], flat[1::2], strict=True))
