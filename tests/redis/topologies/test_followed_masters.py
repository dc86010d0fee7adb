"""Announcements in a cluster and with Sentinels: every master is followed, and its successor."""

import asyncio
from collections.abc import Callable

import pytest
from redis.asyncio.sentinel import Sentinel

from aiosessions import Session
from tests.support.clients import LONG, Storage, cluster_storage, id_on, slot_of, stored
from tests.support.listening import Listener
from tests.support.proxy import until
from tests.support.servers import Server
from tests.support.topologies import (
    SENTINEL_NAME,
    Cluster,
    Watched,
    ask,
    eventually,
    mended,
    offset,
    role,
)

CHANNEL = "session:changes"
Jump = Callable[[float], None]


def followed(servers: list[Server]) -> set[Server]:
    """The servers that have a subscription to the channel."""
    return {each for each in servers if ask(each, "PUBSUB", "NUMSUB", CHANNEL)[1]}


async def left(server: Server) -> None:
    """Wait until a server has no subscription any more."""
    await asyncio.to_thread(eventually, lambda: not followed([server]))


async def test_each_master_announces_each_change(replicated: Cluster) -> None:
    """All masters send each change; listeners hear a write once."""
    masters = replicated.masters()
    async with cluster_storage(replicated) as storage, cluster_storage(replicated) as writer:
        listener = Listener(storage)
        await storage.ping()
        await listener.until("resumed")
        assert followed(replicated.nodes) == set(masters)
        for master in masters:
            session = Session(id=id_on(replicated, master), principal="alice")
            await writer.store(session)
            await writer.revoke("alice", session.digest)
            written, deleted = (session.digest, session.revision), (session.digest, "")
            await until(lambda: listener.changes.count(deleted) == len(masters))  # noqa: B023
            assert listener.changes.count(written) == 1
    assert listener.states == ["resumed", "interrupted"]
    for master in masters:
        await left(master)


async def test_moved_slot_does_not_interrupt(nodes: Cluster) -> None:
    """Its new master was followed before."""
    async with cluster_storage(nodes, timeout=LONG) as storage:
        listener = Listener(storage)
        session = await stored(storage)
        await listener.until("resumed")
        slot = slot_of(session.id)
        nodes.move(slot, next(each for each in nodes.nodes if each is not nodes.owner(slot)))
        await storage.delete(session.id)
        await until(lambda: (session.digest, "") in listener.changes)
        assert listener.states == ["resumed"]


async def test_new_master_interrupts_until_it_is_followed(replicated: Cluster) -> None:
    """A planned failover cuts no connection; the map names the new master."""
    old, *others = replicated.masters()
    (new,) = replicated.replicas(old)
    async with cluster_storage(replicated, timeout=10 * LONG) as storage:
        listener = Listener(storage)
        session = Session(id=id_on(replicated, old))
        await storage.store(session)
        await listener.until("resumed")
        ask(new, "CLUSTER", "FAILOVER")
        await asyncio.to_thread(eventually, lambda: role(old) == "slave")
        assert listener.states == ["resumed"]
        await storage.store(session)
        await listener.until("resumed", "interrupted", "resumed")
        assert followed([new, *others]) == {new, *others}
        await left(old)


async def test_promoted_replica_is_followed(replicated: Cluster) -> None:
    """An idle process finds it: no verb is called."""
    master, *others = replicated.masters()
    (replica,) = replicated.replicas(master)
    async with cluster_storage(replicated, timeout=1.0) as storage:
        listener = Listener(storage)
        session = Session(id=id_on(replicated, master))
        await storage.store(session)
        await listener.until("resumed")
        await asyncio.to_thread(eventually, lambda: offset(replica) == offset(master))
        with mended(master):
            master.kill()
            await listener.until("resumed", "interrupted")
            await asyncio.to_thread(ask, replica, "CLUSTER", "FAILOVER", "TAKEOVER")
            await listener.until("interrupted", "resumed")
            live = [each for each in replicated.nodes if each is not master]
            assert followed(live) == {replica, *others}
            await storage.delete(session.id)
            await until(lambda: (session.digest, "") in listener.changes)


async def test_idle_process_asks_for_no_map(nodes: Cluster, jump: Jump) -> None:
    """Once every master is followed, no discovery follows another one."""
    async with cluster_storage(nodes, timeout=LONG) as storage:
        listener = Listener(storage)
        session = await stored(storage)
        await listener.until("resumed")
        nodes.ask_all("CONFIG", "RESETSTAT")
        for _ in range(30):
            jump(0.3)
            await storage.load(session.id)
        assert nodes.calls("cluster|slots")["calls"] <= 2
        assert listener.states == ["resumed"]


@pytest.mark.slow
async def test_master_of_sentinel_is_followed(sentinels: Watched) -> None:
    """After a failover, the subscription is on the new master."""
    old = sentinels.master()
    (new,) = (each for each in sentinels.servers if each is not old)
    places = [("127.0.0.1", port) for port in sentinels.ports]
    async with (
        Sentinel(places) as sentinel,  # type: ignore[no-untyped-call]
        sentinel.master_for(SENTINEL_NAME) as client,
        Storage(client, ttl=600, timeout=LONG) as storage,
    ):
        listener = Listener(storage)
        session = await stored(storage)
        await listener.until("resumed")
        words = "SENTINEL", "FAILOVER", SENTINEL_NAME
        # A Sentinel refuses while it has old news of the replica.
        await asyncio.to_thread(eventually, lambda: ask(sentinels.sentinels[0], *words))
        await asyncio.to_thread(eventually, lambda: sentinels.master() is new)
        await listener.until("interrupted", "resumed")
        await storage.ping()  # the connection for commands was lost, too
        await listener.until("resumed")
        assert followed([new]) == {new}
        await storage.delete(session.id)
        await until(lambda: (session.digest, "") in listener.changes)
