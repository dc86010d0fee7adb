"""Runs the examples of docs/connecting.md that need a special kind of server.

These are marked ```py and the kind of server. Tests of that kind run them.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from tests.docs.snippets import run_as_program

PAGE = Path(__file__).parents[2] / "docs" / "connecting.md"

_BLOCK = re.compile(r"^```py (?P<kind>\w+)\n(?P<source>.*?)^```$", re.DOTALL | re.MULTILINE)


def kinds() -> list[str]:
    """The kinds of server that the page has an example for."""
    return [block["kind"] for block in _BLOCK.finditer(PAGE.read_text("utf-8"))]


def run_block(kind: str, places: Mapping[str, str]) -> None:
    """Run the example for a kind of server.

    Args:
        kind: The mark of the example.
        places: Replacements for addresses and paths of the example. Each of these must occur.
    """
    text = PAGE.read_text("utf-8")
    (block,) = (block for block in _BLOCK.finditer(text) if block["kind"] == kind)
    source = block["source"]
    for example, place in places.items():
        assert example in source
        source = source.replace(example, place)
    run_as_program(source, PAGE, text.count("\n", 0, block.start("source")))


def acl_commands() -> list[list[str]]:
    """The words of an ACL SETUSER command for one server, and of one for the nodes of a cluster.

    The page has the first, and the rights that a node needs besides.
    """
    lines = map(str.strip, PAGE.read_text("utf-8").splitlines())
    server, more = (shlex.split(line) for line in lines if line.startswith("ACL SETUSER "))
    assert server[:3] == more[:3]
    return [server, [*server, *more[3:]]]
