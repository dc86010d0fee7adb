"""What breaks, and how it is mended again: one function for each fault.

Every one of them runs with servers of its own, which end with it.
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

from tests.callers import slot_of
from tests.fault_proxy import Exchange, Fault, FaultProxy, Tunnel, cut, reset, truncate
from tests.servers import Server, binaries, deaf_port, running
from tests.topologies import Cluster, ask, cluster, eventually, move_keys, role, watched

from .stage import Scenario, Stage, stored
from .workload import Target

GONE = "the connection to the server failed"
LATE = "the server did not answer in time"
LOST = "a reply was lost"
LOADING = "the server is still loading"
OUT_OF_MEMORY = "the server is out of memory"
READ_ONLY = "the server is a read-only replica"
WRONG_PASSWORD = "the server refuses the user name or password"
TOO_FEW = "the server has too few replicas"
CLUSTER_DOWN = "the cluster is down"
UNSERVED = "no reachable node of the cluster"

_AMPLE = 5.0  # a timeout that has to do with nothing
_BRIEF = 0.5  # one that runs out
_PER_MESSAGE = 0.02  # how probable it is that a command, or a reply, is lost
_ON_THE_MOVE = 0.05  # how long a slot is on the move
_ALONE = 0.2  # how long a master goes on without its replica; less than Sentinels would notice


@contextmanager
def _server(*options: str) -> Iterator[Server]:
    with running(binaries()["valkey"], *options) as server:
        yield server


def _at(server: Server) -> Target:
    return Target(url=server.url)


def _only(server: Server) -> Callable[[], list[Server]]:
    return lambda: [server]


async def calm(stage: Stage) -> None:
    """Nothing happens."""
    with _server() as server:
        async with stage.load(_at(server), _only(server), timeout=_AMPLE):
            await stage.wait()


async def kill(stage: Stage) -> None:
    """A server that writes everything to disk is killed, and started again."""
    await _kill(stage, "--appendonly", "yes", "--appendfsync", "always")


async def kill_forgetful(stage: Stage) -> None:
    """A server that writes nothing to disk is killed, and started again."""
    await _kill(stage)


async def _kill(stage: Stage, *options: str) -> None:
    with _server(*options) as server:
        async with stage.load(_at(server), _only(server), timeout=_AMPLE):
            for _ in range(stage.form.rounds):
                stage.broken()
                server.kill()
                await stage.wait(0.5)
                await asyncio.to_thread(server.start)
                stage.mended()
                await stage.wait()


async def hang(stage: Stage) -> None:
    """A server hangs for longer than the timeout, and goes on."""
    dice = random.Random(2)  # noqa: S311 - the same every time
    with _server() as server:
        async with stage.load(_at(server), _only(server), timeout=_BRIEF):
            for _ in range(stage.form.rounds):
                stage.broken()
                server.pause()
                # It goes on at any time of somebody's attempt, not just when all have given up.
                await asyncio.sleep(stage.form.span + dice.uniform(1, 2) * _BRIEF)
                server.resume()
                stage.mended()
                await stage.wait()


async def resets(stage: Stage) -> None:
    """A network resets and closes connections, at any point of a command or a reply."""
    dice = random.Random(1)  # noqa: S311 - the same every time

    def sometimes(*faults: Fault) -> Fault:
        async def fault(exchange: Exchange) -> bytes:
            if dice.random() < _PER_MESSAGE:
                return await dice.choice(faults)(exchange)
            return exchange.message

        return fault

    with _server() as server:
        async with (
            FaultProxy(server.port) as proxy,
            stage.load(Target(url=proxy.url), _only(server), timeout=_AMPLE),
        ):
            for _ in range(stage.form.rounds):
                stage.broken()
                proxy.on_request("*", sometimes(cut, reset), times=math.inf)
                proxy.on_reply("*", sometimes(cut, reset, truncate), times=math.inf)
                await stage.wait()
                proxy.forgive()
                stage.mended()
                await stage.wait()
            stage.notes["connections"] = str(proxy.counts.connections)


async def half_open(stage: Stage) -> None:
    """A network forgets connections, as a firewall does: nothing passes, and nobody is told.

    One can connect again at once. So it is mended when it breaks, and found out by a timeout.
    """
    with _server() as server:
        async with (
            FaultProxy(server.port) as proxy,
            stage.load(Target(url=proxy.url), _only(server), timeout=_BRIEF),
        ):
            for number in range(stage.form.rounds):
                forgotten = [*proxy.tunnels]
                stage.broken()
                # The first time, requests arrive, and nothing comes back.
                _forget(proxy, forgotten, both_ways=number > 0)
                stage.mended()
                await asyncio.sleep(_BRIEF)
                await stage.wait()
                proxy.forgive()


def _forget(proxy: FaultProxy, forgotten: list[Tunnel], *, both_ways: bool) -> None:
    async def fault(exchange: Exchange) -> bytes:
        return b"" if exchange.tunnel in forgotten else exchange.message

    place = proxy.on_request if both_ways else proxy.on_reply
    place("*", fault, times=math.inf)


async def client_kill(stage: Stage) -> None:
    """An operator ends all connections, again and again."""
    with _server() as server:
        async with stage.load(_at(server), _only(server), timeout=_AMPLE):
            for _ in range(stage.form.rounds):
                stage.broken()
                for _ in range(5):
                    ask(server, "CLIENT", "KILL", "TYPE", "normal")
                    await stage.wait(0.1)
                stage.mended()
                await stage.wait()


async def out_of_memory(stage: Stage) -> None:
    """The server has all the memory that it may have, and evicts nothing."""
    with _server("--maxmemory-policy", "noeviction") as server:
        async with stage.load(_at(server), _only(server), timeout=_AMPLE):
            for _ in range(stage.form.rounds):
                stage.broken()
                ask(server, "CONFIG", "SET", "maxmemory", 1)
                await stage.wait()
                ask(server, "CONFIG", "SET", "maxmemory", 0)
                stage.mended()
                await stage.wait()


async def read_only(stage: Stage) -> None:
    """The server becomes a replica, and a master again."""
    with _server() as server, deaf_port() as nobody:
        async with stage.load(_at(server), _only(server), timeout=_AMPLE):
            for _ in range(stage.form.rounds):
                stage.broken()
                ask(server, "REPLICAOF", "127.0.0.1", nobody)
                await stage.wait()
                ask(server, "REPLICAOF", "NO", "ONE")
                stage.mended()
                await stage.wait()


async def password(stage: Stage) -> None:
    """A password is rotated: first with an overlap, as it should be, and then without."""
    secrets = [f"fault-suite-password-{number}" for number in range(3)]
    with _server() as server, tempfile.TemporaryDirectory(prefix="aiosessions-") as directory:
        file = Path(directory, "password")

        def tell(secret: str) -> None:
            file.write_text(secret, "utf-8")

        def allow(*rules: str) -> None:
            ask(server, "ACL", "SETUSER", "app", "on", "~session:*", "+@all", *rules)

        def disconnect() -> None:
            # Who is connected stays so, whatever becomes of the password.
            ask(server, "CLIENT", "KILL", "USER", "app")

        allow(f">{secrets[0]}")
        tell(secrets[0])
        target = Target(url=server.url, user="app", password_file=str(file))
        async with stage.load(target, _only(server), timeout=_AMPLE, secrets=secrets):
            with stage.without(WRONG_PASSWORD):
                allow(f">{secrets[1]}")
                disconnect()  # who connects again still has the old one
                await stage.wait(0.5)
                tell(secrets[1])
                disconnect()
                await stage.wait(0.5)
                allow(f"<{secrets[0]}")
                stage.broken()
                disconnect()
                stage.mended()
                await stage.wait()
            stage.broken()
            allow("resetpass", f">{secrets[2]}")
            disconnect()
            await stage.wait()
            tell(secrets[2])
            stage.mended()
            await stage.wait()


async def clock_step(stage: Stage) -> None:
    """The clock of one of the processes is set two hours ahead, two hours back, and right."""
    span = stage.form.span
    steps = [(span, 7_200.0), (2 * span, -7_200.0), (3 * span, 0.0)]
    with _server() as server:
        async with stage.load(_at(server), _only(server), timeout=_AMPLE, steps=steps):
            await stage.wait()
            stage.broken()
            stage.mended()  # nothing is broken
            await stage.wait()


async def sentinel_failover(stage: Stage) -> None:
    """A master dies just after it has lost its replica, and Sentinels promote that."""
    await _fail_over(stage)


async def sentinel_failover_with_min_replicas(stage: Stage) -> None:
    """The same, but the master refuses writes while it has no replica."""
    await _fail_over(stage, "CONFIG", "SET", "min-replicas-to-write", "1")


async def _fail_over(stage: Stage, *precaution: str) -> None:
    with watched(binaries()["valkey"]) as servers:
        master = servers.master()
        (replica,) = (server for server in servers.servers if server is not master)
        if precaution:
            ask(master, *precaution)
        target = Target(sentinels=servers.ports)
        async with stage.load(target, lambda: [servers.master()], timeout=_AMPLE):
            stage.broken()
            # So that there is something that it never replicates: the replica cannot come back.
            replica.pause()
            ask(master, "CLIENT", "KILL", "TYPE", "replica")
            await asyncio.sleep(_ALONE)
            master.kill()
            replica.resume()
            await _promoted(stage, replica)
            await stage.wait(2)


async def _promoted(stage: Stage, replica: Server) -> None:
    """Wait until a replica, whose master has just died, has taken its place."""
    died = time.monotonic()
    await asyncio.to_thread(eventually, lambda: _lost_its_master(replica))
    stage.replicated = await asyncio.to_thread(stored, [replica])
    await asyncio.to_thread(eventually, lambda: role(replica) == "master")
    promoted = time.monotonic()
    stage.mended(promoted)
    stage.notes["promoted after"] = f"{promoted - died:.2f} s"


def _lost_its_master(replica: Server) -> bool:
    with replica.client() as client:
        info: Any = client.info("replication")
    return bool(info["role"] == "master" or info["master_link_status"] == "down")


async def cluster_migration(stage: Stage) -> None:
    """Slots that are in use move from master to master."""
    with cluster(binaries()["valkey"], masters=3) as nodes:
        target = Target(nodes=[node.port for node in nodes.nodes])
        async with stage.load(target, nodes.masters, timeout=_AMPLE):
            stage.broken()
            asked = await asyncio.to_thread(_move_slots, nodes, stage.shared, stage.form.rounds)
            stage.mended()
            stage.notes["redirected by ASK"] = str(asked)
            if not asked:
                stage.problems.append("nobody asked for what was on the move")
            await stage.wait()


def _move_slots(nodes: Cluster, ids: list[str], rounds: int) -> int:
    """Move the slots of these sessions to the next master, one after the other, again and again.

    Each is on the move for a while, in which its old owner sends on whoever comes for the session.

    Returns:
        How often the nodes did so.
    """
    masters = nodes.masters()
    for _ in range(rounds):
        for id in ids:
            slot = slot_of(id)
            source = nodes.owner(slot)
            target = masters[(masters.index(source) + 1) % len(masters)]
            with nodes.moving(slot, target):
                move_keys([f"session:{id}"], source, target)
                time.sleep(_ON_THE_MOVE)
    return sum(map(_asks, masters))


def _asks(node: Server) -> int:
    with node.client() as client:
        errors: Any = client.info("errorstats")
    return int(errors.get("errorstat_ASK", {}).get("count", 0))


async def cluster_node_death(stage: Stage) -> None:
    """A master of a cluster dies, and its replica takes over."""
    with cluster(binaries()["valkey"], masters=3, replicas=1) as nodes:
        master = nodes.masters()[0]
        (replica,) = nodes.replicas(master)
        target = Target(nodes=[node.port for node in nodes.nodes])
        async with stage.load(target, nodes.masters, timeout=_AMPLE):
            stage.broken()
            master.kill()
            await _promoted(stage, replica)
            await stage.wait(2)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("calm", "none", calm),
        Scenario(
            "kill",
            "`SIGKILL` and restart (append-only file, fsync always)",
            kill,
            causes=(GONE, LOST, LOADING),
            certain=GONE,
        ),
        Scenario(
            "hang",
            "`SIGSTOP` and `SIGCONT`",
            hang,
            causes=(LATE, GONE, LOST),
            certain=LATE,
        ),
        Scenario("reset", "connections reset or closed", resets, causes=(GONE, LOST)),
        Scenario(
            "half-open",
            "half-open connections",
            half_open,
            causes=(LATE, LOST),
            certain=LATE,
        ),
        Scenario("client-kill", "`CLIENT KILL`", client_kill, causes=(GONE, LOST)),
        Scenario(
            "out-of-memory",
            "out of memory (`maxmemory`, noeviction)",
            out_of_memory,
            causes=(OUT_OF_MEMORY,),
            certain=OUT_OF_MEMORY,
            refuses=True,
        ),
        Scenario(
            "read-only",
            "read-only replica",
            read_only,
            causes=(READ_ONLY, GONE, LOST),
            certain=READ_ONLY,
            refuses=True,
        ),
        Scenario(
            "sentinel",
            "Sentinel failover, the master having lost its replica",
            sentinel_failover,
            causes=(GONE, LOST, LATE, READ_ONLY),
            certain=GONE,
            recovers_within=3.0,
            loses=True,
        ),
        Scenario(
            "sentinel-min-replicas",
            "the same with `min-replicas-to-write 1`",
            sentinel_failover_with_min_replicas,
            causes=(GONE, LOST, LATE, READ_ONLY, TOO_FEW),
            certain=TOO_FEW,
            recovers_within=3.0,
            loses=True,
        ),
        Scenario(
            "cluster-migration",
            "Cluster: slots migrate",
            cluster_migration,
            causes=(LOST,),
        ),
        Scenario(
            "cluster-death",
            "Cluster: a master dies",
            cluster_node_death,
            causes=(GONE, LOST, LATE, CLUSTER_DOWN, UNSERVED, READ_ONLY),
            recovers_within=3.0,
            loses=True,
        ),
        Scenario(
            "password",
            "password rotation, with and without an overlap",
            password,
            causes=(WRONG_PASSWORD, GONE, LOST),
            certain=WRONG_PASSWORD,
        ),
        Scenario("clock", "a clock step of one process, ± 2 h", clock_step),
    )
}

FORGETFUL = Scenario(
    "forgetful",
    "`SIGKILL` and restart (no append-only file)",
    kill_forgetful,
    causes=(GONE, LOST, LOADING),
)
"""What the suite has to find fault with: it promises durability, and there is none."""
