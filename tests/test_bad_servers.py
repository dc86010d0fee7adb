"""Servers that are not there, or refuse: each says why, and no error or log tells a secret.

After each of them it is checked that nothing was stored and nothing was lost. The servers are real.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import quote

import anyio
import msgspec
import pytest
import redis
from redis.asyncio import Redis

from aiosessions import (
    JsonCodec,
    RedisStorage,
    Session,
    StorageUnavailable,
    When,
)
from tests.refusals import (
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
from tests.servers import Server, binaries, deaf_port, running


@pytest.fixture(scope="module", params=binaries())
def secured(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that asks for a password, with users who may do this and that."""
    with running(binaries()[request.param]) as server:
        with server.client() as client:
            # The name is given to connections that a storage makes for itself.
            reads = ["+getex", "+client|setname"]
            writes = [*reads, "+set", "+evalsha", "+eval", "+getrange", "+setrange"]
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


def url_of(server: Server, user: str = "", password: str | None = PASSWORD) -> str:
    """The server's URL with credentials in it."""
    credentials = "" if password is None else f"{user}:{quote(password, safe='')}@"
    return f"redis://{credentials}127.0.0.1:{server.port}/0"


@contextmanager
def kept(client: "redis.Redis") -> Iterator[Session[Any]]:
    """A session in the server's database, of which nothing may be lost in the block."""
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


