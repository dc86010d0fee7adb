"""Groups of servers for tests: a cluster, a master with Sentinels, and a server with TLS.

Invariants:

- All servers listen on free ports at 127.0.0.1. They end with the `with` block, even after an error
  or after servers were killed or paused.
- When a function returns, all nodes, or all Sentinels, agree on the result.
- The functions block. Where an event loop must go on running, call them in a thread.
"""

import asyncio
import contextlib
import ssl
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import redis
import trustme
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.servers import Server, age, free_port, running

SLOTS = 16_384
NODE_TIMEOUT_MS = 1_000
SENTINEL_NAME = "sessions"

_PATIENCE = 30.0
_CLUSTER_OPTIONS = (
    *("--cluster-enabled", "yes"),
    *("--cluster-node-timeout", str(NODE_TIMEOUT_MS)),
    *("--cluster-replica-validity-factor", "0"),  # a replica may take over even with old data
    *("--repl-diskless-sync-delay", "0"),
)

T = TypeVar("T")


def eventually(
    look: Callable[[], T], *, within: float = _PATIENCE, every: float = 0.01, what: str = ""
) -> T:
    """Call `look` until its result is true, and return the result.

    An exception because a server does not answer counts as false.

    Raises:
        TimeoutError: That took too long.
    """
    deadline = time.monotonic() + within
    while True:
        with suppress(redis.RedisError, OSError):
            if found := look():
                return found
        if time.monotonic() > deadline:
            message = f"{what or look} did not happen within {within} s"
            raise TimeoutError(message)
        time.sleep(every)


@contextmanager
def asking(server: Server) -> Iterator[Any]:
    """A client of a server: with text replies, without retries, with a short timeout."""
    client = redis.Redis(
        port=server.port,
        decode_responses=True,
        socket_timeout=2.0,
        socket_connect_timeout=2.0,
        retry=Retry(NoBackoff(), 0),
    )
    with client:
        yield client


def ask(server: Server, *command: str | int) -> Any:
    """The reply of a server to one command."""
    with asking(server) as client:
        return client.execute_command(*command)


def role(server: Server) -> str:
    """The role of a server: "master", "slave" or "sentinel"."""
    with asking(server) as client:
        return str(client.execute_command("ROLE")[0])


def connections(server: Server, name: str) -> int:
    """The number of clients of a server with this name."""
    with asking(server) as client:
        return sum(each["name"] == name for each in client.client_list())


@contextmanager
def mended(*broken: Server) -> Iterator[None]:
    """Afterwards, start the servers that were killed, and continue those that were paused."""
    try:
        yield
    finally:
        for node in broken:
            if node.runs:
                node.resume()
            else:
                node.start()


def offset(server: Server) -> int:
    """The position of a master or a replica in the replication stream."""
    with asking(server) as client:
        info = client.info("replication")
    return int(info.get("slave_repl_offset", info["master_repl_offset"]))


def disconnected(servers: Sequence[Server], name: str) -> None:
    """Wait until no server has a client of this name."""
    eventually(lambda: not any(connections(server, name) for server in servers))


