"""What the codecs refuse, and what they keep to themselves when they do."""

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
import pytest

from aiosessions import (
    Codec,
    CorruptSession,
    InvalidSession,
    JsonCodec,
    Session,
)
from tests.data_types import (
    NUMBER,
    SECRET,
    Borrowing,
    Cart,
    Circle,
    Colour,
    Demanding,
    Level,
    Nesting,
    One,
    Point,
    Quoting,
    Square,
    Strict,
    Two,
    both_codecs,
)
from tests.leaks import said_by


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
# What is refused, by either codec: fields of a session, and the data type.
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
    "no-member": (Colour, {"data": "green"}),
    "too-large-an-int": (Annotated[int, msgspec.Meta(le=10)], {"data": 11}),
    "validator": (Quoting, {"data": {"x": SECRET}}),
}


@both_codecs
@pytest.mark.parametrize(("data_type", "fields"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_decode_is_not_encoded(
    make: Callable[..., Codec[Any]], data_type: Any, fields: dict[str, Any]
) -> None:
    """The writer, who can mend it, gets `InvalidSession`; no reader meets it."""
    session = Session[Any](**(MINIMAL | fields))

    with pytest.raises(InvalidSession) as caught:
        make(data_type).encode(session)

    assert caught.value.status == 400
    assert caught.value.__cause__ is not None
    assert "kept as" in str(caught.value)


# What is wrong about the data holds the secret or the number; no error may repeat it.
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
    """Neither reading nor writing tells what was wrong by repeating it, down the whole chain."""
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
def test_no_error_quotes_what_cannot_be_encoded(
    make: Callable[..., Codec[Any]], data: object
) -> None:
    """A `UnicodeEncodeError` holds its text, for one; it is not chained to."""
    with pytest.raises(InvalidSession) as caught:
        make(Point).encode(Session(id=SECRET, data=data))

    assert SECRET not in said_by(caught.value)
    assert str(NUMBER) not in said_by(caught.value)


@pytest.mark.parametrize(
    ("data_type", "data", "hint"),
    [
        (Point, {"x": "one"}, "Expected `int`, got `str` - at `$.data.x`"),
        (Cart, {}, "Object missing required field `items` - at `$.data`"),
        (Any, object(), "Encoding objects of type object is unsupported"),
    ],
    ids=["wrong-type", "missing-field", "object"],
)
def test_an_error_says_what_is_wrong_and_where(data_type: Any, data: object, hint: str) -> None:
    """Types and field names, which are no secret, are left in the message."""
    codec: Codec[Any] = JsonCodec(data_type)

    with pytest.raises(InvalidSession) as caught:
        codec.encode(Session(id="x", data=data))

    assert hint in str(caught.value)
