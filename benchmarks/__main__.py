"""The command line: `nox -s bench -- SCENARIO` or `python -m benchmarks SCENARIO`."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from . import page, plots, results
from .measure import Bench, BenchSettings
from .results import FOLDER, Result
from .scenarios import SCENARIOS
from .tables import Table, summary, tables

_NOT_IN_ALL = {"memory"}  # minutes on end for one figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scenarios that the arguments name."""
    options = _options(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file is not wrapped to the width of a terminal
    if options.scenario == "report":
        page.rewrite(results.committed())
        plots.draw_all(results.committed(), FOLDER)
        return 0
    names = [name for name in SCENARIOS if name not in _NOT_IN_ALL]
    if options.scenario != "all":
        names = [options.scenario]
    folder = _folder(options)
    found: list[Result] = []
    for name in names:
        start = time.monotonic()
        with Bench(_settings(options), console) as bench:
            result = SCENARIOS[name](bench)
        found.append(result)
        if options.json is not None:
            results.write_all(found, options.json)
        if folder is not None:
            results.write(result, folder / f"{name}.json")
            plots.draw(result, folder)
        _show(result, console)
        console.print(f"{time.monotonic() - start:.0f} s", style="dim")
    if folder == FOLDER:
        page.rewrite(results.committed())
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nox -s bench --",
        description="Measure aiosessions, on this machine or against a server of your own.",
    )
    parser.add_argument(
        "scenario",
        nargs="?",
        default="all",
        choices=[*SCENARIOS, "all", "report"],
        help="the scenario; 'all' leaves out the long 'memory', and 'report' only redoes tables "
        "and plots from committed results (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="measure little, for a first look")
    parser.add_argument("--url", help="a server of your own, instead of embedded servers")
    parser.add_argument("--server", choices=["valkey", "redis"], help="only this embedded server")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the results to this file"
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="the folder for results and plots (default: docs/benchmarks for a full run on "
        "embedded servers, and none for other runs)",
    )
    parser.add_argument("--rounds", type=int, help="the number of rounds")
    parser.add_argument("--seconds", type=float, help="the duration of a closed loop")
    parser.add_argument(
        "--loads",
        type=int,
        default=10_000_000,
        help="the number of loads in 'memory' (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def _settings(options: argparse.Namespace) -> BenchSettings:
    return BenchSettings(
        quick=options.quick,
        rounds=options.rounds or (3 if options.quick else 9),
        seconds=options.seconds or (0.1 if options.quick else 0.3),
        url=options.url,
        server=options.server,
        loads=options.loads,
    )


def _folder(options: argparse.Namespace) -> Path | None:
    """The folder for results; None for quick runs and other servers."""
    if options.into is not None:
        return Path(options.into).resolve()
    if options.quick or options.url or options.server:
        return None
    return FOLDER


def _show(result: Result, console: Console) -> None:
    """Print the result of a scenario."""
    console.rule(result.scenario)
    for line in summary(result):
        console.print(line, highlight=False)
    for table in tables(result):
        console.print(_rich(table))
        if table.note:
            console.print(table.note, style="dim", highlight=False)


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for place, name in enumerate(table.columns):
        cells = [row[place] for row in table.rows]
        numeric = all(cell[:1].isdigit() or not cell for cell in cells)
        shown.add_column(name, justify="right" if numeric else "left")
    for row in table.rows:
        shown.add_row(*row)
    return shown


if __name__ == "__main__":
    sys.exit(main())
