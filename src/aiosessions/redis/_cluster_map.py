"""The map of a cluster: which master serves each slot.

Follows https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/: the slot of a
key is a CRC16 of the key or of its hash tag.

Invariants:

- The map is our own. The borrowed client only tells addresses and settings.
- At most one discovery runs at a time, and at most four begin in a second, however many commands
  fail. A caller that is cancelled or runs out of time leaves the discovery to the others.
"""

import asyncio
import contextlib
import contextvars
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from redis.asyncio import RedisCluster
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from ._driver import Address

_INTERVAL: Final = 0.25


class ClusterMap:
    """The masters of a cluster by slot.

    Args:
        client: The client, for its start-up nodes and its address mapping.
        ask: Asks a node for CLUSTER SLOTS. Returns the reply, or an exception in its place.
        is_down: Whether a node is known not to answer. Such nodes are asked last.
        on_change: Called after each discovery.
    """

    def __init__(
        self,
        client: RedisCluster,
        ask: Callable[[Address], Awaitable[Any]],
        is_down: Callable[[Address], bool],
        on_change: Callable[[], None],
    ) -> None:
        self._client = client
        self._ask = ask
        self._is_down = is_down
        self._on_change = on_change
        self._masters: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._discovery: asyncio.Task[None] | None = None
        self._next_discovery = 0.0
        self.known = False
        """Whether a map was ever found."""
        self.problem: tuple[Address, Exception] | None = None
        """Why the last discovery found no map, and which node said so; None if it found one."""

    def master(self, key: bytes) -> Address | None:
        """The master of a key, as far as the map knows."""
        return self._masters[key_slot(key)]

    def masters(self) -> set[Address]:
        """All masters."""
        return {each for each in self._masters if each is not None}

    def moved(self, key: bytes, address: Address) -> None:
        """Note that a node has named the new master of a key's slot."""
        self._masters[key_slot(key)] = address
        self.discover_soon()

    def address(self, host: str, port: int, asked: Address) -> Address:
        """The address of a node under the name that another node gave it."""
        # A node that does not know a name means the address at which it was asked.
        name = host if host not in ("", "?") else asked[0]
        return self._client.nodes_manager.remap_host_port(name, port)

    def discover_soon(self) -> None:
        """Start a discovery, unless one runs or has just begun."""
        loop = asyncio.get_running_loop()
        if self._discovery is None and loop.time() >= self._next_discovery:
            self._next_discovery = loop.time() + _INTERVAL
            task = loop.create_task(
                self._discover(), name="aiosessions: cluster map", context=contextvars.Context()
            )
            if not task.done():
                self._discovery = task
                task.add_done_callback(self._ended)

    async def discover(self, deadline: float) -> None:
        """Wait for a discovery, until the deadline."""
        loop = asyncio.get_running_loop()
        if self._discovery is None:
            pause = min(self._next_discovery, deadline) - loop.time()
            if pause > 0:
                await asyncio.sleep(pause)
            self.discover_soon()
        if self._discovery is not None:
            await asyncio.wait([self._discovery], timeout=max(0.0, deadline - loop.time()))

    def close(self) -> None:
        """Stop a discovery that runs."""
        if self._discovery is not None:
            self._discovery.cancel()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._discovery = None
        if not task.cancelled():
            task.result()
            self._on_change()

    async def _discover(self) -> None:
        """Ask one node after the other, until one answers with a map."""
        known = list(self.masters())
        random.shuffle(known)  # so that the replicas of a service do not all ask the same node
        startup = [(str(node.host), int(node.port)) for node in self._client.startup_nodes]
        problem: tuple[Address, Exception] | None = None
        for address in sorted(dict.fromkeys((*known, *startup)), key=self._is_down):
            reply = await self._ask(address)
            if isinstance(reply, Exception):
                problem = problem or (address, reply)
                continue
            with contextlib.suppress(TypeError, ValueError, AttributeError):  # not a map
                self._masters = self._read(reply, address)
                self.known, problem = True, None
                break
        self.problem = problem

    def _read(self, rows: Iterable[Any], asked: Address) -> list[Address | None]:
        """Read a reply to CLUSTER SLOTS.

        Raises:
            TypeError, ValueError, AttributeError: The reply is not a map.
        """
        masters: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, (host, port, *_), *_ in rows:
            if not 0 <= first <= last < len(masters) or type(port) is not int:
                message = "a slot or a port is out of range"
                raise ValueError(message)
            address = self.address(host.decode() if host else "", port, asked)
            masters[first : last + 1] = [address] * (last + 1 - first)
        if not any(masters):
            message = "no slot has a master"
            raise ValueError(message)
        return masters
