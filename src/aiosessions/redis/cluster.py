"""A cluster, as the storage sees it: one shared connection to each master, and a map of slots.

Follows https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/: a key's slot is
a CRC16 of the key or of its hash tag; MOVED says for good which node serves a slot, ASK says it for
one command, which ASKING has to precede.

Invariants:

- The map is our own. The client, which is borrowed, is asked for addresses and settings only.
- No more than one discovery of the map is under way, and callers wait for that one. A caller who is
  cancelled, or late, leaves it running for the others.
- However often a command is redirected, its deadline stays the same.
"""

import asyncio
import contextlib
import random
from typing import Any, Final

from redis.asyncio import RedisCluster
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, MovedError, ResponseError

from ..errors import SessionError, StorageClosed, StorageUnavailable
from . import wire
from .connect import node_maker
from .link import Link

Address = tuple[str, int]

_MAX_REDIRECTS: Final = 8
# MOVED corrects one slot; when a node has moved many, one discovery saves the other redirects.
_DISCOVERY_INTERVAL: Final = 1.0
_ASKING: Final = wire.command(b"ASKING")
_CLUSTER_SLOTS: Final = wire.command(b"CLUSTER", b"SLOTS")
_ARRAY: Final[frozenset[type]] = frozenset({list})


class Cluster:
    """The masters of a cluster: a `Server`."""

    def __init__(self, client: RedisCluster, timeout: float) -> None:
        self._client = client
        self._timeout = timeout
        self._links: dict[Address, Link] = {}
        self._masters: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._discovery: asyncio.Task[None] | None = None
        self._discovered_at = float("-inf")
        self._problem: Exception | None = None  # why the last discovery has found nothing
        self._closed = False

    async def call(
        self,
        key: bytes,
        payload: bytes,
        accepts: frozenset[type],
        deadline: float,
        *,
        repeatable: bool = False,
    ) -> tuple[Any, bool]:
        """See `Server.call`."""
        loop = asyncio.get_running_loop()
        slot = key_slot(key)
        if self._masters[slot] is None:
            await self._discover(deadline)
        address = self._masters[slot]
        reply: Any = self._problem or StorageUnavailable(
            "no reachable node of the cluster serves this key"
        )
        unsure = False
        asking = False
        for _ in range(_MAX_REDIRECTS):
            if self._closed:
                return StorageClosed("the storage was closed"), unsure
            if address is None:
                break
            command = self._link(address).send(
                _ASKING + payload if asking else payload,
                accepts,
                deadline,
                overdue=loop.time() + self._timeout,
                repeatable=repeatable,
                preludes=int(asking),
            )
            reply = await command.future
            unsure = unsure or command.unsure
            if type(reply) in accepts:
                break
            if not repeatable and command.tries and not isinstance(reply, ResponseError):
                break  # it may have been applied
            asking = isinstance(reply, AskError) and not isinstance(reply, MovedError)
            address = await self._next(reply, slot, address, deadline)
        return reply, unsure

    async def _next(
        self, reply: Exception, slot: int, asked: Address, deadline: float
    ) -> Address | None:
        """Where to send a command that got this error; None if nowhere."""
        if isinstance(reply, AskError):
            address = self._address(reply.host, reply.port, asked)
            if isinstance(reply, MovedError):
                self._masters[slot] = address
                self._discover_soon()
            return address
        if isinstance(reply, TimeoutError):
            self._discover_soon()  # too late for this command; others may have more luck
            return None
        if isinstance(reply, ResponseError | SessionError):
            return None
        # The node is gone. If another one has taken its place, the others know.
        await self._discover(deadline)
        successor = self._masters[slot]
        return successor if successor != asked else None

    async def call_each(
        self, payload: bytes, accepts: frozenset[type], deadline: float
    ) -> list[Any]:
        """See `Server.call_each`."""
        await self._discover(deadline)
        if self._closed:
            return [StorageClosed("the storage was closed")]
        masters = {address for address in self._masters if address}
        if not masters:
            unreachable = StorageUnavailable("no node of the cluster can be reached")
            return [self._problem or unreachable]
        commands = [
            self._link(master).send(payload, accepts, deadline, repeatable=True)
            for master in masters
        ]
        return [await command.future for command in commands]

    async def aclose(self) -> None:
        """See `Server.aclose`."""
        self._closed = True
        links, self._links = self._links, {}
        # All that has to be done is done before the first await, which may be cancelled.
        for link in links.values():
            link.close()
        if self._discovery is not None:
            self._discovery.cancel()
            await asyncio.wait([self._discovery])
        await asyncio.gather(*(link.aclose() for link in links.values()))

    def _link(self, address: Address) -> Link:
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = Link(node_maker(self._client, *address), self._timeout)
        return link

    def _discover_soon(self) -> None:
        """Have the map discovered if that was not done just now."""
        loop = asyncio.get_running_loop()
        idle = self._discovery is None or self._discovery.done()
        if idle and not self._closed and loop.time() - self._discovered_at >= _DISCOVERY_INTERVAL:
            self._discovery = loop.create_task(self._ask_nodes(), name="aiosessions: cluster map")

    async def _discover(self, deadline: float) -> None:
        """Wait for a discovery of the map, until the deadline."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        if self._discovery is None or self._discovery.done():
            self._discovery = loop.create_task(self._ask_nodes(), name="aiosessions: cluster map")
        await asyncio.wait([self._discovery], timeout=deadline - loop.time())

    async def _ask_nodes(self) -> None:
        """Ask one node after the other for the map, until one answers."""
        loop = asyncio.get_running_loop()
        known = list({*self._links, *(node for node in self._masters if node)})
        random.shuffle(known)  # so that replicas of a service do not all ask the same node
        startup = [(str(node.host), int(node.port)) for node in self._client.startup_nodes]
        problem: Exception | None = None
        for address in dict.fromkeys((*known, *startup)):
            deadline = loop.time() + self._timeout
            command = self._link(address).send(_CLUSTER_SLOTS, _ARRAY, deadline, repeatable=True)
            # A quarter of the time, so that a node that hangs leaves some to ask on.
            await asyncio.wait([command.future], timeout=self._timeout / 4)
            reply = command.future.result() if command.future.done() else None
            if isinstance(reply, Exception):
                problem = reply
                continue
            with contextlib.suppress(TypeError, ValueError, AttributeError):  # no map, or garbage
                self._masters = self._read_map(reply, address)
                self._discovered_at = loop.time()
                problem = None
                break
        self._problem = problem
        await self._retire()

    def _read_map(self, rows: Any, asked: Address) -> list[Address | None]:
        """The master of each slot, from a reply to CLUSTER SLOTS.

        Raises:
            TypeError, ValueError, AttributeError: That is not what the reply is.
        """
        if not rows:
            message = "no node serves any slot"
            raise ValueError(message)
        masters: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, (host, port, *_), *_ in rows:
            if not 0 <= first <= last < len(masters) or type(port) is not int:
                message = "there are no such slots, or no such port"
                raise ValueError(message)
            address = self._address(host.decode() if host else "", port, asked)
            masters[first : last + 1] = [address] * (last + 1 - first)
        return masters

    def _address(self, host: str, port: int, asked: Address) -> Address:
        """Where to reach a node, from what the node that was asked calls it."""
        # One that does not know a name means "where you reached me".
        name = host if host not in ("", "?") else asked[0]
        return self._client.nodes_manager.remap_host_port(name, port)

    async def _retire(self) -> None:
        """Close what is connected to no master, once nothing is under way there."""
        masters = set(self._masters)
        for address in [each for each in self._links if each not in masters]:
            if self._links[address].idle:
                await self._links.pop(address).aclose()
