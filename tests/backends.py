"""Runs coroutine tests on asyncio and on trio."""

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec

import anyio
import pytest

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
