"""The sessions and payloads that codecs refuse, with errors that do not quote them."""

import math
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, cast
from uuid import UUID

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


def lists(depth: int) -> list[Any]:
    """A list in a list in a list ..."""
    outer: list[Any] = []
    for _ in range(depth):
        outer = [outer]
    return outer


def circular() -> list[Any]:
    """A list that contains itself."""
    loop: list[Any] = []
    loop.append(loop)
    return loop


MINIMAL: dict[str, Any] = {"id": "x"}
# Sessions that both codecs refuse: the data type, and fields of the session.
REFUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "naive-created": (Any, {"created_at": datetime(2030, 1, 1)}),  # noqa: DTZ001 - the point
    "naive-updated": (Any, {"updated_at": datetime(2030, 1, 1)}),  # noqa: DTZ001 - the point
    "naive-expires": (Any, {"expires_at": datetime(2030, 1, 1)}),  # noqa: DTZ001 - the point
    "no-datetime": (Any, {"created_at": "yesterday"}),
    "no-id": (Any, {"id": None}),
    "kind-of-int": (Any, {"kind": 3}),
    "no-kind": (Any, {"kind": None}),
    "principal-of-int": (Any, {"principal": 3}),
    "metadata-of-ints": (Any, {"metadata": {"a": 1}}),
    "metadata-of-none": (Any, {"metadata": {"a": None}}),
    "no-metadata": (Any, {"metadata": None}),
    "metadata-list": (Any, {"metadata": ["a"]}),
    "surrogate-data": (Any, {"data": "\ud800"}),
    "surrogate-key": (Any, {"data": {"\udfff": 1}}),
    "surrogate-kind": (Any, {"kind": "\ud800"}),
    "surrogate-metadata": (Any, {"metadata": {"a": "\ud800"}}),
    "object": (Any, {"data": object()}),
    "function": (Any, {"data": len}),
    "complex": (Any, {"data": 1j}),
    "exception": (Any, {"data": ValueError(SECRET)}),
    "deep": (Any, {"data": lists(100_000)}),
    "circular": (Any, {"data": circular()}),
    "another-type": (Point, {"data": {"x": "one"}}),
    "another-struct": (Point, {"data": Cart(["tea"])}),
    "missing-field": (Cart, {"data": {"total": 1.0}}),
    "none-of-a-union": (Circle | Square, {"data": Point(x=1)}),
    "no-data-for-a-struct": (Point, {}),
    "no-data-for-a-union": (Circle | Square, {"data": None}),
    "no-data-for-a-list": (list[int], {}),
    "kind-of-bytes": (Any, {"kind": b"abcd"}),
    "principal-of-a-date": (Any, {"principal": date(2030, 1, 1)}),
    "metadata-of-bytes": (Any, {"metadata": {"a": b"abcd"}}),
    "date-of-text": (Any, {"created_at": "2030-01-01T00:00:00Z"}),
    "dict-for-a-struct": (Point, {"data": {"x": 1}}),
    "dict-for-a-dataclass": (Cart, {"data": {"items": []}}),
    "struct-for-a-dict": (dict[str, Any], {"data": Point(x=1)}),
    "subclass-of-a-dataclass": (Cart, {"data": BigCart([])}),
    "list-for-a-set": (set[int], {"data": [1]}),
    "list-for-a-tuple": (tuple[int, int], {"data": [1, 2]}),
    "key-of-no-typed-dict": (Options, {"data": {"dark": True, "colour": 1}}),
    "date-for-text": (str, {"data": date(2030, 1, 1)}),
    "enum-in-any": (Loose, {"data": Loose(Colour.RED)}),
    "nan-in-a-set": (set[float | None], {"data": {math.nan}}),
    "no-member": (Colour, {"data": "green"}),
    "too-large-an-int": (Annotated[int, msgspec.Meta(le=10)], {"data": 11}),
    "validator": (Quoting, {"data": {"x": SECRET}}),
}


@both_codecs
@pytest.mark.parametrize(("data_type", "fields"), REFUSED.values(), ids=REFUSED)
def test_undecodable_sessions_are_refused(
    make: Callable[..., Codec[Any]], data_type: Any, fields: dict[str, Any]
) -> None:
    """The writer, who can change the session, gets `InvalidSession`, and no reader."""
    session = Session[Any](**(MINIMAL | fields))

    with pytest.raises(InvalidSession) as caught:
        make(data_type).encode(session)

    assert "cannot be kept as" in str(caught.value)


