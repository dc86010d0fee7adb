"""Runs code blocks of the documentation."""

import ast
import asyncio
import contextlib
import doctest
import inspect
import io
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from sybil import Example

SERVER = "redis://localhost:6379"


def run_program(example: Example) -> None:
    """Run a program of a page, with the address of the test server."""
    line = example.line + example.parsed.line_offset
    source = example.parsed.replace(SERVER, example.namespace["address"])
    run_as_program(source, Path(example.path), line)


def run_as_program(source: str, page: Path, line: int) -> None:
    """Run source code as the main module; it may use `await` at the top level.

    Args:
        source: The source code.
        page: The file that contains it.
        line: The number of lines before it, so that a traceback shows the line of the page.
    """
    program = ModuleType("__main__")
    program.__file__ = str(page)
    # Classes find their annotations' names in the module of this name.
    before, sys.modules["__main__"] = sys.modules["__main__"], program
    try:
        with asyncio.Runner() as runner:
            _execute(runner, "\n" * line + source, str(page), "exec", vars(program))
    finally:
        sys.modules["__main__"] = before


def run_session(example: Example) -> str | None:
    """Compare a session of `python -m asyncio` with its output; return the first difference."""
    namespace: dict[str, Any] = {}
    checker = doctest.OutputChecker()
    with asyncio.Runner() as runner:
        for step in doctest.DocTestParser().get_examples(example.parsed):
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                try:
                    _execute(runner, step.source, example.path, "single", namespace)
                except Exception as error:  # noqa: BLE001 - the page may show any
                    output.write("".join(traceback.format_exception_only(error)))
            want = step.exc_msg or step.want
            if not checker.check_output(want, output.getvalue(), doctest.ELLIPSIS):
                return f"{step.source}expected:\n{want}\ngot:\n{output.getvalue()}"
    return None


def _execute(
    runner: asyncio.Runner, source: str, file: str, mode: str, namespace: dict[str, Any]
) -> None:
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(source, file, mode, flags=flags, dont_inherit=True)
    result = eval(code, namespace)  # noqa: S307 - our own documentation
    if inspect.iscoroutine(result):
        runner.run(result)
