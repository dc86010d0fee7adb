"""The commands of the documentation exist. Sybil runs its code; see conftest.py at the root."""

import re
import subprocess
import sys
from pathlib import Path

from tests.docs.snippets import run_as_program

__all__ = ["run_as_program"]

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]


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