# Data with the secret or the number in the part that is wrong.
LEAKY: dict[str, tuple[Any, Any]] = {
    "enum": (Colour, SECRET),
    "enum-with-quotes": (Colour, f'it\'s "{SECRET}"'),
    "enum-with-backquotes": (Colour, f"`{SECRET}'"),
    "enum-with-newlines": (Colour, f"'\n{SECRET}\n'"),
    "int-enum": (Level, NUMBER),
    "negative-int-enum": (Level, -NUMBER),
    "literal": (Literal["a", "b"], SECRET),
    "int-literal": (Literal[1, 2], NUMBER),
    "tag": (Circle | Square, {"type": SECRET}),
    "int-tag": (One | Two, {"type": NUMBER}),
    "unknown-field": (Strict, {SECRET: 1}),
    "unknown-field-with-backquotes": (Strict, {f"a`{SECRET}": 1}),
    "unknown-field-with-quotes": (Strict, {f"a'`{SECRET}` - at": 1}),
    "missing-field": (Cart, {SECRET: NUMBER}),
    "wrong-type": (Point, {"x": SECRET}),
    "wrong-value-in-a-dict": (dict[str, int], {SECRET: SECRET}),
    "wrong-key-in-a-dict": (dict[Level, int], {str(NUMBER): 1}),
    "pattern": (Annotated[str, msgspec.Meta(pattern="^a$")], SECRET),
    "too-long": (Annotated[str, msgspec.Meta(max_length=2)], SECRET),
    "too-much": (Annotated[int, msgspec.Meta(lt=2)], NUMBER),
    "date": (datetime, SECRET),
    "bytes": (bytes, f"{SECRET}!"),
    "own-error": (Quoting, {"x": SECRET}),
    "own-error-of-a-number": (Quoting, {"x": NUMBER}),
    "own-error-of-msgspec": (Borrowing, {"x": SECRET}),
    "own-error-of-two-texts": (Demanding, {"x": SECRET}),
    "own-error-inside": (Nesting, {"x": NUMBER}),
    "own-error-in-a-list": (list[Quoting], [{"x": SECRET}]),
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


@both_codecs
@pytest.mark.parametrize(
    "data",
    [f"{SECRET}\ud800", {f"{SECRET}\ud800": 1}, {SECRET: object()}, 10**70 + NUMBER, b"\xff"],
    ids=["surrogate", "surrogate-key", "object", "integer", "bytes"],
)
def test_no_error_quotes_unencodable_data(make: Callable[..., Codec[Any]], data: object) -> None:
    """Errors that hold their text, such as `UnicodeEncodeError`, are not chained to."""
    with pytest.raises(InvalidSession) as caught:
        make(Point).encode(Session(id=SECRET, data=data))

    assert SECRET not in said_by(caught.value)
    assert str(NUMBER) not in said_by(caught.value)


# Data that JSON and MessagePack without a data type turn into other data, and its change.
CHANGED: dict[str, tuple[Any, str]] = {
    "set": ({1}, "`set` comes back as `list` - at `$.data`"),
    "frozenset": ([frozenset([1])], "`frozenset` comes back as `list` - at `$.data[0]`"),
    "uuid": ([1, UUID(int=1)], "`UUID` comes back as `str` - at `$.data[1]`"),
    "decimal": (Decimal(1), "`Decimal` comes back as `str` - at `$.data`"),
    "date": (date(2030, 1, 1), "`date` comes back as `str` - at `$.data`"),
    "time": (time(12), "`time` comes back as `str` - at `$.data`"),
    "timedelta": (timedelta(1), "`timedelta` comes back as `str` - at `$.data`"),
    "naive": (datetime(2030, 1, 1), "`datetime` comes back as `str` - at `$.data`"),  # noqa: DTZ001 - the point
    "enum": ({"a": Colour.RED}, "`Colour` comes back as `str` - at `$.data[...]`"),
    "struct": ({"a": [Point(1)]}, "`Point` comes back as `dict` - at `$.data[...][0]`"),
    "dataclass": (({"a": Cart([])},), "`Cart` comes back as `dict` - at `$.data[0][...]`"),
    "named-tuple": ([Pair(1)], "`Pair` comes back as `list` - at `$.data[0]`"),
    "date-key": (
        {"a": {date(2030, 1, 1): 1}},
        "key of type `date` does not come back - at `$.data[...]`",
    ),
}
# The same, for JSON only.
CHANGED_BY_JSON: dict[str, tuple[Any, str]] = {
    "nan": (
        {"items": [1, {"price": math.nan}]},
        "`float` comes back as `NoneType` - at `$.data[...][1][...]`",
    ),
    "infinity": (-math.inf, "`float` comes back as `NoneType` - at `$.data`"),
    "integer-key": ([{1: 1}], "key of type `int` does not come back - at `$.data[0]`"),
    "merged-keys": ({"1": 1, 1: 2}, "key of type `int` does not come back - at `$.data`"),
    "float-key": ({1.5: 1}, "key of type `float` does not come back - at `$.data`"),
    "bytes": (b"abcd", "`bytes` comes back as `str` - at `$.data`"),
    "bytearray": (bytearray(b"abcd"), "`bytearray` comes back as `str` - at `$.data`"),
    "datetime": (datetime(2030, 1, 1, tzinfo=UTC), "`datetime` comes back as `str` - at `$.data`"),
}


@pytest.mark.parametrize(
    ("data", "change"),
    [*CHANGED.values(), *CHANGED_BY_JSON.values()],
    ids=[*CHANGED, *CHANGED_BY_JSON],
)
def test_untyped_json_refuses_other_data(data: object, change: str) -> None:
    """The error names the change and its path, and says how to store such data."""
    with pytest.raises(InvalidSession) as caught:
        JsonCodec().encode(Session(id="x", data=data))

    assert str(caught.value) == (
        f"the session cannot be kept as JSON: {'a ' * change.startswith('key')}{change}; "
        "give JsonCodec a data type, or use MsgpackCodec"
    )


@pytest.mark.parametrize(("data", "change"), CHANGED.values(), ids=CHANGED)
def test_untyped_messagepack_refuses_other_data(data: object, change: str) -> None:
    """The error names the change and its path, and asks for a data type."""
    with pytest.raises(InvalidSession) as caught:
        MsgpackCodec().encode(Session(id="x", data=data))

    assert str(caught.value).endswith(f"{change}; give MsgpackCodec a data type")


@pytest.mark.parametrize("name", CHANGED_BY_JSON)
def test_untyped_messagepack_keeps_more(name: str) -> None:
    """MessagePack has bytes, aware datetimes, NaN, and keys of other types than text."""
    data = CHANGED_BY_JSON[name][0]
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
    ],
    ids=str,
)
def test_typed_json_refuses_nan_for_none(data_type: Any, data: object, path: str) -> None:
    """A NaN that the data type would read back as None is refused, with its path."""
    codec: Codec[Any] = JsonCodec(data_type)

    with pytest.raises(InvalidSession) as caught:
        codec.encode(Session(id="x", data=data))

    assert f"`float` comes back as `NoneType` - at `{path}`; this data type" in str(caught.value)


