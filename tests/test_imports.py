"""What the modules of the package may import, and what importing it may load."""

import ast
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import aiosessions

PACKAGE = Path(aiosessions.__file__).parent
PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"

# From the bottom to the top. A module imports from lower levels only, so its neighbours on a level
# know nothing of each other. All of the `redis` package is on one level.
LEVELS = (
    {"errors"},
    {"session"},
    {"codec"},
    {"storage"},
    {"record"},
    {"local", "redis"},
    {"cache"},
    {"manager"},
    {"asgi", "testing"},
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}

# What the package needs at run time; `import aiosessions` may load this and nothing else.
RUNTIME = ("anyio.lowlevel", "hiredis", "msgspec", "redis.asyncio")

MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
)


def imports_of(module: str) -> set[str]:
    """What a module imports from the package, for type checkers alone included."""
    path = PACKAGE.joinpath(*module.split("."))
    is_package = path.is_dir()
    source = (path / "__init__.py" if is_package else path.with_suffix(".py")).read_text("utf-8")
    package = f"aiosessions.{module}" if is_package else f"aiosessions.{module}".rpartition(".")[0]
    return {
        name.removeprefix("aiosessions").removeprefix(".")
        for name in _imported(ast.parse(source), package)
        if name.split(".")[0] == "aiosessions"
    }


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    """The absolute names of all modules that import statements anywhere in `tree` refer to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                # `from .redis import scripts` names a module, `from .errors import X` does not.
                full = f"{base}.{alias.name}"
                is_module = full.removeprefix("aiosessions.") in MODULES
                yield full if is_module else base


def level_of(module: str) -> int:
    """The level of a module, by the first part of its name."""
    return LEVEL[module.partition(".")[0]]


def loaded_by(*modules: str) -> set[str]:
    """The top-level modules that a new interpreter has loaded after importing `modules`."""
    code = f"import sys, {', '.join(modules)}\nprint(*sys.modules)"
    run = subprocess.run(  # noqa: S603 - our own interpreter and names
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in run.stdout.split()}


def test_every_module_has_a_level() -> None:
    """No module is outside the order, and every file of the package is looked at."""
    assert {"errors", "session", "codec", "storage", "local"} <= set(MODULES)
    assert {module.split(".")[0] for module in MODULES} <= LEVEL.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    """A module imports from levels below its own, and inside a package from its siblings."""
    family = module.partition(".")[0]

    wrong = {
        name
        for name in imports_of(module)
        if name.split(".")[0] != family and (not name or level_of(name) >= level_of(module))
    }

    assert wrong == set()


def test_no_cycles() -> None:
    """The modules can be put in an order in which each imports only those before it."""
    graph = {module: imports_of(module) - {module} for module in MODULES}
    for module in MODULES:
        # A package's front re-exports its modules, which do not import from the front.
        assert not (module in graph and module.rpartition(".")[0] in graph[module])

    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(MODULES)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import aiosessions.codec", {"aiosessions.codec"}),
        ("from . import errors", {"aiosessions.errors"}),
        ("from .errors import SessionError as E", {"aiosessions.errors"}),
        ("from aiosessions import manager", {"aiosessions.manager"}),
        ("from aiosessions import Session", {"aiosessions"}),
        ("if TYPE_CHECKING:\n    from .codec import Codec", {"aiosessions.codec"}),
        ("def f():\n    from .storage import When", {"aiosessions.storage"}),
    ],
)
def test_no_import_is_overlooked(source: str, expected: set[str]) -> None:
    """Every form of import counts, at any depth."""
    assert set(_imported(ast.parse(source), "aiosessions")) == expected


def test_no_optional_dependency_is_loaded() -> None:
    """`import aiosessions` loads the runtime dependencies and nothing else."""
    own = loaded_by("aiosessions")

    extra = own - loaded_by(*RUNTIME) - sys.stdlib_module_names

    assert extra == {"aiosessions"}


def test_all_is_what_is_public() -> None:
    """`__all__` is sorted, and names everything public that `aiosessions` holds, and only that."""
    public = {
        name
        for name, value in vars(aiosessions).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }

    assert list(aiosessions.__all__) == sorted(aiosessions.__all__)
    assert set(aiosessions.__all__) == public


def test_public_names_are_documented() -> None:
    """Everything public has a docstring of its own."""
    undocumented = [name for name in aiosessions.__all__ if not getattr(aiosessions, name).__doc__]

    assert undocumented == []


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_small(module: str) -> None:
    """No module has more than 500 lines: what grows beyond that is two things."""
    path = PACKAGE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    assert len(file.read_text("utf-8").splitlines()) <= 500


def test_it_is_typed() -> None:
    """The package says that it is typed."""
    assert (PACKAGE / "py.typed").is_file()


def test_runtime_dependencies_are_few() -> None:
    """Nothing but redis, anyio and msgspec comes with the package."""
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    names = [each.partition(">=")[0] for each in project["dependencies"]]

    assert names == ["anyio", "msgspec", "redis[hiredis]"]
