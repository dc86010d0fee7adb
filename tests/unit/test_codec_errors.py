"""The sessions and payloads that codecs refuse, with errors that do not quote them."""

import math
from collections.abc import Callable
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Annotated, Any, Literal, cast
from uuid import UUID

import attrs
import msgspec
import pytest

from aiosessions import (
    Codec,
    CorruptSession,
    InvalidSession,
    JsonCodec,
    MsgpackCodec,
    Session,
)
from tests.support.data_types import (
    NUMBER,
    SECRET,
    Basket,
    BigCart,
    Borrowing,
    Cart,
    Circle,
    Colour,
    Demanding,
    Incomparable,
    Item,
    Level,
    Loose,
    Nesting,
    One,
    Options,
    Pair,
    Point,
    Quoting,
    Square,
    Strict,
    Two,
    both_codecs,
)
from tests.support.secrets import said_by

CIRCULAR: list[Any] = []
CIRCULAR.append(CIRCULAR)
# attrs comes with trio.
Price: Any = attrs.make_class("Price", {"amount": attrs.field(type=cast("Any", float | None))})
MINIMAL: dict[str, Any] = {"id": "x"}
# Sessions that both codecs refuse: the data type, and fields of the session.
REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "naive-created": (Any, {"created_at": datetime(2030, 1, 1)}),  # noqa: DTZ001 - the point
    "no-id": (Any, {"id": None}),
    "kind-of-int": (Any, {"kind": 3}),
    "principal-of-int": (Any, {"principal": 3}),
    "metadata-of-ints": (Any, {"metadata": {"a": 1}}),
    "metadata-list": (Any, {"metadata": ["a"]}),
    "surrogate-data": (Any, {"data": "\ud800"}),
    "surrogate-metadata": (Any, {"metadata": {"a": "\ud800"}}),
    "object": (Any, {"data": object()}),
    "complex": (Any, {"data": 1j}),
    "circular": (Any, {"data": CIRCULAR}),
    "another-struct": (Point, {"data": Cart(["tea"])}),
    "missing-field": (Cart, {"data": {"total": 1.0}}),
    "another-type": (Point, {"data": {"x": "one"}}),
    "no-data-for-a-struct": (Point, {}),
    "kind-of-bytes": (Any, {"kind": b"abcd"}),
    "date-of-text": (Any, {"created_at": "2030-01-01T00:00:00Z"}),
    "dict-for-a-struct": (Point, {"data": {"x": 1}}),
    "struct-for-a-dict": (dict[str, Any], {"data": Point(x=1)}),
    "subclass-of-a-dataclass": (Cart, {"data": BigCart([])}),
    "list-for-a-tuple": (tuple[int, int], {"data": [1, 2]}),
    "key-of-no-typed-dict": (Options, {"data": {"dark": True, "colour": 1}}),
    "date-for-text": (str, {"data": date(2030, 1, 1)}),
    "enum-in-any": (Loose, {"data": Loose(Colour.RED)}),
    "nan-in-a-set": (set[float | None], {"data": {math.nan}}),
    "too-large-an-int": (Annotated[int, msgspec.Meta(le=10)], {"data": 11}),
    "validator": (Quoting, {"data": {"x": SECRET}}),
}


# Types and names of fields are not secret, so messages have them.
HINTS = {
    "object": "Encoding objects of type object is unsupported",
    "missing-field": "Object missing required field `items` - at `$.data`",
    "another-type": "Expected `int`, got `str` - at `$.data.x`",
}


@both_codecs
@pytest.mark.parametrize("name", REFUSED)
def test_undecodable_sessions_are_refused(make: Callable[..., Codec[Any]], name: str) -> None:
    """The writer, who can change the session, gets `InvalidSession`, and no reader."""
    data_type, fields = REFUSED[name]
    session = Session[Any](**(MINIMAL | fields))

    with pytest.raises(InvalidSession, match="cannot be kept as") as caught:
        make(data_type).encode(session)

    assert HINTS.get(name, "") in str(caught.value)


