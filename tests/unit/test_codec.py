"""Encoded sessions come back as they were; other bytes are a session or `CorruptSession`."""

import math
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
    MsgpackCodec,
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
unhurried = settings(deadline=None, max_examples=60)

visible = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=256)
text = st.text(max_size=30)
moments = st.datetimes(timezones=st.just(UTC))
integers = st.integers(-(2**63), 2**64 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
documents: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | integers | floats | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=10,
)
points = st.recursive(
    st.builds(Point, x=integers, label=text),
    lambda inner: st.builds(Point, x=integers, label=text, next=inner),
    max_leaves=4,
)
# A data type, and data of that type. Some are types to msgspec only, so they are `Any` here.
TYPES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "any": (Any, documents),
    "struct": (Point, points),
    "dataclass": (Cart, st.builds(Cart, items=st.lists(text, max_size=4), total=floats)),
    "typed-dict": (
        Options,
        st.fixed_dictionaries({}, optional={"dark": st.booleans(), "size": integers}),
    ),
    "union": (
        Circle | Square,
        st.builds(Circle, radius=floats) | st.builds(Square, side=integers),
    ),
    "builtins": (
        dict[str, list[int] | str],
        st.dictionaries(text, st.lists(integers, max_size=4) | text, max_size=4),
    ),
    "enum": (Colour, st.sampled_from(Colour)),
    "datetime": (datetime, moments),
    "bytes": (bytes, st.binary(max_size=40)),
    "none": (None, st.none()),
}


def sessions(data: st.SearchStrategy[Any]) -> st.SearchStrategy[Session[Any]]:
    """Sessions that can be stored, with any value in any field."""
    return st.builds(
        Session[Any],
        id=visible,
        kind=text,
        principal=st.none() | text,
        metadata=st.dictionaries(text, text, max_size=4),
        data=data,
        created_at=moments,
        updated_at=moments,
        expires_at=st.none() | moments,
    )


@both_codecs
@pytest.mark.parametrize("name", TYPES)
@unhurried
@given(draw=st.data())
def test_encoded_sessions_come_back(
    make: Callable[..., Codec[Any]], name: str, draw: st.DataObject
) -> None:
    """Every field comes back as it was, and data with its type."""
    data_type, data = TYPES[name]
    session = draw.draw(sessions(data))
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
@settings(deadline=None, max_examples=200)
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


@both_codecs
def test_tuples_come_back_as_lists(make: Callable[..., Codec[Any]]) -> None:
    """Neither form has tuples, and a list holds the same values."""
    codec = make()
    session = Session[Any](id="x", data={"a": (1, [(2, "b")]), "c": [()]})

    assert codec.decode(codec.encode(session)).data == {"a": [1, [[2, "b"]]], "c": [[]]}


@both_codecs
@pytest.mark.parametrize(
    ("data_type", "data", "read"),
    [
        (Incomparable, Incomparable(1.5, Incomparable(None)), None),
        (list[Incomparable], [Incomparable(1.5)], None),
        (Loose, Loose((1, [(2,)])), Loose([1, [[2]]])),
        (list[int], (1, 2), [1, 2]),
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
    """Types without equality, and values that equal one of the data type, are not refused."""
    codec = make(data_type)

    decoded = codec.decode(codec.encode(Session(id="x", data=data))).data

    assert repr(decoded) == repr(read or data)


@both_codecs
def test_own_type_may_recompute_its_fields(make: Callable[..., Codec[Any]]) -> None:
    """A struct that computes a field when it is made may be stored with an older value."""
    codec = make(Totalled)
    session = Session(id="x", data=Totalled([1]))
    session.data.items.append(2)

    assert codec.decode(codec.encode(session)).data == Totalled([1, 2])


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
def test_encoding_leaves_the_session_alone(make: Callable[..., Codec[Any]]) -> None:
    """Encoding changes no field of the session, its revision included."""
    session = Session[Any](id="x", metadata={"a": "b"}, data=[1], revision="r")
    before = msgspec.structs.asdict(session)

    make().encode(session)

    assert msgspec.structs.asdict(session) == before


@both_codecs
@pytest.mark.parametrize("data_type", [Any, Point, Circle | Square, bytes, None], ids=str)
@unhurried
@given(payload=st.binary(max_size=200))
@example(payload=b"")
@example(payload=b"null")
@example(payload=b"{}")
@example(payload=b"\x80")
@example(payload=b"\xc1" * 32)
@example(payload=b'{"id":"x"}')
@example(payload=b'{"id":"x","data":' + b"[" * 100_000)
@example(payload=b"\x82\xa2id\xa1x\xa4data" + b"\x91" * 100_000)
@example(payload=b'{"id":"x","data":' + b"9" * 5_000 + b"}")
@example(payload=b'{"id":"x","data":1e999}')
@example(payload=b'{"id":"x","data":"\\ud800"}')
@example(payload=b'{"id":"x","data":"\xff"}')
@example(payload=b'{"id":"x","created_at":"0000-00-00T00:00:00Z"}')
@example(payload=b'{"id":"x","created_at":"0001-01-01T00:00:00+14:00"}')
@example(payload=b'{"id":"x","created_at":"9999-12-31T23:59:60Z"}')
def test_any_bytes_are_a_session_or_corrupt(
    make: Callable[..., Codec[Any]], data_type: Any, payload: bytes
) -> None:
    """Decoding any bytes gives a whole session or `CorruptSession`."""
    session_or_corrupt(make(data_type), payload)


mutations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "drop", "double"]),
        st.integers(0, 10_000),
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=4,
)


