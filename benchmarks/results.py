"""What a run leaves behind: a JSON file per scenario, from which tables, plots and pages are made.

Invariant: whatever is shown is made from a `Result`, so a reader can redo it from the JSON alone.
Nothing here, nor in `tables` and `page`, needs more than the library itself: the tests use them.
"""

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

Row = dict[str, Any]
"""One line of figures. A measured figure is a dict with median, low and high over the rounds."""

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
"""Where committed results and plots are."""

CONFIRMED = "confirmed"
REFUTED = "not confirmed"
UNCLEAR = "too noisy to tell"


class Environment(msgspec.Struct):
    """Where and with what it was measured."""

    date: str
    revision: str
    machine: str
    cores: int
    python: str
    packages: dict[str, str]
    placement: str = "load generator, relay and server share these cores"


class Noise(msgspec.Struct):
    """How steady the machine was: the time of one fixed computation, over and over.

    Attributes:
        median_ms: What it took.
        spread: The distance from the 10th to the 90th percentile, over the median.
        probes: How often it was timed.
        load_before: The system's load average before the run; above zero, others were at work.
    """

    median_ms: float
    spread: float
    probes: int
    load_before: float

    @property
    def too_much(self) -> bool:
        """Whether differences of a few per cent mean nothing."""
        return self.spread > 0.15


class Claim(msgspec.Struct):
    """Something that the figures confirm or refute.

    Attributes:
        claim: What is claimed.
        target: The figure it stands or falls with.
        measured: The figure found: the median of the rounds, and between what it lies.
        verdict: `CONFIRMED` if all rounds between these bounds meet the target, `REFUTED` if none
            does, else `UNCLEAR`.
    """

    claim: str
    target: str
    measured: str
    verdict: str


class Result(msgspec.Struct):
    """All that one scenario found.

    Attributes:
        scenario: The subcommand.
        environment: Where it was measured.
        settings: Rounds, seconds and the like.
        noise: How steady the machine was.
        rows: The figures.
        claims: What they say about what is claimed.
        facts: Single figures by name, for the text around the tables.
        missing: What could not be measured, and why.
    """

    scenario: str
    environment: Environment
    settings: dict[str, Any]
    noise: Noise
    rows: list[Row]
    claims: list[Claim]
    facts: dict[str, str]
    missing: dict[str, str]

    def digest(self) -> str:
        """Names the figures: plots carry it, so that it can be told from which JSON they are."""
        figures = msgspec.json.encode(self.rows, order="sorted")
        return hashlib.sha256(figures).hexdigest()[:16]


def stat(values: Iterable[float]) -> dict[str, float]:
    """A figure over the rounds."""
    ordered = sorted(values)
    median, low, high = statistics.median(ordered), ordered[0], ordered[-1]
    return {"median": _short(median), "low": _short(low), "high": _short(high)}


def _short(value: float) -> float:
    """Five significant digits: more would be noise, and would bloat the files."""
    return float(f"{value:.5g}")


def judge(
    claim: str,
    target: str,
    rounds: Sequence[float],
    meets: Callable[[float], bool],
    unit: str = "",
) -> Claim:
    """Hold what the rounds found against a target; when they disagree, nothing is concluded."""
    likely = around_median(rounds)
    met = [meets(value) for value in likely]
    verdict = CONFIRMED if all(met) else UNCLEAR if any(met) else REFUTED
    measured = f"{statistics.median(rounds):.3g}{unit}"
    if len(rounds) > 1:
        measured += f" ({likely[0]:.3g} to {likely[-1]:.3g})"
    return Claim(claim, target, measured, verdict)


def around_median(rounds: Sequence[float]) -> list[float]:
    """The rounds, in order, between which the true median lies with a confidence of 95 %.

    That is the interval of the sign test (Conover, Practical Nonparametric Statistics), which holds
    for any distribution. Of 9 rounds it leaves out the lowest and the highest; with fewer than 6
    there is no such confidence, and it leaves out none.
    """
    ordered = sorted(rounds)
    count = len(ordered)
    left_out = 0  # at each end
    chance = 2 / 2**count  # that the median is outside, if one were left out
    while (chance := chance + 2 * math.comb(count, left_out + 1) / 2**count) <= 0.05:
        left_out += 1
    return ordered[left_out : count - left_out]


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def write(result: Result, path: Path) -> None:
    """Write a result so that it can be read, and compared line by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_as_json(result) + "\n", "utf-8")


def write_all(results: Sequence[Result], path: Path) -> None:
    """Write several results into one file, by scenario; one alone as it is."""
    if len(results) == 1:
        write(results[0], path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(f'"{each.scenario}": {_as_json(each)}' for each in results)
    path.write_text(f"{{\n{text}\n}}\n", "utf-8")


def _as_json(result: Result) -> str:
    """JSON with a line for each field, and for each item of one that is a list."""
    fields: list[str] = []
    for name, value in msgspec.structs.asdict(result).items():
        if isinstance(value, list):
            items = ",\n  ".join(msgspec.json.encode(item).decode() for item in value)
            fields.append(f'"{name}": [\n  {items}\n ]')
        else:
            fields.append(f'"{name}": {msgspec.json.encode(value).decode()}')
    return "{\n " + ",\n ".join(fields) + "\n}"


def read(path: Path) -> Result:
    """Read a result again.

    Raises:
        msgspec.DecodeError: It is no such file.
    """
    return msgspec.json.decode(path.read_bytes(), type=Result)


def committed(folder: Path = FOLDER) -> dict[str, Result]:
    """The committed results by scenario."""
    results = [read(path) for path in sorted(folder.glob("*.json"))]
    return {result.scenario: result for result in results}
