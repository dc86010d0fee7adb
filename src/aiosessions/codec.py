"""Codecs turn a session into bytes and back; storages put a header in front and keep the result.

Invariants:

- What `encode` accepts, `decode` reads back: a codec of ours decodes what it has just encoded, so
  that data of the wrong type is refused by the writer, who can mend it, and not found by a reader.
- `decode` of any bytes is a session or `CorruptSession`.
- Errors never quote the payload, nor do the exceptions they are chained to.
"""

import re
from typing import Any, Generic, Protocol, cast, overload

import msgspec

from .errors import CorruptSession, InvalidSession
from .session import D, Session

MAX_BYTES = 1_048_576
_ANYTHING = cast("Any", Any)


class Codec(Protocol[D]):
    """How a session becomes bytes.

    A codec may wrap another one, to encrypt or to compress. It does not handle the format version
    or the revision: storages keep these in a header of their own, in front of the payload.
    """

    def encode(self, session: Session[D]) -> bytes:
        """The session as bytes.

        Raises:
            InvalidSession: The session cannot be encoded, or is too large once it is.
        """
        ...

    def decode(self, payload: bytes) -> Session[D]:
        """The session that `encode` was given.

        Raises:
            CorruptSession: The payload is not one that this codec can read.
        """
        ...


class _Encoder(Protocol):
    def encode(self, obj: object, /) -> bytes: ...


class _Decoder(Protocol[D]):
    def decode(self, buf: bytes, /) -> Session[D]: ...


class _MsgspecCodec(Generic[D]):
    """What the JSON and the MessagePack codec share: all but the encoder and the decoder."""

    _format: str

    def __init__(
        self, encoder: _Encoder, decoder: _Decoder[D], data_type: object, max_bytes: int
    ) -> None:
        if max_bytes <= 0:
            message = "max_bytes must be positive"
            raise ValueError(message)
        self._encoder = encoder
        self._decoder = decoder
        self._data_type = data_type
        self._max_bytes = max_bytes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._data_type!r}, max_bytes={self._max_bytes})"

    def encode(self, session: Session[D]) -> bytes:
        """The session as bytes.

        Raises:
            InvalidSession: Some field is not of its type, `data` is not of the data type or cannot
                be encoded, a datetime is naive, or the result has more than `max_bytes` bytes.
        """
        try:
            payload = self._encoder.encode(session)
            decoded = self._decoder.decode(payload)
        except Exception as error:  # noqa: BLE001 - types of the application's own raise anything
            cause = error
        else:
            if not _same_fields(session, decoded):
                raise InvalidSession("kind, principal and the pairs of metadata are of type str")
            if len(payload) <= self._max_bytes:
                return payload
            message = (
                f"the session takes {len(payload):,} bytes of {self._format}; "
                f"at most {self._max_bytes:,} are allowed"
            )
            raise InvalidSession(message)
        raise InvalidSession(
            f"the session cannot be kept as {self._format}: {_without_values(cause)}"
        ) from _redacted(cause)

    def decode(self, payload: bytes) -> Session[D]:
        """The session that was encoded.

        Raises:
            CorruptSession: The payload does not decode, or `data` is not of the data type.
        """
        try:
            return self._decoder.decode(payload)
        except Exception as error:  # noqa: BLE001 - types of the application's own raise anything
            cause = error
        raise CorruptSession(
            f"the stored session is no {self._format} of this type: {_without_values(cause)}"
        ) from _redacted(cause)


