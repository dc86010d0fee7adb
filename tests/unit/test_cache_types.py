"""The type of a cache, which mypy and pyright check: `nox -s types`."""

from typing import assert_type

import msgspec

from aiosessions import JsonCodec, LocalStorage, NearCache, SessionManager


class Upstream(msgspec.Struct):
    """Data of the application."""

    host: str


def test_a_cache_has_the_data_type_of_its_storage() -> None:
    """Else a type checker finds no mistakes in the data of sessions behind a cache."""
    cache = NearCache(LocalStorage(ttl=60, codec=JsonCodec(Upstream)), max_staleness=30)
    assert_type(cache, NearCache[Upstream])
    assert_type(SessionManager(cache), SessionManager[Upstream])
