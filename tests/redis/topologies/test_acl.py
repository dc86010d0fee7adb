"""A user with the rights in docs/connecting.md can use a storage, and can do nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import redis
from redis.asyncio import Redis

from aiosessions import RedisStorage, Session, StorageUnavailable, When, new_session_id
from tests.support.clients import Caller, cluster_client, ids_in, key_of, slot_of, timed_outcome
from tests.support.connecting import acl_commands, kinds, run_block
from tests.support.listening import Listener
from tests.support.secrets import said_by
from tests.support.servers import Server
from tests.support.topologies import Cluster, ask, asking

ON_A_SERVER, ON_A_NODE = acl_commands()
NAME, PASSWORD = "sessions", "secret"

# The commands that need no right.
ALWAYS = {"auth", "hello", "quit", "reset"}


def rights(command: list[str]) -> list[str]:
    """The commands and the channels that an ACL SETUSER command allows."""
    return [word for word in command if word.startswith(("+", "&"))]


@contextmanager
def user(*servers: Server, command: list[str]) -> Iterator[None]:
    """A user that exists during the block, made with the command of the documentation."""
    try:
        for server in servers:
            ask(server, *command)
        yield
    finally:
        for server in servers:
            ask(server, "ACL", "DELUSER", command[2])


@pytest.fixture
def server(redis_or_valkey: Server) -> Iterator[Server]:
    """Each available server, empty, with the user of the documentation."""
    redis_or_valkey.flush()
    with user(redis_or_valkey, command=ON_A_SERVER):
        ask(redis_or_valkey, "ACL", "LOG", "RESET")
        yield redis_or_valkey


def storage_on(
    server: Server, password: str = PASSWORD, database: int = 0, ttl: float = 60
) -> RedisStorage[Any]:
    """A storage that authenticates as the user."""
    url = f"redis://{NAME}:{password}@127.0.0.1:{server.port}/{database}"
    return RedisStorage.from_url(url, ttl=ttl)


async def use(storage: RedisStorage[Any], server: Server) -> Caller:
    """Use all verbs, first on a server that does not know the scripts, and with a deadline."""
    ask(server, "SCRIPT", "FLUSH")
    caller = Caller(storage, new_session_id)
    await caller.use_all_verbs()
    session = Session[Any](id=new_session_id())
    session.expires_at = session.created_at + timedelta(hours=1)
    if (await timed_outcome(storage.store(session, when=When.ABSENT)))[0]:
        caller.unavailable.append(0)
    await caller.use_principal()
    # A longer TTL needs a longer lease.
    owned = Session[Any](id=new_session_id(), principal="alice")
    await timed_outcome(storage.store(owned))
    async with storage_on(server, ttl=600) as patient:
        if type((await timed_outcome(patient.load(owned.id)))[0]) is StorageUnavailable:
            caller.unavailable.append(0)
    return caller


def refusals(server: Server) -> set[str]:
    """The commands that a server has refused."""
    with server.client() as client:
        return {str(entry["object"]) for entry in client.acl_log()}


def test_page_has_these_rights_and_examples() -> None:
    """A command for one server, one with more rights for nodes, and an example for each kind."""
    assert ON_A_NODE[: len(ON_A_SERVER)] == ON_A_SERVER
    assert {"SETUSER", NAME, f">{PASSWORD}", "~session:*", "&session:*"} < set(ON_A_SERVER)
    assert kinds() == ["unix", "tls", "acl", "sentinel", "cluster"]


def test_documented_example_runs(server: Server) -> None:
    """The example of the documentation works with the address of this server."""
    run_block("acl", {"localhost:6379": f"127.0.0.1:{server.port}"})

    assert ask(server, "DBSIZE") == 1


async def test_rights_are_enough(server: Server) -> None:
    """All verbs work, and the server refuses only the introduction of redis-py."""
    async with storage_on(server) as storage:
        caller = await use(storage, server)

    assert caller.wrong == []
    assert caller.unavailable == []
    assert refusals(server) <= {"client", "client|setinfo"}


@pytest.mark.usefixtures("short_bridge")
@pytest.mark.parametrize("right", rights(ON_A_SERVER))
async def test_every_right_is_needed(server: Server, right: str) -> None:
    """Without any of the rights, some verbs are `StorageUnavailable`."""
    ask(server, *[word for word in ON_A_SERVER if word != right])

    async with storage_on(server) as storage:
        caller = await use(storage, server)

    assert caller.unavailable != []


async def test_refusal_has_the_reason_and_no_secret(server: Server) -> None:
    """The error of a missing right or a wrong password holds neither id nor password."""
    ask(server, *[word for word in ON_A_SERVER if word != "+getex"])
    id = new_session_id()

    async with storage_on(server) as storage:
        error, _ = await timed_outcome(storage.load(id))
    async with storage_on(server, password="not-" + PASSWORD) as storage:
        other, _ = await timed_outcome(storage.load(id))

    assert isinstance(error, StorageUnavailable)
    assert isinstance(other, StorageUnavailable)
    assert "may not run GETEX" in str(error) or "may not run a command" in str(error)
    assert "user name or password" in str(other)
    assert not any(secret in said_by(each) for each in (error, other) for secret in (id, PASSWORD))


async def test_other_prefix_is_refused(server: Server) -> None:
    """The rights are for the keys of one prefix."""
    async with (
        Redis(port=server.port, username=NAME, password=PASSWORD) as client,
        RedisStorage[Any](client, ttl=60, key_prefix="other:") as storage,
    ):
        caller = await use(storage, server)

    assert len(caller.unavailable) > 10
    assert ask(server, "DBSIZE") == 0


def test_no_other_command_is_allowed(server: Server) -> None:
    """Of all commands of the server, the user may run the named ones, and those without a right."""
    with asking(server) as client:
        names = client.execute_command("COMMAND LIST")
        allowed = {name for name in names if may_run(client, name)}

    assert len(names) > 200
    commands = {right.removeprefix("+") for right in rights(ON_A_SERVER) if right[0] == "+"}
    assert allowed == ALWAYS | commands


def may_run(client: Any, name: str) -> bool:
    """Whether the user may run a command with any arguments."""
    for count in range(10):
        arguments = [*name.split("|"), *["other:x"] * count]
        try:
            answer = client.execute_command("ACL DRYRUN", NAME, *arguments)
        except redis.ResponseError as error:
            answer = str(error)
        if "wrong number of arguments" not in answer.lower():
            # The name of a group of commands, such as CONFIG, is "not found".
            return "no permissions to run" not in answer and "not found" not in answer
    raise AssertionError(name)


async def test_ping_and_databases_need_more_rights(server: Server) -> None:
    """The page names the rights for a readiness check and for another database."""
    ask(server, *ON_A_SERVER, "+info", "+select")

    async with storage_on(server, database=1) as storage:
        (health,) = await storage.ping()
        await storage.store(Session(id="mine"))

    assert health.version
    with server.client() as client:
        client.select(1)
        assert client.exists(key_of("mine"))


async def test_cache_needs_more_rights(server: Server) -> None:
    """The page names the rights for the announcements; without one of them, none are trusted."""
    rights = ["+subscribe", "+ping"]
    for missing, state in (("", "resumed"), *((each, "interrupted") for each in rights)):
        ask(server, *ON_A_SERVER, *[right for right in rights if right != missing])
        async with storage_on(server) as storage:
            listener = Listener(storage)
            await timed_outcome(storage.load("absent"))
            await listener.until(state)
            assert listener.states == [state]


async def test_driver_may_introduce_itself(server: Server) -> None:
    """With the right that the page names for redis-py, a server that knows it refuses nothing."""
    if "client|setinfo" not in ask(server, "COMMAND LIST"):
        with pytest.raises(redis.ResponseError, match="Unknown command"):
            ask(server, *ON_A_SERVER, "+client|setinfo")
        return
    ask(server, *ON_A_SERVER, "+client|setinfo")

    async with storage_on(server) as storage:
        await storage.store(Session(id="mine"))

    assert refusals(server) == set()


@pytest.mark.parametrize(
    "command",
    [
        "GETEX other:x",
        "SET other:x 1",
        "DEL session:x other:x",
        "EVAL redis.call('GETEX','other:x') 0",
        "EVAL redis.call('SET','other:x','1') 0",
        "EVAL redis.call('GET',KEYS[1]) 1 session:x",
        "EVAL redis.call('KEYS','*') 0",
        "EVAL redis.call('FLUSHALL') 0",
    ],
)
def test_other_keys_and_scripts_are_refused(server: Server, command: str) -> None:
    """A script has the rights of its user only."""
    with server.client() as client:
        client.mset({"other:x": "theirs", "session:x": "mine"})
    restricted = redis.Redis(port=server.port, username=NAME, password=PASSWORD)
    refusal = r"(?i)permission|ACL failure in script|the user executing the script can't"
    with restricted, pytest.raises(redis.ResponseError, match=refusal):
        restricted.execute_command(*command.split(" "))  # type: ignore[no-untyped-call]

    with server.client() as client:
        assert client.mget("other:x", "session:x") == [b"theirs", b"mine"]


async def use_cluster(nodes: Cluster) -> Caller:
    """Use all verbs in a slot before, during and after its move to the other node."""
    nodes.ask_all("SCRIPT", "FLUSH")
    slot = slot_of(new_session_id())
    ids = ids_in(slot)
    target = next(node for node in nodes.nodes if node is not nodes.owner(slot))
    async with (
        cluster_client(nodes.nodes[0].port, username=NAME, password=PASSWORD) as client,
        RedisStorage[Any](client, ttl=60) as storage,
    ):
        caller = Caller(storage, lambda: next(ids))
        if type((await timed_outcome(storage.load(next(ids))))[0]) is StorageUnavailable:
            caller.unavailable.append(0)
            return caller
        await caller.use_all_verbs()
        with nodes.moving(slot, target):
            await caller.use_all_verbs()
        await caller.use_all_verbs()
        await caller.use_principal()
    return caller


async def test_rights_are_enough_in_a_cluster(nodes: Cluster) -> None:
    """All verbs work, also while a slot moves."""
    with user(*nodes.nodes, command=ON_A_NODE):
        caller = await use_cluster(nodes)

    assert caller.wrong == []
    assert caller.unavailable == []


@pytest.mark.parametrize("right", rights(ON_A_NODE[len(ON_A_SERVER) :]))
async def test_every_right_is_needed_in_a_cluster(nodes: Cluster, right: str) -> None:
    """Without any of the rights for clusters, some commands are refused."""
    nodes.ask_all("ACL", "LOG", "RESET")
    with user(*nodes.nodes, command=[word for word in ON_A_NODE if word != right]):
        caller = await use_cluster(nodes)

    refused = {each for node in nodes.nodes for each in refusals(node)}
    assert caller.unavailable or right.removeprefix("+") in refused
