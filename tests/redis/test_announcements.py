"""Announcements of changes: the messages of the scripts, and the listeners in every failure.

`proxy` is in front of the server of `storage`; `other` is a storage without the proxy.
"""

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import fakeredis
import pytest
import redis

from aiosessions import Session, SessionManager, When, new_session_id
from aiosessions.redis._announcements import Announcements
from aiosessions.redis._subscription import Follower, Socket
from tests.support.clients import LONG, Storage, our_tasks, outcome, storage_at, stored, turns
from tests.support.listening import Listener
from tests.support.loops import LOOPS
from tests.support.proxy import Exchange, FaultProxy, cut, swallow, until
from tests.support.servers import Server
from tests.support.topologies import ask, eventually

CHANNEL = "session:changes"
PAST = datetime(2020, 1, 1, tzinfo=UTC)

each_protocol = pytest.mark.parametrize("protocol", [2, 3])


def subscribers(server: Server) -> int:
    """The number of subscriptions to the channel on a server."""
    return int(ask(server, "PUBSUB", "NUMSUB", CHANNEL)[1])


# Writes.

Write = Callable[[Storage, Session[Any]], Awaitable[object]]


def store(when: When, **changes: Any) -> Write:
    """A store of the session after some changes."""

    async def write(storage: Storage, session: Session[Any]) -> None:
        for name, value in changes.items():
            setattr(session, name, value)
        await storage.store(session, when=when)

    return write


async def revoke(storage: Storage, session: Session[Any]) -> None:
    """Revoke the session."""
    assert await storage.revoke(session.principal or "", session.digest)


async def trim(storage: Storage, session: Session[Any]) -> None:
    """Trim to a younger session, so that the session is deleted."""
    keep = Session[Any](id=new_session_id(), principal=session.principal)
    await storage.store(keep, when=When.ABSENT)
    assert await storage.trim(session.principal or "", 1, keep=keep.id) == 1


WRITES: dict[str, Write] = {
    "store-always": store(When.ALWAYS),
    "store-present": store(When.PRESENT),
    "store-unchanged": store(When.UNCHANGED),
    "store-expired": store(When.ALWAYS, expires_at=PAST),
    "store-expired-unchanged": store(When.UNCHANGED, expires_at=PAST),
    "rotate": lambda storage, session: SessionManager(storage).rotate(session),
    "rotate-at-once": lambda storage, session: SessionManager(storage, grace=0).rotate(session),
    "delete": lambda storage, session: storage.delete(session.id),
}
OWNED: dict[str, Write] = WRITES | {
    "revoke": revoke,
    "revoke_all": lambda storage, session: storage.revoke_all(session.principal or ""),
    "trim": trim,
}
SILENT: dict[str, Write] = {
    "load": lambda storage, session: storage.load(session.id),
    "delete-absent": lambda storage, _: storage.delete("absent"),
    "create-refused": lambda storage, session: outcome(
        storage.store(Session(id=session.id), when=When.ABSENT)
    ),
}


async def heard_during(
    server: Server, write: Callable[[], Awaitable[object]]
) -> list[tuple[str, str]]:
    """The messages on all channels during a write, each with its channel."""
    with server.client() as client, client.pubsub() as all_channels:
        all_channels.psubscribe("*")
        await write()
        client.publish("end", "")
        found: list[tuple[str, str]] = []
        for message in all_channels.listen():
            if message["channel"] == b"end":
                return found
            if message["type"] == "pmessage":
                found.append((message["channel"].decode(), message["data"].decode()))
    raise AssertionError  # the iterator does not end


