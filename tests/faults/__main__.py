"""The command line: `python -m tests.faults`, or `nox -s faults`."""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence

from . import report
from .scenarios import SCENARIOS
from .stage import SHORT, Form, Result, Scenario, play


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; 1 if anything was not as it should be."""
    options = _options(arguments)
    form = SHORT if options.short else Form()
    chosen = [SCENARIOS[name] for name in options.scenario or SCENARIOS]
    runs = [_run(chosen, form) for _ in range(options.times)]
    _say(f"\n{report.plain(report.rows(runs))}")
    problems = [f"{each.name}: {what}" for run in runs for each in run for what in each.problems]
    for problem in problems:
        _say(problem)
    if options.save and not problems:
        report.save_faults(report.faults(form, runs))
    _say(f"{len(problems)} problems" if problems else "all passed")
    return bool(problems)


def _run(chosen: Sequence[Scenario], form: Form) -> list[Result]:
    results: list[Result] = []
    for scenario in chosen:
        start = time.monotonic()
        result = asyncio.run(play(scenario, form))
        results.append(result)
        took = time.monotonic() - start
        _say(f"{scenario.name:<24}{took:5.1f} s  {'; '.join(result.problems) or 'passed'}")
    return results


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - that is what a command line is for


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s faults --", description="Run the fault suite.")
    parser.add_argument("scenario", nargs="*", help=f"one of: {', '.join(SCENARIOS)}")
    parser.add_argument("--times", type=int, default=1, help="how often (default: 1)")
    parser.add_argument("--short", action="store_true", help="as in the ordinary tests")
    parser.add_argument(
        "--save", action="store_true", help="if all passes, bring docs/reliability.md up to date"
    )
    options = parser.parse_args(arguments)
    unknown = set(options.scenario) - set(SCENARIOS)
    if unknown:
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    sys.exit(main())
