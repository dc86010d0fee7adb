"""The event loops of coroutine tests, and a decorator that runs a test on trio too."""

import asyncio
import functools
import inspect
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final, ParamSpec

import anyio
import pytest
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


P = ParamSpec("P")

# A test that takes longer hangs.
_TIMEOUT = 30.0


def on_both(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a coroutine test once on each event loop; its fixtures work as usual."""

    @functools.wraps(test)
    def run(*args: Any, backend: str, **kwargs: Any) -> None:
        async def main() -> None:
            with anyio.fail_after(_TIMEOUT):
                await test(*args, **kwargs)

        anyio.run(main, backend=backend)

    signature = inspect.signature(test)
    backend = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, annotation=str)
    # pytest reads the fixtures that a test needs from this attribute.
    vars(run)["__signature__"] = signature.replace(
        parameters=[*signature.parameters.values(), backend]
    )
    both: Callable[..., None] = pytest.mark.parametrize("backend", ["asyncio", "trio"])(run)
    return both
