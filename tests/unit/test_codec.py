"""Encoded sessions come back as they were; other bytes are a session or `CorruptSession`."""

import math
import re
from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiosessions import (
    Codec,
    CorruptSession,
    InvalidSession,
    JsonCodec,
    Session,
)
from tests.support.data_types import (
    NUMBER,
    SECRET,
    Cart,
    Circle,
    Colour,
    Incomparable,
    Level,
    Loose,
    Options,
    Pair,
    Point,
    Square,
    Totalled,
    both_codecs,
)
from tests.support.secrets import said_by

# A busy machine may be slow; a slow example is not a failure.
unhurried = settings(deadline=None, max_examples=40)

text = st.text(max_size=30)
moments = st.datetimes(timezones=st.just(UTC))
integers = st.integers(-(2**63), 2**64 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
documents: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | integers | floats | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=10,
)
points = st.builds(Point, x=integers, label=text)
# A data type, and data of that type. Some are types to msgspec only, so they are `Any` here.
TYPES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "any": (Any, documents),
    "struct": (Point, st.builds(Point, x=integers, next=st.none() | points)),
    "dataclass": (Cart, st.builds(Cart, items=st.lists(text, max_size=4), total=floats)),
    "typed-dict": (Options, st.fixed_dictionaries({}, optional={"size": integers})),
    "union": (Circle | Square, st.builds(Circle, floats) | st.builds(Square, integers)),
    "enum": (Colour, st.sampled_from(Colour)),
    "datetime": (datetime, moments),
    "bytes": (bytes, st.binary(max_size=40)),
}


@both_codecs
@pytest.mark.parametrize("name", TYPES)
@unhurried
@given(draw=st.data())
def test_encoded_sessions_come_back(
    make: Callable[..., Codec[Any]], name: str, draw: st.DataObject
) -> None:
    """Every field comes back as it was, and data with its type."""
    data_type, data = TYPES[name]
    session = draw.draw(
        st.builds(
            Session[Any],
            id=text,
            kind=text,
            principal=st.none() | text,
            metadata=st.dictionaries(text, text, max_size=4),
            data=data,
            created_at=moments,
            updated_at=moments,
            expires_at=st.none() | moments,
        )
    )
    codec = make(data_type)

    decoded = codec.decode(codec.encode(session))

    assert decoded == session
    assert type(decoded.data) is type(session.data)
    assert decoded is not session


awkward: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | integers
    | st.floats()
    | text
    | st.binary(max_size=4)
    | st.datetimes(timezones=st.none() | st.just(UTC) | st.timezones())
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.uuids()
    | st.decimals()
    | st.sampled_from([Colour.RED, Level.LOW])
    | st.frozensets(st.integers() | st.floats(), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(text | st.integers(0, 3) | st.floats(), inner, max_size=3)
        | st.builds(Loose, inner)
        | st.builds(Pair, st.integers(), st.none() | st.floats())
    ),
    max_leaves=6,
)


@both_codecs
@pytest.mark.parametrize("data_type", [Any, dict[str, Any], list[Any], Loose, Pair], ids=str)
@settings(deadline=None, max_examples=100)
@given(data=awkward)
def test_changed_data_is_refused(
    make: Callable[..., Codec[Any]], data_type: Any, data: object
) -> None:
    """Data comes back as it was, with lists for tuples, or is refused by the writer."""
    codec = make(data_type)

    try:
        payload = codec.encode(Session(id="x", data=data))
    except InvalidSession:
        return
    assert comparable(codec.decode(payload).data) == comparable(data)


def comparable(value: Any) -> Any:
    """The value with lists for tuples, the same NaN for every NaN, and datetimes in UTC."""
    match value:
        case float() if math.isnan(value):
            value = "NaN"
        case datetime() if value.utcoffset() is not None:
            value = value.astimezone(UTC)
        case list() | tuple():
            value = list(map(comparable, value))
        case dict():
            value = {key: comparable(each) for key, each in value.items()}
        case Loose():
            value = ("Loose", comparable(value.x))
    return value


