"""Servers in company, for tests: a cluster, a master with Sentinels, and TLS in front of a server.

Invariants:

- Everything listens on 127.0.0.1, on ports of its own, and ends with its `with` block, also after
  an error and when parts of it were killed or paused.
- What these functions return from has happened: all nodes agree, or the Sentinels do.
- They block. Where an event loop has to go on meanwhile, call them in a thread.
"""

import asyncio
import contextlib
import ssl
import subprocess
import tempfile
import threading
import time
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

from tests.servers import Server, age, free_port, running

SLOTS = 16_384
NODE_TIMEOUT_MS = 1_000
SENTINEL_NAME = "sessions"

_PATIENCE = 30.0
_CLUSTER_OPTIONS = (
    *("--cluster-enabled", "yes"),
    *("--cluster-node-timeout", str(NODE_TIMEOUT_MS)),
    *("--cluster-replica-validity-factor", "0"),  # a replica may take over, however old its data
    *("--repl-diskless-sync-delay", "0"),
)

T = TypeVar("T")


def eventually(
    look: Callable[[], T], *, within: float = _PATIENCE, every: float = 0.01, what: str = ""
) -> T:
    """What `look` returns as soon as that is true; a server that cannot be asked is false.

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
    """A client of a server that answers in text, without retries, and soon."""
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
    """What a server says it is: "master", "slave" or "sentinel"."""
    with asking(server) as client:
        return str(client.execute_command("ROLE")[0])


def connections(server: Server, name: str) -> int:
    """How many clients of a server have this name."""
    with asking(server) as client:
        return sum(each["name"] == name for each in client.client_list())


@contextmanager
def mended(*broken: Server) -> Iterator[None]:
    """Afterwards, start what was killed, and let what was paused go on."""
    try:
        yield
    finally:
        for node in broken:
            if node._process is None:
                node.start()
            else:
                node.resume()


def offset(server: Server) -> int:
    """How far a master or a replica is in the stream of writes that replicas follow."""
    with asking(server) as client:
        info = client.info("replication")
    return int(info.get("slave_repl_offset", info["master_repl_offset"]))


def disconnected(servers: Sequence[Server], name: str) -> None:
    """Wait until no server has a client of this name."""
    eventually(lambda: not any(connections(server, name) for server in servers))


class Cluster:
    """A cluster of several nodes. `cluster` makes one.

    Attributes:
        nodes: All of its nodes, in whatever state they are.
    """

    def __init__(self, nodes: Sequence[Server]) -> None:
        self.nodes = list(nodes)

    def node(self, port: int) -> Server:
        """The node that has this port."""
        return next(node for node in self.nodes if node.port == port)

    def masters(self) -> list[Server]:
        """The nodes that serve slots, as the first one that answers sees it."""
        return list(dict.fromkeys(master for _, _, master, *_ in self.map()))

    def replicas(self, master: Server) -> list[Server]:
        """The replicas of a master, as the first node that answers sees it."""
        return [each for _, _, owner, *rest in self.map() if owner is master for each in rest]

    def owner(self, slot: int) -> Server:
        """The master that serves a slot, as the first node that answers sees it."""
        (owner,) = (master for low, high, master, *_ in self.map() if low <= slot <= high)
        return cast("Server", owner)

    def map(self, asked: Server | None = None) -> list[Any]:
        """Ranges of slots, each as its first and last one, its master and its replicas."""
        for node in [asked] if asked else self.nodes:
            with suppress(redis.RedisError, OSError):
                return [
                    (low, high, *(self.node(each[1]) for each in nodes))
                    for low, high, *nodes in ask(node, "CLUSTER", "SLOTS")
                ]
        message = "no node answers"
        raise redis.ConnectionError(message)

    def settle(self) -> None:
        """Wait until every node is there, and all serve, and agree on, all slots."""
        eventually(self._is_settled, what="that all nodes of the cluster agree")

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
        """Forget every key, so that a test begins with an empty cluster."""
        for master in self.masters():
            master.flush()

    def age(self, seconds: float) -> None:
        """See `servers.age`."""
        for master in self.masters():
            with master.client() as client:
                age(client, seconds)

    @contextmanager
    def moving(self, slot: int, target: Server) -> Iterator[Server]:
        """A slot is on the move to another node while the block runs, and has been moved then.

        Meanwhile its old owner, which this yields, answers ASK for keys that it does not have. The
        nodes that have no part in it hear of the new owner by and by.
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
        """Move a slot, and all that is stored in it, to another node."""
        with self.moving(slot, target):
            pass


def move_keys(keys: Sequence[str], source: Server, target: Server) -> None:
    """Move keys to another node, in one go."""
    ask(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)


