"""A server with TLS for tests, with its authority and certificates."""

import asyncio
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trustme

from tests.support.servers import Server, free_port, running

_PATIENCE = 30.0


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
            files[name], key = directory / f"{name}.pem", directory / f"{name}-key.pem"
            files[f"{name}-key"] = key
            issued.cert_chain_pems[0].write_to_path(files[name])
            issued.private_key_pem.write_to_path(key)
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
        with suppress(OSError):
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
