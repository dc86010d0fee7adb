"""The nemesis: it breaks servers under load, and mends them. `scenarios` lists the faults."""

import asyncio
import math
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from redis.crc import key_slot

from tests.support.proxy import Exchange, Fault, FaultProxy, cut, reset, truncate
from tests.support.servers import Server, binaries, running
from tests.support.topologies import (
    Cluster,
    ask,
    asking,
    cluster,
    eventually,
    move_keys,
    role,
    watched,
)

from .client import USER, Endpoint
from .run import Run, stored

WRONG_PASSWORD = "the server refuses the user name or password"

_VALKEY = binaries()["valkey"]
_LONG = 5.0  # a timeout that does not matter
SHORT_TIMEOUT = 0.5  # a timeout that passes
_PER_MESSAGE = 0.02  # the probability that a command or a reply is lost

Nemesis = Callable[[Server], AbstractContextManager[object]]
Happen = Callable[[Run], Awaitable[None]]


def _between(
    breaks: Callable[[Server], Any], mends: Callable[[Server], Any] = lambda _: None
) -> Nemesis:
    @contextmanager
    def nemesis(server: Server) -> Iterator[None]:
        breaks(server)
        yield
        mends(server)

    return nemesis


def _sends(*command: str | int) -> Callable[[Server], Any]:
    return lambda server: ask(server, *command)


stopped = _between(Server.stop, Server.start)
killed = _between(Server.kill, Server.start)
hanging = _between(Server.pause, Server.resume)
disconnected = _between(_sends("CLIENT", "KILL", "TYPE", "normal"))
unsubscribed = _between(_sends("CLIENT", "KILL", "TYPE", "pubsub"))
# By default a server evicts nothing.
out_of_memory = _between(
    _sends("CONFIG", "SET", "maxmemory", 1), _sends("CONFIG", "SET", "maxmemory", 0)
)
# Nothing listens on port 1.
demoted = _between(_sends("REPLICAOF", "127.0.0.1", 1), _sends("REPLICAOF", "NO", "ONE"))


@asynccontextmanager
async def _server(
    run: Run, *options: str, timeout: float = _LONG, **settings: Any
) -> AsyncIterator[Server]:
    """A server under load."""
    with running(_VALKEY, *options) as server:
        endpoint = Endpoint(url=server.url)
        async with run.load(endpoint, lambda: [server], timeout=timeout, **settings):
            yield server


def on_server(
    nemesis: Nemesis,
    lasts: float,
    *options: str,
    varies: float = 0.0,
    often: int = 1,
    **settings: Any,
) -> Happen:
    """Break a server in each round, for some seconds and a random part of some more."""
    rng = random.Random(2)  # noqa: S311 - not for secrets

    async def happen(run: Run) -> None:
        async with _server(run, *options, **settings) as server:
            async for _ in run.rounds():
                for _ in range(often):
                    with nemesis(server):
                        await asyncio.sleep(lasts + rng.uniform(0, varies))

    return happen


async def clock_step(run: Run) -> None:
    """Set the clock of one process two days ahead, then two hours back, then right.

    Two days ahead, every session is past its deadline by that clock.
    """
    span = run.form.span
    steps = [(span, 172_800.0), (2 * span, -7_200.0), (3 * span, 0.0)]
    async with _server(run, steps=steps):
        await run.wait()
        run.broken()
        run.mended()  # nothing is broken
        await run.wait()


@asynccontextmanager
async def _proxy(run: Run, timeout: float, **settings: Any) -> AsyncIterator[FaultProxy]:
    """A proxy under load, and its server."""
    with running(_VALKEY) as server:
        async with (
            FaultProxy(server.port) as proxy,
            run.load(Endpoint(url=proxy.url), lambda: [server], timeout=timeout, **settings),
        ):
            yield proxy


async def resets(run: Run) -> None:
    """Reset and close connections, at any point of a command or a reply."""
    rng = random.Random(1)  # noqa: S311 - not for secrets

    def sometimes(*faults: Fault) -> Fault:
        async def fault(exchange: Exchange) -> bytes:
            if rng.random() < _PER_MESSAGE:
                return await rng.choice(faults)(exchange)
            return exchange.message

        return fault

    async with _proxy(run, _LONG) as proxy:
        async for _ in run.rounds():
            proxy.on_request("*", sometimes(cut, reset), times=math.inf)
            proxy.on_reply("*", sometimes(cut, reset, truncate), times=math.inf)
            await run.wait()
            proxy.forgive()


async def half_open(run: Run) -> None:
    """Silence connections, as a firewall does that forgets them.

    New connections work. So the fault ends when it begins, and a timeout detects it.
    """
    async with _proxy(run, SHORT_TIMEOUT) as proxy:
        for number in range(run.form.rounds):
            forgotten = [*proxy.tunnels]

            async def silence(exchange: Exchange, forgotten: Any = forgotten) -> bytes:
                return b"" if exchange.tunnel in forgotten else exchange.message

            run.broken()
            # The first time, requests arrive at the server, and no reply comes back.
            (proxy.on_request if number else proxy.on_reply)("*", silence, times=math.inf)
            run.mended()
            await asyncio.sleep(SHORT_TIMEOUT)
            await run.wait()
            proxy.forgive()


