"""docs/benchmarks.md says what the committed results say.

`python -m benchmarks report` brings it up to date; `nox -s bench -- report` runs that.
"""

import re

import pytest

from benchmarks.page import PAGE, PICTURES, rewritten
from benchmarks.results import (
    CONFIRMED,
    FOLDER,
    REFUTED,
    UNCLEAR,
    around_median,
    committed,
    judge,
    stat,
)
from benchmarks.tables import number

RESULTS = committed()


def test_the_page_is_made_of_the_committed_results() -> None:
    """Every table and every figure between markers is what the JSON files make of it."""
    text = PAGE.read_text("utf-8")

    assert rewritten(text, RESULTS) == text


def test_what_is_committed_is_a_full_run() -> None:
    """No quick look, and nothing that has no place on the page."""
    assert RESULTS.keys() <= PICTURES.keys()
    assert not [name for name, result in RESULTS.items() if result.settings["quick"]]


@pytest.mark.parametrize("scenario", PICTURES)
def test_the_page_has_a_place_for_every_scenario(scenario: str) -> None:
    """No result goes unshown."""
    assert f"<!-- results: {scenario} -->" in PAGE.read_text("utf-8")


def test_plots_are_drawn_from_the_committed_results() -> None:
    """Each plot carries the digest of the figures it was drawn from."""
    stale = [
        name
        for scenario, result in RESULTS.items()
        for name in PICTURES[scenario]
        if result.digest().encode() not in (FOLDER / f"{name}.png").read_bytes()
    ]

    assert not stale


def test_every_plot_is_shown() -> None:
    """No plot lies about that the page does not show."""
    drawn = {path.name for path in FOLDER.glob("*.png")}
    shown = re.findall(r"\]\(benchmarks/([\w-]+\.png)\)", PAGE.read_text("utf-8"))

    assert drawn == set(shown)


@pytest.mark.parametrize(
    ("rounds", "verdict"),
    [
        ([1.3, 1.2, 1.4], CONFIRMED),
        ([1.1, 1.0], REFUTED),
        ([1.1, 1.3], UNCLEAR),
        ([1.0, *[1.3] * 7, 1.1], UNCLEAR),
        ([1.0, *[1.3] * 8], CONFIRMED),
        ([1.3, *[1.1] * 8], REFUTED),
    ],
)
def test_rounds_that_disagree_conclude_nothing(rounds: list[float], verdict: str) -> None:
    """A claim stands if all rounds say so and falls if none does, but for one odd one of nine."""
    claim = judge("faster", "at least 1.2", rounds, lambda ratio: ratio >= 1.2)

    assert claim.verdict == verdict


@pytest.mark.parametrize(
    ("rounds", "left_out"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (15, 3), (20, 5)]
)
def test_the_median_lies_between_the_rounds_of_the_sign_test(rounds: int, left_out: int) -> None:
    """As in the published tables of confidence intervals for a median, at 95 %."""
    ordered = [float(each) for each in range(rounds)]

    assert around_median(ordered[::-1]) == ordered[left_out : rounds - left_out]


def test_figures_are_medians_with_their_extremes() -> None:
    """One odd round moves the extremes, not the figure."""
    assert stat([3.0, 1.0, 100.0]) == {"median": 3.0, "low": 1.0, "high": 100.0}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (123_456.0, "123,000"),
        (1_234.0, "1,230"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.01234, "0.012"),
        (0.0, "0.00"),
    ],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    """More digits than the noise allows are not shown."""
    assert number(value) == text
