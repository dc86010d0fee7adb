"""The errors: their statuses, their base classes, and copies of them."""

import copy
import itertools
import pickle

import pytest

import aiosessions
from aiosessions import (
    CorruptSession,
    InvalidSession,
    InvalidSessionId,
    SessionConflict,
    SessionError,
    SessionExists,
    SessionNotFound,
    SessionRotated,
    StorageClosed,
    StorageMisused,
    StorageUnavailable,
)

TABLE: dict[type[SessionError], tuple[int, type[Exception]]] = {
    SessionError: (500, Exception),
    InvalidSession: (500, ValueError),
    InvalidSessionId: (400, InvalidSession),
    SessionNotFound: (404, LookupError),
    SessionExists: (409, SessionError),
    SessionConflict: (409, SessionError),
    SessionRotated: (409, SessionConflict),
    CorruptSession: (500, SessionError),
    StorageUnavailable: (503, SessionError),
    StorageClosed: (503, SessionError),
    StorageMisused: (500, RuntimeError),
}
every_error = pytest.mark.parametrize("error", TABLE)


@every_error
def test_error_has_status_and_base(error: type[SessionError]) -> None:
    """Each class has the HTTP status of a proxy's answer, and a base that callers may catch."""
    status, base = TABLE[error]

    assert error.status == error("why").status == status
    assert issubclass(error, base)
    assert issubclass(error, SessionError)


def test_package_exports_exactly_these_errors() -> None:
    """Callers find every error of the package in its namespace."""
    exported = map(vars(aiosessions).get, aiosessions.__all__)

    assert {
        each for each in exported if isinstance(each, type) and issubclass(each, Exception)
    } == TABLE.keys()


def test_outage_is_not_absence() -> None:
    """A handler of absent sessions does not catch an outage."""
    for absence in (SessionNotFound, LookupError, ValueError):
        for outage in (StorageUnavailable, StorageClosed, StorageMisused):
            assert not issubclass(outage, absence)


def test_other_errors_are_independent() -> None:
    """Only the documented errors are subclasses of others, so `except` clauses have any order."""
    pairs = itertools.permutations(TABLE.keys() - {SessionError}, 2)

    assert {pair for pair in pairs if issubclass(*pair)} == {
        (InvalidSessionId, InvalidSession),
        (SessionRotated, SessionConflict),
    }


@every_error
def test_error_can_be_pickled_and_copied(error: type[SessionError]) -> None:
    """An error in another process, or a copy, equals the original."""
    original = error("why")

    for other in (pickle.loads(pickle.dumps(original)), copy.copy(original)):  # noqa: S301 - own
        assert type(other) is error
        assert str(other) == "why"


def test_copy_of_error_keeps_doubt() -> None:
    """`in_doubt` is False by default, and part of a copy."""
    doubtful = StorageUnavailable("why", in_doubt=True)

    assert pickle.loads(pickle.dumps(doubtful)).in_doubt is True  # noqa: S301 - our own
    assert StorageUnavailable("why").in_doubt is False
