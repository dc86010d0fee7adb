"""The storage contract: what every `Storage` must do, as pytest tests that any storage can run.

A storage is tested by subclassing a contract and giving one fixture, here or in a conftest.py:

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

The factory returns an async context manager that yields a storage. Every storage is one; where more
has to be set up or torn down, decorate an async generator with `contextlib.asynccontextmanager`. It
is called inside the event loop of one test, as often as the test wants storages, and the kit closes
what it opened. Storages should start out empty; those of one test may share a backend.

Choose the contract that fits, or several, as in `class TestMine(SharedStorageContract,
SweptStorageContract)`:

- `StorageContract`: what all storages promise.
- `SharedStorageContract`: storages that several replicas share. Two storages that one test makes
  must be two views of one backend.
- `SweptStorageContract`: storages whose `delete_expired` has work to do.
- `SelfExpiringStorageContract`: storages whose backend expires sessions by itself.
- `RemoteStorageContract`: storages whose backend can be out of reach. It asks for a second fixture,
  `make_unreachable_storage`.

To pytest the tests are ordinary functions: each runs `anyio.run` on its own. So they work in plain
pytest, and beside pytest-asyncio or anyio's plugin in any mode. `backend = "trio"` in the subclass
runs them on trio. Objects that belong to an event loop (clients, connections) must be made inside
the factory, not in an async fixture, whose loop is another one.

Time is real by default: tests sleep for a few `unit`s, and look for what must still be there one
`tick` before its end. Both are a quarter of a second; a slow machine, or a backend that counts in
whole seconds, wants `unit = tick = 2.0`. A storage that takes a `Clock` is tested at once, and to
the millisecond:

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

This package needs pytest; nothing else in aiosessions does.
"""

import pytest

# Before the import: only then do failed asserts in there say what was compared.
pytest.register_assert_rewrite(
    *(
        f"{__name__}._{module}"
        for module in ("closing", "concurrency", "expiring", "kinds", "refusing", "storing")
    )
)

from ._clock import FakeClock  # noqa: E402
from ._harness import FakeTime, StorageFactory  # noqa: E402
from ._kinds import (  # noqa: E402
    RemoteStorageContract,
    SelfExpiringStorageContract,
    SharedStorageContract,
    StorageContract,
    SweptStorageContract,
)

__all__ = [
    "FakeClock",
    "FakeTime",
    "RemoteStorageContract",
    "SelfExpiringStorageContract",
    "SharedStorageContract",
    "StorageContract",
    "StorageFactory",
    "SweptStorageContract",
]
