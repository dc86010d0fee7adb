"""Runs coroutines: a test on asyncio and on trio, and what does not wait on neither."""

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import anyio
import pytest

P = ParamSpec("P")
T = TypeVar("T")

# What hangs is a failure. No test comes near this.
_PATIENCE = 30.0


def on_both(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a plain test of a coroutine test, once for each event loop; fixtures work as ever."""

    @functools.wraps(test)
    def run(*args: Any, backend: str, **kwargs: Any) -> None:
        async def main() -> None:
            with anyio.fail_after(_PATIENCE):
                await test(*args, **kwargs)

        anyio.run(main, backend=backend)

    signature = inspect.signature(test)
    backend = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, annotation=str)
    # What pytest looks at to see which fixtures a test asks for.
    vars(run)["__signature__"] = signature.replace(
        parameters=[*signature.parameters.values(), backend]
    )
    both: Callable[..., None] = pytest.mark.parametrize("backend", ["asyncio", "trio"])(run)
    return both


def done(verb: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that must not yield."""
    try:
        verb.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    verb.close()
    message = "the verb yielded to the event loop, so it is not atomic"
    raise AssertionError(message)
