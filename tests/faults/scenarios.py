"""The faults: one function for each breaks something and mends it.

Each scenario starts its servers, which end with it.
"""

import asyncio
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.clients import slot_of
from tests.support.proxy import Exchange, Fault, FaultProxy, Tunnel, cut, reset, truncate
from tests.support.servers import Server, binaries, refused_port, running
from tests.support.topologies import Cluster, ask, cluster, eventually, move_keys, role, watched

from .checker import LATE
from .run import Run, Scenario, stored
from .workload import Endpoint

REFUSED = "cannot connect"
# The server closed the connection; the operating system reset it; or the fault proxy did either
# during the handshake.
GONE = (REFUSED, "the server closed the connection", "the connection was lost")
UNKNOWN = "a reply was lost"
LOADING = "the server is still loading"
OUT_OF_MEMORY = "the server is out of memory"
READ_ONLY = "the server is a read-only replica"
WRONG_PASSWORD = "the server refuses the user name or password"
TOO_FEW = "the server has too few replicas"
CLUSTER_DOWN = "the cluster is down"

_LONG = 5.0  # a timeout that does not matter
_SHORT = 0.5  # a timeout that passes
_RESTART = 0.3  # seconds without a server, less than commands wait
_OUTAGE = 2.0  # seconds without a server, more than commands wait
_PER_MESSAGE = 0.02  # the probability that a command or a reply is lost
_MOVING = 0.05  # seconds for which a slot moves
_ALONE = 0.2  # seconds for which a master serves without its replica; Sentinels do not notice it


@contextmanager
def _server(*options: str) -> Iterator[Server]:
    with running(binaries()["valkey"], *options) as server:
        yield server


def _at(server: Server) -> Endpoint:
    return Endpoint(url=server.url)


def _only(server: Server) -> Callable[[], list[Server]]:
    return lambda: [server]


async def calm(run: Run) -> None:
    """Break nothing."""
    with _server() as server:
        async with run.load(_at(server), _only(server), timeout=_LONG):
            await run.wait()


async def restart(run: Run) -> None:
    """Stop the server in order, and start it again within the second for which commands wait."""
    await _restart(run, Server.stop, _RESTART, *_DURABLE)


async def kill(run: Run) -> None:
    """Kill the server, and start it again within the second for which commands wait."""
    await _restart(run, Server.kill, 0.5 * run.form.span, *_DURABLE)


async def kill_without_aof(run: Run) -> None:
    """Kill a server that writes nothing to disk, and start it again."""
    await _restart(run, Server.kill, 0.5 * run.form.span)


async def outage(run: Run) -> None:
    """Kill the server, and start it again after more than the second for which commands wait."""
    await _restart(run, Server.kill, _OUTAGE, *_DURABLE)


_DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


async def _restart(run: Run, stop: Callable[[Server], None], seconds: float, *options: str) -> None:
    with _server(*options) as server:
        async with run.load(_at(server), _only(server), timeout=_LONG):
            for _ in range(run.form.rounds):
                run.broken()
                await asyncio.to_thread(stop, server)
                await asyncio.sleep(seconds)
                await asyncio.to_thread(server.start)
                run.mended()
                await run.wait()


async def hang(run: Run) -> None:
    """Stop the server from answering for longer than the timeout."""
    await _hang(run, (0.005, 0.02))


async def hang_staggered(run: Run) -> None:
    """Do the same while commands come one after the other, each with another deadline."""
    await _hang(run, (0.0, _SHORT))


async def _hang(run: Run, retry_after: tuple[float, float]) -> None:
    rng = random.Random(2)  # noqa: S311 - not for secrets
    with _server() as server:
        async with run.load(_at(server), _only(server), timeout=_SHORT, retry_after=retry_after):
            for _ in range(run.form.rounds):
                run.broken()
                server.pause()
                # It ends at any time of an attempt, not only when all commands have failed.
                await asyncio.sleep(run.form.span + rng.uniform(1, 2) * _SHORT)
                server.resume()
                run.mended()
                await run.wait()


