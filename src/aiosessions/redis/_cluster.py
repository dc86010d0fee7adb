"""Sends each command to the master that has its key, in a cluster.

MOVED names the master of a slot for good. ASK names it for one command, which ASKING has to precede
(https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/).

Invariants:

- When the map names another master, commands that wait for the old one go to the new one.
- While the cluster is down, commands wait as they do in the outage of one server.
"""

import asyncio
from typing import Any, Final

from redis.crc import key_slot

from ..errors import StorageClosed, StorageUnavailable
from ._cluster_map import ClusterMap
from ._commands import CLUSTER_SLOTS, Command
from ._connection import Connection
from ._driver import Address, ConnectionFactory, host_and_port, node_connection_factory
from ._errors import ErrorReply, translate
from ._outage import Outage
from ._routing import Router

_PAUSE: Final = 0.05
# Error replies of a node while the cluster cannot serve a slot.
_REFUSALS: Final = frozenset({"CLUSTERDOWN", "TRYAGAIN"})


class RouteChanged(Exception):
    """The slot has another master, as a value."""


class ClusterRouter(Router):
    """The connections of one storage to the masters of a cluster."""

    def _reset(self) -> None:
        super()._reset()
        self._map = ClusterMap(self._client, self._ask_for_map, self._is_down, self._map_changed)
        self._down = Outage("the cluster")
        self._down_slot = -1
        self._last_deadline = 0.0  # of the callers

    async def call(self, command: Command) -> Any:
        """See `Router.call`."""
        self._last_deadline = command.deadline
        if not self._map.known:
            await self._map.discover(command.deadline)
            self._check_open()
        reply = await super().call(command)
        if self._down.active and key_slot(command.key) == self._down_slot:
            self._down.end(self._now())
        return reply

    def close(self) -> None:
        """See `Router.close`."""
        super().close()
        self._map.close()

    def _route(self, command: Command) -> Connection:
        address = self._map.master(command.key)
        if address is None:
            if not self._map.known:
                raise self._no_map()
            # Any node names the master of the slot, or says that the cluster is down.
            address = min(self._map.masters())
        return self._connection(address, command)

    async def _servers(self, deadline: float) -> list[Address]:
        await self._map.discover(deadline)
        self._check_open()
        if not self._map.known:
            raise self._no_map()
        return sorted(self._map.masters())

    async def _successor(
        self, attempt: Command, reply: Any, connection: Connection
    ) -> Connection | None:
        asked = connection.server
        code = reply.code if isinstance(reply, ErrorReply) else ""
        if code == "NOSCRIPT":
            return await super()._successor(attempt, reply, connection)
        if code in ("MOVED", "ASK"):
            address = self._named(reply, asked)
            if address is None:
                return None
            if code == "MOVED":
                self._map.moved(attempt.key, address)
                self.announcements.add(address)
            else:
                attempt.ask()
            return self._connection(address, attempt)
        if code in _REFUSALS:
            recovering = await self._wait_a_moment(reply, attempt)
            return self._route(attempt) if recovering else None
        if code or (attempt.in_doubt and not attempt.template.retryable):
            return None
        master = self._map.master(attempt.key)
        return self._connection(master, attempt) if master not in (None, asked) else None

    def _named(self, redirection: ErrorReply, asked: Address) -> Address | None:
        """The address in a MOVED or ASK; None if there is none."""
        host, _, port = redirection.text.partition(" ")[2].partition(" ")[2].rpartition(":")
        if not port.isascii() or not port.isdecimal():
            return None
        return self._map.address(host, int(port), asked)

    async def _wait_a_moment(self, reply: ErrorReply, command: Command) -> bool:
        """Pause while the cluster is down; return whether to send the command again."""
        now = self._now()
        if self._down.active:
            self._down.renew(now)
        self._down.begin(reply, now)
        self._down_slot = key_slot(command.key)
        if not self._down.lets_wait(now) or now + _PAUSE >= command.deadline:
            return False
        self._map.discover_soon()
        await asyncio.sleep(_PAUSE)
        return not self._closed

    async def _ask_for_map(self, address: Address) -> Any:
        # A quarter of the time, so that a node that hangs leaves time to ask others.
        deadline = self._now() + self._timeout / 4
        return await self._value(self._connection(address), CLUSTER_SLOTS, deadline)

    def _is_down(self, address: Address) -> bool:
        return any(each.outage.active for each in self._connections.get(address, ()))

    def _map_changed(self) -> None:
        """Leave the servers that are not masters any more."""
        masters = self._map.masters()
        if masters:
            self.announcements.follow(masters)
        for address in [each for each in self._connections if each not in masters]:
            connections = self._connections[address]
            for each in connections:
                each.pipeline.fail_queued(RouteChanged())
            if not any(each.pipeline.waiting for each in connections):
                del self._connections[address]
                for each in connections:
                    each.close(RouteChanged())

    def _on_outage(self) -> None:
        # A discovery that fails is an outage, too. It must not go on by itself when no calls come.
        if not self._closed and self._now() < self._last_deadline:
            self._map.discover_soon()

    def _factory(self, address: Address) -> ConnectionFactory:
        return node_connection_factory(self._client, *address)

    def _check_open(self) -> None:
        if self._closed:
            message = "the storage was closed"
            raise StorageClosed(message)

    def _no_map(self) -> StorageUnavailable:
        if self._map.problem is not None:
            address, reply = self._map.problem
            error = translate(reply, host_and_port(*address))
            if isinstance(error, StorageUnavailable):
                return error
        return StorageUnavailable("no node of the cluster serves any key")