class JsonCodec(_MsgspecCodec[D]):
    """Sessions as JSON, readable in any tool that shows what a database holds.

    Without a data type, `data` comes back as what JSON has: lists for tuples, strings for bytes and
    dates. JSON has no NaN and no infinities: such floats are encoded as null. `MsgpackCodec` keeps
    them.

    Args:
        data_type: The type of `Session.data`: any type that msgspec supports (structs, dataclasses,
            TypedDicts, builtins, unions, ...). `data` is validated against it, both ways.
        max_bytes: The most bytes an encoded session may have.

    Raises:
        TypeError: msgspec cannot make a decoder for the data type.
        ValueError: `max_bytes` is not positive.
    """

    _format = "JSON"

    @overload
    def __init__(self, data_type: type[D], max_bytes: int = MAX_BYTES) -> None: ...

    # Unions and other forms that are no classes.
    @overload
    def __init__(
        self: "JsonCodec[Any]", data_type: Any = _ANYTHING, max_bytes: int = MAX_BYTES
    ) -> None: ...

    def __init__(self, data_type: Any = _ANYTHING, max_bytes: int = MAX_BYTES) -> None:
        decoder = msgspec.json.Decoder(_session_of(data_type))
        super().__init__(msgspec.json.Encoder(), decoder, data_type, max_bytes)


class MsgpackCodec(_MsgspecCodec[D]):
    """Sessions as MessagePack: smaller than JSON, and it keeps bytes and every float as they are.

    Args:
        data_type: The type of `Session.data`: any type that msgspec supports. `data` is validated
            against it, both ways.
        max_bytes: The most bytes an encoded session may have.

    Raises:
        TypeError: msgspec cannot make a decoder for the data type.
        ValueError: `max_bytes` is not positive.
    """

    _format = "MessagePack"

    @overload
    def __init__(self, data_type: type[D], max_bytes: int = MAX_BYTES) -> None: ...

    # Unions and other forms that are no classes.
    @overload
    def __init__(
        self: "MsgpackCodec[Any]", data_type: Any = _ANYTHING, max_bytes: int = MAX_BYTES
    ) -> None: ...

    def __init__(self, data_type: Any = _ANYTHING, max_bytes: int = MAX_BYTES) -> None:
        decoder = msgspec.msgpack.Decoder(_session_of(data_type))
        super().__init__(msgspec.msgpack.Encoder(), decoder, data_type, max_bytes)


def _same_fields(session: Session[Any], decoded: Session[Any]) -> bool:
    """Whether fields that are text have come back as they were; bytes, say, come back as text."""
    return (
        decoded.kind == session.kind
        and decoded.principal == session.principal
        and decoded.metadata == session.metadata
    )


def _session_of(data_type: type[D]) -> type[Session[D]]:
    """`Session[data_type]`, of a type that only the caller knows."""
    return cast("type[Session[D]]", Session[data_type])  # type: ignore[valid-type]


# What msgspec says that comes from types, not from the payload: it also quotes values, enum members
# and unknown fields. Whatever is not one of these is not repeated.
_SAFE = re.compile(
    r"""
      Expected\ `[^`'"]+`(\ of\ length)?(\ [<>=]+\ [\d.]+)?(,\ got\ `[a-z]+`)?
    | Object\ missing\ required\ field\ `\w+`
    | Invalid\ (enum\ value|value|UUID|decimal\ string|epoch\ timestamp)
    | Invalid\ (RFC3339|base64|ISO8601|MessagePack)( [a-z]+)*
    | Input\ data\ was\ truncated
    | (JSON|MessagePack\ data)\ is\ malformed:\ [a-z ]+(\(byte\ \d+\))?
    | Encoding\ objects\ of\ type\ [\w.]+\ is\ unsupported
    """,
    re.VERBOSE,
)
_PATH = re.compile(r" - at (?:`key` in )?`\$[\w.\[\]]*`$")


def _without_values(error: Exception) -> str:
    """What is wrong, and where, in words that hold nothing of the payload.

    What the application's own types raise, on their own or through msgspec, says whatever it
    likes, so only its type is told.
    """
    if error.__cause__ is not None:
        return f"its own type refuses it with {type(error.__cause__).__name__}"
    if not isinstance(error, msgspec.MsgspecError | TypeError):
        return type(error).__name__
    text = str(error)
    safe = _SAFE.match(text)
    path = _PATH.search(text)
    return f"{safe[0] if safe else 'a value or a field is refused'}{path[0] if path else ''}"


def _redacted(error: Exception) -> Exception:
    """What to chain to instead of `error`, whose own text may quote the payload."""
    cause = msgspec.MsgspecError(_without_values(error))
    return cause.with_traceback(error.__traceback__)
