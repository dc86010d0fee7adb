"""The results of a run, in a JSON file for each scenario.

Invariant: a reader can redo every table and plot from the JSON alone. This module, `tables` and
`page` need no package beyond the library's own dependencies, because the tests import them.
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
"""The folder of the committed results and plots."""

CONFIRMED = "confirmed"
REFUTED = "not confirmed"
UNCLEAR = "too noisy to tell"


class Environment(msgspec.Struct):
    """The machine and the versions."""

    date: str
    revision: str
    machine: str
    cores: int
    python: str
    packages: dict[str, str]
    placement: str = "load generator, relay and server share these cores"


class Noise(msgspec.Struct):
    """The steadiness of the machine: repeated times of one fixed computation.

    Attributes:
        median_ms: The median of its times.
        spread: The distance from the 10th to the 90th percentile, over the median.
        probes: The number of its times.
        load_before: The system's load average before the run. Above zero, other programs ran.
    """

    median_ms: float
    spread: float
    probes: int
    load_before: float

    @property
    def too_much(self) -> bool:
        """Whether small differences mean nothing."""
        return self.spread > 0.15


class Claim(msgspec.Struct):
    """Something that the figures confirm or refute.

    Attributes:
        claim: The claim.
        target: The figure that the claim promises.
        measured: The measured figure: the median of the rounds, and its confidence interval.
        verdict: `CONFIRMED` if all rounds in the interval meet the target, `REFUTED` if none of
            them does, else `UNCLEAR`.
    """

    claim: str
    target: str
    measured: str
    verdict: str


class Result(msgspec.Struct):
    """The result of one scenario.

    Attributes:
        scenario: The subcommand.
        environment: The machine and the versions.
        settings: Rounds, seconds and the like.
        noise: The steadiness of the machine.
        rows: The figures.
        claims: The claims and their verdicts.
        facts: Single figures by name, for the text around the tables.
        missing: The parts that were not measured, with the reasons.
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
        """A digest of the figures, which plots carry to name their source."""
        figures = msgspec.json.encode(self.rows, order="sorted")
        return hashlib.sha256(figures).hexdigest()[:16]


def stat(values: Iterable[float]) -> dict[str, float]:
    """The median, the lowest and the highest of the rounds."""
    ordered = sorted(values)
    median, low, high = statistics.median(ordered), ordered[0], ordered[-1]
    return {"median": _short(median), "low": _short(low), "high": _short(high)}


def _short(value: float) -> float:
    """Round to five significant digits: more would be noise in longer files."""
    return float(f"{value:.5g}")


def judge(
    claim: str,
    target: str,
    rounds: Sequence[float],
    meets: Callable[[float], bool],
    unit: str = "",
) -> Claim:
    """Compare the rounds with a target. Rounds that disagree give no verdict."""
    likely = around_median(rounds)
    met = [meets(value) for value in likely]
    verdict = CONFIRMED if all(met) else UNCLEAR if any(met) else REFUTED
    measured = f"{statistics.median(rounds):.3g}{unit}"
    if len(rounds) > 1:
        measured += f" ({likely[0]:.3g} to {likely[-1]:.3g})"
    return Claim(claim, target, measured, verdict)


def around_median(rounds: Sequence[float]) -> list[float]:
    """Sort the rounds and keep the confidence interval of the median.

    It is the interval of 95 % of the sign test (Conover, Practical Nonparametric Statistics), which
    holds for any distribution. Of 9 rounds it leaves out the lowest and the highest. Fewer than
    6 rounds cannot give this confidence, so it keeps all.
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
    """Write a result as JSON that can be compared line by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_as_json(result) + "\n", "utf-8")


def write_all(results: Sequence[Result], path: Path) -> None:
    """Write results into one file: several by scenario, a single one alone."""
    if len(results) == 1:
        write(results[0], path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(f'"{each.scenario}": {_as_json(each)}' for each in results)
    path.write_text(f"{{\n{text}\n}}\n", "utf-8")


def _as_json(result: Result) -> str:
    """JSON with a line for each field and each list item."""
    fields: list[str] = []
    for name, value in msgspec.structs.asdict(result).items():
        if isinstance(value, list):
            items = ",\n  ".join(msgspec.json.encode(item).decode() for item in value)
            fields.append(f'"{name}": [\n  {items}\n ]')
        else:
            fields.append(f'"{name}": {msgspec.json.encode(value).decode()}')
    return "{\n " + ",\n ".join(fields) + "\n}"


def read(path: Path) -> Result:
    """Read a result.

    Raises:
        msgspec.DecodeError: The file is not a result.
    """
    return msgspec.json.decode(path.read_bytes(), type=Result)


def committed(folder: Path = FOLDER) -> dict[str, Result]:
    """The committed results by scenario."""
    results = [read(path) for path in sorted(folder.glob("*.json"))]
    return {result.scenario: result for result in results}
