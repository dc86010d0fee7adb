"""Keeps results as JSON, and shows them as tables, also in docs/reliability.md.

The text between two markers of the page is made from the committed JSON. A test checks that it is
up to date:

    <!-- faults --> results of the fault suite <!-- /faults -->
    <!-- caches --> results of its scenarios with caches <!-- /caches -->
    <!-- soak --> results of the soak <!-- /soak -->
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from tests.support.machine import Environment, environment

from .run import ScenarioResult
from .workload import LoadForm

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
FOLDER = PAGE.with_suffix("")
_MARKED = re.compile(r"(<!-- (faults|caches|soak) -->).*?(<!-- /\2 -->)", re.DOTALL)
_COLUMNS = (
    "fault",
    "calls",
    "errors, nothing written",
    "errors in doubt",
    "wrong replies",
    "acknowledged writes lost",
    "recovered after",
)
_CACHE_COLUMNS = (*_COLUMNS, "last load after a deletion")
Runs = list[list[ScenarioResult]]


class FaultResults(msgspec.Struct):
    """The results of the fault suite."""

    environment: Environment
    form: LoadForm
    runs: Runs  # of the whole suite


class Moment(msgspec.Struct, array_like=True):
    """The resource usage of a soak at one time."""

    minutes: float  # since the start
    memory: float  # resident bytes of a process, as a mean
    objects: float  # that the garbage collector of a process tracks, as a mean
    tasks: int  # of a process, at most
    files: int  # of a process, at most
    connections: int  # of all processes, counted by the server
    calls: int  # so far
    errors: int  # so far
    server_memory: int  # bytes


class SoakResults(msgspec.Struct):
    """The results of a soak."""

    environment: Environment
    processes: int
    callers: int  # in each process
    warm_up: float  # minutes that do not count
    errors: dict[str, int]  # `StorageUnavailable`, by cause
    flaws: list[str]
    faults: int
    moments: list[Moment]
    figures: dict[str, tuple[float, float]]  # medians of the first and the last third
    problems: list[str]  # broken expectations; empty if the soak passed


def save_faults(form: LoadForm, runs: Runs) -> None:
    """Save the results, those of caches separately, and update the page."""
    for name in ("faults", "caches"):
        chosen = [[each for each in run if _is_of(name, each)] for run in runs]
        if any(chosen):
            results = FaultResults(environment(), form, chosen)
            _save(name, msgspec.json.format(msgspec.json.encode(results), indent=1).decode())


def _is_of(section: str, result: ScenarioResult) -> bool:
    return result.name.startswith("cache-") == (section == "caches")


def save_soak(results: SoakResults) -> None:
    """Save the results, with one line for each moment, and update the page."""
    text = msgspec.json.format(msgspec.json.encode(results), indent=1).decode()
    moment = re.compile(r"\[\s+([-\d.e+]+(?:,\s+[-\d.e+]+){8})\s+\]")
    _save("soak", moment.sub(lambda each: f"[{' '.join(each[1].split())}]", text))


def _save(name: str, text: str) -> None:
    (FOLDER / f"{name}.json").write_text(f"{text}\n", "utf-8")
    PAGE.write_text(rewritten(PAGE.read_text("utf-8")), "utf-8")


def rewritten(text: str) -> str:
    """The text of a page with everything between markers made again."""
    sections: dict[str, Callable[[], str]] = {
        "faults": partial(_fault_section, "faults", _COLUMNS),
        "caches": partial(_fault_section, "caches", _CACHE_COLUMNS),
        "soak": _soak_section,
    }
    return _MARKED.sub(lambda each: f"{each[1]}\n\n{sections[each[2]]()}\n\n{each[3]}", text)


def plain(runs: Runs) -> str:
    """The table for a terminal: a block for each row, because errors are long."""
    return "\n\n".join(
        "\n".join(f"{name + ':':<26}{cell}" for name, cell in zip(_CACHE_COLUMNS, row, strict=True))
        for row in _rows(runs)
    )


def _rows(runs: Runs) -> list[tuple[str, ...]]:
    """A row for each scenario, over all runs."""
    by_name: dict[str, list[ScenarioResult]] = {}
    for run in runs:
        for result in run:
            by_name.setdefault(result.name, []).append(result)
    return [_row(name, results) for name, results in by_name.items()]


def _row(name: str, results: list[ScenarioResult]) -> tuple[str, ...]:
    applied = sum(result.applied for result in results)
    doubts = _errors(result.doubts for result in results)
    lost = [result.lost for result in results]
    took = [seconds for result in results for seconds in result.recovery]
    return (
        f"`{name}`: {results[0].title}",
        f"{sum(result.calls for result in results):,}",
        _errors(result.errors for result in results) or "none",
        f"{doubts};<br>applied: {applied:,}" if doubts else "none",
        str(sum(result.wrong for result in results)),
        " + ".join(map(str, lost)) if any(lost) else "0",
        f"{statistics.median(took):.2f} s, at most {max(took):.2f} s" if took else "",
        _outlived(results),
    )


def _outlived(results: Sequence[ScenarioResult]) -> str:
    """The longest time for which loads found a copy of a session that was deleted."""
    kinds = {
        "with announcements": max(result.outlived for result in results),
        "without": max(result.outlived_unannounced for result in results),
    }
    longest = (f"{name} {seconds * 1000:.1f} ms" for name, seconds in kinds.items() if seconds)
    return ", ".join(longest) or "none later"


def _errors(counts: Iterable[dict[str, int]]) -> str:
    total = sum(map(Counter, counts), Counter[str]())
    return ";<br>".join(
        f"{'once' if times == 1 else f'{times:,} times'}: {cause}"
        for cause, times in total.most_common()
    )


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    table = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def _fault_section(name: str, columns: Sequence[str]) -> str:
    path = FOLDER / f"{name}.json"
    results = msgspec.json.decode(path.read_bytes(), type=FaultResults)
    rows = (row[: len(columns)] for row in _rows(results.runs))
    form, count = results.form, len(results.runs)
    latest = max(result.latest for run in results.runs for result in run)
    return (
        f"{_markdown(columns, rows)}\n\n"
        f"Totals of {count} runs, all passed, with {form.workers} processes of {form.clients} "
        f"clients each on {' and '.join(form.loops)}, and up to {form.rounds} faults in a run. The "
        f"latest call ended {latest * 1000:.0f} ms after its `timeout`. "
        f"{_where(results.environment)}"
    )


def _soak_section() -> str:
    results = msgspec.json.decode((FOLDER / "soak.json").read_bytes(), type=SoakResults)
    last = results.moments[-1]
    rows = [
        (name, _figure(name, first), _figure(name, end))
        for name, (first, end) in results.figures.items()
    ]
    return (
        f"{last.minutes:.0f} minutes, {results.processes} processes of {results.callers} clients, "
        f"{last.calls:,} calls, {results.faults} faults, {last.errors:,} `StorageUnavailable`, "
        f"{len(results.flaws)} wrong replies; the first {results.warm_up:g} minutes are the "
        f"warm-up. {_where(results.environment)}\n\n"
        f"{_markdown(('after the warm-up', 'first third', 'last third'), rows)}"
    )


def _figure(name: str, value: float) -> str:
    return f"{value / 1e6:.2f} MB" if "memory" in name else f"{value:,.0f}"


def _where(found: Environment) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in found.packages.items())
    where = f"{found.python}, {packages}; {found.machine}, {found.cores} cores"
    return f"{where}; revision {found.revision}, {found.date}."
