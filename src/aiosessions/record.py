"""The stored form: a header that needs no parsing, then the codec's payload.

    offset  length  field
    0       1       format version, "1"
    1       16      revision: 96 random bits in URL-safe base64
    17      15      deadline: `expires_at` in milliseconds since the epoch, zero-padded;
                    "999999999999999" for none
    32      ...     the codec's payload

The header is ASCII at fixed offsets, so that a script on the server can read the revision and the
deadline with one GETRANGE. docs/stored-form.md explains the layout and the rules for changing it;
golden files in the tests pin it.

Invariant: a record is either read whole or refused with `CorruptSession`. That covers bytes that
are not a record, a newer format, and a session that is stored under the id of another session.
"""

import secrets
from typing import TYPE_CHECKING

import msgspec

from .errors import CorruptSession, InvalidSession, SessionError, SessionNotFound
from .session import D, Session, as_utc, check_id, epoch_milliseconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from .codec import Codec

# Every storage uses the same words.
NOT_FOUND = "there is no such session, or it has expired"
EXISTS = "there is a session with this id"
CHANGED = "the session was written since it was loaded"

VERSION = b"1"
HEADER_BYTES = 32
NO_DEADLINE = 999_999_999_999_999
_REVISION = slice(1, 17)
_DEADLINE = slice(17, 32)
_NEVER = b"%d" % NO_DEADLINE


def seal(session: Session[D], codec: "Codec[D]") -> tuple[str, int, bytes]:
    """Make the record of a session under a fresh revision, and leave the session unchanged.

    Returns:
        The revision, the deadline in milliseconds since the epoch, and the record.

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
    expires_at = session.expires_at and as_utc(session.expires_at, "expires_at")
    stored = msgspec.structs.replace(
        session,
        created_at=as_utc(session.created_at, "created_at"),
        updated_at=as_utc(session.updated_at, "updated_at"),
        expires_at=expires_at,
        revision="",  # only the header holds it
    )
    try:
        payload = bytes(codec.encode(stored))
    except SessionError:
        raise
    except Exception as error:  # noqa: BLE001 - a codec of the application's own raises anything
        # Without a chain: the text of the error may quote the payload.
        raise InvalidSession(f"the codec failed with {type(error).__name__}") from None
    revision = secrets.token_urlsafe(12)
    deadline = NO_DEADLINE if expires_at is None else max(0, epoch_milliseconds(expires_at))
    return revision, deadline, b"%b%b%015d%b" % (VERSION, revision.encode(), deadline, payload)


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
    # The most frequent header first: it needs no number.
    if record[_DEADLINE] != _NEVER or record[:1] != VERSION:
        deadline = deadline_of(record)
        if deadline != NO_DEADLINE and deadline <= now():
            raise SessionNotFound(NOT_FOUND)
    try:
        session = codec.decode(record[HEADER_BYTES:])
        is_the_one = session.id == id
    except SessionError:
        raise
    except Exception as error:  # noqa: BLE001 - a codec of the application's own raises anything
        raise CorruptSession(f"the codec failed with {type(error).__name__}") from None
    if not is_the_one:
        raise CorruptSession("the record under this id holds another session")
    session.revision = revision_of(record)
    return session


def deadline_of(record: bytes) -> int:
    """The deadline of a record, in milliseconds since the epoch.

    Raises:
        CorruptSession: The bytes are not a record, or a record of a newer format.
    """
    deadline = record[_DEADLINE]
    if record[:1] == VERSION and len(deadline) == 15 and deadline.isdigit():
        return int(deadline)
    version = record[:1]
    if version.isdigit() and version > VERSION:
        message = f"the stored session has format {version.decode()}; this release reads format 1"
    else:
        message = "the stored value is not a session record"
    raise CorruptSession(message)


def revision_of(record: bytes) -> str:
    """The revision of a record with a valid header."""
    return record[_REVISION].decode("ascii", "replace")
