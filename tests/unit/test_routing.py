"""Retries and redirections: a router with a connection that answers as a test wants."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import ConnectionError as RedisConnectionError

from aiosessions import (
    RedisStorage,
    Session,
    StorageClosed,
    StorageUnavailable,
    When,
    new_session_id,
)
from aiosessions.redis._cluster import ClusterRouter
from aiosessions.redis._commands import Command, getex
from aiosessions.redis._errors import ErrorReply, connect_error
from aiosessions.redis._routing import Router
from tests.support.proxy import until
from tests.support.servers import Server

GETEX = getex(1_000)


class ScriptedRouter(Router):
    """A router, and the one connection to which it sends every command and every retry.

    Args:
        results: The results of the commands, in order. A `TimeoutError` also discards the command,
            as a pipeline does at its deadline.
    """

    address = "scripted:1"
    server = ("scripted", 1)

    def __init__(self, *results: Any) -> None:
        super().__init__(Redis(), 1.0, 1)
        self.results = list(results)
        self.sent: list[bytes] = []
        self.pipeline = self.outage = self

    def _route(self, _: Command) -> Any:
        return self

    async def _successor(self, _: Command, __: Any, ___: Any) -> Any:
        return self

    def send(self, command: Command) -> None:
        """See `Connection.send`."""
        self.sent.append(command.payload)
        command.future = asyncio.get_running_loop().create_future()
        result = self.results.pop(0)
        command.resolve(result)
        if isinstance(result, TimeoutError):
            command.payload = b""

    def discard(self, command: Command) -> None:
        """See `Pipeline.discard`."""


async def test_expired_command_is_not_sent_again() -> None:
    """Its payload is gone, so another attempt would write nothing and take a reply."""
    router = ScriptedRouter(TimeoutError(), b"another session")

    with pytest.raises(StorageUnavailable, match="in time"):
        await router.call(GETEX.fill(router.deadline(), b"key"))

    assert len(router.sent) == 1


async def test_retries_keep_the_payload_and_end() -> None:
    """A command that is redirected for ever is an error, and every attempt is the same."""
    router = ScriptedRouter(*[ErrorReply("MOVED 1 h:1")] * 100)

    with pytest.raises(StorageUnavailable, match="circles"):
        await router.call(GETEX.fill(router.deadline(), b"key"))

    assert 1 < len(router.sent) < 100
    assert len(set(router.sent)) == 1


def test_command_after_ask_is_sent_without_asking() -> None:
    """Only the attempt on the importing node is preceded by ASKING."""
    command = GETEX.fill(1.0, b"key")
    command.ask()

    again = command.again()

    assert (again.payload, again.extra_replies) == (GETEX.fill(1.0, b"key").payload, 0)


@pytest.mark.parametrize("text", ["MOVED 1", "ASK 1 nowhere", "MOVED 5 h:7x", "MOVED"])
def test_malformed_redirection_names_no_node(text: str) -> None:
    """So the command fails with a `StorageUnavailable`."""
    router = ClusterRouter(RedisCluster(host="127.0.0.1"), 1.0, 1)

    assert router._named(ErrorReply(text), ("127.0.0.1", 7000)) is None


def test_full_server_may_have_room_later() -> None:
    """So commands wait for it, as for a server that restarts."""
    error = connect_error(RedisConnectionError("max number of clients reached"), "h:1", tls=False)

    assert error.transient


async def test_closing_tells_which_writes_are_in_doubt(fragile: Server) -> None:
    """A write in flight may have been applied, a load changes nothing."""
    async with RedisStorage[Any].from_url(fragile.url, ttl=60) as storage:
        session = Session[Any](id=new_session_id())
        await storage.store(session)
        fragile.pause()
        verbs = [storage.store(session, when=When.UNCHANGED), storage.load(session.id)]
        tasks = [asyncio.create_task(verb) for verb in verbs]
        await until(lambda: storage.statistics().in_flight == len(tasks))
        await storage.aclose()
        errors = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(error) for error in errors] == [StorageClosed, StorageClosed]
    assert [getattr(error, "in_doubt", None) for error in errors] == [True, False]
