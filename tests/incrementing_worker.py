"""A process that increments a session's data: python incrementing_worker.py URL ID TIMES.

It says "ready", waits for a line on its input, increments with many callers at once, and says how
often it did.
"""

import asyncio
import sys

from aiosessions import JsonCodec, RedisStorage, Session, SessionManager

_CALLERS = 25


def _increment(session: Session[int]) -> None:
    session.data = (session.data or 0) + 1


async def main(url: str, id: str, times: int) -> None:
    """Increment, with a few callers at once."""
    async with (
        RedisStorage[int].from_url(url, ttl=600, codec=JsonCodec(int)) as storage,
        SessionManager(storage) as sessions,
    ):
        await sessions.get(id)
        print("ready", flush=True)  # noqa: T201 - that is how it talks
        await asyncio.to_thread(sys.stdin.readline)

        async def caller() -> None:
            for _ in range(times // _CALLERS):
                await sessions.mutate(id, _increment, attempts=1_000, timeout=60)

        async with asyncio.TaskGroup() as callers:
            for _ in range(_CALLERS):
                callers.create_task(caller())
    print(times, flush=True)  # noqa: T201 - as above


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
