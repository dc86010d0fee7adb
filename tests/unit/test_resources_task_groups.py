"""A resource may hold a task group: `open` enters it and `close` leaves it, in one task."""

from contextlib import AsyncExitStack

import anyio
import pytest

from aiosessions import LocalStorage, Session, SessionManager, SessionResources


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_resource_may_hold_a_task_group(backend: str) -> None:
    """`open` and `close` run in one scope."""

    async def open(_session: Session[object]) -> AsyncExitStack:
        stack = AsyncExitStack()
        tasks = await stack.enter_async_context(anyio.create_task_group())
        tasks.start_soon(anyio.sleep_forever)
        stack.callback(tasks.cancel_scope.cancel)
        return stack

    async def main() -> None:
        async with SessionManager(LocalStorage(ttl=100)) as sessions:
            session = await sessions.create(kind="k", data={})
            resources = SessionResources(
                sessions, open, lambda stack: stack.aclose(), max_open=1, idle=50
            )
            async with resources, resources.use(session.id):
                pass
            assert resources.statistics().failed == 0
            assert resources.statistics().closed == 1

    anyio.run(main, backend=backend)
