"""The documentation is true: its Python runs as it stands, its commands exist.

Every ```python block of README.md and docs/ is a complete program: it is run by itself, against a
real server, without the blocks before it. It may use `await` at the top level, as in
`python -m asyncio`. The one change made to it is the server's address: `redis://localhost:6379`
becomes the test server's. What is not to be run is not marked as python.
"""

import ast
import asyncio
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.servers import Server

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
SERVER = "redis://localhost:6379"

_BLOCK = re.compile(
    r"^```(?P<language>[\w-]+)[^\n]*\n(?P<source>.*?)^```\s*$", re.DOTALL | re.MULTILINE
)


def blocks(*languages: str, page: Path) -> Iterator[tuple[int, str]]:
    """The fenced code blocks of a page, each with the number of lines before its code."""
    text = page.read_text("utf-8")
    for block in _BLOCK.finditer(text):
        if block["language"] in languages:
            yield text.count("\n", 0, block.start("source")), block["source"]


def commands(page: Path) -> Iterator[list[str]]:
    """The shell commands of a page, in words."""
    for _, source in blocks("console", "sh", "shell", "bash", page=page):
        for line in source.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            words.whitespace_split = True
            command: list[str] = []
            for word in words:
                if word in {"&&", "||", ";", "|"}:
                    yield command
                    command = []
                else:
                    command.append(word)
            yield command


def nox_sessions(command: list[str]) -> list[str]:
    """The sessions that a command asks nox to run."""
    if "nox" not in command[:3] or command[:4] == ["python", "-m", "pip", "install"]:
        return []
    named: list[str] = []
    option = ""
    for word in command[command.index("nox") + 1 :]:
        if word == "--":
            break
        if word.startswith("-"):
            option = word
        elif option in {"-s", "--session", "--sessions", "-e"}:
            named.append(word)
    return named


def run_as_program(source: str, page: Path, line: int) -> None:
    """Run a block as `python -m asyncio` would, as the main module."""
    program = ModuleType("__main__")
    program.__file__ = str(page)
    code = compile(
        # So that a traceback shows the line of the page.
        "\n" * line + source,
        page,
        "exec",
        flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
        dont_inherit=True,
    )
    # Classes find their annotations' names in the module they say they are from.
    before, sys.modules["__main__"] = sys.modules["__main__"], program
    try:
        running = eval(code, vars(program))  # noqa: S307 - our own documentation
        if inspect.iscoroutine(running):
            asyncio.run(running)
    finally:
        sys.modules["__main__"] = before


SNIPPETS = [(page, line, source) for page in PAGES for line, source in blocks("python", page=page)]


@pytest.mark.parametrize(
    ("page", "line", "source"),
    SNIPPETS,
    ids=[f"{page.relative_to(ROOT)}:{line + 1}" for page, line, _ in SNIPPETS],
)
def test_python_runs_as_it_stands(page: Path, line: int, source: str, valkey: Server) -> None:
    """A block of Python in the documentation runs by itself, against a real server."""
    address = valkey.url.removesuffix("/0")

    run_as_program(source.replace(SERVER, address), page, line)


def test_readme_shows_python() -> None:
    """The README has Python to run."""
    assert list(blocks("python", page=ROOT / "README.md"))


def test_readme_shows_commands_that_exist() -> None:
    """The nox sessions in the documentation's shell blocks are sessions of the noxfile."""
    shown = {name for page in PAGES for each in commands(page) for name in nox_sessions(each)}

    listing = subprocess.run(  # noqa: S603 - our own interpreter and noxfile
        [sys.executable, "-m", "nox", "-f", ROOT / "noxfile.py", "--list", "-s", *sorted(shown)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert "tests" in shown
    assert listing.returncode == 0, listing.stderr


def test_ci_runs_what_the_readme_says() -> None:
    """What the README tells a newcomer to run is what decides about a change."""
    script = (ROOT / ".ci" / "run").read_text("utf-8")

    assert "nox -s tests\n" in script


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("python -m pip install nox && nox -s tests", ["tests"]),
        ("$ nox -s lint types -- --fix", ["lint", "types"]),
        ("python -m nox --session tests-3.12", ["tests-3.12"]),
        ("pip install aiosessions  # not nox", []),
    ],
)
def test_commands_are_understood(text: str, expected: list[str], tmp_path: Path) -> None:
    """The sessions are found in every usual way to write the command."""
    page = tmp_path / "page.md"
    page.write_text(f"```console\n{text}\n```\n", "utf-8")

    assert [name for each in commands(page) for name in nox_sessions(each)] == expected