def outdated() -> Totalled:
    """A struct with a field that it computed before it was changed."""
    totalled = Totalled([1])
    totalled.items.append(2)
    return totalled


@both_codecs
@pytest.mark.parametrize(
    ("data_type", "data", "read"),
    [
        (Any, {"a": (1, [(2, "b")]), "c": [()]}, {"a": [1, [[2, "b"]]], "c": [[]]}),
        (list[Incomparable], [Incomparable(1.5, Incomparable(None))], None),
        (Loose, Loose((1, [(2,)])), Loose([1, [[2]]])),
        (list[int], (1, 2), [1, 2]),
        (Totalled, outdated(), Totalled([1, 2])),
        (tuple[int, float], (1, 2), (1, 2.0)),
        (float, 1, 1.0),
        (bytes, bytearray(b"a"), b"a"),
        (Any, {Colour.RED.value: Level.LOW}, {"red": 1}),
    ],
    ids=repr,
)
def test_equal_values_are_accepted(
    make: Callable[..., Codec[Any]], data_type: Any, data: object, read: object
) -> None:
    """Lists for tuples, values equal to one of the data type, and types without equality."""
    codec = make(data_type)

    decoded = codec.decode(codec.encode(Session(id="x", data=data))).data

    assert repr(decoded) == repr(read or data)


