"""Sessions over TLS, with a private authority and client certificates, and over unix sockets.

The Valkey of the wheel was built without TLS, so a proxy in front of it handles TLS. A Redis on
PATH handles it itself if it was built with TLS.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from redis.asyncio import Redis

from aiosessions import RedisStorage, Session, StorageUnavailable, new_session_id
from tests.support.clients import NAME, Caller, timed_outcome
from tests.support.connecting import run_block
from tests.support.secrets import said_by
from tests.support.servers import Server, binaries, running
from tests.support.topologies import Secured, ask, connections, disconnected, mended, secured

SECRET = "hush-hush"


@pytest.fixture(scope="module", params=binaries())
def server(request: pytest.FixtureRequest) -> Iterator[Secured]:
    """Each available server, with TLS."""
    with secured(binaries()[request.param]) as made:
        yield made


def of_url(url: str) -> RedisStorage[Any]:
    """A storage with an owned client."""
    return RedisStorage.from_url(url, ttl=60, timeout=1.0)


@asynccontextmanager
async def owning(port: int, **options: str | Path) -> AsyncIterator[RedisStorage[Any]]:
    """A storage with an owned client, and all settings in the URL."""
    host = options.pop("host", "127.0.0.1")
    query = urlencode({"client_name": NAME, **options})
    url = f"rediss://{host}:{port}/0?{query}"
    async with of_url(url) as storage:
        yield storage


@asynccontextmanager
async def borrowing(port: int, **options: Any) -> AsyncIterator[RedisStorage[Any]]:
    """A storage that borrows a client."""
    settings = {name: str(value) for name, value in options.items()}
    host = settings.pop("host", "127.0.0.1")
    async with (
        Redis(host=host, port=port, ssl=True, client_name=NAME, **settings) as client,  # type: ignore[arg-type]
        RedisStorage[Any](client, ttl=60, timeout=1.0) as storage,
    ):
        yield storage
        await storage.aclose()


MakeStorage = Callable[..., AbstractAsyncContextManager[RedisStorage[Any]]]


@pytest.fixture(params=[owning, borrowing], ids=["from_url", "borrowed"])
def make(request: pytest.FixtureRequest) -> MakeStorage:
    """A function that makes a storage from a URL or from a borrowed client."""
    made: MakeStorage = request.param
    return made


def identity(server: Secured) -> dict[str, Path]:
    """The certificate of the client, as settings."""
    return {"ssl_certfile": server.certificate, "ssl_keyfile": server.key}


async def refusal(storage: RedisStorage[Any]) -> str:
    """The message of a storage that cannot connect; it must reveal no secret."""
    id = SECRET + new_session_id()
    error, took = await timed_outcome(storage.store(Session(id=id, data=SECRET)))
    assert type(error) is StorageUnavailable
    assert not error.in_doubt
    assert took < 1.5
    assert SECRET not in said_by(error)
    return str(error)


async def test_all_verbs_work_over_tls(server: Secured, make: MakeStorage) -> None:
    """A private authority and a client certificate work, and callers share one connection."""
    async with make(server.port, ssl_ca_certs=server.ca, **identity(server)) as storage:
        callers = [Caller(storage, new_session_id) for _ in range(50)]
        await asyncio.gather(*(caller.use_all_verbs() for caller in callers))
        session = Session[Any](id=new_session_id(), data="x" * 500_000)
        await storage.store(session)

        assert await storage.load(session.id) == session
        assert [error for caller in callers for error in caller.wrong] == []
        assert [error for caller in callers for error in caller.unavailable] == []
        assert connections(server.server, NAME) == 1
    disconnected([server.server], NAME)


def test_documented_tls_example_runs(server: Secured) -> None:
    """The example of the documentation works with the address and the files of this server."""
    server.server.flush()

    run_block(
        "tls",
        {
            "sessions.example.com:6380": f"127.0.0.1:{server.port}",
            "/etc/sessions/ca.pem": str(server.ca),
            "/etc/sessions/client.pem": str(server.certificate),
            "/etc/sessions/client-key.pem": str(server.key),
        },
    )

    assert ask(server.server, "DBSIZE") == 1


async def test_unknown_authority_is_not_trusted(server: Secured, make: MakeStorage) -> None:
    """The message says that the certificate of the server cannot be verified."""
    async with make(server.port, ssl_ca_certs=server.stranger_ca, **identity(server)) as storage:
        assert "certificate verify failed: " in await refusal(storage)


async def test_certificate_for_another_host_is_not_trusted(
    server: Secured, make: MakeStorage
) -> None:
    """The certificate of this server is for 127.0.0.1, not for localhost."""
    settings = {"host": "localhost", "ssl_ca_certs": server.ca, **identity(server)}
    async with make(server.port, **settings) as storage:
        message = await refusal(storage)

    assert "certificate verify failed: " in message
    assert f"(localhost:{server.port})" in message


async def test_client_without_certificate_is_refused(server: Secured, make: MakeStorage) -> None:
    """A server that asks for client certificates refuses other clients."""
    async with make(server.port, ssl_ca_certs=server.ca) as storage:
        assert f"(127.0.0.1:{server.port})" in await refusal(storage)


async def test_certificates_are_read_at_each_connect(
    server: Secured, make: MakeStorage, tmp_path: Path
) -> None:
    """A missing file is unavailable, because it may appear, or be renewed, while a service runs."""
    missing = tmp_path / "ca.pem"
    async with make(server.port, ssl_ca_certs=missing, **identity(server)) as storage:
        message = await refusal(storage)
        assert "a file of the TLS settings cannot be read: No such file" in message

        missing.write_bytes(server.ca.read_bytes())

        assert (await timed_outcome(storage.store(Session(id="mine"))))[0] is None


async def test_error_suggests_no_tls_for_plain_port(server: Secured) -> None:
    """A TLS URL for a server without TLS leads to an error that names the other scheme."""
    async with owning(server.server.port, ssl_ca_certs=server.ca) as storage:
        message = await refusal(storage)

    assert "if the server does not use TLS, the URL begins with redis://" in message
    assert f"(127.0.0.1:{server.server.port})" in message


async def test_error_suggests_tls_for_tls_port(server: Secured) -> None:
    """A plain URL for a server with TLS leads to an error that names the other scheme."""
    async with of_url(f"redis://user:{SECRET}@127.0.0.1:{server.port}") as storage:
        message = await refusal(storage)

    assert "if the server uses TLS, the URL begins with rediss://" in message
    assert f"(127.0.0.1:{server.port})" in message


async def test_storage_reconnects_over_tls(server: Secured, make: MakeStorage) -> None:
    """The storage works again after the server has."""
    async with make(server.port, ssl_ca_certs=server.ca, **identity(server)) as storage:
        await storage.store(Session(id="before"))
        with mended(server.server):
            server.server.kill()
            assert type((await timed_outcome(storage.load("before")))[0]) is StorageUnavailable

        async with asyncio.timeout(20):
            while (await timed_outcome(storage.store(Session(id="after"))))[0]:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)
        assert (await storage.load("after")).id == "after"


@pytest.fixture(scope="module", params=binaries())
def local(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each available server, with a password."""
    with running(binaries()[request.param], "--requirepass", SECRET) as made:
        yield made


async def test_all_verbs_work_over_a_unix_socket(local: Server) -> None:
    """A URL may name the socket, a password and a database."""
    path = local.directory / "socket"
    url = f"unix://:{SECRET}@{path}?db=3&client_name={NAME}"
    async with of_url(url) as storage:
        caller = Caller(storage, new_session_id)
        await caller.use_all_verbs()
        await storage.store(Session(id="mine"))
        assert caller.wrong == []
        assert caller.unavailable == []

    async with Redis(unix_socket_path=str(path), password=SECRET, db=3) as client:
        assert await client.exists("session:mine")
        async with RedisStorage[Any](client, ttl=60) as storage:
            assert (await storage.load("mine")).id == "mine"


def test_documented_unix_socket_example_runs(server: Secured) -> None:
    """The example of the documentation works with the path of this server."""
    plain = server.server
    plain.flush()

    run_block("unix", {"/run/valkey/valkey.sock": str(plain.directory / "socket")})

    assert ask(plain, "DBSIZE") == 1
