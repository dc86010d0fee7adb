"""The work on the session of one request: loading it, and carrying out the decision.

Invariants:

- The id that a client presents is used only if there is a session under it.
- Nothing is stored before something is set, and then before the head of the response leaves.
- A principal is set only under a new id, and only if the response succeeds.
- After a conflict, the parts that this request has changed are set again in the fresh session. A
  part that it has read and changed is an error if another request has changed that part, too.
- A slow response must not replace the cookie of a sign-in that was faster. So an old id is sent
  only when that is due, with a write that shows that it is still in use. The cookie of an unknown
  id is cleared only by a response that begins soon.
"""

import logging
from collections.abc import Mapping
from typing import Any, Generic

import anyio

from .._retry import Change, apply
from ..errors import (
    CorruptSession,
    InvalidSessionId,
    SessionConflict,
    SessionError,
    SessionNotFound,
    SessionRotated,
)
from ..record import CHANGED
from ..session import D, Session, new_session_id, session_digest
from ._changes import Changes, Snapshot, refill
from ._decision import Outcome, Signals, decide
from ._operations import Settings, delete_in_use

HEAD_LEFT = "the head of the response has left, so the client cannot get a new id any more"
# The longest time between the load and the head of a response that clears a cookie, in seconds.
_SOON = 1.0
_log = logging.getLogger("aiosessions")


