"""`upgrade` gives stored data its current form before it is validated."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from aiosessions import Codec, CorruptSession, InvalidSession, Session
from tests.support.data_types import SECRET, both_codecs
from tests.support.secrets import locals_in, said_by


class Old(msgspec.Struct):
    """The data of earlier releases."""

    name: str
    rooms: dict[int, bytes] = {}


class Current(msgspec.Struct):
    """The data of this release."""

    first: str
    last: str
    rooms: dict[int, bytes] = {}


def split(data: dict[str, Any]) -> dict[str, Any]:
    """Make two fields of `name`."""
    if "name" in data:
        data["first"], _, data["last"] = data.pop("name").partition(" ")
    return data


OLD = Old("Ada Lovelace", {1: b"\x00"})
CURRENT = Current("Ada", "Lovelace", {1: b"\x00"})


@both_codecs
@pytest.mark.parametrize("stored", [OLD, CURRENT], ids=["old", "current"])
def test_data_of_both_forms_is_current(make: Callable[..., Codec[Any]], stored: object) -> None:
    """The data is validated and converted after the upgrade, as without one."""
    codec = make(Current, upgrade=split)

    session = codec.decode(make(type(stored)).encode(Session(id="x", data=stored)))

    assert session == msgspec.structs.replace(session, id="x", data=CURRENT)
    assert codec.decode(codec.encode(session)) == session


@both_codecs
def test_upgraded_fields_are_not_unknown(make: Callable[..., Codec[Any]]) -> None:
    """A save drops the fields that `upgrade` has replaced, and keeps the ones it does not know."""
    stored = {"name": "Ada Lovelace", "born": 1815}
    codec, plain = make(Current, upgrade=split), make()
    session = codec.decode(plain.encode(Session(id="x", data=stored)))

    session.data.last = "King"

    data = {"first": "Ada", "last": "King", "rooms": {}, "born": 1815}
    assert plain.decode(codec.encode(session)).data == data


@both_codecs
def test_missing_data_is_upgraded_from_none(make: Callable[..., Codec[Any]]) -> None:
    """A record without data has None, which a data type may have replaced."""
    codec = make(list[int], upgrade=lambda data: [] if data is None else data)

    assert codec.decode(make().encode(Session(id="x"))).data == []


def quoting(data: Any) -> Any:
    """Fail with a message that looks like one of msgspec and quotes the data."""
    message = f"Expected `{data}`"
    raise TypeError(message)


def invalid(data: Any) -> Any:
    """Fail with an error of msgspec."""
    return msgspec.convert(data, int)


@both_codecs
@pytest.mark.parametrize(
    ("upgrade", "reason"),
    [
        (quoting, "upgrade raised TypeError"),
        (invalid, "upgrade raised ValidationError"),
        (lambda data: {data: 1}[0], "upgrade raised KeyError"),
        (lambda data: {1: data}, "Expected `str`, got `object` - at `$.data`"),
        (lambda data: [data, object()], "Encoding objects of type object is unsupported"),
    ],
    ids=range(5),
)
def test_failed_upgrade_is_corrupt_and_quotes_nothing(
    make: Callable[..., Codec[Any]], upgrade: Callable[[Any], Any], reason: str
) -> None:
    """Neither messages nor frames have the payload, for readers and for writers."""
    codec = make(str, upgrade=upgrade)
    session = Session[Any](id="x", data=SECRET)

    with pytest.raises(CorruptSession) as corrupt:
        codec.decode(make().encode(session))
    with pytest.raises(InvalidSession) as refused:
        codec.encode(session)

    for error in (corrupt.value, refused.value):
        assert reason in str(error)
        assert SECRET not in said_by(error)
    lines = [line for line in locals_in(corrupt.value).splitlines() if "SECRET" not in line]
    assert SECRET not in "\n".join(lines)


@both_codecs
def test_upgrade_that_changes_current_data_is_refused(make: Callable[..., Codec[Any]]) -> None:
    """The writer gets the error of a function that would change data at every load."""
    codec = make(int, upgrade=lambda data: data + 1)

    with pytest.raises(InvalidSession, match="upgrade changes data"):
        codec.encode(Session(id="x", data=1))


@both_codecs
def test_upgrade_is_checked_and_shown(make: Callable[..., Codec[Any]]) -> None:
    """It is a function."""
    with pytest.raises(TypeError, match="not dict"):
        make(Current, upgrade={})

    assert "upgrade=<function split" in repr(make(Current, upgrade=split))
