"""The session of one request: what the application sees of it, and how its changes are stored.

Invariants:

- The id that a client presents is used only if there is a session under it.
- Nothing is stored before something is set, and then before the head of the response leaves.
- A principal is set only under a new id, and only if the response succeeds.
- After a conflict, the parts that this request has changed are set again in the fresh session.
"""

import copy
from collections.abc import Awaitable, Callable, Generator, Iterator, MutableMapping
from datetime import datetime, timedelta
from typing import Any, Generic, Literal, Self

from ..errors import InvalidSessionId, SessionConflict, SessionNotFound, SessionRotated
from ..manager import ROTATED_KEY, SessionManager
from ..session import D, Session, new_session_id
from ._changes import Changes, Snapshot
from ._decision import Outcome, Signals, decide

HEAD_LEFT = "the head of the response has left, so the client cannot get a new id any more"


class WebSession(Generic[D]):
    """The session of one request or WebSocket.

    `get_session(request)` returns it. It exists also for a visitor without a stored session; a
    session is stored when something is set.

    Attributes:
        data: The application's data. For a new session, empty data.
        metadata: Small string pairs.
    """

    def __init__(
        self,
        sessions: SessionManager[D],
        presented: str | None,
        *,
        kind: str,
        empty: Callable[[], D],
        ttl: float | None,
        on_conflict: Literal["merge", "error"],
        now: Callable[[], datetime],
    ) -> None:
        self._sessions = sessions
        self._presented = presented
        self._kind = kind
        self._empty = empty
        self._ttl = ttl
        self._merges = on_conflict == "merge"
        self._now = now
        self._is_loaded = False  # whether the storage was asked
        self._unknown = False
        self._accessed = False
        self._head_left = False
        self._issued = False
        self._deleted = False
        self._wants_rotation = False
        self._next_id = ""
        self._adopt(None)

    # The application's view.

    @property
    def id(self) -> str:
        """The id that the client has after this response."""
        self._touch()
        return self._next_id or self._session.id

    @property
    def is_new(self) -> bool:
        """Whether there is no stored session yet."""
        self._touch()
        return not self._stored

    @property
    def principal(self) -> str | None:
        """The owner. Another one is stored with a new id, when the response succeeds."""
        self._touch()
        return self._principal

    @principal.setter
    def principal(self, principal: str | None) -> None:
        self._touch()
        if self._head_left:
            raise RuntimeError(HEAD_LEFT)
        self._principal = principal
        self._draw()

    @property
    def metadata(self) -> dict[str, str]:
        """Small string pairs."""
        self._touch()
        return self._session.metadata

    @property
    def data(self) -> D:
        """The application's data."""
        self._touch()
        return self._session.data

    @data.setter
    def data(self, data: D) -> None:
        self._touch()
        self._session.data = data

    @property
    def created_at(self) -> datetime:
        """The time of the session's creation."""
        self._touch()
        return self._session.created_at

    async def load(self) -> "WebSession[D]":
        """Load the session, if the middleware has not done it (`lazy=True`).

        Raises:
            CorruptSession: The stored record cannot be read.
            StorageUnavailable: The storage cannot be reached.
        """
        if self._is_loaded:
            return self
        found: Session[D] | None = None
        if self._presented is not None:
            try:
                found = await self._sessions.get(self._presented)
            except (SessionNotFound, InvalidSessionId):
                self._unknown = True
        self._is_loaded = True
        self._adopt(found)
        return self

    async def save(self) -> None:
        """Store the changes now, as at the begin of a response that succeeds.

        Raises:
            SessionConflict: The session was written since, and `on_conflict` is "error".
            SessionRotated: The session has a new id by now, which another response has issued.
            RuntimeError: The head of the response has left, and a new id would be needed.
        """
        await self.load()
        await self.carry_out(self.decide())

    def rotate(self) -> "Awaitable[None]":
        """Give the session a new id, now if awaited, else when the response succeeds."""
        self._touch()
        if self._head_left:
            raise RuntimeError(HEAD_LEFT)
        self._wants_rotation = True
        self._draw()
        return _Later(self.save)

    def delete(self) -> "Awaitable[None]":
        """Delete the session, now if awaited, else before the response."""
        self._deleted = True
        return _Later(self.save)

    async def revoke_all(self, *, keep: bool = False) -> int:
        """Delete all sessions of this principal: sign out everywhere.

        Args:
            keep: Whether to keep this session, to sign out everywhere else.

        Returns:
            The number of deleted sessions.

        Raises:
            NotImplementedError: The storage has no index of principals.
        """
        await self.load()
        principal = self._session.principal
        if principal is None:
            return 0
        number = await self._sessions.revoke_all(principal, keep=self._session.id if keep else None)
        if not keep:
            self._deleted = True
        return number

    # For the middleware.

    @property
    def is_loaded(self) -> bool:
        """Whether the storage was asked."""
        return self._is_loaded

    @property
    def accessed(self) -> bool:
        """Whether the application has looked at the session."""
        return self._accessed

    def decide(self, status: int = 200, *, broken: bool = False) -> Outcome:
        """Decide what becomes of the session, for a response with this status."""
        changed = self._is_loaded and bool(self._changes())
        new_rights = self._principal != self._session.principal or self._wants_rotation
        return decide(
            Signals(
                loaded=self._stored,
                unknown=self._unknown,
                changed=changed,
                new_rights=new_rights and (self._stored or self._principal is not None),
                deleted=self._deleted,
                failed=status >= 400 or broken,
                broken=status >= 500 or broken,
                due=self._is_due(),
            )
        )

    async def carry_out(self, outcome: Outcome, *, rights: bool = True) -> None:
        """Do what was decided, without the headers."""
        if outcome in (Outcome.CREATE, Outcome.ROTATE) and self._head_left:
            raise RuntimeError(HEAD_LEFT)
        if outcome is Outcome.CREATE:
            await self._create(rights=rights)
        elif outcome is Outcome.SAVE:
            await self._save()
        elif outcome is Outcome.ROTATE:
            await self._rotate()
        elif outcome is Outcome.DELETE:
            await self._sessions.delete(self._session.id)
            self._adopt(None)
            self._unknown = True  # the client forgets the id

    @property
    def is_unknown(self) -> bool:
        """Whether the client holds an id without a session."""
        return self._unknown

    @property
    def session(self) -> Session[D] | None:
        """The stored session."""
        return self._session if self._stored else None

    @property
    def has_news(self) -> bool:
        """Whether the client has to learn an id."""
        return self._issued

    def max_age(self) -> int:
        """Seconds for which the client may keep the id."""
        ends = [self._ttl] if self._ttl is not None else []
        if self._session.expires_at is not None:
            ends.append((self._session.expires_at - self._now()).total_seconds())
        return max(0, int(min(ends, default=0)))

    def head_leaves(self) -> None:
        """From now on the client cannot get a new id."""
        self._head_left = True

    def check_unchanged(self) -> None:
        """Check that nothing was changed after the head has left.

        Raises:
            RuntimeError: Something was.
        """
        if self._is_loaded and not self._deleted and self._changes():
            raise RuntimeError(
                "the session was changed after the head of the response had left: it is not stored"
            )

    async def is_alive(self) -> bool:
        """Load the stored session, to renew its TTL, and return whether it is still there."""
        try:
            await self._sessions.get(self._session.id)
        except SessionNotFound:
            return False
        return True

    def _touch(self) -> None:
        if not self._is_loaded:
            raise RuntimeError("the session is not loaded: `await get_session(request).load()`")
        self._accessed = True

    def _draw(self) -> None:
        if self._stored and not self._next_id:
            self._next_id = new_session_id()

    def _adopt(self, session: Session[D] | None) -> None:
        """Go on with a stored session, or with an empty one."""
        self._stored = session is not None
        self._session = session or Session(id=new_session_id(), kind=self._kind, data=self._empty())
        self._principal = self._session.principal
        self._before = Snapshot.of(self._session.data, self._session.metadata)
        self._next_id = ""
        self._wants_rotation = self._deleted = False

    def _changes(self) -> Changes:
        return Changes(self._before, self._session.data, self._session.metadata)

    def _is_due(self) -> bool:
        """Whether half of the TTL has passed since a response has issued the id."""
        if self._ttl is None or not self._stored or ROTATED_KEY in self._session.metadata:
            return False
        age: timedelta = self._now() - self._session.updated_at
        return age.total_seconds() >= self._ttl / 2

    async def _create(self, *, rights: bool) -> None:
        draft = self._session
        stored = await self._sessions.create(
            kind=self._kind,
            principal=self._principal if rights else None,
            metadata=draft.metadata,
            data=draft.data,
            id=draft.id,
        )
        self._adopt(stored)
        self._issued, self._unknown = True, False

    async def _save(self) -> None:
        changes = self._changes()
        try:
            try:
                await self._sessions.save(self._session)
                saved = self._session
            except SessionRotated:
                raise
            except SessionConflict:
                if not self._merges:
                    raise
                saved = await self._sessions.mutate(self._session.id, _applying(changes))
        except SessionNotFound:  # a deleted session stays deleted
            self._gone()
            return
        self._adopt(saved)
        self._issued = not self._head_left

    async def _rotate(self) -> None:
        changes, principal = self._changes(), self._principal
        apply = _applying(changes)

        def change(session: Session[D]) -> None:
            apply(session)
            session.principal = principal

        try:
            moved = await self._sessions.rotate(self._session.id, change, new_id=self._next_id)
        except SessionNotFound:
            # Someone has deleted the session. Its data is gone; the new rights are not.
            fresh: Session[D] = Session(id=new_session_id(), kind=self._kind, data=self._empty())
            change(fresh)
            self._adopt(None)
            self._session, self._principal = fresh, principal
            await self._create(rights=True)
            return
        self._adopt(moved)
        self._issued = True

    def _gone(self) -> None:
        self._adopt(None)
        self._unknown = True


class _Later:
    """An awaitable that need not be awaited."""

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work = work

    def __await__(self) -> Generator[Any, None, None]:
        return self._work().__await__()


def _applying(changes: Changes) -> "Callable[[Session[Any]], None]":
    def apply(session: Session[Any]) -> None:
        session.data = changes.apply(session.data, session.metadata)

    return apply


class SessionMapping(MutableMapping[str, Any]):
    """`scope["session"]`: the data of a session, if it is a dict with strings as keys."""

    def __init__(self, session: WebSession[Any]) -> None:
        self._session = session

    @property
    def _data(self) -> dict[str, Any]:
        data = self._session.data
        if not isinstance(data, dict):
            raise TypeError(
                f"the session's data is a {type(data).__name__}; use get_session(request).data"
            )
        return data

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._data[key] = value

    def __delitem__(self, key: str) -> None:
        del self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __ior__(self, other: Any) -> Self:
        self._data.update(other)
        return self

    def __or__(self, other: Any) -> dict[str, Any]:
        return self._data | dict(other)

    def copy(self) -> dict[str, Any]:
        """A shallow copy of the data."""
        return copy.copy(self._data)

    def __repr__(self) -> str:
        return f"<session with {len(self)} keys>"
