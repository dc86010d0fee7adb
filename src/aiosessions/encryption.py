"""Encrypted sessions: a codec that wraps another one, with AES-256-GCM and a ring of keys.

    offset  length  field
    0       1       format, 0x01
    1       4       key id: the first bytes of the SHA-256 of `aiosessions key id` and the key
    5       12      nonce, random
    17      ...     the payload of the wrapped codec, encrypted, and the tag of 16 bytes

The format and the key id are associated data, so the tag covers every byte.

Invariants:

- The identity of the session is inside the encrypted payload. Storages compare it with the key of
  the record, so a payload that was moved to the key of another session is refused.
- `decode` of bytes without a valid tag is `CorruptSession`.
- Neither messages nor the local variables of this module's frames hold keys or plaintext when an
  error is raised.
"""

import base64
import hashlib
import os
from collections.abc import Sequence
from typing import Generic, Protocol

from .codec import Codec
from .errors import CorruptSession
from .session import D, Session
from .storage import check_codec

_FORMAT = b"\x01"
_KEY_BYTES = 32
_PREFIX = slice(0, 5)
_NONCE = slice(5, 17)
_CIPHERTEXT = slice(17, None)
_LEAST_BYTES = 33  # with an empty ciphertext
_STANDARD_BASE64 = str.maketrans("-_", "+/")


class _Cipher(Protocol):
    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes, /) -> bytes: ...

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes, /) -> bytes: ...


class EncryptedCodec(Generic[D]):
    """Sessions of another codec, encrypted and authenticated with AES-256-GCM.

    It needs the extra `aiosessions[encryption]`. The encryption adds 33 bytes to a payload, after
    the wrapped codec has checked its `max_bytes`.

    Nonces are random and have 96 bits. NIST SP 800-38D, section 8.3, allows at most 2**32 messages
    under one key with such nonces. Each store, by any replica, is one message: 1,000 stores per
    second reach the limit in 49 days. docs/encryption.md describes the rotation of keys.

    Args:
        codec: The codec that encodes and decodes sessions.
        keys: The keys, 32 random bytes each: as bytes, or as text in base64, standard or URL-safe,
            with or without padding. The first key encrypts, and all keys decrypt.

    Raises:
        ValueError: The ring is empty, a key does not have 32 bytes, or two keys are equal. The
            message names the position of the key.
        TypeError: `codec` is not a codec.
        ImportError: `cryptography` is not installed.
    """

    def __init__(self, codec: Codec[D], keys: Sequence[bytes | str]) -> None:
        check_codec(codec)
        self._codec = codec
        self._ciphers: dict[bytes, _Cipher] = {}  # for a repr after an error
        ring = _ring(keys)
        del keys  # error trackers record the locals of this frame
        if isinstance(ring, Exception):
            raise ring
        self._invalid_tag, self._ciphers = ring
        self._prefix, self._cipher = next(iter(self._ciphers.items()))

    def __repr__(self) -> str:
        return f"EncryptedCodec({self._codec!r}, keys={len(self._ciphers)})"

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of the keys, in the order of the ring: 8 hex digits each, and not secret."""
        return tuple(prefix.removeprefix(_FORMAT).hex() for prefix in self._ciphers)

    def encode(self, session: Session[D]) -> bytes:
        """Return the session as bytes, encrypted with the first key.

        Raises:
            InvalidSession: The wrapped codec cannot encode the session.
        """
        nonce = os.urandom(12)
        # No local variable holds the plaintext, neither here nor in `decode`.
        encrypted = self._cipher.encrypt(nonce, self._codec.encode(session), self._prefix)
        return self._prefix + nonce + encrypted

    def decode(self, payload: bytes) -> Session[D]:
        """Return the session that was encoded.

        Raises:
            CorruptSession: The payload is not encrypted, its key is not in the ring, it was
                changed, or the wrapped codec cannot read it.
        """
        if payload[_PREFIX] in self._ciphers and len(payload) >= _LEAST_BYTES:
            return self._codec.decode(self._decrypt(payload))
        refusal = self._refusal(payload)
        payload = b""  # perhaps plaintext, and error trackers record the locals of this frame
        raise CorruptSession(f"the stored session {refusal}")

    def _decrypt(self, payload: bytes) -> bytes:
        prefix = payload[_PREFIX]
        try:
            return self._ciphers[prefix].decrypt(payload[_NONCE], payload[_CIPHERTEXT], prefix)
        except self._invalid_tag:
            refusal = "was changed, or its key is wrong"
        raise CorruptSession(f"the stored session {refusal}")

    def _refusal(self, payload: bytes) -> str:
        """The reason why a payload cannot be decrypted."""
        if payload[:1] != _FORMAT:
            return "is not encrypted in a format that this release reads"
        if len(payload) < _LEAST_BYTES:
            return "is too short to be an encrypted one"
        return f"needs the key {payload[1:5].hex()}, which is not in the ring"


def _ring(
    keys: Sequence[bytes | str],
) -> tuple[type[Exception], dict[bytes, _Cipher]] | Exception:
    """Make the ciphers of the keys, each under the leading bytes of its payloads.

    Returns:
        The exception for an invalid tag, and the ciphers; or the error. An error that was raised
        here would have a traceback with the keys.
    """
    try:
        # Here, because the package does not require cryptography.
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415
    except ImportError as error:
        return ImportError(f"EncryptedCodec needs aiosessions[encryption]: {error}")
    if isinstance(keys, str | bytes):
        return TypeError(f"keys is a sequence of keys, not {type(keys).__name__}")
    ciphers: dict[bytes, _Cipher] = {}
    for position, key in enumerate(keys):
        if not isinstance(key, str | bytes):
            return TypeError(f"keys[{position}] is {type(key).__name__}, not bytes or str")
        secret = _from_base64(key) if isinstance(key, str) else key
        if len(secret) != _KEY_BYTES:
            form = "in base64" if isinstance(key, str) else "long; text in base64 is a str"
            return ValueError(f"keys[{position}] is not {_KEY_BYTES} bytes {form}")
        digest = hashlib.sha256(b"aiosessions key id" + secret).digest()
        prefix = _FORMAT + digest[:4]
        if prefix in ciphers:
            return ValueError(f"keys[{position}] has the key id of an earlier key")
        ciphers[prefix] = AESGCM(secret)
    return (InvalidTag, ciphers) if ciphers else ValueError("keys is empty")


def _from_base64(text: str) -> bytes:
    """The decoded bytes; none if the text is not base64."""
    digits = text.strip().rstrip("=").translate(_STANDARD_BASE64)
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except ValueError:
        return b""
