"""The order of the modules, and the modules that importing the package loads."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import aiosessions

PACKAGE = Path(aiosessions.__file__).parent

# From the bottom to the top. A module imports from lower levels only, so modules of one level are
# independent. All of the `redis` package is on one level.
LEVELS = (
    {"errors", "_background"},
    {"session", "_differences", "_redaction", "_unknown"},
    {"codec"},
    {"storage"},
    {"encryption", "record", "_listeners", "_table"},
    {"local", "redis", "_copies"},
    {"_loads", "_lifetime"},
    {"cache"},
    {"_principals", "_retry", "_rotation", "_sweep"},
    {"_owned"},
    {"manager"},
    {"_held"},
    {"asgi", "resources", "testing"},
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}

# The runtime dependencies; `import aiosessions` loads these and nothing else.
RUNTIME = ("anyio.lowlevel", "hiredis", "msgspec", "redis.asyncio")

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def imports_of(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, also for type checkers only."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: package.count(".") + 2 - node.level]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            # `from .redis import storage` names a module, `from .errors import X` does not.
            names = [full if (full := f"{base}.{name}") in MODULES else base for name in names]
        elif not isinstance(node, ast.Import):
            continue
        yield from (name for name in names if name.split(".")[0] == "aiosessions")


def family_of(module: str) -> str:
    """The module or the package right below `aiosessions`; empty for `aiosessions` itself."""
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    """A module imports from lower levels, and inside a package from its siblings."""
    own = family_of(module)
    assert own in LEVEL, "give the module a level in LEVELS"

    families = {family_of(name) for name in imports_of(module)} - {own}

    assert {family for family in families if LEVEL.get(family, 99) >= LEVEL[own]} == set()


def test_imports_are_acyclic() -> None:
    """The modules can be put in an order in which each imports only earlier ones."""
    graph = {module: {*imports_of(module)} - {module} for module in MODULES}

    assert graph["aiosessions.redis._pipeline"] > {"aiosessions.errors"}
    assert set(graphlib.TopologicalSorter(graph).static_order()) >= set(MODULES)


def loaded_by(*modules: str) -> set[str]:
    """The top-level modules that a new interpreter has loaded after importing `modules`."""
    code = f"import sys, {', '.join(modules)}\nprint(*sys.modules)"
    run = subprocess.run(  # noqa: S603 - the interpreter and the names are constants
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in run.stdout.split()}


def test_no_optional_dependency_is_loaded() -> None:
    """`import aiosessions` loads the runtime dependencies and nothing else."""
    extra = loaded_by("aiosessions") - loaded_by(*RUNTIME) - sys.stdlib_module_names

    assert extra == {"aiosessions"}


def test_all_names_the_public_objects() -> None:
    """`__all__` is sorted, lists every public object, and each has a docstring."""
    public = {
        name: value
        for name, value in vars(aiosessions).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }

    assert list(aiosessions.__all__) == sorted(public)
    assert [name for name, value in public.items() if not value.__doc__] == []
    assert (PACKAGE / "py.typed").is_file()
