"""Where sessions are measured: embedded servers, or the user's own.

On a user's own server nothing is configured, reset or flushed. What is stored there begins with
`workload.PREFIX`, or with a library's own prefix, and expires within the hour.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import redis

from tests.servers import Server, binaries, running

from .measure import Settings

_CLUSTER_WITHIN = 30.0
_OUTER = ("multi", "exec", "eval", "evalsha")


@dataclass(frozen=True)
class Target:
    """A server to measure on.

    Attributes:
        label: What it is, as it says itself: "Valkey 9.1.2".
        url: Where it is.
        embedded: It is ours, to do with as we like.
    """

    label: str
    url: str
    embedded: bool

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "localhost", parts.port or 6379

    def through(self, port: int) -> str:
        """Its URL through a relay that listens on a port of this machine.

        Raises:
            SystemExit: A relay cannot stand in front of it.
        """
        parts = urlsplit(self.url)
        if parts.scheme != "redis":
            raise SystemExit("what counts or delays on the wire needs a redis:// URL")
        login = parts.netloc.rpartition("@")[0]
        return parts._replace(netloc=f"{login}{'@' if login else ''}127.0.0.1:{port}").geturl()

    def client(self) -> "redis.Redis":
        """A plain synchronous client. Close it."""
        return redis.Redis.from_url(self.url)


@contextmanager
def targets(settings: Settings, *, every: bool = False) -> Iterator[list[Target]]:
    """The servers to measure on.

    Args:
        settings: May name them.
        every: If not, every embedded server there is, Valkey and Redis, rather than Valkey alone.
    """
    if settings.url is not None:
        url = re.sub(r"^valkey(s?)://", r"redi\1s://", settings.url)
        try:
            with redis.Redis.from_url(url) as client:
                name = _name(client)
        except (redis.RedisError, ValueError) as error:
            raise SystemExit(f"--url: {error}") from None
        yield [Target(f"{name}, the user's own", url, embedded=False)]
        return
    names = [settings.server] if settings.server else list(binaries()) if every else ["valkey"]
    with ExitStack() as stack:
        servers = [stack.enter_context(embedded(name)) for name in names]
        yield [Target(label(server), server.url, embedded=True) for server in servers]


@contextmanager
def embedded(name: str, *options: str) -> Iterator[Server]:
    """A server of our own, "valkey" or "redis", with options of its command line.

    Raises:
        SystemExit: There is no such server here.
    """
    found = binaries()
    if name not in found:
        raise SystemExit(f"there is no {name} here, only {', '.join(found)}")
    with running(found[name], *options) as server:
        yield server


def label(server: Server) -> str:
    """Which server it is, and which version."""
    with server.client() as client:
        return _name(client)


def _name(client: "redis.Redis") -> str:
    info: dict[str, Any] = client.info("server")
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}"


@contextmanager
def cluster(name: str = "valkey", nodes: int = 3) -> Iterator[str]:
    """A cluster of masters; its URL."""
    with ExitStack() as stack:
        members = [
            stack.enter_context(embedded(name, "--cluster-enabled", "yes")) for _ in range(nodes)
        ]
        clients = [stack.enter_context(member.client()) for member in members]
        share = 16_384 // nodes + 1
        for number, client in enumerate(clients):
            slots = range(number * share, min((number + 1) * share, 16_384))
            client.execute_command("CLUSTER", "ADDSLOTS", *slots)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", members[0].port)
        _wait_until(lambda: all(_complete(client, nodes) for client in clients))
        yield members[0].url


def _complete(client: "redis.Redis", nodes: int) -> bool:
    info: dict[str, Any] = client.cluster("INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == nodes


@contextmanager
def replica(name: str, server: Server) -> Iterator[None]:
    """A replica of a server, in step with it."""
    with (
        embedded(name, "--replicaof", f"127.0.0.1 {server.port}") as follower,
        follower.client() as client,
    ):
        _wait_until(lambda: _section(client, "replication")["master_link_status"] == "up")
        yield


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _CLUSTER_WITHIN
    while not condition():
        if time.monotonic() > deadline:
            message = "the servers did not find each other"
            raise TimeoutError(message)
        time.sleep(0.02)


def _section(client: "redis.Redis", name: str) -> dict[str, Any]:
    section: dict[str, Any] = client.info(name)
    return section


@dataclass(frozen=True)
class Snapshot:
    """A server's own counters at a moment. `since` takes the difference of two.

    Attributes:
        calls: Executions by command.
        executing: Microseconds that executing took, by command.
        cpu_seconds: The time of the server's process, in user and in system mode.
        replicated: Bytes for replicas, None without any.
        appended: Bytes of the append-only file, None without one.
        connections: How many clients are connected.
    """

    calls: dict[str, int]
    executing: dict[str, float]
    cpu_seconds: float
    replicated: int | None
    appended: int | None
    connections: int

    @classmethod
    def of(cls, client: "redis.Redis") -> "Snapshot":
        """Ask the server."""
        commands = {
            name.removeprefix("cmdstat_"): values
            for name, values in _section(client, "commandstats").items()
            if not name.startswith(("cmdstat_info", "cmdstat_replconf", "cmdstat_ping"))
        }
        cpu = _section(client, "cpu")
        replication = _section(client, "replication")
        persistence = _section(client, "persistence")
        return cls(
            calls={name: int(values["calls"]) for name, values in commands.items()},
            executing={name: float(values["usec"]) for name, values in commands.items()},
            cpu_seconds=float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"]),
            replicated=int(replication["master_repl_offset"])
            if replication["connected_slaves"]
            else None,
            appended=int(persistence["aof_current_size"]) if persistence["aof_enabled"] else None,
            connections=int(_section(client, "clients")["connected_clients"]),
        )

    @property
    def microseconds(self) -> float:
        """The time that executing took.

        That of a script or a transaction includes what it calls, which is not added again.
        """
        outer = [self.executing[name] for name in _OUTER if self.calls.get(name)]
        return sum(outer or self.executing.values())

    def since(self, before: "Snapshot") -> "Snapshot":
        """What has been added since then."""
        calls = {name: count - before.calls.get(name, 0) for name, count in self.calls.items()}
        return Snapshot(
            calls={name: count for name, count in calls.items() if count},
            executing={
                name: spent - before.executing.get(name, 0)
                for name, spent in self.executing.items()
            },
            cpu_seconds=self.cpu_seconds - before.cpu_seconds,
            replicated=_difference(self.replicated, before.replicated),
            appended=_difference(self.appended, before.appended),
            connections=self.connections - before.connections,
        )


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before
