"""The stored form: its layout, pinned byte by byte, and the records that are refused.

Records outlive releases. The files in golden/ were written once and do not change. If a test here
fails, the code is wrong, or the format needs a new version, and code that reads both.
"""

import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

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
)
from aiosessions import record as records
from aiosessions.record import deadline_of, seal
from tests.support.secrets import said_by

GOLDEN = Path(__file__).parent / "golden"
REVISION = "AbCd-_0123456789"
# Before every deadline in golden/.
NOW = 1_900_000_000_000
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def unseal(record: bytes, id: str, codec: Codec[Any], now: int) -> Session[Any]:
    """Read a record at a given time."""
    return records.unseal(record, id, codec, lambda: now)


class Basket(msgspec.Struct):
    """The data of a golden session."""

    items: list[str]
    total: float
    owner: str | None = None


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
        revision=REVISION,
    ),
    "minimal": Session(id="x", created_at=CREATED, updated_at=CREATED, revision=REVISION),
    "deadline": Session(
        id="~!",
        created_at=datetime(1969, 12, 31, 23, 59, 59, 500_000, tzinfo=UTC),
        updated_at=CREATED,
        expires_at=datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        revision=REVISION,
    ),
}
HEADERS = {
    "full": b"1AbCd-_0123456789001927857906789",
    "minimal": b"1AbCd-_0123456789999999999999999",
    "deadline": b"1AbCd-_0123456789253402300799999",
}
CODECS: dict[str, Callable[..., Codec[Any]]] = {"json": JsonCodec, "msgpack": MsgpackCodec}
# The data type of the golden sessions.
DATA = Basket | None

every_codec = pytest.mark.parametrize("form", CODECS)
every_golden = pytest.mark.parametrize("name", SESSIONS)


