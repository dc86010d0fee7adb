"""The command line: `python -m tests.faults`, or `nox -s faults`."""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence

import msgspec

from tests.support.loops import LOOPS

from . import report
from .run import SHORT, LoadForm, Scenario, ScenarioResult, execute
from .scenarios import SCENARIOS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen scenarios; return 1 if an expectation was broken."""
    options = _options(arguments)
    form = msgspec.structs.replace(
        SHORT if options.short else LoadForm(),
        loops=(options.loop,) if options.loop else tuple(LOOPS),
    )
    chosen = [SCENARIOS[name] for name in options.scenario or SCENARIOS]
    runs = [_run(chosen, form) for _ in range(options.times)]
    _print(f"\n{report.plain(report.rows(runs))}")
    problems = [f"{each.name}: {what}" for run in runs for each in run for what in each.problems]
    for problem in problems:
        _print(problem)
    if options.save and not problems:
        report.save_faults(report.faults(form, runs))
    _print(f"{len(problems)} problems" if problems else "all passed")
    return bool(problems)


def _run(chosen: Sequence[Scenario], form: LoadForm) -> list[ScenarioResult]:
    results: list[ScenarioResult] = []
    for scenario in chosen:
        start = time.monotonic()
        result = asyncio.run(execute(scenario, form))
        results.append(result)
        took = time.monotonic() - start
        outcome = "; ".join(result.problems) or "passed"
        late = f"the latest call {result.latest * 1000:.0f} ms late"
        _print(f"{scenario.name:<24}{took:5.1f} s  {outcome}, {late}")
    return results


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the output of a command line


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nox -s faults --", description="Run the fault suite.")
    parser.add_argument("scenario", nargs="*", help=f"one of: {', '.join(SCENARIOS)}")
    parser.add_argument("--times", type=int, default=1, help="the number of runs (default: 1)")
    parser.add_argument(
        "--loop", choices=LOOPS, help="the event loop (default: the processes take them in turn)"
    )
    parser.add_argument("--short", action="store_true", help="the form of the ordinary tests")
    parser.add_argument(
        "--save", action="store_true", help="if all pass, update docs/reliability.md"
    )
    options = parser.parse_args(arguments)
    unknown = set(options.scenario) - set(SCENARIOS)
    if unknown:
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}")
    return options


if __name__ == "__main__":
    sys.exit(main())
