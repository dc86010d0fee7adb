"""The server, as the storage sees it: something that a command is sent to for a key.

Errors are values here: `call` returns the reply, or the exception that stands in its place. One
future then serves both, callers who are gone leave no exception behind that "was never retrieved",
and the storage translates in one place.
"""

from typing import Any, Protocol

from .connect import MakeConnection
from .link import Link


class Server(Protocol):
    """A server, or a cluster of them, as the storage sees it."""

    async def call(
        self,
        key: bytes,
        payload: bytes,
        accepts: frozenset[type],
        deadline: float,
        *,
        repeatable: bool = False,
    ) -> tuple[Any, bool]:
        """Send a packed command to wherever its key lives.

        Args:
            key: The key, for where it lives.
            payload: The command.
            accepts: The types that the reply can have.
            deadline: When to give up, on the event loop's clock.
            repeatable: The command may be applied twice. One that is not is never sent again
                after it may have been applied: the exception then says that a connection was lost.

        Returns:
            The reply, or an exception; and whether the command may have been applied without a
            reply: before this one, or at all.
        """
        ...

    async def call_each(
        self, payload: bytes, accepts: frozenset[type], deadline: float
    ) -> list[Any]:
        """Send a packed command to every server that sessions live on.

        Returns:
            A reply, or an exception, from each.
        """
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...


class SingleServer:
    """One server, or whichever server Sentinel calls the master: one connection."""

    def __init__(self, make_connection: MakeConnection, timeout: float) -> None:
        self._make_connection = make_connection
        self._timeout = timeout
        self._link: Link | None = None

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
        del key  # there is only one place for it
        link = self._link
        if link is None:
            link = self._link = Link(self._make_connection, self._timeout)
        command = link.send(payload, accepts, deadline, repeatable=repeatable)
        return await command.future, command.unsure

    async def call_each(
        self, payload: bytes, accepts: frozenset[type], deadline: float
    ) -> list[Any]:
        """See `Server.call_each`."""
        reply, _ = await self.call(b"", payload, accepts, deadline, repeatable=True)
        return [reply]

    async def aclose(self) -> None:
        """See `Server.aclose`."""
        if self._link is not None:
            await self._link.aclose()
