"""The command line: `python -m tests.faults.soak --minutes N`, or `nox -s soak -- --minutes N`."""

import argparse
import sys
from collections.abc import Sequence

from . import report
from .plot import draw
from .soaking import soak


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; 1 if anything grew or was not as it should be."""
    parser = argparse.ArgumentParser(prog="nox -s soak --", description="Soak.")
    parser.add_argument("--minutes", type=float, default=30, help="how long (default: 30)")
    parser.add_argument(
        "--save", action="store_true", help="if it passes, bring docs/reliability.md up to date"
    )
    options = parser.parse_args(arguments)
    found = soak(options.minutes, _say)
    for name, (first, last) in found.figures.items():
        _say(f"{name + ':':<16}{first:>14,g}{last:>14,g}")
    for problem in found.problems:
        _say(problem)
    if options.save and not found.problems:
        report.save_soak(found)
        draw(found, report.FOLDER / "soak.png")
    _say(f"{len(found.problems)} problems" if found.problems else "flat")
    return bool(found.problems)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - that is what a command line is for


if __name__ == "__main__":
    sys.exit(main())
