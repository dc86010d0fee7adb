"""The stored form: its layout, pinned byte by byte, and the records that are refused.

Records outlive releases. The files in golden/ were written once and do not change. If a test here
fails, the code is wrong, or the format needs a new version, and code that reads both.
"""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosessions import (
    Codec,
    CorruptSession,
    InvalidSession,
    InvalidSessionId,
    JsonCodec,
    MsgpackCodec,
    Session,
    SessionNotFound,
    session_digest,
)
from aiosessions import record as records
from aiosessions.record import deadline_of, seal
from tests.support.secrets import said_by

GOLDEN = Path(__file__).parent / "golden"
RANDOM = "AbCd-_01234"
# Before every deadline in golden/.
NOW = 1_900_000_000_000
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def unseal(record: bytes, id: str, codec: Codec[Any], now: int = NOW) -> Session[Any]:
    """Read a record at a given time."""
    return records.unseal(record, id, codec, lambda: now)


class Basket(msgspec.Struct):
    """The data of a golden session."""

    items: list[str]
    total: float
    owner: str | None = None


# The revision of a session without a principal, and of one with the principal of "full".
PLAIN, OWNED = f"{RANDOM}.MdOG", f"{RANDOM}.sJ81"

SESSIONS: dict[str, Session[Basket | None]] = {
    "full": Session(
        id="0123456789abcdefghijklmnopqrstuvwxyzABCDEFG",
        kind="mcp",
        principal="zoë@example.com",
        metadata={"transport": "streamable", "locale": "日本"},
        data=Basket(items=["tea", "\N{FLEXED BICEPS}"], total=12.5, owner="me"),
        created_at=datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC),
        updated_at=datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC),
        expires_at=datetime(2031, 2, 3, 4, 5, 6, 789_999, tzinfo=UTC),
        revision=OWNED,
    ),
    "minimal": Session(id="x", created_at=CREATED, updated_at=CREATED, revision=PLAIN),
    "deadline": Session(
        id="~!",
        created_at=datetime(1969, 12, 31, 23, 59, 59, 500_000, tzinfo=UTC),
        updated_at=CREATED,
        expires_at=datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        revision=PLAIN,
    ),
}
SESSIONS["rotated"] = msgspec.structs.replace(
    SESSIONS["full"], metadata={"aiosessions.rotated": "mark"}
)
OWNER = b"a9e25243a80f8fa11d60025b00280654"  # the digest of the principal of "full"
HEADERS = {
    "full": b"2" + OWNED.encode() + b"001927857906789" + b"9" * 15 + OWNER,
    "minimal": b"1" + PLAIN.encode() + b"999999999999999",
    "deadline": b"1" + PLAIN.encode() + b"253402300799999",
    "rotated": b"3" + OWNED.encode() + b"001927857906789" + b"9" * 15 + OWNER,
}
CODECS: dict[str, Codec[Any]] = {
    "json": JsonCodec[Any](Basket | None),
    "msgpack": MsgpackCodec[Any](Basket | None),
}
JSON = JsonCodec[Any]()

every_form = pytest.mark.parametrize("form", CODECS)
every_golden = pytest.mark.parametrize("name", SESSIONS)


def golden(form: str, name: str) -> bytes:
    """A golden record."""
    return (GOLDEN / f"{name}.{form}").read_bytes()