# Who asks, and what the error says.
INTRUDERS: dict[str, tuple[str, str | None, str]] = {
    "wrong-password": ("", "Zq7-wrong-Xv9", "password"),
    "wrong-password-of-a-user": ("sessions", "Zq7-wrong-Xv9", "password"),
    "password-of-nobody-known": ("Fd4", "Zq7-wrong-Xv9", "password"),
    "no-password": ("", None, "asks for a password"),
    "disabled-user": ("disabled", PASSWORD, "password"),
    "no-rights": ("nobody", PASSWORD, "may not run a command, or use a key"),
    "no-right-to-the-keys": ("stranger", PASSWORD, "may not run a command, or use a key"),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize(("user", "password", "hint"), INTRUDERS.values(), ids=INTRUDERS)
async def test_a_server_that_lets_nobody_in(
    secured: Server,
    verb: Verb,
    user: str,
    password: str | None,
    hint: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Wrong or missing credentials and rights: `StorageUnavailable`, and no password is told."""
    caplog.set_level(logging.DEBUG)
    with (
        redis.Redis(port=secured.port, password=PASSWORD) as client,
        kept(client) as session,
    ):
        async with RedisStorage[Any].from_url(url_of(secured, user, password), ttl=60) as storage:
            await refused(verb, storage, session, StorageUnavailable, hint)

    assert [secret for secret in SECRETS if secret in caplog.text] == []


@pytest.mark.parametrize("user", ["", "default", "sessions"])
async def test_the_right_password_is_enough(secured: Server, user: str) -> None:
    """Any password, quoted in the URL; a user needs a few commands and the prefix, and no more."""
    async with RedisStorage[Any].from_url(url_of(secured, user), ttl=60) as storage:
        session = secretive()
        for when in (When.ALWAYS, When.PRESENT, When.UNCHANGED):
            await storage.store(session, when=when)
        assert await storage.load(ID) == session
        assert await storage.delete(ID) is True
        await storage.store(session, when=When.ABSENT)
        assert await storage.delete(ID) is True


async def test_a_user_may_be_a_reader_only(secured: Server) -> None:
    """What the user may do works, what it may not do is said to be refused."""
    with (
        redis.Redis(port=secured.port, password=PASSWORD) as client,
        kept(client) as session,
    ):
        async with RedisStorage[Any].from_url(url_of(secured, "reader"), ttl=600) as storage:
            for verb in (WRITES | DELETES).values():
                await refused(verb, storage, session, StorageUnavailable, "may not run a command")
            assert (await storage.load(ID)).data == session.data


async def test_rights_inside_a_script_count(secured: Server) -> None:
    """A user who may run scripts, but not delete, cannot delete; the server says it its own way."""
    with (
        redis.Redis(port=secured.port, password=PASSWORD) as client,
        kept(client) as session,
    ):
        async with RedisStorage[Any].from_url(url_of(secured, "writer"), ttl=600) as storage:
            await refused(
                DELETES["delete"], storage, session, StorageUnavailable, "may not run a command"
            )


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
async def test_no_server(verb: Verb, caplog: pytest.LogCaptureFixture) -> None:
    """Where nobody listens, every verb says that it could not connect."""
    caplog.set_level(logging.DEBUG)
    with deaf_port() as port:
        url = f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{port}"
        async with RedisStorage[Any].from_url(url, ttl=60) as storage:
            await refused(verb, storage, secretive(), StorageUnavailable, "connection")

    assert [secret for secret in SECRETS if secret in caplog.text] == []


async def test_no_socket() -> None:
    """Nor is there a server behind a path that does not exist."""
    url = f"unix://:{quote(PASSWORD, safe='')}@/nonexistent/socket"
    async with RedisStorage[Any].from_url(url, ttl=60) as storage:
        await refused(VERBS["load"], storage, secretive(), StorageUnavailable, "connection")


@pytest.fixture(scope="module", params=binaries())
def troubled(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that tests may configure to their liking; each puts it back in order."""
    # Else a master waits for more replicas before it serves the first.
    with running(binaries()[request.param], "--repl-diskless-sync-delay", "0") as server:
        yield server


async def all_refused(
    troubled: Server, session: Session[Any], verbs: dict[str, Verb], hint: str
) -> None:
    """Check that these verbs are refused, for this reason."""
    async with RedisStorage[Any].from_url(troubled.url, ttl=600) as storage:
        for verb in verbs.values():
            await refused(verb, storage, session, StorageUnavailable, hint)


def met(session: Session[Any]) -> dict[str, Verb]:
    """The writes, each in a case where its condition is met, so that only the server objects."""
    new = msgspec.structs.replace(session, id=f"{ID}-new")
    return WRITES | {"store-absent": lambda storage, _: storage.store(new, when=When.ABSENT)}


async def test_a_read_only_replica(troubled: Server) -> None:
    """Not even a load works there, as it renews the TTL.

    Nor does a write whose condition does not hold there: a replica may be behind, so what it does
    not have is not "not found", and what it has need not be there any more.
    """
    with (
        running(troubled.binary, "--replicaof", "127.0.0.1", str(troubled.port)) as replica,
        troubled.client() as client,
        kept(client) as session,
    ):
        with replica.client() as observer, anyio.fail_after(15):
            while client.dbsize() != observer.dbsize():  # noqa: ASYNC110 - a server raises no event
                await anyio.sleep(0.01)
        outdated = msgspec.structs.replace(session, revision="another-revision")
        unknown = msgspec.structs.replace(session, id=f"{ID}-unknown")
        for each in (session, outdated, unknown):
            await all_refused(replica, each, VERBS, "read-only replica")


async def test_a_replica_without_its_master(troubled: Server) -> None:
    """A replica that has lost its master, and is not to serve stale data, is no storage either."""
    stale = ("--replica-serve-stale-data", "no")
    with (
        deaf_port() as port,
        running(troubled.binary, "--replicaof", "127.0.0.1", str(port), *stale) as replica,
    ):
        await all_refused(replica, secretive(), VERBS, "replica")


async def test_a_server_that_is_out_of_memory(troubled: Server) -> None:
    """No write is applied, and it is said why; what is stored can still be loaded and deleted."""
    with troubled.client() as client, kept(client) as session:
        client.config_set("maxmemory", "1")
        try:
            await all_refused(troubled, session, met(session), "out of memory")
            async with RedisStorage[Any].from_url(troubled.url, ttl=600) as storage:
                assert (await storage.load(ID)).data == session.data
        finally:
            client.config_set("maxmemory", "0")


async def test_a_server_with_too_few_replicas(troubled: Server) -> None:
    """A server that is to have replicas, and has none, accepts no writes; a load is one."""
    with troubled.client() as client, kept(client) as session:
        client.config_set("min-replicas-to-write", "1")
        try:
            verbs = READS | met(session) | DELETES
            await all_refused(troubled, session, verbs, "too few replicas")
        finally:
            client.config_set("min-replicas-to-write", "0")


async def test_a_server_that_is_busy_with_a_script(troubled: Server) -> None:
    """A script of somebody else's that does not end blocks everybody: it is said to be that."""
    with troubled.client() as client, kept(client) as session:
        client.config_set("lua-time-limit", "1")
        async with Redis.from_url(troubled.url) as other, anyio.create_task_group() as tasks:

            async def loop() -> None:
                with suppress(redis.ResponseError):  # as it is killed
                    await other.eval("while true do end", 0)

            tasks.start_soon(loop)
            try:
                with anyio.fail_after(10):
                    while not is_busy(client):  # noqa: ASYNC110 - a server raises no event
                        await anyio.sleep(0.01)
                await all_refused(troubled, session, VERBS, "busy with a script")
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
async def test_a_server_that_is_too_old(binary: Any) -> None:
    """A server without GETEX quotes the whole command, id and all; we do not."""
    with (
        running(binary, "--rename-command", "GETEX", "") as server,
        server.client() as client,
        kept(client) as session,
    ):
        await all_refused(server, session, READS, "has no GETEX")


async def test_something_that_is_no_such_server(caplog: pytest.LogCaptureFixture) -> None:
    """A port where another protocol is spoken: `StorageUnavailable`, and no secret in a log."""
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
        url = f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{port}"
        async with RedisStorage[Any].from_url(url, ttl=60, timeout=2) as storage:
            for verb in VERBS.values():
                await refused(verb, storage, secretive(), StorageUnavailable, "")
        tasks.cancel_scope.cancel()

    assert [secret for secret in SECRETS if secret in caplog.text] == []


async def test_a_borrowed_client_with_a_wrong_password(secured: Server) -> None:
    """What a borrowed client was given is as little told as what a URL holds."""
    async with (
        Redis(port=secured.port, username="sessions", password="Zq7-wrong-Xv9") as client,
        RedisStorage[Any](client, ttl=60) as storage,
    ):
        assert [piece for piece in PIECES if piece in repr(storage)] == []
        for verb in VERBS.values():
            await refused(verb, storage, secretive(), StorageUnavailable, "password")
