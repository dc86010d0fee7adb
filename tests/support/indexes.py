"""A reference for tests of storages that find the sessions of a principal."""

import builtins
from collections.abc import Iterable
from typing import Any

from aiosessions import CorruptSession, IndexedStorage, SessionInfo, session_digest
from aiosessions.record import PLAIN, is_rotated, owner_of, principal_digest, read_info
from aiosessions.storage import check_count, check_digest, check_principal
from tests.support.storages import Entry, ReferenceStorage

Owned = dict[str, Entry]


class IndexedReferenceStorage(ReferenceStorage, IndexedStorage[Any]):
    """A correct storage with an index: it looks at every session of the backend."""

    async def list(self, principal: str) -> builtins.list[SessionInfo[Any]]:
        """Read the records of a principal, the latest update first."""
        self.check_open()
        return sorted(self.infos(principal), key=lambda info: info.updated_at, reverse=True)

    async def count(self, principal: str) -> int:
        """Count the sessions that are not rotated away."""
        self.check_open()
        return len(self.current(principal))

    async def revoke(self, principal: str, digest: str) -> bool:
        """Remove a session of the principal."""
        self.check_open()
        check_digest(digest)
        return self.remove(each for each in self.owned(principal) if each == digest) > 0

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        """Remove the sessions of the principal."""
        self.check_open()
        kept = None if keep is None else session_digest(keep)
        return self.remove(each for each in self.owned(principal) if each != kept)

    async def trim(self, principal: str, most: int, *, keep: str) -> int:
        """Remove the sessions that were not used for the longest time."""
        self.check_open()
        check_count(most, "most")
        kept = session_digest(keep)
        current = self.current(principal)
        unused = sorted(current.keys() - {kept}, key=lambda each: current[each].used_at)
        return self.remove(unused[: max(0, len(current) - most)])

    def owned(self, principal: str) -> Owned:
        """Return the live sessions of a principal by their digests, rotated ones included."""
        check_principal(principal)
        return {
            session_digest(id): entry
            for id, entry in self.table().items()
            if not self.is_expired(entry) and self.is_owned(entry, principal)
        }

    def is_owned(self, entry: Entry, principal: str) -> bool:
        """Return whether a session belongs to a principal."""
        owner = principal_digest(principal).encode()
        return entry.record[:1] != PLAIN and owner_of(entry.record) == owner

    def current(self, principal: str) -> Owned:
        """Return the live sessions, without ids that were rotated away."""
        owned = self.owned(principal).items()
        return {digest: entry for digest, entry in owned if not is_rotated(entry.record)}

    def infos(self, principal: str) -> Iterable[SessionInfo[Any]]:
        """Read the sessions of a principal that can be read."""
        for digest, entry in self.current(principal).items():
            try:
                yield read_info(entry.record, digest, self.codec)
            except CorruptSession:
                continue

    def remove(self, digests: Iterable[str]) -> int:
        """Remove sessions, and return the number of those that were not rotated away."""
        chosen = set(digests)
        ids = [id for id in self.table() if session_digest(id) in chosen]
        return sum(not is_rotated(self.table().pop(id).record) for id in ids)
