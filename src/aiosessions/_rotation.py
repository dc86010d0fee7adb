"""The move of a session to a new id: two writes, and a way back from each.

    step                                     a crash after this step leaves
    1  store the new session (ABSENT)        the old id as it was
    2  mark the old one (UNCHANGED)          the old id read-only until the mark expires
    3  admit the new one, under a limit      the same
    4  without grace: remove the old one     only the new id

Invariants:

- Until step 2 succeeds, the old id is the session. A save, a delete or another rotation under the
  old id makes step 2 fail.
- A rotation that raises has deleted the new session and restored the old one, unless the storage
  cannot be reached. Refused writes, lost replies and cancellation are all covered. The exception is
  a cancellation during step 4: then the rotation is complete, and only the new id is left.
- Every mark is random, so a rotation recognises its own mark after a lost reply. Step 4 is a
  separate write for that reason: a missing record may also mean that the session was deleted.
- Steps 2 and 4 and the restoring write are conditional on the revision, so they never bring back a
  session that another client has deleted.
"""

import asyncio
import contextlib
import copy
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import anyio

from ._lifetime import LATEST
from .errors import (
    InvalidSession,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionNotFound,
    SessionRotated,
    StorageClosed,
    StorageUnavailable,
)
from .record import EXISTS, ROTATED_KEY, seal
from .session import D, Session, as_utc, revised
from .storage import Storage, When

T = TypeVar("T")

ROTATED = "the id was rotated away; the session continues under its new id"
# The clocks of replicas differ, so a deadline that must have passed lies far in the past.
_LONG_AGO = datetime.fromtimestamp(0, UTC)
# The lifetime of a mark without grace. It outlives a lost reply, so the mark can be recognised.
_MARK_LIFETIME = timedelta(seconds=60)
# The longest time to remove a mark, or to undo a rotation that failed, in seconds.
_TIMEOUT = 5.0


def check_metadata(metadata: Mapping[str, str] | None) -> None:
    """Check that an application does not use the key of the mark.

    Raises:
        InvalidSession: It does.
    """
    if metadata and ROTATED_KEY in metadata:
        raise InvalidSession(f"the metadata key {ROTATED_KEY} is reserved")


async def move(  # noqa: C901 - one step after another, each with its way back
    storage: Storage[D],
    old: Session[D],
    draft: Session[D],
    now: datetime,
    grace: timedelta,
    *,
    drawn: bool,
    admit: Callable[[], Awaitable[object]],
) -> Session[D]:
    """Store the draft as a new session; then make `old` read-only for `grace`, or remove it.

    Args:
        storage: The storage of both.
        old: The session as it is stored, with its revision.
        draft: The content of the new session, with its id. It is left unchanged.
        now: The current time.
        grace: The time for which the old id still answers; 0 to remove it.
        drawn: True if the new id is random, so that only this call can have stored it.
        admit: Makes room for the new session. If it raises, the rotation is undone.

    Returns:
        The new session. It was created when `old` was, and ends no later.

    Raises:
        SessionRotated: Another rotation was faster.
        SessionConflict: The old session was written since it was loaded.
        SessionNotFound: The old session was deleted, or has expired.
        SessionExists: There is a session with the new id.
        InvalidSession: One of the sessions cannot be stored.
        StorageUnavailable: The storage cannot be reached.
    """
    if draft.id == old.id:
        raise SessionExists(EXISTS)
    ends = [as_utc(end, "expires_at") for end in (old.expires_at, draft.expires_at) if end]
    new = revised(
        draft,
        metadata=copy.copy(draft.metadata),
        created_at=old.created_at,
        updated_at=now,
        expires_at=min(ends, default=None),
    )
    marked = revised(
        old,
        metadata=old.metadata | {ROTATED_KEY: secrets.token_urlsafe(12)},
        expires_at=min(now + min(grace or _MARK_LIFETIME, LATEST - now), old.expires_at or LATEST),
    )
    codec: Any = getattr(storage, "codec", None)
    if codec is not None:
        # The mark makes the record longer. If it becomes too long, fail before the first write.
        seal(marked, codec)
    try:
        await storage.store(new, when=When.ABSENT)
    except BaseException as error:
        if in_doubt(error):
            await take_back(storage, new, drawn=drawn)
        raise
    removed = False

    async def remove_old() -> None:
        nonlocal removed
        await _remove_marked(storage, marked)
        removed = True

    try:
        await _mark(storage, marked)
        await admit()
        if not grace:
            await _to_the_end(remove_old)
    except GeneratorExit:  # the coroutine is being closed, so it cannot wait for anything
        raise
    except BaseException as error:
        if removed:  # the rotation is complete, and its caller cancelled
            raise
        undo = partial(_undo, storage, old, new, marked)
        if await _to_the_end(undo) and isinstance(error, SessionConflict):
            raise SessionRotated(ROTATED) from None
        raise
    return new


