"""The shop of examples/web passes its own check, and ends with everything that it has started."""

import os
import subprocess
import sys

import httpx
import pytest

from tests.support.shop import RUN, shop

pytestmark = pytest.mark.slow


def test_check_passes() -> None:
    """A visit with two devices finds each step right."""
    done = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, str(RUN), "--check"],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.count("  ok  ") == 9


def test_interrupt_ends_all_programs() -> None:
    """Ctrl-C is a success. A killed replica does not matter."""
    with shop() as running:
        os.kill(running.pids["replica A"], 9)
        answers = [httpx.get(running.url) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
    assert running.process.returncode == 0
    assert len(running.pids) == 3
    for pid in running.pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_front_keeps_no_cookies() -> None:
    """A visitor does not get the session of another one, and headers come once."""
    with shop() as running:
        first = httpx.post(f"{running.url}/sign-in", data={"name": "Ada"})
        second = httpx.get(running.url)
    assert "session" in first.cookies
    assert "Ada" not in second.text
    names = [name.lower() for name, _ in first.headers.raw]
    assert (names.count(b"date"), names.count(b"server")) == (1, 1)