def test_fields_of_attrs_classes_have_a_path() -> None:
    """A NaN in an attrs class is found, as in a struct."""
    import attrs  # noqa: PLC0415 - comes with trio; only this test needs it

    price = attrs.make_class("Price", {"amount": attrs.field(type=cast("Any", float | None))})

    with pytest.raises(InvalidSession, match=r"at `\$.data.amount`"):
        JsonCodec(price).encode(Session(id="x", data=price(math.nan)))


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
    "data", [{"x": SECRET}, {SECRET: {1}}, f"{SECRET}\ud800", SECRET * 99], ids=repr
)
def test_errors_hold_no_frames_with_the_payload(
    make: Callable[..., Codec[Any]], data: object
) -> None:
    """No traceback of an error or of an exception that it chains to leads to the payload."""
    codec = make(Quoting, max_bytes=500) if data == {"x": SECRET} else make(max_bytes=500)

    with pytest.raises(InvalidSession) as refused:
        codec.encode(Session(id="x", data=data))
    with pytest.raises(CorruptSession) as corrupt:
        codec.decode(f'["{SECRET}"]'.encode())

    for error in (refused.value, corrupt.value):
        assert error.__context__ is None
        assert error.__cause__ is None or error.__cause__.__traceback__ is None
        assert error.__cause__ is None or error.__cause__.__context__ is None
        assert error.__traceback__ is not None
        of_codec = error.__traceback__.tb_next
        assert of_codec is not None
        assert of_codec.tb_next is None
        assert SECRET not in repr(of_codec.tb_frame.f_locals)


@pytest.mark.parametrize(
    ("data_type", "data", "hint"),
    [
        (Point, {"x": "one"}, "Expected `int`, got `str` - at `$.data.x`"),
        (Cart, {}, "Object missing required field `items` - at `$.data`"),
        (Any, object(), "Encoding objects of type object is unsupported"),
    ],
    ids=["wrong-type", "missing-field", "object"],
)
def test_error_has_cause_and_path(data_type: Any, data: object, hint: str) -> None:
    """The message has types and names of fields, which are not secret."""
    codec: Codec[Any] = JsonCodec(data_type)

    with pytest.raises(InvalidSession) as caught:
        codec.encode(Session(id="x", data=data))

    assert hint in str(caught.value)
