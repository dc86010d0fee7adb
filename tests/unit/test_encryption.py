"""Encrypted sessions come back; changed, moved and foreign payloads are refused."""

import base64
import hashlib
import secrets
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosessions import (
    Codec,
    CorruptSession,
    EncryptedCodec,
    InvalidSession,
    JsonCodec,
    LocalStorage,
    MsgpackCodec,
    Session,
)
from aiosessions.testing import FakeTime, IndexedStorageContract, StorageFactory
from tests.support.data_types import SECRET, Cart, both_codecs
from tests.support.secrets import locals_in, said_by

KEY = bytes(range(32))
KEY_ID = hashlib.sha256(b"aiosessions key id" + KEY).digest()[:4]
OTHER = bytes(range(100, 132))
TEXT = base64.b64encode(bytes(range(224, 256))).decode()
CODEC = EncryptedCodec[Any](JsonCodec(), [KEY])
MOMENT = datetime(2030, 1, 1, tzinfo=UTC)
SESSION = Session[Any](
    id="x", principal=SECRET, data=[SECRET], created_at=MOMENT, updated_at=MOMENT
)
# Records outlive releases. This payload was written once and does not change.
GOLDEN = bytes.fromhex(
    "0121c9c3890f17bbbc1f3e68fb68f333f243e7967a5247faac0231244c8a9f037a7ed2059b17ad1e"
    "90d62db9257f82d3d554bfb9aab55cdb3cb2e49eeadf940a7e0e9e3ad81513b388426dc2a61c4004"
    "5ddaa8c40d3b4a78ca45b2e1c323ac1644ebfa268ec3da5e3e535f1e3497e87a48e2f91bd70bf7a4"
    "585490bd03a223ebb24c5a6c8d408b9e2742a53b50969316d8377bdb5b409ef6c2a24403"
)


class TestContract(FakeTime, IndexedStorageContract):
    """A storage with encrypted sessions keeps the promises of every storage."""

    @pytest.fixture
    def make_storage(self) -> StorageFactory:
        """Storages that encrypt the payloads of the codec."""

        def make(*, ttl: float = 60.0, codec: Codec[Any] | None = None) -> LocalStorage[Any]:
            encrypted = EncryptedCodec(codec or JsonCodec(), [KEY])
            return LocalStorage(ttl=ttl, codec=encrypted, clock=self.clock)

        return make


def refusal(codec: Codec[Any], payload: bytes) -> str:
    """The message of `CorruptSession`, which reveals neither keys nor plaintext."""
    with pytest.raises(CorruptSession) as caught:
        codec.decode(payload)
    del payload  # of this frame
    shown = said_by(caught.value) + locals_in(caught.value)
    assert not [each for each in (SECRET, repr(KEY), KEY.hex(), repr(OTHER)) if each in shown]
    return str(caught.value)


@both_codecs
@settings(deadline=None, max_examples=50)
@given(data=st.text() | st.lists(st.integers(0, 2**60)), principal=st.none() | st.text())
def test_encrypted_sessions_come_back(make: Any, data: object, principal: str | None) -> None:
    """Every session comes back as it was; no two payloads are equal."""
    codec = EncryptedCodec[Any](make(), [KEY, OTHER])
    session = Session[Any](id="x", principal=principal, data=data)

    payload = codec.encode(session)

    assert codec.decode(payload) == session
    assert codec.encode(session) != payload


@settings(deadline=None)
@given(place=st.integers(0, len(GOLDEN) - 1), mask=st.integers(1, 255))
def test_changed_byte_is_corrupt(place: int, mask: int) -> None:
    """The tag covers every byte."""
    changed = bytearray(GOLDEN)
    changed[place] ^= mask

    refusal(CODEC, bytes(changed))


@pytest.mark.parametrize("payload", [GOLDEN[:-1], GOLDEN + b"\0", GOLDEN[:33]], ids=len)
def test_lost_or_added_bytes_are_corrupt(payload: bytes) -> None:
    """A payload has one length."""
    assert refusal(CODEC, payload) == "the stored session was changed, or its key is wrong"


def test_layout_is_the_documented_one() -> None:
    """Old payloads are read, and new ones have the fields of docs/stored-form.md."""
    payload = CODEC.encode(SESSION)

    assert CODEC.decode(GOLDEN) == SESSION
    assert len(payload) == len(GOLDEN)
    assert payload[:5] == GOLDEN[:5] == b"\x01" + KEY_ID
    plaintext = AESGCM(KEY).decrypt(payload[5:17], payload[17:], payload[:5])
    assert plaintext == JsonCodec[Any]().encode(SESSION)


async def test_swapped_records_are_corrupt() -> None:
    """A payload under the key of another session is not that session."""
    async with LocalStorage[Any](ttl=60, codec=CODEC) as storage:
        for id in ("a", "b"):
            await storage.store(Session(id=id, data=SECRET))
        one, other = storage._table._entries.values()
        one.value, other.value = other.value, one.value

        for id in ("a", "b"):
            with pytest.raises(CorruptSession):
                await storage.load(id)


