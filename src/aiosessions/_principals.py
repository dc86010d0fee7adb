"""The owner of a session, and the storages that find the sessions of an owner."""

from hmac import compare_digest
from typing import cast

from msgspec import UNSET, UnsetType

from .errors import InvalidSession, SessionNotFound
from .record import NOT_FOUND, is_written_for
from .session import D, Session
from .storage import IndexedStorage, Storage, check_principal

Owner = str | UnsetType | None
"""The owner that a session must have; None for no owner; UNSET for any."""

_CALLS = "list", "count", "revoke", "revoke_all", "trim"
MOVED = "a session keeps its principal; `rotate` with a change gives a new session another one"


def check_owner_type(principal: Owner) -> None:
    """Check the type of an argument.

    Raises:
        TypeError: It is neither a string nor None.
    """
    if principal is not None and principal is not UNSET:
        check_principal(principal)


def check_owner(session: Session[D], principal: Owner) -> None:
    """Check that a session belongs to the caller, in constant time.

    Raises:
        SessionNotFound: It does not. The caller must not learn that the id exists.
    """
    if principal is UNSET:
        return
    one, other = session.principal, principal
    if one is None or other is None:
        is_hers = one is other
    else:
        is_hers = compare_digest(*(each.encode(errors="surrogatepass") for each in (one, other)))
    if not is_hers:
        raise SessionNotFound(NOT_FOUND)


async def check_unmoved(storage: Storage[D], session: Session[D]) -> None:
    """Check that a session still has the principal under which it was stored.

    The revision of one of this package's records tells without a load.

    Raises:
        InvalidSession: It has another one.
        SessionNotFound: It was loaded, and is gone.
    """
    if not session.revision:  # it matches no stored revision
        return
    if is_written_for(session.revision, session.principal):
        return
    # Its owner has changed, or another storage made the revision.
    stored = await storage.load(session.id)
    if stored.principal != session.principal:
        raise InvalidSession(MOVED)


def indexed(storage: Storage[D]) -> IndexedStorage[D]:
    """The storage, if it finds the sessions of a principal.

    Raises:
        NotImplementedError: It does not.
    """
    if all(callable(getattr(storage, call, None)) for call in _CALLS):
        return cast("IndexedStorage[D]", storage)
    raise NotImplementedError(
        f"{type(storage).__name__} has no index of principals: list, count, revoke, revoke_all and "
        "max_per_principal need an IndexedStorage"
    )
