"""Keeps results as JSON, and shows them as tables, also in docs/reliability.md.

The text between two markers of the page is made from the committed JSON. A test checks that it is
up to date:

    <!-- faults --> results of the fault suite <!-- /faults -->
    <!-- soak --> results of the soak <!-- /soak -->
"""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from benchmarks.machine import environment
from benchmarks.results import Environment

from .run import LoadForm, ScenarioResult

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
FOLDER = PAGE.with_suffix("")
_FAULTS = FOLDER / "faults.json"
_SOAK = FOLDER / "soak.json"
_MARKED = re.compile(
    r"(?P<start><!-- (?P<what>faults|soak) -->).*?(?P<end><!-- /(?P=what) -->)", re.DOTALL
)
COLUMNS = (
    "fault",
    "calls",
    "errors, nothing written",
    "errors in doubt",
    "wrong replies",
    "acknowledged writes lost",
    "recovered after",
)


class FaultResults(msgspec.Struct):
    """The results of the fault suite.

    Attributes:
        environment: Machine and versions.
        form: The size of the load.
        runs: The results of each run of the whole suite.
    """

    environment: Environment
    form: LoadForm
    runs: list[list[ScenarioResult]]


class Moment(msgspec.Struct, array_like=True):
    """The resource usage of a soak at one time.

    Attributes:
        minutes: Minutes since the start.
        memory: Resident bytes of a process, as a mean.
        objects: Objects that the garbage collector of a process tracks, as a mean.
        tasks: Tasks of an event loop, at most.
        files: Open files of a process, at most.
        connections: Connections of all processes, counted by the server.
        calls: Calls that have ended so far.
        errors: How many of them were unavailable.
        server_memory: Bytes that the server uses.
    """

    minutes: float
    memory: float
    objects: float
    tasks: int
    files: int
    connections: int
    calls: int
    errors: int
    server_memory: int


class SoakResults(msgspec.Struct):
    """The results of a soak.

    Attributes:
        environment: Machine and versions.
        processes: The number of processes.
        callers: The number of clients in each.
        warm_up: Minutes that do not count.
        errors: The `StorageUnavailable` by cause.
        flaws: The flaws of all calls.
        faults: How often the server was disturbed.
        moments: The resource usage over time.
        figures: By name: the medians of the first and the last third after the warm-up.
        problems: The broken expectations; empty if the soak passed.
    """

    environment: Environment
    processes: int
    callers: int
    warm_up: float
    errors: dict[str, int]
    flaws: list[str]
    faults: int
    moments: list[Moment]
    figures: dict[str, tuple[float, float]]
    problems: list[str]


def faults(form: LoadForm, runs: Sequence[Sequence[ScenarioResult]]) -> FaultResults:
    """The results of runs on this machine."""
    return FaultResults(environment("redis", "hiredis"), form, [list(run) for run in runs])


def rows(runs: Sequence[Sequence[ScenarioResult]]) -> list[tuple[str, ...]]:
    """A row for each scenario, over all runs."""
    names = dict.fromkeys(result.name for run in runs for result in run)
    return [_row([each for run in runs for each in run if each.name == name]) for name in names]


def _row(results: list[ScenarioResult]) -> tuple[str, ...]:
    applied = sum(result.applied for result in results)
    doubts = _errors(result.doubts for result in results)
    lost = [result.lost for result in results]
    took = [seconds for result in results for seconds in result.recovery]
    return (
        results[0].title,
        f"{sum(result.calls for result in results):,}",
        _errors(result.errors for result in results) or "none",
        f"{doubts};<br>applied: {applied:,}" if doubts else "none",
        str(sum(result.wrong for result in results)),
        " + ".join(map(str, lost)) if any(lost) else "0",
        f"{statistics.median(took):.2f} s, at most {max(took):.2f} s" if took else "",
    )


def _errors(counts: Iterable[dict[str, int]]) -> str:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return ";<br>".join(
        f"{'once' if times == 1 else f'{times:,} times'}: {cause}"
        for cause, times in total.most_common()
    )


def plain(lines: Iterable[Sequence[str]]) -> str:
    """A table for a terminal: a block for each row, because errors are long."""
    return "\n".join(
        "\n".join(f"{name + ':':<26}{cell}" for name, cell in zip(COLUMNS, line, strict=True))
        + "\n"
        for line in lines
    )


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table for a page."""
    table = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def save_faults(results: FaultResults) -> None:
    """Save the results and update the page."""
    _save(_FAULTS, results)


def save_soak(results: SoakResults) -> None:
    """Save the results and update the page."""
    _save(_SOAK, results)


def _save(path: Path, results: FaultResults | SoakResults) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_as_lines(results))
    PAGE.write_text(rewritten(PAGE.read_text("utf-8")), "utf-8")


def _as_lines(results: FaultResults | SoakResults) -> bytes:
    """JSON that can be read and compared line by line; each moment is one line."""
    text = msgspec.json.format(msgspec.json.encode(results), indent=1).decode()
    moments = re.compile(r"\[\s+([-\d.e+]+(?:,\s+[-\d.e+]+){8})\s+\]")
    return moments.sub(lambda each: f"[{' '.join(each[1].split())}]", text).encode() + b"\n"


def rewritten(text: str) -> str:
    """The text of a page with everything between markers made again."""

    def fill(marked: re.Match[str]) -> str:
        shown = _fault_section() if marked["what"] == "faults" else _soak_section()
        return f"{marked['start']}\n\n{shown}\n\n{marked['end']}"

    return _MARKED.sub(fill, text)


def _fault_section() -> str:
    if not _FAULTS.exists():
        return "*Not run yet.*"
    results = msgspec.json.decode(_FAULTS.read_bytes(), type=FaultResults)
    form, count = results.form, len(results.runs)
    latest = max(result.latest for run in results.runs for result in run)
    runs = "One run" if count == 1 else f"{count} runs in a row, all passed"
    summary = (
        f"{runs}, with {form.workers} processes of {form.clients} clients each on "
        f"{' and '.join(form.loops)}; each fault {form.rounds} times or for as long. The latest "
        f"call ended {latest * 1000:.0f} ms after its `timeout`. {_where(results.environment)}"
    )
    return f"{markdown(COLUMNS, rows(results.runs))}\n\n{summary}"


def _soak_section() -> str:
    if not _SOAK.exists():
        return "*Not run yet.*"
    results = msgspec.json.decode(_SOAK.read_bytes(), type=SoakResults)
    last = results.moments[-1]
    table = markdown(
        ("after the warm-up", "first third", "last third"),
        [
            (name, _figure(name, first), _figure(name, end))
            for name, (first, end) in results.figures.items()
        ],
    )
    return (
        f"{last.minutes:.0f} minutes, {results.processes} processes of {results.callers} clients, "
        f"{last.calls:,} calls, {results.faults} faults, {last.errors:,} `StorageUnavailable`, "
        f"{len(results.flaws)} wrong replies; the first {results.warm_up:g} minutes are the "
        f"warm-up. {_where(results.environment)}\n\n{table}\n\n"
        "![Memory, tasks, connections and errors over time](reliability/soak.png)"
    )


def _figure(name: str, value: float) -> str:
    return f"{value / 1e6:.2f} MB" if "memory" in name else f"{value:,.0f}"


def _where(found: Environment) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in found.packages.items())
    where = f"{found.python}, {packages}; {found.machine}, {found.cores} cores"
    return f"{where}; revision {found.revision}, {found.date}."
