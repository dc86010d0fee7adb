"""Sessions over TLS, with a private authority and client certificates, and over unix sockets.

Valkey as it comes in a wheel was built without TLS, so a proxy ends TLS in front of it; a Redis on
PATH does it itself, if it was built to.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from redis.asyncio import Redis

from aiosessions import RedisStorage, Session, SessionError, StorageUnavailable, new_session_id
from tests.callers import NAME, Caller, outcome
from tests.connecting import run_block
from tests.leaks import said_by
from tests.servers import Server, binaries, running
from tests.topologies import Secured, ask, connections, disconnected, mended, secured

SECRET = "hush-hush"


@pytest.fixture(scope="module", params=binaries())
def server(request: pytest.FixtureRequest) -> Iterator[Secured]:
    """Each of the servers there are, behind TLS."""
    with secured(binaries()[request.param]) as made:
        yield made


def of_url(url: str) -> RedisStorage[Any]:
    """A storage with a client of its own."""
    return RedisStorage.from_url(url, ttl=60, timeout=1.0)


@asynccontextmanager
async def owning(port: int, **options: str | Path) -> AsyncIterator[RedisStorage[Any]]:
    """A storage with a client of its own, and all settings in its URL."""
    host = options.pop("host", "127.0.0.1")
    query = urlencode({"client_name": NAME, **options})
    url = f"rediss://{host}:{port}/0?{query}"
    async with of_url(url) as storage:
        yield storage


@asynccontextmanager
async def borrowing(port: int, **options: Any) -> AsyncIterator[RedisStorage[Any]]:
    """A storage that borrows a client, which is closed last."""
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
    """Either way to a storage."""
    made: MakeStorage = request.param
    return made


def identity(server: Secured) -> dict[str, Path]:
    """What a client shows to a server."""
    return {"ssl_certfile": server.certificate, "ssl_keyfile": server.key}


async def refusal(storage: RedisStorage[Any]) -> SessionError:
    """The error of a storage that cannot connect, once it is known to be as it should be."""
    id = SECRET + new_session_id()
    result, took = await outcome(storage.store(Session(id=id, data=SECRET)))
    assert type(result) is StorageUnavailable
    assert took < 1.5
    assert SECRET not in said_by(result)
    return result


async def test_all_verbs_work_over_tls(server: Secured, make: MakeStorage) -> None:
    """With a private authority and a client certificate, over one connection for many callers."""
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


def test_the_documentation_for_tls_runs(server: Secured) -> None:
    """As it stands, but for the address and where the files are."""
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


async def test_a_server_of_another_authority_is_not_trusted(
    server: Secured, make: MakeStorage
) -> None:
    """`StorageUnavailable`, whose cause tells what is wrong, and no secrets."""
    async with make(server.port, ssl_ca_certs=server.stranger_ca, **identity(server)) as storage:
        error = await refusal(storage)

    assert "certificate verify failed" in said_by(error)


async def test_a_server_of_another_name_is_not_trusted(server: Secured, make: MakeStorage) -> None:
    """Its certificate is for 127.0.0.1, so it is not believed to be localhost."""
    settings = {"host": "localhost", "ssl_ca_certs": server.ca, **identity(server)}
    async with make(server.port, **settings) as storage:
        error = await refusal(storage)

    assert "certificate verify failed" in said_by(error)


async def test_a_client_without_a_certificate_is_refused(
    server: Secured, make: MakeStorage
) -> None:
    """Where the server asks for one."""
    async with make(server.port, ssl_ca_certs=server.ca) as storage:
        await refusal(storage)


async def test_a_missing_file_is_told_at_the_first_use(
    server: Secured, make: MakeStorage, tmp_path: Path
) -> None:
    """`StorageUnavailable`, as certificates may be put there, or renewed, while a service runs."""
    missing = tmp_path / "ca.pem"
    async with make(server.port, ssl_ca_certs=missing, **identity(server)) as storage:
        error = await refusal(storage)
        assert "No such file" in said_by(error)

        missing.write_bytes(server.ca.read_bytes())

        assert (await outcome(storage.store(Session(id="mine"))))[0] is None


async def test_tls_and_no_tls_do_not_talk(server: Secured) -> None:
    """A mistaken scheme, either way, is `StorageUnavailable`, and in time."""
    async with owning(server.server.port, ssl_ca_certs=server.ca) as storage:
        await refusal(storage)
    url = f"redis://user:{SECRET}@127.0.0.1:{server.port}"
    async with of_url(url) as storage:
        await refusal(storage)


async def test_a_storage_reconnects_over_tls(server: Secured, make: MakeStorage) -> None:
    """When the server is back, so is the storage."""
    async with make(server.port, ssl_ca_certs=server.ca, **identity(server)) as storage:
        await storage.store(Session(id="before"))
        with mended(server.server):
            server.server.kill()
            await refusal(storage)

        result, _ = await outcome(storage.store(Session(id="after")))
        if result is not None:  # it found the proxy before that found the server
            await storage.store(Session(id="after"))
        assert (await storage.load("after")).id == "after"


@pytest.fixture(scope="module", params=binaries())
def local(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each of the servers there are, with a password."""
    with running(binaries()[request.param], "--requirepass", SECRET) as made:
        yield made


async def test_all_verbs_work_over_a_unix_socket(local: Server) -> None:
    """With a URL, a password and a database other than the first."""
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
        assert [each["name"] for each in await client.client_list()].count(NAME) == 0


def test_the_documentation_for_unix_sockets_runs(server: Secured) -> None:
    """As it stands, but for where the socket is."""
    plain = server.server
    plain.flush()

    run_block("unix", {"/run/valkey/valkey.sock": str(plain.directory / "socket")})

    assert ask(plain, "DBSIZE") == 1


async def test_a_unix_socket_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    """In time, and without the password."""
    url = f"unix://:{SECRET}@{tmp_path / 'socket'}"
    async with of_url(url) as storage:
        await refusal(storage)
