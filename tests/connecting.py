"""The blocks of docs/connecting.md that need a server of their own kind, run as they stand.

They are marked ```py and the kind of server. Tests for that kind run them; `test_readme` runs what
is marked ```python.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from tests.test_readme import run_as_program

PAGE = Path(__file__).parent.parent / "docs" / "connecting.md"

_BLOCK = re.compile(r"^```py (?P<kind>\w+)\n(?P<source>.*?)^```$", re.DOTALL | re.MULTILINE)


def kinds() -> list[str]:
    """The kinds of server that the page has a block for."""
    return [block["kind"] for block in _BLOCK.finditer(PAGE.read_text("utf-8"))]


def run_block(kind: str, places: Mapping[str, str]) -> None:
    """Run the block for a kind of server.

    Args:
        kind: What the block is marked with.
        places: What to write in the place of addresses and paths, each of which has to occur.
    """
    text = PAGE.read_text("utf-8")
    (block,) = (block for block in _BLOCK.finditer(text) if block["kind"] == kind)
    source = block["source"]
    for example, place in places.items():
        assert example in source
        source = source.replace(example, place)
    run_as_program(source, PAGE, text.count("\n", 0, block.start("source")))


def acl_commands() -> list[list[str]]:
    """The ACL SETUSER commands of the page, in words: for one server, and for a cluster's nodes."""
    lines = map(str.strip, PAGE.read_text("utf-8").splitlines())
    return [shlex.split(line) for line in lines if line.startswith("ACL SETUSER ")]
