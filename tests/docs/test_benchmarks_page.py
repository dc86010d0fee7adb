"""docs/benchmarks.md shows the committed results; `nox -s bench -- report` brings it up to date."""

import re

import pytest

from benchmarks.declared import PLOTS, TABLES
from benchmarks.results import CONFIRMED, FOLDER, REFUTED, UNCLEAR, committed, judge
from benchmarks.tables import PAGE, rewritten

RESULTS = committed()


def test_page_matches_committed_results() -> None:
    """Every table and every marked figure is generated from the JSON files."""
    text = PAGE.read_text("utf-8")

    assert rewritten(text, RESULTS, TABLES) == text


def test_every_scenario_has_full_results() -> None:
    """Results of a quick run are not committed."""
    assert RESULTS.keys() == TABLES.keys() == PLOTS.keys()
    assert not [name for name, result in RESULTS.items() if result.settings["quick"]]


def test_plots_match_committed_results() -> None:
    """Each plot carries the digest of its figures, and the page shows it."""
    shown = re.findall(r"\]\(benchmarks/([\w-]+)\.png\)", PAGE.read_text("utf-8"))
    plots = {plot.name: RESULTS[name] for name, some in PLOTS.items() for plot in some}

    assert plots.keys() == set(shown) == {path.stem for path in FOLDER.glob("*.png")}
    for name, result in plots.items():
        assert result.digest().encode() in (FOLDER / f"{name}.png").read_bytes(), name


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
def test_disagreeing_rounds_give_no_verdict(rounds: list[float], verdict: str) -> None:
    """All rounds decide, except the lowest and the highest of nine."""
    assert judge("faster", "at least 1.2", rounds, (1.2).__le__).verdict == verdict
