"""Tables, declared as data, for the terminal and for docs/benchmarks.md.

A figure is the median over the rounds, with three digits. The percentage after "±" is half the
distance from the lowest round to the highest, relative to the median.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .declared import Table
from .results import FOLDER, Claim, Result, Row, select

PAGE = FOLDER.parent / "benchmarks.md"
_MARKED = re.compile(r"(<!-- (\w+): ([\w.-]+) -->)(.*?)(<!-- /\2 -->)", re.DOTALL)


@dataclass(frozen=True)
class Sheet:
    """A table of text, ready to be rendered."""

    title: str
    heads: Sequence[str]
    cells: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """The table for a page, without its title."""
        lines = [self.heads, ["---"] * len(self.heads), *self.cells]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """A figure with three digits: "12,300", "1.23", "0.012"."""
    if value >= 1000:
        digits = len(str(int(value))) - 3
        return f"{round(value, -digits):,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def shown(value: Any) -> str:
    """A figure as text: a median with its spread, a count, or a text."""
    if not isinstance(value, dict):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value["low"] == value["high"]:
        return number(value["median"])
    spread = (value["high"] - value["low"]) / 2 / value["median"] if value["median"] else 0.0
    return f"{number(value['median'])} ±{spread:.0%}"


def sheets(table: Table, rows: Iterable[Row]) -> list[Sheet]:
    """Render a declaration: one sheet for each combination of the split labels."""
    figures = table.columns.values()
    rows = [row for row in select(rows, **table.where) if any(name in row for name in figures)]
    rows = [row for row in rows if table.rows in row and (not table.across or table.across in row)]
    made = []
    for group in dict.fromkeys(tuple(row[label] for label in table.split) for row in rows):
        labels = dict(zip(table.split, group, strict=True))
        some = select(rows, **labels)
        values = _sorted(row[table.across] for row in some) if table.across else [None]
        cells = []
        for name in dict.fromkeys(row[table.rows] for row in some):
            line = [shown(name)]
            for value in values:
                wanted = {table.rows: name} | ({table.across: value} if table.across else {})
                row = next(iter(select(some, **wanted)), {})
                line += [shown(row.get(each, table.absent)) for each in figures]
            cells.append(line)
        heads = [head.format(shown(value)) for value in values for head in table.columns]
        title = ", ".join([table.title, *map(str, group)])
        made.append(Sheet(title, [table.rows, *heads], cells, table.note))
    return made


def _sorted(values: Iterable[Any]) -> list[Any]:
    """Distinct numbers in order, or distinct texts as they come."""
    return sorted(dict.fromkeys(values), key=lambda value: 0 if isinstance(value, str) else value)


def claims(some: Iterable[Claim]) -> Sheet:
    """A row for each claim, with the range of its medians over all conditions."""
    groups: dict[tuple[str, str], list[Claim]] = {}
    for each in some:
        groups.setdefault((each.claim, each.target), []).append(each)
    lines = []
    for (claim, target), group in groups.items():
        medians = dict.fromkeys(each.measured.partition(" (")[0] for each in group)
        measured = next(iter(medians))
        if len(medians) > 1:
            ordered = sorted(medians, key=float)
            measured = f"medians {ordered[0]} to {ordered[-1]}"
        verdicts = [each.verdict for each in group]
        counted = [f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts)]
        verdict = verdicts[0] if len(counted) == 1 else ", ".join(counted)
        lines.append((claim, target, measured, verdict))
    return Sheet("Claims", ("claim", "target", "measured", "verdict"), lines)


def rewritten(
    text: str, results: Mapping[str, Result], declared: Mapping[str, Sequence[Table]]
) -> str:
    """Generate the text between the markers of a page from the results."""

    def fill(marked: re.Match[str]) -> str:
        start, kind, name, _, end = marked.groups()
        if kind == "fact":
            scenario, _, fact = name.partition(".")
            return f"{start}{results[scenario].facts[fact]}{end}"
        if name == "claims":
            every = [each for scenario in declared for each in results[scenario].claims]
            return f"{start}\n\n{claims(every).markdown()}\n\n{end}"
        scenario, _, which = name.partition(".")
        (table,) = [each for each in declared[scenario] if each.name == which]
        # The page has the first sheet; the others differ in the server or the event loop.
        return f"{start}\n\n{sheets(table, results[scenario].rows)[0].markdown()}\n\n{end}"

    return _MARKED.sub(fill, text)


def rewrite(
    results: Mapping[str, Result], declared: Mapping[str, Sequence[Table]], page: Path = PAGE
) -> None:
    """Bring docs/benchmarks.md up to date."""
    page.write_text(rewritten(page.read_text("utf-8"), results, declared), "utf-8")
