"""The demo runs, serves, and ends with everything that it has started."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.servers import free_port

DEMO = Path(__file__).parents[2] / "examples" / "mcp_proxy" / "demo.py"
sys.path.insert(0, str(DEMO.parent))  # its files import each other by their bare names

from demo import main  # noqa: E402
from processes import is_free  # noqa: E402
from report import GREEN, Report, coloured  # noqa: E402


@contextmanager
def demo(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The demo in a new process group, which is empty at the end."""
    command = [sys.executable, str(DEMO), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as process:  # noqa: S603
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=30)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def assert_all_ended(output: str) -> None:
    """Check that the processes in the output of the demo no longer exist."""
    pids = re.findall(r" process (\d+)\n", output)
    assert len(pids) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


@pytest.mark.slow
def test_demo_passes_on_one_page() -> None:
    """The output fits on a page of 60 lines and 80 columns, without colours in a pipe."""
    with demo() as process:
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output
    assert "through B  200  GETEX  total  3\n" in output
    assert "through B  200  -      total 15\n" in output
    assert re.search(r"All \d+ checks passed", output)
    lines = output.splitlines()
    assert len(lines) <= 60
    assert [line for line in lines if len(line) > 80 or "\x1b" in line] == []
    assert_all_ended(output)


@pytest.mark.slow
def test_serve_runs_until_interrupted() -> None:
    """Both replicas answer at their ports, with one Date and one Server, until Ctrl-C."""
    port = next(port for port in iter(free_port, 0) if is_free(port + 1))
    with demo("--serve", "--port", str(port)) as process:
        assert process.stdout is not None
        output = "".join(iter(process.stdout.readline, "\n"))
        for replica in (port, port + 1):
            response = httpx.post(f"http://127.0.0.1:{replica}/mcp", json={})
            names = [name.lower() for name, _ in response.headers.raw]
            assert (names.count(b"date"), names.count(b"server")) == (1, 1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert_all_ended(output)


@pytest.mark.parametrize("offset", [0, 1])
def test_port_in_use_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], offset: int
) -> None:
    """The demo needs PORT and PORT + 1, and names the one in use."""
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["demo.py", "--port", str(port - offset)])
        with pytest.raises(SystemExit) as exit_:
            asyncio.run(main())
    assert exit_.value.code == 2
    assert f"port {port} is in use" in capsys.readouterr().err


def test_colour_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR turns colours off on a terminal, too."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured("text", GREEN) == "text"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert coloured("text", GREEN) == "\x1b[32mtext\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured("text", GREEN) == "text"


def test_wrong_value_is_marked_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """A second command for a request is such a value."""
    report = Report()
    report.event("add 1", total=(1, 1), commands=(["getex", "getex"], ["getex"]))
    assert (report.checks, report.failed) == (2, 1)
    assert "WRONG  add 1\n" in capsys.readouterr().out
