"""Sessions and their ids: defaults, validity, and the parts that are never shown."""

import copy
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest

from aiosessions import InvalidSession, InvalidSessionId, Session, new_session_id
from aiosessions.session import as_utc, check_id, epoch_milliseconds, id_digest

URL_SAFE = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def test_only_the_id_is_required() -> None:
    """The dates are now, in UTC, and each session has its own metadata."""
    before = datetime.now(UTC)
    session, other = Session[Any](id="x"), Session[Any](id="x")

    assert before <= session.created_at <= session.updated_at <= datetime.now(UTC)
    assert session.created_at.tzinfo is session.updated_at.tzinfo is UTC
    assert (session.kind, session.principal, session.data) == ("", None, None)
    assert (session.expires_at, session.revision) == (None, "")
    assert session.metadata == {}
    assert session.metadata is not other.metadata


def test_fields_are_keyword_only() -> None:
    """A field cannot be given by position, so a release can add fields."""
    with pytest.raises(TypeError):
        Session("x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_data_type_is_optional() -> None:
    """`Session` and `Session[int]` make equal sessions."""
    moment = datetime.now(UTC)

    plain = Session(id="x", data=1, created_at=moment, updated_at=moment)

    assert plain == Session[int](id="x", data=1, created_at=moment, updated_at=moment)


SECRETS = ("credential", "alice", "meta-key", "meta-value", "payload")


def secretive() -> Session[Any]:
    """A session with a secret in every field that may hold one."""
    return Session(
        id="credential-0123456789",
        kind="web",
        principal="alice",
        metadata={"meta-key": "meta-value"},
        data={"a": "payload"},
        expires_at=datetime(2030, 1, 2, tzinfo=UTC),
        revision="rev",
    )


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r}".format, lambda x: f"{[x]}"])
def test_repr_shows_no_secret(show: Any) -> None:
    """The repr has the kind, the deadline and the revision; no id, principal or content."""
    shown = show(secretive())

    assert [secret for secret in SECRETS if secret in shown] == []
    assert "kind='web'" in shown
    assert "2030" in shown
    assert "revision='rev'" in shown


def test_rich_shows_no_secret() -> None:
    """Rich would print every field of a struct; it gets the fields of the repr instead."""
    shown = repr(list(secretive().__rich_repr__()))

    assert [secret for secret in SECRETS if secret in shown] == []
    assert "'kind', 'web'" in shown


def test_repr_of_typed_session_shows_no_secret() -> None:
    """A subscribed class has the same repr."""
    shown = repr(Session[str](id="credential", data="payload", principal="alice"))

    assert [secret for secret in SECRETS if secret in shown] == []


@pytest.mark.parametrize(
    "fields",
    [{"id": 7}, {"id": None}, {"id": "\ud800"}, {"id": "x" * 10_000}, {"metadata": None}],
    ids=["int-id", "no-id", "surrogate-id", "long-id", "no-metadata"],
)
def test_invalid_session_has_a_short_repr(fields: dict[str, Any]) -> None:
    """A session that cannot be stored can be shown."""
    given: dict[str, Any] = {"id": "x"} | fields

    assert len(repr(Session[Any](**given))) < 200


def test_digests_distinguish_sessions() -> None:
    """A digest is short and stable, differs between ids, and is not a part of the id."""
    ids = [new_session_id() for _ in range(200)]

    digests = [id_digest(id) for id in ids]

    assert digests == [id_digest(id) for id in ids]
    assert len(set(digests)) == len(ids)
    assert all(len(digest) <= 12 for digest in digests)
    assert not any(digest.strip("#") in id for digest, id in zip(digests, ids, strict=True))


def test_copies_are_independent() -> None:
    """`copy.deepcopy` and `msgspec.structs.replace` work as with any struct."""
    session = secretive()

    other = copy.deepcopy(session)
    other.metadata["more"] = "x"

    assert "more" not in session.metadata
    assert msgspec.structs.replace(session, kind="sse").kind == "sse"
    assert session.kind == "web"


def test_new_ids_are_random_and_url_safe() -> None:
    """New ids are valid, distinct, and have room for 128 bits; every character varies."""
    ids = [new_session_id() for _ in range(2_000)]

    assert len(set(ids)) == len(ids)
    assert set("".join(ids)) <= URL_SAFE
    assert min(map(len, ids)) * 6 >= 128
    for id in ids:
        check_id(id)
    # A character with few values would carry fewer than six bits.
    places = [{id[place] for id in ids} for place in range(21)]
    assert min(map(len, places)) > 50