async def resets(run: Run) -> None:
    """Reset and close connections, at any point of a command or a reply."""
    rng = random.Random(1)  # noqa: S311 - not for secrets

    def sometimes(*faults: Fault) -> Fault:
        async def fault(exchange: Exchange) -> bytes:
            if rng.random() < _PER_MESSAGE:
                return await rng.choice(faults)(exchange)
            return exchange.message

        return fault

    with _server() as server:
        async with (
            FaultProxy(server.port) as proxy,
            run.load(Endpoint(url=proxy.url), _only(server), timeout=_LONG),
        ):
            for _ in range(run.form.rounds):
                run.broken()
                proxy.on_request("*", sometimes(cut, reset), times=math.inf)
                proxy.on_reply("*", sometimes(cut, reset, truncate), times=math.inf)
                await run.wait()
                proxy.forgive()
                run.mended()
                await run.wait()
            run.notes["connections"] = str(proxy.counts.connections)


async def half_open(run: Run) -> None:
    """Silence connections, as a firewall does that forgets them.

    New connections work. So the fault ends when it begins, and a timeout detects it.
    """
    with _server() as server:
        async with (
            FaultProxy(server.port) as proxy,
            run.load(Endpoint(url=proxy.url), _only(server), timeout=_SHORT),
        ):
            for number in range(run.form.rounds):
                forgotten = [*proxy.tunnels]
                run.broken()
                # The first time, requests arrive at the server, and no reply comes back.
                _silence(proxy, forgotten, both_ways=number > 0)
                run.mended()
                await asyncio.sleep(_SHORT)
                await run.wait()
                proxy.forgive()


def _silence(proxy: FaultProxy, forgotten: list[Tunnel], *, both_ways: bool) -> None:
    async def fault(exchange: Exchange) -> bytes:
        return b"" if exchange.tunnel in forgotten else exchange.message

    place = proxy.on_request if both_ways else proxy.on_reply
    place("*", fault, times=math.inf)


async def client_kill(run: Run) -> None:
    """Let an operator end all connections, again and again."""
    with _server() as server:
        async with run.load(_at(server), _only(server), timeout=_LONG):
            for _ in range(run.form.rounds):
                run.broken()
                for _ in range(5):
                    ask(server, "CLIENT", "KILL", "TYPE", "normal")
                    await run.wait(0.1)
                run.mended()
                await run.wait()


async def out_of_memory(run: Run) -> None:
    """Take away the memory of a server that evicts nothing."""
    with _server("--maxmemory-policy", "noeviction") as server:
        async with run.load(_at(server), _only(server), timeout=_LONG):
            for _ in range(run.form.rounds):
                run.broken()
                ask(server, "CONFIG", "SET", "maxmemory", 1)
                await run.wait()
                ask(server, "CONFIG", "SET", "maxmemory", 0)
                run.mended()
                await run.wait()


async def read_only(run: Run) -> None:
    """Make the server a replica for longer than the second for which commands wait."""
    with _server() as server, refused_port() as master:
        async with run.load(_at(server), _only(server), timeout=_LONG):
            for _ in range(run.form.rounds):
                run.broken()
                ask(server, "REPLICAOF", "127.0.0.1", master)
                await asyncio.sleep(_OUTAGE)
                ask(server, "REPLICAOF", "NO", "ONE")
                run.mended()
                await run.wait()


async def password(run: Run) -> None:
    """Rotate a password: with an overlap, as it should be, and then without."""
    secrets = [f"fault-suite-password-{number}" for number in range(3)]
    with _server() as server, tempfile.TemporaryDirectory(prefix="aiosessions-") as directory:
        file = Path(directory, "password")

        def configure(secret: str) -> None:
            file.write_text(secret, "utf-8")

        def allow(*rules: str) -> None:
            ask(server, "ACL", "SETUSER", "app", "on", "~session:*", "+@all", *rules)

        def disconnect() -> None:
            # Connections outlive a change of the password.
            ask(server, "CLIENT", "KILL", "USER", "app")

        allow(f">{secrets[0]}")
        configure(secrets[0])
        endpoint = Endpoint(url=server.url, user="app", password_file=str(file))
        async with run.load(endpoint, _only(server), timeout=_LONG, secrets=secrets):
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


