"""The operations of the scenario `principals`: sessions with a principal and without.

Each stored session belongs to a principal of its own. A new session belongs to one of 64 other
principals, which have `MOST` sessions each before the measurement.
"""

import asyncio
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final

from aiosessions import RedisStorage, Session, SessionManager

from .drivers import Operations, Way, ours_on_cluster, storage_of
from .workload import session, sessions

WITHOUT: Final = "no principal"
WITH: Final = "principal"
CHECKED: Final = "principal, checked or limited"
MOST: Final = 5
LISTS: Final = (1, 10, 100)
COUNT: Final = f"count of {LISTS[-1]}"
REVOKED: Final = 1_000
REVOKE_ALL: Final = f"revoke_all of {REVOKED:,}"
FILL: Final = "fill"
ON_CLUSTER: Final = "cluster+"
"""The beginning of the URL of a cluster."""

_TTL = 60.0  # longer than a round, and short because of the many new sessions


def list_of(size: int) -> str:
    """The name of an operation that lists some sessions. Their principal has the same name."""
    return f"list of {size}"


class _Client:
    """The operations on the sessions of one kind of owner."""

    def __init__(self, way: str, storage: RedisStorage[Any]) -> None:
        self._way = way
        self._storage = storage
        self._manager = SessionManager(storage, max_per_principal=MOST if way == CHECKED else None)
        self._template = session()
        self._stored: dict[str, Session[Any]] = {}
        self._creators = set[str]()

    def operations(self) -> Operations:
        """The operations by name."""
        found: Operations = {
            "prepare": self._prepare,
            "load": self._load_checked if self._way == CHECKED else self._manager.get,
            "save": lambda id: self._manager.save(self._stored[id]),
            "create": self._create,
            COUNT: self._count,
            FILL: lambda _: self._fill(REVOKE_ALL, REVOKED),
            REVOKE_ALL: self._revoke_all,
        }
        return found | {list_of(size): partial(self._list, size) for size in LISTS}

    def _owner(self, name: str) -> str | None:
        return None if self._way == WITHOUT else f"{self._way}: {name}"

    async def _prepare(self, id: str) -> None:
        if not self._stored and self._way == WITH:
            for size in LISTS:
                await self._fill(list_of(size), size)
        made = self._stored[id] = session(id=id)
        made.principal = self._owner(id[:8])
        await self._storage.store(made)
        if id[0] not in self._creators:
            self._creators.add(id[0])
            for _ in range(MOST):
                await self._create(id)

    async def _load_checked(self, id: str) -> None:
        await self._manager.get(id, principal=self._owner(id[:8]))

    async def _create(self, id: str) -> None:
        await self._manager.create(
            kind=self._template.kind,
            principal=self._owner(id[0]),
            metadata=self._template.metadata,
            data=self._template.data,
        )

    async def _fill(self, principal: str, size: int) -> None:
        """Store sessions of a principal, under the same ids every time."""
        name = principal.replace(" ", "-")
        made = sessions([f"{name}-{number}".ljust(43, "x") for number in range(size)])
        for each in made:
            each.principal = principal
        await asyncio.gather(*map(self._storage.store, made))

    async def _list(self, size: int, _: str) -> None:
        _check(len(await self._manager.list(list_of(size))), size)

    async def _count(self, _: str) -> None:
        _check(await self._manager.count(list_of(LISTS[-1])), LISTS[-1])

    async def _revoke_all(self, _: str) -> None:
        _check(await self._manager.revoke_all(REVOKE_ALL), REVOKED)


def _check(found: int, size: int) -> None:
    if found != size:
        raise RuntimeError(f"{found} sessions instead of {size}")


def connect(url: str) -> AbstractAsyncContextManager[RedisStorage[Any]]:
    """A storage on a server or, with `ON_CLUSTER`, on a cluster."""
    if url.startswith(ON_CLUSTER):
        return ours_on_cluster(url.removeprefix(ON_CLUSTER), _TTL)
    return storage_of(url, _TTL)


def _operations(way: str, storage: RedisStorage[Any]) -> Operations:
    return _Client(way, storage).operations()


OWNED: Final = {way: Way(connect, partial(_operations, way)) for way in (WITHOUT, WITH, CHECKED)}
"""By owner. `CHECKED` is `get(id, principal=...)`, and `create` with `max_per_principal`."""
