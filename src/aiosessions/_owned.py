"""The calls of a manager for the sessions of a principal."""

import builtins
from typing import Generic

from ._lifetime import Lifetime
from ._principals import indexed
from .session import D, Session, SessionInfo
from .storage import Storage


class OwnedSessions(Generic[D]):
    """The part of `SessionManager` that needs an `IndexedStorage`."""

    _storage: Storage[D]
    _lifetime: Lifetime[D]
    _max_per_principal: int | None

    async def list(self, principal: str) -> builtins.list[SessionInfo[D]]:
        """Return the sessions of a principal, the latest update first. Renews nothing.

        Raises:
            NotImplementedError: The storage is not an `IndexedStorage`. `count`, `revoke` and
                `revoke_all` raise it, too.
            StorageUnavailable: The storage cannot be reached.
        """
        infos = await indexed(self._storage).list(principal)
        return [bounded for info in infos if (bounded := self._lifetime.bounded(info))]

    async def count(self, principal: str) -> int:
        """Return the number of a principal's sessions.

        Reads no session, so it includes those that are older than `max_lifetime` and were stored
        without an `expires_at`.

        Raises:
            StorageUnavailable: The storage cannot be reached.
        """
        return await indexed(self._storage).count(principal)

    async def revoke(self, principal: str, digest: str) -> bool:
        """Delete one session of a principal, and return whether there was one.

        Args:
            principal: The owner.
            digest: The digest of the session's id, from `list`.

        Raises:
            CorruptSession: The stored record cannot be read. It stays as it is.
            StorageUnavailable: The storage cannot be reached. Revoking again is safe.
        """
        return await indexed(self._storage).revoke(principal, digest)

    async def revoke_all(self, principal: str, *, keep: str | None = None) -> int:
        """Delete every session of a principal, and return their number: sign out everywhere.

        When it returns, each session that existed when it began is gone, and so is a new one that a
        rotation has made of it. A session that is created meanwhile is either deleted or listed.

        Args:
            principal: The owner.
            keep: The id of a session to keep, to sign out everywhere else.

        Raises:
            CorruptSession: A stored record cannot be read; the others are deleted.
            InvalidSessionId: `keep` is malformed.
            StorageUnavailable: The storage cannot be reached. Revoking again is safe.
        """
        return await indexed(self._storage).revoke_all(principal, keep=keep)

    async def _trim(self, session: Session[D], *, owned_by: str | None = None) -> None:
        """Enforce the limit of sessions after a principal has got this one.

        Args:
            session: The session.
            owned_by: The principal that had the session before.
        """
        principal, most = session.principal, self._max_per_principal
        if most is not None and principal is not None and principal != owned_by:
            await indexed(self._storage).trim(principal, most, keep=session.id)