@both_codecs
@settings(deadline=None, max_examples=300)
@given(changes=mutations)
def test_a_damaged_payload_is_a_session_or_corrupt(
    make: Callable[..., Codec[Any]], changes: list[tuple[str, int, int]]
) -> None:
    """A payload with bytes changed, lost or added gives no other error, and no leak."""
    codec = make(Point)
    payload = bytearray(
        codec.encode(
            Session(
                id=SECRET,
                kind=SECRET,
                principal=SECRET,
                metadata={SECRET: SECRET},
                data=Point(x=NUMBER, label=SECRET, next=Point(x=1)),
                expires_at=datetime(2030, 1, 1, tzinfo=UTC),
            )
        )
    )
    for how, where, what in changes:
        at = where % max(1, len(payload))
        if how == "flip" and payload:
            payload[at] ^= what
        elif how == "cut":
            del payload[at:]
        elif how == "insert":
            payload.insert(at, what)
        elif how == "drop":
            del payload[at : at + 1]
        elif how == "double":
            payload[at:at] = payload[at : at + what]

    session_or_corrupt(codec, bytes(payload))


def session_or_corrupt(codec: Codec[Any], payload: bytes) -> None:
    """Check the session that decoding gives, or that its error does not quote the payload."""
    try:
        session = codec.decode(payload)
    except CorruptSession as error:
        corrupt = error
    else:
        check_fields(session)
        return
    said = said_by(corrupt)
    assert SECRET not in said
    assert str(NUMBER) not in said
    assert len(str(corrupt)) < 300


def check_fields(session: Session[Any]) -> None:
    """Check the types of a decoded session's fields."""
    assert type(session) is Session
    assert isinstance(session.id, str)
    assert all(
        moment is None or moment.utcoffset() is not None
        for moment in (session.created_at, session.updated_at, session.expires_at)
    )


@both_codecs
def test_bytes_after_the_payload_are_corrupt(make: Callable[..., Codec[Any]]) -> None:
    """Bytes after the session are damage, not ignored."""
    codec = make()
    payload = codec.encode(Session(id="x"))

    for rest in (b"x", b"{}", b"\x00", payload):
        with pytest.raises(CorruptSession):
            codec.decode(payload + rest)


@both_codecs
def test_unknown_fields_of_a_session_are_skipped(
    make: Callable[..., Codec[Any]],
) -> None:
    """A later release may add fields, and both releases can run side by side."""
    document = {"id": "x", "kind": "web", "colour": "red"}
    payload = (
        msgspec.json.encode(document) if make is JsonCodec else msgspec.msgpack.encode(document)
    )

    assert make().decode(payload).kind == "web"