async def take_back(storage: Storage[D], new: Session[D], *, drawn: bool) -> None:
    """Delete a new session, because its caller gets an error. Not cancellable.

    Args:
        storage: The storage of the session.
        new: The session.
        drawn: As for `move`. False if another client's session may have the id.
    """
    await _to_the_end(partial(_discard, storage, new, drawn=drawn))


async def remove(storage: Storage[D], session: Session[D]) -> None:
    """Remove a session if it was not written since: store it with a deadline in the past.

    Raises:
        SessionConflict: It was written since.
        SessionNotFound: The session does not exist.
        InvalidSession: It cannot be stored; the deadline may make it too large.
        StorageUnavailable: The storage cannot be reached.
    """
    removed = revised(session, expires_at=_LONG_AGO)
    await storage.store(removed, when=When.UNCHANGED)


async def explain(storage: Storage[D], conflict: SessionConflict, id: str) -> SessionConflict:
    """Return `SessionRotated` if the conflict is due to a rotation, else the conflict."""
    found = await _look(storage, id)
    if isinstance(found, Session) and ROTATED_KEY in found.metadata:
        return SessionRotated(ROTATED)
    return conflict


async def _to_the_end(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Await work to its end; then raise a cancellation that has come in between.

    A shield of anyio does not hold back `asyncio.Task.cancel`, which `asyncio.timeout` uses.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        loop = None
    if loop is None:
        with anyio.CancelScope(shield=True):  # enough on trio
            return await work()
        raise AssertionError  # pragma: no cover - a shield swallows no exception
    task = loop.create_task(work(), name="aiosessions: rotation")
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            with anyio.CancelScope(shield=True):
                await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    with contextlib.suppress(BaseException):
        task.result()
    raise cancelled


async def _mark(storage: Storage[D], marked: Session[D]) -> None:
    """Store the mark over the old session; if the reply was lost, look whether it is there."""
    try:
        await storage.store(marked, when=When.UNCHANGED)
    except Exception as error:
        found = await _look(storage, marked.id) if in_doubt(error) else None
        if not isinstance(found, Session) or found.metadata != marked.metadata:
            raise
        marked.revision = found.revision


async def _remove_marked(storage: Storage[D], marked: Session[D]) -> None:
    """Remove the old session. The caller awaits this to its end: it cannot be taken back."""
    with anyio.move_on_after(_TIMEOUT, shield=True):
        try:
            await remove(storage, marked)
        except Exception as error:
            gone = in_doubt(error) and isinstance(await _look(storage, marked.id), SessionNotFound)
            if not gone:
                raise
        return
    message = "the storage did not remove the old session in time"
    raise StorageUnavailable(message, in_doubt=True)


async def _look(storage: Storage[D], id: str) -> Session[D] | SessionError:
    try:
        return await storage.load(id)
    except SessionError as error:
        return error


async def _undo(storage: Storage[D], old: Session[D], new: Session[D], marked: Session[D]) -> bool:
    """Restore the old session if it has our mark, and delete the new one. Not cancellable.

    Returns:
        Whether the old session has the mark of another rotation.
    """
    found = old
    with anyio.move_on_after(_TIMEOUT, shield=True):
        # The old session first: a crash in between must not leave the client without a session.
        with contextlib.suppress(Exception):
            found = await storage.load(old.id)
            if found.metadata == marked.metadata:
                restored = revised(old, revision=found.revision)
                await storage.store(restored, when=When.UNCHANGED)
        with contextlib.suppress(Exception):
            await storage.delete(new.id)
    return ROTATED_KEY in found.metadata and found.metadata != marked.metadata


async def _discard(storage: Storage[D], new: Session[D], *, drawn: bool) -> None:
    """Delete the new session if this call has stored it."""
    with anyio.move_on_after(_TIMEOUT, shield=True), contextlib.suppress(Exception):
        if not drawn:
            # Under an id that the caller named, there may be the session of another client.
            found = await storage.load(new.id)
            if (found.created_at, found.updated_at) != (new.created_at, new.updated_at):
                return
        await storage.delete(new.id)


def in_doubt(error: BaseException) -> bool:
    """Whether a write that raised this error may have been applied, and can be undone."""
    if isinstance(error, StorageUnavailable | StorageClosed):
        return error.in_doubt
    return not isinstance(error, SessionError | GeneratorExit)
