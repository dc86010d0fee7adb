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

from aiosessions import JsonCodec, Session, StorageUnavailable, When
from aiosessions.record import seal
from tests.support.clients import LONG, Storage, key_of, storage_at, use
from tests.support.proxy import until
from tests.support.secrets import (
    DELETES,
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

pytestmark = pytest.mark.usefixtures("short_bridge")

QUOTED = quote(PASSWORD, safe="")


@pytest.fixture(scope="module", params=binaries())
def secured(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with a password, and with users of several rights."""
    with running(binaries()[request.param]) as server:
        with server.client() as client:
            # Connections of `from_url` set their name.
            reads = ["+getex", "+client|setname"]
            scripts = ["+evalsha", "+eval", "+getrange", "+time"]
            index = ["+zadd", "+zrange", "+zrandmember", "+zrem", "+zremrangebyrank"]
            writes = [*reads, "+set", "+publish", "+pexpire", "+pttl", *scripts, *index]
            allowed = [*writes, "+del"]
            for name, rights in {
                "sessions": [*allowed, "~session:*"],
                "mute": [*allowed, "~session:*", "resetchannels"],
                "reader": [*reads, "~session:*"],
                "writer": [*writes, "~session:*"],
                "stranger": [*allowed, "~other:*"],
                "nobody": [],
                "disabled": [*allowed, "~session:*", "off"],
            }.items():
                words = "on", f">{PASSWORD}", "resetchannels", "&session:*", "&other:*", *rights
                client.execute_command("ACL", "SETUSER", name, *words)
            client.config_set("requirepass", PASSWORD)
        yield server


@pytest.fixture(scope="module", params=binaries())
def fragile_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each kind, with settings that a test may change."""
    with running(binaries()[request.param]) as server:
        yield server


def url_of(server: Server, user: str = "", password: str | None = PASSWORD) -> str:
    """The URL of a server, with credentials."""
    credentials = "" if password is None else f"{user}:{quote(password, safe='')}@"
    return f"redis://{credentials}127.0.0.1:{server.port}/0"


@contextmanager
def kept(
    server: Server, password: str | None = None
) -> Iterator[tuple["redis.Redis", Session[Any]]]:
    """Store a session that the block must neither change, renew nor remove."""
    with redis.Redis(port=server.port, password=password) as client:
        client.flushall()
        session = secretive()
        session.revision, _, record = seal(session, JsonCodec[Any]())
        client.set(key_of(ID), record, px=600_000)
        before = contents(client)
        yield client, session
        assert contents(client) == before
        left: Any = client.pttl(key_of(ID))
        assert 500_000 < left <= 600_000


async def all_refused(url: str, session: Session[Any], verbs: dict[str, Verb], hint: str) -> None:
    """Check that all these verbs are unavailable for a reason; none is in doubt."""
    async with storage_at(url, ttl=6_000) as storage:
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
    "no-rights": ("nobody", PASSWORD, "which this storage needs"),
    "other-keys": ("stranger", PASSWORD, "a command, or use a key, that this storage needs"),
}


@pytest.mark.parametrize(("user", "password", "hint"), INTRUDERS.values(), ids=INTRUDERS)
async def test_wrong_credentials_are_unavailable(
    secured: Server, user: str, password: str | None, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The error names the server and the problem; neither it nor the log has a password."""
    caplog.set_level(logging.DEBUG)
    with kept(secured, PASSWORD) as (_, session):
        address = f"(127.0.0.1:{secured.port})"
        await all_refused(url_of(secured, user, password), session, VERBS, f"{hint} {address}")

    assert [secret for secret in SECRETS if secret in caplog.text] == []


async def test_borrowed_client_with_wrong_password_is_unavailable(secured: Server) -> None:
    """The settings of a borrowed client are not revealed either."""
    async with (
        Redis(port=secured.port, username="sessions", password="Zq7-wrong-Xv9") as client,
        Storage(client, ttl=60) as storage,
    ):
        assert [piece for piece in PIECES if piece in repr(storage)] == []
        for verb in VERBS.values():
            await refused(verb, storage, secretive(), StorageUnavailable, "password")


@pytest.mark.parametrize("user", ["", "default", "sessions"])
async def test_right_password_is_enough(secured: Server, user: str) -> None:
    """Any password works in a URL if it is quoted, and a user needs few rights."""
    async with storage_at(url_of(secured, user)) as storage:
        await use(storage)


@pytest.mark.parametrize("protocol", [2, 3])
async def test_credentials_of_a_borrowed_client_are_used(secured: Server, protocol: int) -> None:
    """The connection of the storage authenticates as the user of the client."""
    credentials: dict[str, Any] = {"username": "sessions", "password": PASSWORD}
    async with (
        Redis(port=secured.port, protocol=protocol, **credentials) as client,
        Storage(client, ttl=60) as storage,
    ):
        await use(storage)


async def test_verbs_need_only_their_own_rights(secured: Server) -> None:
    """A reader can load. A user without DEL cannot delete, although only a script runs DEL.

    A user without the channel can load, too, and fails before anything is written.
    """
    with kept(secured, PASSWORD) as (_, session):
        url = url_of(secured, "reader")
        await all_refused(url, session, WRITES | DELETES, "may not run ")
        async with storage_at(url, ttl=600) as storage:
            assert (await storage.load(ID)).data == session.data
        await all_refused(url_of(secured, "writer"), session, DELETES, "may not run ")
        hint = "the user may not use the channel on which this storage announces changes"
        announced = {name: each for name, each in WRITES.items() if name != "store-absent"}
        await all_refused(url_of(secured, "mute"), session, announced | DELETES, hint)


async def test_absent_server_is_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    """Every verb says that the server refuses connections, or that the socket is absent."""
    caplog.set_level(logging.DEBUG)
    with refused_port() as port:
        hint = f"cannot connect: Connection refused (127.0.0.1:{port})"
        await all_refused(f"redis://:{QUOTED}@127.0.0.1:{port}", secretive(), VERBS, hint)
    hint = "cannot connect: No such file or directory (/nonexistent/socket)"
    await all_refused(f"unix://:{QUOTED}@/nonexistent/socket", secretive(), READS, hint)

    assert [secret for secret in SECRETS if secret in caplog.text] == []


async def test_unknown_host_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that name resolution failed, and for which name."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    hint = "the host name sessions.invalid cannot be resolved (sessions.invalid:6379)"
    await all_refused(f"redis://:{QUOTED}@sessions.invalid", secretive(), VERBS, hint)


async def test_unknown_database_is_unavailable(valkey: Server) -> None:
    """The error says that the number of the database is wrong."""
    hint = f"the server has no database of this number (127.0.0.1:{valkey.port})"
    await all_refused(valkey.url.replace("/0", "/4711"), secretive(), VERBS, hint)


async def test_server_of_another_protocol_is_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    """An HTTP server is recognised, and no secret is logged."""
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


async def test_read_only_replica_is_unavailable(fragile: Server) -> None:
    """A replica refuses loads, because they renew the TTL, and cannot judge a condition.

    It may be out of date: a missing session may exist, and an existing one may be deleted. Of 20
    commands in one batch, each one is refused, and none is in doubt.
    """
    with refused_port() as port, kept(fragile) as (client, session):
        client.replicaof("127.0.0.1", port)
        hint = f"the server is a read-only replica (127.0.0.1:{fragile.port})"
        outdated = msgspec.structs.replace(session, revision="another-revision")
        unknown = msgspec.structs.replace(session, id=f"{ID}-unknown")
        for each in (session, outdated, unknown):
            await all_refused(fragile.url, each, VERBS, hint)
        for verb in VERBS.values():
            await all_refused(fragile.url, session, {str(n): verb for n in range(20)}, hint)


async def test_replica_without_its_master_is_unavailable(fragile: Server) -> None:
    """A replica that must not serve stale data refuses everything."""
    with refused_port() as port, fragile.client() as client:
        client.config_set("replica-serve-stale-data", "no")
        client.replicaof("127.0.0.1", port)
        await all_refused(fragile.url, secretive(), VERBS, "the replica has lost its master")


NEW = f"{ID}-new"
CREATE: Verb = lambda storage, session: storage.store(  # noqa: E731 - of a session that is absent
    msgspec.structs.replace(session, id=NEW), when=When.ABSENT
)
LIMITS: dict[str, tuple[str, dict[str, Verb], str]] = {
    "maxclients": ("1", VERBS, "as many clients as it accepts"),
    # Sessions can still be loaded.
    "maxmemory": ("1", WRITES | {"store-absent": CREATE}, "out of memory"),
    "min-replicas-to-write": ("1", VERBS, "too few replicas"),
}


@pytest.mark.parametrize("limit", LIMITS)
async def test_server_at_its_limit_is_unavailable(fragile: Server, limit: str) -> None:
    """No write is applied, and verbs that the server still serves have their results."""
    value, verbs, hint = LIMITS[limit]
    with kept(fragile) as (client, session):
        info: Any = client.info()
        if limit.startswith("min-") and info["redis_version"].startswith("6."):
            verbs = READS  # Redis 6.2 does not check the writes of scripts
        client.config_set(limit, value)
        await all_refused(fragile.url, session, verbs, hint)
        if "load" not in verbs:
            async with storage_at(fragile.url, ttl=600) as storage:
                assert (await storage.load(ID)).data == session.data
        client.config_set(limit, "1000" if limit == "maxclients" else "0")


async def test_busy_server_is_unavailable(fragile: Server) -> None:
    """A script of another program that does not end blocks all clients."""
    with kept(fragile) as (client, session):
        client.config_set("lua-time-limit", "1")
        async with Redis.from_url(fragile.url, socket_timeout=LONG) as other:
            looping = asyncio.ensure_future(other.eval("while true do end", 0))
            await until(lambda: is_busy(client))
            await all_refused(fragile.url, session, VERBS, "busy with a script")
            client.script_kill()
            with pytest.raises(redis.ResponseError, match="killed"):
                await looping


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
    with running(binary, "--rename-command", "GETEX", "") as server, kept(server) as (_, session):
        await all_refused(server.url, session, READS, "has no GETEX: Redis 6.2 or later")
