"""The contract finds the mistake of each broken storage, and each of its tests finds one.

The tests of the kit are called directly here, without pytest, so that this takes little time.
"""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from aiosessions import Codec, JsonCodec
from aiosessions.testing import (
    FakeTime,
    IndexedStorageContract,
    RemoteStorageContract,
    SelfExpiringStorageContract,
    SharedStorageContract,
    StorageContract,
    StorageFactory,
    SweptStorageContract,
)
from tests.contract import (
    broken_connections,
    broken_indexes,
    broken_revocations,
    broken_storages,
    broken_writes,
)
from tests.support.indexes import IndexedReferenceStorage
from tests.support.storages import Backend, ReferenceStorage

MODULES = (
    broken_storages,
    broken_writes,
    broken_connections,
    broken_indexes,
    broken_revocations,
)
KINDS = [
    kind
    for module in MODULES
    for kind in vars(module).values()
    if isinstance(kind, type) and kind.__module__ == module.__name__ and hasattr(kind, "found_by")
]
FAILURES = (Exception, pytest.fail.Exception)
PARAM = type(pytest.param())


class ReferenceContract(
    FakeTime, RemoteStorageContract, SharedStorageContract, SweptStorageContract
):
    """The contracts that `ReferenceStorage` keeps."""


class IndexedContract(ReferenceContract, IndexedStorageContract):
    """The contracts that `IndexedReferenceStorage` keeps."""


class EveryContract(IndexedContract, SelfExpiringStorageContract):
    """Every test of the kit."""


def names_of(contract: type) -> set[str]:
    """Return the names of the tests of a contract, without "test_"."""
    return {name.removeprefix("test_") for name in dir(contract) if name.startswith("test_")}


def cases(test: Any) -> Iterator[dict[str, Any]]:
    """Return the arguments of each case of a parametrised test."""
    axes = []
    for mark in getattr(test, "pytestmark", ()):
        name, values = mark.args
        plain = [each.values[0] if isinstance(each, PARAM) else each for each in values]
        axes.append([(name, each) for each in plain])
    return map(dict, itertools.product(*axes))


def run(
    kind: type[ReferenceStorage],
    name: str,
    caplog: pytest.LogCaptureFixture,
    backend: str = "asyncio",
) -> None:
    """Run each case of a test of the kit on a kind of storage."""
    contract = type("Contract", (EveryContract,), {"backend": backend})

    def factory(backend: Backend) -> StorageFactory:
        def make(*, ttl: float = 60.0, codec: Codec[Any] | None = None) -> ReferenceStorage:
            return kind(backend, ttl, codec or JsonCodec(), one.clock)

        return make

    for case in cases(getattr(contract, f"test_{name}")):
        one = contract()
        one._make = factory(Backend())
        one._make_unreachable = factory(Backend(is_down=True))
        test = getattr(one, f"test_{name}")
        needs = {"caplog": caplog} if "caplog" in inspect.signature(test).parameters else {}
        test(**case, **needs)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_contract_finds_the_mistake(
    kind: type[broken_storages.Broken], caplog: pytest.LogCaptureFixture
) -> None:
    """Each of the named tests fails on the broken storage."""
    for name in kind.found_by:
        with pytest.raises(FAILURES):
            run(kind, name, caplog)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize(
    ("kind", "contract"),
    [(ReferenceStorage, ReferenceContract), (IndexedReferenceStorage, IndexedContract)],
)
def test_contract_accepts_the_reference(
    kind: type[ReferenceStorage], contract: type, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    """The storage that the broken ones derive from passes, so their failures are their mistakes."""
    for name in sorted(names_of(contract)):
        run(kind, name, caplog, backend)


def test_every_contract_test_finds_a_mistake() -> None:
    """Each test of the kit fails on some broken storage."""
    assert {name for kind in KINDS for name in kind.found_by} == names_of(EveryContract)


def test_failed_assert_shows_the_compared_values(caplog: pytest.LogCaptureFixture) -> None:
    """Pytest rewrites the asserts of the kit as those of a test file."""
    with pytest.raises(AssertionError, match="assert True is False"):
        run(broken_writes.DeleteIsAlwaysTrue, "delete_of_an_absent_session_returns_false", caplog)


def test_hanging_test_fails() -> None:
    """A test of the kit fails after `patience` seconds."""

    class Impatient(FakeTime, StorageContract):
        patience = 0.01

    with pytest.raises(TimeoutError):
        Impatient().run(anyio.sleep_forever)