@every_form
@every_golden
def test_golden_records_are_read_and_written(
    form: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each release reads the records of earlier releases, and writes the same bytes.

    The header is the same for every codec. Scripts on servers rely on its offsets.
    """
    expected, codec, record = SESSIONS[name], CODECS[form], golden(form, name)

    session = unseal(record, expected.id, codec)
    # 64 bits
    monkeypatch.setattr("secrets.token_urlsafe", {8: RANDOM}.__getitem__)
    sealed = seal(expected, codec)

    assert msgspec.structs.asdict(session) == msgspec.structs.asdict(expected)
    assert session.created_at.utcoffset() == timedelta(0)
    header = HEADERS[name]
    assert record.startswith(header)
    stored = codec.decode(record[len(header) :])
    assert (stored.id, stored.revision) == (expected.digest, "")  # only the header has it
    assert sealed == (expected.revision, int(header[17:32]), record)


def test_sealing_leaves_the_session_unchanged() -> None:
    """A store that fails after this has changed nothing."""
    moment = datetime(2030, 1, 1, tzinfo=timezone(timedelta(hours=9)))
    session = Session[Any](
        id="x", data=[1], created_at=moment, updated_at=moment, expires_at=moment, revision="r"
    )
    before = msgspec.structs.asdict(session)

    revisions = {seal(session, JSON)[0] for _ in range(1_000)}

    assert len(revisions) == 1_000
    assert msgspec.structs.asdict(session) == before
    assert session.created_at is moment


zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
# A day away from either end of the calendar, so that any time zone has room.
moments = st.datetimes(timezones=zones).filter(lambda moment: 1 < moment.year < 9999)


@settings(deadline=None, max_examples=60)
@given(created_at=moments, expires_at=moments)
def test_dates_are_stored_in_utc(created_at: datetime, expires_at: datetime) -> None:
    """A reader gets the writer's moments in UTC. The deadline is rounded down to milliseconds."""
    session = Session[Any](
        id="x", created_at=created_at, updated_at=expires_at, expires_at=expires_at
    )

    _, deadline, record = seal(session, JSON)
    read = unseal(record, "x", JSON, -1)

    assert (read.created_at, read.updated_at, read.expires_at) == (
        created_at,
        expires_at,
        expires_at,
    )
    assert read.created_at.tzinfo == read.updated_at.tzinfo == UTC
    exact = (expires_at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    assert deadline == deadline_of(record) == max(0, exact)
    assert record[17:32] == b"%015d" % deadline


def test_record_is_readable_until_its_deadline() -> None:
    """A record is not found from its deadline on. Without a deadline, it never ends."""
    expires_at = datetime(2030, 1, 1, tzinfo=UTC)
    _, deadline, record = seal(Session[Any](id="x", expires_at=expires_at), JSON)

    assert unseal(record, "x", JSON, deadline - 1).expires_at == expires_at
    for now in (deadline, deadline + 1, deadline + 10**12):
        with pytest.raises(SessionNotFound):
            unseal(record, "x", JSON, now)
    _, deadline, record = seal(Session[Any](id="x"), JSON)
    assert deadline == 999_999_999_999_999
    assert unseal(record, "x", JSON, deadline + 1).expires_at is None


# Records that are refused


@every_form
@every_golden
def test_damaged_record_is_corrupt(form: str, name: str) -> None:
    """A truncated record, or one of another codec or id, reveals nothing."""
    own, codec, record = SESSIONS[name].id, CODECS[form], golden(form, name)
    other = "msgpack" if form == "json" else "json"
    ids = (own + "x", own[:-1] or "y", own.swapcase() + "!", "x" * 256)

    for damaged, id, message in (
        *((record[:length], own, "") for length in range(len(record))),
        *((record, id, "the record under this id holds another session") for id in ids),
        (golden(other, name), own, ""),
    ):
        with pytest.raises(CorruptSession, match=f"^{message}") as caught:
            unseal(damaged, id, codec)
        said = said_by(caught.value)
        assert RANDOM not in said
        assert "streamable" not in said
        assert len(own) < 3 or own not in said


HEADER = HEADERS["minimal"]
PAYLOAD = b'{"id":"%b"}' % session_digest("x").encode()


@pytest.mark.parametrize(
    "record",
    [b"4", b"4short", b"4" + b"\xff" * 100, b"4" + HEADER[1:] + PAYLOAD, b"9" + HEADER[1:]],
)
def test_record_of_newer_format_is_corrupt(record: bytes) -> None:
    """The first byte identifies the format, because a newer one may have another header."""
    with pytest.raises(CorruptSession, match=rf"format {record[:1].decode()}.* reads 1 to 3"):
        unseal(record, "x", JSON)


GARBAGE = {
    "empty": b"",
    "json": b'{"id":"x","kind":"web","principal":null,"metadata":{}}',
    "no-version": HEADER[1:] + PAYLOAD,
    "version-0": b"0" + HEADER[1:] + PAYLOAD,
    "version-superscript": "²".encode() + HEADER[2:] + PAYLOAD,
    "deadline-letters": HEADER[:17] + b"deadline-abcdef" + PAYLOAD,
    "deadline-sign": HEADER[:17] + b"-99999999999999" + PAYLOAD,
    "deadline-other-digits": HEADER[:17] + "٩٩٩٩٩٩٩".encode() + b"9" + PAYLOAD,
    "no-payload": HEADER,
    "other-payload": HEADER + b"\xff\xfe",
    "no-id": HEADER + b"{}",
    "no-lease": b"2" + HEADER[1:] + PAYLOAD + b" " * 99,
    "lease-letters": HEADERS["full"][:32] + b"lease-as-letter" + OWNER + PAYLOAD,
    "no-owner": HEADERS["full"][:78],
    "two-records": (HEADER + PAYLOAD) * 2,
}


@pytest.mark.parametrize("record", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_corrupt(record: bytes) -> None:
    """Bytes that are not a record are `CorruptSession`, not an empty session or "not found"."""
    with pytest.raises(CorruptSession, match=r"not a session record|not JSON"):
        unseal(record, "x", JSON)


@every_form
@settings(deadline=None, max_examples=200)
@given(record=st.binary(max_size=100) | st.binary(max_size=60).map(lambda end: HEADER + end))
def test_random_bytes_are_corrupt(form: str, record: bytes) -> None:
    """Random bytes are `CorruptSession`, or "not found" if they hold a deadline in the past."""
    with pytest.raises((CorruptSession, SessionNotFound)):
        unseal(record, "an-id-that-is-never-drawn", CODECS[form])


# Codecs of applications


class Encrypting:
    """Inverts every bit, in place of encryption."""

    def encode(self, session: Session[Any]) -> bytes:
        """Return a buffer of another type than bytes, as libraries do."""
        return cast("bytes", bytearray(byte ^ 0xFF for byte in JSON.encode(session)))

    def decode(self, payload: bytes) -> Session[Any]:
        """Return the session."""
        return JSON.decode(bytes(byte ^ 0xFF for byte in payload))


def test_payload_may_be_any_bytes() -> None:
    """Storages read only the header, so a codec may encrypt the payload."""
    revision, _, record = seal(Session[Any](id="x", data="tea"), Encrypting())

    assert b"tea" not in record
    assert record[:17] == b"1" + revision.encode()
    assert unseal(record, "x", Encrypting()).data == "tea"


class Failing:
    """A codec with a bug."""

    def encode(self, session: Session[Any]) -> bytes:
        """Raise a foreign error that quotes the session."""
        raise LookupError(session.data)

    def decode(self, payload: bytes) -> Session[Any]:
        """Raise a foreign error that quotes the payload."""
        raise LookupError(payload)


def test_foreign_error_of_a_codec_is_translated() -> None:
    """The error names the type only, because the text may quote the payload."""
    with pytest.raises(InvalidSession, match="the codec failed with LookupError") as refused:
        seal(Session(id="x", data="secret"), Failing())
    with pytest.raises(CorruptSession, match="the codec failed with LookupError") as corrupt:
        unseal(HEADER + b"secret", "x", Failing())

    for error in (refused.value, corrupt.value):
        assert error.__suppress_context__
        assert "secret" not in str(error)


# Sessions that are not sealed


NAIVE: Any = datetime(2030, 1, 1)  # noqa: DTZ001 - the point


class Subclass(Session[Any]):
    """A session with another field."""

    items: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("session", "error", "message"),
    [
        *((Session(id=id), InvalidSessionId, "a session id") for id in ("", "a b", "x" * 257)),
        (Subclass(id="x"), InvalidSession, r"Subclass is a subclass of Session, .* in its data"),
        (Session(id="x", principal=b"p"), InvalidSession, "a principal is a str, not bytes"),  # type: ignore[arg-type]
        (Session(id="x", revision=b"r"), InvalidSession, "a revision is a str, not bytes"),  # type: ignore[arg-type]
        *((other, TypeError, "a session is a Session") for other in (None, {"id": "x"}, Session)),
        *(
            (Session(**{"id": "x", name: NAIVE}), InvalidSession, f"{name} is a naive datetime")
            for name in ("created_at", "updated_at", "expires_at")
        ),
    ],
    ids=str,
)
def test_other_objects_are_not_sealed(session: Any, error: type[Exception], message: str) -> None:
    """No record is made for a malformed id or date, lost fields, or another type."""
    with pytest.raises(error, match=message):
        seal(session, JSON)
