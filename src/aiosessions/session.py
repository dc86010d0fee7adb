"""The session and the rules for its id.

Invariants:

- The id is a credential. Messages, log lines and reprs never hold the id, `principal` or the
  payload. They show the first digits of the digest, which relate two log lines and open nothing.
- A storage keeps the digest in place of the id, so nobody can read an id from a server.
- Dates are aware and in UTC. Storing a naive date is an error, because its zone is unknown.
"""

import copy
import re
import secrets
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any, Generic

import msgspec

from .errors import InvalidSession, InvalidSessionId

if TYPE_CHECKING:  # a default makes `Session` mean `Session[Any]`; at run time that is 3.13's
    from typing_extensions import TypeVar

    D = TypeVar("D", default=Any)
    E = TypeVar("E", default=Any)  # for class methods of the bare class, which has no D yet
else:
    from typing import TypeVar

    D = TypeVar("D")
    E = TypeVar("E")

_AwareDatetime = Annotated[datetime, msgspec.Meta(tz=True)]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
# A compiled pattern's bound method: the cheapest check of an id there is in pure Python.
_is_id = re.compile(r"[\x21-\x7e]{1,256}", re.ASCII).fullmatch


def utc_now() -> datetime:
    """The current time, aware and in UTC."""
    return datetime.now(UTC)


class _Stored:
    """A slot beside the fields of a session, which is not compared, shown or encoded.

    A codec keeps there the payload from which it decoded the session, so that a save can keep the
    fields that the data type does not know. The value beside the payload is equal for codecs
    with the same format and data type. Copies of the session share both.
    """

    __slots__ = ("_stored",)
    _stored: tuple[bytes, object]


class Session(_Stored, msgspec.Struct, Generic[D], kw_only=True, omit_defaults=True):
    """One client's session.

    Attributes:
        id: 1 to 256 visible ASCII characters (0x21 to 0x7E). A credential.
        kind: The sort of session ("mcp", "sse", "web", ...); any string.
        principal: The owner, if known.
        metadata: Small string pairs.
        data: The application's own payload, of the data type of the storage's codec.
        created_at: The time of its creation (aware, UTC).
        updated_at: The time of its last change (aware, UTC).
        expires_at: The absolute deadline (aware, UTC), or None. No activity carries a session past
            it; it has a resolution of one millisecond, rounded down.
        revision: Opaque. Every successful write stamps a new one, in place, on the caller's object.
        digest: The digest of the id, which is not a credential; see `session_digest`.
    """

    id: str
    kind: str = ""
    principal: str | None = None
    metadata: dict[str, str] = {}
    # None is the default whatever D is; a codec whose data type has no None refuses it.
    data: D = None  # type: ignore[assignment]
    created_at: _AwareDatetime = msgspec.field(default_factory=utc_now)
    updated_at: _AwareDatetime = msgspec.field(default_factory=utc_now)
    expires_at: _AwareDatetime | None = None
    revision: str = ""

    @property
    def digest(self) -> str:
        """The digest of the id: 32 hexadecimal digits."""
        # Of a malformed id, too, because a repr never fails.
        return sha256(str(self.id).encode(errors="replace")).hexdigest()[:32]

    # The methods of msgspec.Struct would lose the stored payload.
    def __copy__(self) -> "Session[D]":
        return revised(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Session[D]":
        new = memo[id(self)] = revised(self)
        for name in self.__struct_fields__:
            setattr(new, name, copy.deepcopy(getattr(self, name), memo))
        return new

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"Session({fields})"

    # rich defines this name. The method of msgspec.Struct would print every field.
    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [
            ("digest", self.digest[:8]),
            ("kind", self.kind),
            ("expires_at", self.expires_at),
            # The rest of the revision depends on the principal.
            ("revision", self.revision[:11]),
        ]


class SessionInfo(msgspec.Struct, Generic[D], kw_only=True, frozen=True):
    """A session as a list of a principal's sessions shows it: without the id and the revision.

    Attributes:
        digest: The digest of the id: 32 hexadecimal digits.
        kind: The sort of session.
        principal: The owner.
        metadata: Small string pairs.
        data: The application's own payload.
        created_at: The time of its creation (aware, UTC).
        updated_at: The time of its last change (aware, UTC).
        expires_at: The absolute deadline (aware, UTC), or None.
    """

    digest: str
    kind: str
    principal: str | None
    metadata: dict[str, str]
    data: D
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"SessionInfo({fields})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [
            ("digest", self.digest[:8]),
            ("kind", self.kind),
            ("expires_at", self.expires_at),
        ]


def revised(session: Session[D], **changes: Any) -> Session[D]:
    """A copy of a session with changed fields, which keeps unknown fields when it is saved.

    `msgspec.structs.replace` does not: its copy has only the fields of the session.
    """
    new = msgspec.structs.replace(session, **changes)
    if (stored := stored_form(session)) is not None:
        new._stored = stored  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return new


def stored_form(session: Session[Any]) -> tuple[bytes, object] | None:
    """The payload that a session was decoded from, and its origin; see `_Stored`."""
    return getattr(session, "_stored", None)


def new_session_id() -> str:
    """A new session id: 256 bits from `secrets`, URL-safe, 43 characters.

    OWASP's Session Management Cheat Sheet asks for at least 64 bits of entropy.
    """
    return secrets.token_urlsafe(32)


def check_id(id: str) -> None:
    """Check that a string can be a session id.

    Raises:
        InvalidSessionId: `id` is not 1 to 256 visible ASCII characters (0x21 to 0x7E).
        TypeError: `id` is not a string.
    """
    if not isinstance(id, str):
        message = f"a session id is a str, not {type(id).__name__}"
        raise TypeError(message)
    if _is_id(id):
        return
    if not id:
        message = "a session id cannot be empty"
    elif len(id) > 256:
        message = f"a session id has at most 256 characters, not {len(id)}"
    else:
        message = "a session id has only visible ASCII characters (0x21 to 0x7E)"
    raise InvalidSessionId(message)


def session_digest(id: str) -> str:
    """The digest that stands for an id on servers, in lists, logs and reprs.

    It is not a credential: the id cannot be computed from it.

    Returns:
        32 hexadecimal digits: the first 128 bits of the SHA-256 of the id (FIPS 180-4).

    Raises:
        InvalidSessionId: The id is malformed.
        TypeError: `id` is not a string.
    """
    check_id(id)
    return sha256(id.encode()).hexdigest()[:32]


def as_utc(moment: datetime, what: str) -> datetime:
    """The same moment in UTC.

    Raises:
        InvalidSession: `moment` is not a datetime, or it is naive. The message calls it `what`.
    """
    if not isinstance(moment, datetime):
        message = f"{what} is a datetime, not {type(moment).__name__}"
        raise InvalidSession(message)
    if moment.tzinfo is UTC:
        return moment
    if moment.utcoffset() is None:
        message = f"{what} is a naive datetime; use an aware one, such as datetime.now(UTC)"
        raise InvalidSession(message)
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        message = f"{what} is outside the years 1 to 9999 in UTC"
        raise InvalidSession(message) from None


def epoch_milliseconds(moment: datetime) -> int:
    """Milliseconds since the epoch, rounded down, exactly (floats are not exact here)."""
    return (moment - _EPOCH) // _MILLISECOND
