"""Sessions for an application: ids, dates, lifetimes, lost updates and new ids.

Invariants:

- A session is created only where there was none, and saved only over the revision that was loaded.
  A lost update is an error, and a deleted session stays deleted.
- No method returns or writes a session that is older than `max_lifetime`, even if it was stored
  without an `expires_at`. The method that finds such a session removes it, but `list` only leaves
  it out.
- After a rotation, the old id answers with the session as it was before, and accepts no writes.
- A session never gets another principal under the same id.
"""

import copy
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Generic, Self

from msgspec import UNSET

from ._lifetime import Lifetime
from ._owned import OwnedSessions
from ._principals import MOVED, Owner, check_owner, check_owner_type, check_unmoved, indexed
from ._retry import Change, Retry, apply
from ._rotation import ROTATED, check_metadata, explain, in_doubt, move, take_back
from ._sweep import Sweeper
from .errors import (
    InvalidSession,
    SessionConflict,
    SessionNotFound,
    SessionRotated,
)
from .record import CHANGED, NOT_FOUND, ROTATED_KEY
from .session import D, Session, check_id, new_session_id, revised
from .storage import Clock, Storage, When, check_count, check_storage, milliseconds

__all__ = ["ROTATED_KEY", "SessionManager"]
_NO_DATA: Any = None  # for each D; a codec whose data type has no None refuses it


