"""A save by an old release keeps the fields that a newer one has written."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple, TypedDict

import attrs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosessions import Codec, InvalidSession, JsonCodec, MsgpackCodec, Session
from aiosessions.session import revised, stored_form
from tests.support.data_types import both_codecs


class Node1(msgspec.Struct, omit_defaults=True, rename="camel"):
    """A tree, as the old release knows it."""

    is_seen: bool = False
    label: str = ""
    next: "Node1 | None" = None
    pair: "tuple[Node1, int] | None" = None
    in_list: "list[Node1]" = []
    in_dict: "dict[str, Node1]" = {}


class Node2(msgspec.Struct, rename="camel"):
    """The tree of the new release."""

    is_new: bool
    next: "Node2 | None" = None
    pair: "tuple[Node2, int] | None" = None
    in_list: "list[Node2]" = []
    in_dict: "dict[str, Node2]" = {}
    label: str = ""
    is_seen: bool = False
    extra: Any = None


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)
labels = st.sampled_from("abc")
leaves = st.builds(Node2, is_new=st.booleans(), label=labels, extra=values)
trees: st.SearchStrategy[Node2] = st.recursive(
    leaves,
    lambda inner: st.builds(
        Node2,
        is_new=st.booleans(),
        label=labels,
        extra=values,
        next=st.none() | inner,
        pair=st.none() | st.tuples(inner, st.integers(0, 9)),
        in_list=st.lists(inner, max_size=3),
        in_dict=st.dictionaries(labels, inner, max_size=2),
    ),
    max_leaves=8,
)


def look(node: Any, seen: list[bool]) -> Any:
    """Change the nodes of a tree of either release for which `seen` has True, in order."""
    node.is_seen = seen.pop() if seen else False
    for each in filter(None, (node.next, *(node.pair or ())[:1], *node.in_list)):
        look(each, seen)
    for _, each in sorted(node.in_dict.items()):
        look(each, seen)
    return node


@both_codecs
@settings(deadline=None, max_examples=100)
@given(tree=trees, seen=st.lists(st.booleans(), max_size=8))
def test_save_keeps_every_unknown_field(
    make: Callable[..., Codec[Any]], tree: Node2, seen: list[bool]
) -> None:
    """The new release finds its data with the changes of the old one."""
    old, new = make(Node1), make(Node2)
    session = old.decode(new.encode(Session(id="x", data=tree)))
    look(session.data, list(seen))

    assert new.decode(old.encode(session)).data == look(tree, list(seen))


@dataclass
class Line1:
    """A dataclass of the old release."""

    sku: str


@dataclass
class Line2(Line1):
    """The dataclass of the new release."""

    note: str = ""


@dataclass
class Cart1:
    """A dataclass with others."""

    lines: list[Line1] = field(default_factory=list)


@dataclass
class Cart2:
    """A dataclass of the new release with others."""

    lines: list[Line2] = field(default_factory=list)
    gift: str = ""


class Options1(TypedDict, total=False):
    """A TypedDict of the old release."""

    dark: bool


class Options2(Options1, total=False):
    """The TypedDict of the new release."""

    size: int


@attrs.define
class Price1:
    """An attrs class of the old release."""

    amount: int = 0


@attrs.define
class Price2(Price1):
    """The attrs class of the new release."""

    currency: str = ""


class Circle1(msgspec.Struct, tag="circle"):
    """A struct of a union."""

    radius: int


class Circle2(Circle1, tag="circle"):
    """The struct of the new release."""

    colour: str = ""


class Square(msgspec.Struct, tag="square"):
    """Another struct of the union."""

    side: int


class Place1(NamedTuple):
    """A named tuple with a struct."""

    line: Line1
    number: int = 0


class Place2(NamedTuple):
    """The named tuple of the new release."""

    line: Line2
    number: int = 0


DOCS = msgspec.Meta(description="a line")
Mixed1 = dict[str, int] | list[Line1]
Mixed2 = dict[str, int] | list[Line2]
A1, A, B, C = Line1("a"), Line2("a", "1"), Line2("b", "2"), Line2("c", "3")
KINDS: dict[str, tuple[Any, Any, Any, Any]] = {
    # Both types, data of the new release, and the data that replaces it in the old one.
    "dataclass": (Line1, Line2, Line2("a", "note"), Line1("b")),
    "typed-dict": (Options1, Options2, {"dark": True, "size": 3}, {"dark": False}),
    "attrs": (Price1, Price2, Price2(1, "EUR"), Price1(2)),
    "union": (Circle1 | Square, Circle2 | Square, Circle2(1, "red"), Circle1(2)),
    "annotated": (Annotated[Line1, DOCS], Annotated[Line2, DOCS], Line2("a", "n"), Line1("b")),
    "optional": (Line1 | None, Line2 | None, Line2("a", "note"), Line1("b")),
    "list": (list[Line1], list[Line2], [Line2("a", "note")], [Line1("b")]),
    "tuple": (tuple[Line1, ...], tuple[Line2, ...], (Line2("a", "note"),), (Line1("b"),)),
    "named-tuple": (Place1, Place2, Place2(Line2("a", "note")), Place1(Line1("b"))),
    "dict": (dict[str, Line1], dict[str, Line2], {"k": Line2("a", "note")}, {"k": Line1("b")}),
    "dict-of-ints": (dict[int, Line1], dict[int, Line2], {1: Line2("a", "n")}, {1: Line1("b")}),
}
KEPT: dict[str, Any] = {
    "dataclass": Line2("b", "note"),
    "typed-dict": {"dark": False, "size": 3},
    "attrs": Price2(2, "EUR"),
    "union": Circle2(2, "red"),
    "annotated": Line2("b", "n"),
    "optional": Line2("b", "note"),
    "list": [Line2("b", "note")],
    "tuple": (Line2("b", "note"),),
    "named-tuple": Place2(Line2("b", "note")),
    "dict": {"k": Line2("b", "note")},
    "dict-of-ints": {1: Line2("b", "n")},
}
# Where the application has removed or replaced a part, its unknown fields go with it.
LOST: dict[str, tuple[Any, Any, Any, Any, Any]] = {
    "none": (Line1 | None, Line2 | None, Line2("a", "note"), None, None),
    "none-in-a-tuple": (
        tuple[Line1 | None, int],
        tuple[Line2 | None, int],
        (Line2("a", "note"), 1),
        (None, 1),
        (None, 1),
    ),
    "dict-for-a-list": (Mixed1, Mixed2, [Line2("a", "note")], {"k": 1}, {"k": 1}),
    "other-dict": (tuple[Line1, Mixed1], tuple[Line2, Mixed2], (A, {"k": 1}), (A1, {}), (A, {})),
    "other-struct": (Circle1 | Square, Circle2 | Square, Circle2(1, "red"), Square(2), Square(2)),
    "other-key": (dict[str, Line1], dict[str, Line2], {"k": Line2("a", "n")}, {}, {}),
    "key-of-typed-dict": (Options1, Options2, {"dark": True}, {}, {}),
    "key-of-any": (
        tuple[Line1, Any],
        tuple[Line2, Any],
        (Line2("a", "n"), {"x": 1, "y": {"z": 2}}),
        (Line1("a"), {"y": {}}),
        (Line2("a", "n"), {"y": {}}),
    ),
}


def resaved(make: Callable[..., Codec[Any]], old: Any, new: Any, data: Any, change: Any) -> Any:
    """The data of the new release after the old one has replaced its own part."""
    first, second = make(old), make(new)
    session = first.decode(second.encode(Session(id="x", data=data)))
    session.data = change
    return second.decode(first.encode(session)).data


@both_codecs
@pytest.mark.parametrize("kind", KINDS)
def test_replaced_data_keeps_unknown_fields(make: Callable[..., Codec[Any]], kind: str) -> None:
    """Each kind of type can have unknown fields, also inside others."""
    assert resaved(make, *KINDS[kind]) == KEPT[kind]


@both_codecs
@pytest.mark.parametrize("case", LOST)
def test_removed_parts_stay_removed(make: Callable[..., Codec[Any]], case: str) -> None:
    """Neither known parts nor the unknown fields in them come back."""
    *arguments, expected = LOST[case]

    assert resaved(make, *arguments) == expected


@both_codecs
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("cab", [C, A, B]),
        ("xabcy", [Line2("x"), A, B, C, Line2("y")]),
        ("ac", [A, C]),
        ("abx", [A, B, Line2("x", "3")]),
        ("cbx", [C, B, Line2("x")]),
        ("ax", [A, Line2("x")]),
        ("aabc", [A, Line2("a"), B, C]),
        ("", []),
    ],
)
def test_items_of_lists_take_their_fields_along(
    make: Callable[..., Codec[Any]], lines: str, expected: list[Line2]
) -> None:
    """Equal items are paired first, then items at the same place in a list of the same length."""
    changed = Cart1([Line1(sku) for sku in lines])

    assert resaved(make, Cart1, Cart2, Cart2([A, B, C], "g"), changed) == Cart2(expected, "g")


def test_equal_items_keep_their_places() -> None:
    """An unchanged item is not paired with an equal one at another place."""
    items = [Line2("a", "1"), Line2("a", "2")]

    assert resaved(JsonCodec, list[Line1], list[Line2], items, [Line1("x"), Line1("a")]) == [
        Line2("x", "1"),
        Line2("a", "2"),
    ]


class Flat1(msgspec.Struct, array_like=True, frozen=True):
    """A struct as an array."""

    x: int


class Flat2(Flat1, array_like=True, frozen=True):
    """The struct of the new release."""

    y: int = 0


class Frozen1(msgspec.Struct, frozen=True):
    """A struct for sets."""

    x: int


class Frozen2(Frozen1, frozen=True):
    """The struct of the new release."""

    y: int = 0


class Both1(msgspec.Struct):
    """Two kinds of containers without names."""

    flat: Flat1
    frozen: set[Frozen1]


class Both2(msgspec.Struct):
    """The containers of the new release."""

    flat: Flat2
    frozen: set[Frozen2]
    note: str = ""


@both_codecs
def test_arrays_and_sets_keep_fields_until_changed(make: Callable[..., Codec[Any]]) -> None:
    """A changed `array_like` struct or set has only the known fields."""
    data = Both2(Flat2(1, 2), {Frozen2(1, 2)}, "note")

    same = resaved(make, Both1, Both2, data, Both1(Flat1(1), {Frozen1(1)}))
    changed = resaved(make, Both1, Both2, data, Both1(Flat1(5), {Frozen1(1), Frozen1(5)}))

    assert same == data
    assert changed == Both2(Flat2(5), {Frozen2(1), Frozen2(5)}, "note")


def test_unknown_json_keeps_every_digit() -> None:
    """Values that Python would write in another way stay as they are."""
    unknown = b'"a":1.00,"b":123456789012345678901234567890,"c":{"d": 1e400}'
    codec = JsonCodec(Line1)
    session = codec.decode(b'{"id":"x","data":{%b,"sku":"s"}}' % unknown)

    session.data.sku = "t"

    assert b'"data":{"sku":"t",%b}' % unknown in codec.encode(session)


def test_unknown_messagepack_keeps_its_types() -> None:
    """Bytes, timestamps and extension types stay, also as keys."""
    unknown = {
        "b": b"\x00",
        "t": datetime(2030, 1, 1, tzinfo=UTC),
        "e": msgspec.msgpack.Ext(5, b""),
    }
    data: dict[Any, Any] = {"sku": "s", "nested": unknown | {1: 2, b"k": 3}}
    codec = MsgpackCodec(Line1)
    session = codec.decode(msgspec.msgpack.encode({"id": "x", "data": data}))

    session.data.sku = "t"

    payload = codec.encode(session)
    assert msgspec.msgpack.decode(payload)["data"] == data | {"sku": "t"}


@both_codecs
def test_save_keeps_unknown_fields_of_a_session(make: Callable[..., Codec[Any]]) -> None:
    """A newer release of the package may add fields to `Session`."""
    codec, plain = make(Line1), make()
    encode = msgspec.json.encode if make is JsonCodec else msgspec.msgpack.encode
    decode: Any = msgspec.json.decode if make is JsonCodec else msgspec.msgpack.decode
    session = codec.decode(encode({"id": "x", "tenant": 7, "kind": "web", "data": {"sku": "s"}}))

    session.kind = ""

    payload = decode(codec.encode(session))
    assert payload["tenant"] == 7
    assert "kind" not in payload
    assert stored_form(plain.decode(encode({"id": "x", "tenant": 7}))) is None


@both_codecs
def test_unknown_fields_count_towards_the_size(make: Callable[..., Codec[Any]]) -> None:
    """`max_bytes` holds for the whole payload."""
    codec = make(Line1, max_bytes=200)
    payload = make(Line2).encode(Session(id="x", data=Line2("s", "n" * 300)))

    with pytest.raises(InvalidSession, match="at most 200"):
        codec.encode(codec.decode(payload))


def test_other_codecs_ignore_the_stored_form() -> None:
    """Another data type or format would take known fields for unknown ones."""
    session: Any = JsonCodec(Line2).decode(JsonCodec(Line2).encode(Session(id="x", data=A)))
    moved = MsgpackCodec(Line2).encode(session)
    session.data = Line1("b")

    assert msgspec.msgpack.decode(moved)["data"] == {"sku": "a", "note": "1"}
    assert msgspec.json.decode(JsonCodec(Line1).encode(session))["data"] == {"sku": "b"}


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, revised])
def test_copies_keep_unknown_fields(copied: Callable[[Session[Any]], Session[Any]]) -> None:
    """The stored form goes with a copy, and is not a part of the session."""
    old, new = JsonCodec(Line1), JsonCodec(Line2)
    loaded = old.decode(new.encode(Session(id="x", data=A)))
    plain = msgspec.structs.replace(loaded)

    session = copied(loaded)

    assert new.decode(old.encode(session)).data == A
    assert session is not loaded
    assert (session == plain, repr(session)) == (True, repr(plain))
    assert msgspec.structs.asdict(session) == msgspec.structs.asdict(plain)
    assert (copied is copy.deepcopy) == (session.data is not loaded.data)
