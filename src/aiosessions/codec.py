"""Codecs turn a session into bytes and back; storages put a header in front and keep the result.

Invariants:

- `decode` returns the session that `encode` was given: a codec decodes every session that it has
  encoded, and compares. The writer, who can change the data, gets the error, and not a reader.
- `decode` of any bytes is a session or `CorruptSession`.
- A payload that is saved again keeps the fields that the data type does not know; see `_unknown`.
- Errors do not quote the payload: neither their messages, nor the exceptions they are chained to,
  nor the local variables of this module's frames, which error trackers record.
"""

from collections.abc import Callable
from typing import Any, Generic, Protocol, cast, overload

import msgspec
from msgspec import Raw

from ._differences import change
from ._redaction import redacted
from ._unknown import Keeper, Shape, shape_of
from .errors import CorruptSession, InvalidSession
from .session import D, Session, stored_form

MAX_BYTES = 1_048_576
Upgrade = Callable[[Any], Any]
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


class _Decoder(Protocol[D]):
    def decode(self, buf: bytes, /) -> Session[D]: ...


class _MsgspecCodec(Generic[D]):
    """The parts that the JSON and the MessagePack codec share."""

    _format: str
    _advice: str
    _module: Any
    _objects: Any  # the type of any object, one level deep

    def __init__(self, data_type: Any, max_bytes: int, upgrade: Upgrade | None) -> None:
        if max_bytes <= 0:
            raise ValueError("max_bytes must be positive")
        if upgrade is not None and not callable(upgrade):
            raise TypeError(f"upgrade is a function, not {type(upgrade).__name__}")
        self._encoder = self._module.Encoder()
        self._decoder: _Decoder[D] = self._module.Decoder(_session_of(data_type))
        self._data_type = data_type
        self._max_bytes = max_bytes
        self._upgrade = upgrade
        # msgspec sees a record without data as one with the default, which is None.
        self._no_data: str | None = None
        try:
            msgspec.convert(None, data_type)
        except msgspec.ValidationError as error:
            self._no_data = f"{error} - at `$.data`"
        self._fields = self._module.Decoder(self._objects)
        # Fields of another data type would seem to be unknown ones of this type.
        self._origin = (self._format, data_type)
        self._keeper: Keeper | None = None
        if shape_of(data_type) is not None:
            shallow = self._module.Decoder(self._objects | list[Raw])
            shape = cast("Shape", shape_of(_session_of(data_type)))
            self._keeper = Keeper(shape, shallow, self._module.decode, self._encoder.encode)

    def __repr__(self) -> str:
        upgrade = f", upgrade={self._upgrade!r}" if self._upgrade else ""
        return f"{type(self).__name__}({self._data_type!r}, max_bytes={self._max_bytes}{upgrade})"

    def encode(self, session: Session[D]) -> bytes:
        """Return the session as bytes.

        Raises:
            InvalidSession: A field is not of its type, `data` is not of the data type or would not
                come back as it is, a datetime is naive, or the payload has more than `max_bytes`
                bytes.
        """
        cause: Exception | None = None
        try:
            payload = self._with_unknown_fields(session, self._encoder.encode(session))
            refusal = self._refusal(session, payload)
            if refusal is None:
                return payload
        except Exception as error:  # noqa: BLE001 - data types of applications raise anything
            cause = redacted(error)
            refusal = str(cause)
        payload = b""  # error trackers record the locals of this frame
        raise InvalidSession(f"the session cannot be kept as {self._format}: {refusal}") from cause

    def _refusal(self, session: Session[D], payload: bytes) -> str | None:
        """The reason why the payload of the session cannot be stored, or None."""
        if len(payload) > self._max_bytes:
            return f"it takes {len(payload):,} bytes; at most {self._max_bytes:,} are allowed"
        if session.data is None and self._no_data:
            return self._no_data
        if self._upgrade is not None:
            upgraded = self._upgraded(payload, self._upgrade)
            if self._known(upgraded) != self._known(payload):
                return "upgrade changes data that has the current form"
        decoded = self._decoder.decode(payload)
        # Unequal for a good reason, such as a tuple that comes back as a list, or changed.
        found = None if decoded == session else change(session, decoded)
        if found is None:
            return None
        what, path = found
        if not path.startswith(".data"):
            return f"{what} - at `${path}`"
        untyped = self._data_type is Any
        advice = self._advice if untyped else f"this data type does not keep it in {self._format}"
        return f"{what} - at `${path}`; {advice}"

    def _with_unknown_fields(self, session: Session[D], payload: bytes) -> bytes:
        """The payload, with fields that only the stored form of the session has."""
        if self._keeper is None or (stored := stored_form(session)) is None:
            return payload
        old, origin = stored
        if origin != self._origin or (known := self._known(old)) == old:
            return payload
        return self._keeper.keep(old, known, payload)

    def _known(self, payload: bytes) -> bytes:
        """The part of a payload that the data type knows."""
        known: bytes = self._encoder.encode(self._decoder.decode(payload))
        return known

    def _upgraded(self, payload: bytes, upgrade: Upgrade) -> bytes:
        """The payload with its data in the current form."""
        fields = self._fields.decode(payload)
        data = self._module.decode(fields["data"]) if "data" in fields else None
        failure: str | None = None
        try:
            data = upgrade(data)
        except Exception as error:  # noqa: BLE001 - functions of applications raise anything
            failure = type(error).__name__
        if failure:
            raise msgspec.MsgspecError(f"upgrade raised {failure}")
        fields["data"] = Raw(self._encoder.encode(data))
        upgraded: bytes = self._encoder.encode(fields)
        return upgraded

    def decode(self, payload: bytes) -> Session[D]:
        """Return the session that was encoded, after `upgrade`.

        Raises:
            CorruptSession: The payload does not decode, `upgrade` raises an exception, or `data` is
                not of the data type.
        """
        cause: Exception | None = None
        try:
            if self._upgrade is not None:
                payload = self._upgraded(payload, self._upgrade)
            session = self._decoder.decode(payload)
            if self._keeper is not None:
                session._stored = payload, self._origin  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            if session.data is not None or self._no_data is None:
                return session
            refusal = self._no_data
        except Exception as error:  # noqa: BLE001 - data types of applications raise anything
            cause = redacted(error)
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
        upgrade: A function that gets the stored data as builtins, and returns it in the form of the
            data type. It runs at every decode, so it must leave data in that form as it is.
            docs/data-types.md has examples.

    Raises:
        TypeError: msgspec cannot make a decoder for the data type, or `upgrade` is not callable.
        ValueError: `max_bytes` is not positive.
    """

    _format = "JSON"
    _advice = "give JsonCodec a data type that reads it back"
    _module = msgspec.json
    _objects = dict[str, Raw]

    @overload
    def __init__(
        self, data_type: type[D], max_bytes: int = MAX_BYTES, *, upgrade: Upgrade | None = None
    ) -> None: ...

    # Unions and other types that are not classes.
    @overload
    def __init__(
        self: "JsonCodec[Any]",
        data_type: Any = _ANYTHING,
        max_bytes: int = MAX_BYTES,
        *,
        upgrade: Upgrade | None = None,
    ) -> None: ...

    def __init__(
        self,
        data_type: Any = _ANYTHING,
        max_bytes: int = MAX_BYTES,
        *,
        upgrade: Upgrade | None = None,
    ) -> None:
        super().__init__(data_type, max_bytes, upgrade)


class MsgpackCodec(_MsgspecCodec[D]):
    """Sessions as MessagePack: smaller than JSON, with bytes, aware datetimes and every float.

    Without a data type, `encode` refuses data that would come back as other data (sets, naive
    datetimes, UUIDs, enums, structs, ...). Tuples, and values that equal a plain one, come back as
    they do from `JsonCodec`.

    Args:
        data_type: The type of `Session.data`: any type that msgspec supports. `data` is validated
            against it, both ways.
        max_bytes: The most bytes an encoded session may have.
        upgrade: As for `JsonCodec`.

    Raises:
        TypeError: msgspec cannot make a decoder for the data type, or `upgrade` is not callable.
        ValueError: `max_bytes` is not positive.
    """

    _format = "MessagePack"
    _advice = "give MsgpackCodec a data type"
    _module = msgspec.msgpack
    _objects = dict[Any, Raw]  # keys need not be text

    @overload
    def __init__(
        self, data_type: type[D], max_bytes: int = MAX_BYTES, *, upgrade: Upgrade | None = None
    ) -> None: ...

    # Unions and other types that are not classes.
    @overload
    def __init__(
        self: "MsgpackCodec[Any]",
        data_type: Any = _ANYTHING,
        max_bytes: int = MAX_BYTES,
        *,
        upgrade: Upgrade | None = None,
    ) -> None: ...

    def __init__(
        self,
        data_type: Any = _ANYTHING,
        max_bytes: int = MAX_BYTES,
        *,
        upgrade: Upgrade | None = None,
    ) -> None:
        super().__init__(data_type, max_bytes, upgrade)


def _session_of(data_type: type[D]) -> type[Session[D]]:
    """`Session[data_type]`, for a type that only the caller knows."""
    return cast("type[Session[D]]", Session[data_type])  # type: ignore[valid-type]
