"""The servers to measure on: embedded servers, or the user's own.

The benchmarks configure, reset and flush nothing on a user's own server. Keys there begin with
`workload.PREFIX`, or with a library's own prefix, and expire within an hour.
"""

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis
import trustme

from aiosessions import Session
from tests.support.servers import Server, ServerError, binaries, free_port, running

from .measure import BenchSettings
from .relay import relaying
from .workload import TTL_MS, key, sealed

_CLUSTER_WITHIN = 30.0
_OUTER = ("multi", "exec", "eval", "evalsha")


@dataclass(frozen=True)
class MeasuredServer:
    """A server to measure on.

    Attributes:
        label: Its name and version, from INFO: "Valkey 9.1.2".
        url: Its URL.
        embedded: Whether the benchmarks started it and may configure it.
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
        """Its URL through a relay on a port of this machine.

        Raises:
            SystemExit: The URL is not a redis:// URL.
        """
        parts = urlsplit(self.url)
        if parts.scheme != "redis":
            raise SystemExit("a relay needs a redis:// URL")
        login = parts.netloc.rpartition("@")[0]
        return parts._replace(netloc=f"{login}{'@' if login else ''}127.0.0.1:{port}").geturl()

    def client(self) -> "redis.Redis":
        """A plain synchronous client. Close it."""
        return redis.Redis.from_url(self.url)


@contextmanager
def targets(settings: BenchSettings, *, every: bool = False) -> Iterator[list[MeasuredServer]]:
    """The servers to measure on.

    Args:
        settings: Names the servers, if the command line does.
        every: Whether to measure on every embedded server instead of Valkey only.
    """
    if settings.url is not None:
        url = re.sub(r"^valkey(s?)://", r"redi\1s://", settings.url)
        try:
            with redis.Redis.from_url(url) as client:
                name = _name(client)
        except (redis.RedisError, ValueError) as error:
            raise SystemExit(f"--url: {error}") from None
        yield [MeasuredServer(f"{name}, the user's own", url, embedded=False)]
        return
    names = [settings.server] if settings.server else list(binaries()) if every else ["valkey"]
    with ExitStack() as stack:
        servers = [stack.enter_context(embedded(name)) for name in names]
        yield [MeasuredServer(label(server), server.url, embedded=True) for server in servers]


@contextmanager
def embedded(name: str, *options: str) -> Iterator[Server]:
    """Start a server, "valkey" or "redis", with options of its command line.

    Raises:
        SystemExit: This machine does not have it.
    """
    found = binaries()
    if name not in found:
        raise SystemExit(f"{name} is not installed; installed are: {', '.join(found)}")
    with running(found[name], *options) as server:
        yield server


def label(server: Server) -> str:
    """The name and version of a server."""
    with server.client() as client:
        return _name(client)


def _name(client: "redis.Redis") -> str:
    info: dict[str, Any] = client.info("server")
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}"


@contextmanager
def over_tls(settings: BenchSettings) -> Iterator[MeasuredServer]:
    """A server that speaks TLS.

    A user's own rediss:// URL is used as it is. The Redis on PATH ends TLS itself if it was built
    with TLS; in front of other servers a relay ends it. The URL names the file of the authority.
    """
    with ExitStack() as stack:
        if (settings.url or "").startswith(("rediss:", "valkeys:")):
            yield stack.enter_context(targets(settings))[0]
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aiosessions-")))
        authority, certificate = folder / "ca.pem", folder / "server.pem"
        issuer = trustme.CA()
        issuer.cert_pem.write_to_path(authority)
        issuer.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
        if settings.url is None and settings.server != "valkey":
            redis_server = _redis_over_tls(stack, certificate, authority)
            if redis_server is not None:
                yield redis_server
                return
        (target, *_) = stack.enter_context(targets(settings))
        relay = stack.enter_context(relaying(*target.address, certificate))
        url = target.through(relay.port).replace("redis:", "rediss:", 1)
        yield MeasuredServer(
            f"{target.label} behind a TLS relay",
            f"{url}{'&' if '?' in url else '?'}ssl_ca_certs={authority}",
            target.embedded,
        )


def _redis_over_tls(stack: ExitStack, certificate: Path, authority: Path) -> MeasuredServer | None:
    """Start the Redis on PATH with TLS; None if that fails."""
    port = free_port()
    options = {
        "tls-port": port,
        "tls-cert-file": certificate,
        "tls-key-file": certificate,
        "tls-ca-cert-file": authority,
        "tls-auth-clients": "no",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    try:
        server = stack.enter_context(embedded("redis", *words))
    except (SystemExit, ServerError):
        return None
    url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={authority}"
    return MeasuredServer(label(server), url, embedded=True)


@contextmanager
def stored(
    client: "redis.Redis | redis.RedisCluster", sessions: Sequence[Session[Any]]
) -> Iterator[list[str]]:
    """Store sessions and yield their ids; remove them with the block."""
    ids = [session.id for session in sessions]
    for session in sessions:
        client.set(key(session.id), sealed(session), px=TTL_MS)
    try:
        yield ids
    finally:
        for id in ids:
            client.delete(key(id))


@contextmanager
def cluster(name: str = "valkey", nodes: int = 3) -> Iterator[str]:
    """Start a cluster of masters and yield its URL."""
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
    """Start a replica of a server and wait until it is synchronised."""
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
    """The counters of a server at a moment.

    Attributes:
        calls: Executions by command.
        executing: Microseconds of execution by command.
        cpu_seconds: User and system time of the server's process.
        replicated: Bytes for replicas, or None without replicas.
        appended: Bytes of the append-only file, or None without the file.
        connections: The number of connected clients.
    """

    calls: dict[str, int]
    executing: dict[str, float]
    cpu_seconds: float
    replicated: int | None
    appended: int | None
    connections: int

    @classmethod
    def of(cls, client: "redis.Redis") -> "Snapshot":
        """Read the counters."""
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
        """The time of execution.

        The time of a script or a transaction includes the commands inside it, so they do not count
        again.
        """
        outer = [self.executing[name] for name in _OUTER if self.calls.get(name)]
        return sum(outer or self.executing.values())

    def since(self, before: "Snapshot") -> "Snapshot":
        """The difference to an earlier snapshot."""
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
