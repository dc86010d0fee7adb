"""Poisson arrivals that another process signals over a pipe.

Requests reach a proxy over sockets in the same way. Timers of an event loop are late by up to a
millisecond, which would hide the latency of a load. The other process sleeps until each arrival and
writes a byte. Both draw the same schedule from a seed.
"""

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, cast

from tests.support.proxy_process import reduce_timer_slack

_LEAD = 0.02


def schedule(rate: float, seconds: float, seed: int) -> list[float]:
    """Draw the times of arrivals, in seconds since the start."""
    draw = random.Random(seed)  # noqa: S311 - not a secret
    times: list[float] = []
    at = draw.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += draw.expovariate(rate)
    return times


class Arrivals:
    """The process that signals arrivals. `arrivals` starts one.

    Args:
        times: The schedule, in seconds since the start.
        process: The process.
    """

    def __init__(self, times: list[float], process: "subprocess.Popen[bytes]") -> None:
        self._times = times
        self._start = cast("IO[bytes]", process.stdin)
        self._signals = cast("IO[bytes]", process.stdout)
        self._signals.read(1)  # the process is ready

    async def deliver(self, arrive: Callable[[float], object]) -> None:
        """Call `arrive` at each arrival, with its scheduled monotonic time.

        Raises:
            RuntimeError: The process ended early.
        """
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        start = time.monotonic() + _LEAD
        due = iter([start + at for at in self._times])
        left = len(self._times)
        signals = self._signals.fileno()

        def receive() -> None:
            nonlocal left
            count = len(os.read(signals, 65_536))
            for _ in range(count):
                arrive(next(due))
            left -= count
            if not left or not count:
                loop.remove_reader(signals)
                ended.set_result(None)

        loop.add_reader(signals, receive)
        self._start.write(f"{start!r}\n".encode())
        self._start.flush()
        await ended
        if left:
            raise RuntimeError("the process that signals arrivals ended early")


@contextmanager
def arrivals(rate: float, seconds: float, seed: int) -> Iterator[Arrivals]:
    """Start the process that signals arrivals, and end it with the block."""
    process = subprocess.Popen(  # noqa: S603 - this module
        [sys.executable, "-m", __name__, str(rate), str(seconds), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Arrivals(schedule(rate, seconds, seed), process)
    finally:
        process.kill()
        process.communicate()


def _main() -> None:
    reduce_timer_slack()
    times = schedule(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
    signals = sys.stdout.fileno()
    os.write(signals, b"r")
    start = float(sys.stdin.readline())
    signalled = 0
    while signalled < len(times):
        now = time.monotonic() - start
        due = signalled
        while due < len(times) and times[due] <= now:
            due += 1
        if due > signalled:
            os.write(signals, b"." * (due - signalled))
            signalled = due
        else:
            time.sleep(times[due] - now)
    sys.stdin.read()  # the pipe stays open until the other side has read it


if __name__ == "__main__":
    _main()
