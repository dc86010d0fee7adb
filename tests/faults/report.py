"""Results as JSON, as a table, and in docs/reliability.md.

Whatever stands in the page between markers is made from the committed JSON, and a test sees to it
that it is up to date:

    <!-- faults --> what the fault suite found <!-- /faults -->
    <!-- soak --> what the soak found <!-- /soak -->
"""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from benchmarks.machine import environment
from benchmarks.results import Environment

from .stage import Form, Result

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
FOLDER = PAGE.with_suffix("")
_FAULTS = FOLDER / "faults.json"
_SOAK = FOLDER / "soak.json"
_MARKED = re.compile(
    r"(?P<start><!-- (?P<what>faults|soak) -->).*?(?P<end><!-- /(?P=what) -->)", re.DOTALL
)
COLUMNS = (
    "fault",
    "operations",
    "errors",
    "wrong replies",
    "acknowledged writes lost",
    "recovered after",
)


class Faults(msgspec.Struct):
    """What the fault suite found.

    Attributes:
        environment: Where.
        form: How long and how hard.
        runs: The results of each run of the whole suite.
    """

    environment: Environment
    form: Form
    runs: list[list[Result]]


class Moment(msgspec.Struct, array_like=True):
    """What a soak used up at a moment.

    Attributes:
        minutes: Since it began.
        memory: Resident bytes of each process, in the mean.
        objects: Objects that each garbage collector keeps an eye on, in the mean.
        tasks: Of each event loop, the most.
        files: Open files of each process, the most.
        connections: Of all processes, as the server counts them.
        verbs: Verbs that have ended so far.
        errors: Of them, those that were unavailable.
        server_memory: Bytes that the server uses.
    """

    minutes: float
    memory: float
    objects: float
    tasks: int
    files: int
    connections: int
    verbs: int
    errors: int
    server_memory: int


class Soak(msgspec.Struct):
    """What a soak found.

    Attributes:
        environment: Where.
        processes: How many there were.
        callers: How many in each.
        warm_up: Minutes that do not count.
        errors: `StorageUnavailable` by its message.
        flaws: What was wrong.
        faults: How often the server was disturbed.
        moments: What was used up.
        figures: At the first and at the last third after the warm-up, by what it is.
        problems: What was not flat or not right; empty if it passed.
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


def faults(form: Form, runs: Sequence[Sequence[Result]]) -> Faults:
    """What was found here and now."""
    return Faults(environment("redis", "hiredis"), form, [list(run) for run in runs])


def rows(runs: Sequence[Sequence[Result]]) -> list[tuple[str, ...]]:
    """A line for each scenario, over all runs."""
    names = dict.fromkeys(result.name for run in runs for result in run)
    return [_row([each for run in runs for each in run if each.name == name]) for name in names]


def _row(results: list[Result]) -> tuple[str, ...]:
    errors: Counter[str] = Counter()
    for result in results:
        for message, times in result.errors.items():
            errors[message] += times
    told = ";<br>".join(
        f"{'once' if times == 1 else f'{times:,} times'}: {message}"
        for message, times in errors.most_common()
    )
    lost = [result.lost for result in results]
    took = [seconds for result in results for seconds in result.recovery]
    return (
        results[0].title,
        f"{sum(result.operations for result in results):,}",
        told or "none",
        str(sum(result.wrong for result in results)),
        " + ".join(map(str, lost)) if any(lost) else "0",
        f"{statistics.median(took):.2f} s, at most {max(took):.2f} s" if took else "",
    )


def plain(lines: Iterable[Sequence[str]]) -> str:
    """A table for a terminal: a block for each line, as errors are long."""
    return "\n".join(
        "\n".join(f"{name + ':':<26}{cell}" for name, cell in zip(COLUMNS, line, strict=True))
        + "\n"
        for line in lines
    )


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table for a page."""
    table = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def save_faults(found: Faults) -> None:
    """Keep it, and bring the page up to date."""
    _save(_FAULTS, found)


def save_soak(found: Soak) -> None:
    """Keep it, and bring the page up to date."""
    _save(_SOAK, found)


def _save(path: Path, found: Faults | Soak) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_as_lines(found))
    PAGE.write_text(rewritten(PAGE.read_text("utf-8")), "utf-8")


def _as_lines(found: Faults | Soak) -> bytes:
    """JSON that can be read, and compared line by line; but a moment is one line."""
    text = msgspec.json.format(msgspec.json.encode(found), indent=1).decode()
    moments = re.compile(r"\[\s+([-\d.e+]+(?:,\s+[-\d.e+]+){8})\s+\]")
    return moments.sub(lambda each: f"[{' '.join(each[1].split())}]", text).encode() + b"\n"


def rewritten(text: str) -> str:
    """A page's text with everything between markers made anew."""

    def fill(marked: re.Match[str]) -> str:
        shown = _shown_faults() if marked["what"] == "faults" else _shown_soak()
        return f"{marked['start']}\n\n{shown}\n\n{marked['end']}"

    return _MARKED.sub(fill, text)


def _shown_faults() -> str:
    if not _FAULTS.exists():
        return "*Not run yet.*"
    found = msgspec.json.decode(_FAULTS.read_bytes(), type=Faults)
    form, count = found.form, len(found.runs)
    runs = "One run" if count == 1 else f"{count} runs in a row, all passed"
    where = (
        f"{runs}, with {form.workers} processes of {form.callers} callers each, each fault "
        f"{form.rounds} times or for as long. {_where(found.environment)}"
    )
    return f"{markdown(COLUMNS, rows(found.runs))}\n\n{where}"


def _shown_soak() -> str:
    if not _SOAK.exists():
        return "*Not run yet.*"
    found = msgspec.json.decode(_SOAK.read_bytes(), type=Soak)
    last = found.moments[-1]
    table = markdown(
        ("after the warm-up", "first third", "last third"),
        [
            (name, _figure(name, first), _figure(name, end))
            for name, (first, end) in found.figures.items()
        ],
    )
    return (
        f"{last.minutes:.0f} minutes, {found.processes} processes of {found.callers} callers, "
        f"{last.verbs:,} operations, {found.faults} faults, {last.errors:,} `StorageUnavailable`, "
        f"{len(found.flaws)} wrong replies; the first {found.warm_up:g} minutes are the warm-up. "
        f"{_where(found.environment)}\n\n{table}\n\n"
        "![Memory, tasks, connections and errors over time](reliability/soak.png)"
    )


def _figure(name: str, value: float) -> str:
    return f"{value / 1e6:.2f} MB" if "memory" in name else f"{value:,.0f}"


def _where(found: Environment) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in found.packages.items())
    where = f"{found.python}, {packages}; {found.machine}, {found.cores} cores"
    return f"{where}; revision {found.revision}, {found.date}."