class Work(Generic[D]):
    """The session of one request: the state behind a `WebSession`.

    Attributes:
        presented: The id that the client presented, well-formed or not; None if there was none.
        is_loaded: Whether `load` has finished.
        is_stored: Whether `session` is stored.
        accessed: Whether the application has looked at the session.
        read: The keys of the data that the application has read; None for all.
        principal: The principal that the application wants.
        head_left: Whether the head of the response has left.
        issues: Whether the client has to learn the id.
        clears: Whether the client has to forget its id.
        error_status: The status of the last error that the application got; 0 without one.
    """

    def __init__(self, settings: Settings[D], presented: str | None) -> None:
        self._settings = settings
        self._sessions = settings.sessions
        self.presented = presented
        self.is_loaded: bool = False
        self.is_stored: bool = False
        self.accessed: bool = False
        self.read: set[str] | None = set()
        self.principal: str | None = None
        self.head_left: bool = False
        self.issues: bool = False
        self.clears: bool = False
        self.error_status = 0
        self._session: Session[D] | None = None
        self._before: Snapshot | None = None
        self._unknown = self._wants_rotation = False
        self._deleted_id: str | None = None
        self._next_id = ""
        self._loaded_at = 0.0
        # Tasks of one request may store at the same time.
        self._lock = anyio.Lock(fast_acquire=True)

    @property
    def session(self) -> Session[D]:
        """The stored session, or the draft of a new one."""
        if self._session is None:
            settings = self._settings
            self._session = Session(id=new_session_id(), kind=settings.kind, data=settings.empty())
        return self._session

    @property
    def id(self) -> str:
        """The id that the client has after a response that succeeds."""
        return self._next_id if self._is_moving() else self.session.id

    def touch(self) -> Session[D]:
        """Return the session for the application.

        Raises:
            RuntimeError: It was not loaded.
        """
        if not self.is_loaded:
            raise RuntimeError("the session is not loaded: `await get_session(request).load()`")
        if not self.accessed:
            self.accessed, self._before = True, self._snapshot()
        return self.session

    async def load(self) -> None:
        """Load the session that the client presented, once."""
        if self.is_loaded:
            return
        found, unknown = None, False
        if self.presented is not None:
            try:
                found = await self._sessions.get(self.presented)
            except (SessionNotFound, InvalidSessionId):
                unknown = True
            except CorruptSession as error:
                _log.error("session %s: %s", session_digest(self.presented)[:8], error)
                if not self._settings.starts_fresh:
                    raise
        if not self.is_loaded:  # by another task of the application
            self.is_loaded, self._unknown = True, unknown
            self._loaded_at = self._sessions.clock.monotonic()
            self._adopt(found)

    def set_principal(self, principal: str | None) -> None:
        """Note another principal."""
        self.touch()
        self._check_head()
        self.principal = principal

    def rotate(self) -> None:
        """Note that the session needs a new id."""
        self.touch()
        self._check_head()
        self._wants_rotation = True

    def delete(self) -> None:
        """Note a deletion, and go on with an empty session."""
        session = self.touch()
        if self.is_stored:
            self._deleted_id = session.id
        self._adopt(None)

    async def finish(self, status: int = 200) -> None:
        """Decide and store, for a response with this status.

        Raises:
            SessionConflict, SessionNotFound: Another request was first.
            StorageUnavailable: The storage cannot be reached.
            RuntimeError: The head has left, and the client would need a new id.
        """
        async with self._lock:
            await self._finish(status)

    async def _finish(self, status: int) -> None:
        if not (self.accessed or self._unknown):
            return
        failed, broken = status >= 400, status >= 500
        moved = self.principal != (self.session.principal if self.is_stored else None)
        signals = Signals(
            loaded=self.is_stored,
            unknown=self._unknown and self._is_soon(),
            deleted=self._deleted_id is not None,
            changed=self.accessed and bool(self._changes()),
            new_rights=(moved and self.principal is not None)
            or (self.is_stored and self._wants_rotation),
            lost_rights=moved and self.principal is None,
            failed=failed,
            broken=broken,
            due=self._is_due(),
        )
        outcome = decide(signals)
        if outcome in (Outcome.REPLACE, Outcome.DELETE):
            await self.settle()
            self.clears = True
        if outcome in (Outcome.CREATE, Outcome.REPLACE):
            await self._create(None if failed else self.principal)
        elif outcome is Outcome.ROTATE:
            await self._rotate(stores_data=not broken)
        elif outcome is Outcome.SAVE:
            await self._save(is_due=signals.due)
        elif outcome is Outcome.ISSUE:
            self.issues |= await self._slide()
        elif outcome is Outcome.CLEAR:
            self.clears = True
        if broken and self.accessed:
            self._before = self._snapshot()  # the changes are dropped, which is not an error

    async def settle(self) -> None:
        """Delete the session that the application has deleted.

        Raises:
            SessionRotated: The session continues under a new id.
        """
        if self._deleted_id is not None:
            await delete_in_use(self._sessions, self._deleted_id)
        self._deleted_id = None

    async def mutate(self, change: Change[D]) -> None:
        """Store the changes so far, and then a change that is redone after a conflict."""
        async with self._lock:
            await self._finish(200)
            session, sent = self.touch(), self._before
            if self.is_stored:
                self._adopt(await self._sessions.mutate(session.id, change), sent)
            else:
                await apply(change, session)
                await self._finish(200)

    async def revoke_all(self, *, keep: bool) -> int:
        """Delete all sessions of the principal, perhaps except this one."""
        session = self.touch()
        if self.principal is None:
            return 0
        kept = session.id if keep else None
        number = await self._sessions.revoke_all(self.principal, keep=kept)
        if not keep:
            self.delete()
        return number

    def replace_data(self, found: Any) -> None:
        """Take data that the application has put in place of the mapping."""
        session: Session[Any] = self.touch()
        if isinstance(found, Mapping) and isinstance(session.data, dict):
            session.data = dict(found)
        else:
            session.data = found if type(found) is type(session.data) else self._settings.empty()

    async def is_alive(self) -> bool:
        """Load the stored session, to renew its TTL, and return whether it is still there."""
        try:
            if self.is_stored:
                await self._sessions.get(self.session.id)
        except SessionNotFound:
            return not self.is_stored  # the application may have deleted it in between
        return True

    def max_age(self) -> int | None:
        """Seconds for which the client may keep the id; None for no limit."""
        return self._settings.max_age(self.session)

    def check_unchanged(self) -> None:
        """Check that nothing was changed after the head has left.

        Raises:
            RuntimeError: Something was.
        """
        if self.accessed and self._changes():
            message = "the session was changed after the head of the response had left"
            raise RuntimeError(f"{message}: the change is not stored")

    async def _slide(self) -> bool:
        """Store the session unchanged, so that its date says when the id was sent.

        Returns:
            Whether the client may get the id again. After a conflict, another request has sent it.
        """
        try:
            await self._sessions.save(self.session)
        except SessionError:  # in an outage, a later response does it
            return False
        return True

    def _check_head(self) -> None:
        if self.head_left:
            raise RuntimeError(HEAD_LEFT)

    def _is_moving(self) -> bool:
        """Whether a response that succeeds gives the stored session a new id."""
        moved = self._wants_rotation or self.principal != self.session.principal
        moving = self.is_stored and moved
        if moving and not self._next_id:
            self._next_id = new_session_id()
        return moving

    def _is_due(self) -> bool:
        return self.is_stored and not self.head_left and self._settings.is_due(self.session)

    def _is_soon(self) -> bool:
        return self._sessions.clock.monotonic() - self._loaded_at <= _SOON

    async def _create(self, principal: str | None) -> None:
        self._check_head()
        draft, sent = self.session, self._snapshot()
        # If this fails or is cancelled, there may be a session under the id all the same.
        id, draft.id = draft.id, new_session_id()
        stored = await self._sessions.create(
            kind=draft.kind,
            principal=principal,
            metadata=draft.metadata,
            data=draft.data,
            id=id,
        )
        self._adopt(stored, sent)
        self.issues, self.clears, self._unknown = True, False, False

    async def _save(self, *, is_due: bool) -> None:
        saved, sent = self.session, self._snapshot()
        try:
            await self._sessions.save(saved)
        except SessionRotated:
            raise
        except SessionConflict:
            if not self._settings.merges:
                raise
            changes, sent = self._changes(), self._snapshot()

            def change(session: Session[D]) -> None:
                session.data = changes.apply(session.data, session.metadata, self.read)

            saved = await self._sessions.mutate(saved.id, change)
        self._adopt(saved, sent)
        self.issues |= is_due

    async def _rotate(self, *, stores_data: bool) -> None:
        self._check_head()
        old, principal, new_id = self.session, self.principal, self.id
        changes = self._changes() if stores_data else None
        sent = self._snapshot() if stores_data else None

        def change(session: Session[D]) -> None:
            if not self._settings.merges and session.revision != old.revision:
                raise SessionConflict(CHANGED)
            if changes is not None:
                session.data = changes.apply(session.data, session.metadata, self.read)
            session.principal = principal

        try:
            moved = await self._sessions.rotate(old.id, change, new_id=new_id)
        except SessionNotFound:
            if principal is None or principal == old.principal:
                raise
            # Another request has deleted the session with its data, and the sign-in is newer.
            self._adopt(None)
            draft = self.session
            draft.id, self.principal = new_id, principal
            if changes is not None:
                draft.data = changes.apply(draft.data, draft.metadata)
            await self._create(principal)
            return
        self._adopt(moved, sent)
        self.issues = True

    def _adopt(self, session: Session[D] | None, sent: Snapshot | None = None) -> None:
        """Go on with a stored session, or with an empty one.

        Args:
            session: The session.
            sent: What was stored. Another task of this request may have changed parts since.
        """
        old, before = self._session, sent
        if session is not None and old is not None and session is not old:
            if sent is not None and session.data is not old.data:
                before = Snapshot.of(session.data, session.metadata)
                late = Changes(sent, old.data, old.metadata)
                session.data = late.apply(session.data, session.metadata)
            session.data = refill(old.data, session.data)
            session.metadata = refill(old.metadata, session.metadata)
        self._session, self.is_stored = session, session is not None
        self.principal = None if session is None else session.principal
        self._wants_rotation, self._next_id = False, ""
        if self.accessed:
            self._before = before or self._snapshot()

    def _snapshot(self) -> Snapshot:
        return Snapshot.of(self.session.data, self.session.metadata)

    def _changes(self) -> Changes:
        before = self._before or self._snapshot()
        return Changes(before, self.session.data, self.session.metadata)
