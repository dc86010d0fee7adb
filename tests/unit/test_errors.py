"""The errors: their statuses, their base classes, and copies of them."""

import copy
import itertools
import pickle

import pytest

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


@pytest.mark.parametrize("error", TABLE)
def test_error_has_status_and_base(error: type[SessionError]) -> None:
    """Each class has the HTTP status of a proxy's answer, and bases that callers may catch."""
    status, base = TABLE[error]

    assert error.status == error("why").status == status
    assert issubclass(error, base)
    assert issubclass(error, SessionError)


def test_other_errors_are_independent() -> None:
    """A handler of absent sessions does not catch an outage, and clauses have any order."""
    kinds = [*(TABLE.keys() - {SessionError}), LookupError, ValueError, RuntimeError]

    assert {pair for pair in itertools.permutations(kinds, 2) if issubclass(*pair)} == {
        (InvalidSession, ValueError),
        (InvalidSessionId, ValueError),
        (InvalidSessionId, InvalidSession),
        (SessionNotFound, LookupError),
        (SessionRotated, SessionConflict),
        (StorageMisused, RuntimeError),
    }


@pytest.mark.parametrize("error", TABLE)
def test_error_can_be_pickled_and_copied(error: type[SessionError]) -> None:
    """A copy, or an error from another process, equals the original, doubt included."""
    original = error("why")
    if isinstance(original, StorageUnavailable | StorageClosed):
        assert original.in_doubt is False
        original = type(original)("why", in_doubt=True)

    for other in (pickle.loads(pickle.dumps(original)), copy.copy(original)):  # noqa: S301 - own
        assert type(other) is error
        assert str(other) == "why"
        assert vars(other) == vars(original)