@pytest.fixture
def fixed_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `seal` draw the revision of the golden files, of 96 bits."""

    def token_urlsafe(nbytes: int | None = None) -> str:
        assert nbytes == 12
        return REVISION

    monkeypatch.setattr(secrets, "token_urlsafe", token_urlsafe)


def golden(form: str, name: str) -> bytes:
    """A golden record."""
    return (GOLDEN / f"{name}.{form}").read_bytes()


@every_codec
@every_golden
def test_golden_records_are_read(form: str, name: str) -> None:
    """Each release reads the records of earlier releases, field by field."""
    expected = SESSIONS[name]

    session = unseal(golden(form, name), expected.id, CODECS[form](DATA), NOW)

    assert msgspec.structs.asdict(session) == msgspec.structs.asdict(expected)
    assert session.created_at.utcoffset() == timedelta(0)


@every_codec
@every_golden
@pytest.mark.usefixtures("fixed_revision")
def test_golden_records_are_written(form: str, name: str) -> None:
    """This release writes the same bytes as earlier ones, so older replicas can read them."""
    session = SESSIONS[name]

    revision, deadline, record = seal(session, CODECS[form](DATA))

    assert record == golden(form, name)
    assert revision == REVISION
    assert deadline == int(HEADERS[name][17:])


@every_codec
@every_golden
def test_the_header_is_at_fixed_offsets(form: str, name: str) -> None:
    """The header has 32 bytes for every codec: version, revision, deadline; the payload follows.

    Scripts on servers, and programs in other languages, rely on the offsets.
    """
    record = golden(form, name)

    assert record[:32] == HEADERS[name]
    assert record[:1] == b"1"
    assert record[1:17] == REVISION.encode()
    assert record[17:32].isdigit()
    assert CODECS[form](DATA).decode(record[32:]).id == SESSIONS[name].id


def test_json_payload_is_as_documented() -> None:
    """The payload is plain JSON with the names of the fields, without fields of default value."""
    assert golden("json", "minimal")[32:] == (
        b'{"id":"x","created_at":"2026-01-02T03:04:05Z","updated_at":"2026-01-02T03:04:05Z"}'
    )


@every_codec
def test_only_the_header_has_the_revision(form: str) -> None:
    """The payload does not depend on the revision, so codecs ignore it."""
    codec = CODECS[form]()
    session = Session[Any](id="x", revision="old-revision-000")

    revision, _, record = seal(session, codec)

    assert record[1:17] == revision.encode()
    assert codec.decode(record[32:]).revision == ""
    assert b"old-revision-000" not in record


def test_every_seal_draws_a_new_revision() -> None:
    """A revision has 16 URL-safe characters, and differs each time for the same session."""
    session = Session[Any](id="x")

    revisions = [seal(session, JsonCodec[Any]())[0] for _ in range(1_000)]

    assert len(set(revisions)) == 1_000
    assert {len(revision) for revision in revisions} == {16}
    assert all(revision.replace("-", "").replace("_", "").isalnum() for revision in revisions)
    assert session.revision == ""


def test_sealing_leaves_the_session_unchanged() -> None:
    """Dates are normalised in the record only, so a store that fails has changed nothing."""
    moment = datetime(2030, 1, 1, tzinfo=timezone(timedelta(hours=9)))
    session = Session[Any](
        id="x", data=[1], created_at=moment, updated_at=moment, expires_at=moment, revision="r"
    )
    before = msgspec.structs.asdict(session)

    seal(session, JsonCodec[Any]())

    assert msgspec.structs.asdict(session) == before
    assert session.created_at is moment


zones = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
# A day away from either end of the calendar, so that any time zone has room.
moments = st.datetimes(timezones=zones).filter(lambda moment: 1 < moment.year < 9999)


@every_codec
@settings(deadline=None, max_examples=60)
@given(created_at=moments, expires_at=moments)
def test_dates_are_stored_in_utc(form: str, created_at: datetime, expires_at: datetime) -> None:
    """A reader gets the writer's moments in UTC, and the deadline."""
    session = Session[Any](id="x", created_at=created_at, expires_at=expires_at)
    codec = CODECS[form]()

    _, deadline, record = seal(session, codec)
    read = unseal(record, "x", codec, -1)

    assert read.created_at == created_at
    assert read.expires_at == expires_at
    assert read.created_at.tzinfo == UTC
    exact = (expires_at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    assert deadline == deadline_of(record) == max(0, exact)
    assert len(record[17:32]) == 15


@pytest.mark.parametrize(
    ("expires_at", "deadline"),
    [
        (datetime(2030, 1, 1, 0, 0, 0, 999, tzinfo=UTC), 1_893_456_000_000),
        (datetime(2030, 1, 1, 0, 0, 0, 1_000, tzinfo=UTC), 1_893_456_000_001),
        (datetime(2030, 1, 1, 0, 0, 0, 1_999, tzinfo=UTC), 1_893_456_000_001),
        (datetime(2030, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), 1_893_456_000_000),
        (datetime(1970, 1, 1, tzinfo=UTC), 0),
        (datetime(1969, 12, 31, tzinfo=UTC), 0),
        (datetime(1, 1, 1, tzinfo=UTC), 0),
        (datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), 253_402_300_799_999),
    ],
    ids=str,
)
def test_the_deadline_is_rounded_down(expires_at: datetime, deadline: int) -> None:
    """The deadline has whole milliseconds; a moment before the epoch becomes 0."""
    _, sealed, record = seal(Session[Any](id="x", expires_at=expires_at), JsonCodec[Any]())

    assert sealed == deadline
    assert record[17:32] == b"%015d" % deadline


def test_record_is_readable_until_its_deadline() -> None:
    """A record is read one millisecond before its deadline, and not found at the deadline."""
    codec = JsonCodec[Any]()
    expires_at = datetime(2030, 1, 1, tzinfo=UTC)
    _, deadline, record = seal(Session[Any](id="x", expires_at=expires_at), codec)

    assert unseal(record, "x", codec, deadline - 1).expires_at == expires_at
    for now in (deadline, deadline + 1, deadline + 10**12):
        with pytest.raises(SessionNotFound):
            unseal(record, "x", codec, now)


