"""Servers that are absent or refuse: each error says why and where, and reveals no secret.

The servers are real. Each test checks that nothing was stored and nothing was lost.
"""

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import anyio
import msgspec
import pytest
import redis
from redis.asyncio import Redis

from aiosessions import JsonCodec, RedisStorage, Session, StorageUnavailable, When
from tests.support.secrets import (
    DELETES,
    HEADER,
    ID,
    PASSWORD,
    PIECES,
    READS,
    SECRETS,
    VERBS,
    WRITES,
    Verb,
    contents,
    refused,
    secretive,
)
from tests.support.servers import Server, binaries, refused_port, running
from tests.support.topologies import eventually

QUOTED = quote(PASSWORD, safe="")


@pytest.fixture(scope="module", params=binaries())
def secured(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with a password, and with users of several rights."""
    with running(binaries()[request.param]) as server:
        with server.client() as client:
            # Connections of `from_url` set their name.
            reads = ["+getex", "+client|setname"]
            writes = [*reads, "+set", "+evalsha", "+eval", "+getrange"]
            allowed = [*writes, "+del"]
            for name, rights in {
                "sessions": [*allowed, "~session:*"],
                "reader": [*reads, "~session:*"],
                "writer": [*writes, "~session:*"],
                "stranger": [*allowed, "~other:*"],
                "nobody": [],
                "disabled": [*allowed, "~session:*", "off"],
            }.items():
                client.execute_command("ACL", "SETUSER", name, "on", f">{PASSWORD}", *rights)
            client.config_set("requirepass", PASSWORD)
        yield server


@pytest.fixture(scope="module", params=binaries())
def troubled(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with settings that a test may change, and then restores."""
    # Else a master waits for more replicas before it serves the first one.
    with running(binaries()[request.param], "--repl-diskless-sync-delay", "0") as server:
        yield server


def url_of(server: Server, user: str = "", password: str | None = PASSWORD) -> str:
    """The URL of a server, with credentials."""
    credentials = "" if password is None else f"{user}:{quote(password, safe='')}@"
    return f"redis://{credentials}127.0.0.1:{server.port}/0"


def administrator(server: Server) -> "redis.Redis":
    """A client with every right."""
    return redis.Redis(port=server.port, password=PASSWORD)


@contextmanager
def kept(client: "redis.Redis") -> Iterator[Session[Any]]:
    """Store a session that the block must neither change, renew nor remove."""
    client.flushall()
    session = secretive()
    record = HEADER + JsonCodec[Any]().encode(session)
    session.revision = record[1:17].decode()
    client.set(f"session:{ID}", record, px=600_000)
    before = contents(client)
    yield session
    assert contents(client) == before
    left: Any = client.pttl(f"session:{ID}")
    assert 500_000 < left <= 600_000


async def all_refused(
    url: str, session: Session[Any], verbs: dict[str, Verb], hint: str, **settings: Any
) -> None:
    """Check that all these verbs are unavailable for a reason; none is in doubt."""
    async with RedisStorage[Any].from_url(url, ttl=600, **settings) as storage:
        await asyncio.gather(
            *(refused(verb, storage, session, StorageUnavailable, hint) for verb in verbs.values())
        )


# Servers that refuse the connection or the user.

INTRUDERS: dict[str, tuple[str, str | None, str]] = {
    "wrong-password": ("", "Zq7-wrong-Xv9", "refuses the user name or password"),
    "wrong-password-of-a-user": ("sessions", "Zq7-wrong-Xv9", "refuses the user name or password"),
    "password-of-unknown-user": ("Fd4", "Zq7-wrong-Xv9", "refuses the user name or password"),
    "no-password": ("", None, "asks for a password"),
    "disabled-user": ("disabled", PASSWORD, "refuses the user name or password"),
    "no-rights": ("nobody", PASSWORD, "may not run a command, or use a key"),
    "no-right-to-the-keys": ("stranger", PASSWORD, "may not run a command, or use a key"),
}


@pytest.mark.parametrize(("user", "password", "hint"), INTRUDERS.values(), ids=INTRUDERS)
async def test_wrong_credentials_are_unavailable(
    secured: Server,
    user: str,
    password: str | None,
    hint: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The error names the server and the problem; neither it nor the log has a password."""
    caplog.set_level(logging.DEBUG)
    with administrator(secured) as client, kept(client) as session:
        message = f"{hint}, that this storage needs" if "key" in hint else hint
        await all_refused(
            url_of(secured, user, password),
            session,
            VERBS,
            f"{message} (127.0.0.1:{secured.port})",
        )

    assert [secret for secret in SECRETS if secret in caplog.text] == []


async def test_borrowed_client_with_wrong_password_is_unavailable(secured: Server) -> None:
    """The settings of a borrowed client are not revealed either."""
    async with (
        Redis(port=secured.port, username="sessions", password="Zq7-wrong-Xv9") as client,
        RedisStorage[Any](client, ttl=60) as storage,
    ):
        assert [piece for piece in PIECES if piece in repr(storage)] == []
        for verb in VERBS.values():
            await refused(verb, storage, secretive(), StorageUnavailable, "password")


@pytest.mark.parametrize("user", ["", "default", "sessions"])
async def test_right_password_is_enough(secured: Server, user: str) -> None:
    """Any password works in a URL if it is quoted, and a user needs few rights."""
    async with RedisStorage[Any].from_url(url_of(secured, user), ttl=60) as storage:
        session = secretive()
        for when in (When.ALWAYS, When.PRESENT, When.UNCHANGED):
            await storage.store(session, when=when)
        assert await storage.load(ID) == session
        assert await storage.delete(ID) is True


async def test_user_may_be_a_reader(secured: Server) -> None:
    """The verbs that the user has the rights for work; the others are refused."""
    with administrator(secured) as client, kept(client) as session:
        url = url_of(secured, "reader")
        await all_refused(url, session, WRITES | DELETES, "may not run a command")
        async with RedisStorage[Any].from_url(url, ttl=600) as storage:
            assert (await storage.load(ID)).data == session.data


async def test_rights_in_a_script_count(secured: Server) -> None:
    """A user without DEL cannot delete, although only the script runs DEL."""
    with administrator(secured) as client, kept(client) as session:
        await all_refused(url_of(secured, "writer"), session, DELETES, "may not run a command")


async def test_absent_server_is_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    """Every verb says that the server refuses connections."""
    caplog.set_level(logging.DEBUG)
    with refused_port() as port:
        hint = f"cannot connect: Connection refused (127.0.0.1:{port})"
        await all_refused(f"redis://:{QUOTED}@127.0.0.1:{port}", secretive(), VERBS, hint)

    assert [secret for secret in SECRETS if secret in caplog.text] == []


async def test_absent_socket_is_unavailable() -> None:
    """The error names the path of the unix socket."""
    hint = "cannot connect: No such file or directory (/nonexistent/socket)"
    await all_refused(f"unix://:{QUOTED}@/nonexistent/socket", secretive(), READS, hint)


async def test_unknown_host_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that name resolution failed, and for which name."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    hint = "the host name sessions.invalid cannot be resolved (sessions.invalid:6379)"
    url = f"redis://:{QUOTED}@sessions.invalid"
    await all_refused(url, secretive(), VERBS, hint, timeout=0.2)


async def test_unknown_database_is_unavailable(troubled: Server) -> None:
    """The error says that the number of the database is wrong."""
    hint = f"the server has no database of this number (127.0.0.1:{troubled.port})"
    await all_refused(troubled.url.replace("/0", "/4711"), secretive(), VERBS, hint)


async def test_full_server_is_unavailable(troubled: Server) -> None:
    """The error says that the server accepts no more clients."""
    with troubled.client() as client, kept(client) as session:
        client.config_set("maxclients", "1")
        try:
            await all_refused(troubled.url, session, VERBS, "as many clients as it accepts")
        finally:
            client.config_set("maxclients", "1000")


async def test_server_of_another_protocol_is_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    """An HTTP server, say, is recognised as such, and no secret is logged."""
    caplog.set_level(logging.DEBUG)

    async def speak(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while await stream.receive():
                    await stream.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listener.serve, speak)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)  # noqa: S610 - not Django's
        hint = "the answer is not in the protocol of Redis; if the server uses TLS"
        await all_refused(f"redis://:{QUOTED}@127.0.0.1:{port}", secretive(), VERBS, hint)
        tasks.cancel_scope.cancel()

    assert [secret for secret in SECRETS if secret in caplog.text] == []


# Servers that refuse the commands.


def met(session: Session[Any]) -> dict[str, Verb]:
    """The writes, each with its condition met, so that only the server objects."""
    new = msgspec.structs.replace(session, id=f"{ID}-new")
    return WRITES | {"store-absent": lambda storage, _: storage.store(new, when=When.ABSENT)}


@contextmanager
def replica_of(master: Server) -> Iterator[Server]:
    """A replica that has all keys of its master."""
    with running(master.binary, "--replicaof", "127.0.0.1", str(master.port)) as replica:
        with master.client() as client, replica.client() as observer:
            eventually(lambda: client.dbsize() == observer.dbsize())
        yield replica


async def test_read_only_replica_is_unavailable(troubled: Server) -> None:
    """A replica refuses loads, because they renew the TTL, and cannot judge a condition.

    It may be out of date: a missing session may exist, and an existing one may be deleted.
    """
    with troubled.client() as client, kept(client) as session, replica_of(troubled) as replica:
        hint = f"the server is a read-only replica (127.0.0.1:{replica.port})"
        outdated = msgspec.structs.replace(session, revision="another-revision")
        unknown = msgspec.structs.replace(session, id=f"{ID}-unknown")
        for each in (session, outdated, unknown):
            await all_refused(replica.url, each, VERBS, hint)


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
async def test_batch_refused_by_a_replica_is_not_in_doubt(troubled: Server, verb: Verb) -> None:
    """Of 20 commands in one batch, each one is refused, and none may have been applied."""
    with troubled.client() as client, kept(client) as session, replica_of(troubled) as replica:
        await all_refused(replica.url, session, {str(n): verb for n in range(20)}, "read-only")


async def test_replica_without_its_master_is_unavailable(troubled: Server) -> None:
    """A replica that must not serve stale data refuses everything."""
    stale = ("--replica-serve-stale-data", "no")
    with (
        refused_port() as port,
        running(troubled.binary, "--replicaof", "127.0.0.1", str(port), *stale) as replica,
    ):
        await all_refused(replica.url, secretive(), VERBS, "the replica has lost its master")


async def test_server_without_memory_refuses_writes(troubled: Server) -> None:
    """No write is applied; sessions can still be loaded."""
    with troubled.client() as client, kept(client) as session:
        client.config_set("maxmemory", "1")
        try:
            await all_refused(troubled.url, session, met(session), "out of memory")
            async with RedisStorage[Any].from_url(troubled.url, ttl=600) as storage:
                assert (await storage.load(ID)).data == session.data
        finally:
            client.config_set("maxmemory", "0")


async def test_server_with_too_few_replicas_is_unavailable(troubled: Server) -> None:
    """A server that has fewer replicas than it must have refuses writes and loads."""
    with troubled.client() as client, kept(client) as session:
        client.config_set("min-replicas-to-write", "1")
        try:
            # Redis 6.2 does not check the writes of scripts.
            verbs = READS | {"store-always": WRITES["store-always"]}
            await all_refused(troubled.url, session, verbs, "too few replicas")
        finally:
            client.config_set("min-replicas-to-write", "0")


async def test_busy_server_is_unavailable(troubled: Server) -> None:
    """A script of another program that does not end blocks all clients."""
    with troubled.client() as client, kept(client) as session:
        client.config_set("lua-time-limit", "1")
        async with Redis.from_url(troubled.url) as other, anyio.create_task_group() as tasks:

            async def loop() -> None:
                with suppress(redis.ResponseError):  # the script is killed
                    await other.eval("while true do end", 0)

            tasks.start_soon(loop)
            try:
                with anyio.fail_after(10):
                    while not is_busy(client):  # noqa: ASYNC110 - a server raises no event
                        await anyio.sleep(0.01)
                await all_refused(troubled.url, session, VERBS, "busy with a script")
            finally:
                client.script_kill()


def is_busy(client: "redis.Redis") -> bool:
    """Whether the server refuses commands because of a script."""
    try:
        client.ping()
    except redis.ResponseError as error:
        return "BUSY" in str(error)
    return False


@pytest.mark.parametrize("binary", binaries().values(), ids=binaries())
async def test_old_server_is_unavailable(binary: Path) -> None:
    """A server without GETEX quotes the command with the id; our error does not."""
    with (
        running(binary, "--rename-command", "GETEX", "") as server,
        server.client() as client,
        kept(client) as session,
    ):
        await all_refused(server.url, session, READS, "has no GETEX: Redis 6.2 or later")