@both_codecs
def test_ambiguous_local_time_is_accepted(make: Callable[..., Codec[Any]]) -> None:
    """A datetime in the hour that occurs twice equals no datetime of another zone."""
    codec = make(datetime)
    moment = datetime(2020, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Amsterdam"))

    decoded = codec.decode(codec.encode(Session(id="x", data=moment))).data

    assert decoded != moment
    assert decoded.astimezone(UTC) == moment.astimezone(UTC)


def test_rounded_offset_is_refused() -> None:
    """Offsets are written in minutes; seconds of an offset would move the moment."""
    zone = timezone(timedelta(minutes=19, seconds=32))

    with pytest.raises(InvalidSession):
        JsonCodec(datetime).encode(Session(id="x", data=datetime(1900, 1, 1, tzinfo=zone)))
    with pytest.raises(InvalidSession):
        JsonCodec(time).encode(Session(id="x", data=time(1, tzinfo=zone)))


@both_codecs
@pytest.mark.parametrize("data_type", [Any, Point, Circle | Square, bytes, None], ids=str)
@unhurried
@given(payload=st.binary(max_size=200))
@example(payload=b"\xc1" * 32)
@example(payload=b'{"id":"x"}')
@example(payload=b'{"id":"x","data":' + b"[" * 100_000)
@example(payload=b"\x82\xa2id\xa1x\xa4data" + b"\x91" * 100_000)
@example(payload=b'{"id":"x","data":' + b"9" * 5_000 + b"}")
@example(payload=b'{"id":"x","data":"\\ud800"}')
@example(payload=b'{"id":"x","created_at":"0001-01-01T00:00:00+14:00"}')
def test_any_bytes_are_a_session_or_corrupt(
    make: Callable[..., Codec[Any]], data_type: Any, payload: bytes
) -> None:
    """Decoding any bytes gives a whole session or `CorruptSession`."""
    session_or_corrupt(make(data_type), payload)


SECRETIVE = Session(
    id=SECRET,
    kind=SECRET,
    principal=SECRET,
    metadata={SECRET: SECRET},
    data=Point(x=NUMBER, label=SECRET, next=Point(x=1)),
    expires_at=datetime(2030, 1, 1, tzinfo=UTC),
)
# The place of a change, the number of bytes that it replaces, and the bytes in their place.
changes = st.tuples(st.integers(0, 400), st.integers(0, 3) | st.just(400), st.binary(max_size=2))


@both_codecs
@settings(deadline=None, max_examples=200)
@given(damage=st.lists(changes, min_size=1, max_size=4))
def test_a_damaged_payload_is_a_session_or_corrupt(
    make: Callable[..., Codec[Any]], damage: list[tuple[int, int, bytes]]
) -> None:
    """A payload with bytes changed, lost or added gives no other error, and no leak."""
    codec = make(Point)
    payload = bytearray(codec.encode(SECRETIVE))
    for start, length, new in damage:
        payload[start : start + length] = new

    session_or_corrupt(codec, bytes(payload))


def session_or_corrupt(codec: Codec[Any], payload: bytes) -> None:
    """Check the session that decoding gives, or that its error does not quote the payload."""
    try:
        session = codec.decode(payload)
    except CorruptSession as error:
        said = said_by(error)
    else:
        said = ""
        assert isinstance(session.id, str)
        for moment in (session.created_at, session.updated_at, session.expires_at):
            assert moment is None or moment.utcoffset() is not None
    assert SECRET not in said
    assert str(NUMBER) not in said


@both_codecs
def test_bytes_after_the_payload_are_corrupt(make: Callable[..., Codec[Any]]) -> None:
    """Bytes after the session are damage, not ignored."""
    codec = make()
    payload = codec.encode(Session(id="x"))

    for rest in (b"x", b"{}", b"\x00", payload):
        with pytest.raises(CorruptSession):
            codec.decode(payload + rest)


def payload_of(make: Callable[..., Codec[Any]], **fields: object) -> bytes:
    """A payload in the form of a codec."""
    encode = msgspec.json.encode if make is JsonCodec else msgspec.msgpack.encode
    return encode({"id": "x"} | fields)


@both_codecs
def test_unknown_fields_of_a_session_are_skipped(make: Callable[..., Codec[Any]]) -> None:
    """A later release may add fields, and both releases can run side by side."""
    assert make().decode(payload_of(make, kind="web", colour="red")).kind == "web"


@both_codecs
@pytest.mark.parametrize("field", ["created_at", "updated_at", "expires_at"])
def test_a_naive_datetime_in_a_payload_is_corrupt(
    make: Callable[..., Codec[Any]], field: str
) -> None:
    """Readers never guess a time zone."""
    with pytest.raises(CorruptSession):
        make().decode(payload_of(make, **{field: "2030-01-01T00:00:00"}))


@both_codecs
@pytest.mark.parametrize("number", [2**70, 10**5_000], ids=["of-70-bits", "of-5000-digits"])
def test_huge_integers_come_back_or_are_refused(
    make: Callable[..., Codec[Any]], number: int
) -> None:
    """JSON keeps integers that can be printed; MessagePack has 64 bits for them."""
    codec = make()
    session = Session[Any](id="x", data=number)

    if make is JsonCodec and number == 2**70:
        assert codec.decode(codec.encode(session)).data == number
    else:
        with pytest.raises(InvalidSession):
            codec.encode(session)


@both_codecs
@pytest.mark.parametrize("data", ["é" * 50, {"a": list(range(40))}], ids=type)
def test_size_limit_is_exact(make: Callable[..., Codec[Any]], data: object) -> None:
    """`max_bytes` bytes are accepted, one more is not. Readers accept any size."""
    session = Session[Any](id="x", data=data)
    payload = make().encode(session)
    size = len(payload)

    assert make(max_bytes=size).encode(session) == payload
    with pytest.raises(InvalidSession, match=rf"{size:,} bytes.* at most {size - 1:,} "):
        make(max_bytes=size - 1).encode(session)
    assert make(max_bytes=1).decode(payload) == session


@both_codecs
def test_settings_are_checked_and_shown(make: Callable[..., Codec[Any]]) -> None:
    """A size limit is positive, and msgspec must be able to decode the data type."""
    for max_bytes in (0, -1):
        with pytest.raises(ValueError, match="max_bytes"):
            make(max_bytes=max_bytes)
    with pytest.raises(TypeError):
        make(dict[str, Point] | Cart | Point)

    assert re.search(r"Codec\(.*Point.*, max_bytes=77\)", repr(make(Point, max_bytes=77)))