async def partition(run: Run, **settings: Any) -> None:
    """Drop all announcements, new subscriptions included; in each second round, stall everything.

    A subscription counts as lost after a timeout of silence.
    """

    async def silence(exchange: Exchange) -> bytes:
        exchange.tunnel.silent = True
        return exchange.message

    async with _proxy(run, SHORT_TIMEOUT, **settings) as proxy:
        async for number in run.rounds():
            if number % 2:
                proxy.stall()
            else:
                proxy.on_request("SUBSCRIBE", silence, times=math.inf)
                for tunnel in proxy.tunnels:
                    tunnel.silent = tunnel.subscribed
            await asyncio.sleep(1.5 * SHORT_TIMEOUT)
            proxy.forgive()
            proxy.resume()


async def password(run: Run) -> None:
    """Rotate a password: with an overlap, as it should be, and then without."""
    secrets = [f"fault-suite-password-{number}" for number in range(3)]
    with running(_VALKEY) as server, tempfile.NamedTemporaryFile("w") as file:

        def configure(secret: str) -> None:
            Path(file.name).write_text(secret, "utf-8")

        def allow(*rules: str) -> None:
            rights = "~session:*", "&session:changes", "+@all"
            ask(server, "ACL", "SETUSER", USER, "on", *rights, *rules)

        def disconnect() -> None:
            # Connections outlive a change of the password.
            ask(server, "CLIENT", "KILL", "USER", USER)

        allow(f">{secrets[0]}")
        configure(secrets[0])
        endpoint = Endpoint(url=server.url, password_file=file.name)
        async with run.load(endpoint, lambda: [server], timeout=_LONG, secrets=secrets):
            with run.forbidding(WRONG_PASSWORD):
                allow(f">{secrets[1]}")
                disconnect()  # new connections use the old password
                await run.wait(0.5)
                configure(secrets[1])
                disconnect()
                await run.wait(0.5)
                allow(f"<{secrets[0]}")
                run.broken()
                disconnect()
                run.mended()
                await run.wait()
            run.broken()
            allow("resetpass", f">{secrets[2]}")
            disconnect()
            await run.wait()
            configure(secrets[2])
            run.mended()
            await run.wait()


def fail_over(*precaution: str, **settings: Any) -> Happen:
    """Kill a master that has just lost its replica, which Sentinels then promote."""

    async def happen(run: Run) -> None:
        with watched(_VALKEY) as servers:
            master = servers.master()
            (replica,) = (server for server in servers.servers if server is not master)
            if precaution:
                ask(master, "CONFIG", "SET", *precaution)
            endpoint = Endpoint(sentinels=servers.ports)
            load = run.load(endpoint, lambda: [servers.master()], timeout=_LONG, **settings)
            async with load:
                run.broken()
                # The replica cannot return, so the master accepts writes that it never replicates.
                replica.pause()
                ask(master, "CLIENT", "KILL", "TYPE", "replica")
                await asyncio.sleep(0.2)  # less than Sentinels need to notice it
                master.kill()
                replica.resume()
                await _promoted(run, replica)

    return happen


async def cluster_death(run: Run, **settings: Any) -> None:
    """Kill a master of a cluster, which its replica replaces."""
    with cluster(_VALKEY, masters=3, replicas=1) as nodes:
        master = nodes.masters()[0]
        (replica,) = nodes.replicas(master)
        endpoint = Endpoint(nodes=[node.port for node in nodes.nodes])
        async with run.load(endpoint, nodes.masters, timeout=_LONG, **settings):
            run.broken()
            master.kill()
            await _promoted(run, replica)


async def _promoted(run: Run, replica: Server) -> None:
    """Wait until the replica of a master that has just died is the master."""

    def is_alone() -> bool:
        info = _info(replica, "replication")
        return bool(info["role"] == "master" or info["master_link_status"] == "down")

    eventually(is_alone)
    run.replicated = stored([replica])
    eventually(lambda: role(replica) == "master")
    run.mended()
    await run.wait(2)


def _info(server: Server, section: str) -> Any:
    with asking(server) as client:
        return client.info(section)


async def cluster_migration(run: Run) -> None:
    """Move slots that are in use from master to master."""
    with cluster(_VALKEY, masters=3) as nodes:
        endpoint = Endpoint(nodes=[node.port for node in nodes.nodes])
        async with run.load(endpoint, nodes.masters, timeout=_LONG):
            async for _ in run.rounds():
                for key in run.keys:
                    _move_slot(nodes, key)
            statistics = [_info(master, "errorstats") for master in nodes.masters()]
            if not any("errorstat_ASK" in each for each in statistics):
                run.problems.append("no command was redirected by ASK")


def _move_slot(nodes: Cluster, key: str) -> None:
    """Move the slot of a key to the next master, slowly enough for redirections by ASK."""
    slot, masters = key_slot(key.encode()), nodes.masters()
    target = masters[(masters.index(nodes.owner(slot)) + 1) % len(masters)]
    with nodes.moving(slot, target) as source:
        move_keys([key], source, target)
        time.sleep(0.05)
