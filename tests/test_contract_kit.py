"""The contract kit in other people's hands: run as its documentation says, beside any plugin."""

import re
import textwrap
from datetime import timedelta

import pytest

import aiosessions.testing
from aiosessions.testing import FakeClock

# pytest-asyncio warns unless told.
_LOOP_SCOPE = ("-o", "asyncio_default_fixture_loop_scope=function")
PLUGINS = {
    "plain": ("-pno:asyncio", "-pno:anyio"),
    "asyncio-auto": ("--asyncio-mode=auto", *_LOOP_SCOPE),
    "asyncio-strict": ("--asyncio-mode=strict", *_LOOP_SCOPE),
    "anyio-auto": ("-pno:asyncio", "--anyio-mode=auto"),
}
# One test of each family, so that it is quick also where time is real.
A_FEW = "ends_when_idle or every_field or increments or bad_id_cannot_be_asked or leaks"

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
    """Somebody's project, with a storage of their own in `my_storage`."""
    pytester.makepyfile(my_storage="from aiosessions import LocalStorage as MyStorage\n")
    pytester.syspathinsert()
    return pytester


def run(project: pytest.Pytester, tests: str, *options: str) -> pytest.RunResult:
    """Run a project's tests. Warnings are errors."""
    project.makepyfile(tests)
    return project.runpytest_inprocess("-Werror", "-pno:cacheprovider", *options)


@pytest.mark.parametrize("options", PLUGINS.values(), ids=PLUGINS)
def test_the_documented_examples_pass_beside_any_plugin(
    project: pytest.Pytester, options: tuple[str, ...]
) -> None:
    """In real time and on a fake clock; nothing is skipped, and no plugin is needed."""
    real, fake = map(textwrap.dedent, DOCUMENTED)
    fake = fake.replace("TestMyStorage", "TestMyStorageOnAFakeClock")

    result = run(project, real + fake, f"-k={A_FEW}", *options)

    outcomes = result.parseoutcomes()
    assert outcomes.keys() == {"passed", "deselected"}
    assert outcomes["passed"] >= len(DOCUMENTED) * len(A_FEW.split(" or "))


def test_own_tests_run_like_the_contract_s(project: pytest.Pytester) -> None:
    """Coroutine tests of a subclass need no plugin either, and see the same event loop."""
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


def test_a_storage_that_hangs_fails(project: pytest.Pytester) -> None:
    """After `patience` seconds, instead of never."""
    tests = f"""{HEAD}
class STORAGE(MyStorage):
    async def load(self, id):
        await anyio.sleep_forever()

class TestMine(FakeTime, StorageContract):
    patience = 0.05
{GIVEN}
"""
    result = run(project, tests, "-k=test_load_renews_the_ttl", *PLUGINS["plain"])

    result.assert_outcomes(failed=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["*TimeoutError*"])


def test_failures_say_what_was_compared(project: pytest.Pytester) -> None:
    """The kit's asserts are as telling as those of a test file."""
    tests = f"""{HEAD}
class STORAGE(MyStorage):
    async def delete(self, id):
        return not await super().delete(id)

class TestMine(FakeTime, StorageContract):
{GIVEN}
"""
    result = run(project, tests, "-k=test_delete_says", *PLUGINS["plain"])

    result.assert_outcomes(failed=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["E*assert False is True"])


def test_a_missing_fixture_is_named(project: pytest.Pytester) -> None:
    """Whoever forgets it is told what is missing."""
    tests = f"""{HEAD}
class TestMine(FakeTime, StorageContract):
    pass
"""
    result = run(project, tests, "-k=test_delete_says", *PLUGINS["plain"])

    result.assert_outcomes(errors=1, deselected=result.parseoutcomes()["deselected"])
    result.stdout.fnmatch_lines(["*fixture 'make_storage' not found*"])


def test_the_fake_clock_moves_when_told_to() -> None:
    """Both readings move together; only dates can be set back."""
    clock = FakeClock()
    start, monotonic = clock.now(), clock.monotonic()

    clock.advance(1.5)
    assert clock.now() - start == timedelta(seconds=1.5)
    assert clock.monotonic() - monotonic == pytest.approx(1.5)

    clock.set_back(3600)
    assert clock.now() - start == timedelta(seconds=1.5 - 3600)
    assert clock.monotonic() - monotonic == pytest.approx(1.5)
    assert clock.time() == pytest.approx(clock.now().timestamp())
