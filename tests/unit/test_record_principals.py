"""The principal in a record: its digest, and the revision that tells whether it was changed."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosessions import CorruptSession, JsonCodec, Session, session_digest
from aiosessions.record import (
    HEADER_BYTES,
    ROTATED_KEY,
    is_rotated,
    is_written_for,
    lease_of,
    owner_of,
    principal_digest,
    read_info,
    revision_of,
    seal,
    unseal,
)

JSON = JsonCodec[Any]()
RANDOM = "AbCd-_01234"
GOLDEN = f"{RANDOM}.MdOG"  # of a session without a principal, in golden/


class Silent:
    """A codec that writes no field, because JSON has no lone surrogates."""

    def encode(self, session: Session[Any]) -> bytes:  # noqa: ARG002 - for the tests
        """Return a payload."""
        return b"payload"

    def decode(self, payload: bytes) -> Session[Any]:
        """No test decodes it."""
        raise NotImplementedError


principals = st.none() | st.text(st.characters(exclude_categories=()), max_size=5)


@settings(deadline=None, max_examples=200)
@given(principals, principals)
def test_revision_fits_one_principal(principal: str | None, other: str | None) -> None:
    """It is random, and tells whether the principal was changed."""
    session = Session[Any](id="x", principal=principal)

    revisions = [seal(session, Silent())[0] for _ in range(2)]

    assert revisions[0][:11] != revisions[1][:11]
    for revision in revisions:
        assert is_written_for(revision, principal)
        assert is_written_for(revision, other) is (principal == other)


@pytest.mark.parametrize("revision", ["", "1", ".", "x" * 11, "x" * 16, f"{RANDOM}.", f"{RANDOM}x"])
def test_foreign_revision_fits_no_principal(revision: str) -> None:
    """It was made by another storage, or by nobody."""
    for principal in (None, "", "alice"):
        assert is_written_for(revision, principal) is False
    assert is_written_for(GOLDEN, None)
    assert not is_written_for(GOLDEN + "x", None)


def test_principals_have_digests() -> None:
    """Any string has one, and it differs from the digest of the same string as an id."""
    texts = [
        "",
        "alice",
        "Alice",
        "alice ",
        "principal:alice",
        "\0",
        "\ud800",
        "\udfff",
        "x" * 9999,
    ]

    digests = {principal_digest(text) for text in texts}

    assert principal_digest("zoë@example.com") == "a9e25243a80f8fa11d60025b00280654"
    assert len(digests) == len(texts)
    assert all(len(each) == 32 and set(each) <= set("0123456789abcdef") for each in digests)
    assert principal_digest("alice") != session_digest("alice")


@pytest.mark.parametrize("principal", [None, "", "alice"])
@pytest.mark.parametrize("metadata", [{}, {ROTATED_KEY: "mark"}])
def test_header_tells_owner_and_rotation(principal: str | None, metadata: dict[str, str]) -> None:
    """Without an owner, no index needs to know that the id was rotated away."""
    session = Session[Any](id="x", principal=principal, metadata=metadata)

    revision, _, record = seal(session, JSON)

    form = b"1" if principal is None else b"3" if metadata else b"2"
    assert record[:1] == form
    assert is_rotated(record) is (form == b"3")
    assert revision_of(record) == revision
    assert unseal(record, "x", JSON, now=lambda: 0) == msgspec.structs.replace(
        session, revision=revision
    )
    if principal is not None:
        assert owner_of(record).decode() == principal_digest(principal)
        assert lease_of(record) == 999_999_999_999_999
        assert record[HEADER_BYTES:].startswith(b"{")


def test_listed_session_has_no_id() -> None:
    """It has the digest, and the other fields of the session except for the revision."""
    session = Session[Any](
        id="x",
        kind="web",
        principal="alice",
        metadata={"a": "b"},
        data=["tea"],
        expires_at=datetime(2030, 1, 1, tzinfo=UTC),
    )
    _, _, record = seal(session, JSON)

    info = read_info(record, session.digest, JSON)

    assert msgspec.structs.asdict(info) == {
        "digest": session.digest,
        **{name: getattr(session, name) for name in Session.__struct_fields__[1:-1]},
    }
    with pytest.raises(CorruptSession, match="another session"):
        read_info(record, session_digest("y"), JSON)
