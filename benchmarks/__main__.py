"""The command line: `nox -s bench -- SCENARIO` or `python -m benchmarks SCENARIO`."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from . import plots, tables
from .declared import PLOTS, TABLES
from .measure import Bench
from .results import FOLDER, Result, committed, write
from .scenarios import SCENARIOS

_NOT_IN_ALL = {"memory"}  # minutes on end for one figure
_WIDTH = 80


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scenarios that the arguments name."""
    options = _options(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    if options.scenario == "report":
        tables.rewrite(committed(), TABLES)
        for result in committed().values():
            _draw(result, FOLDER)
        return 0
    names = [name for name in SCENARIOS if name not in _NOT_IN_ALL]
    folder = _folder(options)
    for name in names if options.scenario == "all" else [options.scenario]:
        start = time.monotonic()
        bench = Bench(
            console,
            quick=options.quick,
            rounds=options.rounds or (3 if options.quick else 9),
            url=options.url,
        )
        result = SCENARIOS[name](bench)
        write(result, folder / f"{name}.json")
        _show(result, console)
        for path in [folder / f"{name}.json", *_draw(result, folder)]:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
        console.print(f"{time.monotonic() - start:.0f} s", style="dim")
    if folder == FOLDER:
        tables.rewrite(committed(), TABLES)
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
    parser.add_argument("--rounds", type=int, metavar="N", help="the number of rounds")
    return parser.parse_args(arguments)


def _folder(options: argparse.Namespace) -> Path:
    """The folder for results: quick runs and runs on other servers replace nothing."""
    if options.quick or options.url:
        return Path(tempfile.mkdtemp(prefix="aiosessions-bench-"))
    return FOLDER


def _draw(result: Result, folder: Path) -> list[Path]:
    drawn = [plots.draw(plot, result, folder) for plot in PLOTS[result.scenario]]
    return [path for path in drawn if path]


def _show(result: Result, console: Console) -> None:
    """Print the result of a scenario."""
    console.rule(result.scenario)
    machine = result.environment
    console.print(
        f"{machine.python}, {machine.machine}, {machine.cores} cores. "
        f"A fixed computation varied by {result.noise.spread:.0%}.",
        highlight=False,
    )
    for what, why in result.missing.items():
        console.print(f"Not measured: {what}, {why}.", highlight=False)
    made = [tables.claims(result.claims)] if result.claims else []
    for table in TABLES[result.scenario]:
        made += tables.sheets(table, result.rows)
    for sheet in made:
        console.print(_rich(sheet))


def _rich(sheet: tables.Sheet) -> RichTable:
    shown = RichTable(
        title=sheet.title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=sheet.note or None,
    )
    for place, head in enumerate(sheet.heads):
        numeric = place and all(line[place][:1].isdigit() for line in sheet.cells if line[place])
        shown.add_column(head, justify="right" if numeric else "left", overflow="fold")
    for line in sheet.cells:
        shown.add_row(*line)
    return shown


if __name__ == "__main__":
    sys.exit(main())