def test_record_without_a_deadline_never_ends() -> None:
    """A session without `expires_at` is still read at the end of the year 9999."""
    codec = JsonCodec[Any]()
    _, deadline, record = seal(Session[Any](id="x"), codec)

    assert record[17:32] == b"9" * 15
    assert deadline == 999_999_999_999_999
    assert unseal(record, "x", codec, 253_402_300_799_999).expires_at is None


@every_codec
@every_golden
def test_truncated_record_is_corrupt(form: str, name: str) -> None:
    """A record cut off at any length is `CorruptSession`, and the error reveals nothing of it."""
    session = SESSIONS[name]
    codec = CODECS[form](DATA)
    record = golden(form, name)

    for length in range(len(record)):
        with pytest.raises(CorruptSession) as caught:
            unseal(record[:length], session.id, codec, NOW)
        said = said_by(caught.value)
        assert REVISION not in said
        assert "streamable" not in said
        assert len(session.id) < 3 or session.id not in said


@every_codec
@every_golden
def test_record_of_newer_format_is_corrupt(form: str, name: str) -> None:
    """The message names the format of the record."""
    session = SESSIONS[name]
    record = golden(form, name)

    for version in (b"2", b"9"):
        with pytest.raises(CorruptSession, match=rf"format {version.decode()}.* reads format 1"):
            unseal(version + record[1:], session.id, CODECS[form](DATA), NOW)


def test_first_byte_identifies_a_newer_format() -> None:
    """A newer format may have another header."""
    for record in (b"2", b"2short", b"2" + b"\xff" * 100):
        with pytest.raises(CorruptSession, match="format 2"):
            unseal(record, "x", JsonCodec[Any](), NOW)


HEADER = HEADERS["minimal"]
PAYLOAD = b'{"id":"x"}'
GARBAGE = {
    "empty": b"",
    "zeros": bytes(64),
    "text": b"hello, world, this is something else altogether",
    "json": b'{"id":"x","kind":"web","principal":null,"metadata":{}}',
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00" + b"x" * 40,
    "no-version": HEADER[1:] + PAYLOAD,
    "version-0": b"0" + HEADER[1:] + PAYLOAD,
    "version-letter": b"A" + HEADER[1:] + PAYLOAD,
    "version-byte-1": b"\x01" + HEADER[1:] + PAYLOAD,
    "version-superscript": "²".encode() + HEADER[2:] + PAYLOAD,
    "deadline-letters": HEADER[:17] + b"deadline-abcdef" + PAYLOAD,
    "deadline-sign": HEADER[:17] + b"-99999999999999" + PAYLOAD,
    "deadline-spaces": HEADER[:17] + b"              1" + PAYLOAD,
    "deadline-hexadecimal": HEADER[:17] + b"0x1234567890123" + PAYLOAD,
    "deadline-underscores": HEADER[:17] + b"999_999_999_999" + PAYLOAD,
    "deadline-other-digits": HEADER[:17] + "٩٩٩٩٩٩٩".encode() + b"9" + PAYLOAD,
    "shifted": b" " + HEADER + PAYLOAD,
    "no-payload": HEADER,
    "other-payload": HEADER + b"\xff\xfe",
    "list-payload": HEADER + b"[]",
    "no-id": HEADER + b"{}",
    "null-id": HEADER + b'{"id":null}',
    "two-records": (HEADER + PAYLOAD) * 2,
}


