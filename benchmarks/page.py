"""Keeps docs/benchmarks.md in step with the committed results.

The text between markers, which are HTML comments, is generated from the JSON files. The rest of the
page is written by hand:

    <!-- results: load --> tables and pictures of a scenario <!-- /results -->
    <!-- claims: --> every claim of every scenario <!-- /claims -->
    <!-- fact: load.record_bytes -->810<!-- /fact -->
"""

import re
from collections.abc import Mapping
from pathlib import Path

from .results import FOLDER, Result
from .tables import Table, claims, summary, tables

PAGE = FOLDER.parent / "benchmarks.md"
_MARKED = re.compile(
    r"(?P<start><!-- (?P<what>results|claims|fact): ?(?P<name>[\w.-]*) -->)"
    r".*?(?P<end><!-- /(?P=what) -->)",
    re.DOTALL,
)

PICTURES: dict[str, dict[str, str]] = {
    "load": {"load-throughput": "Loads a second by each alternative"},
    "rtt": {
        "rtt-latency": "Latency of a load over the round-trip time",
        "rtt-throughput": "Loads a second over the number of callers, for each round-trip time",
    },
    "server": {"server-costs": "What the server pays for a load"},
    "peers": {"peers-throughput": "Loads and request cycles a second by each library"},
    "local": {"local-scaling": "LocalStorage from 1,000 to 1,000,000 sessions"},
    "codecs": {"codecs-time": "Time to encode and to decode over the size of a session"},
    "cas": {"cas-throughput": "Saves a second, with and without a condition"},
    "shared": {
        "shared-summary": "Loads a second, and CPU for a load, beside two pools of redis.asyncio",
        "shared-throughput": "Loads a second, one shared connection beside drivers",
    },
    "arrivals": {"arrivals-latency": "Latency and CPU of loads that arrive at random"},
    "tls": {"tls-throughput": "Loads a second, and CPU for a load, over TLS"},
    "memory": {"memory-flat": "Memory of the process over the number of loads"},
}
"""The plots of each scenario, with their texts."""


def rewrite(found: Mapping[str, Result], page: Path = PAGE) -> None:
    """Bring the page up to date."""
    page.write_text(rewritten(page.read_text("utf-8"), found), "utf-8")


def rewritten(text: str, found: Mapping[str, Result]) -> str:
    """Generate the text between all markers of a page anew.

    Raises:
        KeyError: The page names a fact that is not in the results.
    """

    def fill(marked: re.Match[str]) -> str:
        start, name, end = marked["start"], marked["name"], marked["end"]
        match marked["what"]:
            case "fact":
                scenario, _, fact = name.partition(".")
                value = found[scenario].facts[fact] if scenario in found else "?"
                return f"{start}{value}{end}"
            case "claims":
                return f"{start}\n\n{_all_claims(found)}\n\n{end}"
            case _:
                shown = _shown(found[name]) if name in found else "*Not measured yet.*"
                return f"{start}\n\n{shown}\n\n{end}"

    return _MARKED.sub(fill, text)


def _all_claims(found: Mapping[str, Result]) -> str:
    every = [each for name in PICTURES if name in found for each in found[name].claims]
    return _markdown(claims(every)) if every else "*Not measured yet.*"


def _shown(result: Result) -> str:
    parts = ["  \n".join(summary(result))]
    parts += [
        f"![{text}](benchmarks/{name}.png)" for name, text in PICTURES[result.scenario].items()
    ]
    parts += [
        f"**{table.title}**\n\n{_markdown(table)}"
        for table in tables(result)
        if table.title != "Claims"  # they are all in one place
    ]
    return "\n\n".join(parts)


def _markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{text}\n\n{table.note}" if table.note else text
