"""The servers to measure on: embedded servers, or the user's own.

The benchmarks configure, reset and flush nothing on a user's own server. Keys there begin with
`workload.PREFIX`, or with a library's own prefix, and expire within an hour.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import redis
import trustme

from tests.support.proxy_process import proxy_process
from tests.support.servers import Server, ServerError, binaries, free_port, running
from tests.support.topologies import eventually

from .workload import TTL_MS, key, sealed, sessions

_OUTER = ("multi", "exec", "eval", "evalsha")


@dataclass(frozen=True)
class MeasuredServer:
    """A server to measure on.

    Attributes:
        label: Its name and version, from INFO: "Valkey 9.1.2".
        url: Its URL.
        direct: A plain synchronous client.
        ids: The ids of stored sessions.
    """

    label: str
    url: str
    direct: "redis.Redis"
    ids: list[str]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "localhost", parts.port or 6379

    def through(self, port: int) -> str:
        """Its URL through a proxy on a port of this machine.

        Raises:
            SystemExit: The URL is not a redis:// URL.
        """
        parts = urlsplit(self.url)
        if parts.scheme != "redis":
            raise SystemExit("a proxy needs a redis:// URL")
        login = parts.netloc.rpartition("@")[0]
        return parts._replace(netloc=f"{login}{'@' if login else ''}127.0.0.1:{port}").geturl()


@contextmanager
def measured(url: str) -> Iterator[MeasuredServer]:
    """The server of a URL, with stored sessions."""
    with redis.Redis.from_url(url) as direct, stored(direct) as ids:
        info: dict[str, Any] = direct.info("server")
        name = "Valkey" if "valkey_version" in info else "Redis"
        yield MeasuredServer(f"{name} {info[f'{name.lower()}_version']}", url, direct, ids)


@contextmanager
def targets(url: str | None, *, every: bool = False) -> Iterator[list[MeasuredServer]]:
    """The servers to measure on: that of a URL, or else Valkey or `every` embedded one."""
    with ExitStack() as stack:
        if url is not None:
            try:
                own = stack.enter_context(measured(re.sub(r"^valkey(s?)://", r"redi\1s://", url)))
            except (redis.RedisError, ValueError) as error:
                raise SystemExit(f"--url: {error}") from None
            yield [replace(own, label=f"{own.label}, the user's own")]
            return
        names = binaries() if every else ["valkey"]
        servers = [stack.enter_context(embedded(name)) for name in names]
        yield [stack.enter_context(measured(server.url)) for server in servers]


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


@contextmanager
def over_tls(url: str | None) -> Iterator[MeasuredServer]:
    """A server that speaks TLS.

    A user's own rediss:// URL is used as it is. The Redis on PATH ends TLS itself if it was built
    with TLS; in front of other servers a proxy ends it. The URL names the file of the authority.
    """
    with ExitStack() as stack:
        if (url or "").startswith(("rediss:", "valkeys:")):
            yield stack.enter_context(targets(url))[0]
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aiosessions-")))
        authority, certificate = folder / "ca.pem", folder / "server.pem"
        issuer = trustme.CA()
        issuer.cert_pem.write_to_path(authority)
        issuer.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
        if url is None:
            redis_server = _redis_over_tls(stack, certificate, authority)
            if redis_server is not None:
                yield redis_server
                return
        (target, *_) = stack.enter_context(targets(url))
        host, port = target.address
        proxy = stack.enter_context(proxy_process(port, host, certificate))
        proxy.set()
        through = target.through(proxy.port).replace("redis:", "rediss:", 1)
        through = f"{through}{'&' if '?' in through else '?'}ssl_ca_certs={authority}"
        yield replace(target, label=f"{target.label} behind a TLS proxy", url=through)


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
        stack.enter_context(embedded("redis", *words))
    except (SystemExit, ServerError):
        return None
    url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={authority}"
    return stack.enter_context(measured(url))


@contextmanager
def stored(
    client: "redis.Redis | redis.RedisCluster", ids: list[str] | None = None
) -> Iterator[list[str]]:
    """Store sessions, with these ids if they are given, and remove them with the block."""
    made = sessions(ids)
    for session in made:
        client.set(key(session.id), sealed(session), px=TTL_MS)
    try:
        yield [session.id for session in made]
    finally:
        for session in made:
            client.delete(key(session.id))


@contextmanager
def replica(name: str, server: Server) -> Iterator[None]:
    """Start a replica of a server and wait until it is synchronised."""
    with (
        embedded(name, "--replicaof", f"127.0.0.1 {server.port}") as follower,
        follower.client() as client,
    ):
        eventually(lambda: _section(client, "replication")["master_link_status"] == "up")
        yield


def _section(client: "redis.Redis", name: str) -> dict[str, Any]:
    section: dict[str, Any] = client.info(name)
    return section


class Snapshot(Counter[str]):
    """The counters of a server at a moment; `after - before` has those that have grown.

    "calls:get" and "usec:get" are the executions of GET and their microseconds, "cpu" is the CPU
    time of the server in microseconds. "replicated" and "appended" are bytes for replicas and of
    the append-only file, if there are any.
    """

    @classmethod
    def of(cls, client: "redis.Redis") -> Self:
        """Read the counters."""
        counters: dict[str, Any] = {}
        for name, values in _section(client, "commandstats").items():
            command = name.removeprefix("cmdstat_")
            if command not in ("info", "ping") and not command.startswith("replconf"):
                counters |= {f"calls:{command}": values["calls"], f"usec:{command}": values["usec"]}
        cpu = _section(client, "cpu")
        seconds = float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])
        counters["cpu"] = round(seconds * 1e6)
        replication, persistence = _section(client, "replication"), _section(client, "persistence")
        if replication["connected_slaves"]:
            counters["replicated"] = replication["master_repl_offset"]
        if persistence["aof_enabled"]:
            counters["appended"] = persistence["aof_current_size"]
        return cls(counters)

    def calls(self) -> dict[str, int]:
        """The executions of each command."""
        return {name[6:]: count for name, count in self.items() if name.startswith("calls:")}

    def executing(self) -> int:
        """The microseconds of execution.

        Those of a script or a transaction include the commands inside it, so they do not count
        again.
        """
        spent = {name[5:]: time for name, time in self.items() if name.startswith("usec:")}
        outer = [spent[name] for name in _OUTER if name in spent and self[f"calls:{name}"]]
        return sum(outer or spent.values())