async def clock_step(run: Run) -> None:
    """Set the clock of one process two days ahead, then two hours back, then right.

    Two days ahead, every session is past its deadline by that clock.
    """
    span = run.form.span
    steps = [(span, 172_800.0), (2 * span, -7_200.0), (3 * span, 0.0)]
    with _server() as server:
        async with run.load(_at(server), _only(server), timeout=_LONG, steps=steps):
            await run.wait()
            run.broken()
            run.mended()  # nothing is broken
            await run.wait()


async def sentinel_failover(run: Run) -> None:
    """Kill a master that has just lost its replica, which Sentinels then promote."""
    await _fail_over(run)


async def sentinel_failover_with_min_replicas(run: Run) -> None:
    """Do the same with a master that refuses writes without a replica."""
    await _fail_over(run, "CONFIG", "SET", "min-replicas-to-write", "1")


async def _fail_over(run: Run, *precaution: str) -> None:
    with watched(binaries()["valkey"]) as servers:
        master = servers.master()
        (replica,) = (server for server in servers.servers if server is not master)
        if precaution:
            ask(master, *precaution)
        endpoint = Endpoint(sentinels=servers.ports)
        async with run.load(endpoint, lambda: [servers.master()], timeout=_LONG):
            run.broken()
            # The replica cannot come back, so the master accepts writes that it never replicates.
            replica.pause()
            ask(master, "CLIENT", "KILL", "TYPE", "replica")
            await asyncio.sleep(_ALONE)
            master.kill()
            replica.resume()
            await _promoted(run, replica)
            await run.wait(2)


async def _promoted(run: Run, replica: Server) -> None:
    """Wait until the replica of a master that has just died is the master."""
    died = time.monotonic()
    await asyncio.to_thread(eventually, lambda: _lost_its_master(replica))
    run.replicated = await asyncio.to_thread(stored, [replica])
    await asyncio.to_thread(eventually, lambda: role(replica) == "master")
    promoted = time.monotonic()
    run.mended(promoted)
    run.notes["promoted after"] = f"{promoted - died:.2f} s"


def _lost_its_master(replica: Server) -> bool:
    with replica.client() as client:
        info: Any = client.info("replication")
    return bool(info["role"] == "master" or info["master_link_status"] == "down")


async def cluster_migration(run: Run) -> None:
    """Move slots that are in use from master to master."""
    with cluster(binaries()["valkey"], masters=3) as nodes:
        endpoint = Endpoint(nodes=[node.port for node in nodes.nodes])
        async with run.load(endpoint, nodes.masters, timeout=_LONG):
            run.broken()
            asked = await asyncio.to_thread(_move_slots, nodes, run.shared, run.form.rounds)
            run.mended()
            run.notes["redirected by ASK"] = str(asked)
            if not asked:
                run.problems.append("no command was redirected by ASK")
            await run.wait()


def _move_slots(nodes: Cluster, ids: list[str], rounds: int) -> int:
    """Move the slots of these sessions to the next master, one after the other.

    Each slot moves for a while. During this time its old owner redirects commands for the session.

    Returns:
        How often the nodes redirected a command by ASK.
    """
    masters = nodes.masters()
    for _ in range(rounds):
        for id in ids:
            slot = slot_of(id)
            source = nodes.owner(slot)
            target = masters[(masters.index(source) + 1) % len(masters)]
            with nodes.moving(slot, target):
                move_keys([f"session:{id}"], source, target)
                time.sleep(_MOVING)
    return sum(map(_asks, masters))


def _asks(node: Server) -> int:
    with node.client() as client:
        errors: Any = client.info("errorstats")
    return int(errors.get("errorstat_ASK", {}).get("count", 0))


