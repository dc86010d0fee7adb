"""The results of a scenario, in a JSON file from which every table and plot can be redone."""

import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.support.machine import Environment, Noise

Row = dict[str, Any]
"""Labels and figures. A measured figure is a dict with median, low and high over the rounds."""

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
"""The folder of the committed results and plots."""

CONFIRMED = "confirmed"
REFUTED = "not confirmed"
UNCLEAR = "too noisy to tell"


class Claim(msgspec.Struct):
    """A statement that figures confirm or refute.

    Attributes:
        claim: The statement.
        target: The figure that it promises.
        condition: The server, the event loop and the number of callers.
        measured: The median of the rounds, and its confidence interval.
        verdict: `CONFIRMED` if all rounds in the interval meet the target, `REFUTED` if none of
            them does, else `UNCLEAR`.
    """

    claim: str
    target: str
    condition: str
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
        facts: Single figures by name, for the text of docs/benchmarks.md.
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
    """The median, the lowest and the highest of the rounds, with five digits."""
    ordered = sorted(values)
    figures = {"median": statistics.median(ordered), "low": ordered[0], "high": ordered[-1]}
    return {name: float(f"{value:.5g}") for name, value in figures.items()}


def judge(
    claim: str,
    target: str,
    rounds: Sequence[float],
    meets: Callable[[float], bool],
    condition: str = "",
) -> Claim:
    """Compare the rounds with a target. Rounds that disagree give no verdict."""
    likely = around_median(rounds)
    met = [meets(value) for value in likely]
    verdict = CONFIRMED if all(met) else UNCLEAR if any(met) else REFUTED
    measured = f"{statistics.median(rounds):.3g}"
    if len(rounds) > 1:
        measured += f" ({likely[0]:.3g} to {likely[-1]:.3g})"
    return Claim(claim, target, condition, measured, verdict)


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
    """Write a result as JSON with a line for each field and each list item."""
    fields: list[str] = []
    for name, value in msgspec.structs.asdict(result).items():
        text = msgspec.json.encode(value).decode()
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(msgspec.json.encode(i).decode() for i in value) + "\n ]"
        fields.append(f'"{name}": {text}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n " + ",\n ".join(fields) + "\n}\n", "utf-8")


def committed(folder: Path = FOLDER) -> dict[str, Result]:
    """The committed results by scenario."""
    files = sorted(folder.glob("*.json"))
    results = [msgspec.json.decode(file.read_bytes(), type=Result) for file in files]
    return {result.scenario: result for result in results}
