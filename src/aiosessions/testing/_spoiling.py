"""Codecs that watch or spoil records, and the unreadable ones that a storage must refuse."""

from collections.abc import Callable
from typing import Any

import msgspec

from ..codec import Codec, JsonCodec, MsgpackCodec
from ..session import Session, new_session_id


class SpoilingCodec:
    """A codec that misbehaves on demand.

    Attributes:
        spoil: If set, makes the stored payload in place of the encoder.
        refusal: If set, the error that both methods raise.

    Args:
        reader: The codec that decodes, if it is not the one that encodes.
    """

    def __init__(self, reader: Codec[Any] | None = None) -> None:
        self.spoil: Callable[[Session[Any]], bytes] | None = None
        self.refusal: Exception | None = None
        self._writer: Codec[Any] = JsonCodec()
        self._reader = reader or self._writer

    def encode(self, session: Session[Any]) -> bytes:
        """Return the session as bytes, or the result of `spoil`."""
        if self.refusal:
            raise self.refusal
        return (self.spoil or self._writer.encode)(session)

    def decode(self, payload: bytes) -> Session[Any]:
        """Return the session of a readable payload."""
        if self.refusal:
            raise self.refusal
        return self._reader.decode(payload)


class SpyingCodec:
    """A codec that records its arguments.

    Attributes:
        ids: The ids of the sessions that it encoded.
        payloads: The payloads that it decoded.
    """

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.payloads: list[bytes] = []
        self._codec: Codec[Any] = JsonCodec()

    def encode(self, session: Session[Any]) -> bytes:
        """Return the session as bytes."""
        self.ids.add(session.id)
        return self._codec.encode(session)

    def decode(self, payload: bytes) -> Session[Any]:
        """Return the session of a payload."""
        self.payloads.append(bytes(payload))
        return self._codec.decode(payload)


def reader_of_floats() -> SpoilingCodec:
    """A codec that reads floats only, so that `UNREADABLE` has a payload of the wrong type."""
    return SpoilingCodec(reader=JsonCodec(float))


def _json(session: Session[Any], **changes: Any) -> bytes:
    return JsonCodec[Any]().encode(msgspec.structs.replace(session, **changes))


UNREADABLE: dict[str, Callable[[Session[Any]], bytes]] = {
    "empty": lambda _: b"",
    "null": lambda _: b"null",
    "empty-object": lambda _: b"{}",
    "garbage": lambda _: b"\x80\xff\0",
    "truncated": lambda session: _json(session)[:-1],
    "another-format": MsgpackCodec[Any]().encode,
    "another-session": lambda session: _json(session, id=new_session_id()),
    "another-type": lambda session: _json(session, data=["no number"]),
}
"""Payloads that `reader_of_floats` cannot read as the session that they are made from."""
