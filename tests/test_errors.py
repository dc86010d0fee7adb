"""The errors: their statuses, what else they are, and that they travel between processes."""

import copy
import inspect
import pickle

import pytest

import aiosessions
from aiosessions import errors

TABLE = {
    "SessionError": (500, Exception),
    "InvalidSession": (400, ValueError),
    "SessionNotFound": (404, LookupError),
    "SessionExists": (409, errors.SessionError),
    "SessionConflict": (409, errors.SessionError),
    "CorruptSession": (500, errors.SessionError),
    "StorageUnavailable": (503, errors.SessionError),
    "StorageClosed": (503, errors.SessionError),
}
each = pytest.mark.parametrize("name", TABLE)


def error_class(name: str) -> type[errors.SessionError]:
    """The class of this name, as the package shows it."""
    found: type[errors.SessionError] = getattr(aiosessions, name)
    return found


@each
def test_statuses_and_bases(name: str) -> None:
    """Each error has, on its class, the status that a proxy answers with, and its built-in base."""
    status, base = TABLE[name]
    cls = error_class(name)

    assert cls.status == status
    assert cls("why").status == status
    assert issubclass(cls, base)
    assert issubclass(cls, aiosessions.SessionError)


def test_the_table_is_complete() -> None:
    """There is no error that this file does not know, and all of them can be imported."""
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, BaseException)
    }

    assert defined == TABLE.keys()
    assert defined <= set(aiosessions.__all__)


def test_an_outage_is_not_an_absence() -> None:
    """Whoever catches what means "not there" never catches "cannot look"."""
    for absence in (aiosessions.SessionNotFound, LookupError, KeyError, ValueError):
        for outage in (aiosessions.StorageUnavailable, aiosessions.StorageClosed):
            assert not issubclass(outage, absence)


def test_siblings_are_told_apart() -> None:
    """No specific error is a kind of another one, so the order of `except` clauses is free."""
    specific = [error_class(name) for name in TABLE if name != "SessionError"]

    assert [
        (one.__name__, other.__name__)
        for one in specific
        for other in specific
        if one is not other and issubclass(one, other)
    ] == []


@each
def test_errors_can_be_pickled_and_copied(name: str) -> None:
    """An error that crosses to another process, or is copied, is the same error."""
    error = error_class(name)("why")

    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own
        assert type(other) is type(error)
        assert str(other) == "why"
        assert other.status == error.status
