"""The contract kit in another project: the documented examples, beside any pytest plugin."""

import re
import textwrap
from datetime import timedelta

import pytest

import aiosessions.testing
from aiosessions.testing import FakeClock

# Without this option pytest-asyncio warns.
_LOOP_SCOPE = ("-o", "asyncio_default_fixture_loop_scope=function")
PLUGINS = {
    "plain": ("-pno:asyncio", "-pno:anyio"),
    "asyncio-auto": ("--asyncio-mode=auto", *_LOOP_SCOPE),
    "asyncio-strict": ("--asyncio-mode=strict", *_LOOP_SCOPE),
    "anyio-auto": ("-pno:asyncio", "--anyio-mode=auto"),
}
# One test of each base class, so that the run is short also in real time.
A_FEW = "stays_expired or every_field or increments or malformed_id_cannot_be_looked_up or leaks"

DOCUMENTED = re.findall(
    r"(?:^ {4}.*\n|^\n(?= {4}))+", aiosessions.testing.__doc__ or "", re.MULTILINE
)


HEAD = """
import anyio
import pytest
from aiosessions import JsonCodec, Session
from aiosessions.testing import FakeTime, StorageContract
from my_storage import MyStorage
"""
GIVEN = """
    @pytest.fixture
    def make_storage(self):
        return lambda *, ttl=60.0, codec=None: STORAGE(
            ttl=ttl, codec=codec or JsonCodec(), clock=self.clock
        )
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """Another project, with a storage in the module `my_storage`."""
    pytester.makepyfile(my_storage="from aiosessions import LocalStorage as MyStorage\n")
    pytester.syspathinsert()
    return pytester


def run(project: pytest.Pytester, tests: str, *options: str) -> pytest.RunResult:
    """Run the tests of a project, with warnings as errors."""
    project.makepyfile(tests)
    return project.runpytest_inprocess("-Werror", "-pno:cacheprovider", *options)


@pytest.mark.parametrize("options", PLUGINS.values(), ids=PLUGINS)
def test_documented_examples_pass_beside_any_plugin(
    project: pytest.Pytester, options: tuple[str, ...]
) -> None:
    """They pass in real time and on a fake clock, without a skip, and without a plugin."""
    real, fake = map(textwrap.dedent, DOCUMENTED)
    fake = fake.replace("TestMyStorage", "TestMyStorageOnAFakeClock")

    result = run(project, real + fake, f"-k={A_FEW}", *options)

    outcomes = result.parseoutcomes()
    assert outcomes.keys() == {"passed", "deselected"}
    assert outcomes["passed"] >= len(DOCUMENTED) * len(A_FEW.split(" or "))


def test_added_coroutine_tests_run_too(project: pytest.Pytester) -> None:
    """A coroutine test of a subclass needs no plugin, and runs on the subclass's backend."""
    tests = f"""{HEAD}
STORAGE = MyStorage
class TestMine(FakeTime, StorageContract):
    backend = "trio"
{GIVEN}
    async def test_mine(self, tmp_path):
        storage = await self.open(ttl=1.5)
        session = Session(id=tmp_path.name)
        await storage.store(session)
        assert anyio.get_current_task().name
        assert sniff() == "trio"

def sniff():
    import sniffio
    return sniffio.current_async_library()
"""
    result = run(project, tests, "-k=test_mine", *PLUGINS["plain"])

    result.assert_outcomes(passed=1, deselected=result.parseoutcomes()["deselected"])


def test_hanging_storage_fails(project: pytest.Pytester) -> None:
    """A test fails after `patience` seconds."""
    tests = f"""{HEAD}
class STORAGE(MyStorage):
    async def load(self, id):
        await anyio.sleep_forever()

class TestMine(FakeTime, StorageContract):
    patience = 0.05
{GIVEN}
"""
    result = run(project, tests, "-k=test_load_renews_only", *PLUGINS["plain"])

    result.assert_outcomes(failed=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["*TimeoutError*"])


def test_failed_assert_shows_the_compared_values(project: pytest.Pytester) -> None:
    """Pytest rewrites the asserts of the kit as those of a test file."""
    tests = f"""{HEAD}
class STORAGE(MyStorage):
    async def delete(self, id):
        return not await super().delete(id)

class TestMine(FakeTime, StorageContract):
{GIVEN}
"""
    result = run(project, tests, "-k=test_delete_returns", *PLUGINS["plain"])

    result.assert_outcomes(failed=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["E*assert False is True"])


def test_missing_fixture_is_named(project: pytest.Pytester) -> None:
    """The error of a contract without its fixture names the fixture."""
    tests = f"""{HEAD}
class TestMine(FakeTime, StorageContract):
    pass
"""
    result = run(project, tests, "-k=test_delete_returns", *PLUGINS["plain"])

    result.assert_outcomes(errors=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["*fixture 'make_storage' not found*"])


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
