"""Runs examples/web as its own process."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RUN = Path(__file__).parents[2] / "examples" / "web" / "run.py"


@dataclass(frozen=True)
class Shop:
    """A running shop.

    Attributes:
        url: The URL of its front.
        process: Its process.
        pids: The ids of the processes that it has started, by name.
    """

    url: str
    process: subprocess.Popen[str]
    pids: dict[str, int]


@contextmanager
def shop() -> Iterator[Shop]:
    """A shop that runs until the end of the block, or until Ctrl-C, which it gets then."""
    command = [sys.executable, str(RUN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as process:  # noqa: S603 - our own script
        try:
            assert process.stdout is not None
            output = ""
            for line in process.stdout:
                output += line
                if found := re.match(r"Open (\S+) ", line):
                    break
            else:
                raise AssertionError(output)
            pids = re.findall(r"^  (\w[\w ]*?) +http.* process (\d+)$", output, re.MULTILINE)
            yield Shop(found[1], process, {name: int(pid) for name, pid in pids})
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            process.communicate(timeout=30)
