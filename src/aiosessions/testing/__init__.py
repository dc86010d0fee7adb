"""The storage contract: the promises of every `Storage`, as pytest tests for any storage.

To test a storage, subclass a contract and define one fixture, here or in a conftest.py:

    import pytest
    from aiosessions import JsonCodec
    from aiosessions.testing import StorageContract
    from my_storage import MyStorage

    class TestMyStorage(StorageContract):
        @pytest.fixture
        def make_storage(self):
            def make(*, ttl=60.0, codec=None):
                return MyStorage(ttl=ttl, codec=codec or JsonCodec())
            return make

The factory returns an async context manager that yields a storage. Every storage is one. For more
set-up, decorate an async generator with `contextlib.asynccontextmanager`. Each test calls the
factory in its event loop, once for each storage that it needs, and the kit closes them. Storages
start empty; the storages of one test may share a backend.

Choose one contract or several, as in `class TestMine(SharedStorageContract, SweptStorageContract)`:

- `StorageContract`: the promises of all storages.
- `SharedStorageContract`: storages that several replicas share. Two storages that one test makes
  must be two views of one backend.
- `IndexedStorageContract`: storages that find the sessions of a principal.
- `SweptStorageContract`: storages that keep expired sessions until `delete_expired`.
- `SelfExpiringStorageContract`: storages with a backend that removes expired sessions by itself.
- `RemoteStorageContract`: storages with a backend that can be out of reach. It needs a second
  fixture, `make_unreachable_storage`.

To pytest the tests are ordinary functions: each calls `anyio.run`. They work in plain pytest, and
beside pytest-asyncio or anyio's plugin in any mode. Set `backend = "trio"` in the subclass to run
them on trio. Create objects that belong to an event loop, such as clients and connections, in the
factory. An async fixture has another loop.

Time is real by default. Tests sleep for a few `unit`s, and look for a live session one `tick`
before its end. Both are a quarter of a second. On a slow machine, or for a backend that counts in
whole seconds, set `unit = tick = 2.0`. With a storage that takes a `Clock`, the tests do not sleep,
and they check expiry to the millisecond:

    import pytest
    from aiosessions import JsonCodec
    from aiosessions.testing import FakeTime, StorageContract
    from my_storage import MyStorage

    class TestMyStorage(FakeTime, StorageContract):
        @pytest.fixture
        def make_storage(self):
            def make(*, ttl=60.0, codec=None):
                return MyStorage(ttl=ttl, codec=codec or JsonCodec(), clock=self.clock)
            return make

This package needs pytest; the rest of aiosessions does not.
"""

import pytest

# This has to come before the imports; failed asserts then show the compared values.
pytest.register_assert_rewrite(
    *(
        f"{__name__}._{module}"
        for module in (
            "closing",
            "concurrency",
            "expiring",
            "index_races",
            "indexing",
            "kinds",
            "refusing",
            "revoking",
            "storing",
        )
    )
)

from ._clock import FakeClock  # noqa: E402
from ._harness import FakeTime, StorageFactory  # noqa: E402
from ._kinds import (  # noqa: E402
    IndexedStorageContract,
    RemoteStorageContract,
    SelfExpiringStorageContract,
    SharedStorageContract,
    StorageContract,
    SweptStorageContract,
)

__all__ = [
    "FakeClock",
    "FakeTime",
    "IndexedStorageContract",
    "RemoteStorageContract",
    "SelfExpiringStorageContract",
    "SharedStorageContract",
    "StorageContract",
    "StorageFactory",
    "SweptStorageContract",
]
