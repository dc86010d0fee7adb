"""A process that increments a session's data: python incrementing_worker.py URL ID TIMES.

It prints "ready", waits for a line, increments with many concurrent callers, and prints how often.
"""

import asyncio
import sys

from aiosessions import JsonCodec, RedisStorage, Session, SessionManager

_CALLERS = 10


def _increment(session: Session[int]) -> None:
    session.data += 1


async def main(url: str, id: str, times: int) -> None:
    """Increment with concurrent callers."""
    async with (
        RedisStorage[int].from_url(url, ttl=600, codec=JsonCodec(int)) as storage,
        SessionManager(storage) as sessions,
    ):
        await sessions.get(id)
        print("ready", flush=True)  # noqa: T201 - the protocol of this process
        await asyncio.to_thread(sys.stdin.readline)

        async def caller() -> None:
            for _ in range(times // _CALLERS):
                await sessions.mutate(id, _increment, attempts=1_000, timeout=60)

        async with asyncio.TaskGroup() as callers:
            for _ in range(_CALLERS):
                callers.create_task(caller())
    print(times, flush=True)  # noqa: T201 - the protocol of this process


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