# Data with the secret or the number in the part that is wrong.
LEAKY: dict[str, tuple[Any, Any]] = {
    "enum": (Colour, SECRET),
    "enum-with-newlines": (Colour, f"'\n{SECRET}\n'"),
    "int-enum": (Level, NUMBER),
    "literal": (Literal["a", "b"], SECRET),
    "tag": (Circle | Square, {"type": SECRET}),
    "int-tag": (One | Two, {"type": NUMBER}),
    "unknown-field": (Strict, {SECRET: 1}),
    "unknown-field-with-quotes": (Strict, {f"a'`{SECRET}` - at": 1}),
    "missing-field": (Cart, {SECRET: NUMBER}),
    "wrong-type": (Point, {"x": SECRET}),
    "wrong-key-in-a-dict": (dict[Level, int], {str(NUMBER): 1}),
    "pattern": (Annotated[str, msgspec.Meta(pattern="^a$")], SECRET),
    "too-long": (Annotated[str, msgspec.Meta(max_length=2)], SECRET),
    "date": (datetime, SECRET),
    "bytes": (bytes, f"{SECRET}!"),
    "own-error": (Quoting, {"x": SECRET}),
    "own-error-of-msgspec": (Borrowing, {"x": SECRET}),
    "own-error-of-two-texts": (Demanding, {"x": SECRET}),
    "own-error-inside": (Nesting, {"x": NUMBER}),
}


@both_codecs
@pytest.mark.parametrize(("data_type", "data"), LEAKY.values(), ids=LEAKY)
def test_no_error_quotes_the_payload(
    make: Callable[..., Codec[Any]], data_type: Any, data: Any
) -> None:
    """Errors of readers and writers do not repeat data, nor do the errors they chain to."""
    session = Session[Any](id=SECRET, principal=SECRET, metadata={SECRET: SECRET}, data=data)
    codec = make(data_type)

    with pytest.raises(InvalidSession) as refused:
        codec.encode(session)
    with pytest.raises(CorruptSession) as corrupt:
        codec.decode(make().encode(session))

    said = said_by(refused.value) + said_by(corrupt.value)
    assert SECRET not in said
    assert str(NUMBER) not in said


# Data that codecs without a data type would turn into other data, and its change.
CHANGED: list[tuple[Any, str]] = [
    ({1}, "`set` comes back as `list` - at `$.data`"),
    ([frozenset([1])], "`frozenset` comes back as `list` - at `$.data[0]`"),
    ([1, UUID(int=1)], "`UUID` comes back as `str` - at `$.data[1]`"),
    (Decimal(1), "`Decimal` comes back as `str` - at `$.data`"),
    (date(2030, 1, 1), "`date` comes back as `str` - at `$.data`"),
    (time(12), "`time` comes back as `str` - at `$.data`"),
    (datetime(2030, 1, 1), "`datetime` comes back as `str` - at `$.data`"),  # noqa: DTZ001 - naive
    ({"a": Colour.RED}, "`Colour` comes back as `str` - at `$.data[...]`"),
    ({"a": [Point(1)]}, "`Point` comes back as `dict` - at `$.data[...][0]`"),
    (({"a": Cart([])},), "`Cart` comes back as `dict` - at `$.data[0][...]`"),
    ([Pair(1)], "`Pair` comes back as `list` - at `$.data[0]`"),
    ({"a": {date.max: 1}}, "a key of type `date` does not come back - at `$.data[...]`"),
]
# The same for JSON. MessagePack keeps these.
CHANGED_BY_JSON: list[tuple[Any, str]] = [
    ([{"a": math.nan}], "`float` comes back as `NoneType` - at `$.data[0][...]`"),
    (-math.inf, "`float` comes back as `NoneType` - at `$.data`"),
    ([{1: 1}], "a key of type `int` does not come back - at `$.data[0]`"),
    ({"1": 1, 1: 2}, "a key of type `int` does not come back - at `$.data`"),
    (b"abcd", "`bytes` comes back as `str` - at `$.data`"),
    (bytearray(b"abcd"), "`bytearray` comes back as `str` - at `$.data`"),
    (datetime(2030, 1, 1, tzinfo=UTC), "`datetime` comes back as `str` - at `$.data`"),
]


