"""The event loops that tests run on."""

import asyncio
import sys
from collections.abc import Callable
from typing import Final

import uvloop

LOOPS: Final[dict[str, Callable[[], asyncio.AbstractEventLoop]]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
"""Functions that make an event loop, by name. The first is the default of the tests."""

if sys.version_info >= (3, 12):

    def _eager() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        return loop

    LOOPS["eager"] = _eager