@contextmanager
def cluster(binary: Path, *options: str, masters: int = 3, replicas: int = 0) -> Iterator[Cluster]:
    """A cluster that runs for as long as the block does, with all slots spread evenly.

    It takes two seconds: for so long, a master that has just been started serves nothing.

    Args:
        binary: What to run; see `servers.binaries`.
        options: The command line of each node, besides what makes it one.
        masters: How many masters there are.
        replicas: How many replicas each of them has.
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
            node.flush()  # replicas that have seen no write are not listed by every server
        made.settle()
        yield made


def node_id(server: Server) -> str:
    """What a node of a cluster calls itself."""
    return str(ask(server, "CLUSTER", "MYID"))


def _says_ok(node: Server) -> bool:
    info = ask(node, "CLUSTER", "INFO")  # a dict or a text, as the driver likes
    return "ok" in (info["cluster_state"] if isinstance(info, dict) else info.split()[0])


def _is_in_sync(replica: Server) -> bool:
    with asking(replica) as client:
        return bool(client.info("replication").get("master_link_status") == "up")


class Watched:
    """A master and its replica, which Sentinels watch. `watched` makes one.

    Attributes:
        servers: The two, whichever of them is the master.
        sentinels: Those who watch.
        ports: Where they listen.
    """

    def __init__(self, servers: Sequence[Server], sentinels: Sequence[Server]) -> None:
        self.servers = list(servers)
        self.sentinels = list(sentinels)
        self.ports = [sentinel.port for sentinel in sentinels]

    def master(self) -> Server:
        """The server that the Sentinels agree on as the master, and that says so itself."""
        master = eventually(self._master, what="that the Sentinels agree")
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
        """Wait until the other server is a replica in sync, and every Sentinel knows that."""
        eventually(self._is_settled, what="that every Sentinel could fail over")

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
        """Tell a Sentinel to make the replica the master; that takes a moment."""
        eventually(lambda: self._of(self.sentinels[0], "FAILOVER"), what="a failover's begin")

    @staticmethod
    def _of(sentinel: Server, what: str) -> Any:
        return ask(sentinel, "SENTINEL", what, SENTINEL_NAME)


@contextmanager
def watched(binary: Path) -> Iterator[Watched]:
    """A master, a replica and three Sentinels, who find out in 300 ms that the master is down.

    It is the first Sentinel that brings about a failover.

    Args:
        binary: What to run; see `servers.binaries`.
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
            config = directory / f"sentinel-{number}.conf"  # it is theirs: they write to it
            # One of them leads, when two agree that the master is down. If all did, they would now
            # and then all vote for themselves, and try again much later.
            quorum = 2 if number == 0 else 4
            config.write_text(
                f"sentinel monitor {SENTINEL_NAME} 127.0.0.1 {master.port} {quorum}\n"
                f"sentinel down-after-milliseconds {SENTINEL_NAME} 300\n"
                f"sentinel failover-timeout {SENTINEL_NAME} 2000\n"
            )
            ready = "+monitor master"
            sentinel = stack.enter_context(running(binary, str(config), "--sentinel", ready=ready))
            # They find each other, and out about changes, by looking every so often. Four times the
            # publish period has to be more than the second in which they notice a promotion: else
            # those who have not been told of it yet undo it.
            for period, milliseconds in (("info", 100), ("ask", 100), ("publish", 500)):
                ask(sentinel, "SENTINEL", "DEBUG", f"{period}-period", milliseconds)
            sentinels.append(sentinel)
        made = Watched([master, replica], sentinels)
        made.settle()
        yield made


@dataclass(frozen=True)
class Secured:
    """A server that is spoken to in TLS, and asks for a certificate. `secured` makes one.

    Attributes:
        server: The server.
        port: Where it speaks TLS, at 127.0.0.1, which is also what its certificate is for.
        ca: The file of the authority that signed its certificate, and whose clients it accepts.
        certificate: The file of a client's certificate.
        key: The file of that certificate's key.
        stranger_ca: The file of an authority that has nothing to do with it.
    """

    server: Server
    port: int
    ca: Path
    certificate: Path
    key: Path
    stranger_ca: Path


def speaks_tls(binary: Path) -> bool:
    """Whether a server was built with TLS: it then misses a certificate, and else TLS itself."""
    said = subprocess.run(  # noqa: S603 - ours
        [binary, "--port", "0", "--tls-port", str(free_port())],
        capture_output=True,
        check=False,
        timeout=_PATIENCE,
    )
    return b"No tls-cert-file configured" in said.stdout + said.stderr


@contextmanager
def secured(binary: Path) -> Iterator[Secured]:
    """A server behind TLS: its own, or, where it was built without, that of a proxy before it."""
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
    """Ends TLS, and hands what is inside to a server on another port; in a thread of its own."""
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
