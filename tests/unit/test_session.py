"""Sessions and their ids: defaults, validity, and the parts that are never shown."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from aiosessions import InvalidSession, InvalidSessionId, Session, new_session_id, session_digest
from aiosessions.session import as_utc, check_id, epoch_milliseconds


def test_only_the_id_is_required() -> None:
    """The dates are now, in UTC, and each session has its own metadata."""
    before = datetime.now(UTC)
    session, other = Session[Any](id="x"), Session(id="x")

    assert before <= session.created_at <= session.updated_at <= datetime.now(UTC)
    assert session.created_at.tzinfo is session.updated_at.tzinfo is UTC
    assert (session.kind, session.principal, session.data) == ("", None, None)
    assert (session.expires_at, session.revision, session.metadata) == (None, "", {})
    assert session.metadata is not other.metadata
    with pytest.raises(TypeError):  # keyword-only, so that a release can add fields
        Session("x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_only_fields_can_be_set() -> None:
    """A misspelt name is an error."""
    with pytest.raises(AttributeError, match="owner"):
        Session[Any](id="x").owner = "alice"  # type: ignore[attr-defined]


SECRETS = ("credential", "alice", "meta-key", "meta-value", "payload")


def secretive(kind: Any = Session) -> Session[Any]:
    """A session with a secret in every field that may hold one."""
    session: Session[Any] = kind(
        id="credential-0123456789",
        kind="web",
        principal="alice",
        metadata={"meta-key": "meta-value"},
        data={"a": "payload"},
        expires_at=datetime(2030, 1, 2, tzinfo=UTC),
        revision="rev",
    )
    return session


@pytest.mark.parametrize("show", [repr, str, lambda x: f"{[x]}", lambda x: repr(x.__rich_repr__())])
@pytest.mark.parametrize("kind", [Session, Session[dict[str, str]]], ids=["plain", "subscribed"])
def test_repr_shows_no_secret(show: Any, kind: Any) -> None:
    """The repr, also of rich, has the kind, the deadline and the revision."""
    shown = show(secretive(kind))

    assert [secret for secret in SECRETS if secret in shown] == []
    for part in ("kind", "'web'", "2030", "revision", "'rev'"):
        assert part in shown


def test_digest_is_half_of_a_sha256() -> None:
    """Another program can compute it: the SHA-256 of "abc" is a test vector of FIPS 180-4."""
    assert session_digest("abc") == "ba7816bf8f01cfea414140de5dae2223"
    assert Session(id="abc").digest == session_digest("abc")


@pytest.mark.parametrize("show", [repr, str], ids=["repr", "str"])
def test_repr_shows_the_begin_of_the_digest(show: Any) -> None:
    """Eight digits relate a log line to a session; those of a malformed id do, too."""
    assert "'ba7816bf'" in show(Session(id="abc"))
    assert "digest" in show(Session(id="\ud800"))


@pytest.mark.parametrize(
    ("id", "error"), [("", InvalidSessionId), ("\u00e9", InvalidSessionId), (b"abc", TypeError)]
)
def test_malformed_id_has_no_digest(id: Any, error: type[Exception]) -> None:
    """A caller does not get the digest of an id that no session can have."""
    with pytest.raises(error):
        session_digest(id)


def test_new_ids_come_from_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are credentials, so their bits come from `secrets`, not from a predictable generator."""
    monkeypatch.setattr("secrets.token_urlsafe", lambda nbytes: f"token of {nbytes} bytes")

    assert new_session_id() == "token of 32 bytes"


@pytest.mark.parametrize(
    "id",
    ["!", "~", "x" * 256, "".join(map(chr, range(0x21, 0x7F)))],
    ids=["first", "last", "longest", "all"],
)
def test_visible_ascii_is_a_valid_id(id: str) -> None:
    """1 to 256 visible ASCII characters are valid."""
    check_id(id)


@pytest.mark.parametrize(
    ("id", "hint"),
    [
        ("", "empty"),
        ("x" * 257, "257"),
        ("x" * 1_000_000, "1000000"),
        *((id, "visible") for id in (" ", " x", "x ", "a b", "x\n", "\nx", "x\r\ny", "x\t")),
        *((id, "visible") for id in ("\x00", "x\x00", "\x1f", "\x7f", "\x80", "é", "e\u0301")),
        *((id, "visible") for id in ("\N{FULLWIDTH DIGIT ONE}", "\u200b", "\ud800", "🍪")),
    ],
    ids=ascii,
)
def test_other_strings_are_invalid_ids(id: str, hint: str) -> None:
    """Other strings are `InvalidSessionId`; the message has the reason, and not the id."""
    with pytest.raises(InvalidSessionId, match=hint) as caught:
        check_id(id)

    assert len(str(caught.value)) < 100
    assert not (len(id.strip()) > 1 and id in str(caught.value))


@pytest.mark.parametrize("id", [b"x", None, 7], ids=repr)
def test_id_of_another_type_is_a_type_error(id: Any) -> None:
    """A value of another type is a mistake of the caller, not of a client."""
    with pytest.raises(TypeError, match=f"not {type(id).__name__}"):
        check_id(id)


def test_moments_are_normalised_to_utc() -> None:
    """Any aware datetime becomes the same moment in UTC."""
    moment = datetime(2030, 1, 1, 1, tzinfo=timezone(timedelta(hours=2)))

    assert as_utc(moment, "it").isoformat() == "2029-12-31T23:00:00+00:00"


@pytest.mark.parametrize(
    ("moment", "hint"),
    [
        (datetime(2030, 1, 1), "it is a naive datetime"),  # noqa: DTZ001 - naive on purpose
        (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))), "it is outside the years"),
        ("2030-01-01", "it is a datetime, not str"),
        (None, "it is a datetime, not NoneType"),
    ],
    ids=["naive", "before-year-1", "str", "none"],
)
def test_other_moments_are_invalid(moment: Any, hint: str) -> None:
    """A moment without a time zone, or without a place in UTC, is `InvalidSession`."""
    with pytest.raises(InvalidSession, match=hint):
        as_utc(moment, "it")


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (datetime(1970, 1, 1, 0, 0, 0, 999, tzinfo=UTC), 0),
        (datetime(1970, 1, 1, 0, 0, 0, 1_000, tzinfo=UTC), 1),
        (datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), -1),
        (datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), 253_402_300_799_999),
        (datetime(1, 1, 1, tzinfo=UTC), -62_135_596_800_000),
    ],
)
def test_milliseconds_are_rounded_down(moment: datetime, expected: int) -> None:
    """The time since the epoch is exact, in whole milliseconds."""
    assert epoch_milliseconds(moment) == expected
