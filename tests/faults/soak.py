"""The command line: `python -m tests.faults.soak --minutes N`, or `nox -s soak -- --minutes N`."""

import argparse
import sys
from collections.abc import Sequence

from . import report
from .plot import draw
from .soaking import soak


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a soak; return 1 if anything grew or an expectation was broken."""
    parser = argparse.ArgumentParser(prog="nox -s soak --", description="Soak.")
    parser.add_argument("--minutes", type=float, default=30, help="the duration (default: 30)")
    parser.add_argument(
        "--save", action="store_true", help="if it passes, update docs/reliability.md"
    )
    options = parser.parse_args(arguments)
    found = soak(options.minutes, _print)
    for name, (first, last) in found.figures.items():
        _print(f"{name + ':':<16}{first:>14,g}{last:>14,g}")
    for problem in found.problems:
        _print(problem)
    if options.save and not found.problems:
        report.save_soak(found)
        draw(found, report.FOLDER / "soak.png")
    _print(f"{len(found.problems)} problems" if found.problems else "flat")
    return bool(found.problems)


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the output of a command line


if __name__ == "__main__":
    sys.exit(main())
