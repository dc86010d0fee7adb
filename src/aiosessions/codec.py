"""Codecs turn a session into bytes and back; storages put a header in front and keep the result.

Invariants:

- `decode` returns the session that `encode` was given: a codec decodes every session that it has
  encoded, and compares. The writer, who can change the data, gets the error, and not a reader.
- `decode` of any bytes is a session or `CorruptSession`.
- Errors do not quote the payload: neither their messages, nor the exceptions they are chained to,
  nor the local variables of this module's frames, which error trackers record.
"""

import re
from collections.abc import Iterable
from datetime import datetime, time
from typing import Any, Generic, Protocol, cast, overload

import msgspec

from .errors import CorruptSession, InvalidSession
from .session import D, Session

MAX_BYTES = 1_048_576
_ANYTHING = cast("Any", Any)


class Codec(Protocol[D]):
    """The two methods that turn a session into bytes and back.

    A codec may wrap another one, to encrypt or to compress. It does not handle the format version
    or the revision: storages keep these in a header of their own, in front of the payload.
    """

    def encode(self, session: Session[D]) -> bytes:
        """Return the session as bytes.

        Raises:
            InvalidSession: The session cannot be encoded, or its payload is too large.
        """
        ...

    def decode(self, payload: bytes) -> Session[D]:
        """Return the session that `encode` was given.

        Raises:
            CorruptSession: The payload is not one that this codec can read.
        """
        ...


class _Encoder(Protocol):
    def encode(self, obj: object, /) -> bytes: ...


class _Decoder(Protocol[D]):
    def decode(self, buf: bytes, /) -> Session[D]: ...


class _MsgspecCodec(Generic[D]):
    """The parts that the JSON and the MessagePack codec share."""

    _format: str
    _advice: str

    def __init__(
        self, encoder: _Encoder, decoder: _Decoder[D], data_type: object, max_bytes: int
    ) -> None:
        if max_bytes <= 0:
            raise ValueError("max_bytes must be positive")
        self._encoder = encoder
        self._decoder = decoder
        self._data_type = data_type
        self._max_bytes = max_bytes
        # msgspec sees a record without data as one with the default, which is None.
        self._no_data: str | None = None
        try:
            msgspec.convert(None, data_type)
        except msgspec.ValidationError as error:
            self._no_data = f"{error} - at `$.data`"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._data_type!r}, max_bytes={self._max_bytes})"

    def encode(self, session: Session[D]) -> bytes:
        """Return the session as bytes.

        Raises:
            InvalidSession: A field is not of its type, `data` is not of the data type or would not
                come back as it is, a datetime is naive, or the payload has more than `max_bytes`
                bytes.
        """
        cause: Exception | None = None
        try:
            payload = self._encoder.encode(session)
            refusal = self._refusal(session, payload)
            if refusal is None:
                return payload
        except Exception as error:  # noqa: BLE001 - data types of applications raise anything
            cause = _redacted(error)
            refusal = str(cause)
        payload = b""  # error trackers record the locals of this frame
        raise InvalidSession(f"the session cannot be kept as {self._format}: {refusal}") from cause

    def _refusal(self, session: Session[D], payload: bytes) -> str | None:
        """The reason why the payload of the session cannot be stored, or None."""
        if len(payload) > self._max_bytes:
            return f"it takes {len(payload):,} bytes; at most {self._max_bytes:,} are allowed"
        if session.data is None and self._no_data:
            return self._no_data
        decoded = self._decoder.decode(payload)
        if decoded == session:
            return None
        # Unequal for a good reason, such as a tuple that comes back as a list, or changed.
        change = _change(session, decoded)
        if change is None:
            return None
        what, path = change
        if not path.startswith(".data"):
            return f"{what} - at `${path}`"
        untyped = self._data_type is Any
        advice = self._advice if untyped else f"this data type does not keep it in {self._format}"
        return f"{what} - at `${path}`; {advice}"

    def decode(self, payload: bytes) -> Session[D]:
        """Return the session that was encoded.

        Raises:
            CorruptSession: The payload does not decode, or `data` is not of the data type.
        """
        cause: Exception | None = None
        try:
            session = self._decoder.decode(payload)
            if session.data is not None or self._no_data is None:
                return session
            refusal = self._no_data
        except Exception as error:  # noqa: BLE001 - data types of applications raise anything
            cause = _redacted(error)
            refusal = str(cause)
        payload = b""  # error trackers record the locals of this frame
        raise CorruptSession(
            f"the stored session is not {self._format} of this data type: {refusal}"
        ) from cause


class JsonCodec(_MsgspecCodec[D]):
    """Sessions as JSON, readable in any tool that shows the contents of a database.

    JSON has strings, numbers, booleans, null, arrays, and objects with strings as keys. `encode`
    refuses other data (bytes, dates, sets, integer keys, enums, structs, ...) unless the data type
    says how to read it back. It refuses NaN and infinities always, because JSON has none;
    `MsgpackCodec` keeps them. Tuples are allowed: they come back as lists where the data type does
    not ask for tuples. A value that equals a plain one (of an `IntEnum` or a `defaultdict`, say)
    comes back as the plain one.

    Args:
        data_type: The type of `Session.data`: any type that msgspec supports (structs, dataclasses,
            TypedDicts, builtins, unions, ...). `data` is validated against it, both ways.
        max_bytes: The most bytes an encoded session may have.

    Raises:
        TypeError: msgspec cannot make a decoder for the data type.
        ValueError: `max_bytes` is not positive.
    """

    _format = "JSON"
    _advice = "give JsonCodec a data type, or use MsgpackCodec"

    @overload
    def __init__(self, data_type: type[D], max_bytes: int = MAX_BYTES) -> None: ...

    # Unions and other types that are not classes.
    @overload
    def __init__(
        self: "JsonCodec[Any]", data_type: Any = _ANYTHING, max_bytes: int = MAX_BYTES
    ) -> None: ...

    def __init__(self, data_type: Any = _ANYTHING, max_bytes: int = MAX_BYTES) -> None:
        decoder = msgspec.json.Decoder(_session_of(data_type))
        super().__init__(msgspec.json.Encoder(), decoder, data_type, max_bytes)


