"""Web applications under uvicorn, one process for each.

A replica gets a listening socket, so a client can connect before the application has started.
"""

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme

ROOT = Path(__file__).parents[2]


class Certificate:
    """A certificate for 127.0.0.1, in files of a directory, and a client's trust in it."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        self.certificate = directory / "certificate.pem"
        self.key = directory / "key.pem"
        issued.cert_chain_pems[0].write_to_path(self.certificate)
        issued.private_key_pem.write_to_path(self.key)
        self.trust = ssl.create_default_context()
        authority.configure_trust(self.trust)


@dataclass(frozen=True)
class Replica:
    """A running application. `replica` makes one.

    Attributes:
        url: Its URL, without a slash at the end.
        process: Its process.
    """

    url: str
    process: "subprocess.Popen[bytes]"

    def kill(self) -> None:
        """End it at once; new connections are refused."""
        self.process.kill()
        self.process.wait()


@contextmanager
def replica(
    app: str,
    *,
    factory: bool = False,
    directory: Path = ROOT,
    certificate: Certificate | None = None,
    environment: dict[str, str] | None = None,
) -> Iterator[Replica]:
    """Serve an application during the block.

    Args:
        app: The application, in the form that uvicorn takes.
        factory: Whether `app` names a function that makes the application.
        directory: The directory to import it from.
        certificate: The certificate for HTTPS; by default the application is served over HTTP.
        environment: Variables for the process.
    """
    options = ["--log-level", "warning", "--app-dir", str(directory)]
    options += ["--timeout-graceful-shutdown", "1"]  # a failed test may leave a request open
    options += ["--factory"] if factory else []
    if certificate is not None:
        options += ["--ssl-certfile", str(certificate.certificate)]
        options += ["--ssl-keyfile", str(certificate.key)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # asyncio sets it only on sockets that it has opened itself.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port = listener.getsockname()[1]
        number = listener.fileno()
        process = subprocess.Popen(  # noqa: S603 - our own application
            [sys.executable, "-m", "uvicorn", app, "--fd", str(number), *options],
            cwd=ROOT,
            env=os.environ | (environment or {}),
            pass_fds=[number],
        )
    scheme = "http" if certificate is None else "https"
    with process:
        try:
            yield Replica(f"{scheme}://127.0.0.1:{port}", process)
        finally:
            process.terminate()
