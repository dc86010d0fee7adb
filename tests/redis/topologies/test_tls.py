"""Sessions over TLS, with a private authority and client certificates, and over unix sockets.

The Valkey of the wheel was built without TLS, so a proxy in front of it handles TLS. A Redis on
PATH handles it itself if it was built with TLS.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from redis.asyncio import Redis

from aiosessions import RedisStorage, Session, StorageUnavailable, new_session_id
from tests.support.clients import LONG, NAME, storage_at, stored, timed_outcome, use
from tests.support.connecting import run_block
from tests.support.listening import Listener
from tests.support.proxy import until
from tests.support.secrets import said_by
from tests.support.servers import Server, binaries, running
from tests.support.tls import Secured, secured
from tests.support.topologies import ask, connections, disconnected

SECRET = "hush-hush"


@pytest.fixture(scope="module", params=binaries())
def server(request: pytest.FixtureRequest) -> Iterator[Secured]:
    """Each available server, with TLS."""
    with secured(binaries()[request.param]) as made:
        yield made


def settings(server: Secured, **changes: Path) -> dict[str, str]:
    """The settings of a client that the server accepts, with changes."""
    files = {"ca_certs": server.ca, "certfile": server.certificate, "keyfile": server.key}
    return {f"ssl_{name}": str(path) for name, path in (files | changes).items()}


def secure_url(server: Secured, host: str = "127.0.0.1", **changes: Path) -> str:
    """The URL of the server with TLS."""
    return f"rediss://{host}:{server.port}/0?{urlencode(settings(server, **changes))}"


async def refusal(storage: RedisStorage[Any]) -> str:
    """The message of a storage that cannot connect; it must reveal no secret."""
    id = SECRET + new_session_id()
    error, _ = await timed_outcome(storage.store(Session(id=id, data=SECRET)))
    assert type(error) is StorageUnavailable
    assert not error.in_doubt
    assert SECRET not in said_by(error)
    return str(error)


@pytest.mark.parametrize("borrowed", [False, True])
async def test_all_verbs_work_over_tls(server: Secured, *, borrowed: bool) -> None:
    """A private authority and a client certificate work, and callers share one connection."""
    client = Redis(host="127.0.0.1", port=server.port, ssl=True, **settings(server))  # type: ignore[arg-type]
    client.connection_pool.connection_kwargs["client_name"] = NAME
    storage = (
        RedisStorage[Any](client, ttl=60, timeout=LONG)
        if borrowed
        else storage_at(f"{secure_url(server)}&client_name={NAME}")
    )
    async with client, storage:
        await use(storage, callers=50)
        session = await stored(storage, data="x" * 500_000)

        assert await storage.load(session.id) == session
        assert connections(server.server, NAME) == 1
        await storage.aclose()
    disconnected([server.server], NAME)


@pytest.mark.parametrize("url", [secure_url, lambda server: server.server.unix_url])
async def test_announcements_use_the_same_settings(
    server: Secured, url: Callable[[Secured], str]
) -> None:
    """The subscription connects as the connection for commands does."""
    async with storage_at(url(server)) as storage:
        listener = Listener(storage)
        session = await stored(storage)
        await listener.until("resumed")
        await storage.delete(session.id)
        await until(lambda: (session.digest, "") in listener.changes)


@pytest.mark.parametrize("kind", ["tls", "unix"])
def test_documented_example_runs(server: Secured, kind: str) -> None:
    """The example of the documentation works with the address and the files of this server."""
    plain = server.server
    plain.flush()
    places = {
        "tls": {
            "sessions.example.com:6380": f"127.0.0.1:{server.port}",
            "/etc/sessions/ca.pem": str(server.ca),
            "/etc/sessions/client.pem": str(server.certificate),
            "/etc/sessions/client-key.pem": str(server.key),
        },
        "unix": {"/run/valkey/valkey.sock": str(plain.directory / "socket")},
    }

    run_block(kind, places[kind])

    assert ask(plain, "DBSIZE") == 1


REFUSED: dict[str, tuple[Callable[[Secured], str], str, str]] = {
    "unknown-authority": (
        lambda server: secure_url(server, ca_certs=server.stranger_ca),
        "certificate verify failed: ",
        "(127.0.0.1:{tls})",
    ),
    "another-host": (
        lambda server: secure_url(server, host="localhost"),
        "certificate verify failed: ",
        "(localhost:{tls})",
    ),
    "no-client-certificate": (
        lambda server: f"rediss://127.0.0.1:{server.port}?ssl_ca_certs={server.ca}",
        "",
        "(127.0.0.1:{tls})",
    ),
    "tls-to-a-plain-port": (
        lambda server: secure_url(server).replace(f":{server.port}/", f":{server.server.port}/"),
        "if the server does not use TLS, the URL begins with redis://",
        "(127.0.0.1:{plain})",
    ),
    "plain-to-a-tls-port": (
        lambda server: f"redis://user:{SECRET}@127.0.0.1:{server.port}",
        "if the server uses TLS, the URL begins with rediss://",
        "(127.0.0.1:{tls})",
    ),
}


@pytest.mark.usefixtures("short_bridge")
@pytest.mark.parametrize(("url", "reason", "address"), REFUSED.values(), ids=REFUSED)
async def test_refused_connection_has_the_reason(
    server: Secured, url: Callable[[Secured], str], reason: str, address: str
) -> None:
    """The error names the reason and the address, or which scheme the URL needs."""
    async with storage_at(url(server), timeout=1.5) as storage:
        message = await refusal(storage)

    assert reason in message
    assert address.format(tls=server.port, plain=server.server.port) in message


@pytest.mark.usefixtures("short_bridge")
async def test_certificates_are_read_at_each_connect(server: Secured, tmp_path: Path) -> None:
    """A missing file is unavailable, because it may appear, or be renewed, while a service runs."""
    missing = tmp_path / "ca.pem"
    async with storage_at(secure_url(server, ca_certs=missing)) as storage:
        message = await refusal(storage)
        assert "a file of the TLS settings cannot be read: No such file" in message

        missing.write_bytes(server.ca.read_bytes())

        await stored(storage)


@pytest.fixture(scope="module", params=binaries())
def local(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each available server, with a password."""
    with running(binaries()[request.param], "--requirepass", SECRET) as made:
        yield made


async def test_all_verbs_work_over_a_unix_socket(local: Server) -> None:
    """A URL may name the socket, a password and a database."""
    path = local.directory / "socket"
    async with storage_at(f"unix://:{SECRET}@{path}?db=3") as storage:
        await use(storage)
        session = await stored(storage)

    async with (
        Redis(unix_socket_path=str(path), password=SECRET, db=3) as client,
        RedisStorage[Any](client, ttl=60) as storage,
    ):
        assert await storage.load(session.id) == session