def test_new_ids_come_from_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are credentials, so their bits come from `secrets`, not from a predictable generator."""
    asked: list[int | None] = []

    def token_urlsafe(nbytes: int | None = None) -> str:
        asked.append(nbytes)
        return "a-token"

    monkeypatch.setattr("secrets.token_urlsafe", token_urlsafe)

    assert new_session_id() == "a-token"
    assert all(nbytes is None or nbytes >= 16 for nbytes in asked)


@pytest.mark.parametrize(
    "id",
    [
        "x",
        "!",
        "~",
        "x" * 256,
        "".join(map(chr, range(0x21, 0x7F))),
        "{slot}:a/b?c=d&e#f%20",
        "*",
        "'\"\\`",
    ],
    ids=["one", "first", "last", "longest", "all", "punctuation", "star", "quotes"],
)
def test_visible_ascii_is_a_valid_id(id: str) -> None:
    """1 to 256 visible ASCII characters are valid, also if they have a meaning elsewhere."""
    check_id(id)


@pytest.mark.parametrize(
    ("id", "hint"),
    [
        ("", "empty"),
        ("x" * 257, "257"),
        ("x" * 1_000_000, "1000000"),
        (" ", "visible"),
        (" x", "visible"),
        ("x ", "visible"),
        ("a b", "visible"),
        ("x\n", "visible"),
        ("\nx", "visible"),
        ("x\r\ny", "visible"),
        ("x\t", "visible"),
        ("\x00", "visible"),
        ("x\x00", "visible"),
        ("\x1f", "visible"),
        ("\x7f", "visible"),
        ("\x80", "visible"),
        ("é", "visible"),
        ("e\u0301", "visible"),
        ("\N{FULLWIDTH DIGIT ONE}", "visible"),
        ("\u200b", "visible"),
        ("\ud800", "visible"),
        ("🍪", "visible"),
    ],
    ids=ascii,
)
def test_other_strings_are_invalid_ids(id: str, hint: str) -> None:
    """Other strings are `InvalidSessionId`; the message has the reason, and not the id."""
    with pytest.raises(InvalidSessionId, match=hint) as caught:
        check_id(id)

    assert len(str(caught.value)) < 100
    assert not (len(id.strip()) > 1 and id in str(caught.value))


@pytest.mark.parametrize("id", [b"x", None, 7, ["x"]], ids=repr)
def test_id_of_another_type_is_a_type_error(id: Any) -> None:
    """A value that is not a string is a mistake of the caller, not of a client."""
    with pytest.raises(TypeError, match=f"not {type(id).__name__}"):
        check_id(id)


def test_moments_are_normalised_to_utc() -> None:
    """Any aware datetime becomes the same moment in UTC."""
    moment = datetime(2030, 1, 1, 1, tzinfo=timezone(timedelta(hours=2)))

    normal = as_utc(moment, "it")

    assert normal == moment
    assert normal.tzinfo is UTC
    assert normal.isoformat() == "2029-12-31T23:00:00+00:00"


@pytest.mark.parametrize(
    ("moment", "hint"),
    [
        (datetime(2030, 1, 1), "it is a naive datetime"),  # noqa: DTZ001 - naive on purpose
        (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))), "it is outside the years"),
        (
            datetime(9999, 12, 31, 23, tzinfo=timezone(-timedelta(hours=2))),
            "it is outside the years",
        ),
        ("2030-01-01", "it is a datetime, not str"),
        (1_900_000_000, "it is a datetime, not int"),
        (None, "it is a datetime, not NoneType"),
    ],
    ids=["naive", "before-year-1", "after-year-9999", "str", "int", "none"],
)
def test_other_moments_are_invalid(moment: Any, hint: str) -> None:
    """A moment without a time zone, or without a place in UTC, is `InvalidSession`."""
    with pytest.raises(InvalidSession, match=hint):
        as_utc(moment, "it")


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (datetime(1970, 1, 1, tzinfo=UTC), 0),
        (datetime(1970, 1, 1, 0, 0, 0, 999, tzinfo=UTC), 0),
        (datetime(1970, 1, 1, 0, 0, 0, 1_000, tzinfo=UTC), 1),
        (datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), -1),
        (datetime(2030, 3, 17, 17, 46, 40, 1_999, tzinfo=UTC), 1_900_000_000_001_999 // 1_000),
        (datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC), 253_402_300_799_999),
        (datetime(1, 1, 1, tzinfo=UTC), -62_135_596_800_000),
    ],
)
def test_milliseconds_are_rounded_down(moment: datetime, expected: int) -> None:
    """The time since the epoch is exact, in whole milliseconds."""
    assert epoch_milliseconds(moment) == expected
