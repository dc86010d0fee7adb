"""The code of each page in docs/integrations/ runs: its blocks are one program with tests."""

import re
from pathlib import Path

import pytest

from tests.docs.snippets import SERVER, run_as_program

PAGES = sorted(Path(__file__).parents[2].glob("docs/integrations/*.md"))


def program(text: str) -> str:
    """The Python blocks of a page on their own lines, and calls of the tests in them."""
    pieces = re.split(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    source = ""
    for prose, language, code in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=False):
        kept = code if language == "python" else "\n" * code.count("\n")
        source += "\n" * prose.count("\n") + "\n" + kept
    tests = re.findall(r"^async def (test_\w+)\(\)", source, re.MULTILINE)
    assert tests
    return source + "".join(f"\nawait {name}()" for name in tests)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path, address: str) -> None:
    """The tests of a page pass."""
    run_as_program(program(page.read_text("utf-8")).replace(SERVER, address), page, 0)


def test_every_framework_has_a_page() -> None:
    """A missing page would be a test less."""
    assert [page.stem for page in PAGES] == ["fastapi", "litestar", "quart", "starlette"]