@both_codecs
@pytest.mark.parametrize("field", ["created_at", "updated_at", "expires_at"])
def test_a_naive_datetime_in_a_payload_is_corrupt(
    make: Callable[..., Codec[Any]], field: str
) -> None:
    """Readers never guess a time zone."""
    document = {"id": "x", field: "2030-01-01T00:00:00"}
    payload = (
        msgspec.json.encode(document) if make is JsonCodec else msgspec.msgpack.encode(document)
    )

    with pytest.raises(CorruptSession):
        make().decode(payload)


@pytest.mark.parametrize("data", [math.nan, math.inf, -math.inf])
def test_messagepack_has_nan(data: float) -> None:
    """MessagePack keeps NaN and infinities."""
    for codec in (MsgpackCodec[Any](), MsgpackCodec[Any](float | None)):
        decoded = codec.decode(codec.encode(Session(id="x", data=data))).data

        assert repr(decoded) == repr(data)


def test_huge_integers() -> None:
    """JSON keeps integers of any size; MessagePack has 64 bits for them and refuses more."""
    huge = Session[Any](id="x", data=2**70)
    text_codec = JsonCodec[Any]()

    assert text_codec.decode(text_codec.encode(huge)).data == 2**70
    with pytest.raises(InvalidSession):
        MsgpackCodec[Any]().encode(huge)


@both_codecs
def test_integers_too_long_to_print(make: Callable[..., Codec[Any]]) -> None:
    """An integer of 5,000 digits is refused, or comes back as it was."""
    codec = make()
    session = Session[Any](id="x", data=10**5_000)

    try:
        payload = codec.encode(session)
    except InvalidSession:
        return
    assert codec.decode(payload).data == session.data


@both_codecs
@pytest.mark.parametrize("data", ["x" * 100, "é" * 50, {"a": list(range(40))}], ids=type)
def test_the_size_limit_is_exact(make: Callable[..., Codec[Any]], data: object) -> None:
    """A session of exactly `max_bytes` bytes is accepted, one byte more is not."""
    session = Session[Any](id="x", data=data)
    size = len(make().encode(session))

    assert len(make(max_bytes=size).encode(session)) == size
    with pytest.raises(InvalidSession, match=rf"{size:,} bytes.* at most {size - 1:,} "):
        make(max_bytes=size - 1).encode(session)


@both_codecs
def test_the_size_limit_is_one_mebibyte_by_default(make: Callable[..., Codec[Any]]) -> None:
    """A payload may have 1,048,576 bytes by default."""
    session = Session[Any](id="x", data="x" * 1_000_000)
    room = 1_048_576 - len(make().encode(session))

    session.data = "x" * (1_000_000 + room)
    assert len(make().encode(session)) == 1_048_576
    session.data = "x" * (1_000_001 + room)
    with pytest.raises(InvalidSession):
        make().encode(session)


@both_codecs
def test_size_limit_does_not_apply_to_decoding(
    make: Callable[..., Codec[Any]],
) -> None:
    """A session that was stored under a larger limit still loads."""
    session = Session[Any](id="x", data="x" * 1_000)

    assert make(max_bytes=10).decode(make().encode(session)) == session


@both_codecs
@pytest.mark.parametrize("max_bytes", [0, -1])
def test_a_size_limit_is_positive(make: Callable[..., Codec[Any]], max_bytes: int) -> None:
    """A size limit of zero or less is a `ValueError`."""
    with pytest.raises(ValueError, match="max_bytes"):
        make(max_bytes=max_bytes)


@both_codecs
def test_undecodable_data_type_is_a_type_error(make: Callable[..., Codec[Any]]) -> None:
    """A data type that msgspec cannot decode is refused when the codec is made."""
    with pytest.raises(TypeError):
        make(dict[str, Point] | Cart | Point)


@both_codecs
def test_a_codec_shows_its_settings(make: Callable[..., Codec[Any]]) -> None:
    """The `repr` of a codec has its data type and its size limit."""
    shown = repr(make(Point, max_bytes=77))

    assert "Point" in shown
    assert "77" in shown


def test_dates_of_any_zone_keep_their_moment() -> None:
    """A date that was written in another time zone is the same moment after decoding."""
    codec = JsonCodec[Any]()
    moment = datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=5, minutes=30)))

    assert codec.decode(codec.encode(Session(id="x", created_at=moment))).created_at == moment