@pytest.mark.parametrize(
    ("principal", "write"),
    [(None, each) for each in WRITES.values()] + [("alice", each) for each in OWNED.values()],
    ids=[*WRITES, *(f"{name}-owned" for name in OWNED)],
)
async def test_write_announces_digest_and_revision(
    server: Server, observer: "redis.Redis", principal: str | None, write: Write
) -> None:
    """The message is on the channel, has the revision on the server, and nothing else."""
    async with storage_at(server.url) as storage:
        session = await stored(storage, principal=principal, data="payload")

        found = await heard_during(server, lambda: write(storage, session))

    revision: Any = observer.getrange(f"session:{session.digest}", 1, 16)
    own = [message for message in found if message[1][:32] == session.digest]
    assert own[-1:] == [(CHANNEL, session.digest + revision.decode())]
    assert all(re.fullmatch("[0-9a-f]{32}(.{16})?", text) for _, text in found)


@pytest.mark.parametrize("write", SILENT.values(), ids=SILENT)
async def test_call_without_a_change_announces_nothing(server: Server, write: Write) -> None:
    """A load renews only, and ids that never existed must not reach every process."""
    async with storage_at(server.url) as storage:
        session = await stored(storage)

        assert await heard_during(server, lambda: write(storage, session)) == []


@pytest.mark.parametrize("principal", [None, "alice"])
async def test_creation_is_announced(server: Server, principal: str | None) -> None:
    """So a user without the right to publish cannot create a session and then not delete it."""
    async with storage_at(server.url, key_prefix="web:") as storage:
        session = Session[Any](id=new_session_id(), principal=principal)

        found = await heard_during(server, lambda: storage.store(session, when=When.ABSENT))

    assert found == [("web:changes", session.digest + session.revision)]


# Listeners.


@each_protocol
@pytest.mark.every_loop
async def test_listener_hears_changes_of_other_processes(server: Server, protocol: int) -> None:
    """A change is heard by each listener, until it stops listening."""
    async with storage_at(f"{server.url}?protocol={protocol}") as storage:
        first, last = Listener(storage), Listener(storage)
        await storage.ping()
        await last.until("resumed")
        async with storage_at(server.url) as writer:
            session = await stored(writer)
            await until(lambda: last.changes)
            assert first.changes == last.changes == [(session.digest, session.revision)]
            first.stop()
            first.stop()
            await writer.delete(session.id)
            await until(lambda: len(last.changes) == 2)

    assert last.changes[1:] == [(session.digest, "")]
    assert len(first.changes) == 1
    assert (first.states, last.states) == (["resumed"], ["resumed", "interrupted"])


async def test_late_listener_hears_the_state_at_once(storage: Storage) -> None:
    """It need not wait for the next change of the state."""
    await Listener(storage).until("resumed")

    assert Listener(storage).states == ["resumed"]