class Cluster:
    """A cluster of several nodes. `cluster` makes one.

    Attributes:
        nodes: All nodes, those that were killed included.
    """

    def __init__(self, nodes: Sequence[Server]) -> None:
        self.nodes = list(nodes)

    def node(self, port: int) -> Server:
        """The node with this port."""
        return next(node for node in self.nodes if node.port == port)

    def masters(self) -> list[Server]:
        """The nodes that serve slots, according to the first node that answers."""
        return list(dict.fromkeys(master for _, _, master, *_ in self.map()))

    def replicas(self, master: Server) -> list[Server]:
        """The replicas of a master, according to the first node that answers."""
        return [each for _, _, owner, *rest in self.map() if owner is master for each in rest]

    def owner(self, slot: int) -> Server:
        """The master of a slot, according to the first node that answers."""
        (owner,) = (master for low, high, master, *_ in self.map() if low <= slot <= high)
        return cast("Server", owner)

    def map(self, asked: Server | None = None) -> list[Any]:
        """The ranges of slots: first slot, last slot, master, replicas."""
        for node in [asked] if asked else self.nodes:
            with suppress(redis.RedisError, OSError):
                return [
                    (low, high, *(self.node(each[1]) for each in nodes))
                    for low, high, *nodes in ask(node, "CLUSTER", "SLOTS")
                ]
        message = "no node answers"
        raise redis.ConnectionError(message)

    def settle(self) -> None:
        """Wait until all nodes run, and agree on the masters of all slots."""
        eventually(self._is_settled, what="the agreement of all nodes")

    def _is_settled(self) -> bool:
        if not all(_says_ok(node) for node in self.nodes):
            return False
        served, *others = (
            {(*row[:3], frozenset(row[3:])) for row in self.map(n)} for n in self.nodes
        )
        masters = {row[2] for row in served}
        listed = masters.union(*(row[3] for row in served))
        return (
            all(each == served for each in others)
            and sum(high + 1 - low for low, high, *_ in served) == SLOTS
            and listed == set(self.nodes)
            and all(_is_in_sync(node) for node in listed - masters)
        )

    def flush(self) -> None:
        """Delete every key."""
        for master in self.masters():
            master.flush()

    def age(self, seconds: float) -> None:
        """See `servers.age`."""
        for master in self.masters():
            with master.client() as client:
                age(client, seconds)

    def reset_statistics(self) -> None:
        """Set the command counts of all nodes to zero."""
        for node in self.nodes:
            with suppress(redis.ConnectionError):  # the node is down
                ask(node, "CONFIG", "RESETSTAT")

    def calls(self, command: str) -> Counter[str]:
        """Count the calls of a command, and the refused calls, over all nodes that run."""
        found = Counter[str]()
        for node in self.nodes:
            with suppress(redis.ConnectionError), asking(node) as client:
                statistics = client.info("commandstats").get(f"cmdstat_{command}", {})
                found["calls"] += statistics.get("calls", 0)
                found["refusals"] += statistics.get("rejected_calls", 0)
        return found

    @contextmanager
    def moving(self, slot: int, target: Server) -> Iterator[Server]:
        """Move a slot to another node, which begins and ends with the block.

        During the block its old owner, which this yields, answers ASK for keys that it does not
        have. The other nodes learn of the new owner some time later.
        """
        source = self.owner(slot)
        ask(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", node_id(source))
        ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", node_id(target))
        try:
            yield source
        finally:
            with asking(source) as client:
                while keys := client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10):
                    move_keys(keys, source, target)
            for node in (target, source):
                ask(node, "CLUSTER", "SETSLOT", slot, "NODE", node_id(target))

    def move(self, slot: int, target: Server) -> None:
        """Move a slot and its keys to another node."""
        with self.moving(slot, target):
            pass


def move_keys(keys: Sequence[str], source: Server, target: Server) -> None:
    """Move keys to another node, with one command."""
    ask(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)


