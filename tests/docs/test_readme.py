"""The commands, tests and links of the documentation exist.

Sybil runs its code; see conftest.py at the root.
"""

import re
import subprocess
import sys
from pathlib import Path

from tests.docs.snippets import run_as_program

__all__ = ["run_as_program"]

ROOT = Path(__file__).parents[2]
NAMES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md"]
PAGES = [*(ROOT / name for name in NAMES), *ROOT.glob("docs/*.md")]


def test_nox_sessions_of_the_documentation_exist() -> None:
    """Each `nox -s NAME` of a page names a session of the noxfile."""
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    shown = {
        name
        for names in re.findall(r"nox -s((?: [a-z][\w.]*(?:-[\d.]+)?)+)", text)
        for name in names.split()
    }

    listing = subprocess.run(  # noqa: S603 - our own interpreter and noxfile
        [sys.executable, "-m", "nox", "-f", ROOT / "noxfile.py", "--list", "-s", *sorted(shown)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert {"tests", "lint", "demo", "race"} <= shown
    assert listing.returncode == 0, listing.stderr


def test_ci_runs_the_command_of_the_readme() -> None:
    """The test command that the README shows decides about a change."""
    assert "nox -s tests\n" in (ROOT / "README.md").read_text("utf-8")
    assert "nox -s tests\n" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_tests_of_the_documentation_exist() -> None:
    """Each test that docs/security.md names is in the suite or in the contract kit."""
    shown = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "security.md").read_text("utf-8")))
    sources = [*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("src/aiosessions/testing/*.py")]
    text = "\n".join(source.read_text("utf-8") for source in sources)
    defined = set(re.findall(r"def (test_\w+)\(", text))

    assert shown
    assert shown - defined == set()


def test_links_between_pages_lead_to_a_heading() -> None:
    """The file of a relative link exists, and has the heading."""
    broken = []
    for page in PAGES:
        for name, heading in re.findall(
            r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text("utf-8")
        ):
            target = page.parent / name if name else page
            if not target.exists() or (heading and heading not in anchors(target)):
                broken.append((page.name, name, heading))

    assert broken == []


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
