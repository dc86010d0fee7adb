"""A proxy in a separate process, for benchmarks: it delays bytes and counts commands."""

import asyncio
import contextlib
import ctypes
import json
import selectors
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.proxy import Counts, FaultProxy


class ProxyProcess:
    """A proxy in another process. `proxy_process` starts one."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.port: int = self._ask()["port"]

    def set(self, *, round_trip: float = 0.0, inspects: bool = False) -> None:
        """Set the duration of a round trip, in seconds, and count from zero."""
        self._ask(delay=round_trip / 2, inspects=inspects)

    def counts(self) -> Counts:
        """The traffic since the last `set`."""
        found = self._ask()["counts"]
        return Counts(**found | {"requests": Counter(found["requests"])})

    def _ask(self, **settings: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(settings), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def proxy_process(
    port: int, host: str = "127.0.0.1", certificate: Path | None = None
) -> Iterator[ProxyProcess]:
    """A proxy in a separate process, which ends with the block.

    Args:
        port: The port of the server.
        host: The host of the server.
        certificate: A PEM file with a key and a certificate, if clients speak TLS to the proxy.
    """
    command = [sys.executable, "-m", __name__, str(port), host, str(certificate or "")]
    with subprocess.Popen(  # noqa: S603 - this module
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield ProxyProcess(process)
        finally:
            process.communicate()  # closes its input, which ends it


async def _serve(port: str, host: str, certificate: str) -> None:
    """Run a proxy; each line of the input changes settings, and is answered."""
    tls = None
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate)
    ended = asyncio.Event()
    async with FaultProxy(int(port), host, tls) as proxy:

        def answer() -> None:
            line = sys.stdin.readline()
            if not line:
                ended.set()
                return
            if settings := json.loads(line):
                vars(proxy).update(settings)
                proxy.counts = Counts()
            reply = json.dumps({"port": proxy.port, "counts": vars(proxy.counts)})
            sys.stdout.write(reply + "\n")
            sys.stdout.flush()

        asyncio.get_running_loop().add_reader(sys.stdin, answer)
        await ended.wait()
        asyncio.get_running_loop().remove_reader(sys.stdin)


def reduce_timer_slack() -> None:
    """Ask Linux not to delay timers by 50 microseconds to group them."""
    set_timer_slack = 29
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(set_timer_slack, ctypes.c_ulong(1_000))


if __name__ == "__main__":
    reduce_timer_slack()
    # epoll, the default, counts in milliseconds, which are coarser than the delays; but select has
    # at most 1,024 sockets, too few for many clients over TLS.
    selector = None if sys.argv[3] else selectors.SelectSelector()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(_serve(*sys.argv[1:]))