@contextmanager
def cluster(binary: Path, *options: str, masters: int = 3, replicas: int = 0) -> Iterator[Cluster]:
    """A cluster that runs during the block, with the slots spread evenly.

    The start takes two seconds, because a new master serves nothing for that time.

    Args:
        binary: The path of the program; see `servers.binaries`.
        options: The command line of each node, without the options of every node.
        masters: The number of masters.
        replicas: The number of replicas of each master.
    """
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(running(binary, *_CLUSTER_OPTIONS, *options))
            for _ in range(masters * (1 + replicas))
        ]
        ids = [node_id(node) for node in nodes]
        for number, node in enumerate(nodes):
            ask(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < masters:
                low, high = number * SLOTS // masters, (number + 1) * SLOTS // masters - 1
                ask(node, "CLUSTER", "ADDSLOTSRANGE", low, high)
            for other in nodes[:number]:
                ask(node, "CLUSTER", "MEET", "127.0.0.1", other.port)
        for number, node in enumerate(nodes[masters:]):
            of = ids[number % masters]
            eventually(partial(ask, node, "CLUSTER", "REPLICATE", of))
        made = Cluster(nodes)
        for node in nodes[masters:]:
            eventually(partial(_is_in_sync, node))
        for node in nodes[:masters]:
            node.flush()  # some servers do not list replicas that have seen no write
        made.settle()
        yield made


def node_id(server: Server) -> str:
    """The id of a node of a cluster."""
    return str(ask(server, "CLUSTER", "MYID"))


def _says_ok(node: Server) -> bool:
    info = ask(node, "CLUSTER", "INFO")  # a dict or a text, depending on the release of redis-py
    return "ok" in (info["cluster_state"] if isinstance(info, dict) else info.split()[0])


def _is_in_sync(replica: Server) -> bool:
    with asking(replica) as client:
        return bool(client.info("replication").get("master_link_status") == "up")


class Watched:
    """A master, a replica and their Sentinels. `watched` makes one.

    Attributes:
        servers: The master and the replica, in any order.
        sentinels: The Sentinels.
        ports: The ports of the Sentinels.
    """

    def __init__(self, servers: Sequence[Server], sentinels: Sequence[Server]) -> None:
        self.servers = list(servers)
        self.sentinels = list(sentinels)
        self.ports = [sentinel.port for sentinel in sentinels]

    def master(self) -> Server:
        """The master, once all Sentinels agree and the server itself says so."""
        master = eventually(self._master, what="the agreement of the Sentinels")
        assert master is not None
        return master

    def _master(self) -> Server | None:
        named = {int(self._of(each, "GET-MASTER-ADDR-BY-NAME")[1]) for each in self.sentinels}
        if len(named) == 1:
            (port,) = named
            master = next(each for each in self.servers if each.port == port)
            return master if role(master) == "master" else None
        return None

    def settle(self) -> None:
        """Wait until the other server is a replica in sync, and every Sentinel knows it."""
        eventually(self._is_settled, what="the readiness for a failover")

    def _is_settled(self) -> bool:
        master = self._master()
        if master is None:
            return False
        (replica,) = (each for each in self.servers if each is not master)
        with asking(replica) as client:
            if role(replica) != "slave" or not _is_in_sync(replica):
                return False
            if client.info("replication")["master_port"] != master.port:
                return False
        for sentinel in self.sentinels:
            with asking(sentinel) as client:
                state = client.sentinel_master(SENTINEL_NAME)
                known = client.sentinel_slaves(SENTINEL_NAME)
            others = len(self.sentinels) - 1
            if state["num-other-sentinels"] != others or state["flags"] != "master":
                return False
            if [(each["port"], each["flags"]) for each in known] != [(replica.port, "slave")]:
                return False
        return True

    def fail_over(self) -> None:
        """Start a failover to the replica, without waiting for its end."""
        eventually(lambda: self._of(self.sentinels[0], "FAILOVER"), what="the start of a failover")

    @staticmethod
    def _of(sentinel: Server, what: str) -> Any:
        return ask(sentinel, "SENTINEL", what, SENTINEL_NAME)


@contextmanager
def watched(binary: Path) -> Iterator[Watched]:
    """A master, a replica and three Sentinels, which notice after 300 ms that the master is down.

    The first Sentinel starts the failover.

    Args:
        binary: The path of the program; see `servers.binaries`.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aiosessions-")))
        master = stack.enter_context(running(binary, "--repl-diskless-sync-delay", "0"))
        options = (
            "--replicaof",
            "127.0.0.1 " + str(master.port),
            "--repl-diskless-sync-delay",
            "0",
        )
        replica = stack.enter_context(running(binary, *options))
        eventually(lambda: _is_in_sync(replica))
        sentinels: list[Server] = []
        for number in range(3):
            config = directory / f"sentinel-{number}.conf"  # the Sentinel writes to it
            # Only one of them leads, once two agree that the master is down. If all could lead,
            # they would sometimes all vote for themselves, and try again much later.
            quorum = 2 if number == 0 else 4
            config.write_text(
                f"sentinel monitor {SENTINEL_NAME} 127.0.0.1 {master.port} {quorum}\n"
                f"sentinel down-after-milliseconds {SENTINEL_NAME} 300\n"
                f"sentinel failover-timeout {SENTINEL_NAME} 2000\n"
            )
            ready = "+monitor master"
            sentinel = stack.enter_context(running(binary, str(config), "--sentinel", ready=ready))
            # Sentinels find each other and notice changes by polling. Four times the publish period
            # must be more than the second in which they notice a promotion. Otherwise a Sentinel
            # that has not noticed it yet undoes it.
            for period, milliseconds in (("info", 100), ("ask", 100), ("publish", 500)):
                ask(sentinel, "SENTINEL", "DEBUG", f"{period}-period", milliseconds)
            sentinels.append(sentinel)
        made = Watched([master, replica], sentinels)
        made.settle()
        yield made


@dataclass(frozen=True)
class Secured:
    """A server with TLS that asks for a client certificate. `secured` makes one.

    Attributes:
        server: The server.
        port: Its TLS port at 127.0.0.1; its certificate is for this address.
        ca: The file of the authority that signed the certificates of the server and its clients.
        certificate: The file of a client's certificate.
        key: The file of the key of that certificate.
        stranger_ca: The file of another authority.
    """

    server: Server
    port: int
    ca: Path
    certificate: Path
    key: Path
    stranger_ca: Path


def speaks_tls(binary: Path) -> bool:
    """Whether a server was built with TLS: its error message tells."""
    said = subprocess.run(  # noqa: S603 - our own server
        [binary, "--port", "0", "--tls-port", str(free_port())],
        capture_output=True,
        check=False,
        timeout=_PATIENCE,
    )
    return b"No tls-cert-file configured" in said.stdout + said.stderr


@contextmanager
def secured(binary: Path) -> Iterator[Secured]:
    """A server with TLS, or behind a TLS proxy if it was built without TLS."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aiosessions-")))
        authority = trustme.CA()
        files = {name: directory / f"{name}.pem" for name in ("ca", "stranger-ca")}
        authority.cert_pem.write_to_path(files["ca"])
        trustme.CA().cert_pem.write_to_path(files["stranger-ca"])
        for name, identity in (("server", "127.0.0.1"), ("client", "client@example.org")):
            issued = authority.issue_cert(identity)
            files[name], files[f"{name}-key"] = (
                directory / f"{name}.pem",
                directory / f"{name}-key.pem",
            )
            issued.cert_chain_pems[0].write_to_path(files[name])
            issued.private_key_pem.write_to_path(files[f"{name}-key"])
        port = free_port()
        if speaks_tls(binary):
            options = {
                "tls-port": str(port),
                "tls-ca-cert-file": str(files["ca"]),
                "tls-cert-file": str(files["server"]),
                "tls-key-file": str(files["server-key"]),
                "tls-auth-clients": "yes",
            }
            words = [word for name, value in options.items() for word in (f"--{name}", value)]
            server = stack.enter_context(running(binary, *words))
        else:
            server = stack.enter_context(running(binary))
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files["ca"])
            context.load_cert_chain(files["server"], files["server-key"])
            context.verify_mode = ssl.CERT_REQUIRED
            stack.enter_context(_tls_proxy(context, port, server.port))
        yield Secured(
            server,
            port,
            ca=files["ca"],
            certificate=files["client"],
            key=files["client-key"],
            stranger_ca=files["stranger-ca"],
        )


@contextmanager
def _tls_proxy(context: ssl.SSLContext, port: int, target: int) -> Iterator[None]:
    """A proxy in a thread that decrypts TLS and connects to another port."""
    started = threading.Event()
    stop: Callable[[], object] = lambda: None  # noqa: E731

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pipe(reader, to_writer), pipe(to_reader, writer))

    async def main() -> None:
        nonlocal stop
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop = lambda: loop.call_soon_threadsafe(ended.set)  # noqa: E731
        server = await asyncio.start_server(serve, "127.0.0.1", port, ssl=context)
        started.set()
        async with server:
            await ended.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert started.wait(_PATIENCE)
    try:
        yield
    finally:
        stop()
        thread.join(_PATIENCE)