@pytest.mark.parametrize("record", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_corrupt(record: bytes) -> None:
    """Bytes that are not a record are `CorruptSession`, not an empty session or "not found"."""
    with pytest.raises(CorruptSession):
        unseal(record, "x", JsonCodec[Any](), NOW)


@every_codec
@settings(deadline=None, max_examples=200)
@given(record=st.binary(max_size=100) | st.binary(max_size=60).map(lambda end: HEADER + end))
def test_random_bytes_are_corrupt(form: str, record: bytes) -> None:
    """Random bytes are `CorruptSession`, or "not found" if they hold a deadline in the past."""
    with pytest.raises((CorruptSession, SessionNotFound)):
        unseal(record, "an-id-that-is-never-drawn", CODECS[form](), NOW)


@every_codec
@every_golden
def test_record_under_another_id_is_corrupt(form: str, name: str) -> None:
    """A client never gets the session of another client, even if the ids are similar."""
    codec = CODECS[form](DATA)
    record = golden(form, name)
    own = SESSIONS[name].id

    for id in (own + "x", own[:-1] or "y", own.swapcase() + "!", "x" * 256):
        with pytest.raises(CorruptSession, match="another session") as caught:
            unseal(record, id, codec, NOW)
        assert own not in said_by(caught.value) or len(own) < 3


@every_codec
def test_codecs_do_not_read_each_other(form: str) -> None:
    """A record of the other codec is `CorruptSession`, not an empty session."""
    other = "msgpack" if form == "json" else "json"
    for name, session in SESSIONS.items():
        with pytest.raises(CorruptSession):
            unseal(golden(other, name), session.id, CODECS[form](DATA), NOW)


def test_payload_may_be_any_bytes() -> None:
    """Storages read only the header, so a codec may encrypt the payload."""

    class Encrypting:
        """Inverts every bit, in place of encryption."""

        inner = JsonCodec[Any]()

        def encode(self, session: Session[Any]) -> bytes:
            return bytes(byte ^ 0xFF for byte in self.inner.encode(session))

        def decode(self, payload: bytes) -> Session[Any]:
            return self.inner.decode(bytes(byte ^ 0xFF for byte in payload))

    session = Session[Any](id="x", data="tea")
    revision, _, record = seal(session, Encrypting())

    assert b"tea" not in record
    assert record[:17] == b"1" + revision.encode()
    assert unseal(record, "x", Encrypting(), NOW).data == "tea"


@pytest.mark.parametrize("id", ["", "a b", "x" * 257, "é", "x\n"], ids=ascii)
def test_session_with_invalid_id_is_not_sealed(id: str) -> None:
    """No record is made for an id that no caller can load."""
    with pytest.raises(InvalidSessionId):
        seal(Session[Any](id=id), JsonCodec[Any]())


def test_subclass_of_session_is_not_sealed() -> None:
    """The fields of a subclass would be lost, so the message asks for them in `data`."""

    class Cart(Session[Any]):
        items: list[str]

    with pytest.raises(InvalidSession, match=r"Cart is a subclass of Session, .* in its data"):
        seal(Cart(id="x", items=["tea"]), JsonCodec[Any]())


@pytest.mark.parametrize("session", [None, {"id": "x"}, "x", Session], ids=repr)
def test_other_objects_are_not_sealed(session: Any) -> None:
    """An object that is not a session is a `TypeError`."""
    with pytest.raises(TypeError, match="a session is a Session"):
        seal(session, JsonCodec[Any]())


@pytest.mark.parametrize("field", ["created_at", "updated_at", "expires_at"])
@pytest.mark.parametrize(
    "moment",
    [
        datetime(2030, 1, 1),  # noqa: DTZ001 - naive on purpose
        datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))),
        datetime(9999, 12, 31, 23, tzinfo=timezone(-timedelta(hours=2))),
        "2030-01-01T00:00:00Z",
        1_900_000_000,
        0,
        "",
        False,
    ],
    ids=repr,
)
def test_session_with_invalid_date_is_not_sealed(field: str, moment: Any) -> None:
    """Naive dates, dates outside the calendar of UTC and other types are `InvalidSession`."""
    fields: dict[str, Any] = {"id": "x", field: moment}
    session = Session[Any](**fields)

    with pytest.raises(InvalidSession):
        seal(session, JsonCodec[Any]())