class SessionManager(OwnedSessions[D], Generic[D]):
    """Creates, loads, saves and rotates sessions in a storage, which it borrows and leaves open.

    Args:
        storage: The storage of the sessions.
        max_lifetime: The longest time from a session's creation to its end; None for no limit. As
            for all durations: seconds or a timedelta.
        sweep_interval: The time between two calls of `delete_expired` while the manager is entered;
            None for no sweeps. Redis needs none. `max_sessions` bounds `LocalStorage` without them.
        grace: The time for which the old id of a rotated session still answers. With 0, the old id
            is gone when `rotate` returns.
        max_per_principal: The most sessions of one principal; None for no limit. When `create` or
            `rotate` gives a principal one more, the longest-unused one is deleted.
        clock: The source of time.

    Raises:
        ValueError, TypeError: A duration or a limit is not positive (`grace` may be 0), or has a
            wrong type.
        NotImplementedError: `max_per_principal` is given, and the storage is not an
            `IndexedStorage`.
    """

    def __init__(
        self,
        storage: Storage[D],
        *,
        max_lifetime: float | timedelta | None = None,
        sweep_interval: float | timedelta | None = None,
        grace: float | timedelta = 10.0,
        max_per_principal: int | None = None,
        clock: Clock = time,
    ) -> None:
        check_storage(storage)
        self._storage = storage
        self._clock = clock
        self._lifetime = Lifetime(storage, _optional(max_lifetime, "max_lifetime"), self._now)
        interval = _optional(sweep_interval, "sweep_interval")
        self._sweeper = Sweeper(storage, interval.total_seconds()) if interval else None
        none = grace in (0, timedelta(0)) and not isinstance(grace, bool)
        self._grace = timedelta(0) if none else timedelta(milliseconds=milliseconds(grace, "grace"))
        if max_per_principal is not None:
            check_count(max_per_principal, "max_per_principal")
            indexed(storage)
        self._max_per_principal = max_per_principal
        self._entered = False

    @property
    def storage(self) -> Storage[D]:
        """The storage of the sessions."""
        return self._storage

    @property
    def clock(self) -> Clock:
        """The source of time."""
        return self._clock

    async def __aenter__(self) -> Self:
        if self._entered:
            raise RuntimeError("the manager is entered already; enter it once, at startup")
        if self._sweeper is not None:
            self._sweeper.start()
        self._entered = True
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self._entered = False
        if self._sweeper is not None:
            await self._sweeper.stop(failing=exc_type is not None)

    async def create(
        self,
        *,
        kind: str = "",
        principal: str | None = None,
        metadata: Mapping[str, str] | None = None,
        data: D = _NO_DATA,
        id: str | None = None,
    ) -> Session[D]:
        """Create and store a session.

        Args:
            kind: The kind of session, such as "web".
            principal: The owner, if known.
            metadata: Small string pairs.
            data: The application's own payload. None by default, which a typed codec may refuse.
            id: The id to use; by default a new one from `new_session_id`.

        Raises:
            InvalidSession: The session cannot be stored, or `metadata` has the reserved key
                `aiosessions.rotated`.
            InvalidSessionId: `id` is malformed.
            SessionExists: There is a session with this id.
            StorageUnavailable: The storage cannot be reached.
        """
        check_metadata(metadata)
        now = self._now()
        session = Session(
            id=new_session_id() if id is None else id,
            kind=kind,
            principal=principal,
            metadata=dict(metadata or {}),
            data=data,
            created_at=now,
            updated_at=now,
        )
        session.expires_at = self._lifetime.end_of(session)
        try:
            await self._storage.store(session, when=When.ABSENT)
        except BaseException as error:
            if in_doubt(error):
                await take_back(self._storage, session, drawn=id is None)
            raise
        try:
            await self._trim(session)
        except GeneratorExit:  # the coroutine is being closed, so it cannot wait for anything
            raise
        except BaseException:
            # The caller does not learn the id, so only the TTL would end the session.
            await take_back(self._storage, session, drawn=True)
            raise
        return session

    async def get(self, id: str, *, principal: Owner = UNSET) -> Session[D]:
        """Load a session and renew its TTL, in one round trip.

        An id that was rotated away returns the session as it was, with `ROTATED_KEY` among its
        metadata. That session cannot be saved.

        Args:
            id: The session's id.
            principal: The caller, who must be the owner; None if the session must have no owner;
                by default the owner is not checked.

        Raises:
            SessionNotFound: The session does not exist, or belongs to another principal. The error
                does not tell which.
            InvalidSessionId: The id is malformed.
            CorruptSession: The stored record cannot be read.
            StorageUnavailable: The storage cannot be reached.
        """
        check_owner_type(principal)
        session = await self._lifetime.load(id)
        check_owner(session, principal)
        if ROTATED_KEY in session.metadata:
            session.revision = ""  # no stored revision is empty, so this one matches none
        return session

    async def save(self, session: Session[D]) -> None:
        """Store a session that was loaded or created, unless it was written since.

        Stamps `updated_at` and `revision` on the object, and shortens an `expires_at`
        that lies beyond `max_lifetime`. On any error the object is unchanged.

        Raises:
            SessionConflict: The session was written since. Redo the change, as `mutate` does.
            SessionRotated: The id was rotated away.
            SessionNotFound: The session was deleted or has expired.
            InvalidSession: The session cannot be stored, or its principal was changed.
            CorruptSession: The stored record cannot be read.
            StorageUnavailable: The storage cannot be reached; see `in_doubt`.
        """
        if not isinstance(session, Session):
            raise TypeError(f"session is a Session, not {type(session).__name__}")
        await check_unmoved(self._storage, session)
        try:
            await self._store(session)
        except SessionConflict as error:
            raise await explain(self._storage, error, session.id) from None

    async def delete(self, id: str) -> bool:
        """Remove a session and return whether there was one.

        Raises:
            InvalidSessionId: The id is malformed.
            StorageUnavailable: The storage cannot be reached.
        """
        return await self._storage.delete(id)

    async def mutate(
        self,
        session: Session[D] | str,
        change: Change[D],
        *,
        principal: Owner = UNSET,
        attempts: int = 100,
        timeout: float | timedelta = 10.0,
    ) -> Session[D]:
        """Load a session, change it and save it; after a conflict, again with a fresh copy.

        Args:
            session: The session's id, or a session: only its id is used.
            change: A plain or an async function that changes the session it gets, in place. It runs
                once for each attempt. If it raises an exception, nothing is written.
            principal: As for `get`.
            attempts: The maximum number of attempts.
            timeout: The time after which no further attempt begins.

        Returns:
            The session as it was saved.

        Raises:
            SessionConflict: Each attempt met another writer.
            SessionRotated: The id was rotated away.
            SessionNotFound: The session does not exist, belongs to another principal, or was
                deleted during the change.
            InvalidSession: The changed session cannot be stored, or `change` has changed its id or
                its principal.
            CorruptSession: The stored record cannot be read.
            ValueError: `attempts` is not positive.
            StorageUnavailable: The storage cannot be reached. No further attempt follows, because
                the change may have been saved.
        """
        id = _id_of(session)
        retry = Retry(attempts, timeout)
        check_owner_type(principal)
        while True:
            changed = await self._load_writable(id, principal)
            created_at, owner = changed.created_at, changed.principal
            await apply(change, changed)
            changed.created_at = created_at
            if changed.principal != owner:
                raise InvalidSession(MOVED)
            try:
                await self._store(changed)
            except SessionConflict as error:
                if not await retry.wait():
                    raise await explain(self._storage, error, id) from None
            else:
                return changed

    async def rotate(
        self,
        session: Session[D] | str,
        change: Change[D] | None = None,
        *,
        principal: Owner = UNSET,
        new_id: str | None = None,
    ) -> Session[D]:
        """Move a session to a new id, because its rights change: after a sign-in, for example.

        With a change, or with an id, the stored session is loaded, changed and moved; after a
        conflict again, as in `mutate`. With a session alone, the content of the object moves,
        changes that were not saved included. The old id never gets the change: it answers for
        `grace` seconds (at most a TTL) with the session as it was. `created_at` does not move, and
        `expires_at` only to an earlier time. After an error or a cancellation the old id works as
        before; with a grace of 0, a cancellation in the last step may complete the rotation.

        Args:
            session: The session, or its id.
            change: As for `mutate`. The session that it gets has the new id already, and may get
                another principal.
            principal: As for `get`: the owner under the old id.
            new_id: The id to use; by default a new one from `new_session_id`.

        Returns:
            The session under its new id. The object that was passed is unchanged.

        Raises:
            SessionConflict: The session was written since it was loaded; with a change, in each
                attempt.
            SessionRotated: The id was rotated away.
            SessionNotFound: The session was deleted, has expired, or belongs to another principal.
            SessionExists: There is a session with the id `new_id`.
            InvalidSession: The session cannot be stored, or is too large to be marked as rotated,
                or `change` has changed its id.
            CorruptSession: The stored record cannot be read.
            StorageUnavailable: The storage cannot be reached. The old id may be read-only until its
                grace ends.
        """
        if new_id is not None:
            check_id(new_id)
        check_owner_type(principal)
        retry = Retry()
        while True:
            old = await self._load_writable(_id_of(session), principal)
            draft = session if isinstance(session, Session) and change is None else None
            if draft is not None and draft.revision != old.revision:
                raise SessionConflict(CHANGED)
            # A deep copy, because changes of the new session must not reach the old one.
            new = copy.deepcopy(draft or old)
            new = revised(new, id=new_id or new_session_id())
            if change is not None:
                await apply(change, new)
            check_metadata(new.metadata)
            admit = partial(self._trim, new, owned_by=old.principal)
            try:
                now, drawn = self._now(), new_id is None
                return await move(
                    self._storage, old, new, now, self._grace, drawn=drawn, admit=admit
                )
            except SessionConflict:
                if draft is not None or not await retry.wait():
                    raise

    async def _load_writable(self, id: str, principal: Owner) -> Session[D]:
        session = await self._lifetime.load(id)
        check_owner(session, principal)
        if ROTATED_KEY in session.metadata:
            raise SessionRotated(ROTATED)
        return session

    async def _store(self, session: Session[D]) -> None:
        """As `save`, but a rotated id is a plain `SessionConflict`."""
        if session.revision:  # else it may come from `get` under a rotated id: a conflict
            check_metadata(session.metadata)
        end = self._lifetime.end_of(session)
        saved = revised(session, updated_at=self._now(), expires_at=end)
        await self._storage.store(saved, when=When.UNCHANGED)
        if self._lifetime.has_ended(session, end):
            raise SessionNotFound(NOT_FOUND)
        session.updated_at = saved.updated_at
        session.expires_at = saved.expires_at
        session.revision = saved.revision

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.time(), UTC)


def _id_of(session: Session[D] | str) -> str:
    return session.id if isinstance(session, Session) else session


def _optional(duration: float | timedelta | None, what: str) -> timedelta | None:
    return None if duration is None else timedelta(milliseconds=milliseconds(duration, what))
