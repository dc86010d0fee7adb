"""Sybil runs the code of README.md and docs/ against a real server.

Each ```python block is a program of its own, perhaps with `await` at the top level, and each
```pycon block is a session of `python -m asyncio`. Tests of the other topologies run the ```py
blocks of docs/connecting.md.
"""

from collections.abc import Iterator

import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

from tests.docs.snippets import run_program, run_session
from tests.support.servers import binaries, running


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The address of the server that takes the place of redis://localhost:6379."""
    with running(binaries()["valkey"]) as server:
        yield server.url.removesuffix("/0")


pytest_collect_file = Sybil(
    parsers=[CodeBlockParser("python", run_program), CodeBlockParser("pycon", run_session)],
    patterns=["README.md", "docs/*.md"],
    fixtures=["address"],
).pytest()