async def cluster_node_death(run: Run) -> None:
    """Kill a master of a cluster, which its replica replaces."""
    with cluster(binaries()["valkey"], masters=3, replicas=1) as nodes:
        master = nodes.masters()[0]
        (replica,) = nodes.replicas(master)
        endpoint = Endpoint(nodes=[node.port for node in nodes.nodes])
        async with run.load(endpoint, nodes.masters, timeout=_LONG):
            run.broken()
            master.kill()
            await _promoted(run, replica)
            await run.wait(2)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("calm", "none", calm, in_doubt=False),
        Scenario(
            "restart",
            "restart after 0.3 s",
            restart,
            causes=(*GONE, UNKNOWN),
            bridged=True,
        ),
        Scenario(
            "kill",
            "`SIGKILL`, restart after 0.5 s",
            kill,
            causes=(*GONE, UNKNOWN),
            bridged=True,
        ),
        Scenario(
            "outage",
            "`SIGKILL`, restart after 2 s",
            outage,
            causes=(*GONE, UNKNOWN, LOADING),
            certain=REFUSED,
        ),
        Scenario(
            "hang",
            "`SIGSTOP` and `SIGCONT`",
            hang,
            causes=(LATE, *GONE, UNKNOWN),
            certain=LATE,
        ),
        Scenario(
            "hang-staggered",
            "`SIGSTOP` and `SIGCONT`, staggered calls",
            hang_staggered,
            causes=(LATE, *GONE, UNKNOWN),
            certain=LATE,
        ),
        Scenario("reset", "connections reset or closed", resets, causes=(*GONE, UNKNOWN)),
        Scenario(
            "half-open",
            "half-open connections",
            half_open,
            causes=(LATE, UNKNOWN),
            certain=LATE,
        ),
        Scenario("client-kill", "`CLIENT KILL`", client_kill, causes=(*GONE, UNKNOWN)),
        Scenario(
            "out-of-memory",
            "out of memory (`maxmemory`, noeviction)",
            out_of_memory,
            causes=(OUT_OF_MEMORY,),
            certain=OUT_OF_MEMORY,
            in_doubt=False,
        ),
        Scenario(
            "read-only",
            "read-only replica for 2 s",
            read_only,
            causes=(READ_ONLY,),
            certain=READ_ONLY,
            in_doubt=False,
        ),
        Scenario(
            "sentinel",
            "Sentinel failover, the master having lost its replica",
            sentinel_failover,
            causes=(*GONE, UNKNOWN, LATE, READ_ONLY),
            certain=REFUSED,
            recovers_within=3.0,
            loses=True,
        ),
        Scenario(
            "sentinel-min-replicas",
            "Sentinel failover, with `min-replicas-to-write 1`",
            sentinel_failover_with_min_replicas,
            causes=(*GONE, UNKNOWN, LATE, READ_ONLY, TOO_FEW),
            certain=TOO_FEW,
            recovers_within=3.0,
            loses=True,
        ),
        Scenario(
            "cluster-migration",
            "Cluster: slots migrate",
            cluster_migration,
            in_doubt=False,
        ),
        Scenario(
            "cluster-death",
            "Cluster: a master dies",
            cluster_node_death,
            causes=(*GONE, UNKNOWN, LATE, CLUSTER_DOWN, READ_ONLY),
            recovers_within=3.0,
            loses=True,
        ),
        Scenario(
            "password",
            "password rotation, with and without an overlap",
            password,
            causes=(WRONG_PASSWORD, *GONE, UNKNOWN),
            certain=WRONG_PASSWORD,
        ),
        Scenario(
            "clock",
            "clock of one process 2 days ahead, then 2 h behind",
            clock_step,
            in_doubt=False,
        ),
    )
}

WITHOUT_AOF = Scenario(
    "without-aof",
    "`SIGKILL` and restart (no append-only file)",
    kill_without_aof,
    causes=(*GONE, UNKNOWN, LOADING),
)
"""A scenario in which the suite must find lost writes."""
