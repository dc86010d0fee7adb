"""The order of the modules, and the modules that importing the package loads."""

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
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

# From the bottom to the top. A module imports from lower levels only, so modules of one level are
# independent. All of the `redis` package is on one level.
LEVELS = (
    {"errors"},
    {"session"},
    {"codec"},
    {"storage"},
    {"record", "_table"},
    {"local", "redis"},
    {"cache"},
    {"_retry", "_rotation", "_sweep"},
    {"manager"},
    {"asgi", "testing"},
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}

# The runtime dependencies; `import aiosessions` loads these and nothing else.
RUNTIME = ("anyio.lowlevel", "hiredis", "msgspec", "redis.asyncio")

MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
)


def imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports, also for type checkers only."""
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
    """The absolute names of all modules that the import statements of `tree` refer to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                # `from .redis import storage` names a module, `from .errors import X` does not.
                full = f"{base}.{alias.name}"
                is_module = full.removeprefix("aiosessions.") in MODULES
                yield full if is_module else base


def level_of(module: str) -> int:
    """The level of a module, by the first part of its name."""
    return LEVEL[module.partition(".")[0]]


def loaded_by(*modules: str) -> set[str]:
    """The top-level modules that a new interpreter has loaded after importing `modules`."""
    code = f"import sys, {', '.join(modules)}\nprint(*sys.modules)"
    run = subprocess.run(  # noqa: S603 - the interpreter and the names are constants
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in run.stdout.split()}


def test_every_module_has_a_level() -> None:
    """The order covers all modules of the package."""
    assert {module.split(".")[0] for module in MODULES} <= LEVEL.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    """A module imports from lower levels, and inside a package from its siblings."""
    family = module.partition(".")[0]

    wrong = {
        name
        for name in imports_of(module)
        if name.split(".")[0] != family and (not name or level_of(name) >= level_of(module))
    }

    assert wrong == set()


def test_imports_are_acyclic() -> None:
    """The modules can be put in an order in which each imports only earlier ones."""
    graph = {module: imports_of(module) - {module} for module in MODULES}
    for module in MODULES:
        # The `__init__` of a package re-exports its modules, so they do not import from it.
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
def test_all_forms_of_import_count(source: str, expected: set[str]) -> None:
    """The order holds for every form of import, at any depth."""
    assert set(_imported(ast.parse(source), "aiosessions")) == expected


def test_no_optional_dependency_is_loaded() -> None:
    """`import aiosessions` loads the runtime dependencies and nothing else."""
    own = loaded_by("aiosessions")

    extra = own - loaded_by(*RUNTIME) - sys.stdlib_module_names

    assert extra == {"aiosessions"}


def test_all_names_the_public_objects() -> None:
    """`__all__` is sorted and lists every public object of `aiosessions`."""
    public = {
        name
        for name, value in vars(aiosessions).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }

    assert list(aiosessions.__all__) == sorted(aiosessions.__all__)
    assert set(aiosessions.__all__) == public


def test_public_names_have_docstrings() -> None:
    """Every public object has a docstring."""
    undocumented = [name for name in aiosessions.__all__ if not getattr(aiosessions, name).__doc__]

    assert undocumented == []


def test_package_is_marked_as_typed() -> None:
    """The package contains the marker file of PEP 561."""
    assert (PACKAGE / "py.typed").is_file()


def test_runtime_dependencies_are_few() -> None:
    """The package depends on redis, anyio and msgspec only."""
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    names = [each.partition(">=")[0] for each in project["dependencies"]]

    assert names == ["anyio", "msgspec", "redis[hiredis]"]
