"""The contract kit in another project: the documented examples, beside any pytest plugin."""

import re
import textwrap
from datetime import timedelta

import anyio.pytest_plugin
import pytest

import aiosessions.testing
from aiosessions.testing import FakeClock

# Without this option pytest-asyncio warns.
_LOOP_SCOPE = ("-o", "asyncio_default_fixture_loop_scope=function")
PLUGINS = {
    "plain": ("-pno:asyncio", "-pno:anyio"),
    "asyncio-auto": ("--asyncio-mode=auto", *_LOOP_SCOPE),
    "asyncio-strict": ("--asyncio-mode=strict", *_LOOP_SCOPE),
}
if hasattr(anyio.pytest_plugin, "pytest_addoption"):  # not in the oldest releases
    PLUGINS["anyio-auto"] = ("-pno:asyncio", "--anyio-mode=auto")
# Some tests that let no time pass.
A_FEW = "every_field or increments or malformed_id_cannot_be_looked_up or leaks"

DOCUMENTED = re.findall(
    r"(?:^ {4}.*\n|^\n(?= {4}))+", aiosessions.testing.__doc__ or "", re.MULTILINE
)


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """Another project, with a storage in the module `my_storage`."""
    pytester.makepyfile(my_storage="from aiosessions import LocalStorage as MyStorage\n")
    pytester.syspathinsert()
    return pytester


@pytest.mark.parametrize("options", PLUGINS.values(), ids=PLUGINS)
def test_documented_examples_pass_beside_any_plugin(
    project: pytest.Pytester, options: tuple[str, ...]
) -> None:
    """They pass in real time and on a fake clock, without a skip, and without a plugin."""
    real, fake = map(textwrap.dedent, DOCUMENTED)
    fake = fake.replace("TestMyStorage", "TestMyStorageOnAFakeClock")

    project.makepyfile(real + fake)
    result = project.runpytest_inprocess(
        "-Werror", "-pno:cacheprovider", f"-k={A_FEW} or stays_expired and FakeClock", *options
    )

    outcomes = result.parseoutcomes()
    assert outcomes.keys() == {"passed", "deselected"}
    assert outcomes["passed"] >= len(DOCUMENTED) * len(A_FEW.split(" or "))


def test_fake_clock_advances_both_readings() -> None:
    """`advance` moves both readings, and `set_back` moves the wall clock only."""
    clock = FakeClock()
    start, monotonic = clock.now(), clock.monotonic()

    clock.advance(1.5)
    assert clock.now() - start == timedelta(seconds=1.5)
    assert clock.monotonic() - monotonic == pytest.approx(1.5)

    clock.set_back(3600)
    assert clock.now() - start == timedelta(seconds=1.5 - 3600)
    assert clock.monotonic() - monotonic == pytest.approx(1.5)
    assert clock.time() == pytest.approx(clock.now().timestamp())