async def test_failing_listener_disturbs_no_other(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error is logged, and the subscription goes on."""

    class Failing(Listener):
        def changed(self, *_: str) -> None:
            raise ZeroDivisionError

    Failing(storage)
    listener = Listener(storage)
    await listener.until("resumed")
    for _ in range(2):
        await stored(storage)
    await until(lambda: len(listener.changes) == 2)

    assert listener.states == ["resumed"]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == (
        [ZeroDivisionError] * 2
    )


async def test_subscription_ends_with_the_last_listener(
    proxy: FaultProxy, storage: Storage, valkey: Server
) -> None:
    """Without a listener there is one connection; with another one, the subscription returns."""
    await storage.ping()
    assert (proxy.counts.connections, proxy.counts.requests["SUBSCRIBE"]) == (1, 0)
    for _ in range(2):
        listener = Listener(storage)
        await listener.until("resumed")
        assert subscribers(valkey) == 1
        listener.stop()
        await until(lambda: not our_subscriptions())
        await asyncio.to_thread(eventually, lambda: subscribers(valkey) == 0)


def our_subscriptions() -> list[str]:
    """The names of the tasks for announcements."""
    return [name for name in our_tasks() if name != "aiosessions: connection"]


async def test_fakeredis_announces_too() -> None:
    """Applications use fakeredis in their tests."""
    async with fakeredis.FakeAsyncRedis() as client, Storage(client, ttl=60) as storage:
        listener = Listener(storage)
        session = await stored(storage)
        await listener.until("resumed")
        await storage.delete(session.id)
        await until(lambda: (session.digest, "") in listener.changes)


# Interruptions.


@pytest.mark.every_loop
async def test_lost_subscription_interrupts_before_a_later_load(server: Server) -> None:
    """A listener knows before a load that begins after the server has closed the connection."""
    async with storage_at(server.url) as storage:
        listener = Listener(storage)
        session = await stored(storage)
        await listener.until("resumed")
        ask(server, "CLIENT", "KILL", "TYPE", "pubsub")
        eventually(lambda: subscribers(server) == 0)  # while the event loop is blocked
        await storage.load(session.id)
        assert listener.states[1:2] == ["interrupted"]
        await listener.until("interrupted", "resumed")
        await storage.delete(session.id)
        await until(lambda: (session.digest, "") in listener.changes)


@pytest.mark.every_loop
async def test_restart_interrupts(fragile: Server, caplog: pytest.LogCaptureFixture) -> None:
    """An absent server interrupts, also at first; the log says so once for each loss."""
    caplog.set_level(logging.DEBUG, "aiosessions")
    fragile.kill()
    async with storage_at(fragile.url, timeout=0.5) as storage:
        listener = Listener(storage)
        storage_is_used = asyncio.create_task(storage.ping())
        for _ in range(2):
            await listener.until("interrupted")
            await asyncio.to_thread(fragile.start)
            await listener.until("resumed")
            fragile.kill()
        await listener.until("interrupted")
        await asyncio.wait([storage_is_used])
        storage_is_used.exception()

    assert listener.states == ["interrupted", "resumed"] * 2 + ["interrupted"]
    log = [each for each in caplog.messages if each.startswith("no announcements of")]
    assert len(log) == 3
    assert log[0].endswith(f"127.0.0.1:{fragile.port}: cannot connect: Connection refused")


async def test_silent_server_interrupts(proxy: FaultProxy) -> None:
    """A server that answers no PING may have lost the subscription, as after a partition."""
    async with storage_at(proxy.url, timeout=0.2) as storage:
        listener = Listener(storage)
        await storage.ping()
        await listener.until("resumed")
        silence = proxy.on_request("PING", swallow, times=math.inf)
        await listener.until("resumed", "interrupted")
        assert silence.hits > 0
        proxy.forgive()
        await listener.until("resumed")


GARBAGE = {
    "no-protocol": b"!?\r\n",
    "error": b"-ERR no\r\n",
    "no-digest": b"*3\r\n$7\r\nmessage\r\n$15\r\nsession:changes\r\n$3\r\nabc\r\n",
    "number": b"*3\r\n$7\r\nmessage\r\n$15\r\nsession:changes\r\n:1\r\n",
    "unsubscribed": b"*3\r\n$11\r\nunsubscribe\r\n$15\r\nsession:changes\r\n:0\r\n",
    "no-text": b"*3\r\n$7\r\nmessage\r\n$15\r\nsession:changes\r\n$32\r\n" + b"\xff" * 32 + b"\r\n",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_corrupted_stream_interrupts(proxy: FaultProxy, garbage: bytes) -> None:
    """A message that makes no sense may have been an announcement."""
    exchanges: list[Exchange] = []

    async def remember(exchange: Exchange) -> bytes:
        exchanges.append(exchange)
        return exchange.message

    proxy.on_request("SUBSCRIBE", remember, times=math.inf)
    async with storage_at(proxy.url) as storage:
        listener = Listener(storage)
        await storage.ping()
        await listener.until("resumed")
        exchanges[0].tunnel.say(garbage)
        await listener.until("resumed", "interrupted", "resumed")

    assert listener.changes == []
    assert len(exchanges) == 2


async def test_new_connection_for_commands_renews_the_subscription(
    proxy: FaultProxy, storage: Storage
) -> None:
    """The address may name another server by now, and the old one may not know of changes."""
    listener = Listener(storage)
    session = await stored(storage)
    await listener.until("resumed")
    proxy.on_request("GETEX", cut)

    await storage.load(session.id)

    assert listener.states[1:2] == ["interrupted"]
    await listener.until("interrupted", "resumed")


# The end.


@pytest.mark.every_loop
async def test_aclose_leaves_nothing_behind(
    valkey: Server, new_connections: Callable[[], set[str]]
) -> None:
    """No task and no connection remains, wherever the subscription was; listeners know."""
    before = asyncio.all_tasks()
    for number in (*range(0, 40, 4), None):
        storage = storage_at(valkey.url)
        listener = Listener(storage)
        calling = asyncio.ensure_future(storage.ping())
        await (turns(number) if number is not None else listener.until("resumed"))
        await storage.aclose()
        assert listener.states[-1:] != ["resumed"]
        await asyncio.wait([calling])
        calling.exception()
        assert asyncio.all_tasks() == before
        assert Listener(storage).states == listener.states[-1:]
    await asyncio.to_thread(eventually, lambda: not new_connections())


@pytest.mark.every_loop
async def test_cancelled_tasks_begin_again(valkey: Server) -> None:
    """An application may cancel every task that it finds."""
    async with storage_at(valkey.url, timeout=0.4) as storage:
        listener = Listener(storage)
        await storage.ping()
        await listener.until("resumed")
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            if task.get_name() in our_subscriptions():
                task.cancel()
        await listener.until("resumed", "interrupted", "resumed")
        assert subscribers(valkey) <= 2  # the server may still have the old one

    assert our_tasks() == []


@pytest.mark.parametrize("name", LOOPS)
def test_second_event_loop_subscribes_anew(valkey: Server, name: str) -> None:
    """A listener is interrupted when the first event loop ends."""
    storage = storage_at(valkey.url)
    listener = Listener(storage)

    async def use() -> None:
        await storage.ping()
        await listener.until("resumed")

    for states in (["resumed"], ["resumed", "interrupted", "resumed"]):
        with asyncio.Runner(loop_factory=LOOPS[name]) as runner:
            runner.run(use())
            assert listener.states == states
        assert listener.states == [*states, "interrupted"]
    asyncio.run(storage.aclose())


async def test_forgotten_storage_ends_its_subscription(valkey: Server) -> None:
    """A storage that is not closed warns, and leaves no task behind."""

    async def forget() -> None:
        storage = storage_at(valkey.url)
        await storage.delete_expired()  # without a connection for commands
        await Listener(storage).until("resumed")

    with pytest.warns(ResourceWarning, match="was not closed"):
        await forget()

    await until(lambda: not our_tasks())


@pytest.mark.parametrize("name", LOOPS)
def test_listener_may_stop_after_its_loop_was_closed(valkey: Server, name: str) -> None:
    """It stops without an error, as a cache does that is closed late."""
    storage = storage_at(valkey.url)
    listener = Listener(storage)

    async def use() -> None:
        await storage.ping()
        await listener.until("resumed")

    with asyncio.Runner(loop_factory=LOOPS[name]) as runner:
        runner.run(use())
    listener.stop()

    asyncio.run(storage.aclose())


@pytest.mark.every_loop
async def test_cancelled_caller_does_not_end_the_subscription(proxy: FaultProxy) -> None:
    """The first verb starts the tasks, which are not its own."""
    async with storage_at(proxy.url, timeout=LONG) as storage:
        listener = Listener(storage)
        calling = asyncio.ensure_future(storage.ping())
        await turns(1)
        calling.cancel()
        await listener.until("resumed")


async def test_messages_are_no_sign_of_life() -> None:
    """The buffer of a server may hold seconds of them, so only the answer to PING counts."""
    owner = Announcements(b"c", 1, no_servers, lambda _: None)  # type: ignore[arg-type, return-value]
    socket = Socket(Follower(owner, lambda: None, b"c", 1))  # type: ignore[arg-type, return-value]
    socket.reply_received([b"subscribe", b"c", 1])
    socket.silent = True

    socket.reply_received([b"message", b"c", b"0" * 32])
    assert socket.silent
    socket.reply_received([b"pong", b""])
    assert not socket.silent


async def no_servers(_: float) -> list[Any]:
    """Find no server."""
    return []
