"""Groups of servers for tests: a cluster, and a master with Sentinels.

Invariants:

- All servers listen on free ports at 127.0.0.1. They end with the `with` block, even after an error
  or after servers were killed or paused.
- When a function returns, all nodes, or all Sentinels, agree on the result.
- The functions block. Where an event loop must go on running, call them in a thread.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.servers import Server, running

SLOTS = 16_384
SENTINEL_NAME = "sessions"
QUIET = 30_000
"""A node timeout, in milliseconds, that lets no node fail that only is slow."""

_PATIENCE = 30.0

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

    def masters(self) -> list[Server]:
        """The nodes that serve slots, according to the first node that answers."""
        return list(dict.fromkeys(master for _, _, master, *_ in self.map()))

    def replicas(self, master: Server) -> list[Server]:
        """The replicas of a master, according to the first node that answers."""
        return [each for _, _, owner, *rest in self.map() if owner is master for each in rest]

    def owner(self, slot: int) -> Server:
        """The master of a slot, according to the first node that answers."""
        owner: Server = next(row[2] for row in self.map() if row[0] <= slot <= row[1])
        return owner

    def map(self, asked: Server | None = None) -> list[Any]:
        """The ranges of slots: first slot, last slot, master, replicas."""
        at = {node.port: node for node in self.nodes}
        for node in [asked] if asked else self.nodes:
            with suppress(redis.RedisError, OSError):
                return [
                    (low, high, *(at[each[1]] for each in nodes))
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
            master.age(seconds)

    def ask_all(self, *command: str | int) -> list[Any]:
        """The replies of all nodes to one command."""
        return [ask(node, *command) for node in self.nodes]

    def calls(self, command: str) -> Counter[str]:
        """Count the calls of a command since CONFIG RESETSTAT, and the refused calls."""
        found = Counter[str]()
        for node in self.nodes:
            with asking(node) as client:
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
def cluster(
    binary: Path, *, masters: int = 3, replicas: int = 0, node_timeout: int = 1_000
) -> Iterator[Cluster]:
    """A cluster that runs during the block, with the slots spread evenly.

    The start takes two seconds, because a new master serves nothing for that time.

    Args:
        binary: The path of the program; see `servers.binaries`.
        masters: The number of masters.
        replicas: The number of replicas of each master.
        node_timeout: The milliseconds without an answer after which a node counts as failed.
    """
    options = {
        "cluster-enabled": "yes",
        "cluster-node-timeout": "1000",  # the shorter, the sooner all nodes agree
        "cluster-replica-validity-factor": "0",  # a replica may take over even with old data
        "repl-diskless-sync-delay": "0",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(running(binary, *words)) for _ in range(masters * (1 + replicas))
        ]
        for number, node in enumerate(nodes):
            ask(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < masters:
                low, high = number * SLOTS // masters, (number + 1) * SLOTS // masters - 1
                ask(node, "CLUSTER", "ADDSLOTSRANGE", low, high)
            for other in nodes[:number]:
                ask(node, "CLUSTER", "MEET", "127.0.0.1", other.port)
        for number, node in enumerate(nodes[masters:]):
            master = node_id(nodes[number % masters])
            eventually(partial(ask, node, "CLUSTER", "REPLICATE", master))
        made = Cluster(nodes)
        for node in nodes[masters:]:
            eventually(partial(_is_in_sync, node))
        for node in nodes[:masters]:
            node.flush()  # some servers do not list replicas that have seen no write
        made.settle()
        made.ask_all("CONFIG", "SET", "cluster-node-timeout", node_timeout)
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
        master: Server = eventually(self._master, what="the agreement of the Sentinels")
        return master

    def _master(self) -> Any:
        command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SENTINEL_NAME)
        named = {int(ask(sentinel, *command)[1]) for sentinel in self.sentinels}
        masters = [each for each in self.servers if {each.port} == named and role(each) == "master"]
        return masters[0] if masters else None

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


@contextmanager
def watched(binary: Path) -> Iterator[Watched]:
    """A master, a replica and three Sentinels, which notice after 300 ms that the master is down.

    The first Sentinel starts the failover.

    Args:
        binary: The path of the program; see `servers.binaries`.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aiosessions-")))
        at_once = ("--repl-diskless-sync-delay", "0")
        master = stack.enter_context(running(binary, *at_once))
        of = ("--replicaof", f"127.0.0.1 {master.port}")
        replica = stack.enter_context(running(binary, *at_once, *of))
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
