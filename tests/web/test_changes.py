"""The changes of a request, and their merge with those of another request."""

import dataclasses
from typing import Any

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosessions import SessionConflict
from aiosessions.asgi._changes import Changes, Snapshot, refill

VALUES = st.integers(0, 2) | st.lists(st.integers(0, 1), max_size=1)
DATA = st.dictionaries(st.sampled_from("abcd"), VALUES)


def changes(before: Any, now: Any) -> Changes:
    """The changes between two data."""
    return Changes(Snapshot.of(before, {}), now, {})


def changed(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """The keys that differ."""
    return {key for key in before | now if before.get(key) != now.get(key)}


@given(DATA, DATA, DATA)
def test_merge_is_made_key_by_key(
    before: dict[str, Any], mine: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Each key has my value if I have changed it, else theirs."""
    expected = {
        key: source[key]
        for key in before | mine | theirs
        for source in [mine if key in changed(before, mine) else theirs]
        if key in source
    }
    assert changes(before, mine).apply(dict(theirs), {}) == expected


@given(DATA, DATA, DATA, st.none() | st.sets(st.sampled_from("abcd")))
def test_lost_change_is_a_conflict(
    before: dict[str, Any], mine: dict[str, Any], theirs: dict[str, Any], read: set[str] | None
) -> None:
    """A key that both have changed is a conflict, if this request has read it."""
    both = changed(before, mine) & changed(before, theirs)
    fresh = dict(theirs)
    if both if read is None else both & read:
        with pytest.raises(SessionConflict):
            changes(before, mine).apply(fresh, {}, read)
        assert fresh == theirs
    else:
        changes(before, mine).apply(fresh, {}, read)


@given(DATA, DATA)
def test_difference_is_noticed(before: dict[str, Any], now: dict[str, Any]) -> None:
    """There are changes if, and only if, the data differ."""
    assert bool(changes(before, now)) is (before != now)


class Struct(msgspec.Struct):
    """Data of an application."""

    a: int = 0
    b: int = 0


@dataclasses.dataclass
class Plain:
    """The same as a dataclass."""

    a: int = 0
    b: int = 0


@attrs.define
class Attrs:
    """The same as a class of attrs."""

    a: int = 0
    b: int = 0


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Data that cannot be changed in place."""

    a: int = 0
    b: int = 0


@pytest.mark.parametrize("kind", [Struct, Plain, Attrs])
def test_fields_are_merged(kind: Any) -> None:
    """The parts of typed data are its fields."""
    fresh = kind(a=0, b=7)
    assert changes(kind(), kind(a=5)).apply(fresh, {}, None) is fresh
    assert fresh == kind(a=5, b=7)
    with pytest.raises(SessionConflict):
        changes(kind(), kind(a=5)).apply(kind(a=6), {}, None)


@pytest.mark.parametrize(
    ("before", "mine", "theirs"),
    [(["a"], ["a", "b"], ["a", "c"]), ({1: 2}, {"a": 1}, {1: 3}), (Frozen(), Frozen(1), Frozen(2))],
)
def test_other_data_is_not_merged(before: Any, mine: Any, theirs: Any) -> None:
    """Data without parts is one part: two changes are a conflict, and one stays."""
    with pytest.raises(SessionConflict):
        changes(before, mine).apply(theirs, {}, None)
    assert changes(before, before).apply(theirs, {}, None) == theirs


def test_metadata_is_set_again() -> None:
    """Metadata is merged by its keys, without conflicts."""
    fresh = {"a": "theirs", "b": "theirs", "c": "theirs"}
    before = Snapshot.of({}, {"a": "old", "b": "old"})
    Changes(before, {}, {"a": "mine"}).apply({}, fresh, None)
    assert fresh == {"a": "mine", "c": "theirs"}


def test_refilled_data_keeps_its_identity() -> None:
    """The application's references stay valid, unless the type is frozen or another one."""
    for target, source in (({"a": 1, "b": 2}, {"b": 3}), (Plain(1), Plain(2))):
        assert refill(target, source) is target
        assert target == source
    assert refill(Frozen(1), Frozen(2)) == Frozen(2)
    assert refill([1], [2]) == [2]


def test_unencodable_value_is_compared_by_its_repr() -> None:
    """The codec refuses the value later, with another message."""
    value = object()
    assert not changes({"a": value}, {"a": value})
    assert changes({"a": value}, {"a": object()})
