"""The stored form: a header that needs no parsing, then the codec's payload.

    offset  length  field
    0       1       format: "1" without a principal, "2" with one, "3" with one and rotated away
    1       16      revision: 64 random bits, ".", 24 bits that check the principal
    17      15      deadline: `expires_at` in milliseconds since the epoch, zero-padded;
                    "999999999999999" for none
    32      15      formats 2 and 3: the lease, the time until which the index of the principal
                    has an entry of the session, in milliseconds since the epoch
    47      32      formats 2 and 3: the digest of the principal
    32, 79  ...     the codec's payload, with the digest of the id in place of the id

The header is ASCII at fixed offsets, so that a script on the server can read it with one GETRANGE.
docs/stored-form.md explains the layout and the rules for changing it; golden files in the tests pin
it.

Invariant: a record is either read whole or refused with `CorruptSession`. That covers bytes that
are not a record, a newer format, and a session that is stored under the id of another session.
"""

import secrets
from base64 import urlsafe_b64encode
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

from .errors import CorruptSession, InvalidSession, SessionError, SessionNotFound
from .session import (
    D,
    Session,
    SessionInfo,
    as_utc,
    check_id,
    epoch_milliseconds,
    revised,
    session_digest,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .codec import Codec

ROTATED_KEY = "aiosessions.rotated"
"""The metadata key that marks a session under an id that was rotated away; its value is random."""

# Every storage uses the same words.
NOT_FOUND = "there is no such session, or it has expired"
EXISTS = "there is a session with this id"
CHANGED = "the session was written since it was loaded"

PLAIN, OWNED, ROTATED = b"1", b"2", b"3"
HEADER_BYTES = 79
NO_DEADLINE = 999_999_999_999_999
_PLAIN_HEADER_BYTES = 32
_REVISION = slice(1, 17)
_DEADLINE = slice(17, 32)
_LEASE = slice(32, 47)
_OWNER = slice(47, 79)
_NEVER = b"%d" % NO_DEADLINE


def seal(session: Session[D], codec: "Codec[D]") -> tuple[str, int, bytes]:
    """Make the record of a session under a fresh revision, and leave the session unchanged.

    Returns:
        The revision, the deadline in milliseconds since the epoch, and the record.

    Raises:
        InvalidSession: The session cannot be stored.
        TypeError: `session` is not a `Session`.
    """
    payload, deadline = encode(session, codec)
    revision = _revision(secrets.token_urlsafe(8), session.principal)
    if session.principal is None:
        header = b"%b%b%015d" % (PLAIN, revision.encode(), deadline)
    else:
        owner = principal_digest(session.principal).encode()
        format = ROTATED if ROTATED_KEY in session.metadata else OWNED
        header = b"%b%b%015d%b%b" % (format, revision.encode(), deadline, _NEVER, owner)
    return revision, deadline, header + payload


def encode(session: Session[D], codec: "Codec[D]") -> tuple[bytes, int]:
    """Encode a session with its digest in place of its id, and leave the session unchanged.

    Returns:
        The payload, and the deadline in milliseconds since the epoch.

    Raises:
        InvalidSession: The session cannot be stored.
        TypeError: `session` is not a `Session`.
    """
    if type(session) is not Session:
        if not isinstance(session, Session):
            raise TypeError(f"a session is a Session, not {type(session).__name__}")
        raise InvalidSession(
            f"{type(session).__name__} is a subclass of Session, and its fields would be lost; "
            "use Session, with the fields in its data"
        )
    check_id(session.id)
    if not isinstance(session.revision, str):
        raise InvalidSession(f"a revision is a str, not {type(session.revision).__name__}")
    if not isinstance(session.principal, str | None):
        raise InvalidSession(f"a principal is a str, not {type(session.principal).__name__}")
    expires_at = session.expires_at and as_utc(session.expires_at, "expires_at")
    stored = revised(
        session,
        created_at=as_utc(session.created_at, "created_at"),
        updated_at=as_utc(session.updated_at, "updated_at"),
        expires_at=expires_at,
        revision="",  # only the header holds it
        id=session.digest,
    )
    try:
        return bytes(codec.encode(stored)), _milliseconds_of(expires_at)
    except SessionError:
        raise
    except Exception as error:  # noqa: BLE001 - a codec of the application's own raises anything
        # Without a chain: the text of the error may quote the payload.
        raise InvalidSession(f"the codec failed with {type(error).__name__}") from None


def unseal(record: bytes, id: str, codec: "Codec[D]", now: "Callable[[], int]") -> Session[D]:
    """Read the record that is stored under `id`.

    Args:
        record: The stored bytes.
        id: The id that the caller asked for.
        codec: The codec that encoded the payload.
        now: Returns milliseconds since the epoch; called only for a session with a deadline.

    Raises:
        SessionNotFound: The session is past its deadline.
        CorruptSession: The record cannot be read, or it holds another session.
    """
    session = read(record, session_digest(id), codec, now)
    session.id = id
    return session


def read(record: bytes, digest: str, codec: "Codec[D]", now: "Callable[[], int]") -> Session[D]:
    """As `unseal`, by the digest of the id. The session has the digest in place of its id."""
    deadline, format = NO_DEADLINE, record[:1]
    # The most frequent headers first: they need no number.
    if record[_DEADLINE] != _NEVER or not (
        format == PLAIN or (format == OWNED and record[_LEASE].isdigit())
    ):
        deadline = deadline_of(record)
        if deadline != NO_DEADLINE and deadline <= now():
            raise SessionNotFound(NOT_FOUND)
    start, owner = _PLAIN_HEADER_BYTES, b""
    if format != PLAIN:
        start, owner = HEADER_BYTES, record[_OWNER]
    try:
        session = codec.decode(record[start:])
        problem = _mismatch(session, digest, owner, deadline)
    except SessionError:
        record = b""  # error trackers record the locals of this frame
        raise
    except Exception as error:  # noqa: BLE001 - a codec of the application's own raises anything
        record = b""
        raise CorruptSession(f"the codec failed with {type(error).__name__}") from None
    if problem:
        record, session = b"", None  # type: ignore[assignment]
        raise CorruptSession(problem)
    session.revision = revision_of(record)
    return session


def _mismatch(session: Session[D], digest: str, owner: bytes, deadline: int) -> str:
    """The contradiction between a record and its payload, which a codec may authenticate."""
    if session.id != digest:
        return "the record under this id holds another session"
    if owner != (
        b"" if session.principal is None else principal_digest(session.principal).encode()
    ):
        return "the header of the record has another principal than the session"
    if deadline != _milliseconds_of(session.expires_at):
        return "the header of the record has another deadline than the session"
    return ""


def _milliseconds_of(expires_at: datetime | None) -> int:
    """A deadline as a header has it."""
    return NO_DEADLINE if expires_at is None else max(0, epoch_milliseconds(expires_at))


def read_info(record: bytes, digest: str, codec: "Codec[D]") -> SessionInfo[D]:
    """The entry of a live record in the list of its principal.

    Raises:
        CorruptSession: The record cannot be read, or it holds another session.
    """
    session = read(record, digest, codec, now=lambda: 0)
    return SessionInfo(
        digest=digest,
        kind=session.kind,
        principal=session.principal,
        metadata=session.metadata,
        data=session.data,
        created_at=session.created_at,
        updated_at=session.updated_at,
        expires_at=session.expires_at,
    )


def deadline_of(record: bytes) -> int:
    """The deadline of a record, in milliseconds since the epoch.

    Raises:
        CorruptSession: The bytes are not a record, or a record of a newer format.
    """
    deadline = record[_DEADLINE]
    format = record[:1]
    if len(deadline) == 15 and deadline.isdigit():
        if format == PLAIN:
            return int(deadline)
        if format in (OWNED, ROTATED) and len(record) >= HEADER_BYTES and record[_LEASE].isdigit():
            return int(deadline)
    if format.isdigit() and format > ROTATED:
        message = f"the stored session has format {format.decode()}; this release reads 1 to 3"
    else:
        message = "the stored value is not a session record"
    raise CorruptSession(message)


def revision_of(record: bytes) -> str:
    """The revision of a record with a valid header."""
    return record[_REVISION].decode("ascii", "replace")


def lease_of(record: bytes) -> int:
    """The lease of a record with a principal, in milliseconds since the epoch."""
    return int(record[_LEASE])


def owner_of(record: bytes) -> bytes:
    """The digest of the principal of a record with a principal."""
    return record[_OWNER]


def is_rotated(record: bytes) -> bool:
    """Whether a record with a principal is under an id that was rotated away."""
    return record[:1] == ROTATED


@lru_cache(maxsize=4096)
def principal_digest(principal: str) -> str:
    """32 hexadecimal digits that stand for a principal in a header and in the key of its index."""
    return sha256(b"principal:" + principal.encode(errors="surrogatepass")).hexdigest()[:32]


def is_written_for(revision: str, principal: str | None) -> bool:
    """Whether `seal` made a revision for this principal."""
    return revision == _revision(revision[:11], principal)


def _revision(random: str, principal: str | None) -> str:
    """A revision that fits one principal, so that a changed one is seen without a load."""
    text = random if principal is None else f"{random}={principal}"
    check = sha256(text.encode(errors="surrogatepass")).digest()[:3]
    return f"{random}.{urlsafe_b64encode(check).decode()}"
