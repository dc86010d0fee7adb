"""Counts round trips, commands and bytes of one operation."""

import statistics
from collections.abc import Sequence

from .loops import Operation
from .relay import RelayProcess
from .results import Row
from .servers import MeasuredServer, Snapshot

_TIMES = 20
# A whole request arrives before its reply can leave.
_ROUND_TRIP = 0.004


async def count(
    operation: Operation, ids: Sequence[str], relay: RelayProcess, target: MeasuredServer
) -> Row:
    """Count the cost of one operation, from one caller on open connections.

    Raises:
        RuntimeError: The operations differ from each other, so one does not stand for all.
    """
    for id in ids[:_TIMES]:
        await operation(id)  # connects, and fills caches
    relay.delay(_ROUND_TRIP)
    with target.client() as client:
        before = Snapshot.of(client)
        relay.count()
        for id in ids[:_TIMES]:
            await operation(id)
        counts = relay.counts()
        executed = Snapshot.of(client).since(before).calls
    relay.delay(0)
    for number in (counts.turns, counts.replies, *counts.commands.values(), *executed.values()):
        if number % _TIMES:
            message = (
                "the operations differ in cost, or other clients use the server: "
                f"{counts}, {executed}"
            )
            raise RuntimeError(message)
    return {
        "round_trips": counts.turns // _TIMES,
        "commands": {name: number // _TIMES for name, number in counts.commands.items()},
        "executed": {name: number // _TIMES for name, number in executed.items()},
        "bytes_sent": round(counts.bytes_sent / _TIMES),
        "bytes_received": round(counts.bytes_received / _TIMES),
    }


def slope(round_trips: Sequence[float], latencies: Sequence[float]) -> float:
    """The round trips in a latency: its slope over the round-trip time."""
    return statistics.linear_regression(round_trips, latencies).slope