@pytest.mark.parametrize(("data", "change"), CHANGED + CHANGED_BY_JSON, ids=repr)
def test_untyped_json_refuses_other_data(data: object, change: str) -> None:
    """The error names the change and its path, and says how to store such data."""
    with pytest.raises(InvalidSession) as caught:
        JsonCodec().encode(Session(id="x", data=data))

    assert str(caught.value) == (
        f"the session cannot be kept as JSON: {change}; "
        "give JsonCodec a data type that reads it back"
    )


@pytest.mark.parametrize(("data", "change"), CHANGED, ids=repr)
def test_untyped_messagepack_refuses_other_data(data: object, change: str) -> None:
    """The error names the change and its path, and asks for a data type."""
    with pytest.raises(InvalidSession) as caught:
        MsgpackCodec().encode(Session(id="x", data=data))

    assert str(caught.value).endswith(f"as MessagePack: {change}; give MsgpackCodec a data type")


@pytest.mark.parametrize("data", [data for data, _ in CHANGED_BY_JSON], ids=repr)
def test_untyped_messagepack_keeps_more(data: object) -> None:
    """MessagePack has bytes, aware datetimes, NaN, and keys of other types than text."""
    codec = MsgpackCodec[Any]()

    decoded = codec.decode(codec.encode(Session(id="x", data=data))).data

    assert decoded == data or repr(decoded) == repr(data)


@pytest.mark.parametrize(
    ("data_type", "data", "path"),
    [
        (float | None, math.nan, "$.data"),
        (Basket, Basket([Item(1), Item(None), Item(2), Item(math.inf)]), "$.data.items[3].price"),
        (tuple[float | None, ...], (1.0, math.nan), "$.data[1]"),
        (Pair, Pair(1, math.nan), "$.data[1]"),
        (Incomparable, Incomparable(1, Incomparable(math.nan)), "$.data.next.x"),
        (dict[str, float | None], {SECRET: math.nan}, "$.data[...]"),
        (dict[str, Any], {"a": [math.nan]}, "$.data[...][0]"),
        (Price, Price(math.nan), "$.data.amount"),
    ],
    ids=str,
)
def test_typed_json_refuses_nan_for_none(data_type: Any, data: object, path: str) -> None:
    """A NaN that the data type would read back as None is refused, with its path."""
    codec: Codec[Any] = JsonCodec(data_type)

    with pytest.raises(InvalidSession) as caught:
        codec.encode(Session(id="x", data=data))

    assert f"`float` comes back as `NoneType` - at `{path}`; this data type" in str(caught.value)


@both_codecs
@pytest.mark.parametrize("data_type", [Point, Circle | Square, int, list[Any]], ids=str)
def test_record_without_data_is_corrupt(make: Callable[..., Codec[Any]], data_type: Any) -> None:
    """`Session.data` is None only for data types that have None."""
    payload = make().encode(Session(id="x"))

    assert make(data_type | None).decode(payload).data is None
    with pytest.raises(CorruptSession, match=r"got `null` - at `\$.data`"):
        make(data_type).decode(payload)


@both_codecs
@pytest.mark.parametrize(
    "data",
    [
        {"x": SECRET},
        {SECRET: {1}},
        f"{SECRET}\ud800",
        {f"{SECRET}\ud800": 1},
        {SECRET: object()},
        10**70 + NUMBER,
        SECRET * 99,
    ],
    ids=type,
)
def test_errors_hold_no_frames_with_the_payload(
    make: Callable[..., Codec[Any]], data: object
) -> None:
    """No message, traceback or chained error leads to the payload."""
    codec = make(Quoting, max_bytes=500) if data == {"x": SECRET} else make(max_bytes=500)
    if isinstance(data, int):
        codec = MsgpackCodec()

    with pytest.raises(InvalidSession) as refused:
        codec.encode(Session(id="x", data=data))
    with pytest.raises(CorruptSession) as corrupt:
        codec.decode(f'["{SECRET}"]'.encode())

    for error in (refused.value, corrupt.value):
        said = said_by(error)
        assert SECRET not in said
        assert str(NUMBER) not in said
        assert error.__context__ is None
        cause = error.__cause__
        assert cause is None or (cause.__traceback__, cause.__context__) == (None, None)
        assert error.__traceback__ is not None
        of_codec = error.__traceback__.tb_next
        assert of_codec is not None
        assert of_codec.tb_next is None
        assert SECRET not in repr(of_codec.tb_frame.f_locals)