class MsgpackCodec(_MsgspecCodec[D]):
    """Sessions as MessagePack: smaller than JSON, with bytes, aware datetimes and every float.

    Without a data type, `encode` refuses data that would come back as other data (sets, naive
    datetimes, UUIDs, enums, structs, ...). Tuples, and values that equal a plain one, come back as
    they do from `JsonCodec`.

    Args:
        data_type: The type of `Session.data`: any type that msgspec supports. `data` is validated
            against it, both ways.
        max_bytes: The most bytes an encoded session may have.

    Raises:
        TypeError: msgspec cannot make a decoder for the data type.
        ValueError: `max_bytes` is not positive.
    """

    _format = "MessagePack"
    _advice = "give MsgpackCodec a data type"

    @overload
    def __init__(self, data_type: type[D], max_bytes: int = MAX_BYTES) -> None: ...

    # Unions and other types that are not classes.
    @overload
    def __init__(
        self: "MsgpackCodec[Any]", data_type: Any = _ANYTHING, max_bytes: int = MAX_BYTES
    ) -> None: ...

    def __init__(self, data_type: Any = _ANYTHING, max_bytes: int = MAX_BYTES) -> None:
        decoder = msgspec.msgpack.Decoder(_session_of(data_type))
        super().__init__(msgspec.msgpack.Encoder(), decoder, data_type, max_bytes)


def _session_of(data_type: type[D]) -> type[Session[D]]:
    """`Session[data_type]`, for a type that only the caller knows."""
    return cast("type[Session[D]]", Session[data_type])  # type: ignore[valid-type]


def _change(before: Any, after: Any) -> tuple[str, str] | None:
    """Find the first change in a value that has come back, and its path.

    Returns None for values that are unequal only because a list stands for a tuple, because a NaN
    does not equal itself, or because their type has no equality.

    The path has names of fields and indices of lists. It has `[...]` for the key of a dict, as
    msgspec does, because a key is payload: it may be an e-mail address or a token.
    """
    if type(before) is tuple and isinstance(after, list):
        before = list(before)
        if before == after:  # in C, for the sake of long lists of tuples
            return None
    parts = _parts(before, after)
    if parts is None:
        if _is_same(before, after):
            return None
        return f"`{type(before).__name__}` comes back as `{type(after).__name__}`", ""
    if isinstance(before, dict):
        for key in before:
            if key not in after:
                return f"a key of type `{type(key).__name__}` does not come back", ""
    for step, old, new in parts:
        if old != new and (change := _change(old, new)) is not None:
            what, path = change
            return what, f"[{step}]{path}" if isinstance(step, int) else f"{step}{path}"
    return None


def _parts(before: Any, after: Any) -> Iterable[tuple[str | int, Any, Any]] | None:
    """Pair the parts of two values of the same type, each with its step of the path."""
    if isinstance(before, list | tuple) and isinstance(before, type(after)):
        return zip(range(len(before)), before, after, strict=True)
    if isinstance(before, dict) and isinstance(before, type(after)):
        return (("[...]", value, after[key]) for key, value in before.items())
    fields = _fields(type(before)) if type(before) is type(after) else None
    if fields is None:
        return None
    return ((f".{name}", getattr(before, name), getattr(after, name)) for name in fields)


def _fields(kind: Any) -> Iterable[str] | None:
    """The names of the fields of a struct, a dataclass or an attrs class, else None."""
    for names in ("__struct_fields__", "__dataclass_fields__"):
        if hasattr(kind, names):
            return cast("Iterable[str]", getattr(kind, names))
    if hasattr(kind, "__attrs_attrs__"):
        return [attribute.name for attribute in kind.__attrs_attrs__]
    return None


def _is_same(before: Any, after: Any) -> bool:
    """Whether a value without parts has come back as it was, although the two are unequal."""
    if type(before) is not type(after):
        return False
    if isinstance(before, datetime):
        # In the hour that a change of clocks repeats, == is always false; see PEP 495.
        return not before - after
    # A NaN does not equal itself, and a data type may recompute its fields when it is decoded.
    return not isinstance(before, set | frozenset | time)


# The parts of msgspec's messages that come from types, not from the payload. Its messages also
# quote values, enum members and unknown fields; a message that is not listed here is not repeated.
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


def _redacted(error: Exception) -> Exception:
    """The exception to chain to instead of `error`.

    It holds nothing of the payload: neither in its text nor in the locals of a traceback's frames.
    Of an exception that the data type raised, it tells the type only.
    """
    if error.__cause__ is not None:
        return msgspec.MsgspecError(f"the data type raised {type(error.__cause__).__name__}")
    if not isinstance(error, msgspec.MsgspecError | TypeError):
        return msgspec.MsgspecError(type(error).__name__)
    text = str(error)
    safe = _SAFE.match(text)
    path = _PATH.search(text)
    return msgspec.MsgspecError(
        f"{safe[0] if safe else 'a value or a field is refused'}{path[0] if path else ''}"
    )
