"""The command line: `python -m tests.faults`, or `nox -s faults`."""

import argparse
import asyncio
import sys
from collections.abc import Sequence

import msgspec

from tests.support.loops import LOOPS

from . import report
from .run import SHORT, ScenarioResult, execute
from .scenarios import SCENARIOS
from .workload import LoadForm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen scenarios; return 1 if an expectation was broken."""
    options = _options(arguments)
    form = SHORT if options.short else LoadForm()
    if options.loop:
        form = msgspec.structs.replace(form, loops=(options.loop,))
    runs: list[list[ScenarioResult]] = []
    for _ in range(options.times):
        runs.append([])
        for name in options.scenario or SCENARIOS:
            result = asyncio.run(execute(name, SCENARIOS[name], form))
            runs[-1].append(result)
            print(f"{name:<24}{'; '.join(result.problems) or 'passed'}", flush=True)  # noqa: T201
    print(f"\n{report.plain(runs)}")  # noqa: T201
    failed = any(result.problems for run in runs for result in run)
    if options.save and not failed:
        report.save_faults(form, runs)
    return failed


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s faults --", description="Run the fault suite.")
    parser.add_argument("scenario", nargs="*", help=f"one of: {', '.join(SCENARIOS)}")
    parser.add_argument("--times", type=int, default=1, help="the number of runs (default: 1)")
    parser.add_argument("--loop", choices=LOOPS, help="one event loop (default: all in turn)")
    parser.add_argument("--short", action="store_true", help="the form of the ordinary tests")
    parser.add_argument("--save", action="store_true", help="if all pass, update the documentation")
    options = parser.parse_args(arguments)
    if unknown := set(options.scenario) - set(SCENARIOS):
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    sys.exit(main())