def test_rotation_keeps_sessions_readable() -> None:
    """The first key encrypts, all decrypt, so each step reads the payloads of its neighbours."""
    steps = [[KEY], [KEY, OTHER], [OTHER, KEY], [OTHER]]
    codecs = [EncryptedCodec[Any](JsonCodec(), keys) for keys in steps]
    writers = [codec.key_ids[0] for codec in codecs]

    for writer, reader in [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)]:
        assert codecs[reader].decode(codecs[writer].encode(SESSION)) == SESSION
    assert writers == [writers[0]] * 2 + [writers[3]] * 2


def test_missing_key_is_named_by_its_id() -> None:
    """The id of the key is all that an operator learns and needs."""
    codec = EncryptedCodec[Any](JsonCodec(), [OTHER])

    assert CODEC.key_ids == (KEY_ID.hex(),)
    assert refusal(codec, GOLDEN) == (
        f"the stored session needs the key {KEY_ID.hex()}, which is not in the ring"
    )


def test_wrong_key_with_the_right_id_is_corrupt() -> None:
    """A collision of key ids is detected by the tag."""
    prefix = b"\x01" + KEY_ID
    payload = prefix + bytes(12) + AESGCM(OTHER).encrypt(bytes(12), b"{}", prefix)

    assert "was changed, or its key is wrong" in refusal(CODEC, payload)


@pytest.mark.parametrize(
    ("payload", "hint"),
    [
        (b"", "not encrypted"),
        (JsonCodec[Any]().encode(SESSION), "not encrypted"),
        (MsgpackCodec[Any]().encode(SESSION), "not encrypted"),
        (b"\x02" + GOLDEN[1:], "not encrypted in a format that this release reads"),
        (GOLDEN[:1], "too short"),
        (GOLDEN[:32], "too short"),
    ],
    ids=["empty", "json", "msgpack", "newer-format", "format-only", "without-tag"],
)
def test_other_payloads_are_corrupt(payload: bytes, hint: str) -> None:
    """An unencrypted session is refused, else anyone could forge one."""
    assert hint in refusal(CODEC, payload)


def test_refusals_of_the_wrapped_codec_pass_through() -> None:
    """The errors of the wrapped codec reach the caller, without plaintext in a frame."""
    typed: Codec[Any] = EncryptedCodec(JsonCodec(Cart), [KEY])

    assert "not JSON of this data type" in refusal(typed, GOLDEN)
    with pytest.raises(InvalidSession, match="at most 10 "):
        EncryptedCodec(JsonCodec(max_bytes=10), [KEY]).encode(SESSION)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.rstrip("="),
        TEXT.translate(str.maketrans("+/", "-_")),
        f" {TEXT}\n",
    ],
    ids=["standard", "unpadded", "url-safe", "spaces-around"],
)
def test_every_spelling_of_a_key_is_accepted(text: str) -> None:
    """Keys are bytes, or base64 as common tools write it."""
    expected = EncryptedCodec(JsonCodec(), [bytes(range(224, 256))])

    assert EncryptedCodec(JsonCodec(), [text]).key_ids == expected.key_ids


@pytest.mark.parametrize(
    ("bad", "kind", "hint"),
    [
        (SECRET, ValueError, "keys[1] is not 32 bytes in base64"),
        (SECRET * 6, ValueError, "keys[1] is not 32 bytes in base64"),
        (f"é{SECRET}", ValueError, "keys[1] is not 32 bytes in base64"),
        (SECRET.encode(), ValueError, "keys[1] is not 32 bytes long"),
        (OTHER, ValueError, "keys[1] has the key id of an earlier key"),
        ([SECRET], TypeError, "keys[1] is list, not bytes or str"),
    ],
    ids=["short", "long", "not-ascii", "bytes", "repeated", "list"],
)
def test_bad_keys_are_named_by_position(bad: Any, kind: type[Exception], hint: str) -> None:
    """An error names the position of a key, and never shows a key."""
    ring = [OTHER, bad, KEY]
    with pytest.raises(kind) as caught:
        EncryptedCodec(JsonCodec(), ring)

    del bad, ring  # of this frame
    assert hint in str(caught.value)
    shown = said_by(caught.value) + locals_in(caught.value)
    assert not [each for each in (SECRET, repr(OTHER)) if each in shown]


def test_ring_is_a_sequence_with_keys() -> None:
    """No keys, and one key in place of the sequence, are errors."""
    with pytest.raises(ValueError, match="keys is empty"):
        EncryptedCodec(JsonCodec(), [])
    for keys in (TEXT, KEY):
        with pytest.raises(TypeError, match="a sequence of keys"):
            EncryptedCodec(JsonCodec(), keys)  # type: ignore[arg-type]


def test_repr_shows_the_number_of_keys() -> None:
    """A repr holds no key."""
    codec = EncryptedCodec(JsonCodec(Cart), [secrets.token_bytes(32), KEY])

    assert repr(codec) == f"EncryptedCodec({JsonCodec(Cart)!r}, keys=2)"


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cryptography the error names the extra."""
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)

    with pytest.raises(ImportError, match=r"aiosessions\[encryption\]") as caught:
        EncryptedCodec(JsonCodec(), [KEY])
    assert repr(KEY) not in locals_in(caught.value)
